"""`osteon schedule` with the real trainer: due, killed, resumed, found again, cancelled, and ended once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep

import psutil
import pytest
from labelled import labelled_site
from roles import Role, until

from models.registry import Registry
from node.keep.catalogue import Catalogue
from node.keep.records import Run, RunState
from node.settings import load
from training import machine

SCHEDULE = """
[[schedule]]
name = "often"
every = "1min"
timezone = "Europe/Berlin"
recipe = "phantom"
[schedule.when]
new_labels = 1
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    config = labelled_site(tmp_path, patients=24, is_locked=lambda patient: patient % 3 == 0)
    config.write_text(config.read_text() + SCHEDULE)
    return config


def osteon(*words: str, site: Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "node", *words, "--config", str(site)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@contextmanager
def scheduler(site: Path) -> Iterator[Role]:
    role = Role("schedule", "--config", str(site))
    try:
        yield role
    finally:
        role.close()


@contextmanager
def watched(site: Path) -> Iterator[Catalogue]:
    """Open the catalogue, and see to it that no trainer outlives the test."""
    with Catalogue.open(load(site).storage.catalogue) as catalogue:
        try:
            yield catalogue
        finally:
            for run in catalogue.runs.busy():
                if run.worker and machine.lives(run.worker):
                    os.kill(run.worker.pid, signal.SIGKILL)


def working(catalogue: Catalogue, tries: int) -> Run:
    """Wait until the trainer of this try has named itself."""

    def found() -> Run | None:
        runs = catalogue.runs.busy()
        return next((run for run in runs if run.tries == tries and run.worker), None)

    run: Run = until(found, seconds=240, told=f"a trainer of try {tries}")
    return run


def folder(site: Path, catalogue: Catalogue) -> Path:
    last = catalogue.runs.last()
    assert last is not None
    return load(site).storage.root / "runs" / last.folder


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_due_run_survives_the_kill_of_its_trainer_and_of_its_scheduler_and_ends_once(site: Path) -> None:
    with watched(site) as catalogue:
        with scheduler(site) as role:
            first = working(catalogue, 1)
            assert first.worker is not None
            assert first.schedule == "often"
            until(lambda: (folder(site, catalogue) / "fits" / "fold-0.json").exists(), seconds=120)
            os.kill(first.worker.pid, signal.SIGKILL)
            until(lambda: catalogue.runs.get(first.id).state is RunState.QUEUED, seconds=60)
            assert "killed" in catalogue.runs.get(first.id).reason
            fold = (folder(site, catalogue) / "fits" / "fold-0.json").stat().st_mtime_ns
            second = working(catalogue, 2)
            assert second.worker is not None
            until(lambda: (folder(site, catalogue) / "fits" / "fold-2.json").exists(), seconds=120)
            role.kill()
        sleep(2)
        assert machine.lives(second.worker), "a trainer outlives its scheduler"
        with scheduler(site) as role:
            run = until(lambda: (one := catalogue.runs.get(first.id)).finished_at and one, seconds=240)
            assert (run.state, run.tries) == (RunState.DONE, 2)
            assert run.decision in ("insufficient evidence", "refuse")
            until(lambda: "passed over: only 0 of 1 new labels" in osteon("schedule", "list", site=site), seconds=120)
            assert len(catalogue.runs.list()) == 1
            told = osteon("status", site=site)
            assert "next run" in told
            assert "CE" in told, "in the schedule's zone"
            assert f"last run    done {run.finished_at.astimezone():%Y-%m-%d %H:%M}" in told
            assert "run 1 is done" in osteon("train", "watch", "1", site=site)
            os.kill(role.process.pid, signal.SIGTERM)
            assert role.wait() == 0
        assert (folder(site, catalogue) / "fits" / "fold-0.json").stat().st_mtime_ns == fold, "what was done was not done again"
        assert Registry(load(site).storage.root / "models").versions() == [run.model_id]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_that_is_told_to_stop_ends_its_epoch_and_a_cancelled_one_is_taken_up_by_a_person(site: Path) -> None:
    with watched(site) as catalogue, scheduler(site):
        osteon("schedule", "pause", "often", "--reason", "this test asks by hand", site=site)
        osteon("schedule", "run-now", "often", site=site)
        first = working(catalogue, 1)
        assert first.worker is not None
        journal = until(lambda: (file := folder(site, catalogue) / "metrics.jsonl").exists() and file, seconds=120)
        os.kill(first.worker.pid, signal.SIGTERM)
        second = working(catalogue, 2)
        assert second.losses == 0, "a clean stop is no loss: it goes on at once"
        assert second.worker is not None
        os.kill(psutil.Process(second.worker.pid).ppid(), signal.SIGKILL)  # torchrun, whose worker has a session of its own
        assert working(catalogue, 3).losses == 0
        until(lambda: "fold 1" in journal.read_text(), seconds=120)
        osteon("train", "cancel", "1", "--reason", "the labels are wrong", site=site)
        until(lambda: catalogue.runs.get(first.id).state is RunState.CANCELLED, seconds=120)
        assert "run 1 is cancelled (the labels are wrong)" in osteon("train", "watch", "1", site=site, code=143)
        osteon("train", "resume", "1", "--reason", "they were right", site=site)
        lines = osteon("train", "watch", "1", site=site).splitlines()
        assert any(line.startswith("training ") and "left in this stage" in line for line in lines)
        assert catalogue.runs.get(first.id).state is RunState.DONE
        acts = [(act.what, act.reason) for act in catalogue.history.acts(subject="run 1")][::-1]
        assert acts == [
            ("run asked for", "by hand"),
            ("run cancelled", "the labels are wrong"),
            ("run resumed", "they were right"),
        ]
