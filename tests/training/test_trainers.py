"""The supervisor, with trainers that do nothing as real processes: started once, found again, ended, started again."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from roles import until

from node.commands.init import init_site
from node.keep.catalogue import Catalogue
from node.keep.records import Run, RunState, Worker
from node.settings import load
from training import machine
from training.supervise import Supervisor, torchrun, words_of

TRAINER = Path(__file__).parents[1] / "trainer.py"
QUIET = {"name": "nightly", "every": "1d", "recipe": "phantom", "timezone": "UTC", "when": {"quiet_hours": "07:00-19:00"}}


class Floor:
    """A site, its supervisors and their trainers; the clock is ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = load(init_site(folder / "site", schedule=[QUIET], training={"stop_grace_s": 60.0}))
        self.url = self.settings.storage.catalogue
        self.catalogue = Catalogue.open(self.url)
        self.now = datetime.now(UTC)
        self.how = "work"
        self.supervisors: list[Supervisor] = []

    def supervisor(self) -> Supervisor:
        def command(run: Run) -> Sequence[str]:
            return sys.executable, str(TRAINER), self.url, str(self.folder), str(run.id), str(run.tries), self.how

        one = Supervisor(self.settings, self.catalogue, command, now=lambda: self.now)
        self.supervisors.append(one)
        return one

    def ask(self, schedule: str = "nightly") -> int:
        return self.catalogue.runs.ask(
            kind="finetune", recipe="phantom", schedule=schedule, by="me", reason="test", now=self.now
        ).id

    def due(self, schedule: str = "nightly") -> int:
        self.catalogue.timings.see(schedule, schedule, zone="UTC", named=(schedule,), now=self.now - timedelta(hours=1))
        assert self.catalogue.timings.queue(schedule, due_at=self.now, kind="finetune", recipe="phantom", now=self.now)
        return self.catalogue.runs.list()[0].id

    def run(self, number: int) -> Run:
        return self.catalogue.runs.get(number)

    def step_until(self, condition: Any, *supervisors: Supervisor) -> None:
        def look() -> Any:
            for one in supervisors or self.supervisors:
                one.step()
            return condition()

        until(look, seconds=60)

    def begun(self) -> list[tuple[int, int, int]]:
        """List every trainer that ever began: run, try, process."""
        file = self.folder / "begun"
        return [tuple(map(int, line.split())) for line in file.read_text().splitlines()] if file.exists() else []  # type: ignore[misc]

    def finish(self) -> None:
        (self.folder / "finish").touch()

    def end(self) -> None:
        self.finish()
        for one in self.supervisors:
            for process in one._started.values():
                process.kill()
                process.wait()
        for _, _, pid in self.begun():
            until(lambda pid=pid: not machine._born(pid))
        self.catalogue.close()


@pytest.fixture
def floor(tmp_path: Path) -> Iterator[Floor]:
    one = Floor(tmp_path)
    yield one
    one.end()


def test_runs_are_worked_off_one_after_the_other(floor: Floor) -> None:
    first, second = floor.ask("nightly"), floor.ask("other")
    supervisor = floor.supervisor()
    floor.step_until(floor.begun)
    for _ in range(20):
        supervisor.step()
    assert [floor.run(one).state for one in (first, second)] == ["running", "queued"]
    assert len(floor.begun()) == 1
    floor.finish()
    floor.step_until(lambda: floor.run(second).state is RunState.DONE)
    assert [(run, tries) for run, tries, _ in floor.begun()] == [(first, 1), (second, 1)]
    assert floor.run(first).state is RunState.DONE


def test_a_trainer_leads_a_session_of_its_own(floor: Floor) -> None:
    """A signal to the supervisor's group, or its end, must not reach it."""
    floor.ask()
    floor.supervisor()
    floor.step_until(floor.begun)
    ((_, _, pid),) = floor.begun()
    assert os.getsid(pid) == pid != os.getsid(0)


