"""Two receivers and two repliers on one PostgreSQL and one archive, killed again and again: each study is answered once."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, sleep

import pytest
from postgres import cluster
from pydicom.dataset import FileDataset
from roles import Role, until
from studies import study
from test_chaos import Sender, answers, evidence
from tiny_model import promote_tiny

from node import settings as site_settings
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.keep.catalogue import Catalogue
from node.keep.records import DeliveryState, StudyState
from node.receive.intake import Intake
from node.settings import Settings

SEED = 20260217
STUDIES, IMAGES = 200, 2
SENDERS = 4
SENDING_S, CALM_S = 80.0, 90.0
QUIET_S = 8.0
"""Longer than it takes to turn to the other receiver: a study's second image is not late."""
UP = {"receive": "listening", "reply": "replying"}


@dataclass
class Host:
    """One machine: a settings file of its own, and its roles, started again when they are killed."""

    name: str
    config: Path
    roles: dict[str, Role] = field(default_factory=dict)
    ended: list[Role] = field(default_factory=list)

    def start(self, kind: str) -> None:
        self.roles[kind] = Role(kind, "--config", str(self.config))

    def is_up(self, kind: str) -> bool:
        return any(line["event"] == UP[kind] for line in list(self.roles[kind].events))

    def kill(self, kind: str) -> None:
        """Kill -9, and start it again as an init system does."""
        self.roles[kind].kill()
        self.ended.append(self.roles[kind])
        self.start(kind)

    def told(self) -> str:
        return "\n".join(str(line) for role in (*self.ended, *self.roles.values()) for line in [*role.events, *role.noise])


@dataclass
class Reaper:
    """Kills one receiver and one replier every few seconds, never the last one that is up."""

    hosts: list[Host]
    stop: threading.Event = field(default_factory=threading.Event)
    done: Counter[str] = field(default_factory=Counter)
    errors: list[BaseException] = field(default_factory=list)

    def run(self) -> None:
        turn = 0
        try:
            while not self.stop.wait(3.0):
                turn += 1
                for kind in UP:
                    if all(host.is_up(kind) for host in self.hosts):
                        self.hosts[turn % 2].kill(kind)
                        self.done[f"{kind} {self.hosts[turn % 2].name}"] += 1
        except BaseException as error:
            self.errors.append(error)


