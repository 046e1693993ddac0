"""Delivery to PACS that take, refuse, stall, abort or hold another patient: ours, dcmtk's storescp and a real Orthanc."""

from __future__ import annotations

import logging
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from time import monotonic, sleep

import answers
import pytest
import shared
from answers import raw_elements
from hypothesis import given
from hypothesis import strategies as st
from orthanc import running_orthanc
from pydicom import dcmread
from pydicom.dataset import FileDataset
from pydicom.uid import (
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from roles import send as store
from studies import image, part10, study

from node.demo.pacs import Pacs
from node.errors import PeerAway
from node.keep.records import Document
from node.reply import delivery, report
from node.reply.delivery import PatientCheck
from node.settings import Delivery
from node.settings import Pacs as Destination

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)


@pytest.fixture
def images() -> list[FileDataset]:
    return study(modality="CR", images=2, charset="ISO_IR 100", PatientName="Müller^Jörg", PatientID="SECRET-4711")


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with Pacs(tmp_path / "pacs", callers=["OSTEON", "SENDER"]) as running:
        yield running


def destination(port: int, *, ae_title: str = "PACS", timeout_s: float = 5.0) -> Destination:
    return Destination(name="main", ae_title=ae_title, host="127.0.0.1", port=port, timeout_s=timeout_s)


def deliver(
    to: Destination, images: list[FileDataset], *, stamped: Callable[[Document], None] = lambda document: None, **other: object
) -> delivery.Sent:
    originals = [part10(one) for one in images]

    def build(sop_class: str) -> report.Built:
        built = answers.document(originals, sop_class_uid=sop_class, **other)  # type: ignore[arg-type]
        stamped(built.document)  # as respond does it
        return built

    return delivery.send(to, calling_ae="OSTEON", build=build, study=answers.study_identity(answers.identity(originals[0])))


# --- what is taken ----------------------------------------------------------------------------------------------------------


def test_the_pacs_gets_the_very_bytes_that_were_stamped(pacs: Pacs, images: list[FileDataset]) -> None:
    stamped: list[Document] = []

    def stamp(document: Document) -> None:
        assert pacs.received == []
        stamped.append(document)

    sent = deliver(destination(pacs.port), images, stamped=stamp)
    (path,) = pacs.received
    built = answers.document([part10(one) for one in images])
    assert stamped == [built.document] == [sent.document]
    assert sent.status == 0x0000
    assert sent.patient_check is PatientCheck.NO_STUDY
    assert pacs.associations == 1
    assert data_set(path.read_bytes()) == data_set(built.bytes)


def data_set(part10_file: bytes) -> bytes:
    """Cut preamble and file meta information off."""
    return part10_file[144 + int.from_bytes(part10_file[140:144], "little") :]


