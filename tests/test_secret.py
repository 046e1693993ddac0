"""Promise 3: a patient called SECRET^NAME goes through the node in every way there is, and is then searched for everywhere.

Searched are the whole data directory, the folder for temporary files, everything logged or printed, and the errors.
"""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from time import sleep

import pytest
from pages import get as page
from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileDataset
from pydicom.tag import Tag
from pydicom.uid import UID
from roles import Role, hand_in, running, send
from shared import tool
from studies import encoded, image
from tiny_model import promote_tiny

from models.errors import OsteonError
from node import settings
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.keep.quarantine import Quarantine
from node.receive.intake import Intake, Taken

SECRET = "SECRET^NAME"
NEEDLES = [b"SECRET", *("SECRET".encode(code) for code in ("utf-16-le", "utf-16-be")), b"4711.1.9.28.5"]
"""The name in the encodings a header may have, and a root that every UID sent here has."""
ROOT = "1.2.276.0.4711.1.9.28.5"
_NAME = SECRET.encode()
_TEXTS = (
    "PatientName", "PatientID", "IssuerOfPatientID", "OtherPatientNames", "OtherPatientIDs", "PatientComments",
    "PatientAddress", "PatientMotherBirthName", "MilitaryRank", "AdditionalPatientHistory", "EthnicGroup", "Occupation",
    "ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "NameOfPhysiciansReadingStudy",
    "RequestingPhysician", "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName",
    "Manufacturer", "ManufacturerModelName", "DeviceSerialNumber", "DetectorID", "SoftwareVersions", "StudyDescription",
    "SeriesDescription", "ProtocolName", "AccessionNumber", "StudyID", "RequestedProcedureDescription",
    "PerformedProcedureStepDescription", "ImageComments", "DerivationDescription", "BodyPartExamined", "ViewPosition",
    "FilterType", "WindowCenterWidthExplanation", "AcquisitionDeviceProcessingDescription", "ContentLabel",
)  # fmt: skip
_ILL_FITTING = (
    "StudyDate", "AcquisitionDateTime", "StudyTime", "PatientAge", "PatientSex", "KVP", "ImagerPixelSpacing",
    "SeriesNumber", "FrameOfReferenceUID", "RetrieveAETitle", "Rows", "WindowCenter", "PixelPaddingValue",
    "AnatomicRegionSequence",
)  # fmt: skip
"""Elements whose VR allows no name; a sender that errs writes one all the same."""


def patient(number: int = 1, *, name: str = SECRET, **options: object) -> FileDataset:
    """Make an image that says SECRET wherever a text can stand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of values that the standard forbids
        return _planted(image(patient=number, **options), number, name)  # type: ignore[arg-type]


def _planted(dataset: FileDataset, number: int, name: str) -> FileDataset:
    for keyword in _TEXTS:
        setattr(dataset, keyword, f"SECRET{number}" if keyword in ("PatientID", "IssuerOfPatientID") else name)
    for at, keyword in enumerate(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")):
        setattr(dataset, keyword, f"{ROOT}.{number}.{at}.{str(getattr(dataset, keyword))[-5:].strip('.').lstrip('0')}")
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    private = dataset.private_block(0x0009, "SECRET CREATOR", create=True)
    private.add_new(0x01, "LO", name)
    private.add_new(0x02, "UN", name.encode())
    private.add_new(0x03, "SQ", [_nested(name)])
    dataset.RequestAttributesSequence = [_nested(name)]
    dataset.AnatomicRegionSequence[0].CodeMeaning = name
    dataset.AnatomicRegionSequence[0].add_new(0x00091001, "UN", name.encode())
    dataset.OriginalAttributesSequence = [_nested(name)]
    dataset.add_new(0x60000022, "LO", name)
    dataset.add_new(0x60003000, "OW", _even(name.encode()))
    dataset.add_new(0xFFFCFFFC, "OB", _even(name.encode()))
    dataset.preamble = name.encode().ljust(128, b"\0")
    dataset.file_meta.SourceApplicationEntityTitle = "SECRET"
    dataset.file_meta.PrivateInformationCreatorUID = UID(f"{ROOT}.1")
    dataset.file_meta.PrivateInformation = _even(name.encode())
    return dataset


def _nested(name: str) -> Dataset:
    item = Dataset()
    item.PatientName = item.ScheduledProcedureStepDescription = item.RequestedProcedureID = name
    item.add_new(0x00091001, "UN", name.encode())
    inner = Dataset()
    inner.CodeValue, inner.CodingSchemeDesignator, inner.CodeMeaning = "SECRET", "99SECRET", name
    item.ScheduledProtocolCodeSequence = [inner]
    return item


def _even(data: bytes) -> bytes:
    return data + b"\0" * (len(data) % 2)


def _with(dataset: FileDataset, **attributes: object) -> FileDataset:
    """Change attributes; None deletes one, bytes are written as they are, whatever the VR allows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _changed(dataset, attributes)


