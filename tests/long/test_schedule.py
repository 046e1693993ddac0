"""`osteon schedule` with the real trainer: due, killed, resumed, found again, cancelled, and ended once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep

import psutil
import pytest
from labelled import fill, labelled_site
from roles import UNWATCHED, Role, hand_in, until
from studies import study

from models.registry import Registry
from node.commands.init import init_site
from node.keep.catalogue import Catalogue
from node.keep.records import Run, RunState
from node.receive.intake import Intake
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
    config = labelled_site(tmp_path, patients=36, is_locked=lambda patient: patient % 3 == 0)
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


def living(*roles: Role) -> set[int]:
    """Give the schedulers of these `serve` that run."""
    lines = [line for role in roles for line in role.events if line["event"] == "role started" and line["child"] == "schedule"]
    return {pid for line in lines if psutil.pid_exists(pid := line["pid"]) and psutil.Process(pid).status() != "zombie"}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_serve_killed_while_a_trainer_works_is_taken_up_by_the_next_one_and_the_trainer_with_it(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """Killed when the run is queued, when its trainer starts, and when that trains: it is the same trainer to the end."""
    callers = [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "purpose": "learn"}]
    config = init_site(tmp_path, node={"port": free_port(), "callers": callers}, metrics=UNWATCHED)
    intake = Intake.open(load(config))
    hand_in(intake, study(patient=100, images=1)[0])  # a vault that knows nobody is none to a receiver
    intake.close()
    fill(config, patients=36, is_locked=lambda patient: patient % 3 == 0)
    config.write_text(config.read_text() + SCHEDULE)
    served: list[Role] = []

    def serve() -> Role:
        served.append(Role("serve", "--config", str(config)))
        return served[-1]

    def told(event: str) -> list[dict[str, object]]:
        """Give these log lines, whichever of them it was that had its scheduler write them on its way out."""
        return [line for one in served for line in one.events if line["event"] == event]

    with watched(config) as catalogue:
        try:
            for moment in ("run queued", "trainer started"):
                role = serve()
                until(lambda moment=moment: told(moment), seconds=120, told=moment)
                role.process.kill()
            role = serve()
            first = working(catalogue, catalogue.runs.list()[0].tries)
            assert first.worker is not None
            until(lambda: (folder(config, catalogue) / "fits" / "fold-0.json").exists(), seconds=120)
            role.process.kill()
            serve()
            run = until(lambda: (one := catalogue.runs.get(first.id)).finished_at and one, seconds=240)
            assert (run.state, run.tries, run.losses) == (RunState.DONE, first.tries, 0)
            until(lambda: len(living(*served)) == 1, seconds=60, told="one scheduler")
            until(lambda: served[-1].process.poll() is None and not machine.lives(first.worker), seconds=60)
        finally:
            for role in served:
                role.close()
        assert len(catalogue.runs.list()) == len(told("run queued")) == len(told("trainer started")) == 1
        assert Registry(load(config).storage.root / "models").versions() == [run.model_id]
        assert not living(*served)


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
