"""What is answered, what is not, and what comes back: the whole node in one process, with a PACS that speaks DICOM."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from roles import UNWATCHED, hand_in
from studies import born, study
from tiny_model import promote_tiny
from typer.testing import CliRunner

from node import settings as site_settings
from node.__main__ import build
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.keep.records import Abstention, DeliveryState, StudyState
from node.receive.intake import Intake, Taken
from node.reply import respond
from node.reply.respond import Reply
from node.settings import Settings


@dataclass
class World:
    """A site, its PACS, and its two doors held open."""

    settings: Settings
    pacs: Pacs
    intake: Intake
    reply: Reply

    def send(self, *images: Dataset, called: str = "OSTEON", calling: str = "SENDER") -> list[Taken]:
        return [hand_in(self.intake, image, called=called, calling=calling) for image in images]

    def work(self) -> None:
        """Let the replier do all there is to do now."""
        busy = True
        while busy:
            busy = self.reply.step()
            for pacs in self.settings.pacs:
                busy = self.reply.deliver_step(pacs) or busy

    def state(self, image: Dataset) -> StudyState:
        found = self.reply.catalogue.studies.get(self.intake.keys.uid(image.StudyInstanceUID))
        assert found is not None
        return found.state

    def reports(self, image: Dataset | None = None) -> list[FileDataset]:
        """Give the SRs in the PACS (of the study of `image`), one an instance UID, in the order they came."""
        read = [dcmread(path) for path in self.pacs.received]
        srs = {one.SOPInstanceUID: one for one in read if one.Modality == "SR"}
        return [one for one in srs.values() if image is None or one.StudyInstanceUID == image.StudyInstanceUID]

    @property
    def models(self) -> Path:
        return self.settings.storage.root / "models"


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with Pacs(tmp_path / "pacs", callers=["OSTEON"]) as running:
        yield running


def site_of(folder: Path, destinations: list[tuple[str, int, str]], **pieces: object) -> Settings:
    """Write a site whose results go to `destinations` (name, port, AE title)."""
    config = init_site(
        folder,
        node={"port": 0, "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "purpose": "answer"}]},
        pacs=[
            {"name": name, "ae_title": title, "host": "127.0.0.1", "port": port, "timeout_s": 3.0}
            for name, port, title in destinations
        ],
        completion={"quiet_s": 0.0},
        metrics=UNWATCHED,
        delivery={"retry_first_s": 0.05, "retry_max_s": 0.1},
        **pieces,
    )
    return site_settings.load(config)


@pytest.fixture
def world(tmp_path: Path, pacs: Pacs) -> Iterator[World]:
    settings = site_of(tmp_path / "site", [("main", pacs.port, pacs.ae_title)])
    with ExitStack() as stack:
        intake = Intake.open(settings)
        stack.callback(intake.close)
        yield World(settings, pacs, intake, stack.enter_context(respond.opened(settings)))


def test_a_study_is_answered_in_its_own_study_of_its_own_patient(world: World) -> None:
    promote_tiny(world.models)
    images = study(patient=1, images=2, PatientName="SECRET^NAME")
    world.send(*images)
    world.work()
    assert world.state(images[0]) is StudyState.DELIVERED
    (report,) = world.reports()
    for keyword in ("StudyInstanceUID", "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"):
        assert report[keyword].value == images[0][keyword].value, keyword
    referenced = {
        item.ReferencedSOPInstanceUID
        for series in report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert referenced == {image.SOPInstanceUID for image in images}


def test_a_first_champion_over_a_hundred_learned_studies_sends_nothing(world: World) -> None:
    learned = [study(patient=number, images=1)[0] for number in range(1, 101)]
    world.send(*learned, called="OSTEON_LEARN")
    world.work()
    promote_tiny(world.models)
    world.work()
    assert {world.state(image) for image in learned} == {StudyState.LEARNED}
    assert world.reports() == []
    assert world.reply.catalogue.deliveries.list() == []


def test_a_learned_study_sent_again_to_be_answered_is_answered(world: World) -> None:
    """Even when every instance of it is known already."""
    promote_tiny(world.models)
    images = study(patient=1)
    world.send(*images, called="OSTEON_LEARN")
    world.work()
    assert world.state(images[0]) is StudyState.LEARNED
    world.send(*images)
    world.work()
    assert len(world.reports(images[0])) == 1


def test_without_a_model_a_study_waits_and_is_answered_once_there_is_one(world: World) -> None:
    images = study(patient=1)
    world.send(*images)
    world.work()
    assert world.state(images[0]) is StudyState.WAITING
    promote_tiny(world.models)
    world.work()
    assert len(world.reports(images[0])) == 1


def test_results_that_come_back_ten_times_still_count_one(world: World) -> None:
    promote_tiny(world.models)
    images = study(patient=1)
    world.send(*images)
    world.work()
    (report,) = world.reports()
    for _ in range(10):
        assert world.send(report) == [Taken.OURS]
        world.work()
    assert len(world.reports()) == 1
    assert world.reply.catalogue.instances.count() == len(images)
    assert world.state(images[0]) is StudyState.DELIVERED


def test_images_sent_again_after_the_answer_change_nothing(world: World) -> None:
    promote_tiny(world.models)
    images = study(patient=1)
    for _ in range(3):
        world.send(*images)
        world.work()
    assert len(world.reports()) == 1


def test_a_late_image_leads_to_a_revised_report_that_names_its_predecessor(world: World) -> None:
    promote_tiny(world.models)
    images = study(patient=1, images=3)
    world.send(*images[:2])
    world.work()
    world.send(images[2])
    world.work()
    first, second = world.reports()
    (earlier,) = second.PredecessorDocumentsSequence
    named = earlier.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
    assert named == first.SOPInstanceUID
    assert second.SeriesInstanceUID != first.SeriesInstanceUID


def test_a_new_champion_is_picked_up_and_answers_nothing_again(world: World) -> None:
    promote_tiny(world.models, slope=4.0)
    before, after = study(patient=1), study(patient=2)
    world.send(*before)
    world.work()
    version = promote_tiny(world.models, slope=3.0)
    world.work()
    assert len(world.reports()) == 1, "a promotion re-answers nothing"
    world.send(*after)
    world.work()
    assert world.reply.model is not None
    assert world.reply.model.version == version
    assert len(world.reports(after[0])) == 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"age": 40}, Abstention.ADULT),
        ({"PatientBirthDate": "", "PatientAge": ""}, Abstention.AGE_UNKNOWN),
        ({"BodyPartExamined": "CHEST"}, Abstention.BODY_PART),
    ],
)
def test_what_the_model_is_not_for_gets_a_coded_not_applicable(
    world: World, changed: dict[str, object], reason: Abstention
) -> None:
    promote_tiny(world.models)
    images = study(patient=1, **changed)
    world.send(*images)
    world.work()
    (report,) = world.reports()
    assert "NOT APPLICABLE" in report.SeriesDescription
    result = world.reply.catalogue.results.latest(world.intake.keys.uid(images[0].StudyInstanceUID))
    assert result is not None
    assert result.findings.abstention is reason
    assert result.findings.probabilities is None


def test_a_study_of_another_modality_is_quarantined_and_told_so(world: World) -> None:
    promote_tiny(world.models)
    image = study(patient=1, images=1)[0]
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    image.Modality = "OT"
    assert world.send(image) == [Taken.HELD]
    world.work()
    (report,) = world.reports()
    assert "NOT APPLICABLE" in report.SeriesDescription
    assert world.reply.catalogue.instances.count() == 0


def test_paused_answers_are_scored_and_leave_only_when_resumed(world: World) -> None:
    promote_tiny(world.models)
    now = respond._now()
    world.reply.catalogue.roles.set_flag("answers", "paused", by="it", reason="first weeks", now=now)
    images = study(patient=1)
    world.send(*images)
    world.work()
    assert world.state(images[0]) is StudyState.INFERRED
    assert world.reports() == []
    world.reply.catalogue.roles.set_flag("answers", "on", by="it", reason="trusted", now=now)
    world.work()
    assert len(world.reports()) == 1


def test_what_nobody_answered_in_time_expires_and_is_answered_only_by_hand(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    images = study(patient=1)
    world.send(*images)
    world.work()
    promote_tiny(world.models)
    later = respond._now() + timedelta(hours=world.settings.completion.answer_within_h + 1)
    monkeypatch.setattr(respond, "_now", lambda: later)
    world.work()
    assert world.state(images[0]) is StudyState.EXPIRED
    assert world.reports() == []
    uid = world.intake.keys.uid(images[0].StudyInstanceUID)
    world.reply.catalogue.studies.reopen(uid, by="dr", reason="asked by phone", now=later)
    world.work()
    assert len(world.reports()) == 1


def test_a_dead_pacs_never_blocks_another(tmp_path: Path, pacs: Pacs, free_port: Callable[[], int]) -> None:
    settings = site_of(tmp_path / "site", [("gone", free_port(), "GONE"), ("main", pacs.port, pacs.ae_title)])
    promote_tiny(settings.storage.root / "models")
    images = study(patient=1)
    with respond.opened(settings) as reply:
        intake = Intake.open(settings)
        world = World(settings, pacs, intake, reply)
        world.send(*images)
        while reply.step():
            pass
        for destination in settings.pacs:
            reply.deliver_step(destination)
        intake.close()
        assert len(world.reports()) == 1
        states = {row.destination: row.state for row in reply.catalogue.deliveries.list()}
        assert states == {"gone": DeliveryState.PENDING, "main": DeliveryState.SENT}
        assert world.reply.catalogue.studies.by_state()[StudyState.DELIVERING] == 1


def test_a_result_is_held_when_the_pacs_names_another_patient(world: World, tmp_path: Path) -> None:
    promote_tiny(world.models)
    images = study(patient=1)
    merged = study(patient=1, PatientID="SOMEBODY-ELSE")[0]
    world.pacs.put(merged)
    world.send(*images)
    world.work()
    assert world.reports() == []
    (row,) = world.reply.catalogue.deliveries.list()
    assert row.state is DeliveryState.HELD
    assert "patient" in row.reason
    assert "SOMEBODY-ELSE" not in row.reason


def test_after_a_merge_the_held_result_leaves_under_the_patient_who_remains(world: World, tmp_path: Path) -> None:
    """The PACS holds the study under the new number already; the vault knows that patient from another study."""
    promote_tiny(world.models)
    images = study(patient=1, PatientID="GONE", PatientName="Former^Name")
    world.pacs.put(study(patient=1, PatientID="KEPT", PatientName="Later^Name")[0])
    world.send(*images, *study(patient=2, PatientID="KEPT", PatientName="Later^Name"))
    world.work()
    assert world.reports(images[0]) == []
    pids = [world.intake.keys.pid("HOSPITAL", patient) for patient in ("GONE", "KEPT")]
    config = tmp_path / "site" / "ae_config.toml"
    for words in (["patients", "merge", *pids], ["delivery", "retry", "--all"]):
        done = CliRunner().invoke(build(), [*words, "--reason", "HIS merge", "--config", str(config)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    world.work()
    (report,) = world.reports(images[0])
    assert (report.PatientID, report.PatientName) == ("KEPT", "Later^Name")
    assert (report.StudyInstanceUID, report.AccessionNumber) == (images[0].StudyInstanceUID, images[0].AccessionNumber)
    late = study(patient=1, images=3, PatientID="KEPT", PatientName="Later^Name")[2]
    assert world.send(late) == [Taken.NEW]
    world.work()
    assert [report.PatientID for report in world.reports(images[0])] == ["KEPT", "KEPT"]


@pytest.mark.parametrize("held_back", [False, True])
def test_a_study_given_to_another_patient_is_answered_again_under_that_one(world: World, held_back: bool) -> None:
    """The whole study came under a wrong patient; the PACS corrected it and sent the very same images again."""
    promote_tiny(world.models)
    wrong = study(patient=1, PatientID="WRONG", PatientName="Wrong^Name")
    right = study(patient=1, PatientID="RIGHT", PatientName="Right^Name")
    if held_back:
        world.pacs.put(right[0])  # corrected there before the first result left, which is held
    world.send(*wrong)
    world.work()
    assert [one.PatientID for one in world.reports()] == ([] if held_back else ["WRONG"])
    (first,) = world.reply.catalogue.deliveries.list()
    for path in world.pacs.held("SR"):
        corrected = dcmread(path)
        corrected.PatientID, corrected.PatientName = "RIGHT", "Right^Name"
        world.pacs.put(corrected)
    assert world.send(*right) == [Taken.HELD, Taken.HELD]
    for held_id, whose in zip(world.intake.quarantine.ids(), ("newcomer", ""), strict=True):
        assert world.intake.release(held_id, by="me", reason="x", whose=whose) is Taken.KNOWN
    world.work()
    second = world.reports()[-1]
    assert (second.PatientID, second.PatientName) == ("RIGHT", "Right^Name")
    if not held_back:
        (earlier,) = second.PredecessorDocumentsSequence
        named = earlier.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        assert first.document is not None
        assert named == first.document.sop_uid
        assert world.state(wrong[0]) is StudyState.DELIVERED
    sent = len(world.reports())
    world.intake.catalogue.studies.reopen(world.intake.keys.uid(wrong[0].StudyInstanceUID), now=datetime.now(UTC))
    world.work()
    assert len(world.reports()) == sent  # the same answer to the same patient


def test_a_merged_patient_was_learned_from_under_either_number(world: World) -> None:
    kept = world.intake.keys.pid("HOSPITAL", "KEPT")
    promote_tiny(world.models, corpus=(kept,))
    (image,) = study(patient=1, images=1, PatientID="GONE")
    world.send(image)
    patients = world.intake.catalogue.patients
    plan = patients.plan(world.intake.keys.pid("HOSPITAL", "GONE"), kept)
    patients.merge(plan, named_by="a corpus", by="me", reason="x", now=datetime.now(UTC))
    world.work()
    result = world.reply.catalogue.results.latest(world.intake.keys.uid(image.StudyInstanceUID))
    assert result is not None
    assert result.findings.in_corpus


def test_corrected_demographics_reach_the_next_report(world: World) -> None:
    promote_tiny(world.models)
    images = study(patient=1, images=3)
    world.send(*images[:2])
    world.work()
    corrected = study(patient=1, images=3, PatientName="Right^Name", PatientBirthDate=born(11))[2]
    world.send(corrected)
    world.work()
    assert world.reports()[-1].PatientName == "Right^Name"


def test_a_corrected_birth_date_counts_for_the_answer(world: World) -> None:
    """A child by mistake, an adult by the correction: sent again before the answer, the study is not classified."""
    promote_tiny(world.models)
    images = study(patient=1, age=12)
    world.send(*images)
    world.send(*study(patient=1, age=40))
    world.work()
    result = world.reply.catalogue.results.latest(world.intake.keys.uid(images[0].StudyInstanceUID))
    assert result is not None
    assert result.findings.abstention is Abstention.ADULT


def damage(file: Path) -> None:
    data = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("file", ["model.onnx", "card.json", "corpus.json"])
def test_a_damaged_champion_answers_nothing_and_stops_nothing_else(
    world: World, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is inferred leaves, what is new waits, the status says why; a promotion mends it."""
    monkeypatch.setattr(respond, "RETRY_MODEL_S", 0.0)
    promote_tiny(world.models)
    before, after = study(patient=1), study(patient=2)
    world.send(*before)
    world.reply.step()
    world.reply.step()
    version = promote_tiny(world.models, slope=3.0)
    damage(world.models / "versions" / version / file)
    world.send(*after)
    world.work()
    assert len(world.reports(before[0])) == 1
    assert world.state(after[0]) is StudyState.WAITING
    world.reply.beat()
    (sign,) = world.reply.catalogue.roles.all()
    assert "card" in str(sign.told["model_trouble"])
    promote_tiny(world.models, slope=2.0)
    world.work()
    assert len(world.reports(after[0])) == 1
    assert world.reply.model_trouble == ""


