"""What a reader sees in a report, and what the validators say of it.

In: an SR as the PACS holds it. Out: its text, line by line; the outcome of dciodvfy and dsrdump; whether it is the report that
was due. Nothing here knows how the node made it: it looks as a stranger would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom import Dataset

RESEARCH_NOTICE = "FOR RESEARCH USE ONLY"
_SAME = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "StudyDescription",
    "ReferringPhysicianName",
    "SpecificCharacterSet",
)


def text(sr: Dataset) -> list[str]:
    """Write the content tree as indented lines "name: value" (PS3.3 C.17.3)."""
    return list(_lines(sr, 0))


def _lines(item: Dataset, depth: int) -> Iterator[str]:
    name = item.ConceptNameCodeSequence[0].CodeMeaning if item.get("ConceptNameCodeSequence") else item.ValueType
    value = _value(item)
    yield f"{'  ' * depth}{name}{': ' if value else ''}{value}"
    for child in item.get("ContentSequence", []):
        yield from _lines(child, depth + 1)


def _value(item: Dataset) -> str:
    match item.ValueType:
        case "CODE":
            return str(item.ConceptCodeSequence[0].CodeMeaning)
        case "NUM":
            measured = item.MeasuredValueSequence[0]
            return f"{measured.NumericValue} {measured.MeasurementUnitsCodeSequence[0].CodeValue}"
        case "TEXT":
            return str(item.TextValue)
        case "UIDREF":
            return str(item.UID)
        case "IMAGE":
            return str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        case _:
            return ""


def _items(item: Dataset) -> Iterator[Dataset]:
    yield item
    for child in item.get("ContentSequence", []):
        yield from _items(child)


def classification(sr: Dataset) -> str:
    """Give what the report says: a class, or why there is none; empty when it says neither."""
    said = {
        item.ConceptNameCodeSequence[0].CodeValue: item.ConceptCodeSequence[0].CodeMeaning
        for item in _items(sr)
        if item.ValueType == "CODE"
    }
    answer, reason = said.get("AI-CLASS", ""), said.get("AI-REASON", "")
    return f"{answer} ({reason})" if reason else str(answer)


def complaints(sr: Dataset, images: Sequence[Dataset]) -> list[str]:
    """Say in what the report is not the one that was due for a study of these images."""
    first = images[0]
    found = [f"{keyword} is not the study's" for keyword in _SAME if sr.get(keyword) != first.get(keyword)]
    told = "\n".join(text(sr))
    referenced = {item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in _items(sr) if item.ValueType == "IMAGE"}
    if referenced != {image.SOPInstanceUID for image in images}:
        found.append("it does not refer to exactly the images of the study")
    if sr.SeriesInstanceUID in {image.SeriesInstanceUID for image in images}:
        found.append("it is not in a series of its own")
    if RESEARCH_NOTICE not in told or sr.get("ContentQualification") != "RESEARCH":
        found.append("it does not say that it is for research only")
    if (sr.get("VerificationFlag"), sr.get("PreliminaryFlag")) != ("UNVERIFIED", "PRELIMINARY"):
        found.append("it is not marked unverified and preliminary")
    if "PatientIdentityRemoved" in sr or "DeidentificationMethod" in sr:
        found.append("it carries a mark of the pseudonymised archive")
    if not classification(sr):
        found.append("it says neither a class nor a reason for none")
    return found


@dataclass(frozen=True, slots=True)
class Validated:
    """What one validator said."""

    tool: str
    passed: bool | None
    """None: the tool is not installed."""
    said: tuple[str, ...]
    """Its lines that matter."""


def validate(file: Path) -> list[Validated]:
    """Let dciodvfy and dsrdump judge the file; a tool that is not installed passes no judgement."""
    return [
        _judged(["dciodvfy", str(file)], ("Error",)),
        _judged(["dsrdump", "+Pc", str(file)], ("E:", "F:")),
    ]


def _judged(command: Sequence[str], bad: tuple[str, ...]) -> Validated:
    name = command[0]
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # wheels install tools there
    program = shutil.which(name, path=beside)
    if program is None:
        return Validated(name, None, ("not installed",))
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, errors="replace", timeout=60, check=False)
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith((*bad, "Warning", "W:"))]
    wrong = [line for line in lines if line.startswith(bad)]
    return Validated(name, done.returncode == 0 and not wrong, tuple(wrong or lines))
