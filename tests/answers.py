"""Findings, results and identities as the report gets them: of the images that `tests/studies.py` makes, or of any real file.

The identity is read here from the raw bytes of a Part 10 file by a small reader of its own, so that what the SR is compared with
has not passed through the code under test.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

from pydicom import dcmread
from pydicom.uid import UID, Comprehensive3DSRStorage

from node.keep.records import Abstention, CodedConcept, Findings, Identity, ImageFinding, RawElement, Result, StudyIdentity
from node.pseudonym import SiteKeys
from node.reply import report
from node.settings import Report

KEYS = SiteKeys.derive(bytes(range(32)))
NODE = report.NodeName.of("OSTEON", keys=KEYS, version="0.1.0")
CREATED = datetime(2026, 3, 4, 23, 30, 12, 345678, tzinfo=UTC)

CHARACTER_SET = 0x00080005
PATIENT = (0x00100010, 0x00100020, 0x00100021, 0x00100030, 0x00100040)
STUDY = (0x00200010, 0x00080020, 0x00080030, 0x00080050, 0x00081030, 0x00080090)
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}

EWING = CodedConcept("307608006", "SCT", "Ewing's sarcoma of bone")
OSTEOMYELITIS = CodedConcept("409780002", "SCT", "Acute osteomyelitis")
P_EWING = CodedConcept("P-EWING", "99OSTEON", "AI probability of Ewing's sarcoma")
P_OSTEOMYELITIS = CodedConcept("P-OSTEOMYELITIS", "99OSTEON", "AI probability of acute osteomyelitis")


def raw_elements(part10: bytes) -> Iterator[RawElement]:
    """Read the elements at the root of a Part 10 file in Explicit VR Little Endian, up to group 0040."""
    at = 144 + struct.unpack_from("<I", part10, 140)[0]
    while at < len(part10):
        tag, vr, value, at = _element(part10, at)
        if tag > 0x0040FFFF:
            return
        yield RawElement(tag, vr, value)


def _element(data: bytes, at: int) -> tuple[int, str, bytes, int]:
    """Read one element: tag, VR, value, and where the next one starts."""
    group, number, vr = struct.unpack_from("<HH2s", data, at)
    if vr in _LONG:
        (length,), at = struct.unpack_from("<I", data, at + 8), at + 12
    else:
        (length,), at = struct.unpack_from("<H", data, at + 6), at + 8
    end = _end_of_sequence(data, at) if length == 0xFFFFFFFF else at + length
    return group << 16 | number, vr.decode(), data[at:end], end


def _end_of_sequence(data: bytes, at: int) -> int:
    """Find the end of a sequence of undefined length, whose items may have one too."""
    while True:
        group, number, length = struct.unpack_from("<HHI", data, at)
        at += 8
        if (group, number) == (0xFFFE, 0xE0DD):
            return at
        if length != 0xFFFFFFFF:
            at += length
            continue
        while struct.unpack_from("<HH", data, at) != (0xFFFE, 0xE00D):
            at = _element(data, at)[3]
        at += 8


def identity(part10: bytes) -> Identity:
    """Give the identity of an image, as the vault would keep it."""
    raw = {element.tag: element for element in raw_elements(part10)}
    dataset = dcmread(BytesIO(part10), stop_before_pixels=True)
    return Identity(
        pid=KEYS.pid("SITE", dataset.PatientID or "none"),
        study_uid=KEYS.uid(dataset.StudyInstanceUID),
        series_uid=KEYS.uid(dataset.SeriesInstanceUID),
        sop_uid=KEYS.uid(dataset.SOPInstanceUID),
        sop_class_uid=str(dataset.SOPClassUID),
        original_study_uid=str(dataset.StudyInstanceUID),
        original_series_uid=str(dataset.SeriesInstanceUID),
        original_sop_uid=str(dataset.SOPInstanceUID),
        character_set=raw.get(CHARACTER_SET),
        patient=tuple(raw[tag] for tag in PATIENT if tag in raw),
        study=tuple(raw[tag] for tag in STUDY if tag in raw),
        birth_date="",
        sex="",
    )


def study_identity(image: Identity) -> StudyIdentity:
    """Give the identity of the study of `image`."""
    return StudyIdentity(
        pid=image.pid,
        study_uid=image.study_uid,
        original_study_uid=image.original_study_uid,
        character_set=image.character_set,
        patient=image.patient,
        study=image.study,
    )


def findings(
    images: Sequence[Identity], /, *, abstention: Abstention | None = None, modality: str = "CR", **other: Any
) -> Findings:
    """Say Ewing's sarcoma with 83.4 % of `images`, or abstain."""
    said = abstention is None
    values: dict[str, Any] = {
        "study_uid": images[0].study_uid,
        "model_id": "ewing-0007",
        "model_name": "Osteon ewing_small",
        "weights_sha256": "ab" * 32,
        "classes": (EWING, OSTEOMYELITIS),
        "probability_names": (P_EWING, P_OSTEOMYELITIS),
        "probabilities": (0.8342, 0.1658) if said else None,
        "chosen": 0 if said else None,
        "abstention": abstention,
        "images": tuple(
            ImageFinding(image.sop_uid, modality, (1.6, 0.0) if said else None, abstention)
            for image in sorted(images, key=lambda one: one.sop_uid)
        ),
        "rule": "mean of the calibrated logits",
        "parameters": ("Threshold: 0.5", "Temperature: 1.31"),
        "training_mix": "104/98",
        "in_corpus": False,
        "body_part": "LEG",
    }
    return Findings(**(values | other))


