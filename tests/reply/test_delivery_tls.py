"""Delivery over TLS: to dcmtk's storescp with mutual TLS, and to PACS whose certificates should not be trusted."""

from __future__ import annotations

import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import answers
import pytest
import shared
from certificates import DAY, NOW, Authority, Pair
from pydicom.uid import Comprehensive3DSRStorage
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification
from studies import image, part10

from node import peer
from node.demo.orthanc import Orthanc
from node.errors import PeerAway
from node.receive.association import Listener
from node.reply import delivery
from node.settings import Caller, Node, Pacs, Tls


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def ours(ca: Authority) -> Pair:
    return ca.issue("osteon")


def destination(port: int, ca: Authority, own: Pair | None, **other: Any) -> Pacs:
    pair = {"tls_certificate": str(own.certificate), "tls_key": str(own.key)} if own else {}
    base = {"name": "main", "ae_title": "PACS", "host": "localhost", "port": port, "timeout_s": 5.0}
    return Pacs(**(base | {"tls": True, "tls_ca": str(ca.certificate)} | pair | other))  # type: ignore[arg-type]


def deliver(to: Pacs) -> delivery.Sent:
    original = part10(image(modality="CR"))
    return delivery.send(
        to,
        calling_ae="OSTEON",
        build=lambda sop_class: answers.document([original], sop_class_uid=sop_class),
        study=answers.study_identity(answers.identity(original)),
    )


# --- dcmtk -------------------------------------------------------------------------------------------------------------------


