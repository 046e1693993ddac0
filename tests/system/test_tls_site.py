"""A site with TLS, as its operator sees it: settings, `osteon check`, and a study on its way in and out through dcmtk."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import shared
import studies
from certificates import DAY, NOW, Authority, Pair
from pydicom import dcmread
from pynetdicom import AE
from pynetdicom.sop_class import Verification
from roles import running, until
from tiny_model import promote_tiny

from node.commands.check import Finding, Verdict, findings
from node.commands.init import init_site
from node.errors import BadSettings
from node.settings import load


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def site_of(folder: Path, authority: Authority, own: Pair, *, pacs: dict[str, Any] | None = None, **tls: Any) -> Path:
    """Write a site that listens on TLS alone, and sends to `pacs` over TLS as its own certificate."""
    base = {"certificate": str(own.certificate), "key": str(own.key), "ca": str(authority.certificate), "port": 0}
    destination = {"name": "main", "ae_title": "PACS", "host": "localhost", "port": 1, "timeout_s": 3.0, "tls": True}
    sections: dict[str, Any] = {
        "node": {"port": 0, "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "certificate_names": ["sender"]}]},
        "node.tls": base | tls,
        "pacs": [destination | (pacs or {})],
        "completion": {"quiet_s": 0.2},
    }
    return init_site(folder, **sections)


def test_a_study_comes_and_its_result_leaves_over_mutual_tls(tmp_path: Path, ca: Authority, free_port: Callable[[], int]) -> None:
    """The whole way with dcmtk at both ends; nothing is answered in clear."""
    port, sender, theirs, folder = free_port(), ca.issue("sender"), ca.issue("pacs"), tmp_path / "pacs"
    config = site_of(tmp_path / "site", ca, ca.issue("osteon"), pacs={"port": port})
    promote_tiny(load(config).storage.root / "models")
    file = tmp_path / "image.dcm"
    file.write_bytes(studies.part10(studies.image(modality="CR")))
    folder.mkdir()
    command = [shared.tool("storescp"), "-aet", "PACS", "-od", str(folder), "+tls", str(theirs.key), str(theirs.certificate)]
    command += ["+cf", str(ca.certificate), str(port)]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as storescp,
        running("receive", config=config) as receive,
        running("reply", config=config),
    ):
        try:
            listening = receive.event("listening")
            assert "port" not in listening
            send = [shared.tool("storescu"), "-aet", "SENDER", "-aec", "OSTEON", "+tls", str(sender.key), str(sender.certificate)]
            send += ["+cf", str(ca.certificate), "localhost", str(listening["tls_port"]), str(file)]
            sent = subprocess.run(send, capture_output=True, text=True, timeout=60)
            assert sent.returncode == 0, sent.stderr
            (report,) = until(lambda: list(folder.glob("SR*")), seconds=60)
            status = [sys.executable, "-m", "node", "status", "--config", str(config)]
            told = subprocess.run(status, capture_output=True, text=True, timeout=60).stdout
        finally:
            storescp.terminate()
    assert dcmread(report).StudyInstanceUID == dcmread(file).StudyInstanceUID
    assert "Osteon OSTEON on 127.0.0.1:0 (TLS)" in told
    assert f"tls_port: {listening['tls_port']}, certificate_until: {NOW + 90 * DAY:%Y-%m-%d}" in told


@contextmanager
def pacs_over_tls(own: Pair) -> Iterator[int]:
    """Run a PACS that answers C-ECHO over TLS, for the length of a block; give its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own.certificate, own.key)
    entity = AE("PACS")
    entity.add_supported_context(Verification)
    server = entity.start_server(("127.0.0.1", 0), block=False, ssl_context=context)
    assert server is not None
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()


# --- osteon check ------------------------------------------------------------------------------------------------------------


def checked(config: Path) -> list[Finding]:
    return [found for found in findings(load(config)) if found.what in ("tls", "pacs", "passcode", "peers", "callers")]


def said(config: Path, verdict: Verdict) -> str:
    return "\n".join(found.told for found in checked(config) if found.verdict is verdict)


def test_check_is_content_with_certificates_that_last(tmp_path: Path, ca: Authority) -> None:
    own = ca.issue("osteon")
    with pacs_over_tls(ca.issue("pacs")) as port:
        config = site_of(tmp_path / "site", ca, own, pacs={"port": port})
        found = checked(config)
    assert {one.verdict for one in found} == {Verdict.OK}
    told = "\n".join(one.told for one in found)
    assert f"{own.certificate}: fits its key, TLS 1.2 or newer on port 0; valid until" in told
    assert "(90 days)" in told
    assert "its certificate; valid until" in told
    assert "answers C-ECHO over TLS" in told


def test_check_warns_of_certificates_that_end_soon_and_fails_those_that_ended(tmp_path: Path, ca: Authority) -> None:
    with pacs_over_tls(ca.issue("pacs", days=12)) as port:
        config = site_of(tmp_path / "site", ca, ca.issue("osteon", days=29), pacs={"port": port})
        warned = said(config, Verdict.WARN)
        assert "osteon.pem: fits its key" in warned
        assert "its certificate; valid until" in warned
        ca.issue("osteon", days=-1)
        assert "EXPIRED" in said(config, Verdict.FAIL)
    with pacs_over_tls(ca.issue("pacs", days=-1)) as port:
        config = site_of(tmp_path / "other", ca, ca.issue("osteon"), pacs={"port": port})
        assert "the certificate has expired" in said(config, Verdict.FAIL)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda own, ca: own.key.chmod(0o644), "osteon.key: the private key is readable by others"),
        (lambda own, ca: own.key.write_bytes(ca.issue("y").key.read_bytes()), "does not belong to"),
        (lambda own, ca: own.certificate.unlink(), "osteon.pem: cannot be read (No such file"),
    ],
)
def test_check_names_the_file_that_is_wrong(
    tmp_path: Path, ca: Authority, spoil: Callable[[Pair, Authority], object], says: str
) -> None:
    own = ca.issue("osteon")
    config = site_of(tmp_path / "site", ca, own)
    spoil(own, ca)
    assert says in said(config, Verdict.FAIL)


