"""What happens to one image: identity, age, dates, vocabulary, holds, and what cannot be taken."""

from __future__ import annotations

import re
import struct
import subprocess
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shared
import studies
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.data import get_testdata_file
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from node.errors import BadSettings
from node.keep.records import Hold
from node.pseudonym import SiteKeys
from node.receive import profile
from node.receive.profile import ALLOWED, Allowed, Rule, Vocabulary, action_of, generated, table, with_generated
from node.receive.pseudonymise import Malformed, Pseudonymised, Rules, UnusablePatientID, pseudonymise

KEYS = SiteKeys.derive(bytes(range(32)))
RULES = Rules.load(default_issuer="HOSPITAL", placeholder_patient_ids=["0", "Anonymous"])


def taken(**options: Any) -> Pseudonymised:
    """Pseudonymise an image that was written to bytes and read again, as the intake does."""
    return pseudonymise(sent(**options), KEYS, RULES)


def sent(**options: Any) -> Dataset:
    with studies.quiet():  # pydicom warns of the odd values that these tests are about
        return studies.read(studies.part10(studies.image(**options)))


def file_of(found: Pseudonymised) -> bytes:
    out = BytesIO()
    dcmwrite(out, found.clean, enforce_file_format=True)
    return out.getvalue()


def with_raw(dataset: Dataset, tag: int, vr: str | None, value: bytes) -> Dataset:
    """Put an element into a data set that was read, as bytes that pydicom would not write."""
    little = dataset.original_encoding[1] is not False
    dataset[tag] = RawDataElement(Tag(tag), vr, len(value), value, 0, vr is None, little)
    return dataset


# --- identity ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, JPEG2000Lossless])
def test_the_identity_is_kept_as_vr_and_bytes_with_its_padding(syntax: UID) -> None:
    found = taken(transfer_syntax=syntax, PatientName="Ödön^Öz", charset="ISO_IR 100", PatientID="ID 7", IssuerOfPatientID="ACME")
    patient = {element.tag: (element.vr, element.value) for element in found.identity.patient}
    assert patient == {
        0x00100010: ("PN", "Ödön^Öz ".encode("latin-1")),
        0x00100020: ("LO", b"ID 7"),
        0x00100021: ("LO", b"ACME"),
        0x00100030: ("DA", studies.born(12).encode()),
        0x00100040: ("CS", b"M "),
    }
    assert found.identity.character_set is not None
    assert found.identity.character_set.value == b"ISO_IR 100"
    assert found.identity.original_study_uid == studies.uid("study", 1, 1)
    assert (found.identity.birth_date, found.identity.sex) == (studies.born(12), "M")
    assert {element.tag for element in found.identity.study} == {
        0x00080020,
        0x00080030,
        0x00080050,
        0x00080090,
        0x00081030,
        0x00200010,
    }


def test_values_that_somebody_looked_at_first_give_the_same_bytes() -> None:
    dataset = sent(PatientName="Ödön^Öz", charset="ISO_IR 100")
    before = pseudonymise(sent(PatientName="Ödön^Öz", charset="ISO_IR 100"), KEYS, RULES)
    assert str(dataset)  # converts every element
    after = pseudonymise(dataset, KEYS, RULES)
    assert after.identity == before.identity
    assert file_of(after) == file_of(before)


def test_an_undeclared_character_set_does_not_keep_an_image_out() -> None:
    dataset = with_raw(sent(), 0x00100010, "PN", b"\xffSECRET\x1b$Bx")
    found = pseudonymise(with_raw(dataset, 0x00080005, "CS", b"ISO_IR_NONE"), KEYS, RULES)
    assert found.identity.patient[0].value == b"\xffSECRET\x1b$Bx"
    assert b"SECRET" not in file_of(found)


def test_undecodable_patient_ids_stay_different_patients() -> None:
    pids = {
        pseudonymise(with_raw(sent(), 0x00100020, "LO", value), KEYS, RULES).identity.pid
        for value in (b"A\xff", b"A\xfe", b"A\xfd")
    }
    assert len(pids) == 3


def test_the_pseudonym_follows_issuer_and_id_and_an_absent_issuer_is_the_hospitals() -> None:
    same = {taken(PatientID=text).instance.pid for text in ("A 1", "A 1 ", " A 1")}
    assert same == {taken(PatientID="A 1", IssuerOfPatientID="HOSPITAL").instance.pid}
    assert taken(PatientID="A 1", IssuerOfPatientID="OTHER").instance.pid not in same
    assert taken(PatientID="a 1").instance.pid not in same


@pytest.mark.parametrize(
    "patient_id",
    ["", " ", "0", "ANONYMOUS", "anonymous ", "-", "?!", "000", "0-0", "x" * 65, "A\tB\x07C", "A\x1fB"],
    ids=lambda text: repr(text)[:16],
)
def test_a_patient_id_that_names_nobody_is_not_hashed(patient_id: str) -> None:
    with pytest.raises(UnusablePatientID) as refused:
        pseudonymise(with_raw(sent(), 0x00100020, "LO", patient_id.encode()), KEYS, RULES)
    assert len(patient_id) < 5 or patient_id not in str(refused.value)


@pytest.mark.parametrize("patient_id", ["0\u200b", "\uff10", "ANONYMOUS\u3000", "\u200b", "ａｎｏｎｙｍｏｕｓ"], ids=ascii)
def test_a_placeholder_is_known_however_it_is_spelt(patient_id: str) -> None:
    with pytest.raises(UnusablePatientID):
        taken(PatientID=patient_id)


