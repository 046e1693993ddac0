"""TLS as the settings ask for it: contexts of one profile, what a certificate bears, why a handshake failed.

In: files and names of the settings. Out: contexts ready to wrap a socket, and sentences for operators. Nothing here may weaken
the profile, wait for a passphrase, or put into a message what a peer's certificate says.

The profile is the BCP 195 TLS Secure Transport Connection Profile (PS3.15 B.12; RFC 8996, RFC 9325): TLS 1.2 with ephemeral
elliptic-curve keys and authenticated encryption, and TLS 1.3; no renegotiation, no compression, no resumption; keys of at least
112 bits of security (RSA 2048, P-256), no SHA-1.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from node.errors import BadKey, BadSettings
from node.settings import Pacs, Tls, private_file

CIPHERS = "@SECLEVEL=2:ECDHE+AESGCM:ECDHE+CHACHA20"
"""TLS 1.2 (RFC 9325 4.2); those of TLS 1.3 are all of this kind."""
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

_NO_TLS = "no TLS was spoken; is this plain DICOM on a TLS port, or TLS on a plain one?"
_OURS_REFUSED = "the other side refuses our certificate; does it trust who signed it, and is it in date?"
_NOTHING_SHARED = "no cipher suite in common; ECDHE with AES-GCM or ChaCha20 is needed"
_OLD = "no TLS version in common; 1.2 or 1.3 is needed"
_SMALL = "the key of a certificate is too small; RSA 2048 or P-256 is the least"
_WEAK = "a certificate is signed with SHA-1 or MD5"
_CLOSED = "the other side closed the connection"
_REASONS = {
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "HTTP_REQUEST": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
    "UNSUPPORTED_PROTOCOL": _OLD,
    "TLSV1_ALERT_PROTOCOL_VERSION": _OLD,
    "NO_SHARED_CIPHER": _NOTHING_SHARED,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": f"{_NOTHING_SHARED}, or the other side wants a certificate from us",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the other side presented no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the other side wants a certificate from us; set tls_certificate and tls_key",
    "TLSV1_ALERT_UNKNOWN_CA": _OURS_REFUSED,
    "TLSV1_ALERT_DECRYPT_ERROR": _OURS_REFUSED,
    "SSLV3_ALERT_BAD_CERTIFICATE": _OURS_REFUSED,
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": _OURS_REFUSED,
    "SSLV3_ALERT_CERTIFICATE_REVOKED": _OURS_REFUSED,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": _OURS_REFUSED,
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": _OURS_REFUSED,
    "UNEXPECTED_EOF_WHILE_READING": _CLOSED,
    "EE_KEY_TOO_SMALL": _SMALL,
    "CA_KEY_TOO_SMALL": _SMALL,
    "CA_MD_TOO_WEAK": _WEAK,
}
"""OpenSSL's names of what went wrong, in words that say what to do; other names are given as they are."""
_VERIFY = {
    3: "there is no revocation list of who signed the certificate; add it to crl",
    7: "the certificate is signed by an authority that is not in ca; one of the same name with another key is there",
    9: "the certificate is not valid yet; is the clock right?",
    10: "the certificate has expired",
    12: "the revocation list has expired; bring a new one",
    18: "the certificate is signed by itself and not in ca",
    19: "the certificate is signed by an authority that is not in ca",
    20: "the certificate is signed by an authority that is not in ca, or an authority in between was not sent",
    21: "the certificate is signed by an authority that is not in ca, or an authority in between was not sent",
    23: "the certificate is revoked",
    26: "the certificate is not made for this use; a caller needs clientAuth, a listener serverAuth",
    62: "the certificate is for another name; set tls_name to the name it bears",
    64: "the certificate is for another address; set tls_name to the name it bears",
    66: _SMALL,
    67: _SMALL,
    68: _WEAK,
}
"""Verification results of OpenSSL (X509_V_ERR_*)."""


class Context(ssl.SSLContext):
    """A context that remembers why a handshake or a read failed: pynetdicom says only that there is no association."""

    trouble: OSError | None = None


class _Closing(ssl.SSLSocket):
    """Lets itself be shut down when the peer has gone already: pynetdicom would then drop it without closing it."""

    def shutdown(self, how: int) -> None:
        with suppress(OSError):
            super().shutdown(how)


class _Noting(_Closing):
    def do_handshake(self, block: bool = False) -> None:
        with self._noted():
            super().do_handshake(block)

    def read(self, *asked: Any) -> Any:
        with self._noted():  # TLS 1.3: that our certificate is refused comes after our half of the handshake
            return super().read(*asked)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(self.context, Context):
                self.context.trouble = error
            raise


def server_context(tls: Tls) -> ssl.SSLContext:
    """Make what wraps the connections of callers.

    Raises
    ------
    BadSettings, BadKey
        A file is missing, unreadable, no PEM, too weak, or open to others; the message names it.
    """
    context = _profile(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), tls.min_version)
    context.sslsocket_class = _Closing
    context.num_tickets = 0
    _present(context, tls.certificate, tls.key)
    if tls.ca:
        _trust(context, tls.ca, tls.crl)
        context.verify_mode = ssl.CERT_REQUIRED if tls.require_client_certificate else ssl.CERT_OPTIONAL
    return context


