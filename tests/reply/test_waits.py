"""Towards a PACS that stalls, drips or never ends, each wait of ours ends: over TLS and in clear."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import answers
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian
from studies import image, part10, read
from walls import Wall

from node import peer
from node.demo.pacs import Pacs
from node.errors import PeerAway
from node.reply import delivery
from node.settings import Pacs as Destination

TIMEOUT_S = 0.5
ENOUGH_S = 3.0
"""For a step that shall succeed, on a busy machine."""
SOON_S = 15.0
"""Several waits of `TIMEOUT_S` may follow each other, and pynetdicom's threads take a moment to end."""


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with Pacs(tmp_path / "pacs") as running:
        yield running


def destination(port: int, *, timeout_s: float = TIMEOUT_S, **other: Any) -> Destination:
    return Destination(name="main", ae_title="PACS", host="127.0.0.1", port=port, timeout_s=timeout_s, **other)


def deliver(to: Destination) -> delivery.Sent:
    original = part10(image(modality="CR"))
    return delivery.send(
        to,
        calling_ae="OSTEON",
        build=lambda sop_class: answers.document([original], sop_class_uid=sop_class),
        study=answers.study_identity(answers.identity(original)),
    )


@contextmanager
def ends_soon() -> Iterator[None]:
    """Fail when the block takes long, or leaves a thread of pynetdicom behind."""
    before, began = set(threading.enumerate()), monotonic()
    yield
    assert monotonic() - began < SOON_S
    deadline = monotonic() + SOON_S
    while left := [thread for thread in threading.enumerate() if thread not in before and _is_ours(thread)]:
        assert monotonic() < deadline, left
        sleep(0.02)


def _is_ours(thread: threading.Thread) -> bool:
    return "Requestor" in thread.name or (type(thread).__name__ == "DULServiceProvider" and not _accepts(thread))


def _accepts(thread: Any) -> bool:
    return bool(thread.assoc.is_acceptor)


@pytest.mark.parametrize("bytes_back", [0, 3, 20], ids=["nothing", "half a header", "half an A-ASSOCIATE-AC"])
def test_an_association_that_is_not_answered_whole(pacs: Pacs, bytes_back: int) -> None:
    with Wall(pacs.port, to_client=bytes_back) as wall, ends_soon(), pytest.raises(PeerAway):
        deliver(destination(wall.port))


def test_an_answer_that_drips(pacs: Pacs) -> None:
    with Wall(pacs.port, drip_s=0.2) as wall, ends_soon(), pytest.raises(PeerAway):
        deliver(destination(wall.port))


def test_a_pdu_longer_than_anybody_sends_is_not_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as boaster:

        def boast() -> None:
            connection, _ = boaster.accept()
            with connection:
                connection.sendall(b"\x02\x00\xff\xff\xff\xff" + bytes(1000))
                connection.recv(1 << 16)
                sleep(1.0)

        threading.Thread(target=boast, daemon=True).start()
        with ends_soon(), pytest.raises(PeerAway):
            deliver(destination(boaster.getsockname()[1]))


def test_a_pacs_that_reads_no_more(pacs: Pacs) -> None:
    """The object is larger than what the system's buffers take: the writing thread stands still until its time is over."""
    large = image(rows=2000, columns=2000)
    entity = peer.ae("OSTEON", timeout_s=ENOUGH_S)
    entity.add_requested_context(DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian)
    with Wall(pacs.port, to_server=20000) as wall, ends_soon():
        association = peer.associated(entity, destination(wall.port, timeout_s=ENOUGH_S))
        assert association.is_established
        assert not association.send_c_store(read(part10(large))).get("Status")
    assert not association.is_established
    assert pacs.received == []


def test_a_query_that_is_not_answered_is_left_and_the_result_sent(pacs: Pacs) -> None:
    pacs.delay_s = 2.0
    with ends_soon(), pytest.raises(PeerAway):  # the C-STORE is as slow
        deliver(destination(pacs.port))


@pytest.mark.parametrize("pause_s", [0.0, 0.3], ids=["quick", "slow"])
def test_a_query_whose_answers_never_end(pacs: Pacs, monkeypatch: pytest.MonkeyPatch, pause_s: float) -> None:
    """Each answer comes in time, and each names the right study."""
    monkeypatch.setattr(delivery, "ANSWERS_READ_MAX", 50)
    monkeypatch.setattr(delivery, "QUERY_TIMEOUTS", 1)
    original = image(modality="CR")

    def find(event: Any) -> Iterator[tuple[int, Dataset]]:
        while event.assoc.is_established:
            sleep(pause_s)
            answer = Dataset()
            answer.QueryRetrieveLevel = "STUDY"
            answer.StudyInstanceUID, answer.PatientID = original.StudyInstanceUID, original.PatientID
            yield 0xFF00, answer

    pacs._on_find = find  # type: ignore[assignment, method-assign]
    pacs.stop()
    pacs.start()
    with ends_soon():
        assert deliver(destination(pacs.port, timeout_s=ENOUGH_S)).patient_check is delivery.PatientCheck.UNSAID


def test_a_release_that_is_not_answered(pacs: Pacs) -> None:
    entity = peer.ae("OSTEON", timeout_s=ENOUGH_S)
    entity.add_requested_context(DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian)
    with Wall(pacs.port) as wall, ends_soon():
        association = peer.associated(entity, destination(wall.port, timeout_s=ENOUGH_S))
        wall.stop()
        association.release()


def test_a_connection_that_nobody_accepts() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        with ends_soon(), pytest.raises(PeerAway, match="no association"):
            deliver(destination(full.getsockname()[1]))
        for one in waiting:
            one.close()


def test_a_handshake_that_is_not_answered(tmp_path: Path) -> None:
    from certificates import Authority

    ca = str(Authority(tmp_path / "ca").certificate)
    with socket.create_server(("127.0.0.1", 0)) as silent, ends_soon():
        to = destination(silent.getsockname()[1], tls=True, tls_ca=ca)
        with pytest.raises(PeerAway, match="handshake was not finished in time"):
            deliver(to)
        with pytest.raises(PeerAway, match="handshake was not finished in time"):
            peer.certificate_ends(to)


def test_a_name_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def look_up(*asked: Any, **also: Any) -> list[Any]:
        go_on.wait(30)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    to = Destination(name="main", ae_title="PACS", host="pacs.example", port=104, timeout_s=TIMEOUT_S)
    with ends_soon(), pytest.raises(PeerAway, match=r"no name server said the address of pacs\.example"):
        deliver(to)
    go_on.set()


def test_a_host_that_nobody_knows_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*asked: Any, **also: Any) -> list[Any]:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(PeerAway, match="spelt right"):
        deliver(Destination(name="main", ae_title="PACS", host="pacs.example", port=104))