def test_an_absent_patient_id_is_not_hashed() -> None:
    with pytest.raises(UnusablePatientID, match="empty"):
        taken(PatientID=None)


def test_look_up_keys_are_those_of_what_a_person_types() -> None:
    instance = taken(AccessionNumber="ACC 9 ", StudyID="7").instance
    assert instance.accession_key == KEYS.accession("HOSPITAL", "ACC 9")
    assert instance.study_id_key == KEYS.study_id("HOSPITAL", "7")
    assert taken(AccessionNumber=None).instance.accession_key == ""


def test_a_unit_has_one_pseudonym_that_no_file_holds() -> None:
    one, other = (taken(ManufacturerModelName="CXDI", DeviceSerialNumber=serial, StationName="XR7") for serial in ("SN1", "SN2"))
    assert one.instance.device != other.instance.device
    assert not any(text in file_of(one) for text in (b"SN1", b"XR7", one.instance.device.encode()))


# --- age -----------------------------------------------------------------------------------------------------------------------

AGES: Mapping[str, tuple[Mapping[str, Any], int | None, str | None]] = {
    "the day before the birthday": ({"birth_date": "20120311"}, 11, "011Y"),
    "the birthday": ({"birth_date": "20120310"}, 12, "012Y"),
    "born on a leap day, the 28th": ({"birth_date": "20120229", "study_date": "20130228"}, 0, "011M"),
    "born on a leap day, the 1st": ({"birth_date": "20120229", "study_date": "20130301"}, 1, "012M"),
    "an infant": ({"birth_date": "20230101"}, 1, "014M"),
    "a newborn": ({"birth_date": "20240310"}, 0, "000M"),
    "two years": ({"birth_date": "20220310"}, 2, "002Y"),
    "ninety-three": ({"birth_date": "19310101"}, 93, "090Y"),
    "with dots": ({"birth_date": "2012.03.10"}, 12, "012Y"),
    "born after the study": ({"birth_date": "20240311"}, None, None),
    "older than anybody": ({"birth_date": "19010202"}, None, None),
    "a placeholder": ({"birth_date": "19000101"}, None, None),
    "the zero of computers": ({"birth_date": "19700101"}, None, None),
    "no date at all": ({"birth_date": "UNKNOWN"}, None, None),
    "no such day": ({"birth_date": "20110230"}, None, None),
    "a placeholder and an age": ({"birth_date": "19000101", "PatientAge": "012Y"}, None, None),
    "dates and header agree": ({"birth_date": "20120310", "PatientAge": "011Y"}, 12, "012Y"),
    "dates and header disagree": ({"birth_date": "20120310", "PatientAge": "010Y"}, None, None),
    "header in months": ({"birth_date": "20220910", "PatientAge": "018M"}, 1, "018M"),
    "no birth date, an age": ({"birth_date": "", "PatientAge": "013Y"}, 13, "013Y"),
    "no birth date, weeks": ({"birth_date": "", "PatientAge": "010W"}, 0, "002M"),
    "no birth date, no zeros": ({"birth_date": "", "PatientAge": "7Y"}, 7, "007Y"),
    "no birth date, ninety-nine": ({"birth_date": "", "PatientAge": "099Y"}, 99, "090Y"),
    "no birth date, no age": ({"birth_date": ""}, None, None),
    "no birth date, a text": ({"birth_date": "", "PatientAge": "child"}, None, None),
    "only an acquisition date": ({"birth_date": "20120310", "StudyDate": "", "SeriesDate": None}, 12, "012Y"),
    "no date of the study": (
        {"birth_date": "20120310", "PatientAge": "012Y", "StudyDate": "", "SeriesDate": "", "AcquisitionDate": ""},
        12,
        "012Y",
    ),
}


@pytest.mark.parametrize("case", AGES)
def test_the_age_is_that_of_the_original_dates(case: str) -> None:
    options, years, written = AGES[case]
    found = taken(**options)
    assert found.instance.age_years == years
    assert found.clean.get("PatientAge") == written
    assert not found.clean.PatientBirthDate


# --- dates, UIDs, properties ---------------------------------------------------------------------------------------------------

dates = st.dates(min_value=studies.day("19300101"), max_value=studies.day("20991231"))
ids = st.text("ABCDEFghij0123456789-", min_size=1, max_size=20).filter(lambda text: re.search("[A-Za-z1-9]", text) is not None)


@settings(max_examples=25)
@given(ids, dates, dates)
def test_intervals_and_weekdays_of_a_patient_survive(patient_id: str, first: Any, second: Any) -> None:
    shifted = [
        studies.day(taken(PatientID=patient_id, study_date=f"{at:%Y%m%d}", birth_date="", rows=2, columns=2).clean.StudyDate)
        for at in (first, second)
    ]
    assert shifted[1] - shifted[0] == second - first
    assert shifted[0].weekday() == first.weekday()
    assert timedelta(weeks=1) <= first - shifted[0] <= timedelta(weeks=520)


