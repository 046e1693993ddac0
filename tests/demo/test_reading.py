"""What the demo says of a report: its text, and what is wrong with one that is not the one that was due."""

from __future__ import annotations

from copy import deepcopy
from datetime import date
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread

from node.demo import hospital, reading


@pytest.fixture
def images(tmp_path: Path) -> list[Dataset]:
    files, description = hospital.real_study(tmp_path, date(2026, 3, 31))
    assert "fibroma" in description
    return [dcmread(file) for file in files]


def test_the_real_radiograph_is_in_an_invented_header(images: list[Dataset]) -> None:
    first, second = images
    assert first.file_meta.TransferSyntaxUID.name == "Explicit VR Little Endian"
    assert second.file_meta.TransferSyntaxUID.name == "JPEG 2000 Image Compression (Lossless Only)"
    assert (first.pixel_array == second.pixel_array).all()
    assert first.StudyInstanceUID == second.StudyInstanceUID
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert first.PatientBirthDate == "20140301"
    for image in images:
        original = dcmread(hospital.real_file(hospital.REAL_FILES[0]), stop_before_pixels=True)
        for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "SOPInstanceUID", "StudyDescription", "AccessionNumber"):
            assert image.get(keyword) != original.get(keyword)
        assert "InstitutionName" not in image


def test_another_patients_report_is_complained_of(images: list[Dataset]) -> None:
    sr = Dataset()
    sr.update({element.tag: deepcopy(element) for element in images[0] if element.tag.group in (0x0008, 0x0010, 0x0020)})
    sr.PatientID = "somebody else"
    sr.ValueType = "CONTAINER"
    found = reading.complaints(sr, images)
    assert "PatientID is not the study's" in found
    assert "PatientName is not the study's" not in found
    assert "it says neither a class nor a reason for none" in found
    assert "it does not say that it is for research only" in found
