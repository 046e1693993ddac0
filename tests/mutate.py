"""Damage data sets as broken senders, networks and disks do: always the same damage for the same seed.

A data set is taken as the bytes of its elements (`Seed`), so that tags, VRs and lengths can be changed where they stand; the
joined bytes are then cut and flipped. Every text of a seed that names somebody is made of `TOKEN` again and again: a flipped bit
leaves enough of it to be found.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from pydicom.dataset import FileDataset
from studies import elements, quiet

TOKEN = "QXZVWK"
NAME = f"{TOKEN * 4}^{TOKEN * 2}"
_NAMED = (
    *("PatientName", "OtherPatientNames", "PatientComments", "PatientAddress", "ReferringPhysicianName", "OperatorsName"),
    *("InstitutionName", "StationName", "StudyDescription", "SeriesDescription", "ImageComments", "DerivationDescription"),
)
_VRS = b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OW PN SH SL SQ SS ST TM UC UI UL UN UR US UT ZZ".split()
_LONG = b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split()
_CHARSETS = (
    *(b"", b"ISO_IR 192", b"ISO_IR 100", b"ISO_IR 13", b"ISO_IR 9999", b"GB18030", b"GBK ", b"ISO-IR 192", b"\\\\\\", b"utf8"),
    *(
        b"ISO 2022 IR 13\\ISO 2022 IR 87",
        b"\\ISO 2022 IR 149",
        b"\\ISO 2022 IR 58",
        b"ISO_IR 192\\ISO 2022 IR 87",
        b"\0\0\xff\xfe",
    ),
)
_WORDS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)
_TAGS = (
    *(0x00080005, 0x00080016, 0x00080018, 0x00080060, 0x00081030, 0x00100010, 0x00100020, 0x00100030, 0x00101010, 0x0020000D),
    *(0x0020000E, 0x00280002, 0x00280010, 0x00280011, 0x00280100, 0x00281050, 0x00283010, 0x00082218, 0x00540220, 0x00090010),
    *(0x00091001, 0x60003000, 0x60000022, 0x7FE00010, 0x7FE00001, 0xFFFCFFFC, 0xFFFEE000, 0xFFFEE0DD, 0x00020010, 0x00000000),
)


@dataclass(frozen=True)
class Seed:
    """A valid data set as the bytes of its elements."""

    name: str
    parts: tuple[bytes, ...]
    syntax: str
    sop_class: str
    sop_uid: str
    little_endian: bool
    implicit: bool

    @classmethod
    def of(cls, name: str, dataset: FileDataset) -> Seed:
        """Plant the names, and take the data set apart."""
        with quiet():
            for keyword in _NAMED:
                setattr(dataset, keyword, NAME)
            syntax = dataset.file_meta.TransferSyntaxUID
            parts = tuple(part for tag, part in sorted(elements(dataset).items()) if part)
        return cls(
            name=name,
            parts=parts,
            syntax=str(syntax),
            sop_class=str(dataset.SOPClassUID),
            sop_uid=str(dataset.SOPInstanceUID),
            little_endian=syntax.is_little_endian,
            implicit=syntax.is_implicit_VR,
        )

    def anew(self, rng: random.Random) -> Seed:
        """Give the same image under a new SOP Instance UID of the same length."""
        new = self.sop_uid[:5] + "".join(str(rng.randint(1, 9)) for _ in self.sop_uid[5:])
        parts = tuple(part.replace(self.sop_uid.encode(), new.encode()) for part in self.parts)
        return Seed(self.name, parts, self.syntax, self.sop_class, new, self.little_endian, self.implicit)


Part = Callable[[random.Random, bytes, Seed], bytes]


def damaged(seed: Seed, others: list[Seed], rng: random.Random) -> bytes:
    """Damage a data set in one to four ways."""
    parts = list(seed.parts)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        at = rng.randrange(len(parts))
        way = rng.randrange(10)
        if way < len(_PARTS):
            parts[at] = _PARTS[way](rng, parts[at], seed)
        elif way == len(_PARTS):
            parts[at] = b""
        elif way == len(_PARTS) + 1:
            parts.insert(rng.randrange(len(parts)), parts[at])
        else:
            parts[at] = rng.choice(rng.choice(others).parts)
    if rng.random() < 0.15:
        parts = [_charset(rng, part, seed) if _tag(part, seed) == 0x00080005 else part for part in parts]
    raw = b"".join(parts)
    if raw and (raw == b"".join(seed.parts) or rng.random() < 0.4):
        raw = rng.choice(_BYTES)(rng, raw, b"".join(rng.choice(others).parts))
    return raw


def flipped(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """Flip one to eight bits, most of them in the header."""
    out = bytearray(raw)
    reach = len(out) if rng.random() < 0.3 else min(len(out), 2500)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """Drop the end."""
    return raw[: rng.randrange(len(raw))]


def spliced(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """Go on with another's bytes."""
    return raw[: rng.randrange(len(raw))] + other[rng.randrange(len(other)) :]


