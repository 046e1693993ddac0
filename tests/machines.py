"""Machines of a hospital: each with a site on it, handled by the command line as an operator does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from roles import hand_in
from studies import study
from typer.testing import CliRunner

from models.errors import OsteonError
from node import __main__ as command
from node import settings as site_settings
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.keep import backup
from node.keep.catalogue import Catalogue
from node.keep.records import StudyState
from node.keep.vault import Vault
from node.receive.intake import Intake, Taken
from node.reply import respond
from node.settings import Settings, load_key


def osteon(*arguments: str, code: int = 0) -> str:
    """Run the command line in this process and give what it said."""
    done = CliRunner().invoke(command.build(), arguments)
    if done.exception is not None and not isinstance(done.exception, OsteonError | SystemExit):
        raise done.exception
    error = done.exception if isinstance(done.exception, OsteonError) else None
    ended = 2 if error else done.exit_code  # as `main` ends
    assert ended == code, f"{ended}: {done.output} {done.exception!r}"
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

    @contextmanager
    def vault(self) -> Iterator[Vault]:
        with Vault.open(self.settings.storage.vault, load_key(self.settings.storage.vault_key)) as vault:
            yield vault

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


def machine(folder: Path, pacs: Pacs, *, node: Mapping[str, Any] | None = None, **sections: Mapping[str, Any]) -> Machine:
    """Make a machine whose results go to `pacs`; `sections` as for `init_site`."""
    callers = [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "purpose": "answer"}]
    init_site(
        folder,
        node={"port": 0, "callers": callers, **(node or {})},
        pacs=[{"name": "main", "ae_title": pacs.ae_title, "host": "127.0.0.1", "port": pacs.port}],
        completion={"quiet_s": 0.0},
        **sections,
    )
    return Machine(folder, pacs)


def other_modality(patient: int, **options: object) -> Dataset:
    """Make an image that goes to the quarantine."""
    image = study(patient=patient, images=1, **options)[0]
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    image.Modality = "OT"
    return image
