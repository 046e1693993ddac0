"""The small PACS of ours, asked by dcmtk as a hospital's workstation would."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import JPEG2000Lossless, RLELossless
from roles import send
from shared import tool
from studies import image, part10, read, study

from node.demo.pacs import Pacs


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with Pacs(tmp_path / "pacs", callers=["SENDER"]) as running:
        yield running


def find(pacs: Pacs, **keys: str) -> list[dict[str, str]]:
    """Ask for studies with findscu; give the matches by keyword."""
    asked = {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "", "PatientID": "", "AccessionNumber": ""} | keys
    options = [part for keyword, value in asked.items() for part in ("-k", f"{keyword}={value}")]
    command = [tool("findscu"), "-v", "-S", "-aet", "SENDER", "-aec", pacs.ae_title, *options, "127.0.0.1", str(pacs.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    said = re.split(r"Find Response", done.stdout + done.stderr)[1:]
    line = re.compile(r"\[([^\]]*)\].*?(\w+)\s*$", re.MULTILINE)
    matches = [{keyword: value.strip() for value, keyword in line.findall(one)} for one in said]
    return [one for one in matches if "StudyInstanceUID" in one]


def test_it_keeps_what_it_gets_and_says_whose_it_is(pacs: Pacs) -> None:
    images = [
        *study(patient=1, images=2),
        image(patient=2, transfer_syntax=JPEG2000Lossless),
        image(patient=3, transfer_syntax=RLELossless),
    ]
    assert send([read(part10(one)) for one in images], port=pacs.port, called=pacs.ae_title) == [0, 0, 0, 0]
    assert [dcmread(path).SOPInstanceUID for path in pacs.received] == [one.SOPInstanceUID for one in images]
    assert {dcmread(path).file_meta.TransferSyntaxUID for path in pacs.received} == {
        one.file_meta.TransferSyntaxUID for one in images
    }
    (match,) = find(pacs, StudyInstanceUID=images[0].StudyInstanceUID)
    assert match["PatientID"] == images[0].PatientID
    assert match["AccessionNumber"] == images[0].AccessionNumber
    assert {one["PatientID"] for one in find(pacs, PatientID="PID*")} == {one.PatientID for one in images}
    assert find(pacs, AccessionNumber="NONE") == []
    assert len(pacs.held("DX")) == 4
    assert pacs.held("SR") == []


def test_a_repeat_is_one_object(pacs: Pacs) -> None:
    one = image()
    assert send([one, one], port=pacs.port, called=pacs.ae_title) == [0, 0]
    assert len(pacs.received) == 2
    assert len(pacs.held()) == 1


def test_it_knows_again_what_it_held_before_a_restart(tmp_path: Path) -> None:
    with Pacs(tmp_path / "pacs", callers=["SENDER"]) as first:
        first.put(image())
    with Pacs(tmp_path / "pacs", callers=["SENDER"]) as second:
        assert len(second.held()) == 1


def test_strangers_and_wrong_addresses_are_refused(pacs: Pacs) -> None:
    echo = [tool("echoscu"), "127.0.0.1", str(pacs.port)]
    assert (
        subprocess.run([*echo, "-aet", "SENDER", "-aec", pacs.ae_title], capture_output=True, timeout=60, check=False).returncode
        == 0
    )
    for titles in (["-aet", "STRANGER", "-aec", pacs.ae_title], ["-aet", "SENDER", "-aec", "OTHER"]):
        assert subprocess.run([*echo, *titles], capture_output=True, timeout=60, check=False).returncode != 0
