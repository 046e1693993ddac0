"""The door: who may call, what is negotiated, what is answered, and what a peer cannot make us hold."""

from __future__ import annotations

import logging
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import shared
import studies
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
)
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dimse_messages import C_ECHO_RQ, C_STORE_RQ
from pynetdicom.dimse_primitives import C_ECHO, C_STORE
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.sop_class import Verification
from walls import Wall

from node.errors import NoSpace, NotAsAnnounced
from node.receive.association import Listener, _Guard
from node.settings import Caller, Node

CR, DX = ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation


class Recorder:
    """Stands in for the intake: keeps what it gets, raises what it is told, waits while it is told to."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.go = threading.Event()
        self.go.set()

    def __call__(self, raw: bytes, **told: str) -> None:
        self.got.append(told | {"raw": raw})
        self.go.wait(10)
        if self.error:
            raise self.error


@pytest.fixture
def intake() -> Recorder:
    return Recorder()


@pytest.fixture
def listen(intake: Recorder) -> Iterator[Callable[..., int]]:
    """Start a listener with other settings; give its port."""
    started: list[Listener] = []

    def start(**options: Any) -> int:
        callers = [
            Caller(ae_title="SENDER", networks=["127.0.0.0/8"]),
            Caller(ae_title="FAR", networks=["10.0.0.0/8"]),
            Caller(ae_title="TEACHER", networks=["::1/128", "127.0.0.1/32"], purpose="learn"),
        ]
        base = {"ae_title": "OSTEON", "learn_ae_title": "OSTEON_L", "port": 0, "default_issuer": "TEST", "callers": callers}
        listener = Listener(Node.model_validate(base | options), intake)
        listener.start()
        started.append(listener)
        return listener.port

    yield start
    intake.go.set()
    for listener in started:
        listener.stop(grace_s=2)


def associate(port: int, *, calling: str = "SENDER", called: str = "OSTEON", syntax: str = ExplicitVRLittleEndian) -> Association:
    entity = AE(calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 8
    for uid in (CR, DX, Verification):
        entity.add_requested_context(uid, syntax)
    return entity.associate("127.0.0.1", port, ae_title=called)


def store(association: Association, dataset: Any) -> int:
    return int(association.send_c_store(dataset).Status)


# --- who may call ------------------------------------------------------------------------------------------------------------


def test_a_listed_caller_is_answered_and_its_data_set_arrives_as_it_was_sent(
    listen: Callable[..., int], intake: Recorder
) -> None:
    dataset = studies.image()
    association = associate(listen())
    assert association.send_c_echo().Status == 0x0000
    assert store(association, dataset) == 0x0000
    association.release()
    (got,) = intake.got
    assert got.pop("raw") == studies.encoded(dataset)
    assert got == {
        "transfer_syntax_uid": ExplicitVRLittleEndian,
        "sop_class_uid": dataset.SOPClassUID,
        "sop_instance_uid": dataset.SOPInstanceUID,
        "calling_ae": "SENDER",
        "called_ae": "OSTEON",
    }


def test_the_intake_learns_which_of_the_two_titles_was_called(listen: Callable[..., int], intake: Recorder) -> None:
    association = associate(listen(), called="OSTEON_L")
    assert store(association, studies.image()) == 0x0000
    association.release()
    assert intake.got[0]["called_ae"] == "OSTEON_L"


@pytest.mark.parametrize(
    ("calling", "called", "reason"),
    [
        ("STRANGER", "OSTEON", (1, 1, 3)),
        ("FAR", "OSTEON", (1, 1, 3)),  # a listed title from another network
        ("sender", "OSTEON", (1, 1, 3)),
        ("SENDER", "ANY-SCP", (1, 1, 7)),
    ],
)
def test_everybody_else_is_rejected_with_the_reason_of_the_standard(
    listen: Callable[..., int], intake: Recorder, calling: str, called: str, reason: tuple[int, int, int]
) -> None:
    association = associate(listen(), calling=calling, called=called)
    assert association.is_rejected
    answer = association.acceptor.primitive
    assert (answer.result, answer.result_source, answer.diagnostic) == reason
    assert not intake.got


def test_nobody_may_call_when_nobody_is_listed(listen: Callable[..., int]) -> None:
    assert associate(listen(callers=[])).is_rejected


def test_an_association_over_the_limit_is_rejected_for_the_moment(listen: Callable[..., int]) -> None:
    port = listen(max_associations=2)
    first, second = associate(port), associate(port)
    third = associate(port)
    answer = third.acceptor.primitive
    assert (answer.result, answer.result_source, answer.diagnostic) == (2, 3, 2)
    assert first.send_c_echo().Status == second.send_c_echo().Status == 0x0000
    first.release()
    second.release()
    deadline = monotonic() + 5
    while not (again := associate(port)).is_established and monotonic() < deadline:
        sleep(0.05)
    assert again.is_established
    again.release()


def test_it_listens_on_its_one_address_alone_loopback_until_told_otherwise(listen: Callable[..., int]) -> None:
    port = listen()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", port), timeout=2):
        pass


def test_a_rejection_is_one_line_that_cannot_be_forged(listen: Callable[..., int], caplog: pytest.LogCaptureFixture) -> None:
    port = listen()
    with caplog.at_level(logging.INFO, "osteon.receive"):
        associate(port, calling="A=1 event=x")
    (record,) = [record for record in caplog.records if record.getMessage() == "association rejected"]
    assert record.osteon_fields["calling_ae"] == "A=1 event=x"  # type: ignore[attr-defined]
    assert record.osteon_fields["reason"] == "calling AE title not recognised"  # type: ignore[attr-defined]


# --- what is negotiated ------------------------------------------------------------------------------------------------------


def test_a_class_that_is_not_taken_is_refused_at_negotiation(listen: Callable[..., int]) -> None:
    entity = AE("SENDER")
    entity.add_requested_context(CTImageStorage)
    entity.add_requested_context(CR, [JPEGBaseline8Bit, JPEG2000Lossless, ExplicitVRLittleEndian])
    association = entity.associate("127.0.0.1", listen(), ae_title="OSTEON")
    assert {context.abstract_syntax: context.result for context in association.rejected_contexts} == {CTImageStorage: 3}
    (accepted,) = association.accepted_contexts
    association.release()
    assert accepted.transfer_syntax == [ExplicitVRLittleEndian]  # nothing lossy while something lossless is offered


# --- what is answered --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "code"), [(NoSpace(), 0xA700), (NotAsAnnounced(), 0xA900), (KeyError("SECRET^NAME"), 0xC001)])
def test_an_error_of_the_intake_becomes_a_status_and_one_line_without_data(
    listen: Callable[..., int], intake: Recorder, caplog: pytest.LogCaptureFixture, error: Exception, code: int
) -> None:
    intake.error = error
    association = associate(listen())
    with caplog.at_level(logging.INFO):
        answer = association.send_c_store(studies.image())
        association.release()
    assert answer.Status == code
    assert "SECRET" not in str(answer)
    lines = [record for record in caplog.records if record.name.startswith("osteon")]
    assert [record.getMessage() for record in lines] == ["instance refused"]
    assert lines[0].osteon_fields["status"] == f"{code:04X}H"  # type: ignore[attr-defined]
    assert "SECRET" not in caplog.text + str(lines[0].__dict__)


@pytest.mark.parametrize("instance_uid", ["", None], ids=["empty", "absent"])
def test_a_request_without_a_sop_instance_uid_is_answered_at_once(
    listen: Callable[..., int], intake: Recorder, instance_uid: str | None
) -> None:
    """pynetdicom 3.0.4 drops it, and the peer waits for its time-out."""
    association = associate(listen())
    began = monotonic()
    answer = _send_raw_store(association, instance_uid=instance_uid)
    assert answer.Status == 0x0117
    assert monotonic() - began < 4
    assert store(association, studies.image()) == 0x0000  # the association goes on
    association.release()
    assert len(intake.got) == 1


def test_a_class_that_the_context_does_not_name_is_refused(listen: Callable[..., int], intake: Recorder) -> None:
    association = associate(listen())
    assert _send_raw_store(association, instance_uid="1.2.3", class_uid=CTImageStorage).Status == 0x0122
    association.release()
    assert not intake.got


# --- what a peer cannot make us hold -----------------------------------------------------------------------------------------


def test_a_larger_object_is_refused_and_the_association_goes_on(listen: Callable[..., int], intake: Recorder) -> None:
    association = associate(listen(max_object_mb=1))
    large = studies.image(rows=1024, columns=1024)
    assert store(association, large) == 0xA700
    assert store(association, studies.image()) == 0x0000
    association.release()
    assert len(intake.got) == 1


def test_a_pdu_longer_than_negotiated_ends_the_association_before_it_is_read(listen: Callable[..., int]) -> None:
    association = associate(listen(max_pdu=16384))
    association.dul.socket.socket.sendall(b"\x04\x00" + struct.pack(">L", 1 << 30))
    _wait_for(lambda: association.is_aborted)


def test_a_request_ahead_of_the_answer_to_the_last_ends_the_association(listen: Callable[..., int], intake: Recorder) -> None:
    """Memory is bounded by associations x largest object only when each holds one object at a time."""
    intake.go.clear()
    association = associate(listen())
    for number in range(1, 5):
        _post_store(association, studies.image(instance=number))
    _wait_for(lambda: association.is_aborted)
    intake.go.set()
    assert len(intake.got) == 1


@pytest.mark.parametrize(
    "sent", [b"", b"\x01\x00", b"\x01\x00\x00\x00\x00\xcd\x00\x01"], ids=["nothing", "half a header", "half a PDU"]
)
def test_a_connection_that_asks_for_nothing_is_closed(listen: Callable[..., int], sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", listen(idle_timeout_s=0.3)), timeout=5) as connection:
        connection.sendall(sent)
        assert connection.recv(100)[:1] in (b"", b"\x07")


def test_an_association_that_falls_silent_is_ended(listen: Callable[..., int]) -> None:
    association = associate(listen(idle_timeout_s=0.3))
    association.dul.socket.socket.sendall(b"\x04\x00\x00\x00")  # and no more
    _wait_for(lambda: association.is_aborted)


def test_a_request_that_drips_is_ended(listen: Callable[..., int]) -> None:
    """One byte comes well within the time, all of them do not."""
    with socket.create_connection(("127.0.0.1", listen(idle_timeout_s=0.5)), timeout=5) as connection:
        connection.sendall(b"\x01\x00\x00\x00\x00\xcd")
        with pytest.raises(OSError, match=r"reset|Broken|closed"):
            _drip(connection)


def test_a_pdu_that_drips_ends_the_association(listen: Callable[..., int]) -> None:
    association = associate(listen(idle_timeout_s=0.5))
    connection = association.dul.socket.socket
    connection.sendall(b"\x04\x00\x00\x00\x10\x00")
    with suppress(OSError):
        _drip(connection, until=lambda: association.is_aborted)
    _wait_for(lambda: association.is_aborted)


def test_an_object_that_drips_in_whole_pdus_ends_the_association(listen: Callable[..., int], intake: Recorder) -> None:
    """Each PDU comes well within the time, the object does not."""
    association = associate(listen(object_timeout_s=0.5))
    command, *_ = _message(studies.image(), instance_uid="1.2.3", class_uid=CR).encode_msg(1, 16384)
    association.dul.send_pdu(command)
    fragment = b"\x04\x00" + struct.pack(">L", 14) + struct.pack(">L", 10) + b"\x01\x00" + bytes(8)  # no last one
    deadline = monotonic() + 6
    while not association.is_aborted:
        assert monotonic() < deadline
        with suppress(AttributeError, OSError):
            association.dul.socket.socket.sendall(fragment)
        sleep(0.05)
    assert not intake.got


def test_a_peer_that_reads_no_answer_is_ended(listen: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for one C-ECHO after the other; what we answer fills the buffers of both sides, and then nobody moves."""
    stand = _Guard.stand

    def stand_with_a_small_buffer(guard: _Guard) -> None:
        stand(guard)
        guard.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # type: ignore[union-attr]

    monkeypatch.setattr(_Guard, "stand", stand_with_a_small_buffer)
    port = listen(idle_timeout_s=0.5)
    with Wall(port, to_client=400) as wall:
        association = associate(wall.port)
        assert association.is_established
        request = C_ECHO()
        request.MessageID, request.AffectedSOPClassUID = 1, Verification
        message = C_ECHO_RQ()
        message.primitive_to_message(request)
        pdu = b"".join(P_DATA_TF(part).encode() for part in message.encode_msg(5, 16384))
        connection, ended = association.dul.socket.socket, threading.Event()

        def ask() -> None:
            with suppress(OSError):
                while not ended.is_set():
                    connection.sendall(pdu * 100)

        asking = threading.Thread(target=ask)
        asking.start()
        _wait_for(lambda: not _acceptors())
        ended.set()
    asking.join(10)
    association.abort()


