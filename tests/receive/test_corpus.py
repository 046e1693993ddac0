"""150 real and purpose-made files against a committed table: what becomes of each, and that nobody can be recognised after it.

`OSTEON_WRITE_CORPUS=1 pytest tests/receive/test_corpus.py` writes the table anew; read its diff before committing it.
"""

from __future__ import annotations

import base64
import csv
import os
import re
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest
import shared
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from models.errors import OsteonError
from node import peer
from node.receive import status
from node.receive.association import Listener
from node.receive.intake import Intake, Taken
from node.settings import load

# the corpus is there to be odd; node.logs silences these warnings in production, because they may repeat values
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom", "ignore::UserWarning:pynetdicom")

TABLE = Path(__file__).with_name("corpus.csv")
TEXT = frozenset({"AE", "AS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "UC", "UI", "UR", "UT"})
KEPT_WHEN_KNOWN = frozenset(
    {"Manufacturer", "ManufacturerModelName", "CodeMeaning", "CodingSchemeDesignator", "CodeValue", "PatientAge"}
)
"""Stay when the vocabulary knows them, or are computed; the engine's own tests look at them."""
DCMTK_SAMPLE = (
    "RG1_J2KI.dcm",
    "RG2_JPLL.dcm",
    "RG2_JPLY.dcm",
    "RG3_J2KR.dcm",
    "RG3_RLE.dcm",
    "SC_rgb_expb.dcm",
    "XA1_JLSN.dcm",
    "dx_image.dcm",
)


@dataclass(frozen=True)
class Sent:
    """A file as a C-STORE would carry it."""

    raw: bytes
    transfer_syntax_uid: str
    sop_class_uid: str
    sop_instance_uid: str


def corpus() -> list[Path]:
    return sorted((shared.data("dicom") / "files").iterdir(), key=lambda file: file.name)


def as_sent(file: Path) -> Sent:
    """Take off preamble and file meta, as a sender does; without a file meta, guess the syntax as pydicom does."""
    with warnings.catch_warnings(), file.open("rb") as stream:
        warnings.simplefilter("ignore")
        read_preamble(stream, force=True)
        meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
        raw = stream.read()
        whole = pydicom.dcmread(file, force=True, stop_before_pixels=True)
        syntax = str(meta.get("TransferSyntaxUID") or "")
        if not syntax:
            is_implicit, is_little = whole.original_encoding
            syntax = ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
        return Sent(raw, syntax, str(whole.get("SOPClassUID") or ""), str(whole.get("SOPInstanceUID") or ""))


def become(intake: Intake, sent: Sent) -> tuple[str, str]:
    """Hand a file in, and say what became of it and why."""
    before = {one.id for one, _since in intake.catalogue.instances.held()}
    try:
        taken = intake.take_in(
            sent.raw,
            transfer_syntax_uid=sent.transfer_syntax_uid,
            sop_class_uid=sent.sop_class_uid,
            sop_instance_uid=sent.sop_instance_uid,
            calling_ae="SENDER",
            called_ae=intake.settings.node.ae_title,
        )
    except OsteonError as error:
        return f"refused {peer.status_text(status.status_of(error))}", str(error)
    new = [one for one, _since in intake.catalogue.instances.held() if one.id not in before]
    return taken.value, "; ".join(f"{one.reason.value}: {one.detail}" for one in new)


@pytest.fixture(scope="module")
def intake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Intake]:
    from node.commands.init import init_site

    callers = [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "purpose": "answer"}]
    settings = load(init_site(tmp_path_factory.mktemp("corpus") / "site", node={"port": 0, "callers": callers}))
    # Always the same pseudonyms: a random one may look like a short text of the original.
    Path(settings.storage.site_key).write_bytes(base64.b64encode(b"corpus".ljust(32, b".")))
    opened = Intake.open(settings)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def outcomes(intake: Intake) -> dict[str, tuple[str, str]]:
    """Hand every file in, one after the other, as one PACS would; the order is the order of names."""
    return {file.name: become(intake, as_sent(file)) for file in corpus()}


def test_each_file_becomes_what_the_table_says(outcomes: dict[str, tuple[str, str]]) -> None:
    if os.environ.get("OSTEON_WRITE_CORPUS"):
        with TABLE.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("file", "outcome", "reason"))
            writer.writerows((name, *told) for name, told in outcomes.items())
    with TABLE.open(newline="") as file:
        table = {row["file"]: (row["outcome"], row["reason"]) for row in csv.DictReader(file)}
    assert outcomes == table


