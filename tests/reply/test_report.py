"""The SR: whose it is (byte by byte), what it says, and that the same input gives the same bytes."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from io import BytesIO
from pathlib import Path

import answers
import highdicom.sr
import pytest
from answers import CHARACTER_SET, PATIENT, STUDY, raw_elements
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ComprehensiveSRStorage, EnhancedSRStorage
from studies import image, part10, study

from node.keep.records import Abstention, CodedConcept, ImageFinding
from node.reply import report
from node.settings import Inference, Report

IDENTITY = (CHARACTER_SET, *PATIENT, *STUDY)


def read(built: report.Built) -> Dataset:
    return dcmread(BytesIO(built.bytes))


def items(dataset: Dataset) -> Iterator[Dataset]:
    yield dataset
    for child in dataset.get("ContentSequence", []):
        yield from items(child)


def code(item: Dataset) -> str:
    """Give the code of an item's name."""
    return str(item.ConceptNameCodeSequence[0].CodeValue) if "ConceptNameCodeSequence" in item else ""


def group(dataset: Dataset) -> list[Dataset]:
    (found,) = [item for item in items(dataset) if code(item) == "125007"]
    return list(found.ContentSequence)


def named(content: list[Dataset], name: str) -> list[Dataset]:
    return [item for item in content if code(item) == name]


@pytest.fixture
def images() -> list[bytes]:
    return [part10(one) for one in study(modality="CR", images=2, IssuerOfPatientID="SITE")]


# --- whose it is ------------------------------------------------------------------------------------------------------------


