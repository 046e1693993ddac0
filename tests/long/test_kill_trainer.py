"""The trainer is killed -9 before any file gets its name and any entry is made; it still comes to the same model."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from killer import PROCESSES, Killed
from labelled import labelled_site

from models.registry import Registry
from node.keep.catalogue import Catalogue
from node.keep.records import Run, RunState
from node.settings import load
from training import machine

KILLS_MAX = 60
AFTER_THE_LOOK = {"predictions.json stands", "evaluation.json stands"}
"""Killed before one of these, a run has looked at the locked patients and does not know it: it looks, and counts, again."""

PROCESSES.set_forkserver_preload(["training.cycle", "training.finetune", "matplotlib.figure", "onnx", "onnxruntime"])


class Hall:
    """A site with one run, and the trainers that are killed at it; leased again each time as a supervisor would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = labelled_site(folder / "site", patients=24, is_locked=lambda patient: patient % 3 == 0)
        self.settings = load(self.config)
        self.root = self.settings.storage.root
        self.now = datetime.now(UTC)
        self.told = folder / "told"
        with Catalogue.open(self.settings.storage.catalogue) as catalogue:
            asked = catalogue.runs.ask(kind="finetune", recipe="phantom", schedule="s", by="me", reason="", now=self.now)
        self.number = asked.id

    def try_it(self, spared: Collection[str] | None) -> int | None:
        """Let a trainer work until it is done, or would make a step that is not spared; give how its process ended."""
        self.now += timedelta(hours=1)
        with Catalogue.open(self.settings.storage.catalogue) as catalogue:
            machine.settle(catalogue, self.now)
            if catalogue.runs.get(self.number).state is RunState.FAILED:  # killed three times in a row: a person takes it up
                catalogue.runs.resume(self.number, by="me", reason="on", now=self.now)
            self.now += timedelta(hours=1)
            devices, until = machine.device_set(self.settings.training.device), self.now + machine.LEASE
            run = catalogue.runs.lease(devices=devices, host=machine.host(), ready=lambda _: True, now=self.now, until=until)
        assert run is not None, "the device set is occupied, or nothing waits"
        at = -1 if spared is None else 0
        trainer = Killed("trainer", self.config, at=at, spared=spared, told=self.told, more=((run.id, run.tries),))
        code = trainer.wait()
        trainer.end()
        return code

    def deaths(self) -> list[str]:
        """Name the steps before which trainers died."""
        lines = self.told.read_text().splitlines() if self.told.exists() else []
        return [line.removeprefix("killed before ") for line in lines if line.startswith("killed before ")]

    def run(self) -> Run:
        with Catalogue.open(self.settings.storage.catalogue) as catalogue:
            assert len(catalogue.runs.list()) == 1
            return catalogue.runs.get(self.number)

    def read(self, name: str) -> Any:
        return json.loads((self.root / "runs" / self.run().folder / name).read_bytes())

    def looks(self) -> int:
        return len((self.root / "models" / "looks.jsonl").read_text().splitlines())

    def shelf(self) -> Registry:
        return Registry(self.root / "models")


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> Hall:
    """Give a run that nobody killed."""
    hall = Hall(tmp_path_factory.mktemp("unharmed"))
    assert hall.try_it(None) == 0
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
    hall = Hall(tmp_path)
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