def test_no_file_meets_an_error_that_nobody_thought_of(outcomes: dict[str, tuple[str, str]]) -> None:
    assert not [name for name, (outcome, _) in outcomes.items() if peer.status_text(status.UNEXPECTED) in outcome]


def test_no_identifier_survives_in_the_archive(intake: Intake, outcomes: dict[str, tuple[str, str]]) -> None:
    looked_at = 0
    for file in corpus():
        if outcomes[file.name][0] != Taken.NEW:
            continue
        original = pydicom.dcmread(file, force=True)
        instance = intake.catalogue.instances.find(intake.keys.uid(str(original.SOPInstanceUID)))
        assert instance is not None
        archived = intake.archive.path(instance).read_bytes()
        header = archived.replace(pydicom.dcmread(intake.archive.path(instance)).PixelData, b"")
        header = re.sub(rb"2\.25\.\d+|OST-[A-Z2-7]{16}", b"", header)
        for keyword, text in texts(original):
            assert text not in header, f"{file.name}: {keyword} survives"
            looked_at += 1
    assert looked_at > 200


def texts(dataset: Dataset) -> Iterator[tuple[str, bytes]]:
    """Give every text of four characters or more, nested and private ones too, as it would stand in a file."""
    for element in dataset.iterall():
        if element.VR not in TEXT or element.keyword in KEPT_WHEN_KNOWN or not element.value:
            continue
        values = element.value if element.VM > 1 else [element.value]
        for value in values:
            parts = [str(value)] + (str(value).split("^") if element.VR == "PN" else [])
            for part in parts:
                text = part.strip(" \0")
                if len(text) >= 4 and not (element.VR == "UI" and text.startswith("1.2.840.10008.")):
                    yield element.keyword or str(element.tag), text.encode("utf-8", "surrogateescape")


def test_nothing_of_the_corpus_rests_in_clear_anywhere(intake: Intake, outcomes: dict[str, tuple[str, str]]) -> None:
    """What is held is sealed; file names and databases name nobody."""
    names = set()
    for file in corpus():
        original = pydicom.dcmread(file, force=True, stop_before_pixels=True)
        for keyword in ("PatientName", "PatientID", "AccessionNumber", "SOPInstanceUID", "StudyInstanceUID"):
            value = str(original.get(keyword) or "").strip()
            if len(value) >= 8:
                names.add(value.encode("utf-8", "surrogateescape"))
    assert len(names) > 100
    for file in intake.settings.storage.root.rglob("*"):
        assert not any(name in str(file).encode() for name in names)
        if file.is_file():
            data = file.read_bytes()
            assert not [name for name in names if name in data], file.name


def test_dcmtk_sends_a_sample_of_them(tmp_path: Path, site: Path) -> None:
    """The same files through a real association, in the syntax they are in: the outcomes of the table."""
    storescu = shared.tool("storescu")
    folder = shared.data("dicom") / "files"
    intake = Intake.open(load(site))
    listener = Listener(intake.settings.node, intake.take_in)
    listener.start()
    propose = {
        "1.2.840.10008.1.2": "-xi", "1.2.840.10008.1.2.1": "-xe", "1.2.840.10008.1.2.2": "-xb",
        "1.2.840.10008.1.2.4.50": "-xy", "1.2.840.10008.1.2.4.51": "-xx", "1.2.840.10008.1.2.4.70": "-xs",
        "1.2.840.10008.1.2.4.80": "-xt", "1.2.840.10008.1.2.4.81": "-xu", "1.2.840.10008.1.2.4.90": "-xv",
        "1.2.840.10008.1.2.4.91": "-xw", "1.2.840.10008.1.2.5": "-xr",
    }  # fmt: skip
    with TABLE.open(newline="") as rows:
        table = {row["file"]: row["outcome"] for row in csv.DictReader(rows)}
    try:
        for name in DCMTK_SAMPLE:
            file = as_sent(folder / name)
            command = [storescu, "-R", propose[file.transfer_syntax_uid], "-aet", "SENDER", "-aec", "OSTEON", "127.0.0.1"]
            done = subprocess.run([*command, str(listener.port), str(folder / name)], capture_output=True, text=True)
            assert done.returncode == 0, f"{name}: {done.stderr}"
            kept = intake.catalogue.instances.find(intake.keys.uid(file.sop_instance_uid))
            assert (Taken.NEW if kept else Taken.HELD) == table[name], name
            assert kept is None or kept.transfer_syntax_uid == file.transfer_syntax_uid
        assert len(intake.catalogue.instances.held()) == sum(table[name] == Taken.HELD for name in DCMTK_SAMPLE)
    finally:
        listener.stop()
        intake.close()
