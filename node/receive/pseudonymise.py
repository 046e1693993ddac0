"""Pseudonymise one image: (data set, keys, rules) -> (clean data set, identity, instance).

In: a data set as pydicom read it (whole, without `defer_size`), with its file meta. Out: `Pseudonymised`: what may go to the
archive, what the vault must remember, and why the image may have to be held. Pure: no clock, no disk, no network. Never here: a
value of the input that no rule of `profile` names; an identity in an error or a warning; a change of the pixels.

Only what the allow-list names is looked at, and it is looked at as raw bytes: text is never decoded in order to be passed on,
and an element that is dropped is not even parsed.
"""

from __future__ import annotations

import math
import re
import struct
import threading
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

from pydicom.charset import convert_encodings, decode_bytes, python_encoding
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VM, dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pydicom.values import convert_SQ

import node
from models.errors import Final
from node.keep.records import Hold, Identity, Instance, RawElement, StudyIdentity
from node.pseudonym import SiteKeys
from node.receive.profile import ALLOWED, METHOD_CODES, PROFILE_EDITION, Allowed, Rule, Vocabulary

ARCHIVED_CLASSES = frozenset(
    {ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation, DigitalXRayImageStorageForProcessing}
)
ARCHIVED_MODALITIES = frozenset({"CR", "DX"})
PLACEHOLDER_BIRTH_DATES = frozenset(
    {
        date(1, 1, 1),
        date(1753, 1, 1),
        date(1800, 1, 1),
        date(1899, 12, 30),
        date(1899, 12, 31),
        date(1900, 1, 1),
        date(1970, 1, 1),
    }
)
"""What systems write when they know no birth date: zero dates of databases, spreadsheets and computers."""
OLDEST_YEARS = 120
CAP_YEARS = 90

