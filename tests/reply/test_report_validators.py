"""What foreign validators say of the SR, in all its forms (the commands and what they must say: docs/conformance.md)."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path

import answers
import pytest
import shared
from pydicom import Dataset, dcmread
from pydicom.uid import ComprehensiveSRStorage, EnhancedSRStorage
from studies import part10, study

from node.keep.records import Abstention
from node.reply.report import Built
from node.settings import Report

JAVA_LIMITS = "-Djdk.xml.xpathExprOpLimit=0 -Djdk.xml.xpathTotalOpLimit=0 -Djdk.xml.xpathExprGrpLimit=0"

Make = Callable[[list[bytes]], Built]


def rerun(images: list[bytes]) -> Built:
    old = answers.document(images).document
    return answers.document(images, finding={"model_id": "ewing-0008"}, run=2, predecessors=[old])


FORMS: dict[str, Make] = {
    "result": lambda images: answers.document(images),
    "abstention": lambda images: answers.document(images, abstention=Abstention.ADULT),
    "indeterminate": lambda images: answers.document(images, abstention=Abstention.AMBIGUOUS),
    "rerun": rerun,
    "comprehensive": lambda images: answers.document(images, sop_class_uid=ComprehensiveSRStorage),
    "enhanced": lambda images: answers.document(images, sop_class_uid=EnhancedSRStorage),
    "other title": lambda images: answers.document(images, settings=Report(document_title="126000")),
}
IOD = {"comprehensive": "ComprehensiveSR", "enhanced": "EnhancedSR"}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=120, check=False, env=os.environ | environment
    )


@pytest.fixture(params=FORMS, ids=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def files(form: str, tmp_path: Path) -> tuple[Path, Path]:
    """Give an original and its SR as files."""
    images = [part10(one) for one in study(modality="CR", images=2, charset="ISO_IR 100", PatientName="Müller^Jörg")]
    return written(images, FORMS[form], tmp_path)


def written(images: list[bytes], make: Make, folder: Path) -> tuple[Path, Path]:
    original, sr = folder / "original.dcm", folder / "sr.dcm"
    original.write_bytes(images[0])
    for number, image in enumerate(images[1:], start=2):  # what a report refers to has to be there, says dcentvfy
        (folder / f"original-{number}.dcm").write_bytes(image)
    sr.write_bytes(make(images).bytes)
    return original, sr


def test_dciodvfy_finds_no_error(form: str, files: tuple[Path, Path]) -> None:
    done = run(shared.tool("dciodvfy"), str(files[1]))
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0
    assert not [line for line in lines if line.startswith("Error")]
    assert IOD.get(form, "Comprehensive3DSR") in lines
    surprising = [line for line in lines if line.startswith("Warning") and "<99OSTEON> for value 1" not in line]
    assert surprising == []


def test_dcentvfy_finds_the_same_patient_and_study(files: tuple[Path, Path]) -> None:
    assert_same_entities(*files)


def assert_same_entities(original: Path, sr: Path) -> None:
    others = sorted(original.parent.glob("original-*.dcm"))
    done = run(shared.tool("dcentvfy"), *map(str, (original, *others, sr)))
    # What is not among these files: documents before this one, and what a real image refers to.
    elsewhere = {one.ReferencedSOPInstanceUID for one in predecessors(dcmread(sr))}
    missing = re.compile(r"Error - Missing SOPInstanceUID that was referenced - (\S+) for file <(.*)>")
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]
    found = {line: missing.match(line) for line in errors}
    assert [line for line, one in found.items() if not one or (one[1] not in elsewhere and Path(one[2]) == sr)] == []
    named = set(re.findall(r"Element=<(\w+)>", done.stdout + done.stderr))
    assert named == {"AccessionNumber"}  # the tool's own: it counts the element to two entities; nothing else may differ


def predecessors(sr: Dataset) -> Iterator[Dataset]:
    """Give the references of an SR to documents before it."""
    for study_ in sr.get("PredecessorDocumentsSequence", []):
        for series in study_.ReferencedSeriesSequence:
            yield from series.ReferencedSOPSequence


def test_dsrdump_and_dsr2html_read_it(files: tuple[Path, Path], tmp_path: Path) -> None:
    done = run(shared.tool("dsrdump"), "+Pc", str(files[1]))
    assert done.returncode == 0
    assert not re.findall(r"^[EF]:", done.stdout + done.stderr, re.MULTILINE)
    page = tmp_path / "sr.html"
    assert run(shared.tool("dsr2html"), str(files[1]), str(page)).returncode == 0
    text = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page.read_text("latin-1"))))
    assert "Jörg Müller" in text
    group = text[text.index("Measurement Group") :]
    assert re.match(r"Measurement Group Comment: FOR RESEARCH USE ONLY\. NOT FOR DIAGNOSIS\.", group)


@pytest.mark.parametrize("form", ["result", "abstention", "rerun"], indirect=True)
def test_dicomsrvalidator_knows_the_template(form: str, files: tuple[Path, Path]) -> None:
    done = run(shared.tool("DicomSRValidator"), str(files[1]), JAVA_TOOL_OPTIONS=JAVA_LIMITS)
    lines = (done.stdout + done.stderr).splitlines()
    assert f"Found {IOD.get(form, 'Comprehensive3DSR')} IOD" in lines
    assert "Found Root Template TID_1500 (MeasurementReport)" in lines
    assert "Root Template Validation Complete" in lines
    assert not [line for line in lines if line.startswith("Error")]
    unlisted = [line for line in lines if line.startswith("Warning") and "Content Item not in template" not in line]
    assert unlisted == []


REAL = ["RG3_J2KR.dcm", "RG2_J2KI.dcm", "RG1_J2KI.dcm"]


@pytest.mark.parametrize("name", REAL)
def test_the_sr_of_a_real_radiograph_belongs_to_it(name: str, tmp_path: Path) -> None:
    original = (shared.data("dicom") / "files" / name).read_bytes()
    image, sr = written([original], lambda images: answers.document(images), tmp_path)
    assert_same_entities(image, sr)
    errors = [set(re.findall(r"^Error.*$", run(shared.tool("dciodvfy"), str(file)).stderr, re.MULTILINE)) for file in (image, sr)]
    assert errors[1] <= errors[0]  # what is wrong in the original's identity stays as it came


def test_what_the_vault_does_not_keep_is_absent_and_never_different(tmp_path: Path) -> None:
    """An original with age, weight and comments: the SR does not repeat them, and contradicts nothing."""
    original = (shared.data("dicom") / "files" / "chrJapMultiExplicitIR6.dcm").read_bytes()
    done = run(shared.tool("dcentvfy"), *map(str, written([original], lambda images: answers.document(images), tmp_path)))
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "<AccessionNumber>" not in line]
    assert [line for line in lines if "Attribute present in one instance but not the other" not in line] == []
