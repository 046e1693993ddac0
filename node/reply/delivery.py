"""One result to one PACS: ask whose study it holds, send the SR, read the answer.

In: a destination, a way to build the document in the SOP class the destination takes, the identity it goes to. Out: how it was
taken, or an error that says whether trying again may help. Every wait ends: each after `[[pacs]] timeout_s`, the query after
three of them. What must never happen here: a result under a patient whom the destination knows by another PatientID, a success
that no status said, an identity in a message or a log.

`next_attempt` is the pure half: when a delivery that failed is tried again, and when it is given up.
"""

from __future__ import annotations

import builtins
import hashlib
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from time import monotonic
from typing import Any, Protocol

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, TEXT_VR_DELIMS
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind  # type: ignore[attr-defined]
from pynetdicom.status import code_to_category

from models.errors import Final
from node import peer
from node.errors import PeerAway
from node.keep.records import Document, RawElement, StudyIdentity
from node.settings import Delivery, Pacs

ANSWERS_READ_MAX = 200
"""A destination that answers more matches to one Study Instance UID ignores the key; its word is not taken."""
QUERY_TIMEOUTS = 3
"""A query must end within so many times `timeout_s`, however many answers come in between."""
JITTER = 0.2
SUCCESS = 0x0000
OPTIONAL_ATTRIBUTES_NOT_SUPPORTED = 0x0001
DUPLICATE_SOP_INSTANCE = 0x0111
SOP_CLASS_NOT_SUPPORTED = 0x0122
OUT_OF_RESOURCES = range(0xA700, 0xA800)

_PATIENT_ID = tag_for_keyword("PatientID")


class Held(Final):
    """The destination holds this study under another PatientID than the vault's; correct the patient there, then retry."""


