"""The seed test: a different sentinel in every place a person could be named, none of which may be left.

Every row of Table E.1-1 is planted with a value of its VR, at the root and inside the sequences that are kept and others;
besides private blocks, overlays, curves, group 0000 and 0002, group lengths, the preamble and what follows the pixels.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from io import BytesIO

import pytest
import studies
from pydicom import dcmread, dcmwrite
from pydicom.datadict import dictionary_VR
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from node.pseudonym import SiteKeys
from node.receive.profile import ALLOWED, Rule, action_of, table, told
from node.receive.pseudonymise import Pseudonymised, Rules, pseudonymise

KEYS = SiteKeys.derive(bytes(range(32)))
RULES = Rules.load(default_issuer="HOSPITAL", placeholder_patient_ids=["0"])
SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLosslessSV1,
    JPEGBaseline8Bit,
)
CHARACTER_SETS = {
    "": "Muller",
    "ISO_IR 100": "Müller",
    "ISO_IR 101": "Wałęsa",
    "ISO_IR 109": "Ĉapek",
    "ISO_IR 110": "Bērziņš",
    "ISO_IR 126": "Διονυσιος",
    "ISO_IR 127": "قباني",
    "ISO_IR 138": "שרון",
    "ISO_IR 144": "Люкceмбypг",
    "ISO_IR 148": "Çavuşoğlu",
    "ISO_IR 166": "ไทย",
    "ISO_IR 13": "ﾔﾏﾀﾞ",
    "ISO_IR 192": "王小東",
    "GB18030": "王小东",
    "GBK": "王小东",
    "\\ISO 2022 IR 87": "山田",
    "ISO 2022 IR 13\\ISO 2022 IR 87": "ﾔﾏﾀﾞ",
    "\\ISO 2022 IR 149": "김희중",
    "\\ISO 2022 IR 58": "张小东",
    "ISO_IR 999 QZMISSPELT": "Muller",
}
LONG = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "UC", "UN", "UR", "UT", "SV", "UV"})
TEXT_LENGTH = {"AE": 16, "CS": 16, "SH": 16}


@dataclass
class Seeds:
    """Makes elements as bytes, and remembers what was hidden in them."""

    syntax: UID
    planted: dict[bytes, str] = field(default_factory=dict)
    """Sentinel -> where it is."""

    def element(self, tag: int, vr: str, value: bytes, *, implicit: bool | None = None) -> bytes:
        end = "<" if self.syntax.is_little_endian else ">"
        value += (b"\0" if vr in LONG or vr == "UI" else b" ") * (len(value) % 2)
        head = struct.pack(f"{end}HH", tag >> 16, tag & 0xFFFF)
        if self.syntax.is_implicit_VR if implicit is None else implicit:
            return head + struct.pack(f"{end}L", len(value)) + value
        if vr in LONG:
            return head + vr.encode() + struct.pack(f"{end}HL", 0, len(value)) + value
        return head + vr.encode() + struct.pack(f"{end}H", len(value)) + value

    def item(self, content: bytes, *, undefined: bool = False) -> bytes:
        end = "<" if self.syntax.is_little_endian else ">"
        length = 0xFFFFFFFF if undefined else len(content)
        closed = struct.pack(f"{end}HHL", 0xFFFE, 0xE00D, 0) if undefined else b""
        return struct.pack(f"{end}HHL", 0xFFFE, 0xE000, length) + content + closed

    def word(self, where: str, length: int = 16) -> bytes:
        """Make a sentinel that no rule could produce, and remember it."""
        sentinel = f"QZ{len(self.planted):05d}X".encode()[:length]
        self.planted[sentinel] = where
        return sentinel

    def value(self, vr: str, where: str) -> bytes:
        number = len(self.planted)
        match vr:
            case "DA" | "DT":
                day = (date(1955, 1, 1) + timedelta(days=number)).strftime("%Y%m%d")
                sentinel = (day if vr == "DA" else f"{day}10{number // 60 % 60:02d}{number % 60:02d}.{number:06d}+0130").encode()
            case "TM":
                sentinel = f"10{number // 60 % 60:02d}{number % 60:02d}.{number:06d}".encode()
            case "UI":
                sentinel = f"1.2.826.0.77777.{number}.1".encode()
            case "DS" | "IS":
                sentinel = f"77{number:06d}77".encode()
            case "AS":
                sentinel = b"099Y"
            case "US" | "SS" | "UL" | "SL" | "FL" | "FD" | "AT":
                return b"QZ" + struct.pack(">H", number) * (
                    3 if vr == "FD" else 1
                )  # too short to be searched for: that the element is gone is checked by its tag
            case _:
                return self.word(where, TEXT_LENGTH.get(vr, 64))
        if vr != "AS":
            self.planted[sentinel] = where
        return sentinel

    def row(self, tag: int, where: str) -> bytes:
        vr = vr_of(tag)
        value = (
            self.item(self.person(where)) + self.item(self.person(where), undefined=True) if vr == "SQ" else self.value(vr, where)
        )
        return self.element(tag, vr, value)

    def person(self, where: str) -> bytes:
        """A person, as the item of a sequence: coded, named, described, in a private element and deeper."""
        inner = self.element(0x00080104, "LO", self.word(where)) + self.element(0x00100010, "PN", self.word(where))
        return (
            self.element(0x00080100, "SH", self.word(where))
            + self.element(0x00080104, "LO", self.word(where))
            + self.element(0x00090010, "LO", self.word(where))
            + self.element(0x00091001, "UN", self.word(where))
            + self.element(0x00100010, "PN", self.word(where))
            + self.element(0x00100020, "LO", self.word(where))
            + self.element(0x00180015, "CS", self.word(where))
            + self.element(0x00283003, "LO", self.word(where))
            + self.element(0x0040A730, "SQ", self.item(inner))
        )


def vr_of(tag: int) -> str:
    """Give the VR of a tag; of the table's newest rows, which pydicom does not know yet, by their name."""
    try:
        return dictionary_VR(tag).split(" ")[0]
    except KeyError:
        name = next(row.name for row in table() if row.tag == told(tag))
        return "SQ" if name.endswith("Sequence") else ("DT" if name.endswith("DateTime") else "LO")