@settings(max_examples=25)
@given(
    st.integers(1, 9), st.integers(1, 9), st.sampled_from([ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
)
def test_the_same_input_gives_the_same_output_and_the_syntax_changes_no_meaning(patient: int, instance: int, syntax: UID) -> None:
    options: dict[str, Any] = {"patient": patient, "instance": instance, "rows": 4, "columns": 4}
    one, again, other = taken(**options), taken(**options), taken(**options, transfer_syntax=syntax)
    assert file_of(one) == file_of(again)
    assert (one.identity, one.dropped) == (other.identity, other.dropped)
    del one.clean.PixelData, other.clean.PixelData
    assert one.clean == other.clean


@settings(max_examples=25)
@given(ids, ids)
def test_different_patients_differ_in_name_and_dates_go_with_the_patient(one: str, other: str) -> None:
    found = [taken(PatientID=text, rows=2, columns=2) for text in (one, other)]
    assert (found[0].clean.PatientID == found[1].clean.PatientID) == (one == other)
    assert found[0].clean.PatientName == found[0].clean.PatientID == found[0].identity.pid


def test_uid_references_resolve_within_the_set() -> None:
    first, second = studies.study(images=2)
    second.SourceImageSequence = [Dataset()]
    second.SourceImageSequence[0].ReferencedSOPClassUID = first.SOPClassUID
    second.SourceImageSequence[0].ReferencedSOPInstanceUID = first.SOPInstanceUID
    clean = [pseudonymise(studies.read(studies.part10(image)), KEYS, RULES).clean for image in (first, second)]
    assert clean[1].SourceImageSequence[0].ReferencedSOPInstanceUID == clean[0].SOPInstanceUID
    assert clean[0].StudyInstanceUID == clean[1].StudyInstanceUID != first.StudyInstanceUID


@settings(max_examples=10)
@given(st.sampled_from([ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEG2000Lossless]), st.integers(1, 5))
def test_the_file_meta_says_what_the_data_set_says(syntax: UID, instance: int) -> None:
    file = dcmread(BytesIO(file_of(taken(transfer_syntax=syntax, instance=instance))))
    meta = file.file_meta
    assert meta.MediaStorageSOPInstanceUID == file.SOPInstanceUID
    assert meta.MediaStorageSOPClassUID == file.SOPClassUID
    assert meta.TransferSyntaxUID == syntax
    assert np.array_equal(file.pixel_array, studies.image(instance=instance).pixel_array)


def test_times_keep_their_hour_and_odd_dates_and_times_are_emptied() -> None:
    found = taken(
        StudyTime="235959.123456",
        SeriesTime="10:15:30",
        AcquisitionTime="0915",
        ContentTime="",
        AcquisitionDateTime="20240310101530.5+0100",
    )
    clean = found.clean
    assert (clean.StudyTime, clean.SeriesTime, clean.AcquisitionTime, clean.ContentTime) == ("230000", "100000", "090000", "")
    assert clean.AcquisitionDateTime == f"{clean.StudyDate}100000"
    odd = with_raw(with_raw(sent(), 0x00080021, "DA", b"SECRET^NAME"), 0x00080031, "TM", b"9 o'clock ")
    odd = with_raw(with_raw(odd, 0x00080022, "DA", b"00010103"), 0x0008002A, "DT", b"2024")
    clean = pseudonymise(odd, KEYS, RULES).clean
    assert (clean.SeriesDate, clean.SeriesTime, clean.AcquisitionDate, clean.AcquisitionDateTime) == ("", "", "", "")


@pytest.mark.parametrize("value", ["1.2.840.10008.SECRET", "1.2.840.10008.19541231.7", "SECRET^NAME", "1." * 40 + "1", "1..2"])
def test_what_is_no_uid_does_not_pass_as_one(value: str) -> None:
    clean = pseudonymise(with_raw(sent(), 0x00200052, "UI", value.encode()), KEYS, RULES).clean
    assert clean.FrameOfReferenceUID in ("", KEYS.uid(value))
    assert value.encode() not in file_of(pseudonymise(with_raw(sent(), 0x00200052, "UI", value.encode()), KEYS, RULES))


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"])
@pytest.mark.parametrize("value", ["1.2.840.10008.19541231.7", "1.2.840.10008.1.2"])
def test_a_uid_below_the_standards_root_is_replaced_in_file_and_catalogue(keyword: str, value: str) -> None:
    found = taken(**{keyword: value})
    assert found.clean[keyword].value == KEYS.uid(value) != value
    clean, instance = found.clean, found.instance
    assert (clean.StudyInstanceUID, clean.SeriesInstanceUID) == (instance.study_uid, instance.series_uid)
    assert dcmread(BytesIO(file_of(found))).file_meta.MediaStorageSOPInstanceUID == instance.sop_uid == found.identity.sop_uid


def test_digits_of_another_script_are_no_digits() -> None:
    dataset = with_raw(sent(), 0x00080005, "CS", b"ISO_IR 192")
    for tag, vr, value in ((0x00080030, "TM", "1٣1530"), (0x0008002A, "DT", "202403101٣1530"), (0x00080021, "DA", "2024031٠")):
        with_raw(dataset, tag, vr, value.encode())
    found = pseudonymise(dataset, KEYS, RULES)
    assert (found.clean.StudyTime, found.clean.AcquisitionDateTime, found.clean.SeriesDate) == ("", "", "")
    assert file_of(found)
    with pytest.raises(Malformed):
        pseudonymise(with_raw(dataset, 0x0020000D, "UI", "1.2.٣".encode()), KEYS, RULES)


# --- texts, numbers, tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "term"),
    [
        ("LEG", "LEG"),
        ("leg ", "LEG"),
        ("UNTERSCHENKEL", "LOWERLEG"),
        ("Lower Leg", "LOWERLEG"),
        ("TIB/FIB", "TIBIAFIBULA"),
        ("KNÖCHEL", "ANKLE"),
        ("MR SECRET'S LEG", ""),
        ("", ""),
    ],
)
def test_a_body_part_passes_only_as_a_term(typed: str, term: str) -> None:
    dataset = with_raw(sent(AnatomicRegionSequence=[]), 0x00180015, "CS", typed.encode("utf-8"))
    found = pseudonymise(dataset, KEYS, RULES)
    assert (found.clean.BodyPartExamined, found.instance.body_part) == (term, term)
    assert found.dropped == ((("BodyPartExamined", KEYS.term("BodyPartExamined", typed)),) if typed and not term else ())


def test_without_a_body_part_the_coded_region_says_it() -> None:
    assert taken(BodyPartExamined="").instance.body_part == "LOWERLEG"
    assert taken(BodyPartExamined=None, AnatomicRegionSequence=None).instance.body_part == ""


def test_codes_pass_with_the_vocabularys_meaning_and_others_go() -> None:
    region = [studies.coded("T-D9400", "SRT", "The leg of Mr Secret"), studies.coded("99", "99LOCAL", "Secret")]
    found = taken(AnatomicRegionSequence=region)
    (item,) = found.clean.AnatomicRegionSequence
    assert (item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning) == ("T-D9400", "SRT", "Lower leg")
    assert found.dropped == (("AnatomicRegionSequence", KEYS.term("AnatomicRegionSequence", "99LOCAL:99")),)


def test_an_unknown_value_keeps_its_place_among_others_and_a_needed_one_is_replaced() -> None:
    found = taken(ImageType=["ORIGINAL", "PRIMARY", "SECRET"], RescaleType="SECRET", Manufacturer="Secret & Sons")
    assert list(found.clean.ImageType) == ["ORIGINAL", "PRIMARY", ""]
    assert found.clean.RescaleType == "US"
    assert found.clean.Manufacturer == ""
    assert [keyword for keyword, _ in found.dropped] == ["ImageType", "Manufacturer", "RescaleType"]


def test_a_flood_of_unknown_words_is_counted_up_to_a_bound() -> None:
    flood = "\\".join(f"SECRET{number}" for number in range(10_000)).encode()
    found = pseudonymise(with_raw(sent(), 0x00080008, "CS", flood), KEYS, RULES)
    assert (found.clean.ImageType, len(found.dropped)) == ("", 1)
    found = taken(AnatomicRegionSequence=[studies.coded(str(number), "99X", "Secret") for number in range(500)])
    assert len(found.dropped) == 100


def test_a_site_adds_its_words(tmp_path: Path) -> None:
    site = tmp_path / "words.toml"
    site.write_text('[terms.model]\nvalues = ["Bonescope 3"]\n[terms.body_part.synonyms]\n"BEINCHEN" = "LEG"\n', "utf-8")
    rules = Rules.load(default_issuer="HOSPITAL", site_vocabulary=site)
    found = pseudonymise(sent(ManufacturerModelName="BONESCOPE 3", BodyPartExamined="BEINCHEN"), KEYS, rules)
    assert (found.clean.ManufacturerModelName, found.clean.BodyPartExamined) == ("Bonescope 3", "LEG")
    assert taken(ManufacturerModelName="BONESCOPE 3").clean.ManufacturerModelName == ""


@pytest.mark.parametrize(
    "text",
    [
        "[terms.model\n",
        '[terms.modle]\nvalues = ["X"]\n',
        '[terms.model]\nvalue = ["X"]\n',
        '[terms.model]\nvalues = ["a\\\\b"]\n',
        '[terms.model]\nvalues = ["Müller"]\n',
        '[words]\nx = ["X"]\n',
        '[codes.view]\n"SCT:1" = []\n',
        '[terms.view]\npattern = ".*"\n',
    ],
)
def test_a_wrong_vocabulary_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    site = tmp_path / "words.toml"
    site.write_text(text, "utf-8")
    with pytest.raises(BadSettings, match=r"words\.toml"):
        Vocabulary.load(site)
    with pytest.raises(BadSettings, match=r"missing\.toml"):
        Vocabulary.load(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    "value", [b"SECRET^NAME", b"1e999 ", b"12 34 ", b"1,5 ", b"1.5\\SECRET", b"NaN ", b"0x1F", b"123456789012345678"]
)
def test_a_number_that_is_none_is_emptied(value: bytes) -> None:
    clean = pseudonymise(with_raw(sent(), 0x00180060, "DS", value), KEYS, RULES).clean
    assert clean.KVP is None
    clean = pseudonymise(with_raw(sent(), 0x00200011, "IS", value), KEYS, RULES).clean
    assert clean.SeriesNumber is None


def test_numbers_stay_as_they_were_spelt() -> None:
    clean = dcmread(BytesIO(file_of(taken(KVP="055.0", ImagerPixelSpacing=["0.1250", "1.25e-1"], SeriesNumber="007")))).copy()
    raw = [clean.get_item(tag).value for tag in (0x00180060, 0x00181164, 0x00200011)]
    assert raw == [b"055.0 ", b"0.1250\\1.25e-1", b"007 "]


def test_a_number_in_another_binary_vr_is_kept_and_a_text_is_not() -> None:
    clean = pseudonymise(with_raw(sent(), 0x00280010, "UL", struct.pack("<L", 64)), KEYS, RULES).clean
    assert clean.Rows == 64
    clean = pseudonymise(with_raw(sent(), 0x00280010, "LO", b"SECRET"), KEYS, RULES).clean
    assert clean.Rows is None
    clean = pseudonymise(with_raw(sent(), 0x00280010, "UL", struct.pack("<L", 70_000)), KEYS, RULES).clean
    assert clean.Rows is None


def test_elements_in_vr_un_are_read_as_what_they_are() -> None:
    dataset = with_raw(sent(), 0x00100020, "UN", b"PID00001")
    for tag, value in ((0x00180060, b"55"), (0x00280011, struct.pack("<H", 48)), (0x00180015, b"KNEE")):
        with_raw(dataset, tag, "UN", value)
    source = studies.encoded_implicit(studies.coded("72696002", "SCT", "SECRET"))
    with_raw(dataset, 0x00082218, "UN", struct.pack("<HHL", 0xFFFE, 0xE000, len(source)) + source)
    found = pseudonymise(dataset, KEYS, RULES)
    assert found.instance.pid == taken().instance.pid
    assert found.identity.patient[1].vr == "LO"
    assert (found.clean.KVP, found.clean.Columns, found.clean.BodyPartExamined) == (55, 48, "KNEE")
    assert found.clean.AnatomicRegionSequence[0].CodeMeaning == "Knee"


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_look_up_tables_survive_and_their_explanations_do_not(syntax: UID) -> None:
    table = Dataset()
    table.add_new(0x00283002, "US", [3, 0, 16])
    table.LUTExplanation = "SECRET^NAME"
    table.add_new(0x00283006, "US", [1, 258, 65535])
    found = taken(VOILUTSequence=[table], transfer_syntax=syntax, WindowCenterWidthExplanation="SECRET^NAME")
    raw = file_of(found)
    assert b"SECRET" not in raw
    (kept,) = dcmread(BytesIO(raw)).VOILUTSequence
    data = kept.LUTData
    assert list(kept.LUTDescriptor) == [3, 0, 16]
    assert (list(np.frombuffer(data, "<u2")) if isinstance(data, bytes) else list(data)) == [1, 258, 65535]


@pytest.mark.parametrize("keyword", ["SeriesNumber", "AcquisitionNumber", "InstanceNumber", "ImagesInAcquisition"])
@pytest.mark.parametrize(("number", "kept"), [("19541231", None), ("47113", None), ("-1", None), ("1001", 1001)])
def test_a_running_number_is_no_place_for_a_date_or_an_accession_number(keyword: str, number: str, kept: int | None) -> None:
    found = taken(**{keyword: number, "AccessionNumber": number})
    assert found.clean[keyword].value == kept
    assert kept is not None or number.encode() not in file_of(found)


def test_more_values_than_an_attribute_has_are_one_unknown_text() -> None:
    found = taken(PatientOrientation=["RAL", "PH", "HAL"], BodyPartExamined=["LEG", "KNEE"])
    assert (found.clean.PatientOrientation, found.clean.BodyPartExamined) == ("", "")
    assert {keyword for keyword, _ in found.dropped} == {"PatientOrientation", "BodyPartExamined"}
    assert list(taken(PatientOrientation=["L", "F"]).clean.PatientOrientation) == ["L", "F"]


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("descriptor", [[3, 0, 16], None])
def test_what_follows_a_look_up_table_or_is_none_goes(syntax: UID, descriptor: list[int] | None) -> None:
    table = Dataset()
    if descriptor:
        table.add_new(0x00283002, "US", descriptor)
    table.add_new(0x00283006, "OW", b"\1\2\3\4\5\6SECRET^NAME ")
    raw = file_of(taken(VOILUTSequence=[table], transfer_syntax=syntax))
    assert b"SECRET" not in raw
    assert b"ESRCTEN" not in raw
    assert descriptor is None or dcmread(BytesIO(raw)).VOILUTSequence[0].LUTData


@pytest.mark.parametrize(("value", "vr", "length"), [(b"SECRET", "LT", 6), (b"SECRET^NAME!", "UN", 0xFFFFFFFF)])
def test_a_text_in_the_place_of_a_look_up_table_goes(value: bytes, vr: str, length: int) -> None:
    table = Dataset()
    table.add_new(0x00283002, "US", [8, 0, 16])
    dataset = sent(VOILUTSequence=[table])
    dataset.VOILUTSequence[0][0x00283006] = RawDataElement(Tag(0x00283006), vr, length, value, 0, False, True)
    assert b"SECRET" not in file_of(pseudonymise(dataset, KEYS, RULES))


@pytest.mark.parametrize(
    ("table", "kept"),
    [(b"", b""), (b"\0\0\0\0", b"\0\0\0\0"), (b"\0\0\0\0\x14\0\0\0", b"\0\0\0\0\x14\0\0\0"), (b"SECRET^NAME ", b"")],
)
@pytest.mark.parametrize("length", [None, 0xFFFFFFFF])
@pytest.mark.parametrize("end", [b"", b"\xfe\xff\xdd\xe0\0\0\0\0"])
def test_a_basic_offset_table_stays_only_when_it_names_fragments(
    table: bytes, kept: bytes, length: int | None, end: bytes
) -> None:
    dataset, stream = sent(transfer_syntax=JPEG2000Lossless), b"\xff\x4f" + b"x" * 8 + b"\xff\xd9"
    first, *rest = (struct.pack("<HHL", 0xFFFE, 0xE000, len(part)) + part for part in (table, stream, stream))
    value = b"".join((first, *rest, end))
    dataset[0x7FE00010] = RawDataElement(Tag(0x7FE00010), "OB", length or len(value), value, 0, False, True)
    found = dcmread(BytesIO(file_of(pseudonymise(dataset, KEYS, RULES)))).PixelData
    assert found == b"".join((struct.pack("<HHL", 0xFFFE, 0xE000, len(kept)), kept, *rest))


def test_us_or_ss_follows_the_pixel_representation_in_implicit_vr() -> None:
    signed = taken(transfer_syntax=ImplicitVRLittleEndian, dtype="int16", bits_stored=15, PixelPaddingValue=-5)
    assert (signed.clean["PixelPaddingValue"].VR, signed.clean.PixelPaddingValue) == ("SS", -5)
    plain = taken(transfer_syntax=ImplicitVRLittleEndian, PixelPaddingValue=4095)
    assert (plain.clean["PixelPaddingValue"].VR, plain.clean.PixelPaddingValue) == ("US", 4095)


def test_fragments_of_odd_length_get_their_padding() -> None:
    dataset = sent(transfer_syntax=JPEG2000Lossless)
    stream = b"\xff\x4f" + b"x" * 9 + b"\xff\xd9"
    odd = struct.pack("<HHL", 0xFFFE, 0xE000, 0) + struct.pack("<HHL", 0xFFFE, 0xE000, len(stream)) + stream
    dataset[0x7FE00010] = RawDataElement(Tag(0x7FE00010), "OB", 0xFFFFFFFF, odd, 0, False, True)
    kept = dcmread(BytesIO(file_of(pseudonymise(dataset, KEYS, RULES)))).PixelData
    assert kept == odd[:12] + struct.pack("<L", len(stream) + 1) + stream + b"\0"


# --- holds ---------------------------------------------------------------------------------------------------------------------

HOLDS: Mapping[str, tuple[Mapping[str, Any], Hold | None]] = {
    "DX": ({}, None),
    "CR": ({"modality": "CR"}, None),
    "secondary capture class": ({"SOPClassUID": SecondaryCaptureImageStorage}, Hold.MODALITY),
    "private class": ({"SOPClassUID": "1.2.3.4.5"}, Hold.MODALITY),
    "mammography": ({"Modality": "MG"}, Hold.MODALITY),
    "unknown modality": ({"Modality": "SECRET"}, Hold.MODALITY),
    "no modality": ({"Modality": ""}, Hold.MODALITY),
    "mammography, burned in": ({"Modality": "MG", "BurnedInAnnotation": "YES"}, Hold.MODALITY),
    "burned in": ({"BurnedInAnnotation": "YES"}, Hold.BURNED_IN),
    "burned in, perhaps": ({"BurnedInAnnotation": "MAYBE"}, Hold.BURNED_IN),
    "no word of it": ({"BurnedInAnnotation": ""}, None),
    "secondary": ({"ImageType": ["DERIVED", "SECONDARY"]}, Hold.SECONDARY),
    "screen save": ({"ImageType": ["DERIVED", "PRIMARY", "SCREEN SAVE"]}, Hold.SECONDARY),
    "screenshot": ({"ImageType": ["DERIVED", "PRIMARY", "", "SCREEN_CAPTURE"]}, Hold.SECONDARY),
    "derived": ({"ImageType": ["DERIVED", "PRIMARY"]}, None),
    "digitised film": ({"ConversionType": "DF"}, Hold.DIGITISED),
    "scanned": ({"ConversionType": "SI"}, Hold.DIGITISED),
    "workstation": ({"ConversionType": "WSD"}, Hold.SECONDARY),
    "film digitiser": ({"Manufacturer": "VIDAR Systems Corporation"}, Hold.DIGITISED),
    "film digitiser by its model": ({"ManufacturerModelName": "Film Digitizer 2905"}, Hold.DIGITISED),
    "capture device": ({"SecondaryCaptureDeviceManufacturer": "Secret"}, Hold.SECONDARY),
}


@pytest.mark.parametrize("case", HOLDS)
def test_what_may_show_a_name_or_is_no_radiograph_is_held(case: str) -> None:
    options, hold = HOLDS[case]
    found = taken(**options)
    assert found.hold is hold
    assert bool(found.hold_detail) == (hold is not None)
    assert "secret" not in found.hold_detail.lower()


# --- malformed -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"])
@pytest.mark.parametrize("value", [b"", b"SECRET^NAME", b"1.2.SECRET", b"1.2\\1.3", b"1" * 70, b"../../etc/passwd", b"1.2\0\0.3"])
def test_an_image_without_its_uids_is_malformed(keyword: str, value: bytes) -> None:
    with pytest.raises(Malformed) as refused:
        pseudonymise(with_raw(sent(), int(Tag(keyword)), "UI", value), KEYS, RULES)
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize(
    "value",
    [
        b"SECRET^NAME",
        b"\xfe\xff\x00\xe0\xff\xff\xff\x7fSECRET",
        b"\xfe\xff\x00\xe0",
        b"\xfe\xff\x00\xe0\x10\0\0\0\x08\0\0\x01SH\xff\x00SECRET^N",
    ],
)
def test_a_sequence_that_cannot_be_parsed_is_malformed_or_empty_but_never_passes(value: bytes) -> None:
    for tag in (0x00082218, 0x00283010, 0x00082112):
        try:
            found = pseudonymise(with_raw(sent(), tag, "SQ", value), KEYS, RULES)
            out = file_of(found)
        except Malformed as refused:
            out = str(refused).encode()
        assert b"SECRET" not in out


BROKEN = (ValueError, TypeError, KeyError, EOFError, NotImplementedError, OSError, struct.error)
"""What pydicom raises when it reads the flipped bytes below: the intake's to answer."""


def test_offset_tables_are_left_out_because_they_may_hold_anything() -> None:
    name = b"SECRET^NAME     "
    found = taken(transfer_syntax=JPEG2000Lossless, ExtendedOffsetTable=name, ExtendedOffsetTableLengths=name)
    assert b"SECRET" not in file_of(found)


@settings(max_examples=150)
@given(
    st.sampled_from([ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]),
    st.lists(st.tuples(st.integers(0, 1000), st.binary(min_size=1, max_size=4)), min_size=1, max_size=8),
)
def test_flipped_bytes_give_an_image_or_an_error_of_the_tree(syntax: UID, flips: list[tuple[int, bytes]]) -> None:
    image = studies.image(transfer_syntax=syntax, rows=4, columns=4)
    raw = bytearray(studies.encoded(image))
    for at, value in flips:
        raw[at : at + len(value)] = value
    try:
        with studies.quiet():
            dataset = read_dataset(BytesIO(bytes(raw)), syntax.is_implicit_VR, syntax.is_little_endian)
    except BROKEN:
        return
    dataset.file_meta = image.file_meta
    try:
        found = pseudonymise(dataset, KEYS, RULES)
    except (Malformed, UnusablePatientID):
        return
    assert file_of(found)


@pytest.mark.parametrize("tag", [0x00540220, 0x00400555, 0x00180060, 0x00180015, 0x00080020, 0x00282110])
def test_an_unknown_vr_does_not_crash(tag: int) -> None:
    for vr, value in (("S\xc0", b""), ("HQ", b"SECRET"), ("??", b"\xfe\xff\x00\xe0")):
        try:
            out = file_of(pseudonymise(with_raw(sent(), tag, vr, value), KEYS, RULES))
        except Malformed as refused:
            out = str(refused).encode()
        assert b"SECRET" not in out


def test_a_class_that_only_looks_like_the_standards_is_malformed() -> None:
    with pytest.raises(Malformed, match="SOP Class"):
        taken(SOPClassUID="1.2.840.10008.19541231.7")


def test_a_broken_sequence_that_is_dropped_does_not_keep_the_image_out() -> None:
    assert taken().clean == pseudonymise(with_raw(sent(), 0x00400275, "SQ", b"SECRET^NAME"), KEYS, RULES).clean


def test_deep_nesting_ends() -> None:
    content = b""
    for _ in range(2000):
        item = struct.pack("<HHL", 0xFFFE, 0xE000, len(content)) + content
        content = struct.pack("<HH2sHL", 0x0008, 0x2218, b"SQ", 0, len(item)) + item
    found = pseudonymise(with_raw(sent(), 0x00400275, "SQ", content), KEYS, RULES)
    assert found.clean == taken().clean
    found = pseudonymise(
        with_raw(sent(), 0x00082218, "SQ", struct.pack("<HHL", 0xFFFE, 0xE000, len(content)) + content), KEYS, RULES
    )
    assert not found.clean.AnatomicRegionSequence


def test_without_a_file_meta_the_syntax_is_the_one_it_was_read_in() -> None:
    raw = studies.encoded(studies.image(transfer_syntax=ImplicitVRLittleEndian))
    found = pseudonymise(dcmread(BytesIO(raw), force=True), KEYS, RULES)
    assert found.instance.transfer_syntax_uid == ImplicitVRLittleEndian
    assert dcmread(BytesIO(file_of(found))).pixel_array.shape == (64, 48)


def test_an_unknown_transfer_syntax_is_malformed() -> None:
    dataset = sent()
    dataset.file_meta.TransferSyntaxUID = UID("1.2.840.113619.5.2")
    with pytest.raises(Malformed, match="transfer syntax"):
        pseudonymise(dataset, KEYS, RULES)


def test_the_input_stays_as_it_was() -> None:
    dataset = sent()
    before = {tag: dataset.get_item(tag) for tag in dataset.keys()}  # noqa: SIM118 (iterating converts the elements)
    pseudonymise(dataset, KEYS, RULES)
    assert {tag: dataset.get_item(tag) for tag in dataset.keys()} == before  # noqa: SIM118


# --- the data and the page -----------------------------------------------------------------------------------------------------


def test_the_table_is_whole_and_compound_actions_are_resolved() -> None:
    assert len(table()) == 656
    assert {row.action for row in table()} == {"X", "Z", "D", "U", "U*", "K", "C"}
    assert [row.tag for row in table() if row.action == "K"] == ["(0010,0040)", "(0010,1010)"]
    assert (action_of(0x00091001), action_of(0x50020010), action_of(0x60023000), action_of(0x60020010)) == ("X", "X", "X", "")


def test_the_allow_list_names_vocabularies_that_exist() -> None:
    vocabulary = Vocabulary.load()

    def check(level: Mapping[int, Allowed]) -> None:
        for allowed in level.values():
            if allowed.rule is Rule.TERM:
                longest = max(map(len, [*vocabulary.terms[allowed.vocabulary].known.values(), ""]))
                assert longest <= {"CS": 16, "SH": 16, "LO": 64}[allowed.vr], allowed.keyword
            elif allowed.rule is Rule.CODES:
                assert vocabulary.codes[allowed.vocabulary]
            else:
                assert not allowed.vocabulary
            check(allowed.items)

    check(ALLOWED)
    bodies = {code.body_part for code in vocabulary.codes["anatomic_region"].values()} - {""}
    assert bodies <= set(vocabulary.terms["body_part"].known.values())


def test_no_rule_of_the_allow_list_is_laxer_than_the_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ps3.15-e1.csv").write_bytes((profile.HERE / "ps3.15-e1.csv").read_bytes())
    (tmp_path / "allowlist.csv").write_text("attribute,rule,vocabulary\nStudyDescription,term,view\nInstitutionName,number,\n")
    monkeypatch.setattr(profile, "HERE", tmp_path)
    with pytest.raises(ValueError, match="InstitutionName: `number` is laxer"):
        profile._read_allow_list()


def test_the_page_says_what_the_code_does() -> None:
    page = profile.PAGE.read_text("utf-8")
    assert with_generated(page) == page, "run `python -m node.receive.profile`"
    assert generated() in page
    assert "is not searched yet" in page
    assert "113101 |" not in page


def test_every_file_says_what_was_done_to_it() -> None:
    clean = taken().clean
    assert clean.PatientIdentityRemoved == "YES"
    assert all(len(text) <= 64 for text in clean.DeidentificationMethod)
    assert [item.CodeValue for item in clean.DeidentificationMethodCodeSequence] == ["113100", "113105", "113107", "113108"]
    assert clean.LongitudinalTemporalInformationModified == "MODIFIED"
    assert "SpecificCharacterSet" not in clean
    assert taken().instance.pixels_checked is False


# --- real images ---------------------------------------------------------------------------------------------------------------


def complaints(file: Path) -> Counter[str]:
    run = subprocess.run([shared.tool("dciodvfy"), "-new", str(file)], capture_output=True, check=False)
    lines = (run.stdout + run.stderr).decode("latin-1").splitlines()
    return Counter(line for line in lines if line.startswith("Error"))


@pytest.mark.parametrize("name", ["RG3_UNCR.dcm", "RG3_J2KR.dcm"])
def test_a_real_radiograph_stays_a_valid_object(name: str, tmp_path: Path) -> None:
    original = get_testdata_file(name, download=False)
    if original is None:
        pytest.skip("pydicom-data is not installed")
    dataset = dcmread(original)
    found = pseudonymise(dataset, KEYS, RULES)
    (tmp_path / name).write_bytes(file_of(found))
    assert complaints(tmp_path / name) - complaints(Path(original)) == Counter()
    assert found.clean.PixelData == dataset.PixelData
    assert found.instance.body_part == "EXTREMITY"
    assert b"fibroma" not in file_of(found)


@pytest.mark.parametrize("modality", ["CR", "DX"])
def test_the_test_images_are_valid_before_and_after(modality: str, tmp_path: Path) -> None:
    image = studies.image(modality=modality)
    (tmp_path / "in.dcm").write_bytes(studies.part10(image))
    (tmp_path / "out.dcm").write_bytes(file_of(taken(modality=modality)))
    assert complaints(tmp_path / "in.dcm") == complaints(tmp_path / "out.dcm") == Counter()


def test_real_files_of_every_kind_are_taken_held_or_refused_and_stay_valid(tmp_path: Path) -> None:
    """The shared files: nothing crashes, no identity is left, and radiographs have no new error."""
    archived = 0
    for file in sorted((shared.data("dicom") / "files").iterdir()):
        with studies.quiet():
            dataset = dcmread(file, force=True)
            names = [
                str(dataset.get(keyword, "")) for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "SOPInstanceUID")
            ]
        try:
            found = pseudonymise(dataset, KEYS, RULES)
        except (Malformed, UnusablePatientID):
            continue
        if found.hold is not None:
            continue
        archived += 1
        raw = file_of(found)
        assert not [name for name in names if len(name) > 5 and name.encode() in raw]
        out = tmp_path / file.name
        out.write_bytes(raw)
        assert complaints(out) - complaints(file) == Counter(), file.name
        out.unlink()
    assert archived >= 15


def test_sequences_of_pydicom_and_of_bytes_give_the_same(tmp_path: Path) -> None:
    """Undefined lengths are parsed by pydicom at once, defined ones when they are asked for."""
    one, other = studies.image(), studies.image()
    for element in one:
        if element.VR == "SQ":
            element.value.is_undefined_length = True
            element.is_undefined_length = True
    found = [pseudonymise(studies.read(studies.part10(image)), KEYS, RULES) for image in (one, other)]
    assert isinstance(studies.read(studies.part10(one)).get_item(0x00082218).value, Sequence)
    assert file_of(found[0]) == file_of(found[1])