HEADERS = {
    "latin-1": {"charset": "ISO_IR 100", "PatientName": "Müller^Jörg", "StudyDescription": "Unterschenkel rechts, Übersicht"},
    "utf-8": {"charset": "ISO_IR 192", "PatientName": "Wang^XiaoDong=王^小東="},
    "japanese": {"charset": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう"},
    "gb18030": {"charset": "GB18030", "PatientName": "Wang^XiaoDong=王^小东"},
    "ir 58": {"charset": ["", "ISO 2022 IR 58"], "PatientName": "Zhang^XiaoDong=张^小东="},
    "padded": {"charset": "ISO_IR 100", "PatientID": "PID00001   ", "AccessionNumber": "A1    ", "PatientName": "Doe^Jane  "},
    "empty": {"charset": "ISO_IR 100", "AccessionNumber": "", "StudyID": "", "PatientBirthDate": ""},
    "absent": {"charset": "ISO_IR 100", "AccessionNumber": None, "StudyDescription": None, "ReferringPhysicianName": None},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_the_identity_elements_are_the_bytes_that_came(header: dict[str, object]) -> None:
    original = part10(image(modality="CR", **header))  # type: ignore[arg-type]
    built = answers.document([original])
    came = {element.tag: element for element in raw_elements(original) if element.tag in IDENTITY}
    left = {element.tag: element for element in raw_elements(built.bytes) if element.tag in came}
    assert left == came


ODD = {
    "mislabelled character set": {"x00080005": b"ISO-IR 100", "x00100010": "Wäng^Ünal".encode("cp1252") + b" "},
    "Chinese bytes said to be Latin-1": {"x00080005": b"ISO_IR 100", "x00100010": "王^小东".encode("gb18030") + b" "},
    "empty character set": {"x00080005": b"", "x00100010": b"M\xfcller^J"},
    "sex U": {"x00100040": b"U "},
    "sex m": {"x00100040": b"m "},
    "birth date 19790000": {"x00100030": b"19790000"},
    "study time 2560": {"x00080030": b"2560"},
    "padded with spaces and NUL": {"x00100020": b"  PID 1\0", "x00100010": b" Doe^Jane  \0"},
    "study id over its length": {"x00200010": b"STUDY-ID-OF-28-CHARACTERS-OK"},
}


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_what_a_decoder_would_mend_or_refuse_stays_as_it_came(changes: dict[str, bytes]) -> None:
    original = part10(image(modality="CR", charset="ISO_IR 100"))
    identity = answers.identity(original)
    odd = {element.tag: element for element in raw_elements(answers.with_raw(original, **changes))}
    wanted = {int(name[1:], 16): value for name, value in changes.items()}
    assert {tag: odd[tag].value for tag in wanted} == wanted
    whose = answers.odd_identity(answers.study_identity(identity), odd)
    built = answers.document([original], study=whose)
    left = {element.tag: element for element in raw_elements(built.bytes)}
    assert {tag: left[tag] for tag in IDENTITY if tag in odd} == {tag: odd[tag] for tag in IDENTITY if tag in odd}


def test_an_odd_length_is_padded_and_an_unknown_representation_named() -> None:
    original = part10(image(modality="CR"))
    whose = answers.study_identity(answers.identity(original))
    patient = tuple(answers.RawElement(one.tag, "UN", b"abc") if one.tag == 0x00100020 else one for one in whose.patient)
    built = answers.document([original], study=dataclasses.replace(whose, patient=patient))
    left = {element.tag: element for element in raw_elements(built.bytes)}
    assert left[0x00100020] == answers.RawElement(0x00100020, "LO", b"abc ")


def test_the_implicit_document_says_the_same(images: list[bytes]) -> None:
    built = answers.document(images)
    explicit, implicit = read(built), dcmread(BytesIO(built.implicit))
    assert implicit.file_meta.TransferSyntaxUID.is_implicit_VR
    assert implicit == explicit


def test_every_reference_is_an_original_uid(images: list[bytes]) -> None:
    sr = read(answers.document(images))
    originals = [dcmread(BytesIO(one)) for one in images]
    assert sr.StudyInstanceUID == originals[0].StudyInstanceUID
    (evidence,) = sr.CurrentRequestedProcedureEvidenceSequence
    assert evidence.StudyInstanceUID == sr.StudyInstanceUID
    referenced = {
        (series.SeriesInstanceUID, one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID)
        for series in evidence.ReferencedSeriesSequence
        for one in series.ReferencedSOPSequence
    }
    assert referenced == {(one.SeriesInstanceUID, one.SOPClassUID, one.SOPInstanceUID) for one in originals}
    shown = [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in items(sr) if item.get("ValueType") == "IMAGE"]
    assert sorted(shown) == sorted([one.SOPInstanceUID for one in originals] * 2)


@pytest.mark.parametrize("abstention", [None, *Abstention])
def test_no_pseudonym_and_no_marker_of_the_archive_is_in_it(images: list[bytes], abstention: Abstention | None) -> None:
    built = answers.document(images, abstention=abstention)
    for one in map(answers.identity, images):
        for pseudonym in (one.pid, one.study_uid, one.series_uid, one.sop_uid):
            assert pseudonym.encode() not in built.bytes
    for keyword in ("PatientIdentityRemoved", "DeidentificationMethod", "LongitudinalTemporalInformationModified"):
        assert keyword not in read(built)
    assert "DeidentificationMethodCodeSequence" not in read(built)


# --- what it says -----------------------------------------------------------------------------------------------------------


def test_it_is_an_unverified_preliminary_research_result_in_a_series_of_its_own(images: list[bytes]) -> None:
    sr = read(answers.document(images))
    assert (sr.ContentQualification, sr.PreliminaryFlag) == ("RESEARCH", "PRELIMINARY")
    assert (sr.CompletionFlag, sr.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
    assert (sr.Modality, sr.SeriesNumber, sr.InstanceNumber) == ("SR", 9001, 1)
    assert sr.SeriesInstanceUID not in {dcmread(BytesIO(one)).SeriesInstanceUID for one in images}
    assert sr.SeriesDescription == "Osteon AI RESEARCH ONLY ewing-0007 20260304"
    assert (sr.Manufacturer, sr.SoftwareVersions) == ("Osteon", "0.1.0")
    title, template = sr.ConceptNameCodeSequence[0], sr.ContentTemplateSequence[0]
    assert (title.CodeValue, title.CodeMeaning) == ("126001", "Oncology Measurement Report")
    assert (template.MappingResource, template.TemplateIdentifier) == ("DCMR", "1500")
    assert {item.ContinuityOfContent for item in items(sr) if item.ValueType == "CONTAINER"} == {"SEPARATE"}
    assert [item.PurposeOfReferenceCodeSequence[0].CodeValue for item in sr.ContributingEquipmentSequence] == ["109102"]


def test_the_notice_is_the_first_thing_said_of_the_group(images: list[bytes]) -> None:
    first, *rest = group(read(answers.document(images)))
    assert first.ConceptNameCodeSequence[0].CodeValue == "121106"
    assert first.TextValue == (
        "FOR RESEARCH USE ONLY. NOT FOR DIAGNOSIS. Values hold only if the study shows a bone lesion and Ewing sarcoma or acute "
        "osteomyelitis is the question; they are relative to these two, at the class mix of the training data (104/98). "
        "A normal or other finding is not recognised."
    )
    assert [item.ValueType for item in rest if item.RelationshipType == "CONTAINS"] == ["NUM", "NUM", "CODE", "IMAGE", "IMAGE"]


def test_the_values_the_class_and_the_algorithm_are_named(images: list[bytes]) -> None:
    content = group(read(answers.document(images)))
    values = [item for item in content if item.ValueType == "NUM"]
    assert [(one.ConceptNameCodeSequence[0].CodeMeaning, str(one.MeasuredValueSequence[0].NumericValue)) for one in values] == [
        ("AI probability of Ewing's sarcoma", "83.4"),
        ("AI probability of acute osteomyelitis", "16.6"),
    ]
    (said,) = named(content, "AI-CLASS")
    assert said.ConceptCodeSequence[0].CodeValue == "307608006"
    assert [one.TextValue for one in named(content, "111001")] == ["Osteon ewing_small"]
    assert [one.TextValue for one in named(content, "111003")] == ["ewing-0007"]
    parameters = [one.TextValue for one in named(content, "111002")]
    assert "Weights SHA-256: " + "ab" * 32 in parameters
    assert "Combination of images: mean of the calibrated logits" in parameters
    assert named(content, "111000")[0].ConceptCodeSequence[0].CodeValue == "123110"
    assert not named(content, "121071")  # never "Finding": receivers harvest it as an assertion
    assert not named(content, "122405")


def test_the_device_is_named_by_the_uid_it_recognises_its_own_documents_by(images: list[bytes]) -> None:
    sr = read(answers.document(images))
    by_name = {item.ConceptNameCodeSequence[0].CodeValue: item for item in sr.ContentSequence}
    assert answers.KEYS.report_uid("device") == by_name["121012"].UID
    assert by_name["121013"].TextValue == "OSTEON"
    assert by_name["121058"].ConceptCodeSequence[0].CodeValue == "363679005"


@pytest.mark.parametrize("abstention", list(Abstention))
def test_an_abstention_says_its_reason_and_no_value(images: list[bytes], abstention: Abstention) -> None:
    sr = read(answers.document(images, abstention=abstention))
    content = group(sr)
    assert not [item for item in content if item.ValueType == "NUM"]
    assert named(content, "AI-CLASS")[0].ConceptCodeSequence[0].CodeValue in ("NOT-APPLICABLE", "82334004")
    (reason,) = named(content, "AI-REASON")
    assert reason.ConceptCodeSequence[0].CodeValue == report.REASONS[abstention].code.value
    assert "NOT APPLICABLE" in sr.SeriesDescription
    assert len(sr.SeriesDescription) <= 64
    notice = content[0].TextValue
    assert notice.startswith("FOR RESEARCH USE ONLY. NOT FOR DIAGNOSIS. ")
    assert report.REASONS[abstention].sentence in notice
    assert "%" not in notice
    assert len(named(content, "121112")) == len(images)  # every image looked at is a source


def test_the_codes_of_the_node_are_those_its_docstring_lists() -> None:
    assert report.__doc__ is not None
    listed = dict(re.findall(r"^((?:AI|R|NOT)-[A-Z-]+) +(.+?)  +", report.__doc__, re.MULTILINE))
    listed |= dict(re.findall(r"^(R-BODY-PART) +(.+?) value of", report.__doc__, re.MULTILINE))
    assert listed == {code.value: code.meaning for code in report.PRIVATE_CODES}
    assert len({code.value for code in report.PRIVATE_CODES}) == len(report.PRIVATE_CODES)
    assert {code.scheme for code in report.PRIVATE_CODES} == {"99OSTEON"}


def test_private_schemes_are_declared(images: list[bytes]) -> None:
    other = CodedConcept("P1", "99SITE", "AI probability of one")
    sr = read(answers.document(images, finding={"probability_names": (other, answers.P_OSTEOMYELITIS)}))
    assert [one.CodingSchemeDesignator for one in sr.CodingSchemeIdentificationSequence] == ["99OSTEON", "99SITE"]


def test_the_notice_says_corpus_degraded_and_unused_images(images: list[bytes]) -> None:
    one, other = (answers.identity(each) for each in images)
    looked_at = (
        ImageFinding(one.sop_uid, "CR", (1.6, 0.0)),
        ImageFinding(other.sop_uid, "CR", None, Abstention.UNREADABLE),
    )
    built = answers.document(
        images, finding={"in_corpus": True, "degraded": "CPU instead of CUDA", "images": looked_at, "training_mix": ""}
    )
    content = group(read(built))
    notice = content[0].TextValue
    assert "among the training data of this model" in notice
    assert "CPU instead of CUDA" in notice
    assert "1 of 2 images did not enter the values (unreadable)." in notice
    assert "(not stated)" in notice
    (source,) = named(content, "121112")
    assert source.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == one.original_sop_uid


@pytest.mark.parametrize(
    ("term", "site"),
    [
        ("LEG", "30021000"),
        ("RADIUS", "62413002"),
        ("FEMUR", "71341001"),
        ("TIBIA/FIBULA", "110536004"),
        ("", None),
        ("SKULL", None),
    ],
)
def test_the_finding_site_is_the_stated_body_part_or_left_out(images: list[bytes], term: str, site: str | None) -> None:
    content = group(read(answers.document(images, finding={"body_part": term})))
    assert [one.ConceptCodeSequence[0].CodeValue for one in named(content, "363698007")] == ([] if site is None else [site])


def test_percentages_sum_to_a_hundred() -> None:
    assert report.percentages([0.8345, 0.1655]) == [83.5, 16.5]
    assert report.percentages([1 / 3, 1 / 3, 1 / 3]) == [33.4, 33.3, 33.3]
    assert report.percentages([1.0, 0.0]) == [100.0, 0.0]
    assert report.percentages([]) == []


def test_the_title_the_number_and_the_description_are_settings(images: list[bytes]) -> None:
    settings = Report(document_title="126000", series_number=77, series_description="X" * 26 + " RESEARCH ONLY")
    sr = read(answers.document(images, settings=settings, run=3, abstention=Abstention.ADULT))
    assert sr.ConceptNameCodeSequence[0].CodeMeaning == "Imaging Measurement Report"
    assert sr.SeriesNumber == 79
    assert len(sr.SeriesDescription) <= 64
    assert "RESEARCH ONLY NOT APPLICABLE" in sr.SeriesDescription
    assert sr.SeriesDescription.endswith("20260304")


def test_a_text_that_is_not_ascii_is_refused_instead_of_becoming_question_marks(images: list[bytes]) -> None:
    with pytest.raises(report.Unreportable, match="ASCII"):
        answers.document(images, finding={"model_name": "模型"})


def test_a_report_without_an_image_is_refused(images: list[bytes]) -> None:
    with pytest.raises(report.Unreportable, match="image"):
        answers.document(images, images=[])


# --- the same again ---------------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes(images: list[bytes]) -> None:
    assert answers.document(images) == answers.document(images)
    assert answers.document(images).bytes == answers.document(list(reversed(images)), study=whose(images)).bytes


def whose(images: list[bytes]) -> object:
    return answers.study_identity(answers.identity(images[0]))


def test_another_process_with_another_hash_seed_gives_the_same_bytes() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import answers, studies\n"
        "print(answers.document([studies.part10(one) for one in studies.study(modality='CR')]).document.sha256)"
    )
    here = str(Path(answers.__file__).parent)
    built = answers.document([part10(one) for one in study(modality="CR")])
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, here],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert done.stdout.strip() == built.document.sha256


def test_all_clocks_show_the_stored_time_in_local_time(images: list[bytes]) -> None:
    sr = read(answers.document(images, zone=timezone(timedelta(hours=5, minutes=30))))
    assert (sr.ContentDate, sr.ContentTime) == ("20260305", "050012")
    assert (sr.InstanceCreationDate, sr.InstanceCreationTime) == ("20260305", "050012")
    assert sr.TimezoneOffsetFromUTC == "+0530"
    assert {item.ContributionDateTime for item in sr.ContributingEquipmentSequence} == {"20260305050012+0530"}
    today = datetime.now(UTC).strftime("%Y%m%d").encode()
    assert today not in answers.document(images).bytes


def test_uids_follow_what_makes_another_document(images: list[bytes]) -> None:
    def uids(**other: object) -> tuple[str, str, str]:
        built = answers.document(images, **other)  # type: ignore[arg-type]
        tracking = named(group(read(built)), "112040")[0].UID
        return built.document.series_uid, built.document.sop_uid, tracking

    first = uids()
    assert len(set(first)) == 3
    assert all(uid.startswith("2.25.") and len(uid) <= 44 for uid in first)
    old, one = answers.document(images).document, answers.identity(images[0])
    others = [
        uids(edition=1),
        uids(sop_class_uid=ComprehensiveSRStorage),
        uids(finding={"model_id": "ewing-0008"}),
        uids(finding={"probabilities": (0.9, 0.1)}),
        uids(predecessors=[old]),
        uids(zone=timezone(timedelta(hours=5, minutes=30))),
        uids(node=answers.report.NodeName.of("OSTEON", keys=answers.KEYS, version="another")),
        uids(study=dataclasses.replace(answers.study_identity(one), patient=())),
        uids(result=answers.result(answers.findings([one]), created_at=datetime(2026, 3, 6, tzinfo=UTC))),
    ]
    assert len({uid for each in (first, *others) for uid in each}) == 3 * (1 + len(others))


def test_a_rerun_names_its_predecessor(images: list[bytes]) -> None:
    old = answers.document(images).document
    new = read(answers.document(images, finding={"model_id": "ewing-0008"}, run=2, predecessors=[old]))
    (before,) = new.PredecessorDocumentsSequence
    assert before.StudyInstanceUID == new.StudyInstanceUID
    (series,) = before.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == old.series_uid
    (one,) = series.ReferencedSOPSequence
    assert (one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID) == (old.sop_class_uid, old.sop_uid)
    assert new.SeriesNumber == 9002
    assert new.SeriesInstanceUID != old.series_uid


@pytest.mark.parametrize("sop_class", report.SOP_CLASSES)
def test_the_tree_is_read_back_by_highdicom_in_all_three_classes(images: list[bytes], sop_class: str) -> None:
    built = answers.document(images, sop_class_uid=sop_class)  # type: ignore[arg-type]
    assert read(built).SOPClassUID == sop_class == built.document.sop_class_uid
    reader = highdicom.sr.EnhancedSR if sop_class == EnhancedSRStorage else highdicom.sr.ComprehensiveSR
    content = (highdicom.sr.Comprehensive3DSR if sop_class == report.SOP_CLASSES[0] else reader).from_dataset(read(built)).content
    (found,) = content.get_image_measurement_groups()
    assert [round(one.value, 1) for one in found.get_measurements()] == [83.4, 16.6]


def test_the_settings_digest_changes_with_what_an_answer_says() -> None:
    digest = report.settings_digest(Report(), Inference())
    assert digest == report.settings_digest(Report(), Inference(threads=3))
    assert digest != report.settings_digest(Report(series_number=5), Inference())
    assert digest != report.settings_digest(Report(), Inference(answer_not_applicable="status only"))
