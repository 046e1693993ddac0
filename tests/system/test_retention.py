"""What was kept for long enough is removed while the node runs, and nothing else is; what is known of answers stays known."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from machines import Machine, machine, other_modality
from pydicom import Dataset
from roles import running, until
from studies import study
from tiny_model import SIZE, promote_tiny

from models.preprocess import Preprocessing
from node.demo.pacs import Pacs
from node.errors import NotFound, NotToBeAnswered, StoreBusy
from node.keep import retention, turns
from node.keep.archive import Archive
from node.keep.cache import Cache
from node.keep.catalogue.instances import Instances
from node.keep.catalogue.studies import Studies
from node.keep.records import Label, StudyState, Worker
from node.receive.intake import Taken
from node.reply import respond

DAYS = 30


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with Pacs(tmp_path / "pacs", callers=["OSTEON"]) as running_pacs:
        yield running_pacs


@pytest.fixture
def here(tmp_path: Path, pacs: Pacs) -> Machine:
    limits = {"answer": float(DAYS), "learn": float(DAYS), "quarantine": float(DAYS)}
    return machine(tmp_path / "site", pacs, **{"storage.keep_days": limits})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[timedelta]:
    """Let a test move the replier's clock: what it puts in comes on top of now."""
    ahead = [timedelta(0)]
    monkeypatch.setattr(respond, "_now", lambda: datetime.now(UTC) + ahead[0])
    return ahead


def tidy(here: Machine, *, days: float) -> None:
    """Let the replier tidy as it would so many days from now."""
    with respond.opened(here.settings) as reply:
        while reply.retention.step(datetime.now(UTC) + timedelta(days=days)):
            pass


def images_left(here: Machine) -> list[Path]:
    return sorted((here.root / "archive").rglob("*.dcm"))


def answered(here: Machine) -> list[Dataset]:
    promote_tiny(here.root / "models")
    images = study(patient=1)
    here.send(*images)
    here.work()
    assert here.state(images[0]) is StudyState.DELIVERED
    return list(images)


def test_an_answered_study_goes_when_its_time_is_over_and_leaves_no_image_and_no_identity(here: Machine) -> None:
    images = answered(here)
    uid = here.uid(images[0])
    cache = Cache(here.root / "cache", Preprocessing(SIZE))
    with here.catalogue() as catalogue:
        cache.build(catalogue.instances.of_study(uid), Archive(here.root / "archive").read)
        catalogue.labels.put_all([label(catalogue.instances.of_study(uid)[0].pid, uid)], now=datetime.now(UTC), by="reader")
    pixels = cache.folder / "pixels.u8"
    assert any(pixels.read_bytes())
    tidy(here, days=DAYS - 1)
    assert len(images_left(here)) == 2
    tidy(here, days=DAYS + 1)
    assert here.state(images[0]) is StudyState.REMOVED
    assert images_left(here) == []
    assert list((here.root / "archive").iterdir()) == [], "no empty folder tells of the patient"
    assert not any(pixels.read_bytes())
    with here.vault() as vault, pytest.raises(NotFound):
        vault.study(uid)
    with here.catalogue() as catalogue:
        assert catalogue.instances.of_study(uid) == []
        assert catalogue.instances.for_training() == []
        assert len(catalogue.results.of_study(uid)) == 1
        assert [one.study_uid for one in catalogue.labels.all()] == [uid], "labels stay"
        assert [act.by for act in catalogue.history.acts(subject=uid)] == ["retention"]
        with pytest.raises(NotToBeAnswered, match="send it again"):
            catalogue.studies.reopen(uid, now=datetime.now(UTC))
    assert "removed" in here.osteon("status", "--study", images[0].StudyInstanceUID)
    here.osteon("archive", "verify")
    assert "Last errors" not in here.osteon("status")


def test_the_answer_of_a_removed_study_is_still_known_as_ones_own(here: Machine) -> None:
    answered(here)
    (report,) = here.reports().values()
    tidy(here, days=DAYS + 1)
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID
    assert here.send(report) == [Taken.OURS]


def test_a_removed_study_sent_again_is_taken_in_anew_and_gets_no_second_answer(here: Machine) -> None:
    images = answered(here)
    before = here.reports()
    tidy(here, days=DAYS + 1)
    let_in(here, images[0])
    promote_tiny(here.root / "models", slope=3.0)  # not even from another model: a promotion re-answers nothing
    assert here.send(*images) == [Taken.NEW, Taken.NEW]
    here.work()
    assert here.state(images[0]) is StudyState.DELIVERED
    assert here.reports() == before
    here.osteon("archive", "verify")
    late = study(patient=1, images=3)[2]
    here.send(late)
    here.work()
    assert len(here.reports()) == 2, "a late image leads to another answer, as ever"


def test_what_comes_while_its_study_is_removed_is_refused_and_may_come_again(here: Machine) -> None:
    images = answered(here)
    tidy(here, days=DAYS + 1)
    with pytest.raises(StoreBusy, match="again"):
        here.send(images[0])
    with pytest.raises(StoreBusy, match="again"):
        here.send(study(patient=1, images=3)[2])


