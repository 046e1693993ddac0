"""The scheduler is killed -9 before any step of its work; a due time has one run, which ends once, and nothing stays occupied."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from killer import Killed, stand_in
from roles import UNWATCHED, until

from node.commands.init import init_site, render
from node.keep.catalogue import Catalogue
from node.keep.records import Run, RunState
from node.settings import Settings, load
from training import machine
from training.schedule import Timekeeper, definition_of
from training.supervise import Supervisor

STEPS_MAX = 60
DAY = timedelta(days=1)


class Nights:
    """A site with a new schedule for each kill, whose first due time has just been missed; its trainers do nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = init_site(folder / "site", training={"stop_grace_s": 1.0}, metrics=UNWATCHED)
        self.shipped = self.config.read_text()
        self.told = folder / "told"
        self.names: list[str] = []
        self.catalogue = Catalogue.open(self.settings.storage.catalogue)
        self.trainers("work")
        (folder / "finish").touch()

    @property
    def settings(self) -> Settings:
        return load(self.config)

    def trainers(self, how: str) -> None:
        """Say how the trainers behave."""
        (self.folder / "how").write_text(how)

    def due(self) -> str:
        """Let a schedule be due, as if no scheduler had run for a day."""
        self.names.append(f"night{len(self.names)}")
        name = self.names[-1]
        one = {"name": name, "every": "1d", "recipe": "phantom", "timezone": "UTC"}
        self.config.write_text(render(self.shipped, {"schedule": [one]}))
        settings = self.settings
        definition = json.dumps(definition_of(settings.schedule[0], settings), sort_keys=True)
        began = datetime.now(UTC).replace(microsecond=0) - DAY - timedelta(hours=1)
        self.catalogue.timings.see(name, definition, zone="UTC", named=self.names, now=began)
        return name

    def of(self, schedule: str) -> Run | None:
        """Give the run of a schedule; there is never a second one."""
        runs = [run for run in self.catalogue.runs.list() if run.schedule == schedule]
        assert len(runs) < 2, "one due time has two runs"
        return runs[0] if runs else None

    def killed(self, at: int, *, trigger: str, meanwhile: Callable[[Killed], None] = lambda _role: None) -> bool:
        """Let a scheduler die before a step; False when it had no such step before its run was over."""
        self.told.unlink(missing_ok=True)
        role = Killed("schedule", self.config, at=at, trigger=trigger, told=self.told)
        meanwhile(role)

        def over() -> bool:
            ended = self.told.exists() and '"trainer ended"' in self.told.read_text()
            return role.dead() or (ended and not self.catalogue.runs.busy())

        until(over, seconds=60, told="killed, or the run is over")
        killed = role.end()
        assert not killed or "killed before" in self.told.read_text(), self.told.read_text()
        return killed

    def recover(self, schedule: str) -> Run:
        """Run what a scheduler would that is started when the lease is over, until nothing is open; pauses are leapt over."""
        ahead = 2 * machine.LEASE
        settings = self.settings
        with Catalogue.open(settings.storage.catalogue) as catalogue:
            keeper = Timekeeper(settings, catalogue, now=lambda: datetime.now(UTC) + ahead)
            supervisor = Supervisor(settings, catalogue, stand_in(self.config, 1), now=lambda: datetime.now(UTC) + ahead)
            keeper.begin()

            def over() -> bool:
                nonlocal ahead
                keeper.plan()
                supervisor.step()
                if not catalogue.runs.busy():
                    ahead += timedelta(minutes=1)
                return self.of(schedule) is not None and not catalogue.runs.open()

            until(over, seconds=60, told="no run is open")
            keeper.end()
            for process in supervisor._started.values():
                process.wait(30)
        run = self.of(schedule)
        assert run is not None
        assert (run.devices, run.leased_until, run.worker) == (None, None, None), "the device set is free"
        for pid in self._pids():
            until(lambda pid=pid: not machine._born(pid), told="no trainer is left")  # type: ignore[misc]
        return run

    def stamps(self, run: Run) -> list[str]:
        """Say what the trainers of a run did, in that order."""
        file = self.folder / "stamps"
        lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [what for number, _, what in lines if int(number) == run.id]

    def _pids(self) -> list[int]:
        file = self.folder / "begun"
        return [int(line.split()[2]) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def nights(tmp_path: Path) -> Iterator[Nights]:
    one = Nights(tmp_path)
    yield one
    one.catalogue.close()


@pytest.mark.long
def test_a_scheduler_killed_before_any_step_of_a_due_time_leads_to_one_run_that_ends_once(nights: Nights) -> None:
    before = set()
    for step in range(STEPS_MAX):
        schedule = nights.due()
        killed = nights.killed(step, trigger="Timings.see")
        before |= {line for line in nights.told.read_text().splitlines() if line.startswith("killed before")}
        run = nights.recover(schedule)
        assert (run.state, run.decision) == (RunState.DONE, "refuse"), f"killed before step {step}: {run.reason}"
        assert nights.stamps(run) == ["begins", "ends"], f"killed before step {step}"
        if not killed:
            break
    else:
        pytest.fail("the scheduler has more steps than this test knows")
    effects = {"Timings.queue", "Runs.lease", "subprocess.Popen", "Runs.get"}
    assert {f"killed before {name}" for name in effects} <= before


@pytest.mark.long
@pytest.mark.parametrize(("how", "did"), [("balks", ["begins", "ends"]), ("dies", ["begins", "begins", "ends"])])
def test_a_scheduler_killed_before_any_step_of_a_lost_trainer_starts_another_one(
    nights: Nights, how: str, did: list[str]
) -> None:
    nights.trainers(how)
    before = set()
    for step in range(STEPS_MAX):
        schedule = nights.due()
        killed = nights.killed(step, trigger="subprocess.Popen")
        before |= {line for line in nights.told.read_text().splitlines() if line.startswith("killed before")}
        run = nights.recover(schedule)
        assert run.state is RunState.DONE, f"killed before step {step}: {run.reason}"
        # the first try may have been lost before its trainer began
        assert nights.stamps(run) in (did, ["begins", "ends"]), f"killed before step {step}"
        if not killed:
            break
    else:
        pytest.fail("the scheduler has more steps than this test knows")
    assert "killed before Runs.lose" in before


@pytest.mark.long
def test_a_scheduler_killed_before_any_step_of_a_cancellation_leaves_no_trainer(nights: Nights) -> None:
    (nights.folder / "finish").unlink()
    nights.trainers("stubborn")
    for step in range(STEPS_MAX):
        schedule = nights.due()

        def cancel(role: Killed, schedule: str = schedule) -> None:
            run = until(lambda: (one := nights.of(schedule)) and nights.stamps(one) and one, seconds=60)
            assert not role.dead()
            nights.catalogue.runs.cancel(run.id, by="dr", reason="no", now=datetime.now(UTC))

        killed = nights.killed(step, trigger="os.killpg", meanwhile=cancel)
        run = nights.recover(schedule)
        assert (run.state, run.reason) == (RunState.CANCELLED, "no"), f"killed before step {step}"
        assert nights.stamps(run) == ["begins"], f"killed before step {step}"
        if not killed:
            break
    else:
        pytest.fail("the scheduler has more steps than this test knows")
    assert step > 2, "the killer found no steps to kill at"