def client_context(pacs: Pacs) -> Context:
    """Make what wraps one connection to a PACS; made afresh each time, so that renewed files count at once.

    Raises
    ------
    BadSettings, BadKey
        As `server_context`.
    """
    context = Context(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and name
    context.sslsocket_class = _Noting
    _profile(context, pacs.tls_min_version)
    _trust(context, pacs.tls_ca, pacs.tls_crl)
    if pacs.tls_certificate:
        _present(context, pacs.tls_certificate, pacs.tls_key)
    return context


def _profile(context: ssl.SSLContext, min_version: str) -> ssl.SSLContext:
    context.minimum_version = VERSIONS[min_version]
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    return context


def _present(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Load our own certificate and key, with a message for each way in which they can be wrong."""
    from cryptography.hazmat.primitives import serialization

    own = certificates(certificate)[0]
    try:
        file = private_file(key, "private key")
        private = serialization.load_pem_private_key(_read(file), None)
    except TypeError:
        raise BadKey(
            f"{key}: the private key has a passphrase, and nobody is there to type it; `openssl pkey` removes it"
        ) from None
    except ValueError:
        raise BadKey(f"{key}: no private key in PEM") from None
    except OSError as error:
        raise BadKey(f"{key}: the private key cannot be read ({error.strerror})") from None
    if private.public_key() != own.public_key():
        raise BadKey(f"{key}: the private key does not belong to {certificate}")
    try:
        context.load_cert_chain(certificate, file)
    except OSError as error:
        raise BadSettings(f"{certificate}: cannot be used ({told(error)})") from None


def _trust(context: ssl.SSLContext, ca: str, crl: str) -> None:
    """Trust the authorities in `ca`, and them alone: an authority in between may stand there without its root."""
    certificates(ca)
    try:
        context.load_verify_locations(ca)
    except OSError as error:
        raise BadSettings(f"{ca}: cannot be used ({told(error)})") from None
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    if crl:
        try:
            _read(crl)
            context.load_verify_locations(crl)
        except ssl.SSLError:
            raise BadSettings(f"{crl}: no revocation list in PEM") from None
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF


def certificates(file: str) -> list[Any]:
    """Read the certificates (of `cryptography`) in a PEM file, in their order.

    Raises
    ------
    BadSettings
        It cannot be read, or holds none.
    """
    from cryptography import x509

    try:
        return list(x509.load_pem_x509_certificates(_read(file)))
    except ValueError:
        raise BadSettings(f"{file}: no certificate in PEM; `openssl x509 -in FILE -text` shows what it is") from None


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise BadSettings(f"{file}: cannot be read ({error.strerror})") from None


def ends(file: str) -> datetime:
    """Say when the first of a certificate and the authorities in between, in a PEM file, stops being valid (UTC)."""
    end: datetime = min(one.not_valid_after_utc for one in certificates(file))
    return end


def crl_ends(file: str) -> datetime | None:
    """Say when the first of the revocation lists in a PEM file has to be replaced (UTC), None when none says."""
    from cryptography import x509

    lists = [x509.load_pem_x509_crl(part + b"\n") for part in _pem_parts(_read(file))]
    return min((one.next_update_utc for one in lists if one.next_update_utc), default=None)


def _pem_parts(text: bytes) -> list[bytes]:
    end = b"-----END X509 CRL-----"
    return [part + end for part in text.split(end)[:-1]]


def signed_by(certificate: str, key: str, ca: str) -> str:
    """Say why whoever trusts `ca` alone would refuse our certificate; empty when it would not. Nothing leaves this process."""
    client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client.check_hostname = False
    _trust(client, ca, "")
    _present(server, certificate, key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (asking, answering, asking):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            return told(error)
    return ""


def borne_by(connection: ssl.SSLSocket) -> frozenset[str]:
    """Give what the peer's verified certificate bears: common names, alternative names, and its fingerprint."""
    stated: Any = connection.getpeercert() or {}
    pairs = [*(pair for names in stated.get("subject", ()) for pair in names), *stated.get("subjectAltName", ())]
    names = {str(name).lower() for kind, name in pairs if kind in ("commonName", "DNS", "IP Address", "URI", "email")}
    names = {name for name in names if not name.startswith("sha256:")}  # a name cannot pass for a fingerprint
    return frozenset(names | {fingerprint(connection)} if stated else ())


def bears(borne: frozenset[str], names: Sequence[str]) -> bool:
    """Say whether a certificate that bears this has one of `names`; fingerprints may be written with colons."""
    return not borne.isdisjoint(_normal(name) for name in names)


def _normal(name: str) -> str:
    return name.lower().replace(":", "").replace("sha256", "sha256:", 1) if name.startswith("sha256:") else name.lower()


def fingerprint(connection: ssl.SSLSocket) -> str:
    """Give the SHA-256 of the peer's certificate, fit for a log line; empty when it presented none."""
    presented = connection.getpeercert(binary_form=True)
    return f"sha256:{hashlib.sha256(presented).hexdigest()}" if presented else ""


def told(error: OSError) -> str:
    """Say in words why a handshake failed, without a word of the peer's certificate."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY.get(error.verify_code, f"the certificate is refused (verification result {error.verify_code})")
    if isinstance(error, ssl.SSLError):
        name = (error.reason or type(error).__name__).replace(" ", "_").upper()
        return _REASONS.get(name, name.replace("_", " ").lower())
    if isinstance(error, TimeoutError):
        return "the handshake was not finished in time"
    return _CLOSED


def stamp(files: Iterable[str]) -> tuple[object, ...]:
    """Give what changes when one of the files is replaced; a file that is gone for a moment counts as changed."""
    seen: list[object] = []
    for file in files:
        try:
            state = os.stat(file)
            seen.append((state.st_mtime_ns, state.st_size, state.st_ino))
        except OSError:
            seen.append(None)
    return tuple(seen)