def rows() -> Iterator[int]:
    """Every tag of the table below group 7FE0 that can stand in a data set."""
    for row in table():
        if row.tag.startswith("(gggg"):
            continue
        tag = int(row.tag.strip("()").replace("xx,xxxx", "02,3000").replace("xx", "02").replace(",", ""), 16)
        if 0x00030000 < tag < 0x7FE00000:
            yield tag


KEPT_SEQUENCES = (0x00081140, 0x00082112, 0x00082218, 0x00283000, 0x00283010, 0x00540220)
NO_ROW = (
    *(0x00080070, 0x00081090, 0x00180015, 0x00181020, 0x00181260, 0x00185101),
    *(0x00201206, 0x00280004, 0x00281055, 0x00080001, 0x00100099, 0x00287777),
)
"""Attributes without a row in the table, three of them unknown to the standard."""
NUMBERS = (0x00180050, 0x00180060, 0x00181150, 0x00181190, 0x00200011, 0x00281050, 0x00281052)
OVERLAY = ((0x0022, "LO"), (0x0040, "CS"), (0x1500, "LO"), (0x3000, "OW"), (0x4000, "LT"))
UNITS_WORD = {
    0x00080060: ("CS", b"DX"),
    0x00280301: ("CS", b"NO"),
    0x00100040: ("CS", b"F"),
    0x00100030: ("DA", b"19540301"),
    0x00101010: ("AS", b"001Y"),
}
"""What the image must say of itself, so that it is not held."""
NOT_HELD = (0x00080064, 0x00181010, 0x00181011, 0x00181016, 0x00181018)