def _acceptors() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "AcceptorThread" in thread.name]


@pytest.mark.parametrize("ending", ["released", "rejected"])
def test_a_peer_that_does_not_hang_up_is_hung_up_on(listen: Callable[..., int], ending: str) -> None:
    association = associate(listen(), calling="SENDER" if ending == "released" else "STRANGER")
    if ending == "released":
        association.dul.socket.socket.sendall(b"\x05\x00\x00\x00\x00\x04\x00\x00\x00\x00")
    _wait_for(lambda: not _acceptors())


def _drip(connection: socket.socket, *, until: Callable[[], bool] = lambda: False) -> None:
    deadline = monotonic() + 6
    while not until():
        assert monotonic() < deadline, "it was not ended in time"
        connection.sendall(b"\x00")
        sleep(0.05)


def test_random_bytes_do_no_harm(listen: Callable[..., int]) -> None:
    port = listen()
    for seed in range(8):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(bytes((seed * 31 + at * 7) % 256 for at in range(200)))
    association = associate(port)
    assert association.send_c_echo().Status == 0x0000
    association.release()


def test_stopping_finishes_what_is_being_taken_in(intake: Recorder) -> None:
    node = Node(ae_title="OSTEON", learn_ae_title="OSTEON_L", port=0, default_issuer="T",
                callers=[Caller(ae_title="SENDER", networks=["127.0.0.1"])])  # fmt: skip
    listener = Listener(node, intake)
    listener.start()
    association = associate(listener.port)
    intake.go.clear()
    answers: list[int] = []
    sender = threading.Thread(target=lambda: answers.append(store(association, studies.image())))
    sender.start()
    _wait_for(lambda: intake.got)
    stopper = threading.Thread(target=listener.stop)
    stopper.start()
    sleep(0.1)
    intake.go.set()
    sender.join(10)
    stopper.join(10)
    assert answers == [0x0000]


