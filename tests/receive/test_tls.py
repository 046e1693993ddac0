"""The door over TLS: who gets through, in which version, with which certificate; and who stalls hinders nobody."""

from __future__ import annotations

import logging
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import shared
import studies
from certificates import Authority, Pair
from cryptography.hazmat.primitives.asymmetric import rsa
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import DigitalXRayImageStorageForPresentation, Verification

from node.errors import BadKey, BadSettings
from node.receive.association import WAITING, Listener, _Waiting
from node.settings import Caller, Node, Tls


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def sender(ca: Authority) -> Pair:
    return ca.issue("sender")


@pytest.fixture
def got() -> list[dict[str, Any]]:
    return []


Listen = Callable[..., Listener]


@pytest.fixture
def listen(ca: Authority, got: list[dict[str, Any]]) -> Iterator[Listen]:
    """Start a listener with TLS on a free port."""
    started: list[Listener] = []

    def start(caller: dict[str, Any] | None = None, node: dict[str, Any] | None = None, **tls: Any) -> Listener:
        mine = ca.folder / "osteon.pem"
        known = mine.exists() or mine.with_suffix(".key").exists()  # a test may have made, or spoilt, one
        own = Pair(mine, mine.with_suffix(".key")) if known else ca.issue("osteon")
        base = {"certificate": str(own.certificate), "key": str(own.key), "ca": str(ca.certificate), "port": 0}
        made = Node(
            ae_title="OSTEON",
            learn_ae_title="OSTEON_L",
            port=0,
            default_issuer="TEST",
            callers=[Caller(ae_title="SENDER", networks=["127.0.0.0/8"], **(caller or {}))],
            tls=Tls(**(base | tls)),
            **(node or {}),
        )
        listener = Listener(made, lambda raw, **told: got.append(told))
        listener.start()
        started.append(listener)
        return listener

    yield start
    for listener in started:
        listener.stop(grace_s=2)


def secured(ca: Authority, own: Pair | None, *, highest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca.certificate))
    context.maximum_version = highest
    if own:
        context.load_cert_chain(own.certificate, own.key)
    return context


