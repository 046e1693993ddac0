"""Versions never change; who put which into service when, and why, is never lost."""

from __future__ import annotations

import json
import multiprocessing
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tiny_model

from models import durable
from models.errors import NoSuchVersion, NotAllowed, Tampered
from models.registry import Move, Registry

NOW = datetime(2026, 3, 1, 14, 5, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models")


def promote(registry: Registry, version: str, at: datetime = NOW, reason: str = "looks good", **other: str) -> Move:
    return registry.promote(version, by="Dr Who", reason=reason, decision="promote", now=at, locked=(), **other)


def shelve(registry: Registry, tmp_path: Path, count: int) -> list[str]:
    return [tiny_model.shelve(registry, tmp_path, slope=float(each + 1)) for each in range(count)]


# --- versions -----------------------------------------------------------------------------------------------------------------


def test_a_version_is_named_by_day_and_hash_and_reads_back(registry: Registry, tmp_path: Path) -> None:
    version = tiny_model.shelve(registry, tmp_path, corpus=["OST-A"])
    assert version.startswith("20260301-")
    assert registry.versions() == [version]
    assert registry.verify(version) == registry.card(version)
    assert registry.model(version) == tiny_model.onnx_bytes()
    assert registry.corpus(version) == {"OST-A"}
    assert registry.reference(version) is None
    assert sorted(file.name for file in registry.folder(version).iterdir()) == ["card.json", "corpus.json", "model.onnx"]


def test_the_same_version_again_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    first = tiny_model.shelve(registry, tmp_path)
    before = [(file.name, file.stat().st_mtime_ns) for file in sorted(registry.folder(first).iterdir())]
    assert tiny_model.shelve(registry, tmp_path) == first
    assert [(file.name, file.stat().st_mtime_ns) for file in sorted(registry.folder(first).iterdir())] == before


def test_files_of_a_version_are_read_only(registry: Registry, tmp_path: Path) -> None:
    version = tiny_model.shelve(registry, tmp_path)
    assert all(file.stat().st_mode & 0o222 == 0 for file in registry.folder(version).iterdir())


@pytest.mark.parametrize("name", ["model.onnx", "corpus.json", "card.json"])
@pytest.mark.parametrize("what", ["changed", "gone"])
def test_a_file_that_is_not_the_cards_is_refused(registry: Registry, tmp_path: Path, name: str, what: str) -> None:
    version = tiny_model.shelve(registry, tmp_path)
    file = registry.folder(version) / name
    file.chmod(0o600)
    if what == "gone":
        file.unlink()
    elif name == "card.json":
        file.write_text(file.read_text().replace('"temperature": 1.0', '"temperature": 2.0'))
    else:
        file.write_bytes(file.read_bytes().replace(b"OST-A", b"OST-Z") + b" ")
    with pytest.raises(Tampered):
        registry.verify(version)
    with pytest.raises(Tampered):
        promote(registry, version)
    assert registry.champion() is None


def test_a_card_that_states_another_hash_is_not_shelved(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "tiny.onnx"
    file.write_bytes(tiny_model.onnx_bytes())
    with pytest.raises(Tampered, match=r"model\.onnx"):
        registry.add(file, tiny_model.card(b"another"), corpus=["OST-A", "OST-B"])
    with pytest.raises(Tampered, match=r"corpus\.json"):
        registry.add(file, tiny_model.card(file.read_bytes()), corpus=["OST-A"])
    with pytest.raises(Tampered, match=r"reference\.npz"):
        registry.add(file, tiny_model.card(file.read_bytes()), corpus=["OST-A", "OST-B"], reference=file)
    assert registry.versions() == []


def test_a_version_appears_whole_or_not_at_all(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = durable.write

    def full(path: Path, data: bytes, **options: int) -> None:
        if path.name == "card.json":
            raise OSError(28, "no space")
        write(path, data, **options)

    monkeypatch.setattr(durable, "write", full)
    with pytest.raises(OSError, match="no space"):
        tiny_model.shelve(registry, tmp_path)
    assert registry.versions() == []
    monkeypatch.undo()
    version = tiny_model.shelve(registry, tmp_path)
    assert [each.name for each in (tmp_path / "models" / "versions").iterdir()] == [version]


@pytest.mark.parametrize("name", ["", ".", "..", "../aliases", "20260301-0000000000", "20260301-zzzzzzzzzz"])
def test_what_is_not_on_the_shelf_is_named_so(registry: Registry, tmp_path: Path, name: str) -> None:
    tiny_model.shelve(registry, tmp_path)
    with pytest.raises(NoSuchVersion):
        registry.card(name)


# --- aliases and history ------------------------------------------------------------------------------------------------------


def test_the_history_says_which_model_was_in_service_when_by_whom_and_why(registry: Registry, tmp_path: Path) -> None:
    one, two = shelve(registry, tmp_path, 2)
    assert registry.champion() is None
    promote(registry, one, NOW, "the first")
    promote(registry, two, NOW + HOUR, "better")
    assert registry.champion() == two
    assert registry.champion_at(NOW - HOUR) is None
    then = registry.champion_at(NOW + HOUR / 2)
    assert then is not None
    assert (then.version, then.by, then.reason, then.decision, then.previous) == (one, "Dr Who", "the first", "promote", "")
    assert registry.champion_at(NOW + HOUR) == registry.history()[-1]
    assert registry.history()[-1].previous == one


def test_a_challenger_does_not_touch_the_champion(registry: Registry, tmp_path: Path) -> None:
    one, two = shelve(registry, tmp_path, 2)
    promote(registry, one)
    promote(registry, two, NOW + HOUR, alias="challenger")
    assert (registry.champion(), registry.alias("challenger")) == (one, two)
    now = registry.champion_at(NOW + 2 * HOUR)
    assert now is not None
    assert now.version == one
    with pytest.raises(NoSuchVersion):
        registry.alias("../champion")


def test_rollback_goes_back_step_by_step_through_the_champions(registry: Registry, tmp_path: Path) -> None:
    one, two, three = shelve(registry, tmp_path, 3)
    for each in (one, two, three):
        promote(registry, each)
    assert registry.rollback(by="x", reason="worse", now=NOW + HOUR) == two
    assert registry.rollback(by="x", reason="worse", now=NOW + HOUR) == one
    with pytest.raises(NoSuchVersion, match="no earlier champion"):
        registry.rollback(by="x", reason="worse", now=NOW + HOUR)
    promote(registry, three, NOW + HOUR)
    assert registry.rollback(by="x", reason="again", now=NOW + HOUR) == one
    assert [move.action for move in registry.history()] == ["promote"] * 3 + ["rollback"] * 2 + ["promote", "rollback"]


def test_rollback_without_any_champion_is_refused(registry: Registry) -> None:
    with pytest.raises(NoSuchVersion):
        registry.rollback(by="x", reason="y", now=NOW)


def test_promoting_what_is_in_service_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    (version,) = shelve(registry, tmp_path, 1)
    first = promote(registry, version)
    assert promote(registry, version, NOW + HOUR, "again") == first
    assert registry.history() == [first]


def test_a_version_trained_on_a_locked_patient_can_never_be_put_into_service(registry: Registry, tmp_path: Path) -> None:
    version = tiny_model.shelve(registry, tmp_path, corpus=["OST-A", "OST-B"])
    with pytest.raises(NotAllowed, match="1 of the locked"):
        registry.promote(version, by="x", reason="y", decision="promote", now=NOW, locked={"OST-B", "OST-C"})
    assert registry.champion() is None
    registry.promote(version, by="x", reason="y", decision="promote", now=NOW, locked={"OST-C"})


@pytest.mark.parametrize(("by", "reason"), [("", "y"), ("x", " ")])
def test_nobody_promotes_without_a_name_and_a_reason(registry: Registry, tmp_path: Path, by: str, reason: str) -> None:
    (version,) = shelve(registry, tmp_path, 1)
    with pytest.raises(NotAllowed):
        registry.promote(version, by=by, reason=reason, decision="promote", now=NOW, locked=())


def test_a_clock_that_was_set_back_does_not_reorder_the_history(registry: Registry, tmp_path: Path) -> None:
    one, two = shelve(registry, tmp_path, 2)
    promote(registry, one, NOW)
    promote(registry, two, NOW - HOUR)
    then = registry.champion_at(NOW)
    assert then is not None
    assert then.version == two


# --- crashes and crowds -------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_of_the_history_is_survived(registry: Registry, tmp_path: Path) -> None:
    one, two = shelve(registry, tmp_path, 2)
    promote(registry, one)
    file = tmp_path / "models" / "history.jsonl"
    whole = file.read_bytes()
    for kept in range(len(whole)):
        file.write_bytes(whole[:kept])
        assert [move.version for move in Registry(tmp_path / "models").history()] == [one]
    file.write_bytes(whole[: len(whole) // 2])
    promote(registry, two, NOW + HOUR)
    assert [json.loads(line)["version"] for line in file.read_text().splitlines()] == [one, two]


def test_a_crash_between_pointer_and_history_loses_nothing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = shelve(registry, tmp_path, 3)
    promote(registry, one)
    record = Registry._record
    monkeypatch.setattr(Registry, "_record", lambda self, moves: record(self, [move for move in moves if move.number == 1]))
    promote(registry, two, NOW + HOUR)
    monkeypatch.undo()
    assert registry.champion() == two
    assert [move.version for move in registry.history()] == [one, two]
    promote(registry, three, NOW + 2 * HOUR)
    lines = (tmp_path / "models" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["version"] for line in lines] == [one, two, three]


def test_a_damaged_line_within_the_history_is_named(registry: Registry, tmp_path: Path) -> None:
    (one,) = shelve(registry, tmp_path, 1)
    promote(registry, one)
    file = tmp_path / "models" / "history.jsonl"
    file.write_bytes(b"garbage\n" + file.read_bytes())
    with pytest.raises(Tampered, match="line 1"):
        registry.history()


def _promote_all(folder: Path, versions: list[str]) -> None:
    for version in versions:
        promote(Registry(folder), version)


def test_processes_that_promote_at_once_lose_no_move(registry: Registry, tmp_path: Path) -> None:
    versions = shelve(registry, tmp_path, 4)
    context = multiprocessing.get_context("spawn")
    crowd = [context.Process(target=_promote_all, args=(tmp_path / "models", versions[at:] + versions[:at])) for at in (0, 2)]
    for each in crowd:
        each.start()
    for each in crowd:
        each.join(60)
        assert each.exitcode == 0
    moves = registry.history()
    assert [move.number for move in moves] == list(range(1, len(moves) + 1))
    assert [move.previous for move in moves] == ["", *[move.version for move in moves[:-1]]]
    assert registry.champion() == moves[-1].version


def test_nothing_is_said_before_it_is_synced(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pointer's bytes, its name, and the history line are on the disk when `promote` returns."""
    (version,) = shelve(registry, tmp_path, 1)
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    promote(registry, version)
    pointer = next(at for at, name in enumerate(synced) if name.startswith(".champion.json"))
    assert synced.index("aliases", pointer) > pointer
    assert synced[-1] == "history.jsonl"
