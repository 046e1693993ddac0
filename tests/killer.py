"""Run a role in a process of its own and kill it -9 before its N-th step.

A step is a call of a store (and within it each transaction but the first), of the network, or of the system: fsync, rename, a
process, a signal. They count from the first call of a trigger. `Killed` runs the role in a process forked from a server that has
the libraries loaded, so that a hundred kills take a minute.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

from models import durable
from node.keep.database import Database
from node.keep.records import Run

STORES = (
    "node.keep.archive:Archive",
    "node.keep.cache:Cache",
    "node.keep.vault:Vault",
    "node.keep.quarantine:Quarantine",
    "node.keep.catalogue.instances:Instances",
    "node.keep.catalogue.patients:Patients",
    "node.keep.catalogue.studies:Studies",
    "node.keep.catalogue.results:Results",
    "node.keep.catalogue.deliveries:Deliveries",
    "node.keep.catalogue.labels:Labels",
    "node.keep.catalogue.runs:Runs",
    "node.keep.catalogue.timings:Timings",
    "node.keep.catalogue.roles:Roles",
)
ROUTINE = {"complete_due", "expire_due", "wake_waiting", "open_due", "claim", "by_state", "count", "flag", "beat", "renew"}
"""Called again and again while nothing happens: they count only when something is under way, so they are no steps."""
WATCHING = {"Runs.busy", "Runs.lease", "Runs.open", "Roles.beat", "Roles.flag", "Timings.get", "Timings.all", "Timings.plan"}
"""What a scheduler repeats while it waits: each is a step once after every step of another kind."""
CLOCKWORK = {"progress.json"}
"""Written by the clock."""

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["node.receive.intake", "node.receive.association", "node.reply.respond", "highdicom"])
TRAINER = Path(__file__).with_name("trainer.py")


class _Killer:
    """Counts steps, and ends the process before one: the one numbered `at`, or the first whose name is not in `spared`."""

    def __init__(self, at: int, trigger: str, spared: Collection[str] | None, told: Path | None) -> None:
        self.at, self.trigger, self.spared, self.told = at, trigger, spared, told
        self.steps, self.counting = 0, spared is not None
        self.waited: set[str] = set()
        self.lock = threading.Lock()
        self.here = threading.local()

    def step(self, name: str) -> None:
        with self.lock:
            self.counting = self.counting or name == self.trigger
            if not self.counting or name in self.waited:
                return
            if name in WATCHING:
                self.waited.add(name)
            else:
                self.waited.clear()
            if self.steps == self.at if self.spared is None else name not in self.spared:
                if self.told:
                    with open(self.told, "a") as told:
                        told.write(f"killed before {name}\n")
                os.kill(os.getpid(), signal.SIGKILL)
            self.steps += 1

    def wrap(self, owner: Any, name: str, told: str) -> None:
        self.wrap_named(owner, name, lambda *_args, **_options: told)

    def wrap_named(self, owner: Any, name: str, told: Callable[..., str]) -> None:
        """Make a call a step, whose name hangs on its arguments; an empty name is none."""
        original: Callable[..., Any] = getattr(owner, name)

        def stepped(*args: Any, **kwargs: Any) -> Any:
            if named := told(*args, **kwargs):
                self.step(named)
            return original(*args, **kwargs)

        setattr(owner, name, stepped)

    def wrap_stores(self, *, also: Collection[str] = (), but: Collection[str] = ()) -> None:
        for place in STORES:
            module, name = place.split(":")
            kind = getattr(import_module(module), name)
            for method, thing in list(vars(kind).items()):
                told = f"{name}.{method}"
                if isinstance(thing, FunctionType) and not method.startswith("_") and name not in but:
                    self.wrap_store(kind, method, told, is_step=method not in ROUTINE or told in also)
        self.wrap_named(Database, "write", lambda *_args, **_options: self.second_write())

    def wrap_store(self, kind: type, method: str, told: str, *, is_step: bool) -> None:
        original: Callable[..., Any] = getattr(kind, method)

        def stepped(*args: Any, **kwargs: Any) -> Any:
            if is_step:
                self.step(told)
            outer, self.here.writes = getattr(self.here, "writes", None), 0 if is_step else None
            try:
                return original(*args, **kwargs)
            finally:
                self.here.writes = outer

        setattr(kind, method, stepped)

    def second_write(self) -> str:
        """Name a transaction of a store call that has made one before: what lies between the two is between two steps."""
        writes = getattr(self.here, "writes", None)
        if writes is None:
            return ""
        self.here.writes = writes + 1
        return "Database.write" if writes else ""

    def wrap_system(self) -> None:
        self.wrap(os, "fsync", "os.fsync")
        self.wrap(os, "replace", "os.replace")
        self.wrap(durable, "_publish", "durable._publish")

    def wrap_names(self) -> None:
        """Count what gives a file or a folder its name, by that name: a kill before it leaves all that was written for it."""
        for name in ("replace", "rename"):
            self.wrap_named(os, name, lambda _old, new: "" if Path(new).name in CLOCKWORK else f"{name_of(new)} stands")


def name_of(path: Any) -> str:
    """Name a file of a run or of the shelf without what differs from run to run."""
    path = Path(path)
    return path.name if path.suffix else f"{path.parent.name}/…"


def stand_in(config: Path, _processes: int) -> Callable[[Run], Sequence[str]]:
    """Give what makes the command of a trainer that does nothing; how it is to behave stands in a file beside the site."""
    from node.settings import load

    url, folder = load(config).storage.catalogue, config.parent.parent

    def command(run: Run) -> Sequence[str]:
        how = (folder / "how").read_text()
        return sys.executable, str(TRAINER), url, str(folder), str(run.id), str(run.tries), how

    return command


def _reply(killer: _Killer, config: Path) -> None:
    from node import settings
    from node.reply import respond

    killer.wrap_stores()
    killer.wrap_system()
    killer.wrap(import_module("node.reply.delivery"), "send", "delivery.send")
    respond.run(settings.load(config), threading.Event())


def _receive(killer: _Killer, config: Path) -> None:
    from node.commands.receive import receive

    killer.wrap_stores()
    killer.wrap_system()
    receive(config)


def _schedule(killer: _Killer, config: Path) -> None:
    from training import supervise, verbs

    killer.wrap_stores(also=WATCHING)
    killer.wrap_system()
    killer.wrap(subprocess, "Popen", "subprocess.Popen")
    killer.wrap(os, "killpg", "os.killpg")
    supervise.torchrun = stand_in  # type: ignore[assignment]
    verbs.schedule_app(["--config", str(config)], standalone_mode=False)


def _trainer(killer: _Killer, config: Path, ticket: tuple[int, int]) -> None:
    from labelled import NOW, SMALLEST

    from node.settings import load
    from training import cycle, promote, upstream
    from training.__main__ import Lines
    from training.engine import Engine

    # two runs are held against each other, and which number format is quicker may change from one to the other
    upstream.chosen = lambda *_args, **_options: Engine()
    # eight locked patients are too few for the real gate, and what follows on `promote` has steps, too
    promote.decide = lambda *_: promote.Decision(promote.Verdict.PROMOTE, "It is better.")
    killer.wrap_stores(but=("Cache", "Archive", "Instances", "Patients", "Labels"))
    killer.wrap_names()
    cycle.run(load(config), SMALLEST, now=lambda: NOW, progress=Lines(), ticket=cycle.Ticket(*ticket))


def _pretrainer(killer: _Killer, config: Path, ticket: tuple[int, int], keep_s: float | None) -> None:
    from labelled import NOW
    from pretraining import EIGHT_EPOCHS, make_steady
    from torch.optim import SGD, AdamW

    from node.keep import cache
    from node.settings import load
    from training import cluster, cycle, evaluate, export, finetune, probe, promote, upstream
    from training.__main__ import Lines

    class Staged(Lines):
        """Tells each stage, which is a step by its first word."""

        def stage(self, what: str, total: int = 0) -> None:
            super().stage(what, total)
            killer.step(f"stage {what.split()[0]}")

    make_steady(setattr)
    promote.decide = lambda *_: promote.Decision(promote.Verdict.PROMOTE, "It is better.")
    if keep_s is not None:
        upstream.KEEP_S = keep_s
    cache.CHUNK = 4  # of some thirty images, so that a kill leaves some decoded and others not
    killer.wrap(cache, "decode", "an image is decoded")
    killer.wrap(cache.Cache, "_note", "images are in the cache")
    killer.wrap_names()
    killer.wrap_named(finetune, "fit", lambda *_args, purpose="", **_options: f"fit {purpose.split()[0]}")
    for owner, name in (
        *((SGD, "step"), (AdamW, "step"), (cluster, "kmeans"), (probe, "out_of_fold"), (finetune, "predict")),
        *((export, "export"), (export, "parity"), (evaluate, "metrics"), (evaluate, "by_study")),
    ):
        killer.wrap_named(owner, name, lambda *_args, _told=f"{owner.__name__}.{name}", **_options: _told)
    cycle.run(load(config), EIGHT_EPOCHS, now=lambda: NOW, progress=Staged(), ticket=cycle.Ticket(*ticket))


ROLES: dict[str, Callable[..., None]] = {
    "reply": _reply,
    "receive": _receive,
    "schedule": _schedule,
    "trainer": _trainer,
    "pretrainer": _pretrainer,
}


def _run(role: str, config: Path, killer: tuple[Any, ...], told: Path | None, more: tuple[Any, ...]) -> None:
    out = os.open(told or os.devnull, os.O_WRONLY | os.O_APPEND | (os.O_CREAT if told else 0), 0o600)
    os.dup2(out, 1)
    ROLES[role](_Killer(*killer, told), config, *more)


class Killed:
    """A role under way to its death.

    Parameters
    ----------
    at, trigger
        Before which step it dies, and the call from which steps are counted.
    spared
        Instead: names of steps; it dies before the first step of another name.
    told
        A file for its log, in which its death is the last line.
    more
        What the role needs besides.
    """

    def __init__(
        self,
        role: str,
        config: Path,
        *,
        trigger: str = "",
        at: int = 0,
        spared: Collection[str] | None = None,
        told: Path | None = None,
        more: tuple[Any, ...] = (),
    ) -> None:
        killer = (at, trigger, spared)
        self.process = PROCESSES.Process(target=_run, args=(role, config, killer, told, more), daemon=True)
        self.process.start()

    def dead(self) -> bool:
        """Say whether the kill has come (or the role ended otherwise)."""
        return not self.process.is_alive()

    def wait(self, seconds: float = 120.0) -> int | None:
        """Wait until it has ended and give how."""
        self.process.join(seconds)
        return self.process.exitcode

    def end(self) -> bool:
        """End the role if it still lives; True when it had been killed before."""
        killed = self.dead()
        if not killed:
            self.process.kill()
        self.process.join(30)
        self.process.close()
        return killed