@contextmanager
def storescp(folder: Path, port: int, own: Pair, ca: Authority, *options: str) -> Iterator[Path]:
    """Run storescp, which listens on every address, for the length of a block."""
    folder.mkdir()
    command = [shared.tool("storescp"), "-aet", "PACS", "+B", "-od", str(folder), "+tls", str(own.key), str(own.certificate)]
    command += ["+cf", str(ca.certificate), *options, str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            yield folder
        finally:
            running.terminate()


def when_up(act: Callable[[], Any]) -> Any:
    deadline = monotonic() + 20
    while True:
        try:
            return act()
        except PeerAway as error:
            if monotonic() > deadline or "no association" not in str(error):
                raise
            sleep(0.1)


@pytest.mark.parametrize(("profile", "least"), [("+py", "1.2"), ("+pz", "1.2"), ("+py", "1.3")])
def test_storescp_takes_a_result_over_mutual_tls(
    tmp_path: Path, ca: Authority, ours: Pair, free_port: Callable[[], int], profile: str, least: str
) -> None:
    port = free_port()
    with storescp(tmp_path / "storescp", port, ca.issue("pacs"), ca, profile) as folder:
        to = destination(port, ca, ours, tls_min_version=least)
        when_up(lambda: peer.echo(to, "OSTEON"))
        sent = deliver(to)
        (file,) = folder.iterdir()
    built = answers.document([part10(image(modality="CR"))], sop_class_uid=sent.document.sop_class_uid)
    assert built.bytes[144:][-1000:] == file.read_bytes()[-1000:]


def test_storescp_refuses_us_without_a_certificate_or_with_one_it_does_not_know(
    tmp_path: Path, ca: Authority, free_port: Callable[[], int]
) -> None:
    port = free_port()
    with storescp(tmp_path / "storescp", port, ca.issue("pacs"), ca) as folder:
        with pytest.raises(PeerAway, match="wants a certificate from us"):
            when_up(lambda: deliver(destination(port, ca, None)))
        with pytest.raises(PeerAway, match="refuses our certificate"):
            deliver(destination(port, ca, Authority(tmp_path / "other").issue("osteon")))
        assert not list(folder.iterdir())


# --- Orthanc -----------------------------------------------------------------------------------------------------------------


@dataclass
class SecureOrthanc(Orthanc):
    """An Orthanc that listens and sends over mutual TLS alone."""

    own: Pair | None = None
    ca: Authority | None = None

    def _settings(self) -> dict[str, Any]:
        assert self.own is not None
        assert self.ca is not None
        return super()._settings() | {
            "DicomTlsEnabled": True,
            "DicomTlsCertificate": str(self.own.certificate),
            "DicomTlsPrivateKey": str(self.own.key),
            "DicomTlsTrustedCertificates": str(self.ca.certificate),
            "DicomTlsRemoteCertificateRequired": True,
            "DicomModalities": {
                title: {"AET": title, "Host": "127.0.0.1", "Port": port, "UseDicomTls": True}
                for title, port in self.callers.items()
            },
        }


def test_orthanc_takes_a_result_and_routes_to_us_over_mutual_tls(tmp_path: Path, ca: Authority, ours: Pair) -> None:
    shared.tool("Orthanc")
    got: list[dict[str, str]] = []
    tls = Tls(certificate=str(ours.certificate), key=str(ours.key), ca=str(ca.certificate), port=0)
    caller = Caller(ae_title="ORTHANC", networks=["127.0.0.1"], certificate_names=["orthanc"])
    node = Node(ae_title="OSTEON", learn_ae_title="L", port=0, default_issuer="T", callers=[caller], tls=tls)
    listener = Listener(node, lambda raw, **told: got.append(told))
    listener.start()
    try:
        with SecureOrthanc(tmp_path / "o", callers={"OSTEON": listener.tls_port}, own=ca.issue("orthanc"), ca=ca) as orthanc:
            to = destination(orthanc.port, ca, ours, ae_title="ORTHANC")
            assert deliver(to).patient_check is delivery.PatientCheck.NO_STUDY
            assert deliver(to).patient_check is delivery.PatientCheck.SAME
            with pytest.raises(PeerAway, match="no association"):
                deliver(destination(orthanc.port, ca, None, ae_title="ORTHANC", tls=False, tls_ca=""))
            (instance,) = orthanc.get("/instances")
            orthanc.post("/modalities/OSTEON/store", instance)
        assert [told["calling_ae"] for told in got] == ["ORTHANC"]
    finally:
        listener.stop(grace_s=2)


# --- whom we trust -----------------------------------------------------------------------------------------------------------


@contextmanager
def pacs(own: Pair, *, highest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> Iterator[int]:
    """Run a PACS over TLS that answers C-ECHO, for the length of a block; give its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = min(highest, ssl.TLSVersion.TLSv1_2)
    context.maximum_version = highest
    context.load_cert_chain(own.certificate, own.key)
    entity = AE("PACS")
    entity.add_supported_context(Verification)
    entity.add_supported_context(Comprehensive3DSRStorage)
    server = entity.start_server(("127.0.0.1", 0), block=False, ssl_context=context, evt_handlers=[(evt.EVT_C_ECHO, lambda e: 0)])
    assert server is not None
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()


def test_a_pacs_is_trusted_for_its_authority_its_name_and_its_date(tmp_path: Path, ca: Authority) -> None:
    good = ca.issue("pacs")
    with pacs(good) as port:
        peer.echo(destination(port, ca, None), "OSTEON")
        peer.echo(destination(port, ca, None, host="127.0.0.1"), "OSTEON")
        peer.echo(destination(port, ca, None, tls_crl=str(ca.revoke(ca.issue("other")))), "OSTEON")
        for wrong, why in (
            ({"tls_ca": str(Authority(tmp_path / "other").certificate)}, "signed by an authority that is not in ca"),
            ({"tls_name": "pacs.example"}, "for another name; set tls_name"),
            ({"tls_name": "10.0.0.1"}, "for another address; set tls_name"),
            ({"tls_crl": str(ca.revoke(good))}, "is revoked"),
            ({"tls_crl": str(ca.revoke(next_update=NOW - DAY / 2))}, "revocation list has expired"),
        ):
            with pytest.raises(PeerAway, match=why):
                peer.echo(destination(port, ca, None, **wrong), "OSTEON")
    with pacs(ca.issue("late", days=-2)) as port, pytest.raises(PeerAway, match="has expired"):
        peer.echo(destination(port, ca, None), "OSTEON")


def test_a_certificate_without_the_hosts_name_is_taken_under_the_name_it_bears(ca: Authority) -> None:
    with pacs(ca.issue("ARCHIVE 7", names=False)) as port:
        with pytest.raises(PeerAway, match="set tls_name"):
            peer.echo(destination(port, ca, None), "OSTEON")
        peer.echo(destination(port, ca, None, tls_name="ARCHIVE 7"), "OSTEON")


def test_a_pacs_that_signed_its_certificate_itself_is_trusted_when_that_is_the_ca(ca: Authority, ours: Pair) -> None:
    """The issuing authority, or the certificate itself, may stand alone in tls_ca."""
    with pacs(ours) as port:
        peer.echo(destination(port, ca, None, tls_ca=str(ours.certificate)), "OSTEON")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_a_pacs_with_an_old_tls_is_not_spoken_to(ca: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair = ca.issue("pacs")
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.load_cert_chain(pair.certificate, pair.key)
    with pacs_that(context.wrap_socket) as port, pytest.raises(PeerAway, match="no TLS version in common"):
        peer.echo(destination(port, ca, None), "OSTEON")


def test_a_pacs_that_speaks_no_tls_is_told_apart(ca: Authority) -> None:
    entity = AE("PACS")
    entity.add_supported_context(Verification)
    server = entity.start_server(("127.0.0.1", 0), block=False)
    assert server is not None
    with pytest.raises(PeerAway, match="plain DICOM on a TLS port"):
        peer.echo(destination(int(server.server_address[1]), ca, None), "OSTEON")
    server.shutdown()


@contextmanager
def pacs_that(wrap: Callable[..., Any]) -> Iterator[int]:
    """Accept one connection and do `wrap` with it as its server."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def once() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    wrap(connection, server_side=True).close()

        thread = threading.Thread(target=once)
        thread.start()
        yield listener.getsockname()[1]
        listener.close()
        thread.join(10)


@pytest.mark.parametrize("spoil", [lambda pair: pair.key.chmod(0o644), lambda pair: pair.certificate.unlink()])
def test_files_that_cannot_be_used_now_are_named_and_the_result_stays_due(
    ca: Authority, ours: Pair, spoil: Callable[[Pair], object]
) -> None:
    spoil(ours)
    with pytest.raises(PeerAway, match="osteon"):
        deliver(destination(104, ca, ours))


# --- as whom we come ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("passcode", "kind"), [(True, 2), (False, 1)])
def test_our_user_is_named_to_a_pacs_that_asks_for_one(tmp_path: Path, passcode: bool, kind: int) -> None:
    secret = tmp_path / "passcode"
    secret.touch(0o600)
    secret.write_text("SECRET-WORD\n")
    named: list[tuple[int, bytes, bytes | None]] = []

    def on_user(event: evt.Event) -> tuple[bool, None]:
        named.append((event.user_id_type, event.primary_field, event.secondary_field))
        return True, None

    entity = AE("PACS")
    entity.add_supported_context(Verification)
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_USER_ID, on_user)])
    assert server is not None
    to = Pacs(
        name="main",
        ae_title="PACS",
        host="127.0.0.1",
        port=int(server.server_address[1]),
        username="osteon",
        passcode=str(secret) if passcode else "",
        passcode_in_clear=passcode,
    )
    peer.echo(to, "OSTEON")
    server.shutdown()
    assert [(number, user, word or None) for number, user, word in named] == [
        (kind, b"osteon", b"SECRET-WORD" if passcode else None)
    ]
