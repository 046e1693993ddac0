"""One run's folder, its row in the catalogue, and who works on it.

In: settings, a recipe, what the run is ordered to do. Out: a folder in which steps leave their results, open to one process (with
the helpers that torchrun gave it); its row says how it ended, whatever ended it. What a run is bound to (`run.json`) must never
change: another recipe, device, number of processes or version is refused; the number of processes may change when a person says
so, and then is told. Nothing is learned here.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import platform
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch

from models import durable
from models.errors import Final, OsteonError, Retriable, Tampered
from models.runtime import physical_cores
from node import __version__
from node.errors import NotFound, StoreBusy, disk_full_said
from node.keep.catalogue import Catalogue
from node.keep.records import RunState
from node.logs import event, safe_message
from node.settings import Settings
from training import machine
from training.ranks import Ranks
from training.recipe import Recipe

log = logging.getLogger("osteon.training")

RENEW_S = 5.0
"""How often a trainer looks into the catalogue whether the run is still its own and wanted."""
TELL_S = 1.0
LOSSES = ("validation_loss", "train_loss", "loss")
"""What may stand for the loss in a line of metrics.jsonl, the most telling first."""
Kind = Literal["cycle", "pretrain", "finetune", "sweep"]


class Busy(Retriable):
    """Another process works on this run."""


class OtherRun(Final):
    """The run was started with something else; start a new one."""


class Stopped(Retriable):
    """The run was told to stop; it goes on from its last finished step."""


class Progress(Protocol):
    """Who is told how a run goes."""

    def stage(self, what: str, total: int = 0) -> None:
        """Tell that a stage of `total` units begins."""

    def advance(self, done: int) -> None:
        """Tell that `done` units of the stage are done."""

    def within(self, done: float) -> None:
        """Tell how far the stage is in the middle of an epoch."""

    def epoch(self, fit: str, line: Mapping[str, Any]) -> None:
        """Tell that an epoch is over; `line` is its line of metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A run that a supervisor has leased for the trainer it starts."""

    run: int
    tries: int


@dataclass(frozen=True, slots=True)
class Orders:
    """What a run is to do beyond its recipe."""

    kind: Kind = "cycle"
    """`cycle`: all of it; `pretrain`: no fine-tuning; `finetune`: no pretraining of its own; `sweep`: pretraining for each k."""
    clusters: tuple[int, ...] = ()
    """Of a sweep: the numbers of clusters."""
    extends: str = ""
    """The run whose pretraining goes on in this one."""
    start_from: str = ""
    """Fine-tune from this run's pretraining, whatever its probes said: for studies. A person promotes the version, or nobody."""
    epochs: int = 0
    """Of the pretraining; 0: as the recipe says."""
    other_processes: bool = False
    """A person said that another number of processes may go on with it."""

    def applied(self, recipe: Recipe) -> Recipe:
        """Give the recipe with what is ordered instead of what it says."""
        if self.kind == "finetune" or recipe.pretraining is None or not self.epochs:
            return recipe
        return replace(recipe, pretraining=replace(recipe.pretraining, epochs=self.epochs))


