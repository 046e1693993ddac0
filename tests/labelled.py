"""A small labelled site: an archive and a catalogue with invented patients of two textures, made without a network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import studies
from numpy.typing import NDArray

from node.commands.init import init_site
from node.keep.archive import Archive
from node.keep.catalogue import Catalogue
from node.keep.records import Instance, Label, Purpose
from node.settings import Settings, load
from training.recipe import Gate, Recipe, named

NOW = datetime(2026, 1, 17, 12, tzinfo=UTC)
CLASSES = ("ewing_sarcoma", "acute_osteomyelitis")
SMALLEST: Recipe = replace(named("phantom"), size_px=32, folds=3, epochs=2, batch=8, gate=Gate(draws=200), pretraining=None)
"""A recipe that makes a model in seconds."""


class Heard:
    """Keeps what a run told; interrupts it at an epoch of a fit when asked to."""

    def __init__(self, stop_in: str = "") -> None:
        self.stages: list[str] = []
        self.epochs: list[tuple[str, int]] = []
        self.stop_in = stop_in

    def stage(self, what: str, total: int = 0) -> None:
        self.stages.append(what)

    def advance(self, done: int) -> None:
        pass

    def within(self, done: float) -> None:
        pass

    def epoch(self, fit: str, line: Mapping[str, Any]) -> None:
        self.epochs.append((fit, line["epoch"]))
        if fit == self.stop_in:
            raise KeyboardInterrupt


def pid(patient: int) -> str:
    """Give the pseudonym of a patient."""
    return "OST-" + base64.b32encode(hashlib.sha256(f"patient {patient}".encode()).digest()[:10]).decode()


def texture(kind: int, seed: int, size: int = 48) -> NDArray[np.uint16]:
    """Draw stripes (kind 0) or checks (kind 1) under noise."""
    y, x = np.mgrid[0:size, 0:size]
    pattern = np.sin(x * 0.9 + seed) if kind == 0 else np.sin(x * 0.9 + seed) * np.sin(y * 0.9 + seed)
    noise = np.random.default_rng(seed).normal(0, 0.4, pattern.shape)
    return (np.clip(0.5 + 0.25 * pattern + 0.15 * noise, 0, 1) * 4095).astype(np.uint16)


def put(site: Path, patient: int, *, instance: int = 1, locked: bool = False, kind: int = 0, **options: object) -> Instance:
    """Put one image into archive and catalogue; `options` as for `studies.image`, or `age_years`, `body_part`, `modality`."""
    settings = load(site)
    age_years = options.pop("age_years", 9)
    body_part = options.pop("body_part", "LEG")
    modality = options.pop("modality", "DX")
    options.setdefault("array", texture(kind, 10 * patient + instance))
    dataset = studies.image(patient=patient, instance=instance, **options)  # type: ignore[arg-type]
    dataset.PatientID = pid(patient)
    filled, _ = Archive(settings.storage.root / "archive").put(
        dataset,
        Instance(
            sop_uid=dataset.SOPInstanceUID,
            series_uid=dataset.SeriesInstanceUID,
            study_uid=dataset.StudyInstanceUID,
            pid=pid(patient),
            sop_class_uid=dataset.SOPClassUID,
            transfer_syntax_uid=dataset.file_meta.TransferSyntaxUID,
            path="",
            header_digest="",
            pixel_digest="",
            modality=str(modality),
            body_part=str(body_part),
            age_years=age_years,  # type: ignore[arg-type]
            sex="FM"[patient % 2],
            device="",
            accession_key="",
            study_id_key="",
        ),
    )
    with Catalogue.open(settings.storage.catalogue) as catalogue:
        catalogue.instances.note(filled, purpose=Purpose.LEARN, calling_ae="SENDER", locked=locked, now=NOW)
    return filled


def say(site: Path, image: Instance, label: str, *, reader: str = "reader", of_image: bool = False, treated: str = "") -> None:
    """Label the study of `image`, or the image alone."""
    said = Label(
        pid=image.pid,
        study_uid=image.study_uid,
        sop_uid=image.sop_uid if of_image else "",
        label=label,
        reader=reader,
        labelled_on="2024-04-01",
        confirmed_by="histology",
        first_treatment_on=treated,
    )
    with Catalogue.open(load(site).storage.catalogue) as catalogue:
        catalogue.labels.put_all([said], now=NOW, by="test")


def labelled_site(
    folder: Path, *, patients: int, is_locked: Callable[[int], bool] = lambda patient: False, **sections: Any
) -> Path:
    """Make a site with `patients` labelled patients, every other one of each class, with one or two images."""
    site = init_site(folder, **sections)
    fill(site, patients=patients, is_locked=is_locked)
    return site


def fill(site: Path, *, patients: int, is_locked: Callable[[int], bool] = lambda patient: False) -> None:
    """Put labelled patients into a site."""
    for patient in range(patients):
        for instance in range(1, 2 + patient % 3 % 2):
            image = put(site, patient, instance=instance, kind=patient % 2, locked=is_locked(patient))
        say(site, image, CLASSES[patient % 2])


def settings_of(site: Path) -> Settings:
    """Read the settings of a site."""
    return load(site)