def seeded(syntax: UID) -> tuple[bytes, Seeds]:
    """Encode an image of which every row of the table is planted; the pixels are those of a real one."""
    plain = ExplicitVRLittleEndian if syntax == DeflatedExplicitVRLittleEndian else syntax
    image = studies.image(transfer_syntax=plain, **({"bits_stored": 8, "dtype": "uint8"} if syntax == JPEGBaseline8Bit else {}))
    seeds, encoded = Seeds(plain), studies.elements(image)
    pixels = encoded.pop(0x7FE00010)
    encoded |= {tag: seeds.row(tag, "root") for tag in rows()}
    for tag in KEPT_SEQUENCES:
        nested = b"".join(seeds.row(row, f"in {tag:08X}") for row in sorted(rows()) if row not in KEPT_SEQUENCES)
        encoded[tag] = seeds.element(tag, "SQ", seeds.item(nested) + seeds.item(seeds.person(f"in {tag:08X}")))
    for tag in (group << 16 for group in (0x0009, 0x0019, 0x0029, 0x5001, 0x6001)):
        encoded[tag | 0x10] = seeds.element(tag | 0x10, "LO", seeds.word("private creator"))
        encoded[tag | 0x1001] = seeds.element(tag | 0x1001, "UN", seeds.word("private"))
        encoded[tag | 0x1002] = seeds.element(tag | 0x1002, "SQ", seeds.item(seeds.person("private")))
    for tag, vr in ((group << 16 | number, vr) for group in (0x5000, 0x501E, 0x6000, 0x601E) for number, vr in OVERLAY):
        encoded[tag] = seeds.element(tag, vr, seeds.word("overlay or curve"))
    for tag in (*NO_ROW, *NUMBERS):
        encoded[tag] = seeds.element(tag, "LO" if tag in NO_ROW[-3:] else vr_of(tag), seeds.word("no row in the table"))
    encoded[0x00080005] = seeds.element(0x00080005, "CS", b"ISO_IR 100")
    encoded[0x00100000] = seeds.element(0x00100000, "UL", b"QZUL")
    encoded |= {tag: seeds.element(tag, vr, value) for tag, (vr, value) in UNITS_WORD.items()}
    for tag in NOT_HELD:
        encoded.pop(tag, None)
    before = seeds.element(0x00020016, "AE", seeds.word("group 2")) + seeds.element(0x00020102, "OB", seeds.word("group 2"))
    after = (
        seeds.element(0x7FE10010, "LO", seeds.word("after the pixels"))
        + seeds.element(0x7FE11001, "OB", seeds.word("after the pixels"))
        + seeds.element(0xFFFAFFFA, "SQ", seeds.item(seeds.person("digital signature")))
        + seeds.element(0xFFFCFFFC, "OB", seeds.word("after the pixels"))
    )
    return before + b"".join(encoded[tag] for tag in sorted(encoded)) + pixels + after, seeds


def parsed(raw: bytes, syntax: UID, seeds: Seeds) -> FileDataset:
    """Read bytes of a C-STORE as the intake does, with sentinels in file meta and preamble."""
    plain = seeds.syntax
    found = read_dataset(BytesIO(raw), plain.is_implicit_VR, plain.is_little_endian)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1.1")
    meta.MediaStorageSOPInstanceUID = UID(seeds.value("UI", "file meta").decode())
    meta.TransferSyntaxUID = syntax
    meta.SourceApplicationEntityTitle = seeds.word("file meta").decode()
    meta.SendingApplicationEntityTitle = seeds.word("file meta").decode()
    meta.PrivateInformationCreatorUID = seeds.value("UI", "file meta").decode()
    meta.PrivateInformation = seeds.word("file meta")
    preamble = (seeds.word("preamble") * 16)[:128].ljust(128, b"\0")
    return FileDataset(
        "", found, preamble=preamble, file_meta=meta, is_implicit_VR=plain.is_implicit_VR, is_little_endian=plain.is_little_endian
    )


def written(found: Pseudonymised) -> bytes:
    """Write the file of the archive."""
    out = BytesIO()
    dcmwrite(out, found.clean, enforce_file_format=True)
    return out.getvalue()


def everything(found: Pseudonymised) -> bytes:
    """Give all that leaves for archive, catalogue and logs, as bytes; a deflated data set also as it is inside."""
    out = written(found) + repr((found.instance, found.hold, found.hold_detail, found.dropped)).encode()
    if found.clean.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
        inside = deepcopy(found.clean)
        inside.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        out += written(replace(found, clean=inside))
    return out


def check_nothing_left(out: bytes, planted: dict[bytes, str]) -> None:
    assert {sentinel: where for sentinel, where in planted.items() if sentinel in out} == {}


def test_the_sentinels_are_really_planted() -> None:
    raw, seeds = seeded(ExplicitVRLittleEndian)
    there = [where for sentinel, where in seeds.planted.items() if sentinel in raw]
    assert len(there) > 10_000
    assert {
        "root",
        "private",
        "overlay or curve",
        "digital signature",
        "group 2",
        *(f"in {tag:08X}" for tag in KEPT_SEQUENCES),
    } <= set(there)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
