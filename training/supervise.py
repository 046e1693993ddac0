"""The supervisor of training runs: leases what waits, starts torchrun, watches, ends, and starts again.

In: the catalogue's queue. Out: trainers, each in a session of its own, so that it outlives this process; the next supervisor
finds it by process and moment of start. Nothing is trained here, and torch is not loaded. A device set never has two trainers:
the catalogue leases it to one run, and one process locks the run's folder.

A trainer writes by itself how its run ended. What it could not write (it was killed, or could not even begin) is written here.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from models import durable
from node.keep.catalogue import Catalogue
from node.keep.catalogue.timings import switch
from node.keep.records import Origin, Run, RunState
from node.logs import event
from node.settings import Schedule, Settings
from node.timetable import Hours
from training import machine

log = logging.getLogger("osteon.supervise")


class Supervisor:
    """One for each process that runs the role."""

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        command: Callable[[Run], Sequence[str]],
        *,
        now: Callable[[], datetime],
    ) -> None:
        self._settings, self._catalogue, self._command, self._now = settings, catalogue, command, now
        self._started: dict[tuple[int, int], subprocess.Popen[bytes]] = {}
        self._asked: set[tuple[int, int]] = set()
        self._schedules = {one.name: one for one in settings.schedule}
        self._devices = machine.device_set(settings.training.device)

    def step(self) -> bool:
        """Look after every run of this machine, then start one; True when one was started."""
        self._bury()
        for run in machine.settle(self._catalogue, self._now()):
            if run.host == machine.host():
                self._watch(run)
        leased = self._catalogue.runs.lease(
            devices=self._devices,
            host=machine.host(),
            ready=self._may_start,
            now=self._now(),
            until=self._now() + machine.LEASE,
        )
        if leased is not None:
            self._start(leased)
        return leased is not None

    def _may_start(self, run: Run) -> bool:
        """Say whether nothing but its device set keeps a run; a person's is kept by nothing."""
        if run.origin is not Origin.SCHEDULE:
            return True
        schedule = self._schedules.get(run.schedule)  # None: another machine's, or one that was taken out of the settings
        if schedule is None or self._catalogue.roles.flag(switch(run.schedule)) == "paused":
            return False
        return not quiet(schedule, self._now())

    def _start(self, run: Run) -> None:
        file = words_of(self._settings.storage.root, run.id)
        durable.make_folder(file.parent)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as words:
            try:
                trainer = subprocess.Popen(
                    self._command(run),
                    stdin=subprocess.DEVNULL,
                    stdout=words,
                    stderr=words,
                    start_new_session=True,
                    env=self._environment(),
                )
            except OSError as error:
                self._catalogue.runs.lose(run.id, run.tries, f"cannot be started ({error.strerror})", now=self._now())
                return
        self._started[run.id, run.tries] = trainer
        event(log, "trainer started", run=run.id, tries=run.tries, kind=run.kind, recipe=run.recipe, pid=trainer.pid)

    def _environment(self) -> dict[str, str]:
        """Keep keys and vault from the trainer, where the environment holds them: it has no use for identities."""
        storage = self._settings.storage
        places = [storage.site_key, storage.vault_key, storage.vault]
        places += [caller.passcode for caller in self._settings.node.callers]
        places += [pacs.passcode for pacs in self._settings.pacs]
        keys = {place.removeprefix("env:") for place in places if place.startswith("env:")}
        return {name: value for name, value in os.environ.items() if name not in keys}

    def _bury(self) -> None:
        """Take leave of the trainers that ended; one that never named itself could not begin."""
        for (run_id, tries), process in list(self._started.items()):
            code = process.poll()
            if code is None:
                continue
            del self._started[run_id, tries]
            run = self._catalogue.runs.get(run_id)
            if run.tries == tries and run.worker is None:
                words = words_of(self._settings.storage.root, run_id)
                told = f"its trainer ended with code {code} before it began; {words} says why"
                self._catalogue.runs.lose(run_id, tries, told, now=self._now())
            event(log, "trainer ended", run=run_id, tries=tries, code=code, state=self._catalogue.runs.get(run_id).state)

    def _watch(self, run: Run) -> None:
        """End a trainer that is not wanted any more, or hangs."""
        key = run.id, run.tries
        if run.state is RunState.CANCELLING:
            if key not in self._asked:
                self._asked.add(key)
                self._signal(run, signal.SIGTERM)
            if self._now() - run.state_at > timedelta(seconds=self._settings.training.stop_grace_s):
                self._signal(run, signal.SIGKILL)
        elif run.worker is not None and self._silent(run):
            event(log, "trainer hangs", level=logging.ERROR, run=run.id, silent_h=self._settings.training.silent_h)
            self._signal(run, signal.SIGKILL)

    def _silent(self, run: Run) -> bool:
        """Say whether a run has shown no progress for too long."""
        heard = run.state_at
        with suppress(OSError):
            seen = (self._settings.storage.root / "runs" / run.folder / "progress.json").stat().st_mtime
            heard = max(heard, datetime.fromtimestamp(seen, UTC)) if run.folder else heard
        return self._now() - heard > timedelta(hours=self._settings.training.silent_h)

    def _signal(self, run: Run, number: signal.Signals) -> None:
        """Signal a trainer: its group when it leads one, for torchrun gives its worker a session of its own.

        Torchrun itself is left alone: told to end, it would give its worker half a minute and then kill it. It ends after it.
        """
        started = self._started.get((run.id, run.tries))
        pid = run.worker.pid if run.worker else started.pid if started else 0
        if not pid or (run.worker and not machine.lives(run.worker)):
            return
        event(log, "trainer signalled", run=run.id, signal=number.name)
        with suppress(ProcessLookupError):
            if os.getpgid(pid) == pid:
                os.killpg(pid, number)
            else:
                os.kill(pid, number)


def quiet(schedule: Schedule, now: datetime) -> bool:
    """Say whether this moment lies in the schedule's quiet hours."""
    if not schedule.when.quiet_hours:
        return False
    local = now.astimezone(ZoneInfo(schedule.timezone) if schedule.timezone else None)
    return Hours.read(schedule.when.quiet_hours).hold(local.time())


def words_of(root: Path, run_id: int) -> Path:
    """Name the file that holds what the trainers of a run said."""
    return root / "runs" / "words" / f"{run_id}.log"


def torchrun(config: Path, processes: int) -> Callable[[Run], Sequence[str]]:
    """Give what makes the command of a trainer of so many processes."""

    def command(run: Run) -> Sequence[str]:
        recipe = ("--recipe", run.recipe) if run.recipe else ("--run", run.folder)  # releases before 0.2 kept no recipe
        row = ("--row", str(run.id), "--try", str(run.tries))
        return (*machine.launcher(processes), "--config", str(config.resolve()), *recipe, *row)

    return command
