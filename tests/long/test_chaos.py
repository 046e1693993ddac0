"""A minute and a half of kills: nothing that was acknowledged is lost, and each content of each study is answered once."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from time import monotonic, sleep

import pytest
from pydicom import dcmread
from pydicom.dataset import FileDataset
from roles import UNWATCHED, Role, hand_in, send, until
from studies import study
from tiny_model import promote_tiny

from node import settings as site_settings
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.keep.catalogue import Catalogue
from node.keep.records import DeliveryState, StudyState
from node.receive.intake import Intake, Taken
from node.settings import Settings

SEED = 20260117
STUDIES = 40
SENDERS = 3
CHAOS_S = 90.0
CALM_S = 150.0
"""The supervisor's longest pause (30 s), a claim that ends, the last retries."""
NAME = "SECRET^NAME"


class Served:
    """`osteon serve`, started again as an init system does when it ends, for whatever reason."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.roles: list[Role] = []
        self.exits: list[int] = []
        self.start()

    def start(self) -> None:
        self.roles.append(Role("serve", "--config", str(self.config)))

    def keep_running(self) -> None:
        """Start it again when it has ended by itself."""
        code = self.roles[-1].process.poll()
        if code is not None:
            self.exits.append(code)
            self.start()

    def kill_child(self, name: str) -> bool:
        """Kill -9 the child that runs; False when none does at the moment."""
        events = list(self.roles[-1].events)
        started = [line["pid"] for line in events if line["event"] == "role started" and line["child"] == name]
        ended = sum(line["event"] == "role ended" and line["child"] == name for line in events)
        if len(started) <= ended:
            return False
        try:
            os.kill(started[-1], signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """Kill -9 the supervisor; its children end by themselves."""
        self.roles[-1].process.kill()
        self.roles[-1].process.wait(10)
        self.start()

    def close(self) -> None:
        for role in self.roles:
            role.close()

    def told(self) -> str:
        """Everything that was printed or logged."""
        return "\n".join(str(line) for role in self.roles for line in [*role.events, *role.noise])

    def count(self, name: str) -> int:
        return sum(line["event"] == name for role in self.roles for line in role.events)


@dataclass
class Chaos:
    """What goes wrong, and when."""

    served: Served
    pacs: Pacs
    stop: threading.Event
    rng: random.Random
    troubles: Iterator[str] = field(default_factory=lambda: cycle(("off", "full", "refusing", "aborting", "slow")))
    pacs_off: bool = False
    done: Counter[str] = field(default_factory=Counter)
    errors: list[BaseException] = field(default_factory=list)

    def run(self) -> None:
        try:
            while not self.stop.wait(self.rng.uniform(1, 3)):
                self.served.keep_running()
                self.strike(self.rng.choices(("receive", "reply", "serve", "pacs"), (4, 4, 2, 5))[0])
        except BaseException as error:
            self.errors.append(error)

    def strike(self, what: str) -> None:
        if what == "pacs":
            self.trouble_pacs()
        elif what == "serve":
            self.served.kill()
            self.done["serve killed"] += 1
        elif self.served.kill_child(what):
            self.done[f"{what} killed"] += 1

    def trouble_pacs(self) -> None:
        """Put the PACS right when something is wrong with it, else wrong."""
        pacs = self.pacs
        if pacs.store_status or pacs.aborts or pacs.delay_s or self.pacs_off:
            self.mend()
            return
        trouble = next(self.troubles)
        self.done[f"PACS {trouble}"] += 1
        if trouble == "off":
            self.pacs_off = True
            pacs.stop()
        pacs.store_status = {"full": 0xA700, "refusing": 0xC123}.get(trouble, 0)
        pacs.aborts = trouble == "aborting"
        pacs.delay_s = 1.0 if trouble == "slow" else 0.0

    def mend(self) -> None:
        self.pacs.store_status, self.pacs.aborts, self.pacs.delay_s = 0, False, 0.0
        if self.pacs_off:
            self.pacs.start()
            self.pacs_off = False


@dataclass
class Sender:
    """A modality: sends its studies over the whole time, each image until it is acknowledged, to any of the receivers."""

    studies: list[list[FileDataset]]
    ports: Sequence[int]
    rng: random.Random
    over_s: float = CHAOS_S
    acknowledged: list[FileDataset] = field(default_factory=list)
    attempts: int = 0

    def run(self) -> None:
        for images in self.studies:
            sleep(self.rng.uniform(0.3, 1.6) * self.over_s / len(self.studies) * 0.8)
            # One association for the whole study, or one for each image
            for batch in [images] if self.rng.random() < 0.7 else [[one] for one in images]:
                waiting = list(batch)
                deadline = monotonic() + self.over_s + CALM_S
                while waiting and monotonic() < deadline:
                    self.attempts += 1
                    statuses = send(waiting, port=self.rng.choice(self.ports))
                    self.acknowledged += [one for one, code in zip(waiting, statuses, strict=False) if code == 0]
                    waiting = [one for one, code in zip(waiting, statuses or [None] * len(waiting), strict=True) if code != 0]
                    sleep(0.2 if waiting else 0.0)


@pytest.mark.long
@pytest.mark.timeout(420)
def test_nothing_is_lost_and_each_study_is_answered_once_whatever_is_killed(
    tmp_path: Path, free_port: Callable[[], int], capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(SEED)
    pacs = Pacs(tmp_path / "pacs", callers=["OSTEON"], port=free_port())
    pacs.start()
    config, settings = site_of(tmp_path / "site", free_port(), pacs)
    patients = [
        study(patient=number, images=2, PatientName=f"{NAME}{number}", PatientID=f"SECRET{number:04d}")
        for number in range(STUDIES)
    ]
    senders = [Sender(patients[at::SENDERS], [settings.node.port], random.Random(f"{SEED} {at}")) for at in range(SENDERS)]
    served = Served(config)
    chaos = Chaos(served, pacs, threading.Event(), rng)
    threads = [threading.Thread(target=sender.run, daemon=True) for sender in senders]
    trouble = threading.Thread(target=chaos.run, daemon=True)
    try:
        until(lambda: served.count("listening"), seconds=60)
        for thread in (*threads, trouble):
            thread.start()
        sleep(CHAOS_S)
        chaos.stop.set()
        trouble.join(60)
        assert not chaos.errors, chaos.errors
        chaos.mend()
        calm_from = monotonic()

        with Catalogue.open(settings.storage.catalogue) as catalogue:

            def calm() -> bool:
                served.keep_running()
                sending = any(thread.is_alive() for thread in threads)
                return not sending and catalogue.studies.by_state()[StudyState.DELIVERED] == STUDIES

            until(calm, seconds=CALM_S, told=f"all studies delivered {chaos.done} {served.exits}")
        calm_s = monotonic() - calm_from
    finally:
        served.close()
        pacs.stop()
    attempts = sum(sender.attempts for sender in senders)
    with capfd.disabled():
        print(
            f"\nchaos: {dict(chaos.done)}, serve ended by itself {served.exits}, calm after {calm_s:.0f} s, sent {attempts} times"
        )
        print(f"chaos: {served.count('result delivered')} delivered, {served.count('result not delivered')} not delivered")
    assert min(chaos.done["receive killed"], chaos.done["reply killed"], chaos.done["serve killed"]) > 1, chaos.done
    assert sum(count for what, count in chaos.done.items() if what.startswith("PACS")) > 1, chaos.done
    assert "SECRET" not in served.told().upper()
    acknowledged = [one for sender in senders for one in sender.acknowledged]
    assert len({one.SOPInstanceUID for one in acknowledged}) == 2 * STUDIES
    reports = answers(pacs)
    with capfd.disabled():
        print(f"chaos: {len(pacs.held('SR'))} reports of {STUDIES} studies; {Counter(len(found) for found in reports.values())}")
    assert_kept(settings, acknowledged)
    assert_answered_once(settings, pacs, patients)
    assert_nothing_left_over(settings)


def site_of(folder: Path, port: int, pacs: Pacs) -> tuple[Path, Settings]:
    config = init_site(
        folder,
        node={"port": port, "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "purpose": "answer"}]},
        pacs=[{"name": "main", "ae_title": pacs.ae_title, "host": "127.0.0.1", "port": pacs.port, "timeout_s": 3.0}],
        completion={"quiet_s": 2.0},
        inference={"claim_s": 4.0, "threads": 1},
        delivery={"retry_first_s": 0.2, "retry_max_s": 2.0},
        metrics=UNWATCHED,
    )
    settings = site_settings.load(config)
    promote_tiny(settings.storage.root / "models")
    return config, settings


def answers(pacs: Pacs) -> dict[str, list[FileDataset]]:
    """Give the SRs in the PACS by study; an instance UID is a file, and a file is one SR."""
    found: dict[str, list[FileDataset]] = {}
    for path in pacs.held("SR"):
        sr = dcmread(path)
        found.setdefault(sr.StudyInstanceUID, []).append(sr)
    return found


def assert_kept(settings: Settings, acknowledged: list[FileDataset]) -> None:
    """Every acknowledged image is in the archive with its pixels, and known when it comes again."""
    intake = Intake.open(settings)
    try:
        for one in acknowledged:
            kept = intake.catalogue.instances.find(intake.keys.uid(one.SOPInstanceUID))
            assert kept is not None
            assert intake.archive.read(kept).PixelData == one.PixelData
            assert intake.vault.study(kept.study_uid).original_study_uid == one.StudyInstanceUID
        assert intake.catalogue.instances.count() == 2 * STUDIES == len(list(intake.archive.folder.rglob("*.dcm")))
        assert not intake.catalogue.instances.held()
        assert hand_in(intake, acknowledged[0]) is Taken.KNOWN
    finally:
        intake.close()


def assert_answered_once(settings: Settings, pacs: Pacs, patients: list[list[FileDataset]]) -> None:
    """One SR for what each study consisted of.

    A study whose second image came after its answer, because the receiver was dead meanwhile, has a second answer that names the
    first: the content is another.
    """
    found = answers(pacs)
    late = 0
    for images in patients:
        reports = sorted(found.pop(images[0].StudyInstanceUID), key=lambda sr: len(evidence(sr)))
        contents = [evidence(sr) for sr in reports]
        assert len({frozenset(content) for content in contents}) == len(contents), "two answers to one content"
        assert contents[-1] == {one.SOPInstanceUID for one in images}
        for sr in reports:
            assert (sr.PatientID, sr.PatientName) == (images[0].PatientID, images[0].PatientName)
        if len(reports) > 1:
            late += 1
            assert reports[0].SOPInstanceUID in str(reports[1].PredecessorDocumentsSequence)
    assert not found, "answers to studies that nobody sent"
    assert late < STUDIES / 2, "most studies are answered exactly once"
    with Catalogue.open(settings.storage.catalogue) as catalogue:
        noted = [row.document.sop_uid for row in catalogue.deliveries.list() if row.document is not None]
    assert sorted(noted) == sorted(path.stem for path in pacs.held())


def evidence(sr: FileDataset) -> set[str]:
    """Give the images that an SR is about."""
    return {
        item.ReferencedSOPInstanceUID
        for of_study in sr.CurrentRequestedProcedureEvidenceSequence
        for series in of_study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }


def assert_nothing_left_over(settings: Settings) -> None:
    """No claim is left, and what a kill left half written is out of everybody's way and names nobody."""
    with Catalogue.open(settings.storage.catalogue) as catalogue:
        counts = catalogue.studies.by_state()
        assert counts[StudyState.DELIVERED] == sum(counts.values()) == STUDIES
        assert {row.state for row in catalogue.deliveries.list()} == {DeliveryState.SENT}
        assert all(row.claimed_until is None for row in catalogue.deliveries.list())
        assert catalogue.studies.claim(claim_s=1, now=datetime.now(UTC)) is None
    for path in settings.storage.root.rglob("*"):
        if path.is_file():
            content = path.read_bytes().upper()
            assert b"SECRET" not in content, path
            assert path.suffix != ".tmp" or path.name.startswith("."), path