_MAX_ID = 64
_MAX_VALUES = 32
_MAX_DROPPED = 100
_STANDARD_ROOT = "1.2.840.10008."
"""UIDs below it are the standard's own words (SOP classes, transfer syntaxes) and name nobody."""
_UID = re.compile(r"\d+(\.\d+)+", re.ASCII)
_AGE = re.compile(r"(\d{1,3})([DWMY])", re.ASCII)
_DATE = re.compile(r"(\d{4})(\d\d)(\d\d)|(\d{4})\.(\d\d)\.(\d\d)", re.ASCII)
_TIME = re.compile(r"([01]\d|2[0-3])(?::?[0-5]\d(?::?[0-5]\d(\.\d{1,6})?|:?60)?)?", re.ASCII)
_DATETIME = re.compile(r"(\d{8})(?:([01]\d|2[0-3])\d{0,4}(\.\d{1,6})?)?([+-]\d{4})?", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_COUNT = re.compile(r"[0-9]{1,4}")
_INTEGER = re.compile(r"[+-]?\d{1,11}")
_PADDING = " \0"
_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"
_BINARY = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
_SHORT_TEXT_VRS = frozenset({"AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UI"})
_FILM = frozenset({"DF", "SD", "SI"})
_SCREEN = ("SECONDARY", "SCREENSAVE", "SCREENCAPTURE", "SCREENSHOT")

_CHARACTER_SET = 0x00080005
_IMAGE_TYPE = 0x00080008
_SOP_CLASS_UID = 0x00080016
_SOP_INSTANCE_UID = 0x00080018
_STUDY_DATE, _SERIES_DATE, _ACQUISITION_DATE = 0x00080020, 0x00080021, 0x00080022
_STUDY_TIME = 0x00080030
_ACCESSION_NUMBER = 0x00080050
_MODALITY = 0x00080060
_CONVERSION_TYPE = 0x00080064
_MANUFACTURER = 0x00080070
_REFERRING_PHYSICIAN = 0x00080090
_CODE_VALUE, _CODING_SCHEME = 0x00080100, 0x00080102
_STATION_NAME = 0x00081010
_STUDY_DESCRIPTION = 0x00081030
_MODEL = 0x00081090
_ANATOMIC_REGION = 0x00082218
_PATIENT_NAME, _PATIENT_ID, _ISSUER = 0x00100010, 0x00100020, 0x00100021
_BIRTH_DATE, _SEX, _AGE_TAG = 0x00100030, 0x00100040, 0x00101010
_BODY_PART = 0x00180015
_SERIAL_NUMBER = 0x00181000
_CAPTURE_DEVICE = (0x00181010, 0x00181016, 0x00181018)
_TRANSFER_SYNTAX_UID = 0x00020010
_STUDY_UID, _SERIES_UID = 0x0020000D, 0x0020000E
_STUDY_ID = 0x00200010
_PIXEL_REPRESENTATION = 0x00280103
_BURNED_IN = 0x00280301
_LUT_DESCRIPTOR = 0x00283002
_PIXEL_DATA = 0x7FE00010

_PATIENT_GROUP = 0x0010
_PATIENT_ELEMENTS = (_PATIENT_NAME, _PATIENT_ID, _ISSUER, _BIRTH_DATE, _SEX)
_STUDY_ELEMENTS = (_STUDY_DATE, _STUDY_TIME, _ACCESSION_NUMBER, _REFERRING_PHYSICIAN, _STUDY_DESCRIPTION, _STUDY_ID)


class UnusablePatientID(Final):
    """The PatientID is empty, a placeholder, over-long or not a text: hashing it would melt patients together."""


class Malformed(Final):
    """The data set cannot be parsed where it must be, or lacks a UID."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the site says of its identifiers and words."""

    default_issuer: str
    """Stands for an absent IssuerOfPatientID."""
    placeholders: frozenset[str]
    """PatientIDs that name nobody, in lower case."""
    vocabulary: Vocabulary

    @classmethod
    def load(
        cls, *, default_issuer: str, placeholder_patient_ids: Sequence[str] = (), site_vocabulary: Path | None = None
    ) -> Rules:
        """Make the rules from the site's settings.

        Raises
        ------
        BadSettings
            The site's vocabulary is missing or malformed.
        """
        placeholders = frozenset(_as_seen(text) for text in placeholder_patient_ids)
        return cls(default_issuer, placeholders, Vocabulary.load(site_vocabulary))


@dataclass(frozen=True, slots=True)
class Pseudonymised:
    """One image, pseudonymised."""

    clean: Dataset
    """With file meta and a zero preamble, ready for `dcmwrite(enforce_file_format=True)`; pixels and syntax untouched."""
    identity: Identity
    instance: Instance
    """Without path and digests, which the archive fills in."""
    hold: Hold | None
    """Why it must go to the quarantine instead of the archive; None when nothing speaks against it."""
    hold_detail: str
    """A sentence without an identity."""
    dropped: tuple[tuple[str, str], ...]
    """Keyword and keyed hash of each text or code that the vocabulary does not know."""


def pseudonymise(dataset: Dataset, keys: SiteKeys, rules: Rules) -> Pseudonymised:
    """Take the person out of an image.

    The same input gives the same output, whatever the transfer syntax; `dataset` keeps its values.

    Raises
    ------
    UnusablePatientID
        No pseudonym can be made from the PatientID.
    Malformed
        Study, series or SOP Instance UID is missing or no UID, the transfer syntax is unknown, or a sequence that would be kept
        cannot be parsed.
    """
    source = _Source(dataset)
    transfer_syntax_uid = _transfer_syntax(dataset)
    study_uid, series_uid, sop_uid = (
        source.uid(tag, name)
        for tag, name in ((_STUDY_UID, "Study Instance"), (_SERIES_UID, "Series Instance"), (_SOP_INSTANCE_UID, "SOP Instance"))
    )
    sop_class_uid = source.uid(_SOP_CLASS_UID, "SOP Class")
    issuer, patient_id = _patient(source, rules)
    pid, days, age = keys.pid(issuer, patient_id), keys.days(issuer, patient_id), _age(source)
    cleaner = _Cleaner(keys, rules.vocabulary, pid, days, age, is_signed=source.number(_PIXEL_REPRESENTATION) == 1)
    clean = cleaner.clean(source, ALLOWED)
    if not clean.SOPClassUID:
        raise Malformed("the SOP Class UID is below the standard's root and not the standard's")
    _mark(clean)
    clean.file_meta = _file_meta(clean, transfer_syntax_uid)
    clean.preamble = b"\0" * 128
    hold, detail = _hold(source, sop_class_uid, rules.vocabulary)
    identity = Identity(
        pid=pid,
        study_uid=keys.uid(study_uid),
        series_uid=keys.uid(series_uid),
        sop_uid=keys.uid(sop_uid),
        sop_class_uid=sop_class_uid,
        original_study_uid=study_uid,
        original_series_uid=series_uid,
        original_sop_uid=sop_uid,
        character_set=next(source.raw(_CHARACTER_SET), None),
        patient=tuple(source.raw(*_PATIENT_ELEMENTS)),
        study=tuple(source.raw(*_STUDY_ELEMENTS)),
        birth_date=source.text(_BIRTH_DATE),
        sex=source.text(_SEX),
    )
    instance = Instance(
        sop_uid=identity.sop_uid,
        series_uid=identity.series_uid,
        study_uid=identity.study_uid,
        pid=pid,
        sop_class_uid=sop_class_uid,
        transfer_syntax_uid=transfer_syntax_uid,
        path="",
        header_digest="",
        pixel_digest="",
        modality=rules.vocabulary.terms["modality"].find(source.text(_MODALITY)) or "",
        body_part=_body_part(source, clean, rules.vocabulary),
        age_years=None if age is None else age.years,
        sex=rules.vocabulary.terms["sex"].find(source.text(_SEX)) or "",
        device=keys.device(*(source.text(tag) for tag in (_MANUFACTURER, _MODEL, _STATION_NAME, _SERIAL_NUMBER))),
        accession_key=keys.accession(rules.default_issuer, source.text(_ACCESSION_NUMBER)),
        study_id_key=keys.study_id(rules.default_issuer, source.text(_STUDY_ID)),
    )
    return Pseudonymised(clean, identity, instance, hold, detail, tuple(dict.fromkeys(cleaner.dropped))[:_MAX_DROPPED])


def as_patient(dataset: Dataset, whose: StudyIdentity) -> Dataset:
    """Write the patient of a study into an image that came under another one or none, because a person said whose it is.

    Everything that the image itself says of a patient goes; what the vault keeps comes in, as it came. `dataset` is changed.
    """
    for tag in [tag for tag in dataset.keys() if tag.group == _PATIENT_GROUP]:  # noqa: SIM118 - elements would be converted
        del dataset[tag]
    elements = list(whose.patient)
    if whose.character_set is not None and not all(element.value.isascii() for element in elements):
        elements.append(whose.character_set)
    for element in elements:
        tag = Tag(element.tag)
        dataset[tag] = RawDataElement(tag, element.vr, len(element.value), element.value, 0, False, True)
    return dataset


# --- reading -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Element:
    """One element as it came: the bytes of its value, and what they are said to be."""

    vr: str
    """Empty in Implicit VR."""
    value: bytes
    is_little_endian: bool
    is_undefined_length: bool
    items: Sequence[Dataset] | None
    """Of a sequence that pydicom has parsed already."""
    is_implicit_vr: bool


class _Source:
    """A data set, or an item, read element by element as bytes."""

    def __init__(self, dataset: Dataset, parent: _Source | None = None) -> None:
        self.dataset = dataset
        self.character_sets: tuple[str, ...] = parent.character_sets if parent is not None else ("",)
        own = self.element(_CHARACTER_SET)
        if own is not None:
            self.character_sets = tuple(term.strip(_PADDING) for term in own.value.decode("latin-1").split("\\"))

    def element(self, tag: int) -> _Element | None:
        if tag not in self.dataset:
            return None
        # keep_deferred: an empty element would be converted otherwise, with an error for a VR that pydicom does not know
        found: DataElement | RawDataElement = self.dataset.get_item(tag, keep_deferred=True)
        if isinstance(found, RawDataElement):
            undefined = found.length == 0xFFFFFFFF
            vr = "" if found.VR in (None, "UN") else str(found.VR)
            value = found.value or b""
            return _Element(vr, value, found.is_little_endian, undefined, None, found.is_implicit_VR or found.VR == "UN")
        if found.VR == "SQ":
            return _Element("SQ", b"", True, True, found.value or (), True)
        return _Element(str(found.VR), _encoded(found, self.character_sets), True, found.is_undefined_length, None, False)

    def text(self, tag: int) -> str:
        """Give the value as trimmed text, empty when there is none. For comparison and hashing: it is never passed on."""
        element = self.element(tag)
        return "" if element is None else _decoded(element.value, self.character_sets).strip(" \0\t\r\n")

    def number(self, tag: int) -> int | None:
        element = self.element(tag)
        values = _numbers(element, dictionary_VR(tag)) if element is not None else []
        return int(values[0]) if values else None

    def uid(self, tag: int, name: str) -> str:
        text = self.text(tag)
        if not _is_uid(text):
            raise Malformed(f"the {name} UID is missing or not a UID")
        return text

    def raw(self, *tags: int) -> Iterator[RawElement]:
        """Give the elements that are there, as they came."""
        for tag in tags:
            element = self.element(tag)
            if element is not None:
                vr = element.vr if element.vr in _SHORT_TEXT_VRS else dictionary_VR(tag)
                yield RawElement(tag, vr, element.value)

    def items(self, tag: int) -> list[_Source]:
        """Give the items of a sequence.

        Raises
        ------
        Malformed
            They cannot be parsed.
        """
        element = self.element(tag)
        if element is None:
            return []
        items = element.items
        if items is None:
            if element.vr not in ("", "SQ"):
                raise Malformed("a sequence is encoded as something else")
            try:
                with _QUIET.warnings():
                    items = convert_SQ(element.value, element.is_implicit_vr, element.is_little_endian)
            except Exception as error:  # whatever pydicom raises on broken bytes: it says nothing that may be repeated
                raise Malformed(f"a sequence cannot be parsed ({type(error).__name__})") from None
        return [_Source(item, self) for item in items]


class _Quiet:
    """Silences pydicom's warnings, which repeat values; one thread at a time, since the filters are the process's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def warnings(self) -> Iterator[None]:
        with self._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


_QUIET = _Quiet()


def _encoded(element: DataElement, character_sets: Sequence[str]) -> bytes:
    """Give the value bytes of an element that somebody has converted already (a data set built in memory)."""
    file = DicomBytesIO()
    file.is_implicit_VR, file.is_little_endian = True, True
    with _QUIET.warnings():
        write_data_element(file, element, convert_encodings(list(character_sets)))
    value = file.getvalue()[8:]
    return value.removesuffix(_DELIMITER) if element.is_undefined_length else value


def _decoded(value: bytes, character_sets: Sequence[str]) -> str:
    """Decode text; what its character set does not allow is read as Latin-1, so that different bytes stay different."""
    if b"\x1b" not in value:
        if value.isascii():
            return value.decode("ascii")
        try:
            return value.decode(python_encoding.get(character_sets[0], "latin-1"))
        except UnicodeDecodeError:
            return value.decode("latin-1")
    encodings = [python_encoding.get(term, "latin-1") for term in character_sets]
    try:
        with _QUIET.warnings():
            text = decode_bytes(value, encodings, set())
    except (UnicodeError, LookupError):
        text = "\ufffd"
    return value.decode("latin-1") if "\ufffd" in text else text


def _transfer_syntax(dataset: Dataset) -> str:
    meta = getattr(dataset, "file_meta", None)
    stated = _Source(meta).text(_TRANSFER_SYNTAX_UID) if meta is not None else ""
    if stated:
        if not _is_uid(stated) or _registered(stated).type != "Transfer Syntax":
            raise Malformed("the transfer syntax is not one of the standard's")
        return stated
    by_reading = {
        (True, True): ImplicitVRLittleEndian,
        (False, True): ExplicitVRLittleEndian,
        (False, False): ExplicitVRBigEndian,
    }
    implicit, little = dataset.original_encoding
    if implicit is None or little is None or (implicit, little) not in by_reading:
        raise Malformed("the transfer syntax is not stated")
    return str(by_reading[implicit, little])


# --- who and how old -----------------------------------------------------------------------------------------------------------


def _patient(source: _Source, rules: Rules) -> tuple[str, str]:
    """Give issuer and PatientID, fit to be hashed."""
    patient_id = source.text(_PATIENT_ID)
    issuer = source.text(_ISSUER) or rules.default_issuer
    require_usable(patient_id, issuer, rules)
    return issuer, patient_id


def require_usable(patient_id: str, issuer: str, rules: Rules) -> None:
    """Refuse a PatientID from which no pseudonym may be made.

    Raises
    ------
    UnusablePatientID
        With the reason, which does not repeat it.
    """
    seen = _as_seen(patient_id)
    if not seen:
        raise UnusablePatientID("the PatientID is empty")
    if seen in rules.placeholders:
        raise UnusablePatientID("the PatientID is a placeholder")
    if len(patient_id) > _MAX_ID:
        raise UnusablePatientID(f"the PatientID is longer than {_MAX_ID} characters")
    if any(unicodedata.category(character) == "Cc" for character in patient_id + issuer):
        raise UnusablePatientID("the PatientID or its issuer contains control characters")
    if not any(character.isalnum() and character != "0" for character in seen):
        raise UnusablePatientID("the PatientID has neither letters nor digits but zeros")


def _as_seen(text: str) -> str:
    """Give a text as a person reads it: wide characters as plain ones, without invisible ones, in small letters."""
    plain = unicodedata.normalize("NFKC", text)
    return "".join(character for character in plain if unicodedata.category(character) != "Cf").strip().casefold()


@dataclass(frozen=True, slots=True)
class _Age:
    """A patient's age at the study."""

    months: int

    @property
    def years(self) -> int:
        return self.months // 12

    def written(self) -> str:
        """Write it as AS: months below two years, and nobody older than 90 (45 CFR 164.514 b 2 i C)."""
        return f"{self.months:03d}M" if self.years < 2 else f"{min(self.years, CAP_YEARS):03d}Y"


def _age(source: _Source) -> _Age | None:
    """Compute the age from the original dates, from the header's PatientAge only where a date is missing.

    The two differing by more than a year, a birth date in the future, a placeholder, or no date at all: unknown.
    """
    stated = _stated_age(source.text(_AGE_TAG))
    born_text = source.text(_BIRTH_DATE)
    dates = (_date(source.text(tag)) for tag in (_STUDY_DATE, _SERIES_DATE, _ACQUISITION_DATE))
    at = next((found for found in dates if found is not None), None)
    if not born_text or at is None:
        born = _date(born_text)
        return None if born_text and (born is None or born in PLACEHOLDER_BIRTH_DATES) else stated
    born = _date(born_text)
    if born is None or born in PLACEHOLDER_BIRTH_DATES or born > at:
        return None
    months = 12 * (at.year - born.year) + at.month - born.month - (at.day < born.day)
    age = _Age(months)
    if age.years > OLDEST_YEARS or (stated is not None and abs(stated.years - age.years) > 1):
        return None
    return age


def _stated_age(text: str) -> _Age | None:
    match = _AGE.fullmatch(text.upper())
    if match is None:
        return None
    count = int(match[1])
    months = {"Y": 12.0, "M": 1.0, "W": 12 * 7 / 365.25, "D": 12 / 365.25}[match[2]] * count
    return _Age(int(months)) if months <= 12 * OLDEST_YEARS else None


def _date(text: str) -> date | None:
    """Read a DA, also in its old form with dots."""
    match = _DATE.fullmatch(text)
    if match is None:
        return None
    year, month, day = (int(part) for part in match.groups() if part is not None)
    try:
        return date(year, month, day)
    except ValueError:
        return None


# --- cleaning ------------------------------------------------------------------------------------------------------------------


@dataclass
class _Cleaner:
    """Applies the allow-list to one data set and counts what the vocabulary does not know."""

    keys: SiteKeys
    vocabulary: Vocabulary
    pid: str
    days: int
    age: _Age | None
    is_signed: bool
    """PixelRepresentation is 1: it decides what `US or SS` means."""
    dropped: list[tuple[str, str]] = field(default_factory=list)

    def clean(self, source: _Source, level: Mapping[int, Allowed]) -> Dataset:
        """Build the data set that the rules leave of `source`."""
        clean = Dataset()
        for tag in sorted(source.dataset.keys() & level.keys()):
            element = source.element(tag)
            if element is not None:
                made = self._made(level[tag], element, source)
                if made is not None:
                    clean[tag] = made
        if level is ALLOWED:
            clean.PatientName = clean.PatientID = self.pid
            if self.age is not None:
                clean.PatientAge = self.age.written()
        return clean

    def _made(self, allowed: Allowed, element: _Element, source: _Source) -> DataElement | None:
        tag = Tag(allowed.tag)
        match allowed.rule:
            case Rule.EMPTY:
                return DataElement(tag, allowed.vr, [] if allowed.vr == "SQ" else "")
            case Rule.UID | Rule.CLASS | Rule.DATE | Rule.TIME | Rule.DATETIME | Rule.COUNT:
                return DataElement(tag, allowed.vr, self._text(allowed.rule, source.text(tag)))
            case Rule.TERM:
                return DataElement(tag, allowed.vr, self._term(allowed, source.text(tag)))
            case Rule.NUMBER:
                vr = self._number_vr(allowed.vr, element.vr)
                return DataElement(tag, vr, _unpacked(_numbers(element, vr, most=_most_values(allowed.tag))))
            case Rule.BYTES:
                return _bytes(allowed, element)
            case Rule.TABLE:
                return _table(allowed, element, source.element(_LUT_DESCRIPTOR))
            case Rule.CODES:
                return DataElement(tag, "SQ", self._codes(allowed, source))
            case Rule.ITEMS:
                return DataElement(tag, "SQ", [self.clean(item, allowed.items) for item in source.items(tag)])
            case Rule.PSEUDONYM | Rule.AGE:  # written whether the element is there or not
                return None

    def _text(self, rule: Rule, text: str) -> str | None:
        """Make the text that a rule for short texts leaves; empty when the text is not of its form."""
        match rule:
            case Rule.UID:
                return self.keys.uid(text) if _is_uid(text) else ""
            case Rule.CLASS:
                return self._class(text)
            case Rule.DATE:
                return self._shifted(_date(text))
            case Rule.DATETIME:
                return self._datetime(text)
            case Rule.TIME:
                found = _TIME.fullmatch(text)
                return f"{found[1]}0000" if found else ""
            case _:
                return text if _COUNT.fullmatch(text) else None

    def _class(self, text: str) -> str:
        """Replace a UID but the standard's own; one below the standard's root stays only when the standard really has it."""
        if not _is_uid(text):
            return ""
        if text.startswith(_STANDARD_ROOT):
            return text if _registered(text).type else ""
        return self.keys.uid(text)

    def _shifted(self, original: date | None) -> str:
        if original is None:
            return ""
        try:
            shifted = original + timedelta(days=self.days)
        except OverflowError:
            return ""
        return f"{shifted.year:04d}{shifted.month:02d}{shifted.day:02d}"

    def _datetime(self, text: str) -> str:
        match = _DATETIME.fullmatch(text)
        shifted = self._shifted(_date(match[1])) if match else ""
        return f"{shifted}{match[2]}0000" if match and match[2] and shifted else shifted

    def _term(self, allowed: Allowed, text: str) -> str | list[str]:
        """Map each value to the vocabulary; unknown ones are emptied, keep their place, and are counted."""
        terms = self.vocabulary.terms[allowed.vocabulary]
        values = text.split("\\") if text.count("\\") < min(_MAX_VALUES, _most_values(allowed.tag)) else [text]
        written: list[str] = []
        for value in (part.strip(_PADDING) for part in values):
            found = terms.find(value) if value else ""
            if found is None:
                self.dropped.append((allowed.keyword, self.keys.term(allowed.keyword, value)))
            written.append(terms.otherwise if found is None else found)
        return written[0] if len(written) == 1 else written

    def _codes(self, allowed: Allowed, source: _Source) -> list[Dataset]:
        listed, kept = self.vocabulary.codes[allowed.vocabulary], []
        for item in source.items(allowed.tag):
            value, scheme = item.text(_CODE_VALUE), item.text(_CODING_SCHEME)
            coded = listed.get((scheme, value))
            if coded is None:
                self.dropped.append((allowed.keyword, self.keys.term(allowed.keyword, f"{scheme}:{value}")))
                continue
            clean = self.clean(item, allowed.items)
            clean.CodeValue, clean.CodingSchemeDesignator, clean.CodeMeaning = value, scheme, coded.meaning
            kept.append(clean)
        return kept

    def _number_vr(self, vr: str, stated: str) -> str:
        if vr != "US or SS":
            return vr
        return stated if stated in ("US", "SS") else ("SS" if self.is_signed else "US")


def _most_values(tag: int) -> float:
    """Give the largest value multiplicity of PS3.6, infinite where it is open."""
    most = dictionary_VM(tag).split("-")[-1]
    return int(most) if most.isdigit() else math.inf


def _numbers(element: _Element, vr: str, *, most: float = math.inf) -> list[int | float | str]:
    """Read numbers of `vr`; empty when a single value is none. DS and IS stay the text they are.

    More than `most` binary values are none at all: a name written where a number belongs is a row of numbers, too.
    """
    if vr in ("DS", "IS"):
        texts = [part.strip(_PADDING) for part in element.value.decode("latin-1").split("\\")]
        form, longest = (_DECIMAL, 16) if vr == "DS" else (_INTEGER, 12)
        fits = all(form.fullmatch(text) and len(text) <= longest and _in_range(text, vr) for text in texts)
        return list(texts) if fits else []
    code = _BINARY[element.vr if element.vr in _BINARY else vr]
    size = struct.calcsize(f"<{code}")
    if (element.vr and element.vr not in _BINARY) or len(element.value) % size or len(element.value) > size * most:
        return []
    values = struct.unpack(f"{'<' if element.is_little_endian else '>'}{len(element.value) // size}{code}", element.value)
    try:
        struct.pack(f"<{len(values)}{_BINARY[vr]}", *values)
    except (struct.error, OverflowError):
        return []
    return list(values)


def _in_range(text: str, vr: str) -> bool:
    return math.isfinite(float(text)) if vr == "DS" else -(2**31) <= int(text) < 2**31


def _unpacked(values: list[int | float | str]) -> list[int | float | str] | int | float | str | None:
    return values if len(values) > 1 else (values[0] if values else None)


def _bytes(allowed: Allowed, element: _Element) -> DataElement:
    """Keep bytes as they are, but for what stands around fragments."""
    value = _tidy(element.value) if element.value.startswith(_ITEM) else element.value
    vr = "OV" if allowed.vr == "OV" else ("OB" if element.vr == "OB" or element.is_undefined_length else "OW")
    made = DataElement(Tag(allowed.tag), vr, value)
    made.is_undefined_length = element.is_undefined_length
    return made


def _tidy(value: bytes) -> bytes:
    """Tidy fragments: a basic offset table that names anything but the starts of fragments is emptied, for it may say anything.

    Fragments of odd length, which PS3.5 A.4 forbids and some encoders write, get the byte that a writer would misplace.
    """
    parts, starts, at = list[bytes](), list[int](), 0
    while at + 8 <= len(value) and value.startswith(_ITEM, at):
        length = int.from_bytes(value[at + 4 : at + 8], "little")
        starts.append(at)
        parts.append(value[at + 8 : at + 8 + length])
        at += 8 + length
    if at != len(value) and value[at:] != _DELIMITER:
        return value
    first = 8 + len(parts[0])
    named = {first + int.from_bytes(parts[0][part : part + 4], "little") for part in range(0, len(parts[0]), 4)}
    if not named <= set(starts):
        parts[0] = b""
    padded = (part + b"\0" * (len(part) % 2) for part in parts)
    return b"".join(_ITEM + len(part).to_bytes(4, "little") + part for part in padded)


def _table(allowed: Allowed, element: _Element, descriptor: _Element | None) -> DataElement:
    """Keep the part of a look-up table that its descriptor speaks of; nothing of what is shorter, which may be a text.

    Words of a big-endian file become numbers, so that their order is told.
    """
    head = descriptor.value[:2] if descriptor is not None else b""
    entries = int.from_bytes(head, "little" if element.is_little_endian else "big") or 1 << 16
    size = 2 * entries if len(element.value) >= 2 * entries else entries + entries % 2
    value = element.value[:size]
    if len(head) < 2 or len(value) < size or element.is_undefined_length:
        value = b""
    if not element.is_little_endian and 0 < len(value) < 1 << 16:
        return DataElement(Tag(allowed.tag), "US", list(struct.unpack(f">{len(value) // 2}H", value)))
    return DataElement(Tag(allowed.tag), "OB" if element.vr == "OB" else "OW", value)


def _is_uid(text: str) -> bool:
    return len(text) <= _MAX_ID and _UID.fullmatch(text) is not None


def _registered(text: str) -> UID:
    """Give a UID as one that knows its name and its type; the type is empty when the standard does not register it."""
    return UID(text, validation_mode=IGNORE)


def _mark(clean: Dataset) -> None:
    """Say in the file what was done to it (PS3.15 E.1.1)."""
    clean.PatientIdentityRemoved = "YES"
    clean.DeidentificationMethod = [f"Osteon {node.__version__}", f"{PROFILE_EDITION} with CR and DX allow-list"]
    clean.DeidentificationMethodCodeSequence = [_code(value, meaning) for value, meaning in METHOD_CODES.items()]
    clean.LongitudinalTemporalInformationModified = "MODIFIED"


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _file_meta(clean: Dataset, transfer_syntax_uid: str) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID = clean.SOPClassUID
    meta.MediaStorageSOPInstanceUID = clean.SOPInstanceUID
    meta.TransferSyntaxUID = UID(transfer_syntax_uid)
    meta.ImplementationClassUID = UID(node.IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = node.IMPLEMENTATION_VERSION_NAME
    return meta


# --- what may not be archived --------------------------------------------------------------------------------------------------


def _hold(source: _Source, sop_class_uid: str, vocabulary: Vocabulary) -> tuple[Hold | None, str]:
    """Say why an image must be held, the strictest reason first: a modality cannot be released, the others can."""
    modality = vocabulary.terms["modality"].find(source.text(_MODALITY))
    if sop_class_uid not in ARCHIVED_CLASSES:
        known = _registered(sop_class_uid)
        return Hold.MODALITY, f"only CR and DX images are archived: this is {known.name if known.type else 'a private SOP class'}"
    if modality not in ARCHIVED_MODALITIES:
        return Hold.MODALITY, f"only CR and DX images are archived: the modality is {modality or 'not stated or unknown'}"
    burned_in = source.text(_BURNED_IN).upper()
    if burned_in not in ("", "NO"):
        return Hold.BURNED_IN, "Burned In Annotation is not NO: the pixels may show who the patient is"
    conversion = source.text(_CONVERSION_TYPE).upper()
    if conversion in _FILM or _is_digitiser(source, vocabulary):
        return Hold.DIGITISED, "the image was digitised from film, which may show who the patient is"
    image_type = re.sub(r"[\s_-]", "", source.text(_IMAGE_TYPE).upper())
    if any(word in image_type for word in _SCREEN):
        return Hold.SECONDARY, "Image Type says that it is a secondary image or a screen capture"
    if conversion or any(source.text(tag) for tag in _CAPTURE_DEVICE):
        return Hold.SECONDARY, "it comes from a workstation or capture device, not from an X-ray unit"
    return None, ""


def _is_digitiser(source: _Source, vocabulary: Vocabulary) -> bool:
    made_by = " ".join(source.text(tag).upper() for tag in (_MANUFACTURER, _MODEL, *_CAPTURE_DEVICE))
    return any(word in made_by for word in vocabulary.terms["digitiser"].known.values())


def _body_part(source: _Source, clean: Dataset, vocabulary: Vocabulary) -> str:
    """Give the coded body part: Body Part Examined, else the first anatomic region that has a term."""
    term = vocabulary.terms["body_part"].find(source.text(_BODY_PART))
    if term:
        return term
    listed = vocabulary.codes["anatomic_region"]
    regions = clean[_ANATOMIC_REGION].value if _ANATOMIC_REGION in clean else ()
    coded = (listed.get((item.CodingSchemeDesignator, item.CodeValue)) for item in regions)
    return next((code.body_part for code in coded if code is not None and code.body_part), "")
