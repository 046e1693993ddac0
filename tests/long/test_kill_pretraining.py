"""A trainer is killed -9 at twenty moments of every step of a cycle, and ends with the bytes of one that was not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hall import Hall
from killer import PROCESSES
from pretraining import journal, require_same_pretraining, site_to_pretrain

from node.keep.records import RunState

KILLS: tuple[tuple[str, int, int], ...] = (
    ("stage decoding", 20, 12),
    ("stage pretraining", 20, 8),
    ("clusters.npz stands", 1, 1),
    ("stage classifier", 20, 5),
    ("backbone.pt stands", 1, 2),
    ("stage probing", 20, 4),
    ("fit fold", 20, 8),
    ("fold-0.json stands", 1, 3),
    ("fit refit", 20, 8),
    ("stage exporting", 20, 7),
    ("stage evaluating", 20, 8),
)
"""From which step on a trainer is killed how often, and before one of how many.

An epoch of DeepCluster has six steps, one of the classifier four: about every fourth trainer ends one, the others die within it.
Where a step leaves nothing before its end, all of them die within it.
"""

PROCESSES.set_forkserver_preload(
    ["training.cycle", "training.finetune", "onnx", "onnxruntime", "sklearn.linear_model", "pretraining"]
)


def hall_in(folder: Path, keep_s: float | None) -> Hall:
    return Hall(folder, site_to_pretrain(folder / "site"), role="pretrainer", kind="cycle", more=(keep_s,))


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> Hall:
    """Give a run that nobody killed."""
    hall = hall_in(tmp_path_factory.mktemp("unharmed"), None)
    assert hall.try_it() == 0, hall.told.read_text()[-2000:]
    return hall


def moments(seed: int, *, fewer: int) -> list[tuple[str, int]]:
    """Draw from which step on, and how many steps later, each trainer dies."""
    drawn = random.Random(seed)
    return [
        (trigger, drawn.randrange(1 if within > 1 else 0, within))
        for trigger, times, within in KILLS
        for _ in range(-(-times // fewer))
    ]


def require_same(hall: Hall, unharmed: Hall) -> None:
    """Hold everything that a run leaves against that of the run nobody killed, but what a clock says and the looks."""
    mine, theirs = hall.run(), unharmed.run()
    assert (mine.state, mine.decision, mine.devices) == (RunState.DONE, theirs.decision, None)
    require_same_pretraining(hall.path / "pretrain", unharmed.path / "pretrain")
    fits = [f"fits/fold-{number}.json" for number in range(3)]
    for name in ("corpus.json", "pretraining-corpus.json", "split.json", "folds.json", "predictions.json", "gate.json", *fits):
        assert hall.read(name) == unharmed.read(name), name
    evaluated, expected = ({**each.read("evaluation.json"), "looks": 0} for each in (hall, unharmed))
    assert evaluated == expected
    assert journal(hall.path / "metrics.jsonl") == journal(unharmed.path / "metrics.jsonl")
    for name in ("model.onnx", "reference.npz"):
        assert (hall.path / name).read_bytes() == (unharmed.path / name).read_bytes(), name
    start, other = hall.read("start.json"), unharmed.read("start.json")
    assert (start["sha256"], start["words"]) == (other["sha256"], other["words"])
    assert start["run"] == mine.folder
    assert hall.shelf().versions() == [mine.model_id]
    hall.shelf().verify(mine.model_id)
    assert hall.shelf().corpus(mine.model_id) == unharmed.shelf().corpus(theirs.model_id)
    (move,) = hall.shelf().history()
    assert (hall.shelf().champion(), move.by) == (mine.model_id, "gate")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("keep_s", "fewer"), [(-1.0, 1), (None, 10)], ids=["each state is written", "as in service"])
def test_a_trainer_killed_at_any_moment_of_a_pretraining_comes_to_the_bytes_of_one_that_was_not(
    tmp_path: Path, unharmed: Hall, keep_s: float | None, fewer: int
) -> None:
    hall = hall_in(tmp_path, keep_s)
    planned = moments(20260117, fewer=fewer)
    for trigger, at in planned:
        code = hall.try_it(trigger=trigger, at=at)
        assert code == -9, (trigger, at, code, hall.told.read_text()[-2000:])
    deaths = hall.deaths()
    assert len(deaths) == len(planned)
    assert hall.try_it() == 0, hall.told.read_text()[-2000:]
    require_same(hall, unharmed)
    if keep_s is not None:  # it went on where it was, epoch by epoch
        begun = [line for line in hall.told.read_text().splitlines() if line.startswith("pretraining, epoch 1:")]
        assert len(begun) <= 3
