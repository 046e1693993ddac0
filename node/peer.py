"""What everybody here who speaks DIMSE shares: how our AE names itself, what it can carry, associations over TLS, and C-ECHO.

In: AE titles and destinations of the settings. Out: pynetdicom AEs and associations ready to use, every wait of which ends.
Nothing here may listen, store, or log what a peer sent, or a passcode.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from datetime import UTC, datetime
from time import monotonic
from typing import Any, cast

from pydicom.uid import (
    JPEG2000,
    UID,
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    ComputedRadiographyImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    EnhancedSRStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    XRayAngiographicImageStorage,
    XRayRadiofluoroscopicImageStorage,
)
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import UserIdentityNegotiation
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

import node
from models.errors import Final
from node import tls
from node.errors import PeerAway
from node.settings import Pacs, load_passcode

IMPLEMENTATION_CLASS_UID = UID(node.IMPLEMENTATION_CLASS_UID)
"""Names Osteon in associations and in file meta information (PS3.7 D.3.3.2)."""
IMPLEMENTATION_VERSION_NAME = node.IMPLEMENTATION_VERSION_NAME

ARCHIVED_CLASSES: tuple[UID, ...] = (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
)
"""Go to the archive when nothing speaks against it."""
QUARANTINED_CLASSES: tuple[UID, ...] = (
    SecondaryCaptureImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    XRayRadiofluoroscopicImageStorage,
    XRayAngiographicImageStorage,
)
"""Accepted, and kept in the quarantine for their modality."""
IMAGE_CLASSES = ARCHIVED_CLASSES + QUARANTINED_CLASSES
RESULT_CLASSES: tuple[UID, ...] = (Comprehensive3DSRStorage, ComprehensiveSRStorage, EnhancedSRStorage)
"""What our results are sent as, best first; accepted at reception only so that a result routed back can be answered."""

UNCOMPRESSED: tuple[UID, ...] = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
IMAGE_SYNTAXES: tuple[UID, ...] = (
    *UNCOMPRESSED,
    JPEGLSLossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLossless,
    RLELossless,
    ExplicitVRBigEndian,
    JPEG2000,
    JPEGLSNearLossless,
    JPEGExtended12Bit,
    JPEGBaseline8Bit,
)
"""In order of preference, for a presentation context that offers several: nothing lossy while something lossless is offered."""

RECV_BYTES = 1 << 18
MAX_PDU_BYTES = 1 << 20
"""Far more than the 16382 bytes that we tell a PACS we take."""

# The standard handlers format every message for the log, and messages name patients.
_config.LOG_HANDLER_LEVEL = "none"
_config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False


def ae(title: str, *, timeout_s: float = 20.0) -> AE:
    """Make an AE called `title` that waits at most `timeout_s` for a connection, an answer, or the next byte."""
    entity = AE(ae_title=title.strip())
    entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = timeout_s
    entity.network_timeout = 3 * timeout_s  # of an idle association; were it one wait, pynetdicom would abort twice after it
    return entity


def echo(pacs: Pacs, calling: str) -> None:
    """Ask `pacs` for a C-ECHO under the title `calling`.

    Raises
    ------
    PeerAway
        It does not answer, rejects the association, or answers with another status than success.
    """
    entity = ae(calling, timeout_s=pacs.timeout_s)
    entity.add_requested_context(Verification)
    association = associated(entity, pacs)
    try:
        if not association.is_established:
            raise PeerAway(f"{pacs.name}: {not_established(association.is_rejected, pacs)}")
        status = association.send_c_echo()
        if status.get("Status") != 0x0000:
            raise PeerAway(f"{pacs.name}: answered the C-ECHO with {status_text(status.get('Status'))}")
    finally:
        if association.is_established:
            association.release()


def associated(entity: AE, pacs: Pacs) -> Association:
    """Ask `pacs` for an association; look at what comes back, it may be none.

    Every wait of it ends after `entity`'s time-outs: the look-up of the host, the connection, the handshake, and each read and
    write, which pynetdicom alone would leave without an end.

    Raises
    ------
    PeerAway
        Its host has no address, TLS with it fails, or our own files for it cannot be used now.
    """
    address = _address(pacs)
    try:
        context = tls.client_context(pacs) if pacs.tls else None
        identity = [_identity(pacs)] if pacs.username else []
    except Final as error:  # the operator can mend it, and the result is still due
        raise PeerAway(f"{pacs.name}: {error}") from None
    association = entity.associate(
        address,
        pacs.port,
        ae_title=pacs.ae_title.strip(),
        ext_neg=cast(Any, identity),
        evt_handlers=[(evt.EVT_CONN_OPEN, _on_open)],
        tls_args=None if context is None else (context, pacs.tls_name or pacs.host),
    )
    if context is not None and context.trouble is not None and not association.is_established:
        raise PeerAway(f"{pacs.name}: TLS with {pacs.host}:{pacs.port}: {tls.told(context.trouble)}")
    return association


def _on_open(event: evt.Event) -> None:
    """Bound each read and write: pynetdicom takes the time-out away once connected, and waits for its thread to end."""
    transport, timeout_s = cast(Any, event.assoc.dul.socket), float(event.assoc.acse_timeout or 0)

    def recv(nr_bytes: int) -> bytearray:
        if nr_bytes > MAX_PDU_BYTES:
            raise OSError("PDU longer than negotiated")
        read = read_within(connection, nr_bytes, timeout_s)
        connection.settimeout(timeout_s)
        return read

    connection = transport.socket
    connection.settimeout(timeout_s)
    transport.recv = recv


def read_within(connection: socket.socket, nr_bytes: int, seconds: float) -> bytearray:
    """Read so many bytes, all of them within `seconds` however slowly they drip; fewer when the peer hangs up.

    Raises
    ------
    OSError
        They did not come in time, or the connection broke.
    """
    deadline, read = monotonic() + seconds, bytearray()
    while len(read) < nr_bytes:
        connection.settimeout(max(0.001, deadline - monotonic()))
        part = connection.recv(min(nr_bytes - len(read), RECV_BYTES))
        if not part:
            break
        read += part
    return read


def _address(pacs: Pacs) -> str:
    """Look the host up, for as long as `timeout_s`: the system's resolver has an end of its own, or none."""
    found: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(pacs.host, pacs.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            entries = []
        entries.sort(key=lambda entry: entry[0] != socket.AF_INET)  # as pynetdicom: the first of IPv4, else of IPv6
        found.put([str(entry[4][0]) for entry in entries])

    threading.Thread(target=look_up, name=f"resolve-{pacs.name}", daemon=True).start()
    try:
        addresses = found.get(timeout=pacs.timeout_s)
    except queue.Empty:
        raise PeerAway(f"{pacs.name}: no name server said the address of {pacs.host} within {pacs.timeout_s:g} s") from None
    if not addresses:
        raise PeerAway(f"{pacs.name}: the host {pacs.host} has no address here; is its name spelt right?")
    return addresses[0]


def _identity(pacs: Pacs) -> UserIdentityNegotiation:
    """Name our user to `pacs` (PS3.7 D.3.3.7: 1 is a user name, 2 a user name with its passcode)."""
    item = UserIdentityNegotiation()
    item.user_identity_type = 2 if pacs.passcode else 1
    item.positive_response_requested = False
    item.primary_field = pacs.username.encode("utf-8")
    if pacs.passcode:
        item.secondary_field = load_passcode(pacs.passcode)
    return item


def certificate_ends(pacs: Pacs) -> datetime:
    """Shake hands with `pacs` and say when the certificate it presents stops being valid (UTC).

    Raises
    ------
    PeerAway
        No connection, or the handshake failed.
    BadSettings, BadKey
        Our own files cannot be used.
    """
    context = tls.client_context(pacs)
    try:
        with (
            socket.create_connection((_address(pacs), pacs.port), timeout=pacs.timeout_s) as connection,
            context.wrap_socket(connection, server_hostname=pacs.tls_name or pacs.host) as secured,
        ):
            stated: Any = secured.getpeercert()
    except OSError:
        if context.trouble is None:
            raise PeerAway(not_established(False, pacs)) from None
        raise PeerAway(f"TLS with {pacs.host}:{pacs.port}: {tls.told(context.trouble)}") from None
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(stated["notAfter"]), UTC)


def not_established(rejected: bool, pacs: Pacs) -> str:
    """Say in words why there is no association with `pacs`."""
    if rejected:
        return f"rejected the association; does it know our AE title, and is it called {pacs.ae_title}?"
    return f"no association with {pacs.host}:{pacs.port}; is it running and reachable?"


def status_text(status: int | None) -> str:
    """Write a DIMSE status as the standard does, `no status` when there is none (time-out, abort)."""
    return "no status" if status is None else f"{status:04X}H"


def printable(title: str) -> str:
    """Make an AE title that a peer chose fit for a log line: printable ASCII, at most 16 characters."""
    return "".join(char if " " <= char <= "~" else "?" for char in title)[:16].strip()
