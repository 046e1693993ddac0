"""A site is lost, and comes back from its last set on an empty machine: the same patients, the same answers, nothing twice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from roles import hand_in
from studies import study
from tiny_model import promote_tiny
from typer.testing import CliRunner

from node import __main__ as command
from node import settings as site_settings
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.keep import backup
from node.keep.catalogue import Catalogue
from node.keep.records import Hold, StudyState
from node.receive.intake import Intake, Taken
from node.reply import respond
from node.settings import Settings


def osteon(*arguments: str, code: int = 0) -> str:
    """Run the command line in this process and give what it said."""
    done = CliRunner().invoke(command.build(), arguments)
    error = done.exception
    assert done.exit_code == code or (code == 2 and error is not None), f"{done.exit_code}: {done.output} {error!r}"
    return done.output + (str(error) if error else "")


@dataclass
class Machine:
    """One machine with a site on it."""

    folder: Path
    pacs: Pacs

    @property
    def config(self) -> Path:
        return self.folder / "ae_config.toml"

    @property
    def settings(self) -> Settings:
        return site_settings.load(self.config)

    @property
    def root(self) -> Path:
        return self.settings.storage.root

    def send(self, *images: Dataset, called: str = "OSTEON") -> list[Taken]:
        intake = Intake.open(self.settings)
        try:
            return [hand_in(intake, image, called=called) for image in images]
        finally:
            intake.close()

    def uid(self, image: Dataset) -> str:
        intake = Intake.open(self.settings)
        intake.close()
        return intake.keys.uid(image.StudyInstanceUID)

    def work(self) -> None:
        """Let the replier do all there is to do now."""
        with respond.opened(self.settings) as reply:
            busy = True
            while busy:
                busy = reply.step()
                for pacs in self.settings.pacs:
                    busy = reply.deliver_step(pacs) or busy

    def state(self, image: Dataset) -> StudyState:
        uid = self.uid(image)
        with self.catalogue() as catalogue:
            found = catalogue.studies.get(uid)
        assert found is not None
        return found.state

    @contextmanager
    def catalogue(self) -> Iterator[Catalogue]:
        with Catalogue.open(self.settings.storage.catalogue) as catalogue:
            yield catalogue

    def reports(self) -> dict[str, FileDataset]:
        """Give the SRs in the PACS, by SOP Instance UID."""
        read = [dcmread(path) for path in self.pacs.received]
        return {one.SOPInstanceUID: one for one in read if one.Modality == "SR"}

    def answers(self, image: Dataset) -> list[str]:
        """Give the patients named by the SRs of a study."""
        return [one.PatientName for one in self.reports().values() if one.StudyInstanceUID == image.StudyInstanceUID]

    def osteon(self, *arguments: str, code: int = 0) -> str:
        return osteon(*arguments, "--config", str(self.config), code=code)

    def backup(self, to: Path, *more: str) -> backup.Set:
        self.osteon("backup", "--to", str(to), *more)
        return backup.sets(to)[-1]

    def restore(self, one: backup.Set, *, code: int = 0) -> str:
        return self.osteon("restore", str(one.folder), code=code)


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with Pacs(tmp_path / "pacs", callers=["OSTEON"]) as running:
        yield running


def machine(folder: Path, pacs: Pacs, **storage: str) -> Machine:
    init_site(
        folder,
        node={"port": 0, "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "purpose": "answer"}]},
        pacs=[{"name": "main", "ae_title": pacs.ae_title, "host": "127.0.0.1", "port": pacs.port}],
        completion={"quiet_s": 0.0},
        storage=storage,
    )
    return Machine(folder, pacs)


@pytest.fixture
def old(tmp_path: Path, pacs: Pacs) -> Machine:
    return machine(tmp_path / "old", pacs)


@pytest.fixture
def new(tmp_path: Path, pacs: Pacs, old: Machine) -> Machine:
    """Give the empty machine: nothing but settings, and the keys, which a person brought."""
    empty = machine(tmp_path / "new", pacs)
    shutil.copytree(old.folder / "keys", empty.folder / "keys", dirs_exist_ok=True)
    return empty


def other_modality(patient: int) -> Dataset:
    image = study(patient=patient, images=1)[0]
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    image.Modality = "OT"
    return image


def test_a_restored_site_knows_what_the_lost_one_knew_and_answers(old: Machine, new: Machine, tmp_path: Path) -> None:
    version = promote_tiny(old.root / "models")
    answered, open_, fresh = study(patient=1), study(patient=2), study(patient=4)
    old.send(*answered)
    old.work()
    (first,) = old.reports()
    old.send(*open_)
    old.send(other_modality(3))
    made = old.backup(tmp_path / "sets")

    said = new.restore(made)
    assert "Answers are paused" in said
    shutil.copytree(old.root / "archive", new.root / "archive", dirs_exist_ok=True)
    with new.catalogue() as catalogue:
        (held,) = [held for held, _at in catalogue.instances.held()]
        assert held.reason is Hold.MODALITY
    assert version in new.osteon("models", "list")
    assert new.state(answered[0]) is StudyState.DELIVERED
    new.send(*fresh)
    new.work()
    assert set(new.reports()) == {first}, "nothing leaves before a person says so"
    new.osteon("reply", "resume", "--reason", "restored")
    new.work()
    assert new.answers(fresh[0]) == [fresh[0].PatientName]
    assert new.state(open_[0]) is StudyState.EXPIRED
    new.osteon("reply", "study", open_[0].AccessionNumber)
    new.work()
    assert new.answers(open_[0]) == [open_[0].PatientName]


def test_what_was_answered_after_the_set_was_made_is_not_answered_with_another_document(
    old: Machine, new: Machine, tmp_path: Path
) -> None:
    promote_tiny(old.root / "models")
    images, stored = study(patient=1), study(patient=2)
    old.osteon("reply", "pause", "--reason", "test")
    old.send(*stored)
    old.work()  # its result stands in the set, and leaves after it was made
    old.send(*images)
    made = old.backup(tmp_path / "sets")
    old.osteon("reply", "resume", "--reason", "test")
    old.work()
    before = old.reports()
    assert len(before) == 2

    new.restore(made)
    shutil.copytree(old.root / "archive", new.root / "archive", dirs_exist_ok=True)
    promote_tiny(new.root / "models", slope=3.0)  # another model would say it otherwise
    new.osteon("reply", "resume", "--reason", "restored")
    new.work()
    assert new.state(images[0]) is StudyState.EXPIRED
    assert new.state(stored[0]) is StudyState.DELIVERED
    assert new.reports() == before, "neither a second document nor other bytes under the UID of the first"