def test_nothing_goes_that_is_not_answered_or_not_delivered(here: Machine, clock: list[timedelta]) -> None:
    waiting = study(patient=2)
    here.send(*waiting)
    here.work()
    assert here.state(waiting[0]) is StudyState.WAITING
    tidy(here, days=DAYS + 1)
    assert here.state(waiting[0]) is StudyState.WAITING
    clock[0] = timedelta(hours=73)
    here.work()
    assert here.state(waiting[0]) is StudyState.EXPIRED
    tidy(here, days=DAYS + 1)
    assert here.state(waiting[0]) is StudyState.REMOVED


def test_a_study_whose_result_a_destination_does_not_have_stays(here: Machine) -> None:
    promote_tiny(here.root / "models")
    images = study(patient=1)
    here.send(*images)
    with respond.opened(here.settings) as reply:
        while reply.step():
            pass
        claimed = reply.catalogue.deliveries.claim(claim_s=60, now=datetime.now(UTC))
        assert claimed is not None
        reply.catalogue.deliveries.kill(claimed.id, "refused", datetime.now(UTC))
    tidy(here, days=10 * DAYS)
    assert here.state(images[0]) is StudyState.DELIVERING
    assert len(images_left(here)) == 2


def test_learned_studies_and_held_objects_have_limits_of_their_own(tmp_path: Path, pacs: Pacs) -> None:
    limits = {"answer": 0.0, "learn": 10.0, "quarantine": 5.0}
    here = machine(tmp_path / "other", pacs, **{"storage.keep_days": limits})
    learned, kept = study(patient=1), answered_beside(here)
    here.send(*learned, called="OSTEON_LEARN")
    here.send(other_modality(3))
    here.work()
    tidy(here, days=6)
    assert list((here.root / "quarantine").glob("*.sealed")) == []
    with here.catalogue() as catalogue:
        assert catalogue.instances.held() == []
    assert here.state(learned[0]) is StudyState.LEARNED
    tidy(here, days=1000)
    assert here.state(learned[0]) is StudyState.REMOVED
    assert here.state(kept[0]) is StudyState.DELIVERED, "0 is for ever"


def answered_beside(here: Machine) -> list[Dataset]:
    promote_tiny(here.root / "models")
    images = study(patient=2)
    here.send(*images)
    here.work()
    return list(images)


