"""A site is lost, and comes back from its last set on an empty machine: the same patients, the same answers, nothing twice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Machine, machine, other_modality
from studies import study
from tiny_model import promote_tiny

from node.demo.pacs import Pacs
from node.keep.records import Hold, StudyState


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with Pacs(tmp_path / "pacs", callers=["OSTEON"]) as running:
        yield running


@pytest.fixture
def old(tmp_path: Path, pacs: Pacs) -> Machine:
    return machine(tmp_path / "old", pacs)


@pytest.fixture
def new(tmp_path: Path, pacs: Pacs, old: Machine) -> Machine:
    """Give the empty machine: nothing but settings, and the keys, which a person brought."""
    empty = machine(tmp_path / "new", pacs)
    shutil.copytree(old.folder / "keys", empty.folder / "keys", dirs_exist_ok=True)
    return empty


def test_a_restored_site_knows_what_the_lost_one_knew_and_answers(old: Machine, new: Machine, tmp_path: Path) -> None:
    version = promote_tiny(old.root / "models")
    answered, open_, fresh = study(patient=1), study(patient=2), study(patient=4)
    old.send(*answered)
    old.work()
    (first,) = old.reports()
    old.send(*open_)
    old.send(other_modality(3))
    made = old.backup(tmp_path / "sets")

    said = new.restore(made)
    assert "Answers are paused" in said
    shutil.copytree(old.root / "archive", new.root / "archive", dirs_exist_ok=True)
    with new.catalogue() as catalogue:
        (held,) = [held for held, _at in catalogue.instances.held()]
        assert held.reason is Hold.MODALITY
    assert version in new.osteon("models", "list")
    assert new.state(answered[0]) is StudyState.DELIVERED
    new.send(*fresh)
    new.work()
    assert set(new.reports()) == {first}, "nothing leaves before a person says so"
    new.osteon("reply", "resume", "--reason", "restored")
    new.work()
    assert new.answers(fresh[0]) == [fresh[0].PatientName]
    assert new.state(open_[0]) is StudyState.EXPIRED
    new.osteon("reply", "study", open_[0].AccessionNumber)
    new.work()
    assert new.answers(open_[0]) == [open_[0].PatientName]


def test_what_was_answered_after_the_set_was_made_is_not_answered_with_another_document(
    old: Machine, new: Machine, tmp_path: Path
) -> None:
    promote_tiny(old.root / "models")
    images, stored = study(patient=1), study(patient=2)
    old.osteon("reply", "pause", "--reason", "test")
    old.send(*stored)
    old.work()  # its result stands in the set, and leaves after it was made
    old.send(*images)
    made = old.backup(tmp_path / "sets")
    old.osteon("reply", "resume", "--reason", "test")
    old.work()
    before = old.reports()
    assert len(before) == 2

    new.restore(made)
    shutil.copytree(old.root / "archive", new.root / "archive", dirs_exist_ok=True)
    promote_tiny(new.root / "models", slope=3.0)  # another model would say it otherwise
    new.osteon("reply", "resume", "--reason", "restored")
    new.work()
    assert new.state(images[0]) is StudyState.EXPIRED
    assert new.state(stored[0]) is StudyState.DELIVERED
    assert new.reports() == before, "neither a second document nor other bytes under the UID of the first"