# --- dcmtk -------------------------------------------------------------------------------------------------------------------


def test_echoscu_is_answered(listen: Callable[..., int]) -> None:
    echoscu = shared.tool("echoscu")
    port = str(listen())
    known = subprocess.run([echoscu, "-aet", "SENDER", "-aec", "OSTEON", "127.0.0.1", port], capture_output=True, text=True)
    assert known.returncode == 0, known.stderr
    unknown = subprocess.run([echoscu, "-aet", "OTHER", "-aec", "OSTEON", "127.0.0.1", port], capture_output=True, text=True)
    assert unknown.returncode != 0
    assert "Calling AE Title Not Recognized" in unknown.stderr + unknown.stdout


def test_storescu_sends_in_the_syntax_of_the_file(listen: Callable[..., int], intake: Recorder, tmp_path: Path) -> None:
    storescu = shared.tool("storescu")
    file = tmp_path / "a.dcm"
    dataset = studies.image(transfer_syntax=JPEG2000Lossless)
    file.write_bytes(studies.part10(dataset))
    command = [storescu, "-R", "-xv", "-aet", "SENDER", "-aec", "OSTEON", "127.0.0.1", str(listen()), str(file)]
    sent = subprocess.run(command, capture_output=True, text=True)
    assert sent.returncode == 0, sent.stderr
    assert [got["transfer_syntax_uid"] for got in intake.got] == [JPEG2000Lossless]