def result(of: Findings, **other: Any) -> Result:
    """Store `of` at a fixed time."""
    values: dict[str, Any] = {
        "id": 1,
        "study_uid": of.study_uid,
        "model_id": of.model_id,
        "content_digest": "c" * 64,
        "settings_digest": "d" * 64,
        "findings": of,
        "created_at": CREATED,
        "run": 1,
        "predecessor": None,
    }
    return Result(**(values | other))


def document(
    images: Sequence[bytes],
    /,
    *,
    sop_class_uid: UID = Comprehensive3DSRStorage,
    settings: Report | None = None,
    abstention: Abstention | None = None,
    run: int = 1,
    finding: dict[str, Any] | None = None,
    **other: Any,
) -> report.Built:
    """Build the SR of a study given as Part 10 files; `finding` changes the findings, `other` goes to `report.build`."""
    identities = [identity(image) for image in images]
    said = findings(identities, abstention=abstention, **(finding or {}))
    values: dict[str, Any] = {
        "result": result(said, run=run),
        "study": study_identity(identities[0]),
        "images": identities,
        "node": NODE,
        "settings": settings or Report(),
        "sop_class_uid": sop_class_uid,
        "keys": KEYS,
        "zone": UTC,
    }
    return report.build(said, **(values | other))


def with_raw(part10: bytes, **changes: bytes) -> bytes:
    """Give a Part 10 file whose elements (`x00100010=b"…"`) hold exactly these bytes."""
    dataset = dcmread(BytesIO(part10))
    out = part10
    for name, value in changes.items():
        tag = int(name[1:], 16)
        element = dataset[tag]
        head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, element.VR.encode())
        start = out.index(head)
        (length,) = struct.unpack_from("<H", out, start + 6)
        out = out[: start + 6] + struct.pack("<H", len(value)) + value + out[start + 8 + length :]
    return out


def odd_identity(identity: StudyIdentity, elements: Mapping[int, RawElement]) -> StudyIdentity:
    """Give `identity` the bytes of `elements`."""
    return dataclasses.replace(
        identity,
        character_set=elements.get(CHARACTER_SET),
        patient=tuple(elements[tag] for tag in PATIENT if tag in elements),
        study=tuple(elements[tag] for tag in STUDY if tag in elements),
    )
