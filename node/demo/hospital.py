"""The hospital's side of the demo: its PACS (a real Orthanc, or ours), what it sends, and the real radiograph it holds.

In: folders and ports. Out: a running PACS that can be given images, told to route a study, and asked for the reports it got;
a sender of files. Everything here is identified data of people who do not exist: it lies outside the node's data directory and
never goes into it but by C-STORE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Protocol

from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import generate_uid

from models.errors import Final
from node import peer
from node.demo import orthanc
from node.demo.pacs import Pacs
from node.settings import Pacs as Peer

MODALITY_AE = "XRAY1"
"""The unit that stores images in the PACS."""
ARCHIVE_AE = "OLD_ARCHIVE"
"""The archive that sends the cohort to be learned from."""
NODE_AE = "OSTEON"
LEARN_AE = "OSTEON_LEARN"

REAL_FILES = ("RG3_UNCR.dcm", "RG3_J2KR.dcm")
"""One lower leg, uncompressed and in JPEG 2000 (lossless), of the PyPI package pydicom-data."""

_TECHNICAL = (
    "ImageType", "Modality", "Manufacturer", "ManufacturerModelName", "BodyPartExamined", "PlateType", "PhosphorType",
    "CassetteOrientation", "CassetteSize", "ViewPosition", "Sensitivity", "PatientOrientation", "Laterality",
    "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "WindowCenter", "WindowWidth", "PixelData", "SOPClassUID",
)  # fmt: skip
"""What is taken over from the real files; everything that could name somebody is written anew."""


class NotSent(Final):
    """A peer did not take an image with success."""


class HospitalPacs(Protocol):
    """What the guided run asks of a PACS; Orthanc and ours stand behind it."""

    @property
    def told(self) -> str:
        """What it is, in words."""

    @property
    def peer(self) -> Peer:
        """Its address for the node's settings and for C-STORE."""

    def route(self, study_uid: str) -> None:
        """Send a study it holds to the node, to be answered."""

    def reports(self) -> list[bytes]:
        """Give every SR it holds, as Part 10 files."""


@dataclass
class OrthancPacs:
    """Orthanc, routing by its own rules: its C-STORE SCU sends what its REST interface is told to send."""

    server: orthanc.Orthanc

    @property
    def told(self) -> str:
        """What it is, and where a browser finds it."""
        return f"Orthanc {self.server.get('/system')['Version']}, {self.server.url}"

    @property
    def peer(self) -> Peer:
        """Its DICOM address."""
        return Peer(name="pacs", ae_title=self.server.ae_title, host="127.0.0.1", port=self.server.port)

    def route(self, study_uid: str) -> None:
        """Tell it to send the study to the node."""
        wanted = {"Level": "Study", "Query": {"StudyInstanceUID": study_uid}}
        self.server.post(
            f"/modalities/{NODE_AE}/store", {"Resources": self.server.post("/tools/find", wanted), "Synchronous": True}
        )

    def reports(self) -> list[bytes]:
        """Ask for all series of modality SR, and fetch their files."""
        series = self.server.post("/tools/find", {"Level": "Series", "Query": {"Modality": "SR"}, "Expand": True})
        return [self.server.get(f"/instances/{instance}/file") for one in series for instance in one["Instances"]]


@dataclass
class OwnPacs:
    """The embedded PACS, where Orthanc is not installed; we send in its name."""

    server: Pacs
    node_port: int

    @property
    def told(self) -> str:
        """What it is, and why."""
        return "our own small PACS (Orthanc is not installed)"

    @property
    def peer(self) -> Peer:
        """Its DICOM address."""
        return Peer(name="pacs", ae_title=self.server.ae_title, host="127.0.0.1", port=self.server.port)

    def route(self, study_uid: str) -> None:
        """Send the files of the study under its title."""
        files = [file for file in self.server.held("CR") if dcmread(file, stop_before_pixels=True).StudyInstanceUID == study_uid]
        node = Peer(name="node", ae_title=NODE_AE, host="127.0.0.1", port=self.node_port)
        send(files, node, calling=self.server.ae_title)

    def reports(self) -> list[bytes]:
        """Read the files of modality SR."""
        return [file.read_bytes() for file in self.server.held("SR")]