def test_a_provider_that_is_missing_answers_nothing_and_stops_nothing_else(world: World) -> None:
    inference = world.settings.inference.model_copy(update={"provider": "cuda"})
    world.reply.settings = world.settings.model_copy(update={"inference": inference})
    promote_tiny(world.models)
    images = study(patient=1)
    world.send(*images)
    world.work()
    assert world.state(images[0]) is StudyState.WAITING
    assert "CUDA" in world.reply.model_trouble.upper()


def test_a_share_that_does_not_answer_is_no_unreadable_image(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    promote_tiny(world.models)
    images = study(patient=1)
    world.send(*images)

    def broken(instance: object) -> Dataset:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(world.reply.archive, "read", broken)
        world.work()
    assert world.state(images[0]) is StudyState.FAILED
    later = respond._now() + timedelta(hours=1)
    monkeypatch.setattr(respond, "_now", lambda: later)
    world.work()
    (report,) = world.reports()
    assert "NOT APPLICABLE" not in report.SeriesDescription


@pytest.mark.parametrize("left", [b"no DICOM", b"\0" * 128 + b"DICM" + b"\x02\0\0\0UL\4\0\xff\xff\0\0", b""])
def test_an_archived_file_that_is_damaged_is_an_unreadable_image(world: World, left: bytes) -> None:
    promote_tiny(world.models)
    images = study(patient=1, images=1)
    world.send(*images)
    (file,) = (world.settings.storage.root / "archive").rglob("*.dcm")
    file.chmod(0o600)
    file.write_bytes(left)
    world.work()
    (report,) = world.reports()
    assert "NOT APPLICABLE" in report.SeriesDescription


def test_a_sender_that_dies_ends_the_role(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A role must not go on without one of its destinations."""

    def dies(self: Reply, pacs: object) -> bool:
        raise LookupError("a fault of ours")

    monkeypatch.setattr(Reply, "deliver_step", dies)
    stop = threading.Event()
    with pytest.raises(LookupError):
        respond.run(world.settings, stop)
    assert stop.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("deliver-")]


def test_a_result_that_could_not_leave_for_days_does_not_leave_by_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 5: when answers are switched on again, what is too old stays, also where its delivery had begun."""
    promote_tiny(world.models)
    images = study(patient=1)
    world.send(*images)
    world.reply.step()
    roles = world.reply.catalogue.roles
    roles.set_flag("answers", "paused", by="it", reason="a doubt", now=respond._now())
    world.work()
    assert world.state(images[0]) is StudyState.DELIVERING
    later = respond._now() + timedelta(hours=world.settings.completion.answer_within_h + 12)
    monkeypatch.setattr(respond, "_now", lambda: later)
    roles.set_flag("answers", "on", by="it", reason="no doubt", now=later)
    world.work()
    assert world.reports() == []
    (row,) = world.reply.catalogue.deliveries.list()
    assert row.state is DeliveryState.DEAD
    world.reply.catalogue.deliveries.revive(row.id, later)
    world.work()
    assert len(world.reports()) == 1


def test_a_result_for_a_destination_that_was_taken_out_of_the_settings_does_not_wait_for_ever(
    tmp_path: Path, pacs: Pacs, free_port: Callable[[], int]
) -> None:
    """Else a late image would wait with it."""
    settings = site_of(tmp_path / "site", [("gone", free_port(), "GONE"), ("main", pacs.port, pacs.ae_title)])
    promote_tiny(settings.storage.root / "models")
    images = study(patient=1, images=3)
    with ExitStack() as stack:
        intake = Intake.open(settings)
        stack.callback(intake.close)
        world = World(settings, pacs, intake, stack.enter_context(respond.opened(settings)))
        world.send(*images[:2])
        world.reply.step()
        world.settings = world.reply.settings = settings.model_copy(update={"pacs": settings.pacs[1:]})
        world.work()
        states = {row.destination: row.state for row in world.reply.catalogue.deliveries.list()}
        assert states == {"gone": DeliveryState.DEAD, "main": DeliveryState.SENT}
        world.send(images[2])
        world.work()
        assert len(world.reports()) == 2