@pytest.mark.parametrize("charset", ["ISO_IR 100", ["", "ISO 2022 IR 87"], "GB18030"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_identity_bytes_survive_the_wire_in_both_syntaxes(tmp_path: Path, charset: str, syntax: str) -> None:
    name = {"ISO_IR 100": "Müller^Jörg", "GB18030": "Wang^XiaoDong=王^小东"}.get(str(charset), "Yamada^Tarou=山田^太郎")
    original = image(modality="CR", charset=charset, PatientName=name, PatientID="PID 1   ")
    with Pacs(tmp_path / "pacs", syntaxes=[syntax]) as pacs:
        deliver(destination(pacs.port), [original])
        (path,) = pacs.received
    received = dcmread(path)
    assert received.file_meta.TransferSyntaxUID == syntax
    came = {one.tag: one.value for one in raw_elements(part10(original)) if one.tag in (0x00080005, *answers.PATIENT)}
    raw = {tag: received.get_item(tag).value for tag in came if tag != 0x00080005}
    assert raw == {tag: value for tag, value in came.items() if tag != 0x00080005}
    assert came[0x00080005] in path.read_bytes()
    assert received == dcmread(BytesIO(answers.document([part10(original)]).bytes))


def test_a_mislabelled_character_set_leaves_as_it_came(pacs: Pacs) -> None:
    original = answers.with_raw(
        part10(image(modality="CR", charset="ISO_IR 100")), x00080005=b"ISO-IR 100", x00100010=b"W\xe4ng^\xdcnal "
    )
    elements = {one.tag: one for one in raw_elements(original)}
    identity = answers.study_identity(answers.identity(part10(image(modality="CR", charset="ISO_IR 100"))))
    odd = answers.odd_identity(identity, elements)
    built = answers.document([part10(image(modality="CR", charset="ISO_IR 100"))], study=odd)
    delivery.send(destination(pacs.port), calling_ae="OSTEON", build=lambda sop_class: built, study=odd)
    assert data_set(pacs.received[0].read_bytes()) == data_set(built.bytes)


@pytest.mark.parametrize("sop_class", [Comprehensive3DSRStorage, ComprehensiveSRStorage, EnhancedSRStorage])
def test_the_best_class_that_the_pacs_takes_is_sent(tmp_path: Path, images: list[FileDataset], sop_class: str) -> None:
    classes = list(report.SOP_CLASSES[report.SOP_CLASSES.index(sop_class) :])  # type: ignore[arg-type]
    with Pacs(tmp_path / "pacs", sop_classes=classes) as pacs:
        sent = deliver(destination(pacs.port), images)
        assert dcmread(pacs.received[0]).SOPClassUID == sop_class == sent.document.sop_class_uid


def test_success_warnings_and_duplicate_mean_sent(pacs: Pacs, images: list[FileDataset]) -> None:
    for status in (0x0000, 0xB000, 0xB006, 0xB007, 0x0001, 0x0107, 0x0116, 0x0111):
        pacs.store_status = status
        assert deliver(destination(pacs.port), images).status == status


def test_a_refusal_says_its_status(pacs: Pacs, images: list[FileDataset]) -> None:
    for status in (0xA900, 0xC000, 0xC123, 0x0110, 0x0122, 0x0124, 0xFE00):
        pacs.store_status = status
        with pytest.raises(delivery.Rejected, match=f"{status:04X}H") as refused:
            deliver(destination(pacs.port), images)
        assert refused.value.status == status
    assert pacs.received == []


def test_a_pacs_that_takes_no_report_rejects(tmp_path: Path, images: list[FileDataset]) -> None:
    for finds in (True, False):
        with (
            Pacs(tmp_path / "pacs", sop_classes=["1.2.840.10008.5.1.4.1.1.1"], finds=finds) as pacs,
            pytest.raises(delivery.Rejected, match="none of the three SR classes"),
        ):
            deliver(destination(pacs.port), images)


# --- what may succeed later -------------------------------------------------------------------------------------------------


def test_a_full_pacs_is_tried_again(pacs: Pacs, images: list[FileDataset]) -> None:
    for status in (0xA700, 0xA7FF):
        pacs.store_status = status
        with pytest.raises(PeerAway, match="no room"):
            deliver(destination(pacs.port), images)


def test_a_dead_pacs_is_known_at_once(images: list[FileDataset], free_port: Callable[[], int]) -> None:
    started = monotonic()
    with pytest.raises(PeerAway, match="no association"):
        deliver(destination(free_port()), images)
    assert monotonic() - started < 3


def test_a_pacs_that_takes_connections_and_says_nothing_is_left_in_time(images: list[FileDataset]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = monotonic()
        with pytest.raises(PeerAway):
            deliver(destination(silent.getsockname()[1], timeout_s=1.0), images)
        assert monotonic() - started < 6


def test_a_pacs_that_does_not_answer_the_store_is_left_in_time(pacs: Pacs, images: list[FileDataset]) -> None:
    pacs.delay_s = 3.0
    pacs.find_status = 0xA700
    started = monotonic()
    with pytest.raises(PeerAway):
        deliver(destination(pacs.port, timeout_s=0.5), images)
    assert monotonic() - started < 8


def test_an_abort_is_tried_again(pacs: Pacs, images: list[FileDataset]) -> None:
    pacs.aborts = True
    with pytest.raises(PeerAway, match="abort"):
        deliver(destination(pacs.port), images)


@pytest.mark.parametrize("wrong", [{"ae_title": "OTHER"}, {}])
def test_a_rejected_association_is_tried_again_and_says_what_to_look_at(
    tmp_path: Path, images: list[FileDataset], wrong: dict[str, str]
) -> None:
    callers = ["OSTEON"] if wrong else ["SOMEBODY"]
    with Pacs(tmp_path / "pacs", callers=callers) as pacs, pytest.raises(PeerAway, match="AE title"):
        deliver(destination(pacs.port, **wrong), images)  # type: ignore[arg-type]


# --- whose study the PACS holds ---------------------------------------------------------------------------------------------


def test_the_same_patient_is_confirmed(pacs: Pacs, images: list[FileDataset]) -> None:
    pacs.put(images[0])
    assert deliver(destination(pacs.port), images).patient_check is PatientCheck.SAME


@pytest.mark.parametrize("theirs", ["SOMEBODY-ELSE", "secret-4711", "Müller-1"])
def test_another_patient_holds_the_result(pacs: Pacs, images: list[FileDataset], theirs: str) -> None:
    pacs.put(images[0])
    pacs.put(study(modality="CR", images=3, charset="ISO_IR 100", PatientID=theirs)[2])
    with pytest.raises(delivery.Held, match="another patient") as held:
        deliver(destination(pacs.port), images, stamped=lambda document: pytest.fail("nothing may be built"))
    assert pacs.received == []
    assert theirs not in str(held.value)
    assert "SECRET" not in str(held.value)


def test_padding_and_character_set_do_not_make_another_patient(pacs: Pacs) -> None:
    ours = image(modality="CR", charset="ISO_IR 100", PatientID="Kö-1  ")
    pacs.put(image(modality="CR", charset="ISO_IR 192", PatientID="Kö-1"))
    assert deliver(destination(pacs.port), [ours]).patient_check is PatientCheck.SAME


def test_a_result_is_held_when_the_pacs_holds_the_study_under_no_patient_id(pacs: Pacs, images: list[FileDataset]) -> None:
    pacs.put(image(modality="CR", PatientID=""))
    with pytest.raises(delivery.Held):
        deliver(destination(pacs.port), images)
    assert not pacs.held("SR")


def test_without_c_find_it_is_sent(tmp_path: Path, images: list[FileDataset]) -> None:
    with Pacs(tmp_path / "pacs", finds=False) as pacs:
        pacs.put(image(modality="CR", PatientID="SOMEBODY-ELSE"))
        assert deliver(destination(pacs.port), images).patient_check is PatientCheck.UNSAID
        assert len(pacs.received) == 1


def test_a_failing_c_find_is_not_in_the_way(pacs: Pacs, images: list[FileDataset]) -> None:
    pacs.find_status = 0xA700
    assert deliver(destination(pacs.port), images).patient_check is PatientCheck.UNSAID
    assert pacs.associations == 1


def test_a_c_find_that_ends_the_association_is_not_asked_twice(pacs: Pacs, images: list[FileDataset]) -> None:
    pacs.aborts_find = True
    assert deliver(destination(pacs.port), images).patient_check is PatientCheck.UNSAID
    assert (len(pacs.received), pacs.associations) == (1, 2)


def test_matches_of_other_studies_are_not_believed(
    pacs: Pacs, images: list[FileDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "ANSWERS_READ_MAX", 5)
    pacs.ignores_keys = True
    for number in range(2, 5):
        pacs.put(image(modality="CR", patient=number))
    assert deliver(destination(pacs.port), images).patient_check is PatientCheck.NO_STUDY
    for number in range(5, 10):
        pacs.put(image(modality="CR", patient=number, rows=8, columns=8))
    assert deliver(destination(pacs.port), images, edition=1).patient_check is PatientCheck.UNSAID
    assert len(pacs.received) == 2


def test_nothing_of_the_patient_reaches_a_log(
    pacs: Pacs, images: list[FileDataset], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    pacs.put(images[0])
    deliver(destination(pacs.port), images)
    told = caplog.text + "".join(capfd.readouterr())
    assert "SECRET" not in told
    assert "ller" not in told


def test_what_stamping_raises_stops_the_sending(pacs: Pacs, images: list[FileDataset]) -> None:
    def refuse(document: Document) -> None:
        raise PeerAway("the catalogue is away")

    with pytest.raises(PeerAway, match="catalogue"):
        deliver(destination(pacs.port), images, stamped=refuse)
    assert pacs.received == []


def test_results_go_out_side_by_side(pacs: Pacs) -> None:
    patients = [study(patient=number, modality="CR", images=1) for number in range(1, 5)]
    threads = [threading.Thread(target=deliver, args=(destination(pacs.port), one)) for one in patients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(pacs.received)) == 4


# --- foreign PACS -----------------------------------------------------------------------------------------------------------


def test_orthanc_files_the_result_in_the_study_of_its_patient(
    tmp_path: Path, images: list[FileDataset], free_port: Callable[[], int]
) -> None:
    port = free_port()
    with running_orthanc(tmp_path / "orthanc", callers={"OSTEON": port, "SENDER": port}) as orthanc:
        assert store(images, port=orthanc.port, called="ORTHANC") == [0, 0]
        to = destination(orthanc.port, ae_title="ORTHANC")
        first = deliver(to, images)
        assert first.patient_check is PatientCheck.SAME
        assert deliver(to, images) == first  # a resend changes nothing
        (one_study,) = [orthanc.get(f"/studies/{each}") for each in orthanc.get("/studies")]
        assert len(one_study["Series"]) == 2
        assert one_study["PatientMainDicomTags"]["PatientID"] == "SECRET-4711"
        assert len(orthanc.get("/patients")) == 1
        series = [orthanc.get(f"/series/{each}") for each in one_study["Series"]]
        (sr,) = [each for each in series if each["MainDicomTags"]["Modality"] == "SR"]
        (instance,) = sr["Instances"]
        received = orthanc.get(f"/instances/{instance}/file")
    built = answers.document([part10(one) for one in images])
    assert data_set(received) == data_set(built.bytes)


def test_orthanc_with_another_patient_for_the_study_holds_the_result(
    tmp_path: Path, images: list[FileDataset], free_port: Callable[[], int]
) -> None:
    port = free_port()
    with running_orthanc(tmp_path / "orthanc", callers={"OSTEON": port, "SENDER": port}) as orthanc:
        other = study(modality="CR", images=1, PatientID="SOMEBODY-ELSE")
        assert store(other, port=orthanc.port, called="ORTHANC") == [0]
        with pytest.raises(delivery.Held):
            deliver(destination(orthanc.port, ae_title="ORTHANC"), images)
        assert len(orthanc.get("/instances")) == 1


def test_storescp_writes_the_bytes_that_were_sent(
    tmp_path: Path, images: list[FileDataset], free_port: Callable[[], int]
) -> None:
    port, folder = free_port(), tmp_path / "storescp"
    folder.mkdir()
    command = [shared.tool("storescp"), "-aet", "STORESCP", "+B", "-od", str(folder), str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as storescp:
        try:
            sent = deliver_when_up(destination(port, ae_title="STORESCP"), images)
        finally:
            storescp.terminate()
    assert sent.patient_check is PatientCheck.UNSAID
    (file,) = folder.iterdir()
    built = answers.document([part10(one) for one in images], sop_class_uid=sent.document.sop_class_uid)  # type: ignore[arg-type]
    assert data_set(file.read_bytes()) == data_set(built.bytes)


def deliver_when_up(to: Destination, images: list[FileDataset]) -> delivery.Sent:
    deadline = monotonic() + 20
    while True:
        try:
            return deliver(to, images)
        except PeerAway:
            if monotonic() > deadline:
                raise
            sleep(0.1)


# --- when it is tried again -------------------------------------------------------------------------------------------------

RULES = Delivery(retry_first_s=10.0, retry_max_s=3600.0, give_up_h=72.0)


def test_the_pause_doubles_to_its_bound() -> None:
    pauses = [
        (delivery.next_attempt(attempts, RULES, created_at=NOW, now=NOW, key="1") or NOW) - NOW
        for attempts in (1, 2, 3, 9, 40, 5000)
    ]
    for pause, middle in zip(pauses, (10, 20, 40, 2560, 3600, 3600), strict=True):
        assert 0.8 * middle <= pause.total_seconds() <= 1.2 * middle


@given(
    attempts=st.integers(min_value=0, max_value=10**6),
    age_h=st.floats(min_value=0, max_value=100),
    key=st.text(max_size=8),
)
def test_the_next_attempt_lies_ahead_within_the_time_or_is_none(attempts: int, age_h: float, key: str) -> None:
    created_at = NOW - timedelta(hours=age_h)
    end = created_at + timedelta(hours=RULES.give_up_h)
    at = delivery.next_attempt(attempts, RULES, created_at=created_at, now=NOW, key=key)
    assert at == delivery.next_attempt(attempts, RULES, created_at=created_at, now=NOW, key=key)
    if end <= NOW:
        assert at is None
    else:
        assert at is not None
        assert NOW < at <= end


def test_deliveries_do_not_come_back_at_once() -> None:
    at = {delivery.next_attempt(3, RULES, created_at=NOW, now=NOW, key=str(number)) for number in range(20)}
    assert len(at) > 10