def test_a_trainer_does_not_get_the_keys_of_the_site(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTEON_SITE_KEY", "secret")
    monkeypatch.setenv("OSTEON_OTHER", "no secret")
    storage = floor.settings.storage.model_copy(update={"site_key": "env:OSTEON_SITE_KEY"})
    floor.settings = floor.settings.model_copy(update={"storage": storage})
    floor.ask()
    floor.supervisor()
    floor.step_until((floor.folder / "environment").exists)
    names = until(lambda: (floor.folder / "environment").read_text().split())
    assert "OSTEON_OTHER" in names
    assert "OSTEON_SITE_KEY" not in names


def test_a_run_of_a_release_that_kept_no_recipe_goes_on_by_that_of_its_folder(floor: Floor) -> None:
    run = floor.run(floor.ask())
    command = torchrun(Path("ae_config.toml"), 1)
    assert " --recipe phantom --row 1 --try 0" in " ".join(command(run))
    assert " --run run-7 --row 1 --try 0" in " ".join(command(replace(run, recipe="", folder="run-7")))


def test_torchrun_takes_none_of_the_trainers_options_for_its_own(floor: Floor) -> None:
    """It would: our --run is the beginning of its --run-path."""
    from torch.distributed.run import parse_args

    run = replace(floor.run(floor.ask()), recipe="", folder="run-7")
    command = torchrun(Path("ae_config.toml"), 4)(run)
    read = parse_args(command[3:])
    assert (read.nproc_per_node, read.module, read.training_script) == ("4", True, "training")
    assert read.training_script_args[2:] == ["--run", "run-7", "--row", "1", "--try", "0"]


def test_a_killed_trainer_is_started_again_after_a_while_and_ends(floor: Floor) -> None:
    run = floor.ask()
    supervisor = floor.supervisor()
    floor.step_until(floor.begun)
    os.kill(floor.begun()[0][2], signal.SIGKILL)
    floor.step_until(lambda: floor.run(run).state is RunState.QUEUED)
    assert "killed" in floor.run(run).reason
    supervisor.step()
    assert len(floor.begun()) == 1, "not at once"
    floor.now += timedelta(minutes=2)
    floor.step_until(lambda: len(floor.begun()) == 2)
    floor.finish()
    floor.step_until(lambda: floor.run(run).state is RunState.DONE)
    assert [tries for _, tries, _ in floor.begun()] == [1, 2]


def test_a_new_supervisor_finds_the_trainer_and_starts_no_second_one(floor: Floor) -> None:
    """The first supervisor is killed; its trainer works on, longer than any lease."""
    run = floor.ask()
    floor.supervisor()
    floor.step_until(floor.begun)
    second = floor.supervisor()
    floor.now += timedelta(hours=2)
    for _ in range(20):
        second.step()
    assert floor.run(run).state is RunState.RUNNING
    floor.finish()
    floor.step_until(lambda: floor.run(run).state is RunState.DONE, second)
    second.step()
    assert len(floor.begun()) == 1


def test_two_supervisors_on_one_database_start_one_trainer(floor: Floor) -> None:
    run = floor.ask()
    floor.supervisor(), floor.supervisor()
    floor.step_until(floor.begun)
    for _ in range(20):
        for one in floor.supervisors:
            one.step()
    floor.finish()
    floor.step_until(lambda: floor.run(run).state is RunState.DONE)
    assert len(floor.begun()) == 1


def test_a_number_that_was_given_to_another_process_is_no_trainer(floor: Floor) -> None:
    me = replace(machine.this_process(), born="an earlier start")
    run = floor.catalogue.runs.start(
        kind="finetune", recipe="phantom", devices=machine.device_set("auto"), worker=me, now=floor.now, until=floor.now
    )
    assert machine.lives(machine.this_process())
    assert machine.settle(floor.catalogue, floor.now) == []
    assert floor.run(run.id).state is RunState.INTERRUPTED


def test_a_run_of_another_machine_is_left_to_it_until_nothing_was_heard_for_long(floor: Floor) -> None:
    run = floor.ask()
    runs = floor.catalogue.runs
    runs.lease(devices="away:cpu", host="away", ready=lambda run: True, now=floor.now, until=floor.now + machine.LEASE)
    runs.enter(run, 1, Worker("away", os.getpid(), "x"), until=floor.now + machine.LEASE)
    supervisor = floor.supervisor()
    supervisor.step()
    assert floor.run(run).state is RunState.RUNNING
    floor.now += machine.LEASE + timedelta(seconds=1)
    supervisor.step()
    assert floor.run(run).state is RunState.QUEUED
    assert "away" in floor.run(run).reason


def test_a_trainer_that_cannot_begin_is_tried_three_times_and_its_words_are_kept(floor: Floor) -> None:
    floor.how = "broken"
    run = floor.ask()
    floor.supervisor()
    for tries in range(1, 4):
        floor.step_until(lambda tries=tries: floor.run(run).tries == tries and floor.run(run).state is not RunState.RUNNING)
        floor.now += timedelta(hours=1)
    failed = floor.run(run)
    assert failed.state is RunState.FAILED
    assert "ended with code 2 before it began" in failed.reason
    words = words_of(floor.settings.storage.root, run)
    assert str(words) in failed.reason
    assert words.read_text().splitlines() == ["osteon: nothing goes"] * 3
    assert words.stat().st_mode & 0o777 == 0o600


def test_a_cancelled_run_ends_in_good_order_and_is_not_started_again(floor: Floor) -> None:
    run = floor.ask()
    supervisor = floor.supervisor()
    floor.step_until(floor.begun)
    floor.catalogue.runs.cancel(run, by="dr", reason="wrong labels", now=floor.now)
    floor.step_until(lambda: floor.run(run).state is RunState.CANCELLED)
    for _ in range(10):
        supervisor.step()
    assert floor.run(run).reason == "wrong labels"
    assert len(floor.begun()) == 1


def test_a_trainer_that_does_not_hear_is_killed_after_the_grace(floor: Floor) -> None:
    floor.how = "stubborn"
    run = floor.ask()
    supervisor = floor.supervisor()
    floor.step_until(floor.begun)
    floor.catalogue.runs.cancel(run, by="dr", reason="now", now=floor.now)
    for _ in range(10):
        supervisor.step()
    assert floor.run(run).state is RunState.CANCELLING
    floor.now += timedelta(seconds=61)
    floor.step_until(lambda: floor.run(run).state is RunState.CANCELLED)


def test_a_trainer_that_shows_no_progress_for_long_is_killed_and_started_again(floor: Floor) -> None:
    floor.how = "stubborn"
    run = floor.ask()
    floor.supervisor()
    floor.step_until(floor.begun)
    floor.now += timedelta(hours=25)
    floor.step_until(lambda: floor.run(run).state is RunState.QUEUED)


def test_quiet_hours_and_a_pause_keep_a_due_run_and_not_a_persons(floor: Floor) -> None:
    floor.now = floor.now.replace(hour=8, minute=0)
    due = floor.due()
    supervisor = floor.supervisor()
    assert not supervisor.step(), "quiet hours"
    floor.now = floor.now.replace(hour=19)
    floor.catalogue.roles.set_flag("schedule nightly", "paused", by="dr", reason="", now=floor.now)
    assert not supervisor.step(), "paused"
    floor.catalogue.roles.set_flag("schedule nightly", "on", by="dr", reason="", now=floor.now)
    assert supervisor.step()
    floor.finish()
    floor.step_until(lambda: floor.run(due).state is RunState.DONE)
    floor.now = floor.now.replace(hour=9)
    asked = floor.ask()
    assert supervisor.step()
    floor.step_until(lambda: floor.run(asked).state is RunState.DONE)


def test_a_due_run_of_a_schedule_that_these_settings_do_not_name_is_not_started(floor: Floor) -> None:
    """It is another machine's, or was taken out: quiet hours are not known here."""
    floor.due("elsewhere")
    assert not floor.supervisor().step()