class Rejected(Final):
    """The destination refused the document."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class Ready(Protocol):
    """A document as `report.build` gives it."""

    @property
    def bytes(self) -> builtins.bytes:
        """Give the Part 10 file in Explicit VR Little Endian."""

    @property
    def implicit(self) -> builtins.bytes:
        """Give the Part 10 file in Implicit VR Little Endian."""

    @property
    def document(self) -> Document:
        """Say what identifies it."""


class PatientCheck(StrEnum):
    """What the destination said of the patient of this study before anything was sent."""

    SAME = "the destination holds this study under the same PatientID"
    NO_STUDY = "the destination holds no such study"
    UNSAID = "the destination does not say whose study it is"


@dataclass(frozen=True, slots=True)
class Sent:
    """A document that the destination took."""

    status: int
    """The DIMSE status: success, a warning, or "duplicate": it has this instance, hence these bytes, already."""
    document: Document
    patient_check: PatientCheck


def send(
    pacs: Pacs,
    *,
    calling_ae: str,
    build: Callable[[str], Ready],
    study: StudyIdentity,
) -> Sent:
    """Send the SR that `build` makes for the SOP class the destination accepts.

    Parameters
    ----------
    build
        Called once with the SOP class UID that was negotiated, after the patient is known to be the same and before the first
        byte leaves: the place to note the document. What it raises stops the sending.

    Raises
    ------
    PeerAway
        No association, no answer in time, an abort, or no room: the same may succeed later.
    Held
        The destination names another patient for this study; nothing was sent.
    Rejected
        The destination takes none of the SR classes, or refused this document.
    """
    try:
        with _associated(pacs, calling_ae, ask=True) as association:
            check = _whose(association, pacs, study)
            return _store(association, pacs, build, check)
    except _QueryBroke:
        # Some archives abort, or never end their answer, when they do not know C-FIND or its keys; the result is still due.
        with _associated(pacs, calling_ae, ask=False) as association:
            return _store(association, pacs, build, PatientCheck.UNSAID)


def next_attempt(attempts: int, rules: Delivery, *, created_at: datetime, now: datetime, key: str = "") -> datetime | None:
    """Say when a delivery is tried again after `attempts` failures, None when its time is over.

    The pause doubles from `retry_first_s` to `retry_max_s`, spread by up to 20 % so that many deliveries do not come back at
    once; the spread depends on `key` and the attempt alone. The last attempt falls on the end of `give_up_h`.
    """
    give_up_at = created_at + timedelta(hours=rules.give_up_h)
    if now >= give_up_at:
        return None
    pause_s = min(rules.retry_first_s * 2.0 ** min(max(attempts - 1, 0), 60), rules.retry_max_s)
    draw = hashlib.sha256(f"{key} {attempts}".encode()).digest()[0] / 255
    return min(now + timedelta(seconds=pause_s * (1 + JITTER * (2 * draw - 1))), give_up_at)


# --- the association --------------------------------------------------------------------------------------------------------


@contextmanager
def _associated(pacs: Pacs, calling_ae: str, *, ask: bool) -> Iterator[Association]:
    """Hold an association that offers the SR classes and, to `ask` for the patient, Study Root FIND."""
    entity: AE = peer.ae(calling_ae, timeout_s=pacs.timeout_s)
    for sop_class in peer.RESULT_CLASSES:
        for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):  # a context each: both may be accepted
            entity.add_requested_context(sop_class, syntax)
    if ask:
        entity.add_requested_context(StudyRootQueryRetrieveInformationModelFind, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    association = peer.associated(entity, pacs)
    if not association.is_established:
        if association.rejected_contexts:
            raise _takes_no_reports(pacs)
        raise PeerAway(f"{pacs.name}: {peer.not_established(association.is_rejected, pacs)}")
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def _takes_no_reports(pacs: Pacs) -> Rejected:
    return Rejected(f"{pacs.name}: accepts none of the three SR classes for our AE title", status=SOP_CLASS_NOT_SUPPORTED)


# --- the question -----------------------------------------------------------------------------------------------------------


class _QueryBroke(Exception):
    """The association did not survive the C-FIND."""


def _whose(association: Association, pacs: Pacs, study: StudyIdentity) -> PatientCheck:
    """Ask under which PatientID the destination holds the study.

    A destination that cannot answer is not in the way; one that names another patient is (`Held`).
    """
    if not any(cx.abstract_syntax == StudyRootQueryRetrieveInformationModelFind for cx in association.accepted_contexts):
        return PatientCheck.UNSAID
    query = Dataset()
    query.QueryRetrieveLevel = "STUDY"
    query.StudyInstanceUID = study.original_study_uid
    query.PatientID = ""
    ours = _decoded(
        next((element.value for element in study.patient if element.tag == _PATIENT_ID), b""), _terms(study.character_set)
    )
    told, status = PatientCheck.NO_STUDY, None
    deadline = monotonic() + QUERY_TIMEOUTS * pacs.timeout_s
    answers = association.send_c_find(query, StudyRootQueryRetrieveInformationModelFind)
    for number, (response, match) in enumerate(answers, start=1):
        status = response.get("Status")
        if number > ANSWERS_READ_MAX or monotonic() > deadline:
            association.abort()
            raise _QueryBroke
        if match is None or str(match.get("StudyInstanceUID", "")).strip() != study.original_study_uid:
            continue
        theirs = _patient_id(match)
        if theirs is not None and theirs != ours:
            raise Held(
                f"{pacs.name}: holds this study under another patient or none (PatientID); correct it there, then "
                "`osteon delivery retry`"
            )
        told = PatientCheck.UNSAID if theirs is None else PatientCheck.SAME
    if status is None:  # an abort, or no answer in time
        association.abort()
        raise _QueryBroke
    return told if status == SUCCESS else PatientCheck.UNSAID


def _patient_id(match: Dataset) -> str | None:
    """Read the PatientID of a C-FIND match, in the character set of the match; None when the match does not speak of it."""
    if _PATIENT_ID is None or _PATIENT_ID not in match:
        return None
    element = match.get_item(_PATIENT_ID)
    value = element.value if element is not None else b""
    if not isinstance(value, bytes):
        return str(value or "").strip()
    said = match.get("SpecificCharacterSet") or ""
    return _decoded(value, [said] if isinstance(said, str) else [str(term) for term in said])


def _terms(character_set: RawElement | None) -> list[str]:
    text = b"" if character_set is None else character_set.value
    return [term.strip(" \0") for term in text.decode("ascii", "replace").split("\\")]


def _decoded(value: bytes, terms: list[str]) -> str:
    """Decode an LO in the character set of its header; what cannot be decoded gets replacement characters, never an error."""
    if value.isascii() and b"\x1b" not in value:
        return value.decode("ascii").strip(" \0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of misspelt terms and mends them
        text: str = decode_bytes(value, convert_encodings(terms), TEXT_VR_DELIMS)
    return text.strip(" \0")


# --- the document -----------------------------------------------------------------------------------------------------------


class _AsWritten(Dataset):
    """A data set that is sent as the bytes it was read from.

    pynetdicom encodes what it sends, and pydicom writes the elements of an untouched data set as they were read, all but
    SpecificCharacterSet, which it looks up by this method to know how to encode text: nothing here is text to be encoded.
    """

    def get(self, key: Any, default: Any = None) -> Any:
        """Look an element up; there is no SpecificCharacterSet to see."""
        return default if key == "SpecificCharacterSet" else super().get(key, default)


def _as_written(part10: bytes, syntax: UID) -> Dataset:
    """Read a Part 10 file of ours, in `syntax`, so that it leaves as the bytes it is.

    Read by a few lines of our own, because pydicom would look into the character set, and may mend or refuse what came.
    """
    implicit = syntax.is_implicit_VR
    written = _AsWritten()
    at = 144 + int(struct.unpack_from("<I", part10, 140)[0])  # preamble, "DICM", group length of the file meta information
    while at < len(part10):
        group, number = struct.unpack_from("<HH", part10, at)
        vr = "" if implicit else part10[at + 4 : at + 6].decode("ascii")
        if implicit:
            (length,), at = struct.unpack_from("<I", part10, at + 4), at + 8
        elif vr in EXPLICIT_VR_LENGTH_32:
            (length,), at = struct.unpack_from("<I", part10, at + 8), at + 12
        else:
            (length,), at = struct.unpack_from("<H", part10, at + 6), at + 8
        tag = Tag(group, number)
        written[tag] = RawDataElement(tag, vr or None, length, part10[at : at + length], at, implicit, True)
        at += length
    written.set_original_encoding(implicit, True, written._character_set)
    written.file_meta = FileMetaDataset()
    written.file_meta.TransferSyntaxUID = syntax
    return written


def _store(
    association: Association,
    pacs: Pacs,
    build: Callable[[str], Ready],
    check: PatientCheck,
) -> Sent:
    """Build for the best context that was accepted, send, and read the status."""
    accepted = {(cx.abstract_syntax, cx.transfer_syntax[0]) for cx in association.accepted_contexts}
    offers = [(sop, syntax) for sop in peer.RESULT_CLASSES for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian)]
    best = next((offer for offer in offers if offer in accepted), None)
    if best is None:
        raise _takes_no_reports(pacs)
    sop_class, syntax = best
    built = build(str(sop_class))
    try:
        part10 = built.bytes if syntax == ExplicitVRLittleEndian else built.implicit
        response = association.send_c_store(_as_written(part10, syntax))
    except RuntimeError:  # the association ended while the document was built
        raise PeerAway(f"{pacs.name}: ended the association before the C-STORE") from None
    status = response.get("Status")
    if status is None:
        raise PeerAway(f"{pacs.name}: no answer to the C-STORE within {pacs.timeout_s:g} s, or an abort")
    if status in OUT_OF_RESOURCES:
        raise PeerAway(f"{pacs.name}: has no room for the document ({peer.status_text(status)})")
    if not _taken(status):
        raise Rejected(f"{pacs.name}: refused the document with status {peer.status_text(status)}", status=status)
    return Sent(status=status, document=built.document, patient_check=check)


def _taken(status: int) -> bool:
    """Say whether a status means that the destination holds the document now."""
    if status in (SUCCESS, OPTIONAL_ATTRIBUTES_NOT_SUPPORTED, DUPLICATE_SOP_INSTANCE):
        return True
    return code_to_category(status) == "Warning"
