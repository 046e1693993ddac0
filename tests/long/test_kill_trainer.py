"""The trainer is killed -9 before any file gets its name and any entry is made; it still comes to the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hall import Hall
from killer import PROCESSES
from labelled import labelled_site

from node.keep.records import RunState

KILLS_MAX = 60
AFTER_THE_LOOK = {"predictions.json stands", "evaluation.json stands"}
"""Killed before one of these, a run has looked at the locked patients and does not know it: it looks, and counts, again."""

PROCESSES.set_forkserver_preload(["training.cycle", "training.finetune", "matplotlib.figure", "onnx", "onnxruntime"])


def hall_in(folder: Path) -> Hall:
    site = labelled_site(folder / "site", patients=24, is_locked=lambda patient: patient % 3 == 0)
    return Hall(folder, site, role="trainer", kind="finetune")


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> Hall:
    """Give a run that nobody killed."""
    hall = hall_in(tmp_path_factory.mktemp("unharmed"))
    assert hall.try_it() == 0
    return hall


def require_same(hall: Hall, unharmed: Hall) -> None:
    """Same model, same decision, one version on the shelf with nothing half written beside it, put into service once."""
    mine, theirs = hall.run(), unharmed.run()
    assert (mine.state, mine.decision, mine.devices, mine.worker) == (RunState.DONE, theirs.decision, None, None)
    for name in ("corpus.json", "folds.json", "gate.json", *(f"fits/fold-{number}.json" for number in range(3))):
        assert hall.read(name) == unharmed.read(name), name
    digests = ("onnx_sha256", "reference_sha256")
    assert [hall.read("parity.json")[name] for name in digests] == [unharmed.read("parity.json")[name] for name in digests]
    assert hall.shelf().versions() == [mine.model_id]
    assert [each.name for each in (hall.root / "models" / "versions").iterdir()] == [mine.model_id]
    card = hall.shelf().verify(mine.model_id)
    assert card.onnx_sha256 == unharmed.shelf().card(theirs.model_id).onnx_sha256
    (move,) = hall.shelf().history()
    assert (hall.shelf().champion(), move.version, move.by, mine.decision) == (mine.model_id, mine.model_id, "gate", "promote")
    assert hall.looks() == hall.read("decision.json")["looks"] == card.locked_looks


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_trainer_killed_before_every_step_comes_to_the_model_of_one_that_was_not(tmp_path: Path, unharmed: Hall) -> None:
    hall = hall_in(tmp_path)
    code: int | None = None
    for _ in range(KILLS_MAX):
        code = hall.try_it(hall.deaths())
        for version in hall.shelf().versions():
            hall.shelf().verify(version)  # whole, or not there
        if code == 0 or hall.run().state is RunState.DONE:
            break
        assert code == -9, (code, hall.told.read_text()[-500:])
    else:
        pytest.fail("the trainer has more steps than this test knows")
    deaths = hall.deaths()
    assert len(deaths) == len(set(deaths))
    expected = {
        f"{name} stands"
        for name in ("run.json", "corpus.json", "refit.pt", "model.onnx", "versions/…", "champion.json", "report.html")
    }
    assert expected | AFTER_THE_LOOK | {"Runs.enter", "Runs.bind", "Runs.done"} <= set(deaths), deaths
    require_same(hall, unharmed)
    assert hall.looks() == 1 + len(AFTER_THE_LOOK)
