"""What becomes of one object: archived, known, held, ours or refused, whatever was killed before."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest
import studies
from pydicom.dataset import Dataset
from pydicom.uid import (
    Comprehensive3DSRStorage,
    CTImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from models import durable
from node.errors import NoSpace, NotAsAnnounced, NotFound, NotReleasable, NotUnderstood, Refused
from node.keep.records import Hold, Purpose, StudyState
from node.receive.intake import Intake, Taken
from node.settings import load

# pydicom says by a warning what it mends while reading; in production node.logs silences it, because it may repeat values
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


@pytest.fixture
def intake(either_site: Path) -> Iterator[Intake]:
    opened = Intake.open(load(either_site))
    yield opened
    opened.close()


def take(intake: Intake, dataset: Dataset, *, raw: bytes | None = None, **told: Any) -> Taken:
    arguments = {
        "transfer_syntax_uid": str(dataset.file_meta.TransferSyntaxUID),
        "sop_class_uid": str(dataset.SOPClassUID),
        "sop_instance_uid": str(dataset.SOPInstanceUID),
        "calling_ae": "SENDER",
        "called_ae": intake.settings.node.ae_title,
    }
    return intake.take_in(studies.encoded(dataset) if raw is None else raw, **(arguments | told))


def files(intake: Intake) -> list[Path]:
    return sorted(intake.archive.folder.rglob("*.dcm"))


def held(intake: Intake) -> list[Hold]:
    """Name why objects are held; what is listed and what is sealed must be the same."""
    listed = [one for one, _since in intake.catalogue.instances.held()]
    assert sorted(one.id for one in listed) == intake.quarantine.ids()
    return [one.reason for one in listed]


def study(intake: Intake, dataset: Dataset) -> Any:
    return intake.catalogue.studies.get(intake.keys.uid(dataset.StudyInstanceUID))


# --- new and known -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless],
)
@pytest.mark.parametrize("modality", ["CR", "DX"])
def test_an_image_is_archived_under_its_pseudonym_with_its_pixels_untouched(intake: Intake, syntax: str, modality: str) -> None:
    dataset = studies.image(modality=modality, transfer_syntax=syntax)
    assert take(intake, dataset) is Taken.NEW
    (file,) = files(intake)
    archived = pydicom.dcmread(file)
    assert archived.PixelData == dataset.PixelData
    assert archived.file_meta.TransferSyntaxUID == syntax
    assert archived.SOPInstanceUID == intake.keys.uid(dataset.SOPInstanceUID)
    assert b"Test^Patient" not in file.read_bytes()
    assert study(intake, dataset).state is StudyState.RECEIVING
    identity = intake.vault.study(intake.keys.uid(dataset.StudyInstanceUID))
    assert identity.original_study_uid == dataset.StudyInstanceUID
    assert not held(intake)


def test_the_same_image_again_is_known_and_nothing_is_doubled(intake: Intake) -> None:
    dataset = studies.image()
    assert [take(intake, dataset) for _ in range(3)] == [Taken.NEW, Taken.KNOWN, Taken.KNOWN]
    assert len(files(intake)) == intake.catalogue.instances.count() == 1
    assert not held(intake)


def test_the_same_image_in_another_syntax_is_known_and_no_work(intake: Intake) -> None:
    take(intake, studies.image())
    assert take(intake, studies.image(transfer_syntax=JPEG2000Lossless)) is Taken.KNOWN
    assert take(intake, studies.image(transfer_syntax=ImplicitVRLittleEndian)) is Taken.KNOWN
    (file,) = files(intake)
    assert pydicom.dcmread(file).file_meta.TransferSyntaxUID == ExplicitVRLittleEndian


def test_other_pixels_under_a_known_uid_are_held(intake: Intake) -> None:
    take(intake, studies.image())
    newcomer = studies.image(array=studies.pixels(seed=99), PatientName="Other^Name")
    assert take(intake, newcomer) is Taken.HELD
    assert held(intake) == [Hold.PIXEL_CONFLICT]
    identity = intake.vault.study(intake.keys.uid(newcomer.StudyInstanceUID))
    assert not any(b"Other" in element.value for element in identity.patient)  # a doubtful object corrects nobody


def test_a_known_uid_in_another_series_or_of_another_patient_is_held(intake: Intake) -> None:
    take(intake, studies.image())
    assert take(intake, studies.image(SeriesInstanceUID="1.2.3.4")) is Taken.HELD
    assert take(intake, studies.image(PatientID="SOMEBODY")) is Taken.HELD
    assert sorted(held(intake)) == sorted([Hold.PIXEL_CONFLICT, Hold.PATIENT_CONFLICT])
    assert len(files(intake)) == 1


def test_a_corrected_name_updates_the_identity_and_is_said_without_saying_it(
    intake: Intake, caplog: pytest.LogCaptureFixture
) -> None:
    take(intake, studies.image())
    with caplog.at_level(logging.INFO):
        assert take(intake, studies.image(PatientName="SECRET^NAME")) is Taken.KNOWN
    identity = intake.vault.study(intake.keys.uid(studies.image().StudyInstanceUID))
    assert any(element.value.strip() == b"SECRET^NAME" for element in identity.patient)
    assert "identity corrected" in caplog.text
    assert "SECRET" not in caplog.text + "".join(str(record.__dict__) for record in caplog.records)


def test_another_patient_in_a_known_study_is_held(intake: Intake) -> None:
    take(intake, studies.image())
    assert take(intake, studies.image(instance=2, PatientID="SOMEBODY")) is Taken.HELD
    assert take(intake, studies.image(instance=3, birth_date="19500101", PatientSex="O")) is Taken.HELD
    assert held(intake) == [Hold.PATIENT_CONFLICT] * 2
    assert len(files(intake)) == 1


# --- held --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"SOPClassUID": SecondaryCaptureImageStorage, "Modality": "OT"}, Hold.MODALITY),
        ({"SOPClassUID": DigitalMammographyXRayImageStorageForPresentation, "Modality": "MG"}, Hold.MODALITY),
        ({"BurnedInAnnotation": "YES"}, Hold.BURNED_IN),
        ({"ImageType": ["DERIVED", "SECONDARY"]}, Hold.SECONDARY),
        ({"PatientID": ""}, Hold.PATIENT_ID),
        ({"PatientID": "ANONYMOUS"}, Hold.PATIENT_ID),
        ({"PatientID": "0"}, Hold.PATIENT_ID),
        ({"StudyInstanceUID": ""}, Hold.MALFORMED),
        ({"PixelData": None}, Hold.MALFORMED),
    ],
)
def test_what_cannot_be_judged_is_sealed_and_answered_as_safe_once(
    intake: Intake, attributes: dict[str, Any], reason: Hold
) -> None:
    dataset = studies.image(**{name: value for name, value in attributes.items() if value is not None})
    if "PixelData" in attributes:
        del dataset.PixelData
    assert [take(intake, dataset) for _ in range(3)] == [Taken.HELD] * 3
    assert held(intake) == [reason]
    assert not files(intake)
    for file in intake.quarantine.folder.iterdir():
        assert b"Test^Patient" not in file.read_bytes()


def test_a_held_object_whose_sealed_file_is_gone_is_sealed_again_when_it_comes_again(intake: Intake) -> None:
    """Only what is on the disk may be answered 0000: a row alone is none."""
    dataset = studies.image(BurnedInAnnotation="YES")
    take(intake, dataset)
    (held_id,) = intake.quarantine.ids()
    before = intake.quarantine.read(held_id)
    intake.quarantine.discard(held_id)
    assert take(intake, dataset) is Taken.HELD
    assert intake.quarantine.read(held_id) == before
    assert len(intake.catalogue.instances.held()) == 1


def test_a_sealed_file_that_a_killed_process_left_is_on_the_disk_before_the_answer(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed between the rename and the sync of the folder: a power cut could still take the name away."""
    dataset = studies.image(BurnedInAnnotation="YES")
    monkeypatch.setattr(intake.catalogue.instances, "hold", _killed)
    with pytest.raises(KeyboardInterrupt):
        take(intake, dataset)
    monkeypatch.undo()
    synced = []
    sync = durable.sync_folder
    monkeypatch.setattr(durable, "sync_folder", lambda folder: (synced.append(folder), sync(folder)))
    assert take(intake, dataset) is Taken.HELD
    assert intake.quarantine.folder in synced