def stuffed(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """Put odd bytes somewhere into it, in place of what stood there or between."""
    at, junk = (
        rng.randrange(len(raw)),
        rng.choice((rng.randbytes(rng.randrange(1, 40)), b"\0" * 16, b"\xff" * 8, b"\x1b$B", b"\\" * 70)),
    )
    return raw[:at] + junk + raw[at + (len(junk) if rng.random() < 0.5 else 0) :]


_BYTES = (flipped, cut, spliced, stuffed)


def _order(seed: Seed) -> str:
    return "<" if seed.little_endian else ">"


def _tag(part: bytes, seed: Seed) -> int:
    if len(part) < 4:
        return -1
    group, number = struct.unpack_from(_order(seed) + "HH", part)
    return int(group << 16 | number)


def _other_tag(rng: random.Random, part: bytes, seed: Seed) -> bytes:
    tag = rng.choice((*_TAGS, _tag(rng.choice(seed.parts), seed)))
    return struct.pack(_order(seed) + "HH", tag >> 16, tag & 0xFFFF) + part[4:]


def _other_vr(rng: random.Random, part: bytes, seed: Seed) -> bytes:
    return part if seed.implicit else part[:4] + rng.choice(_VRS) + part[6:]


def _other_length(rng: random.Random, part: bytes, seed: Seed) -> bytes:
    long = not seed.implicit and part[4:6] in _LONG
    at, size = (8, 4) if long else (4, 4) if seed.implicit else (6, 2)
    if len(part) < at + size:
        return part
    (length,) = struct.unpack_from(_order(seed) + ("I" if size == 4 else "H"), part, at)
    new = rng.choice((length + 1, length - 1, length * 2, length // 2, 0, 0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, rng.randrange(200)))
    return part[:at] + struct.pack(_order(seed) + ("I" if size == 4 else "H"), new & (2 ** (8 * size) - 1)) + part[at + size :]


def _other_value(rng: random.Random, part: bytes, seed: Seed) -> bytes:
    """Write another value of the same length."""
    head = 12 if not seed.implicit and part[4:6] in _LONG else 8
    size = len(part) - head
    if size <= 0 or size > 4096:
        return part
    word = struct.pack(_order(seed) + "H", rng.choice(_WORDS))
    fill = rng.choice((word, b"\0", b" ", b"\\", b"9", b"-1e999\\", b"\xff", b"\x1b$B", b"^=", rng.randbytes(size)))
    return part[:head] + (fill * size)[:size]


def _nested(rng: random.Random, part: bytes, seed: Seed) -> bytes:
    """Put the element into the items of a sequence, well formed or open."""
    depth = rng.choice((1, 2, 30, 600))
    item = struct.pack(_order(seed) + "HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    tag = struct.pack(_order(seed) + "HH", 0x0040, 0x0275)
    head = tag + (b"" if seed.implicit else b"SQ\0\0") + b"\xff\xff\xff\xff"
    tail = struct.pack(_order(seed) + "HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    return (head + item) * depth + part + tail * (depth if rng.random() < 0.7 else 0)


def _charset(rng: random.Random, part: bytes, seed: Seed) -> bytes:
    value = rng.choice(_CHARSETS)
    value += b" " * (len(value) % 2)
    tag = struct.pack(_order(seed) + "HH", 0x0008, 0x0005)
    if seed.implicit:
        return tag + struct.pack("<I", len(value)) + value
    return tag + b"CS" + struct.pack(_order(seed) + "H", len(value)) + value


_PARTS: tuple[Part, ...] = (_other_tag, _other_vr, _other_length, _other_value, _nested, _charset)