def _changed(dataset: FileDataset, attributes: Mapping[str, object]) -> FileDataset:
    for keyword, value in attributes.items():
        tag = Tag(keyword)
        dataset.pop(tag, None)
        if isinstance(value, bytes):
            dataset[tag] = RawDataElement(tag, dictionary_VR(tag), len(_even(value)), _even(value), 0, False, True)
        elif value is not None:
            setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    return dataset


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder for temporary files, of this process and of those it starts."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def search(*folders: Path, told: str = "") -> None:
    """Look for the patient in every file name and every byte below `folders`, and in what was `told`."""
    for path in (path for folder in folders for path in (folder, *folder.rglob("*"))):
        content = path.read_bytes() if path.is_file() else b""
        for needle in NEEDLES:
            assert needle.upper() not in content.upper(), f"{needle!r} is in {path}"
            assert needle.decode("latin-1").upper() not in path.name.upper(), f"{needle!r} is in the name of {path}"
    for needle in NEEDLES:
        assert needle.decode("latin-1").upper() not in told.upper(), f"{needle!r} was told: {told}"


# --- within the process: every way an object can go ------------------------------------------------------------------------


@pytest.fixture
def intake(site: Path, temporary: Path) -> Iterator[Intake]:
    opened = Intake.open(settings.load(site))
    yield opened
    opened.close()


def _give(intake: Intake, raw: bytes, *, sop_instance_uid: str) -> Taken:
    return intake.take_in(
        raw,
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.1.1",
        sop_instance_uid=sop_instance_uid,
        calling_ae="SENDER",
        called_ae="OSTEON",
    )


def _of_group_2() -> bytes:
    value = _even(SECRET.encode())
    return b"\x02\x00\x16\x00AE" + len(value).to_bytes(2, "little") + value


def _one_after_the_other(intake: Intake, *images: FileDataset) -> Taken:
    return [hand_in(intake, one) for one in images][-1]