class RunFolder:
    """The folder of one run; `begun` opens it."""

    def __init__(
        self,
        settings: Settings,
        recipe: Recipe,
        catalogue: Catalogue,
        now: Callable[[], datetime],
        progress: Progress,
        stop: Callable[[], bool],
        orders: Orders,
        ranks: Ranks,
    ) -> None:
        self.settings, self.recipe, self.catalogue, self.now = settings, recipe, catalogue, now
        self.progress = _Pulse(progress, self._go_on, self._tell)
        self.orders, self.ranks = orders, ranks
        self._named = recipe  # as it is without any order
        self._stop = stop
        self.root = settings.storage.root
        self.path = self.root / "runs"
        self.bound: dict[str, Any] = {}
        self.ticket = Ticket(0, 0)
        self._renew_at = 0.0

    @contextmanager
    def begun(self, run_id: str, ticket: Ticket | None) -> Iterator[None]:
        """Open the run's folder, alone, and keep the row of the catalogue up to date."""
        if run_id:
            self._recall(run_id)
            if self.ended:
                yield  # there is nothing to do, and nothing to change
                return
        with self._entered(run_id, ticket) as folder, _alone(folder):
            self.path = folder
            self.bound = self.step("run.json", self._bind)
            self._require_same()
            if self.bound["processes"] != self.ranks.size and not self.ended:
                self._rebind()
            threads = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            event(log, "training started", run=self.path.name, recipe=self.recipe.name, device=self.bound["device"])
            try:
                yield
            finally:
                torch.set_num_threads(threads)

    @property
    def ended(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / "outcome.json").is_file()

    @property
    def threads(self) -> int:
        """CPU threads of this process; those of the machine are shared by the run's processes on it."""
        return max(1, int(self.bound["threads"]) // self.ranks.here)

    def _recall(self, run_id: str) -> None:
        """Read what a run is bound to, before anything of it is changed."""
        self.path = self.root / "runs" / run_id
        if Path(run_id).name != run_id or not (self.path / "run.json").is_file():
            raise NotFound(f"there is no run {run_id!r} to continue; `osteon train list` shows what there is")
        self.bound = self.read("run.json")
        self._require_same()

    @contextmanager
    def _entered(self, run_id: str, ticket: Ticket | None) -> Iterator[Path]:
        """Take the run's row and its device set, give its folder, and write into the row how it ended."""
        runs, until = self.catalogue.runs, self.now() + machine.LEASE
        if ticket:
            row = runs.enter(ticket.run, ticket.tries, machine.this_process(), until=until)
        else:
            machine.settle(self.catalogue, self.now())  # a run that was killed must not keep its device set for ever
            devices, me = machine.device_set(self.settings.training.device), machine.this_process()
            if run_id:
                row = runs.take(self.bound["row"], devices=devices, worker=me, now=self.now(), until=until)
            else:
                row = runs.start(
                    kind=self.orders.kind, recipe=self.recipe.name, devices=devices, worker=me, now=self.now(), until=until
                )
        self.ticket = here = Ticket(row.id, row.tries)
        self.orders = replace(self.orders, kind=cast(Kind, row.kind))
        folder = self.root / "runs" / (run_id or row.folder or _new_id(self.root / "runs", self.now(), self.recipe.name))
        try:
            with disk_full_said():
                durable.make_folder(folder)
                if not runs.bind(here.run, here.tries, folder.name):
                    raise Stopped("the run was given to another trainer")
                with self._lease_kept(here):
                    yield folder
        except (Stopped, KeyboardInterrupt, SystemExit) as error:
            runs.stop(here.run, here.tries, str(error) or "interrupted", now=self.now())
            raise
        except Retriable as error:
            runs.lose(here.run, here.tries, safe_message(error), now=self.now())
            raise
        except OsteonError as error:
            runs.fail(here.run, here.tries, safe_message(error), now=self.now())
            raise
        except BaseException as error:
            runs.lose(here.run, here.tries, f"its trainer ended by {type(error).__name__}", now=self.now())
            raise

    @contextmanager
    def _lease_kept(self, here: Ticket) -> Iterator[None]:
        """Move the deadline while one epoch takes longer than it: what ends the run is seen at the next epoch's end."""
        over = threading.Event()

        def keep() -> None:
            while not over.wait(RENEW_S):
                with suppress(Retriable):
                    self.catalogue.runs.renew(here.run, here.tries, until=self.now() + machine.LEASE)

        keeper = threading.Thread(target=keep, name="lease", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()

    def _go_on(self) -> None:
        """Move the deadline now and then; end the run here when somebody wants it to end."""
        if self._stop():
            raise Stopped
        if monotonic() < self._renew_at:
            return
        self._renew_at = monotonic() + RENEW_S
        with suppress(StoreBusy):  # the deadline is minutes away, and the next look is near
            state = self.catalogue.runs.renew(self.ticket.run, self.ticket.tries, until=self.now() + machine.LEASE)
            if state is not RunState.RUNNING:
                raise Stopped("the run was cancelled" if state else "the run was given to another trainer")

    def _tell(self, pulse: dict[str, Any]) -> None:
        """Leave for others how far the run is."""
        if self.bound:
            self.write("progress.json", json.dumps({"at": self.now().isoformat(), **pulse}).encode())

    def _bind(self) -> dict[str, Any]:
        """Write down what the run is bound to, before it begins."""
        started = self.now()
        return {
            "id": self.path.name,
            "row": self.ticket.run,
            "started_at": started.isoformat(),
            "recipe": self.recipe.name,
            "recipe_digest": self._named.digest,
            "orders": asdict(self.orders),
            "expects": self.recipe.expects,
            "seed": self.recipe.seed,
            "device": _device(self.settings.training.device),
            "processes": self.ranks.size,
            "threads": physical_cores(),
            **_versions(),
            "python": platform.python_version(),
        }

    def _require_same(self) -> None:
        """Refuse to finish a run with what would make another model of it."""
        if self.bound["recipe_digest"] != self._named.digest:
            raise OtherRun(f"run {self.path.name} was started with another recipe {self.bound['recipe']}; start a new run")
        ordered = self.bound["orders"]
        asked = self.orders.other_processes
        self.orders = Orders(**ordered | {"clusters": tuple(ordered["clusters"]), "other_processes": asked})
        self.recipe = self.orders.applied(self._named)
        if self.ended:
            return
        others = [f"{name} {self.bound[name]} (now {here})" for name, here in _versions().items() if self.bound[name] != here]
        if self.bound["device"] == "cuda" and not torch.cuda.is_available():
            others.append("device cuda (now none is found)")
        if self.bound["processes"] != self.ranks.size and not asked:
            # batch norm sees the part of a process: another number gives another model
            others.append(f"{self.bound['processes']} processes (now {self.ranks.size}; --other-processes goes on all the same)")
        if others:
            raise OtherRun(f"run {self.path.name} was started with {', '.join(others)}; go on with that, or start a new run")

    def _rebind(self) -> None:
        """Write down that a person let another number of processes go on: from now on the run is bound to that one."""
        change = {"at": self.now().isoformat(), "was": self.bound["processes"], "became": self.ranks.size}
        changes = [*self.bound.get("other_processes", ()), change]
        self.bound |= {"processes": self.ranks.size, "other_processes": changes}
        self.write_plain("run.json", self.bound)
        event(log, "another number of processes goes on", level=logging.WARNING, run=self.path.name, **change)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What whoever reads a result of the run must know about how it was made."""
        return tuple(
            f"Begun with {one['was']} processes, gone on with {one['became']} from {one['at'][:16]} on: "
            "not the bits of either number."
            for one in self.bound.get("other_processes", ())
        )

    def step(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Give what a step left in its file, or let it make that now."""
        file = self.path / name
        if not file.is_file():
            self.write_plain(name, make())
        return self.read(name)

    def write_plain(self, name: str, made: dict[str, Any]) -> None:
        """Write what a step leaves."""
        self.write(name, (json.dumps(made, indent=1) + "\n").encode())

    def read(self, name: str) -> dict[str, Any]:
        """Read what a step left."""
        try:
            found: dict[str, Any] = json.loads((self.path / name).read_bytes())
        except ValueError:
            raise Tampered(f"run {self.path.name}: {name} is damaged; start a new run") from None
        return found

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the run, whole or not at all, for its owner alone."""
        durable.write(self.path / name, data, mode=0o600)


class _Pulse:
    """Hands progress on, leaves it on the disk where others look, and asks whether the run is to go on."""

    def __init__(self, heard: Progress, go_on: Callable[[], None], tell: Callable[[dict[str, Any]], None]) -> None:
        self._heard, self._go_on, self._tell = heard, go_on, tell
        self._now: dict[str, Any] = {}
        self._began = self._told_at = 0.0
        self._epochs, self._from = 0, -1

    def stage(self, what: str, total: int = 0) -> None:
        """Begin a stage."""
        self._go_on()
        self._now = {"stage": what, "done": 0, "total": total}
        self._began, self._epochs, self._from = monotonic(), 0, -1
        self._tell(self._now)
        self._heard.stage(what, total)

    def advance(self, done: int) -> None:
        """Say how far the stage is, and reckon what is left."""
        self._go_on()
        self._now["done"] = done
        if worked := self._epochs or ("fit" not in self._now and done):
            self._now["left_s"] = round((monotonic() - self._began) / worked * max(0, self._now["total"] - done))
        if monotonic() - self._told_at > TELL_S:
            self._told_at = monotonic()
            self._tell(self._now)
        self._heard.advance(done)

    def skip(self, done: int) -> None:
        """Say how far an earlier start came: that took no time of this one, and says nothing of what is left."""
        self._go_on()
        self._now["done"] = done
        self._tell(self._now)
        self._heard.advance(done)

    def within(self, done: float) -> None:
        """Say how far the stage is without asking whether the run is to go on: it ends between two epochs."""
        if self._from < 0:
            self._from = math.ceil(done) - 1  # epochs that an earlier start has done took no time of this one
        if monotonic() - self._told_at > TELL_S:
            self._told_at = monotonic()
            left_s = round((monotonic() - self._began) / (done - self._from) * max(0, self._now["total"] - done))
            self._tell(self._now | {"done": round(done, 2), "left_s": left_s})
        self._heard.within(done)

    def epoch(self, fit: str, line: Mapping[str, Any]) -> None:
        """Say that an epoch is over."""
        self._heard.epoch(fit, line)
        self._epochs += 1
        self._now |= {"fit": fit, "epoch": line["epoch"], "loss": round(loss_of(line), 4)}
        self._go_on()


def loss_of(line: Mapping[str, Any]) -> float:
    """Give the loss that tells most of an epoch: on held-out images where there is one."""
    return next(float(line[name]) for name in LOSSES if line.get(name) is not None)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep every other process from the run's folder, also one that the catalogue knows nothing of."""
    durable.touch(folder / "lock")  # where runs are shared, retention asks it as another user whether somebody works here
    with open(folder / "lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another process works on run {folder.name}") from None
        yield


def _new_id(runs: Path, now: datetime, recipe: str) -> str:
    """Name a new run by its start and recipe."""
    name = f"{now:%Y%m%dT%H%M%S}-{recipe}"
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(one for one in names if not (runs / one).exists())


def _device(asked: str) -> str:
    """Say on which device the run is."""
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise Final('[training] device is "cuda", and torch finds none here: set it to "auto" or "cpu"')
    return "cuda" if there and asked != "cpu" else "cpu"


def _versions() -> dict[str, str]:
    """Name the versions that the bytes of a model hang on."""
    return {"code_version": __version__, "torch": str(torch.__version__), "numpy": np.__version__}