def test_check_warns_of_what_is_left_open(tmp_path: Path, ca: Authority) -> None:
    strange = Authority(tmp_path / "other", "other").issue("osteon")
    late = ca.revoke(next_update=NOW + DAY)
    more = {"require_client_certificate": False, "keep_plain_port": True, "crl": str(late)}
    config = site_of(tmp_path / "site", ca, strange, **more)
    config.write_text(config.read_text().replace('certificate_names = ["sender"]', "certificate_names = []"))
    warned = said(config, Verdict.WARN)
    assert "callers need its own authority" in warned
    assert "callers need no certificate" in warned
    assert "SENDER: any certificate of" in warned
    assert "plain DICOM is still taken" in warned
    assert "the revocation list; valid until" in warned


def test_check_warns_of_a_network_that_reads_along(tmp_path: Path) -> None:
    callers = [{"ae_title": "SENDER", "networks": ["10.0.0.0/8"]}]
    pacs = [{"name": "main", "ae_title": "PACS", "host": "pacs.invalid", "port": 104, "timeout_s": 1.0}]
    warned = said(init_site(tmp_path / "site", node={"host": "192.0.2.1", "callers": callers}, pacs=pacs), Verdict.WARN)
    assert "reads along" in warned
    assert "leave without TLS" in warned


def test_check_warns_of_a_caller_that_leaves_nothing_to_the_others(tmp_path: Path) -> None:
    callers = [{"ae_title": name, "networks": ["127.0.0.1"], "max_associations": most} for name, most in (("A", 4), ("B", 3))]
    warned = said(init_site(tmp_path / "site", node={"callers": callers, "max_associations": 4}), Verdict.WARN)
    assert "A can take all 4 associations" in warned
    assert "B can" not in warned


def test_check_names_a_passcode_that_cannot_be_used(tmp_path: Path) -> None:
    callers = [{"ae_title": "A", "networks": ["127.0.0.1"], "username": "a", "passcode": "none", "passcode_in_clear": True}]
    failed = said(init_site(tmp_path / "site", node={"callers": callers}), Verdict.FAIL)
    assert "the passcode cannot be read (No such file or directory)" in failed


# --- settings ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"key": ""}, "certificate and key belong together"),
        ({"ca": ""}, "require_client_certificate needs ca"),
        ({"ca": "", "require_client_certificate": False}, "certificate_names needs"),
        ({"min_version": "1.1"}, "'1.2' or '1.3'"),
        ({"certificate": "", "key": ""}, "certificate_names needs"),
    ],
)
def test_settings_that_would_not_keep_what_they_promise_are_refused(
    tmp_path: Path, ca: Authority, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadSettings, match=says):
        site_of(tmp_path / "site", ca, ca.issue("osteon"), **change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tls_key": "a"}, "tls_certificate and tls_key belong together"),
        ({"tls": False, "tls_name": "pacs"}, "need tls = true"),
        ({"tls": False, "username": "u", "passcode": "p"}, "passcode needs tls = true"),
        ({"passcode": "p"}, "passcode needs username"),
    ],
)
def test_a_destination_that_would_not_keep_what_it_promises_is_refused(
    tmp_path: Path, ca: Authority, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadSettings, match=says):
        site_of(tmp_path / "site", ca, ca.issue("osteon"), pacs=change)


@pytest.mark.parametrize(
    ("caller", "says"),
    [
        ({"passcode": "p"}, "passcode needs username"),
        ({"username": "u", "passcode": "p"}, r"passcode needs \[node.tls\]"),
        ({"certificate_names": ["sha256:12"]}, "64 hexadecimal digits"),
    ],
)
def test_a_caller_that_no_port_would_admit_is_refused(tmp_path: Path, caller: dict[str, Any], says: str) -> None:
    with pytest.raises(BadSettings, match=says):
        init_site(tmp_path / "site", node={"callers": [{"ae_title": "SENDER", "networks": ["127.0.0.1"], **caller}]})


def test_files_are_found_from_the_folder_of_the_settings_and_a_pacs_falls_back_on_the_nodes_own(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "node": {"callers": [{"ae_title": "A", "networks": ["127.0.0.1"], "username": "u", "passcode": "keys/a"}]},
        "node.tls": {"certificate": "tls/own.pem", "key": "tls/own.key", "ca": "tls/ca.pem"},
        "pacs": [
            {"name": "a", "ae_title": "A", "host": "a", "port": 104, "tls": True},
            {"name": "b", "ae_title": "B", "host": "b", "port": 104, "tls": True, "tls_ca": "b.pem"},
            {"name": "c", "ae_title": "C", "host": "c", "port": 104},
        ],
    }
    settings = load(init_site(tmp_path, **sections))
    assert settings.node.tls.certificate == str(tmp_path / "tls" / "own.pem")
    assert settings.node.callers[0].passcode == str(tmp_path / "keys" / "a")
    first, second, plain = settings.pacs
    assert (first.tls_ca, first.tls_key) == (str(tmp_path / "tls" / "ca.pem"), str(tmp_path / "tls" / "own.key"))
    assert (second.tls_ca, second.tls_certificate) == (str(tmp_path / "b.pem"), str(tmp_path / "tls" / "own.pem"))
    assert (plain.tls_ca, plain.tls_certificate) == ("", "")
