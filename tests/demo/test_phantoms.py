"""The invented cohort: valid objects, the same for the same seed, and nothing but the picture tells the classes apart."""

from __future__ import annotations

import csv
import hashlib
import subprocess
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import UID, JPEGLosslessSV1, JPEGLSLossless, RLELossless
from shared import tool
from sklearn.metrics import roc_auc_score

from models.preprocess import Preprocessing, display, preprocess
from node.demo import phantoms

SMALL = 32


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> phantoms.Cohort:
    return phantoms.cohort(tmp_path_factory.mktemp("cohort"), 7, patients=SMALL)


@pytest.fixture(scope="module")
def images(cohort: phantoms.Cohort) -> list[Dataset]:
    return [dcmread(file) for file in cohort.files]


def test_the_same_seed_gives_the_same_bytes(cohort: phantoms.Cohort, tmp_path: Path) -> None:
    again = phantoms.cohort(tmp_path, 7, patients=4)
    other = phantoms.cohort(tmp_path / "other", 8, patients=1)

    def digest(file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    assert [digest(file) for file in again.files] == [digest(cohort.folder / file.name) for file in again.files]
    assert digest(other.files[0]) != digest(again.files[0])


def test_every_object_is_valid(cohort: phantoms.Cohort, images: list[Dataset]) -> None:
    dciodvfy = tool("dciodvfy")
    assert {image.Modality for image in images} == {"CR", "DX"}
    for file in cohort.files[: 2 * len(phantoms._UNITS)]:
        judged = subprocess.run([dciodvfy, str(file)], capture_output=True, text=True, errors="replace", timeout=60, check=False)
        assert [line for line in judged.stderr.splitlines() if line.startswith("Error")] == [], file.name


def test_every_image_can_be_read_in_its_syntax(images: list[Dataset]) -> None:
    seen = set()
    for image in images:
        tensor = preprocess(image, Preprocessing(160))
        assert tensor.shape == (1, 160, 160)
        assert 0.05 < tensor.mean() < 0.8
        assert tensor.std() > 0.08
        seen.add((UID(image.file_meta.TransferSyntaxUID).name, image.PhotometricInterpretation, image.BitsStored))
    assert len({syntax for syntax, _, _ in seen}) == 6
    assert {polarity for _, polarity, _ in seen} == {"MONOCHROME1", "MONOCHROME2"}
    assert {bits for _, _, bits in seen} == {10, 12, 14, 16}


@pytest.mark.parametrize(
    ("syntax", "decoder"), [(JPEGLosslessSV1, "dcmdjpeg"), (JPEGLSLossless, "dcmdjpls"), (RLELossless, "dcmdrle")]
)
def test_dcmtk_decodes_what_was_drawn(cohort: phantoms.Cohort, tmp_path: Path, syntax: UID, decoder: str) -> None:
    program = tool(decoder)
    file = next(file for file in cohort.files if dcmread(file, stop_before_pixels=True).file_meta.TransferSyntaxUID == syntax)
    subprocess.run([program, str(file), str(tmp_path / "plain.dcm")], check=True, timeout=60)
    assert (display(dcmread(tmp_path / "plain.dcm")) == display(dcmread(file))).all()


def test_names_in_three_scripts_read_back(images: list[Dataset]) -> None:
    scripts = {str(image.get("SpecificCharacterSet")) for image in images}
    names = "".join(str(image.PatientName) for image in images)
    assert {"ISO_IR 100", "GB18030"} <= scripts
    assert any("ISO 2022 IR 87" in script for script in scripts)
    assert any(ord("à") <= ord(char) <= ord("ÿ") for char in names)
    assert any("\u3040" <= char <= "\u30ff" for char in names)
    assert any("\u4e00" <= char <= "\u9fff" for char in names)
    assert "\ufffd" not in names


def test_all_are_children_on_the_day_of_the_study(cohort: phantoms.Cohort, images: list[Dataset]) -> None:
    for image in images:
        born, studied = date.fromisoformat(image.PatientBirthDate), date.fromisoformat(image.StudyDate)
        age = studied.year - born.year - ((studied.month, studied.day) < (born.month, born.day))
        assert 2 <= age <= 17
        assert image.PatientAge == f"{age:03d}Y"
    assert len({patient.patient_id for patient in cohort.patients}) == SMALL


def test_labels_name_every_study_by_hospital_identifiers(cohort: phantoms.Cohort) -> None:
    rows = list(csv.DictReader(cohort.labels.read_text("utf-8").splitlines()))
    assert Counter(row["label"] for row in rows) == dict.fromkeys(phantoms.CLASSES, SMALL // 2)
    for row, patient in zip(rows, cohort.patients, strict=True):
        assert row["patient_id"] == patient.patient_id
        assert row["study"] in (patient.accession_number, patient.study_uid)
        assert not row["first_treatment_on"] or row["first_treatment_on"] > str(patient.study_date)


def test_nothing_but_the_picture_tells_the_classes_apart(tmp_path: Path) -> None:
    cohort = phantoms.cohort(tmp_path, 3)
    urgent = [patient.label == phantoms.CLASSES[0] for patient in cohort.patients]
    first = [dcmread(patient.files[0]) for patient in cohort.patients]
    small = np.stack([preprocess(image, Preprocessing(160)) for image in first])
    trivial = {
        "age": [patient.age_years for patient in cohort.patients],
        "sex": [patient.sex == "M" for patient in cohort.patients],
        "images": [len(patient.files) for patient in cohort.patients],
        "rows": [image.Rows for image in first],
        "mean grey": small.mean((1, 2, 3)),
        "spread": small.std((1, 2, 3)),
    }
    for what, values in trivial.items():
        assert 0.35 < roc_auc_score(urgent, values) < 0.65, what
    units = Counter((image.Manufacturer, image.BitsStored, label) for image, label in zip(first, urgent, strict=True))
    assert all(units[maker, bits, True] == units[maker, bits, False] for maker, bits, _ in units)