def test_no_sentinel_is_left_in_any_transfer_syntax(syntax: UID) -> None:
    raw, seeds = seeded(syntax)
    dataset = parsed(raw, syntax, seeds)
    found = pseudonymise(dataset, KEYS, RULES)
    check_nothing_left(everything(found), seeds.planted)
    assert found.hold is None
    file = dcmread(BytesIO(written(found)))
    assert file.preamble == b"\0" * 128
    assert [element.tag.group for element in file.file_meta] == [2] * 7
    assert file.PixelData == dataset.PixelData
    assert {
        element.tag for element in file.iterall() if element.tag.is_private or element.tag.group in range(0x5000, 0x6100)
    } == set()


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian], ids=lambda uid: uid.name
)
def test_each_row_got_the_action_of_the_table(syntax: UID) -> None:
    raw, seeds = seeded(syntax)
    found = pseudonymise(parsed(raw, syntax, seeds), KEYS, RULES)
    source, clean = parsed(raw, syntax, seeds), found.clean
    days = timedelta(
        days=KEYS.days("HOSPITAL" if "IssuerOfPatientID" not in source else source.IssuerOfPatientID, source.PatientID)
    )
    checked = set()
    for tag in rows():
        if tag not in ALLOWED:
            assert tag not in clean, f"{tag:08X}"
            continue
        rule, value, original = ALLOWED[tag].rule, clean[tag].value, source[tag].value
        checked.add(rule)
        match rule:
            case Rule.EMPTY:
                assert not value
            case Rule.PSEUDONYM:
                assert value == found.identity.pid
            case Rule.UID:
                assert value == KEYS.uid(original)
            case Rule.DATE:
                assert value == f"{studies.day(original) + days:%Y%m%d}"
            case Rule.TIME:
                assert value == "100000"
            case Rule.DATETIME:
                assert value == f"{studies.day(original[:8]) + days:%Y%m%d}100000"
            case Rule.TERM:
                assert (tag, value) == (0x00100040, "F")
            case Rule.AGE:
                assert (value, found.instance.age_years) == ("010M", 0)
            case Rule.ITEMS:
                assert all(set(item.keys()) <= ALLOWED[tag].items.keys() for item in value)
            case _:
                raise AssertionError(f"{tag:08X} is allowed as {rule}, but the table has a row for it: {action_of(tag)}")
    assert checked >= {Rule.EMPTY, Rule.PSEUDONYM, Rule.UID, Rule.DATE, Rule.TIME, Rule.DATETIME, Rule.TERM, Rule.AGE, Rule.ITEMS}


@pytest.mark.parametrize(("character_set", "name"), CHARACTER_SETS.items(), ids=[text or "none" for text in CHARACTER_SETS])
@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian], ids=lambda uid: uid.name
)
def test_no_character_set_lets_a_name_through_and_the_vault_gets_its_bytes(character_set: str, name: str, syntax: UID) -> None:
    spelt = studies.spelt(name, character_set)
    seeds = Seeds(syntax)
    sentinel = seeds.word("name") + b"^" + spelt
    image = studies.image(
        transfer_syntax=syntax, SpecificCharacterSet=None, PatientName=None, StudyDescription=None, BodyPartExamined=None
    )
    texts = {
        0x00080070: "LO",
        0x00081030: "LO",
        0x00081090: "LO",
        0x00100010: "PN",
        0x00180015: "CS",
        0x00104000: "LT",
        0x00281055: "LO",
    }
    encoded = studies.elements(image)
    encoded |= {tag: seeds.element(tag, vr, sentinel) for tag, vr in texts.items()}
    encoded[0x00080005] = seeds.element(0x00080005, "CS", character_set.encode())
    encoded[0x00400275] = seeds.element(0x00400275, "SQ", seeds.item(seeds.element(0x00400007, "LO", sentinel)))
    with studies.quiet():
        dataset = read_dataset(
            BytesIO(b"".join(encoded[tag] for tag in sorted(encoded))), syntax.is_implicit_VR, syntax.is_little_endian
        )
    dataset.file_meta = image.file_meta
    found = pseudonymise(dataset, KEYS, RULES)
    out = everything(found)
    check_nothing_left(out, seeds.planted | ({spelt: "name"} if not name.isascii() else {}))
    assert out.count(b"Muller") == 0
    identity = {element.tag: element.value for element in found.identity.patient}
    assert identity[0x00100010].rstrip(b" ") == sentinel
    assert found.identity.character_set is not None
    assert found.identity.character_set.value.rstrip(b" ") == character_set.encode()
    assert [keyword for keyword, _ in found.dropped] == ["Manufacturer", "ManufacturerModelName", "BodyPartExamined"]