def test_nothing_goes_while_a_training_run_or_a_backup_is_at_work(here: Machine) -> None:
    images = answered(here)
    lock = here.root / "runs" / "20260301-x" / "lock"
    lock.parent.mkdir()
    lock.touch()
    with open(lock, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        tidy(here, days=DAYS + 1)
    with turns.looking(here.root):
        tidy(here, days=DAYS + 1)
    assert here.state(images[0]) is StudyState.DELIVERED
    tidy(here, days=DAYS + 1)
    assert here.state(images[0]) is StudyState.REMOVED


def test_nothing_goes_while_a_run_works_whose_folder_cannot_be_seen_here(here: Machine) -> None:
    """As that of another host, or of another user."""
    images = answered(here)
    later = datetime.now(UTC) + timedelta(days=DAYS + 1)
    with here.catalogue() as catalogue:
        run = catalogue.runs.start(
            kind="finetune", recipe="phantom", devices="far:cuda:0", worker=Worker("far", 1, "boot:1"), now=later, until=later
        )
        tidy(here, days=DAYS + 1)
        assert here.state(images[0]) is StudyState.DELIVERED
        assert catalogue.runs.fail(run.id, run.tries, "test", now=later)
    tidy(here, days=DAYS + 1)
    assert here.state(images[0]) is StudyState.REMOVED


def test_a_run_that_was_killed_and_is_not_entered_as_lost_does_not_keep_everything_for_ever(here: Machine) -> None:
    images = answered(here)
    with here.catalogue() as catalogue:
        now, worker = datetime.now(UTC), Worker("gone", 1, "boot:1")
        catalogue.runs.start(kind="finetune", recipe="phantom", devices="gone:cpu", worker=worker, now=now, until=now)
    tidy(here, days=DAYS + 1)
    assert here.state(images[0]) is StudyState.REMOVED


class Killed(BaseException):
    """The process ends here."""


def held_for(here: Machine, days: float) -> None:
    """Let the quarantine look as if it had held what it holds for so long."""
    from sqlalchemy import update

    from node.keep.catalogue.schema import held

    at = datetime.now(UTC) - timedelta(days=days)
    with here.catalogue() as catalogue:
        catalogue.database.write(lambda connection: connection.execute(update(held).values(held_at=at)))


def is_held(here: Machine) -> tuple[int, int]:
    """Count rows and sealed files of the quarantine."""
    with here.catalogue() as catalogue:
        return len(catalogue.instances.held()), len(list((here.root / "quarantine").glob("*.sealed")))


def test_a_held_object_that_comes_again_is_kept_from_then_on(here: Machine) -> None:
    image = other_modality(3)
    here.send(image)
    held_for(here, DAYS + 1)
    assert here.send(image) == [Taken.HELD]
    tidy(here, days=DAYS - 1)
    assert is_held(here) == (1, 1)
    tidy(here, days=DAYS + 1)
    assert is_held(here) == (0, 0)


@pytest.mark.parametrize("when", ["listed", "half removed"])
def test_a_held_object_that_comes_again_while_it_is_removed_is_not_lost(
    here: Machine, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = other_modality(3)
    here.send(image)
    held_for(here, DAYS + 1)
    listed = Instances.held

    def comes_again(instances: Instances) -> object:
        due = listed(instances)
        here.send(image)
        return due

    with respond.opened(here.settings) as reply, monkeypatch.context() as patch:
        keeper = reply.retention
        if when == "listed":
            patch.setattr(Instances, "held", comes_again)
            keeper.step(datetime.now(UTC))
        else:

            def dies(held_id: str) -> None:
                reply.retention.discard(held_id)
                raise OSError("the disk is gone")  # and so the row stays

            with pytest.raises(OSError, match="gone"):
                replace(keeper, discard=dies).step(datetime.now(UTC))
            assert is_held(here) == (1, 0)
            here.send(image)
    tidy(here, days=0)
    here.osteon("archive", "repair", "--yes")
    assert is_held(here) == (1, 1)


@pytest.mark.parametrize("step", ["blank", "withdraw", "forget", "removed"])
def test_a_removal_cut_short_anywhere_is_finished_by_the_next_pass(
    here: Machine, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = answered(here)
    uid = here.uid(images[0])
    later = datetime.now(UTC) + timedelta(days=DAYS + 1)

    def killed(*_args: object, **_named: object) -> None:
        raise Killed

    with respond.opened(here.settings) as reply, monkeypatch.context() as patch:
        keeper = reply.retention
        if step == "forget":
            keeper = replace(keeper, forget=killed)
        else:
            owner = {"blank": retention.Cache, "withdraw": Archive, "removed": Studies}[step]
            patch.setattr(owner, "all" if step == "blank" else step, killed)
        with pytest.raises(Killed):
            keeper.step(later)
    here.osteon("archive", "verify")  # between the two passes nothing is amiss that a person should mend
    with here.catalogue() as catalogue:
        assert catalogue.instances.for_training() == [], "no run that begins now sees it"
    with pytest.raises(StoreBusy):
        here.send(images[0])
    tidy(here, days=DAYS + 1)
    assert here.state(images[0]) is StudyState.REMOVED
    assert images_left(here) == []
    with here.vault() as vault:
        assert vault.known(uid) == frozenset()


def test_a_removal_cut_short_is_finished_also_when_there_is_no_limit_any_more(
    here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = answered(here)

    def killed(*_args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Archive, "withdraw", killed)
        with pytest.raises(Killed):
            tidy(here, days=DAYS + 1)
    here.config.write_text(here.config.read_text().replace(f" = {float(DAYS)}", " = 0.0"))
    assert here.settings.storage.keep_days.answer == 0
    tidy(here, days=0)
    assert images_left(here) == []
    let_in(here, images[0])
    assert here.send(*images) == [Taken.NEW, Taken.NEW]


def test_the_running_role_tidies_by_itself(here: Machine) -> None:
    """Its studies were received long ago, as far as the catalogue says."""
    images = answered(here)
    received(here, datetime.now(UTC) - timedelta(days=DAYS + 1))
    with running("reply", config=here.config) as role:
        role.event("study removed")
    until(lambda: here.state(images[0]) is StudyState.REMOVED)


def let_in(here: Machine, image: Dataset) -> None:
    """Let time pass for one study, in its row."""
    from sqlalchemy import update

    from node.keep.catalogue.schema import study as studies

    changed = {"claimed_until": datetime.now(UTC)}
    uid = here.uid(image)
    with here.catalogue() as catalogue:
        catalogue.database.write(
            lambda connection: connection.execute(update(studies).where(studies.c.uid == uid).values(changed))
        )


def received(here: Machine, at: datetime) -> None:
    """Let every image look as if it had come then."""
    from sqlalchemy import update

    from node.keep.catalogue.schema import instance
    from node.keep.catalogue.schema import study as studies

    with here.catalogue() as catalogue:
        catalogue.database.write(lambda connection: connection.execute(update(studies).values(last_at=at)))
        catalogue.database.write(lambda connection: connection.execute(update(instance).values(received_at=at)))


def label(pid: str, uid: str) -> Label:
    return Label(pid, uid, "", "ewing", "reader", "2026-03-01", "histology")


def test_a_replier_without_limits_removes_nothing(tmp_path: Path, pacs: Pacs) -> None:
    here = machine(tmp_path / "other", pacs)
    images = answered_beside(here)
    tidy(here, days=10_000)
    assert here.state(images[0]) is StudyState.DELIVERED