@pytest.fixture
def hosts(tmp_path: Path, free_port: Callable[[], int], pacs: Pacs) -> Iterator[list[Host]]:
    """Give two hosts that share the databases, the keys, the archive and the models, and nothing else."""
    with cluster({}) as server:
        server.sql("CREATE DATABASE catalogue", "CREATE DATABASE vault")
        config = init_site(
            tmp_path / "site",
            node={"port": free_port(), "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "purpose": "answer"}]},
            storage={"catalogue": server.url("catalogue"), "vault": server.url("vault")},
            pacs=[{"name": "main", "ae_title": pacs.ae_title, "host": "127.0.0.1", "port": pacs.port, "timeout_s": 5.0}],
            completion={"quiet_s": QUIET_S},
            inference={"claim_s": 6.0, "threads": 1},
            delivery={"retry_first_s": 0.2, "retry_max_s": 2.0},
        )
        here = site_settings.load(config)
        promote_tiny(here.storage.root / "models")
        other = config.with_name("other.toml")
        other.write_text(config.read_text("utf-8").replace(f"port = {here.node.port}\n", f"port = {free_port()}\n", 1), "utf-8")
        both = [Host("one", config), Host("other", other)]
        try:
            for host in both:
                for kind in UP:
                    host.start(kind)
            yield both
        finally:
            for host in both:
                for role in host.roles.values():
                    role.close()


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with Pacs(tmp_path / "pacs", callers=["OSTEON"]) as running:
        yield running


@pytest.mark.long
@pytest.mark.timeout(420)
def test_two_receivers_and_two_repliers_answer_each_study_once_whatever_is_killed(
    hosts: list[Host], pacs: Pacs, capfd: pytest.CaptureFixture[str]
) -> None:
    patients = [
        study(patient=number, images=IMAGES, PatientName=f"SECRET^NAME{number}", PatientID=f"SECRET{number:04d}")
        for number in range(STUDIES)
    ]
    both = [site_settings.load(host.config) for host in hosts]
    ports = [each.node.port for each in both]
    assert len(set(ports)) == 2
    senders = [Sender(patients[at::SENDERS], ports, random.Random(f"{SEED} {at}"), over_s=SENDING_S) for at in range(SENDERS)]
    threads = [threading.Thread(target=sender.run, daemon=True) for sender in senders]
    reaper = Reaper(hosts)
    killing = threading.Thread(target=reaper.run, daemon=True)
    until(lambda: all(host.is_up(kind) for host in hosts for kind in UP), seconds=120, told="both hosts are up")
    began = monotonic()
    for thread in (*threads, killing):
        thread.start()
    for thread in threads:
        thread.join(SENDING_S + CALM_S)
    sleep(2 * QUIET_S)  # the last studies are answered under kills, too
    reaper.stop.set()
    killing.join(60)
    assert not reaper.errors, reaper.errors
    with Catalogue.open(both[0].storage.catalogue) as catalogue:
        until(
            lambda: catalogue.studies.by_state()[StudyState.DELIVERED] == STUDIES,
            seconds=CALM_S,
            told=f"all studies delivered {reaper.done}",
        )
    with capfd.disabled():
        sent = sum(sender.attempts for sender in senders)
        print(f"\ntwo hosts: killed {dict(reaper.done)}, sent {sent} times, all answered after {monotonic() - began:.0f} s")
    assert len(reaper.done) == 4, "both of each kind were killed"
    assert min(reaper.done.values()) > 1, reaper.done
    assert "SECRET" not in "".join(host.told() for host in hosts).upper()
    assert_answered_once(pacs, patients)
    assert_kept(both[0], [one for sender in senders for one in sender.acknowledged])


def assert_answered_once(pacs: Pacs, patients: list[list[FileDataset]]) -> None:
    """One SR a study, of all its images, to its own patient."""
    found = answers(pacs)
    assert len(found) == STUDIES
    for images in patients:
        (sr,) = found[images[0].StudyInstanceUID]
        assert evidence(sr) == {one.SOPInstanceUID for one in images}
        assert (sr.PatientID, sr.PatientName) == (images[0].PatientID, images[0].PatientName)


def assert_kept(settings: Settings, acknowledged: list[FileDataset]) -> None:
    """What was acknowledged is kept; archive, catalogue and vault hold the same images; nobody holds a claim."""
    intake = Intake.open(settings)
    try:
        catalogue = intake.catalogue
        uids = {intake.keys.uid(images.SOPInstanceUID) for images in acknowledged}
        assert len(uids) == STUDIES * IMAGES
        assert {path.stem for path in intake.archive.folder.rglob("*.dcm")} == uids
        studies = {intake.keys.uid(images.StudyInstanceUID) for images in acknowledged}
        assert {image.sop_uid for study_uid in studies for image in catalogue.instances.of_study(study_uid)} == uids
        assert {image.sop_uid for study_uid in studies for image in intake.vault.instances(study_uid)} == uids
        assert catalogue.instances.count() == len(uids)
        assert not catalogue.instances.held()
        counts = catalogue.studies.by_state()
        assert counts[StudyState.DELIVERED] == sum(counts.values()) == STUDIES
        rows = catalogue.deliveries.list()
        assert {(row.state, row.claimed_until) for row in rows} == {(DeliveryState.SENT, None)}
        assert len(rows) == STUDIES
        assert catalogue.studies.claim(claim_s=1, now=datetime.now(UTC)) is None
    finally:
        intake.close()