@contextmanager
def running_pacs(folder: Path, node_port: int) -> Iterator[HospitalPacs]:
    """Run Orthanc when it is installed, else the embedded PACS."""
    callers = {NODE_AE: node_port, MODALITY_AE: node_port}
    if orthanc.executable():
        with orthanc.Orthanc(folder, callers=callers, ae_title="PACS") as real:
            yield OrthancPacs(real)
    else:
        with Pacs(folder, callers=tuple(callers), ae_title="PACS") as own:
            yield OwnPacs(own, node_port)


def send(files: Sequence[Path], to: Peer, *, calling: str, sent: Callable[[], None] = lambda: None) -> None:
    """Send Part 10 files in one association, each in its own transfer syntax; `sent` is called after each.

    Raises
    ------
    NotSent
        No association, or a status other than 0000.
    """
    headers = [dcmread(file, stop_before_pixels=True, specific_tags=["SOPClassUID"]) for file in files]
    entity = peer.ae(calling, timeout_s=60.0)
    for sop_class, syntax in sorted({(header.SOPClassUID, header.file_meta.TransferSyntaxUID) for header in headers}):
        entity.add_requested_context(sop_class, syntax)
    association = entity.associate(to.host, to.port, ae_title=to.ae_title)
    if not association.is_established:
        raise NotSent(f"{to.name}: {peer.not_established(association.is_rejected, to)}")
    try:
        for file in files:
            status = association.send_c_store(dcmread(file)).get("Status")
            if status != 0x0000:
                raise NotSent(f"{to.name} answered an image with {peer.status_text(status)}")
            sent()
    finally:
        association.release()


def real_study(folder: Path, today: date) -> tuple[list[Path], str]:
    """Put the real radiograph into the header of an invented 12-year-old: two images of one study, all UIDs new.

    Returns
    -------
    files, the description that the original file gives of itself
    """
    study = Dataset()
    study.SpecificCharacterSet = "ISO_IR 100"
    study.PatientName = "Invented^Zoë"
    study.PatientID = "7202617"
    study.IssuerOfPatientID = "KIDS-2"
    study.PatientBirthDate = f"{today.year - 12}{today:%m}01"
    study.PatientSex = "F"
    study.StudyInstanceUID, study.SeriesInstanceUID = generate_uid(prefix=None), generate_uid(prefix=None)
    study.StudyDate = study.SeriesDate = study.AcquisitionDate = f"{today:%Y%m%d}"
    study.StudyTime = study.SeriesTime = study.AcquisitionTime = "101500"
    study.AccessionNumber, study.StudyID = "A26-00042", "S42"
    study.StudyDescription = "Unterschenkel rechts"
    study.ReferringPhysicianName = "Invented^Referrer"
    study.SeriesNumber = 1
    files, description = [], ""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(REAL_FILES, start=1):
        original = dcmread(real_file(name))
        description = str(original.get("StudyDescription", "")) or description
        image = Dataset()
        image.update(study)
        for keyword in _TECHNICAL:
            if keyword in original:
                image[keyword] = original[keyword]
        image.SOPInstanceUID, image.InstanceNumber = generate_uid(prefix=None), number
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = original.file_meta.TransferSyntaxUID
        files.append(folder / f"real-{number}.dcm")
        dcmwrite(files[-1], image, enforce_file_format=True)
    return files, description


def real_file(name: str) -> Path:
    """Find a file of the package pydicom-data; nothing is ever downloaded.

    Raises
    ------
    NotSent
        The package is not installed.
    """
    found = get_testdata_file(name, download=False)
    if not found:
        raise NotSent("the real radiograph is not here: install pydicom-data (`pip install '.[demo]'`)")
    return Path(str(found))


def parsed(part10: bytes) -> Dataset:
    """Read an object that the PACS holds."""
    return dcmread(BytesIO(part10))