def associate(port: int, context: ssl.SSLContext | None, *, calling: str = "SENDER", identity: Sequence[Any] = ()) -> Association:
    entity = AE(calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = 8
    for uid in (DigitalXRayImageStorageForPresentation, Verification):
        entity.add_requested_context(uid, ExplicitVRLittleEndian)
    tls_args = (context, "localhost") if context else None
    return entity.associate("127.0.0.1", port, ae_title="OSTEON", tls_args=tls_args, ext_neg=list(identity))


def echo(port: int, context: ssl.SSLContext | None, *, calling: str = "SENDER") -> int:
    association = associate(port, context, calling=calling)
    try:
        return int(association.send_c_echo().Status)
    finally:
        association.release()


# --- dcmtk -------------------------------------------------------------------------------------------------------------------


def dcmtk(tool: str, port: int, *options: str | Path, file: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [shared.tool(tool), "-aet", "SENDER", "-aec", "OSTEON", *map(str, options), "localhost", str(port)]
    return subprocess.run([*command, *([str(file)] if file else [])], capture_output=True, text=True, timeout=60)


def with_tls(own: Pair, ca: Authority) -> tuple[str | Path, ...]:
    return ("+tls", own.key, own.certificate, "+cf", ca.certificate)


@pytest.mark.parametrize("profile", ["+py", "+px", "+pz"])
def test_storescu_sends_over_tls_in_every_profile_of_bcp_195(
    listen: Listen, ca: Authority, sender: Pair, got: list[dict[str, Any]], tmp_path: Path, profile: str
) -> None:
    file = tmp_path / "image.dcm"
    file.write_bytes(studies.part10(studies.image()))
    sent = dcmtk("storescu", listen().tls_port, *with_tls(sender, ca), profile, file=file)
    assert sent.returncode == 0, sent.stderr
    assert [told["calling_ae"] for told in got] == ["SENDER"]


def test_echoscu_is_answered_over_tls_and_refused_in_clear(listen: Listen, ca: Authority, sender: Pair) -> None:
    port = listen().tls_port
    assert dcmtk("echoscu", port, *with_tls(sender, ca)).returncode == 0
    assert dcmtk("echoscu", port).returncode != 0


# --- versions, ciphers, certificates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_versions_of_tls_carry_a_study(
    listen: Listen, ca: Authority, sender: Pair, got: list[dict[str, Any]], version: ssl.TLSVersion
) -> None:
    association = associate(listen().tls_port, secured(ca, sender, highest=version))
    assert association.dul.socket.socket.version() == version.name.replace("_", ".")
    assert association.send_c_store(studies.image(rows=600, columns=600)).Status == 0x0000
    association.release()
    assert len(got) == 1


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_older_versions_are_refused(listen: Listen, ca: Authority, sender: Pair, failures: Failures, version: str) -> None:
    context = secured(ca, sender, highest=getattr(ssl.TLSVersion, version))
    context.minimum_version = getattr(ssl.TLSVersion, version)
    context.set_ciphers("ALL:@SECLEVEL=0")
    assert_refused(listen().tls_port, context)
    assert failures(1) == ["no TLS version in common; 1.2 or 1.3 is needed"]


def test_tls_1_2_is_refused_where_1_3_is_the_least(listen: Listen, ca: Authority, sender: Pair) -> None:
    port = listen(min_version="1.3").tls_port
    assert_refused(port, secured(ca, sender, highest=ssl.TLSVersion.TLSv1_2))
    assert echo(port, secured(ca, sender)) == 0x0000


@pytest.mark.parametrize(
    "ciphers", ["ECDHE-ECDSA-AES128-SHA256", "ECDHE-RSA-AES256-SHA", "AES256-GCM-SHA384", "DHE-RSA-AES128-GCM-SHA256"]
)
def test_ciphers_without_authentication_or_forward_secrecy_are_refused(
    listen: Listen, ca: Authority, sender: Pair, failures: Failures, ciphers: str
) -> None:
    if "ECDSA" not in ciphers:
        ca.issue("osteon", key=rsa.generate_private_key(65537, 2048))
    context = secured(ca, sender, highest=ssl.TLSVersion.TLSv1_2)
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    assert_refused(listen().tls_port, context)
    assert failures(1) == ["no cipher suite in common; ECDHE with AES-GCM or ChaCha20 is needed"]


def test_who_cannot_prove_himself_is_refused_with_one_line_that_says_why(
    listen: Listen, ca: Authority, tmp_path: Path, failures: Failures, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Authority(tmp_path / "other", "SECRET-CA")
    port = listen().tls_port
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 - weak on purpose
    for number, (own, why) in enumerate(
        [
            (None, "the other side presented no certificate"),
            (stranger.issue("SECRET-NAME"), "signed by an authority that is not in ca"),
            (ca.issue("expired", days=-2), "the certificate has expired"),
            (ca.issue("early", since=-1, days=90), "not valid yet"),
            (ca.issue("weak", key=weak), "too small"),
            (ca.issue("listener", calls=False), "not made for this use"),
        ],
        start=1,
    ):
        context = secured(ca, None)
        context.set_ciphers("ALL:@SECLEVEL=0")
        if own:
            context.load_cert_chain(own.certificate, own.key)
        assert_refused(port, context)
        assert why in failures(number)[-1]
    assert len(failures(6)) == 6
    assert "SECRET" not in caplog.text + str([vars(record) for record in caplog.records])


def test_a_revoked_certificate_is_refused(listen: Listen, ca: Authority, sender: Pair, failures: Failures) -> None:
    lost = ca.issue("lost")
    port = listen(crl=str(ca.revoke(lost))).tls_port
    assert_refused(port, secured(ca, lost))
    assert failures(1) == ["the certificate is revoked"]
    assert echo(port, secured(ca, sender)) == 0x0000


def test_callers_without_a_certificate_are_taken_where_the_site_says_so(listen: Listen, ca: Authority) -> None:
    assert echo(listen(require_client_certificate=False, ca="").tls_port, secured(ca, None)) == 0x0000


# --- which certificate goes with which title ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sender", "SENDER", "127.0.0.1", "fingerprint", "FINGERPRINT"])
def test_a_caller_with_its_own_certificate_is_admitted(listen: Listen, ca: Authority, sender: Pair, name: str) -> None:
    given = {"fingerprint": sender.fingerprint, "FINGERPRINT": _with_colons(sender.fingerprint)}.get(name, name)
    assert echo(listen({"certificate_names": [given]}).tls_port, secured(ca, sender)) == 0x0000


def test_another_machine_of_the_hospital_cannot_call_itself_so(listen: Listen, ca: Authority, sender: Pair, lines: Lines) -> None:
    impostor = ca.issue(sender.fingerprint[:64], names=False)  # a name is no fingerprint, and no name of theirs
    listener = listen({"certificate_names": [sender.fingerprint, "pacs.example"]}, keep_plain_port=True)
    for port, context in ((listener.tls_port, secured(ca, impostor)), (listener.port, None)):
        answer = associate(port, context).acceptor.primitive
        assert (answer.result, answer.result_source, answer.diagnostic) == (1, 1, 3)
    wait_for(lambda: len(lines()) == 2)
    secure, plain = lines()
    assert secure["certificate"] == impostor.fingerprint
    assert "certificate" not in plain
    assert secure["reason"] == "the certificate is not one of this calling AE title"


def _with_colons(fingerprint: str) -> str:
    digits = fingerprint.removeprefix("sha256:").upper()
    return "sha256:" + ":".join(digits[at : at + 2] for at in range(0, 64, 2))


# --- ports -------------------------------------------------------------------------------------------------------------------


def test_with_tls_the_plain_port_is_closed_unless_it_is_kept(listen: Listen, ca: Authority, sender: Pair) -> None:
    assert listen().port == 0
    both = listen(keep_plain_port=True)
    assert echo(both.port, None) == 0x0000
    assert echo(both.tls_port, secured(ca, sender)) == 0x0000


def test_plain_dicom_on_the_tls_port_is_refused_at_once(listen: Listen, failures: Failures) -> None:
    began = monotonic()
    assert not associate(listen().tls_port, None).is_established
    assert monotonic() - began < 3
    assert "plain DICOM on a TLS port" in failures(1)[0]


def test_tls_on_the_plain_port_is_said(listen: Listen, ca: Authority, sender: Pair, lines: Lines) -> None:
    port = listen(keep_plain_port=True).port
    assert_refused(port, secured(ca, sender))
    wait_for(lambda: any(line.get("reason") == "TLS on the plain port" for line in lines()))


# --- who stalls hinders nobody -----------------------------------------------------------------------------------------------


def half_a_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()[:100]


@pytest.mark.parametrize(("how_many", "within_s"), [(20, 1.0), pytest.param(200, 5.0, marks=pytest.mark.long)])
@pytest.mark.parametrize("secure", [True, False], ids=["tls", "plain"])
@pytest.mark.parametrize("said", ["nothing", "half a hello"])
def test_stalled_connections_do_not_delay_a_good_association(
    listen: Listen, ca: Authority, sender: Pair, how_many: int, within_s: float, secure: bool, said: str
) -> None:
    listener = listen(keep_plain_port=True)
    port = listener.tls_port if secure else listener.port
    context = secured(ca, sender) if secure else None
    undisturbed = _seconds(lambda: echo(port, context))
    stalled = []
    hello = b"" if said == "nothing" else half_a_hello() if secure else b"\x01\x00\x00\x00\x00\xcd\x00\x01"
    try:
        for _ in range(how_many):
            stalled.append(socket.create_connection(("127.0.0.1", port), timeout=5))
            stalled[-1].sendall(hello)
        assert _seconds(lambda: echo(port, context)) - undisturbed < within_s
    finally:
        for connection in stalled:
            connection.close()


def _seconds(act: Callable[[], int]) -> float:
    """Say how long a successful C-ECHO took, association and all."""
    began = monotonic()
    assert act() == 0x0000
    return monotonic() - began


def test_peers_that_shook_hands_and_then_say_nothing_make_room(listen: Listen, ca: Authority, sender: Pair) -> None:
    port, context = listen().tls_port, secured(ca, sender)
    silent = [context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="localhost") for _ in range(40)]
    assert echo(port, context) == 0x0000
    silent[0].settimeout(5)
    assert silent[0].recv(1) == b""  # the oldest were hung up on, ...
    silent[-1].settimeout(0.2)
    with pytest.raises(TimeoutError):  # ... the newest not yet
        silent[-1].recv(1)
    for connection in silent:
        connection.close()


def test_an_address_that_crowds_the_door_makes_room_for_the_others() -> None:
    waiting = _Waiting()
    pairs = {(address, number): socket.socketpair() for address in "abcde" for number in range(30)}
    quiet = socket.socketpair()
    waiting.enter(quiet[0], "quiet")
    for (address, _), (ours, _) in pairs.items():
        waiting.enter(ours, address)

    def hung_up(pair: tuple[socket.socket, socket.socket]) -> bool:
        pair[1].setblocking(False)
        try:
            return pair[1].recv(1) == b""
        except BlockingIOError:
            return False

    gone = [key for key, pair in pairs.items() if hung_up(pair)]
    assert len(gone) == 151 - WAITING
    assert not hung_up(quiet)
    assert all(number < 15 for _, number in gone)  # the oldest of each
    for pair in (quiet, *pairs.values()):
        pair[0].close()
        pair[1].close()


def test_a_stalled_handshake_is_ended_in_time(listen: Listen, failures: Failures) -> None:
    port = listen(node={"idle_timeout_s": 0.5}).tls_port
    for said in (b"", half_a_hello()):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(said)
            while connection.recv(1000):
                pass
    assert failures(1) == ["the handshake was not finished in time"]


def test_who_only_looks_whether_the_port_is_open_leaves_no_line(listen: Listen, lines: Lines) -> None:
    listener = listen(keep_plain_port=True)
    for port in (listener.tls_port, listener.port):
        socket.create_connection(("127.0.0.1", port)).close()
    wait_for(lambda: len(lines()) == 2)
    assert {(line["level"], line["event"]) for line in lines()} == {("DEBUG", "connection closed without a request")}


def test_the_same_trouble_from_the_same_address_is_said_once_a_minute(
    listen: Listen, failures: Failures, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = listen().tls_port
    for _ in range(5):
        associate(port, None)
    assert len(failures(1)) == 1
    monkeypatch.setattr("node.receive.association.SAY_AGAIN_S", 0.0)
    associate(port, None)
    assert len(failures(2)) == 2
    assert [line["times"] for line in lines() if "times" in line] == [1, 5]


# --- certificates that change, and files that are wrong ------------------------------------------------------------------------


def test_a_renewed_certificate_is_presented_without_a_restart(listen: Listen, ca: Authority, sender: Pair, lines: Lines) -> None:
    listener = listen()
    context = secured(ca, sender)
    old = presented(listener.tls_port, context)
    (ca.folder / "osteon.key").write_bytes(b"half a copy")
    listener.renew()
    assert presented(listener.tls_port, context) == old
    renewed = ca.issue("osteon")
    listener.renew()
    listener.renew()
    assert presented(listener.tls_port, context) == renewed.fingerprint != old
    told = [line for line in lines() if line["event"].startswith("certificate")]
    assert [line["event"] for line in told] == ["certificate not renewed", "certificate renewed"]
    assert str(renewed.key) in told[0]["reason"]


def _encrypted(pair: Pair) -> None:
    subprocess.run(
        [shared.tool("openssl"), "pkey", "-in", pair.key, "-aes256", "-passout", "pass:secret", "-out", f"{pair.key}.new"],
        check=True,
    )
    Path(f"{pair.key}.new").rename(pair.key)
    pair.key.chmod(0o600)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda pair: pair.key.chmod(0o640), "osteon.key.*mode 0640.*chmod 600"),
        (lambda pair: pair.key.unlink(), "osteon.key.*cannot be read .No such file"),
        (lambda pair: pair.key.write_text("no key"), "osteon.key.*no private key in PEM"),
        (_encrypted, "osteon.key.*passphrase"),
        (lambda pair: pair.certificate.unlink(), "osteon.pem.*cannot be read .No such file"),
        (lambda pair: pair.certificate.write_text("no certificate"), "osteon.pem.*no certificate in PEM"),
        (lambda pair: pair.key.write_bytes(Authority(pair.key.parent / "x").issue("y").key.read_bytes()), "does not belong to"),
        (lambda pair: (pair.key.parent / "ca.pem").write_text(""), "ca.pem.*no certificate in PEM"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(listen: Listen, ca: Authority, spoil: Callable[[Pair], object], says: str) -> None:
    spoil(ca.issue("osteon"))
    with pytest.raises((BadSettings, BadKey), match=says):
        listen()


def test_a_certificate_with_a_weak_key_is_refused(listen: Listen, ca: Authority) -> None:
    ca.issue("osteon", key=rsa.generate_private_key(65537, 1024))  # noqa: S505 - weak on purpose
    with pytest.raises(BadSettings, match="too small"):
        listen()


# --- how many, and as whom ---------------------------------------------------------------------------------------------------


def test_one_caller_cannot_take_every_association(lines: Lines) -> None:
    callers = [Caller(ae_title=name, networks=["127.0.0.1"], max_associations=2) for name in ("GREEDY", "OTHER")]
    node = Node(ae_title="OSTEON", learn_ae_title="L", port=0, default_issuer="T", callers=callers, max_associations=3)
    listener = Listener(node, lambda raw, **told: None)
    listener.start()
    try:
        held = [associate(listener.port, None, calling="GREEDY") for _ in range(2)]
        third = associate(listener.port, None, calling="GREEDY").acceptor.primitive
        assert (third.result, third.result_source, third.diagnostic) == (2, 3, 2)
        (rejected,) = [line for line in lines() if line["event"] == "association rejected"]
        assert rejected["reason"] == "local limit exceeded: max_associations of this caller"
        assert echo(listener.port, None, calling="OTHER") == 0x0000
        for association in held:
            association.release()
        wait_for(lambda: (again := associate(listener.port, None, calling="GREEDY")).is_established and not again.release())
    finally:
        listener.stop(grace_s=1)


@pytest.fixture
def passcode(tmp_path: Path) -> str:
    file = tmp_path / "passcode"
    file.touch(0o600)
    file.write_text("SECRET-WORD\n")
    return str(file)


def test_a_caller_that_must_name_its_user_is_admitted_with_the_right_passcode_alone(
    listen: Listen, ca: Authority, sender: Pair, passcode: str, tmp_path: Path, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "image.dcm"
    file.write_bytes(studies.part10(studies.image()))
    listener = listen({"username": "pacs", "passcode": passcode}, keep_plain_port=True)

    def sent(port: int, *user: str) -> bool:
        options = with_tls(sender, ca) if port == listener.tls_port else ()
        return dcmtk("storescu", port, *options, *user, file=file).returncode == 0

    assert sent(listener.tls_port, "-usr", "pacs", "-pwd", "SECRET-WORD", "-rsp")
    assert not sent(listener.tls_port, "-usr", "pacs", "-pwd", "SECRET-GUESS")
    assert not sent(listener.tls_port, "-usr", "pacs")
    assert not sent(listener.tls_port, "-usr", "other", "-pwd", "SECRET-WORD")
    assert not sent(listener.tls_port)
    assert not sent(listener.port, "-usr", "pacs", "-pwd", "SECRET-WORD")  # in clear, right or not
    assert [line["reason"] for line in lines() if line["event"] == "association rejected"] == [
        "user identity missing or wrong"
    ] * 5
    assert "SECRET" not in caplog.text + str([vars(record) for record in caplog.records])


def test_a_passcode_in_clear_must_be_asked_for(listen: Listen, passcode: str, tmp_path: Path) -> None:
    file = tmp_path / "image.dcm"
    file.write_bytes(studies.part10(studies.image()))
    caller = {"username": "pacs", "passcode": passcode, "passcode_in_clear": True}
    port = listen(caller, keep_plain_port=True).port
    assert dcmtk("storescu", port, "-usr", "pacs", "-pwd", "SECRET-WORD", file=file).returncode == 0


def test_a_passcode_that_others_can_read_is_refused(listen: Listen, passcode: str) -> None:
    Path(passcode).chmod(0o644)
    with pytest.raises(BadKey, match=r"passcode is readable by others .* `chmod 600`"):
        listen({"username": "pacs", "passcode": passcode})


# --- hand-made peers ---------------------------------------------------------------------------------------------------------

Failures = Callable[[int], list[str]]
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Give the fields of the node's log lines, with `event` and `level`."""
    with caplog.at_level(logging.DEBUG, "osteon.receive"):
        yield lambda: [
            {"event": record.getMessage(), "level": record.levelname, **record.osteon_fields}  # type: ignore[attr-defined]
            for record in list(caplog.records)
            if record.name == "osteon.receive"
        ]


@pytest.fixture
def failures(lines: Lines) -> Failures:
    """Wait for so many lines of failed handshakes, and give the reasons of all."""

    def reasons(how_many: int) -> list[str]:
        def found() -> list[str]:
            return [line["reason"] for line in lines() if line["event"] == "TLS handshake failed"]

        wait_for(lambda: len(found()) >= how_many)
        return found()

    return reasons


def wait_for(condition: Callable[[], object], *, seconds: float = 6.0) -> None:
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it did not happen in time"
        sleep(0.01)


def assert_refused(port: int, context: ssl.SSLContext) -> None:
    """Shake hands, and wait for the end; with TLS 1.3 a caller learns only then that its certificate was refused."""
    with socket.create_connection(("127.0.0.1", port), timeout=8) as connection:
        try:
            with context.wrap_socket(connection, server_hostname="localhost") as secure:
                assert secure.recv(1) == b""
        except OSError as error:
            assert not isinstance(error, TimeoutError), "not refused at once"  # noqa: PT017


def presented(port: int, context: ssl.SSLContext) -> str:
    from hashlib import sha256

    with (
        socket.create_connection(("127.0.0.1", port), timeout=8) as connection,
        context.wrap_socket(connection, server_hostname="localhost") as secure,
    ):
        return f"sha256:{sha256(secure.getpeercert(binary_form=True) or b'').hexdigest()}"
