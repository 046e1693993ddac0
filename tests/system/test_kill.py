"""The node is killed -9 before any step of its work; nothing that was acknowledged is lost, and one SR reaches the PACS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from killer import Killed
from pydicom import dcmread
from roles import UNWATCHED, hand_in, running, send, until
from studies import study
from tiny_model import promote_tiny

from node import settings as site_settings
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.keep.records import StudyState
from node.receive.intake import Intake
from node.reply import respond
from node.settings import Settings

STEPS_MAX = 80


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with Pacs(tmp_path / "pacs", callers=["OSTEON"]) as running_pacs:
        yield running_pacs


@pytest.fixture
def settings(tmp_path: Path, pacs: Pacs, free_port: Callable[[], int]) -> tuple[Path, Settings]:
    config = init_site(
        tmp_path / "site",
        node={"port": free_port(), "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "purpose": "answer"}]},
        pacs=[{"name": "main", "ae_title": pacs.ae_title, "host": "127.0.0.1", "port": pacs.port, "timeout_s": 5.0}],
        completion={"quiet_s": 0.0},
        inference={"claim_s": 0.5},
        delivery={"retry_first_s": 0.1},
        metrics=UNWATCHED,
    )
    settings = site_settings.load(config)
    promote_tiny(settings.storage.root / "models")
    return config, settings


def reports(pacs: Pacs, original_study_uid: str) -> set[str]:
    """Give the UIDs of the SRs that the PACS holds for a study."""
    headers = [dcmread(path, stop_before_pixels=True) for path in list(pacs.received)]
    return {one.SOPInstanceUID for one in headers if one.StudyInstanceUID == original_study_uid and one.Modality == "SR"}


def answer_everything(settings: Settings) -> None:
    """Run what a restarted replier would, until nothing waits."""
    with respond.opened(settings) as reply:

        def idle() -> bool:
            worked = reply.step()
            for pacs in settings.pacs:
                worked = reply.deliver_step(pacs) or worked
            open_states = set(reply.catalogue.studies.by_state()) - {StudyState.DELIVERED}
            return not worked and not any(reply.catalogue.studies.by_state()[state] for state in open_states)

        until(idle, seconds=60, told="all studies delivered")


def test_a_replier_killed_before_any_step_still_leads_to_one_report(settings: tuple[Path, Settings], pacs: Pacs) -> None:
    config, site = settings
    for step in range(STEPS_MAX):
        images = study(patient=step + 1, images=2)
        intake = Intake.open(site)
        for image in images:
            hand_in(intake, image)
        intake.close()
        role = Killed("reply", config, at=step, trigger="Studies.content")

        def settled(role: Killed = role, uid: str = images[0].StudyInstanceUID) -> bool:
            return role.dead() or _delivered(site, uid)

        until(settled, seconds=60)
        killed = role.end()
        answer_everything(site)
        assert len(reports(pacs, images[0].StudyInstanceUID)) == 1, f"killed before step {step}"
        if not killed:
            break
    else:
        pytest.fail("the replier has more steps than this test knows")
    assert step > 5, "the killer found no steps to kill at"


def _delivered(site: Settings, original_study_uid: str) -> bool:
    from node.keep.catalogue import Catalogue
    from node.pseudonym import SiteKeys

    keys = SiteKeys.derive(site_settings.load_key(site.storage.site_key))
    with Catalogue.open(site.storage.catalogue) as catalogue:
        found = catalogue.studies.get(keys.uid(original_study_uid))
    return found is not None and found.state is StudyState.DELIVERED


def test_a_receiver_killed_before_any_step_loses_nothing_it_acknowledged(settings: tuple[Path, Settings]) -> None:
    config, site = settings
    port = site.node.port
    for step in range(STEPS_MAX):
        image = study(patient=step + 1, images=1)[0]
        role = Killed("receive", config, at=step, trigger="Instances.find")
        statuses: list[int | None] = until(lambda one=image: send([one], port=port), seconds=60)
        if statuses != [0]:
            until(role.dead)
        killed = role.end()
        intake = Intake.open(site)
        try:
            uid = intake.keys.uid(image.SOPInstanceUID)
            known = intake.catalogue.instances.find(uid)
            if statuses == [0]:
                assert known is not None, f"acknowledged and lost when killed before step {step}"
            taken = hand_in(intake, image)
            kept = intake.catalogue.instances.find(uid)
            assert kept is not None, f"a sender that tries again is not served after step {step}: {taken}"
            assert intake.archive.read(kept).SOPInstanceUID == uid
            assert intake.vault.study(kept.study_uid).original_study_uid == image.StudyInstanceUID
            assert len(intake.catalogue.instances.of_study(kept.study_uid)) == 1
        finally:
            intake.close()
        if not killed:
            break
    else:
        pytest.fail("the receiver has more steps than this test knows")
    assert step > 3, "the killer found no steps to kill at"


def test_serve_starts_a_killed_role_again_and_ends_with_its_children(settings: tuple[Path, Settings], pacs: Pacs) -> None:
    import os
    import signal

    config, site = settings
    with running("serve", config=config) as role:
        first = until(lambda: [line for line in role.events if line["event"] == "role started"][:2] or None, seconds=60)
        role.event("listening")
        victim = next(line for line in first if line["child"] == "receive")
        os.kill(victim["pid"], signal.SIGKILL)
        role.event("role ended")
        until(lambda: len([line for line in role.events if line["event"] == "listening"]) == 2, seconds=60)
        images = study(patient=1)
        assert send(images, port=site.node.port) == [0, 0]
        until(lambda: len(reports(pacs, images[0].StudyInstanceUID)) == 1, seconds=60)
        children = [line["pid"] for line in role.events if line["event"] == "role started"]
        role.process.kill()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), seconds=30, told="children gone")
