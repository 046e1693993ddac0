"""A site with one run, and the trainers that are killed at it; leased again each time as a supervisor would."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from killer import Killed

from models.registry import Registry
from node.keep.catalogue import Catalogue
from node.keep.records import Run, RunState
from node.settings import load
from training import machine


class Hall:
    """The site of `config`, and the run of one `kind` in it.

    Parameters
    ----------
    role
        Of `killer.ROLES`: what its trainers are.
    more
        What the role needs besides run and try.
    """

    def __init__(self, folder: Path, config: Path, *, role: str, kind: str, more: tuple[Any, ...] = ()) -> None:
        self.config, self.role, self.more = config, role, more
        self.settings = load(config)
        self.root = self.settings.storage.root
        self.now = datetime.now(UTC)
        self.told = folder / "told"
        with Catalogue.open(self.settings.storage.catalogue) as catalogue:
            asked = catalogue.runs.ask(kind=kind, recipe="phantom", schedule="s", by="me", reason="", now=self.now)
        self.number = asked.id

    def try_it(self, spared: Collection[str] | None = None, *, trigger: str = "", at: int = -1) -> int | None:
        """Let a trainer work until it is done, or would make a step that is not spared, or the step `at` from `trigger` on.

        Give how its process ended.
        """
        self.now += timedelta(hours=1)
        with Catalogue.open(self.settings.storage.catalogue) as catalogue:
            machine.settle(catalogue, self.now)
            if catalogue.runs.get(self.number).state is RunState.FAILED:  # killed three times in a row: a person takes it up
                catalogue.runs.resume(self.number, by="me", reason="on", now=self.now)
            self.now += timedelta(hours=1)
            devices, until = machine.device_set(self.settings.training.device), self.now + machine.LEASE
            run = catalogue.runs.lease(devices=devices, host=machine.host(), ready=lambda _: True, now=self.now, until=until)
        assert run is not None, "the device set is occupied, or nothing waits"
        more = ((run.id, run.tries), *self.more)
        trainer = Killed(self.role, self.config, trigger=trigger, at=at, spared=spared, told=self.told, more=more)
        code = trainer.wait(300)
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

    @property
    def path(self) -> Path:
        return self.root / "runs" / self.run().folder

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_bytes())

    def looks(self) -> int:
        return len((self.root / "models" / "looks.jsonl").read_text().splitlines())

    def shelf(self) -> Registry:
        return Registry(self.root / "models")
