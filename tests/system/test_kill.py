"""The node is killed -9 before any step of its work; nothing that was acknowledged is lost, and one SR reaches the PACS."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from killer import Killed
from machines import other_modality
from pydicom import dcmread
from pydicom.dataset import FileDataset
from roles import UNWATCHED, Role, hand_in, running, send, until
from sqlalchemy import update
from studies import study
from tiny_model import promote_tiny

from node import settings as site_settings
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.keep.catalogue import Catalogue, schema
from node.keep.records import DeliveryState, StudyState
from node.receive.intake import Intake, Taken
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
            open_states = set(reply.catalogue.studies.by_state()) - {StudyState.DELIVERED, StudyState.REMOVED}
            return not worked and not any(reply.catalogue.studies.by_state()[state] for state in open_states)

        until(idle, seconds=60, told="all studies delivered")


def assert_nothing_stuck(settings: Settings) -> None:
    """Every study and every delivery is at its end, and nobody claims one; only time has passed since the kill."""
    with Catalogue.open(settings.storage.catalogue) as catalogue:
        counts = catalogue.studies.by_state()
        assert counts[StudyState.DELIVERED] == sum(counts.values())
        rows = catalogue.deliveries.list()
        assert {(row.state, row.claimed_until) for row in rows} == {(DeliveryState.SENT, None)}
        assert {found.claimed_until for uid in catalogue.studies.uids() if (found := catalogue.studies.get(uid))} == {None}
        assert all(found.next_attempt_at is None for uid in catalogue.studies.uids() if (found := catalogue.studies.get(uid)))
        assert catalogue.studies.claim(claim_s=1, now=datetime.now(UTC)) is None
        assert catalogue.deliveries.claim(claim_s=1, now=datetime.now(UTC)) is None


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
        assert_nothing_stuck(site)
        if not killed:
            break
    else:
        pytest.fail("the replier has more steps than this test knows")
    assert step > 5, "the killer found no steps to kill at"


def _delivered(site: Settings, original_study_uid: str) -> bool:
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


def test_serve_starts_a_killed_role_again(settings: tuple[Path, Settings], pacs: Pacs) -> None:
    config, site = settings
    with running("serve", config=config) as role:
        role.event("listening")
        os.kill(started(role, "receive"), signal.SIGKILL)
        role.event("role ended")
        until(lambda: len([line for line in role.events if line["event"] == "listening"]) == 2, seconds=60)
        image = study(patient=1, images=1)[0]
        assert send([image], port=site.node.port) == [0]
        until(lambda: len(reports(pacs, image.StudyInstanceUID)) == 1, seconds=60)


@pytest.mark.long
def test_serve_killed_at_any_moment_leaves_no_child_and_is_taken_up_by_the_next_one(
    settings: tuple[Path, Settings], pacs: Pacs
) -> None:
    """While its roles start, when they listen, while an image is taken in, while a result is on its way, when it has arrived.

    Each is started again at once, as an init system does, while the children of the one before may still be ending.
    """
    config, site = settings
    pacs.delay_s = 0.5
    acknowledged: list[FileDataset] = []
    moments = ("role started", "listening", "instance stored", "study classified", "result delivered", "")
    for number, moment in enumerate(moments):
        image = study(patient=number + 1, images=1)[0]
        with running("serve", config=config) as role:
            sender = threading.Thread(target=_send_until_acknowledged, args=(image, site.node.port, acknowledged))
            if moment == "role started":
                role.event(moment)
                role.process.kill()
            sender.start()
            if not moment:
                sender.join(60)
                until(lambda: all(_delivered(site, one.StudyInstanceUID) for one in acknowledged), seconds=60)
                assert role.process.poll() is None
            else:
                if moment != "role started":
                    role.event(moment)
                    role.process.kill()
                role.process.wait(30)
                killed = [line["pid"] for line in role.events if line["event"] == "role started"]
                with running("serve", config=config) as following:
                    sender.join(60)
                    until(lambda uid=image.StudyInstanceUID: _delivered(site, uid), seconds=60)
                    until(lambda pids=killed: not any(map(_lives, pids)), seconds=30, told="children gone")
                    assert following.process.poll() is None
        assert not sender.is_alive()
    assert len(acknowledged) == len(moments)
    for image in acknowledged:
        assert len(reports(pacs, image.StudyInstanceUID)) == 1
    assert_nothing_stuck(site)


def _send_until_acknowledged(image: FileDataset, port: int, acknowledged: list[FileDataset]) -> None:
    until(lambda: send([image], port=port) == [0], seconds=60, told="acknowledged")
    acknowledged.append(image)


def started(role: Role, child: str) -> int:
    """Give the process of a child."""
    found = until(lambda: [one for one in role.events if one["event"] == "role started" and one["child"] == child])
    return int(found[-1]["pid"])


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.long
def test_a_replier_killed_before_any_step_of_a_removal_leaves_nothing_half_removed(
    settings: tuple[Path, Settings], pacs: Pacs
) -> None:
    config, _ = settings
    config.write_text(config.read_text().replace("answer = 0.0", "answer = 1.0").replace("quarantine = 0.0", "quarantine = 1.0"))
    site = site_settings.load(config)
    for step in range(STEPS_MAX):
        images, held = study(patient=step + 1, images=2), other_modality(1000 + step)
        intake = Intake.open(site)
        taken = [hand_in(intake, image) for image in (*images, held)]
        uid = intake.keys.uid(images[0].StudyInstanceUID)
        intake.close()
        assert taken == [Taken.NEW, Taken.NEW, Taken.HELD]
        answer_everything(site)
        let_days_pass(site, days=2)
        role = Killed("reply", config, at=step, trigger="Studies.take_for_removal")

        def settled(role: Killed = role, uid: str = uid) -> bool:
            with Catalogue.open(site.storage.catalogue) as catalogue:
                return role.dead() or (_state(catalogue, uid) is StudyState.REMOVED and not catalogue.instances.held())

        until(settled, seconds=60)
        killed = role.end()
        with respond.opened(site) as reply:
            while reply.tidy_step():
                pass
            assert _state(reply.catalogue, uid) is StudyState.REMOVED, f"killed before step {step}"
            assert reply.catalogue.instances.of_study(uid) == []
            assert reply.catalogue.instances.held() == []
            assert reply.vault.known(uid) == frozenset()
            assert len(reply.catalogue.results.of_study(uid)) == 1
        assert list((site.storage.root / "archive").rglob("*.dcm")) == [], f"killed before step {step}"
        assert list((site.storage.root / "quarantine").glob("*.sealed")) == [], f"killed before step {step}"
        assert len(reports(pacs, images[0].StudyInstanceUID)) == 1
        if not killed:
            break
    else:
        pytest.fail("a removal has more steps than this test knows")
    assert step > 5, "the killer found no steps to kill at"


def _state(catalogue: Catalogue, uid: str) -> StudyState | None:
    found = catalogue.studies.get(uid)
    return found.state if found else None


def let_days_pass(site: Settings, *, days: float) -> None:
    """Make everything there so much older, in its rows."""
    with Catalogue.open(site.storage.catalogue) as catalogue:
        then = datetime.now(UTC) - timedelta(days=days)
        catalogue.database.write(lambda connection: connection.execute(update(schema.study).values(last_at=then)))
        catalogue.database.write(lambda connection: connection.execute(update(schema.instance).values(received_at=then)))
        catalogue.database.write(lambda connection: connection.execute(update(schema.held).values(held_at=then)))
