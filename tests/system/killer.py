"""Run a role in a process of its own and kill it -9 before its N-th step.

A step is a call of a store, of the network, or of the system's fsync and rename; they count from the first call of a trigger.
`Killed` runs the role in a process forked from a server that has the libraries loaded, so that a hundred kills take a minute.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

from models import durable

STORES = (
    "node.keep.archive:Archive",
    "node.keep.vault:Vault",
    "node.keep.quarantine:Quarantine",
    "node.keep.catalogue.instances:Instances",
    "node.keep.catalogue.studies:Studies",
    "node.keep.catalogue.results:Results",
    "node.keep.catalogue.deliveries:Deliveries",
)
ROUTINE = {"complete_due", "expire_due", "wake_waiting", "open_due", "claim", "by_state", "count"}
"""Called again and again while nothing happens: they count only when something is under way, so they are no steps."""

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["node.receive.intake", "node.receive.association", "node.reply.respond", "highdicom"])


class _Killer:
    def __init__(self, at: int, trigger: str) -> None:
        self.at, self.trigger, self.steps, self.counting = at, trigger, 0, False
        self.lock = threading.Lock()

    def step(self, name: str) -> None:
        with self.lock:
            self.counting = self.counting or name == self.trigger
            if self.counting:
                if self.steps == self.at:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.steps += 1

    def wrap(self, owner: Any, name: str, told: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def stepped(*args: Any, **kwargs: Any) -> Any:
            self.step(told)
            return original(*args, **kwargs)

        setattr(owner, name, stepped)

    def wrap_everything(self) -> None:
        for place in STORES:
            module, name = place.split(":")
            kind = getattr(import_module(module), name)
            for method, thing in list(vars(kind).items()):
                if isinstance(thing, FunctionType) and not method.startswith("_") and method not in ROUTINE:
                    self.wrap(kind, method, f"{name}.{method}")
        self.wrap(os, "fsync", "os.fsync")
        self.wrap(os, "replace", "os.replace")
        self.wrap(durable, "_publish", "durable._publish")
        self.wrap(import_module("node.reply.delivery"), "send", "delivery.send")


def _run(role: str, config: Path, at: int, trigger: str) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    _Killer(at, trigger).wrap_everything()
    if role == "reply":
        from node import settings
        from node.reply import respond

        respond.run(settings.load(config), threading.Event())
    else:
        from node.commands.receive import receive

        receive(config)


class Killed:
    """A role under way to its death."""

    def __init__(self, role: str, config: Path, *, at: int, trigger: str) -> None:
        self.process = PROCESSES.Process(target=_run, args=(role, config, at, trigger), daemon=True)
        self.process.start()

    def dead(self) -> bool:
        """Say whether the kill has come (or the role ended otherwise)."""
        return not self.process.is_alive()

    def end(self) -> bool:
        """End the role if it still lives; True when it had been killed before."""
        killed = self.dead()
        if not killed:
            self.process.kill()
        self.process.join(30)
        self.process.close()
        return killed