def test_a_person_s_discard_as_it_comes_again_leaves_file_and_row_or_neither(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = studies.image(BurnedInAnnotation="YES")
    take(intake, dataset)
    (held_id,) = intake.quarantine.ids()
    instances, hold = intake.catalogue.instances, intake.catalogue.instances.hold

    def goes(_since: datetime) -> bool:
        intake.quarantine.discard(held_id)
        return True

    def discarded_first(*arguments: Any, **more: Any) -> None:
        instances.unhold(held_id, by="me", reason="x", decision="discarded", now=datetime.now(UTC), goes=goes)
        hold(*arguments, **more)

    monkeypatch.setattr(instances, "hold", discarded_first)
    assert take(intake, dataset) is Taken.HELD
    assert [held.id for held, _since in instances.held()] == intake.quarantine.ids() == [held_id]


def _killed(*_arguments: object, **_more: object) -> None:
    raise KeyboardInterrupt


def test_a_study_held_for_its_modality_keeps_its_identity_for_the_answer(intake: Intake) -> None:
    dataset = studies.image(SOPClassUID=SecondaryCaptureImageStorage, Modality="OT")
    take(intake, dataset)
    assert intake.vault.study(intake.keys.uid(dataset.StudyInstanceUID)).original_study_uid == dataset.StudyInstanceUID


def test_pixels_in_another_syntax_than_announced_are_held(intake: Intake) -> None:
    native, jpeg = studies.image(instance=1), studies.image(instance=2, transfer_syntax=JPEG2000Lossless)
    assert take(intake, native, transfer_syntax_uid=JPEG2000Lossless) is Taken.HELD
    assert take(intake, jpeg, transfer_syntax_uid=ExplicitVRLittleEndian) is Taken.HELD
    assert held(intake) == [Hold.MALFORMED] * 2


def test_compressed_pixels_with_something_else_between_them_are_held(intake: Intake) -> None:
    """It may be anything: a splice by a broken sender had put the next image's header there, with its name."""
    dataset = studies.image(transfer_syntax=JPEG2000Lossless)
    dataset.PixelData += b"Test^Patient"
    assert take(intake, dataset) is Taken.HELD
    assert held(intake) == [Hold.MALFORMED]


def test_empty_pixel_data_are_none(intake: Intake) -> None:
    assert take(intake, studies.image(PixelData=b"")) is Taken.HELD
    assert held(intake) == [Hold.MALFORMED]


def test_fragments_with_a_length_around_them_are_taken_for_what_they_are(intake: Intake) -> None:
    dataset = studies.image(transfer_syntax=JPEG2000Lossless)
    dataset["PixelData"].is_undefined_length = False
    assert take(intake, dataset) is Taken.NEW
    (file,) = files(intake)
    assert pydicom.dcmread(file).pixel_array.shape == (64, 48)


def test_a_release_takes_in_what_a_person_has_seen(intake: Intake) -> None:
    dataset = studies.image(BurnedInAnnotation="YES", transfer_syntax=JPEG2000Lossless)
    take(intake, dataset)
    (held_id,) = intake.quarantine.ids()
    assert intake.release(held_id, by="tester", reason="only a side marker") is Taken.NEW
    (file,) = files(intake)
    assert pydicom.dcmread(file).PixelData == dataset.PixelData
    assert not held(intake)
    assert take(intake, dataset) is Taken.KNOWN  # the decision holds
    with pytest.raises(NotFound):
        intake.release(held_id, by="tester", reason="again")


@pytest.mark.parametrize(
    "attributes", [{"SOPClassUID": SecondaryCaptureImageStorage, "Modality": "OT"}, {"PatientID": ""}, {"StudyInstanceUID": ""}]
)
def test_what_a_person_cannot_overrule_stays_held(intake: Intake, attributes: dict[str, Any]) -> None:
    take(intake, studies.image(**attributes))
    (held_id,) = intake.quarantine.ids()
    with pytest.raises(NotReleasable):
        intake.release(held_id, by="tester", reason="please")
    assert intake.quarantine.ids() == [held_id]
    assert not files(intake)


# --- refused -----------------------------------------------------------------------------------------------------------------


def test_bytes_that_are_no_data_set_are_not_understood(intake: Intake) -> None:
    dataset = studies.image()
    for raw in (b"", b"\0" * 500, b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 20, b"%PDF-1.7 " + b"x" * 999, b"\x08\x00" * 3):
        with pytest.raises(NotUnderstood):
            take(intake, dataset, raw=raw)
    assert not held(intake)


def test_a_character_set_that_is_a_number_is_not_understood(intake: Intake) -> None:
    dataset = studies.image()
    raw = studies.encoded(dataset).replace(b"\x08\x00\x05\x00CS", b"\x08\x00\x05\x00SL")
    with pytest.raises(NotUnderstood):
        take(intake, dataset, raw=raw)


def test_sequences_nested_without_end_are_not_understood_or_held(intake: Intake) -> None:
    dataset = studies.image()
    nested = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 3000
    with contextlib.suppress(NotUnderstood):
        assert take(intake, dataset, raw=nested) is Taken.HELD
    assert not files(intake)


def test_a_data_set_of_another_instance_or_class_than_announced_is_refused(intake: Intake) -> None:
    with pytest.raises(NotAsAnnounced):
        take(intake, studies.image(), sop_instance_uid="1.2.3")
    with pytest.raises(NotAsAnnounced):
        take(intake, studies.image(modality="DX"), sop_class_uid=studies.image(modality="CR").SOPClassUID)
    assert not held(intake)
    assert not files(intake)


def test_a_class_or_syntax_that_is_not_taken_is_refused(intake: Intake) -> None:
    with pytest.raises(Refused):
        take(intake, studies.image(SOPClassUID=CTImageStorage))
    with pytest.raises(Refused):
        take(intake, studies.image(), transfer_syntax_uid="1.2.840.10008.1.2.1.99")


# --- our own results ---------------------------------------------------------------------------------------------------------


def report(observer_uid: str) -> Dataset:
    document = studies.image(SOPClassUID=Comprehensive3DSRStorage, Modality="SR", SOPInstanceUID="1.2.3.4.5")
    del document.PixelData
    item = Dataset()
    item.RelationshipType, item.ValueType, item.UID = "HAS OBS CONTEXT", "UIDREF", observer_uid
    name = Dataset()
    name.CodeValue, name.CodingSchemeDesignator, name.CodeMeaning = "121012", "DCM", "Device Observer UID"
    item.ConceptNameCodeSequence = [name]
    document.ContentSequence = [item]
    return document


def test_our_own_result_is_answered_and_not_kept(intake: Intake) -> None:
    assert take(intake, report(intake.keys.report_uid("device"))) is Taken.OURS
    assert not files(intake)
    assert not held(intake)
    assert study(intake, report("1.2")) is None


def test_the_report_of_somebody_else_is_refused(intake: Intake) -> None:
    with pytest.raises(Refused):
        take(intake, report("1.2.3"))
    assert not held(intake)


# --- why it was sent ---------------------------------------------------------------------------------------------------------


def test_the_title_called_says_why_it_was_sent(intake: Intake) -> None:
    learn = intake.settings.node.learn_ae_title
    dataset = studies.image()
    take(intake, dataset, called_ae=learn)
    assert study(intake, dataset).purpose is Purpose.LEARN
    take(intake, dataset)
    assert study(intake, dataset).purpose is Purpose.ANSWER


def test_a_held_study_too_becomes_one_to_be_answered(intake: Intake) -> None:
    dataset = studies.image(SOPClassUID=SecondaryCaptureImageStorage, Modality="OT")
    take(intake, dataset, called_ae=intake.settings.node.learn_ae_title)
    take(intake, dataset)
    assert study(intake, dataset).purpose is Purpose.ANSWER
    assert held(intake) == [Hold.MODALITY]


def test_what_was_sent_to_learn_and_then_to_answer_is_answered_after_its_release(intake: Intake) -> None:
    dataset = studies.image(BurnedInAnnotation="YES")
    take(intake, dataset, called_ae=intake.settings.node.learn_ae_title)
    now = datetime.now(UTC) + timedelta(days=1)
    intake.catalogue.studies.complete_due(quiet_s=0, max_wait_s=0, now=now)
    take(intake, dataset)
    intake.catalogue.studies.complete_due(quiet_s=0, max_wait_s=0, now=now)
    assert study(intake, dataset).state is StudyState.QUARANTINED
    (held_id,) = intake.quarantine.ids()
    intake.release(held_id, by="tester", reason="only a side marker")
    intake.catalogue.studies.complete_due(quiet_s=0, max_wait_s=0, now=now)
    assert study(intake, dataset).state is StudyState.COMPLETE


def test_a_teaching_caller_only_teaches(site: Path) -> None:
    settings = load(site)
    (caller,) = settings.node.callers
    node = settings.node.model_copy(update={"callers": [caller.model_copy(update={"purpose": "learn"})]})
    intake = Intake.open(settings.model_copy(update={"node": node}))
    try:
        take(intake, studies.image())
        assert study(intake, studies.image()).purpose is Purpose.LEARN
    finally:
        intake.close()


# --- cut short at any step ---------------------------------------------------------------------------------------------------

STEPS = ["vault.remember", "archive.put", "catalogue.instances.note"]
HOLD_STEPS = ["vault.remember", "quarantine.put", "catalogue.instances.hold"]


def cut(intake: Intake, step: str, monkeypatch: pytest.MonkeyPatch, *, after: bool) -> None:
    """Let one step fail as a full disk does, before or after it did its work."""
    *path, name = step.split(".")
    owner: Any = intake
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if after:
            original(*args, **kwargs)
        raise NoSpace

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_an_image_cut_short_at_any_step_is_taken_in_by_the_next_sending(
    intake: Intake, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    dataset = studies.image()
    with monkeypatch.context() as patch:
        cut(intake, step, patch, after=after)
        with pytest.raises(NoSpace):
            take(intake, dataset)
    assert take(intake, dataset) in (Taken.NEW, Taken.KNOWN)
    assert len(files(intake)) == intake.catalogue.instances.count() == 1
    assert not held(intake)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", HOLD_STEPS)
def test_a_held_object_cut_short_at_any_step_is_one_entry_after_the_next_sending(
    intake: Intake, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    dataset = studies.image(SOPClassUID=SecondaryCaptureImageStorage, Modality="OT")
    with monkeypatch.context() as patch:
        cut(intake, step, patch, after=after)
        with pytest.raises(NoSpace):
            take(intake, dataset)
    assert take(intake, dataset) is Taken.HELD
    assert held(intake) == [Hold.MODALITY]


def test_each_object_is_one_line_without_an_identity(intake: Intake, caplog: pytest.LogCaptureFixture) -> None:
    dataset = studies.image(PatientName="SECRET^NAME", PatientID="SECRET^ID")
    with caplog.at_level(logging.INFO, "osteon"):
        take(intake, dataset)
    (record,) = caplog.records
    told = record.osteon_fields  # type: ignore[attr-defined]
    assert record.getMessage() == "instance stored"
    assert told["status"] == "0000H"
    assert told["calling_ae"] == "SENDER"
    assert told["instance"] == intake.keys.uid(dataset.SOPInstanceUID)
    assert {"ms", "outcome"} <= told.keys()
    assert told["study"] == intake.keys.uid(dataset.StudyInstanceUID)
    assert "SECRET" not in str(record.__dict__)
    assert dataset.SOPInstanceUID not in str(record.__dict__)