# --- hand-made senders -------------------------------------------------------------------------------------------------------


def _wait_for(condition: Callable[[], object], *, seconds: float = 6.0) -> None:
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it did not happen in time"
        sleep(0.01)


def _message(dataset: Any, *, instance_uid: str | None, class_uid: str) -> C_STORE_RQ:
    request = C_STORE()
    request.MessageID, request.Priority = 7, 0
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = class_uid, "1.2.3"
    from io import BytesIO

    request.DataSet = BytesIO(studies.encoded(dataset))
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    if instance_uid is None:
        del message.command_set.AffectedSOPInstanceUID
    else:
        message.command_set.AffectedSOPInstanceUID = instance_uid
    return message


def _post(association: Association, message: C_STORE_RQ) -> None:
    for part in message.encode_msg(1, 16384):
        association.dul.send_pdu(part)


def _post_store(association: Association, dataset: Any) -> None:
    _post(association, _message(dataset, instance_uid=dataset.SOPInstanceUID, class_uid=CR))


def _send_raw_store(association: Association, *, instance_uid: str | None, class_uid: str = CR) -> C_STORE:
    association._reactor_checkpoint.clear()  # as send_c_store does, so that the answer is ours to read
    try:
        _post(association, _message(studies.image(modality="CR"), instance_uid=instance_uid, class_uid=class_uid))
        _, answer = association.dimse.get_msg(block=True)
    finally:
        association._reactor_checkpoint.set()
    assert isinstance(answer, C_STORE), "no answer"
    return answer