WAYS: dict[str, tuple[str, Callable[[Intake], object]]] = {
    "archived": ("new", lambda intake: hand_in(intake, patient(1))),
    "big endian": ("new", lambda intake: hand_in(intake, patient(1, transfer_syntax="1.2.840.10008.1.2.2"))),
    "implicit": ("new", lambda intake: hand_in(intake, patient(1, transfer_syntax="1.2.840.10008.1.2"))),
    "JPEG 2000": ("new", lambda intake: hand_in(intake, patient(1, transfer_syntax="1.2.840.10008.1.2.4.90"))),
    "corrected": ("known", lambda intake: _one_after_the_other(intake, patient(1), patient(1, name="SECRET^OTHER"))),
    "other pixels": ("held", lambda intake: _one_after_the_other(intake, patient(1), patient(1, rows=32))),
    "two patients in a study": (
        "held",
        lambda intake: _one_after_the_other(intake, patient(1), _with(patient(1, instance=2), PatientID="SECRET2")),
    ),
    "burned in": ("held", lambda intake: hand_in(intake, _with(patient(), BurnedInAnnotation="YES"))),
    "mammography": (
        "held",
        lambda intake: hand_in(intake, _with(patient(), Modality="MG", SOPClassUID="1.2.840.10008.5.1.4.1.1.1.2")),
    ),
    "no patient id": ("held", lambda intake: hand_in(intake, _with(patient(), PatientID=""))),
    "over-long patient id": ("held", lambda intake: hand_in(intake, _with(patient(), PatientID=b"SECRET" * 20))),
    "no pixels": ("held", lambda intake: hand_in(intake, _with(patient(), PixelData=None))),
    "a report": ("Refused", lambda intake: hand_in(intake, _with(patient(), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.34"))),
    "another class": ("Refused", lambda intake: hand_in(intake, _with(patient(), SOPClassUID="1.2.840.10008.5.1.4.1.1.2"))),
    "announced otherwise": ("NotAsAnnounced", lambda intake: _give(intake, encoded(patient()), sop_instance_uid=f"{ROOT}.99")),
    "no data set": ("NotUnderstood", lambda intake: _give(intake, SECRET.encode() * 50, sop_instance_uid=f"{ROOT}.99")),
    "cut short": ("held", lambda intake: _give(intake, encoded(patient())[:900], sop_instance_uid=patient().SOPInstanceUID)),
    "group 2 in the data set": (
        "new",
        lambda intake: _give(intake, _of_group_2() + encoded(patient()), sop_instance_uid=patient().SOPInstanceUID),
    ),
    **{
        f"{keyword} is a name": (
            "new",
            partial(lambda keyword, intake: hand_in(intake, _with(patient(), **{keyword: _NAME})), keyword),
        )
        for keyword in _ILL_FITTING
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_a_patient_is_found_nowhere(
    way: str, intake: Intake, temporary: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    expected, go = WAYS[way]
    told = ""
    try:
        outcome = str(go(intake))
    except OsteonError as error:
        outcome, told = type(error).__name__, str(error)
    told += "".join(str(vars(record)) for record in caplog.records) + "".join(capfd.readouterr())
    assert outcome == expected
    search(intake.settings.storage.root, temporary, told=told)


def test_the_search_would_find_the_patient(tmp_path: Path) -> None:
    for content in (b"xxsecret^name", "SECRET".encode("utf-16-le"), ROOT.encode()):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(AssertionError):
            search(tmp_path)
    (tmp_path / "file").rename(tmp_path / "Secret.dcm")
    (tmp_path / "Secret.dcm").write_bytes(b"")
    with pytest.raises(AssertionError):
        search(tmp_path)
    with pytest.raises(AssertionError):
        search(told="patient Secret^Name")


def test_what_is_held_is_there_but_sealed(intake: Intake) -> None:
    held = hand_in(intake, _with(patient(9), BurnedInAnnotation="YES"))
    assert held is Taken.HELD
    storage = intake.settings.storage
    quarantine = Quarantine(storage.root / "quarantine", settings.load_key(storage.vault_key))
    (held_id,) = quarantine.ids()
    assert SECRET.encode() in quarantine.read(held_id)


# --- over the network, as a process, also killed in the middle -------------------------------------------------------------


def test_storescu_sends_a_patient_that_is_found_nowhere(site: Path, temporary: Path, tmp_path: Path) -> None:
    storescu = tool("storescu")
    outbox = tmp_path / "outbox"
    outbox.mkdir()
    for number in range(1, 4):
        patient(number).save_as(outbox / f"SECRET^NAME {number}.dcm", enforce_file_format=True)
    _with(patient(4), BurnedInAnnotation="YES").save_as(outbox / "SECRET^NAME 4.dcm", enforce_file_format=True)
    receiver = Role("receive", "--config", str(site))
    try:
        port = receiver.event("listening")["port"]
        sent = subprocess.run(
            [storescu, "-aet", "SENDER", "-aec", "OSTEON", "127.0.0.1", str(port), "+sd", str(outbox)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert sent.returncode == 0, sent.stderr
    finally:
        receiver.close()
    stored = [line["outcome"] for line in receiver.events if line["event"] in ("instance stored", "instance held")]
    assert sorted(stored) == ["held", "new", "new", "new"]
    search(settings.load(site).storage.root, temporary, told=_told(receiver))


@pytest.mark.parametrize("after", ["header", "half", "all", "all and a moment"])
def test_a_kill_in_the_middle_of_a_c_store_leaves_nothing_of_the_patient(site: Path, temporary: Path, after: str) -> None:
    one = patient(1, rows=1200, columns=1000)
    size = len(encoded(one))
    receiver = Role("receive", "--config", str(site))
    try:
        port = receiver.event("listening")["port"]
        limit = {"header": size // 10, "half": size // 2}.get(after, size)

        def kill() -> None:
            sleep(0.02 if after == "all and a moment" else 0)
            receiver.process.send_signal(signal.SIGKILL)

        with _Cutting(port, limit, kill) as wire:
            assert send([one], port=wire) in ([None], [0]), "no association"
        assert receiver.process.wait(30) == -signal.SIGKILL
    finally:
        receiver.close()
    search(settings.load(site).storage.root, temporary, told=_told(receiver))


def _told(role: Role) -> str:
    return "".join(role.noise) + str(role.events)


class _Cutting:
    """A wire to a port of this machine that calls `cut` when `limit` bytes have gone to the listener."""

    def __init__(self, port: int, limit: int, cut: Callable[[], None]) -> None:
        self.port, self.limit, self.cut = port, limit, cut
        self.listener = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> int:
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        port: int = self.listener.getsockname()[1]
        return port

    def __exit__(self, *_error: object) -> None:
        self.thread.join(30)
        self.listener.close()

    def _run(self) -> None:
        caller, _address = self.listener.accept()
        while not (data := caller.recv(65536)):  # a stranger who looks what listens here
            caller.close()
            caller, _address = self.listener.accept()
        with caller, socket.create_connection(("127.0.0.1", self.port)) as called:
            back = threading.Thread(target=_pump, args=(called, caller))
            back.start()
            gone = 0
            while data:
                called.sendall(data)
                gone += len(data)
                data = caller.recv(65536) if gone < self.limit else b""
            self.cut()
            for end in (caller, called):
                end.shutdown(socket.SHUT_RDWR)
            back.join(30)


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass  # an end was shut


def test_the_pages_of_the_roles_name_no_patient(tmp_path: Path, temporary: Path, free_port: Callable[[], int]) -> None:
    """Nor does what both roles log of a study on its whole way to an answer."""
    ports = {"receive_port": free_port(), "reply_port": free_port(), "schedule_port": 0}
    with Pacs(tmp_path / "SECRET^PACS", callers=["OSTEON"]) as pacs:
        site = init_site(
            tmp_path / "site",
            node={"port": 0, "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"]}]},
            pacs=[{"name": "main", "ae_title": pacs.ae_title, "host": "127.0.0.1", "port": pacs.port}],
            completion={"quiet_s": 0.0},
            metrics=ports,
        )
        promote_tiny(settings.load(site).storage.root / "models")
        with running("receive", config=site) as receiver, running("reply", config=site) as replier:
            port = receiver.event("listening")["port"]
            assert send([patient(1)], port=port) == [0]
            assert send([_with(patient(2), BurnedInAnnotation="YES")], port=port) == [0]
            assert send([_with(patient(3), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.22")], port=port) == [0x0122]
            replier.event("result delivered")
            told = "".join(
                page(shown, path)[1] for shown in ports.values() if shown for path in ("/healthz", "/readyz", "/metrics")
            )
    assert "osteon_classifications_total" in told
    assert "osteon_instances_total" in told
    search(site.parent, temporary, told=told + _told(receiver) + _told(replier))


# --- what the commands print -----------------------------------------------------------------------------------------------


def test_commands_name_no_patient(site: Path, temporary: Path, tmp_path: Path) -> None:
    intake = Intake.open(settings.load(site))
    for one in (patient(1), _with(patient(2), BurnedInAnnotation="YES")):
        hand_in(intake, one)
    (held_id,) = intake.quarantine.ids()
    intake.close()
    told = ""
    for words in (("status",), ("quarantine", "list"), ("quarantine", "show", held_id, "--no-picture"), ("delivery", "list")):
        done = subprocess.run(
            [sys.executable, "-m", "node", *words, "--config", str(site)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,  # a picture is written where the person is
        )
        assert done.returncode == 0, done.stderr
        told += done.stdout + done.stderr
    assert held_id in told
    search(site.parent, temporary, told=told)
