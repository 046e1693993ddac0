"""What everybody here who speaks DIMSE shares: how our AE names itself, what it can carry, and C-ECHO.

In: AE titles and destinations of the settings. Out: pynetdicom AEs ready to use. Nothing here may listen, store, or log what a
peer sent.
"""

from __future__ import annotations

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
from pynetdicom import AE, _config
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

import node
from node.errors import PeerAway
from node.settings import Pacs

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

# The standard handlers format every message for the log, and messages name patients.
_config.LOG_HANDLER_LEVEL = "none"
_config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False


def ae(title: str, *, timeout_s: float = 20.0) -> AE:
    """Make an AE called `title` that waits at most `timeout_s` for a connection, an answer, or the next byte."""
    entity = AE(ae_title=title.strip())
    entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = timeout_s
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

    Raises
    ------
    PeerAway
        Its host has no address.
    """
    try:
        return entity.associate(pacs.host, pacs.port, ae_title=pacs.ae_title.strip())
    except OSError:
        raise PeerAway(f"{pacs.name}: the host {pacs.host} has no address here; is its name spelt right?") from None


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
