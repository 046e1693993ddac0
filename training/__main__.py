"""What starts a training run: `python -m training --config FILE [--recipe NAME] [--run ID]`, and torchrun in the same way.

In: the settings file; what the run is to do; from a supervisor the number of a leased run and its try (`--row`, `--try`). With
several processes the first one runs the cycle, and the others help it. Out: progress on stderr (a bar
with the time left on a terminal, else one plain line an epoch), the decision on stdout, an exit code (0 whatever the gate says, 2
for an error that stays, 75 for one to try again, 143 when it was told to stop). SIGTERM or Ctrl-C lets it finish the epoch; a
second one ends it at once.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from models.errors import OsteonError, Retriable, Tampered
from node import logs
from node.daemon import stop_on_signals
from node.errors import NotFound
from node.settings import load
from training.recipe import named

if TYPE_CHECKING:
    import threading

EXIT_FINAL = 2
EXIT_RETRIABLE = 75  # EX_TEMPFAIL of sysexits.h
EXIT_STOPPED = 128 + signal.SIGTERM
PR_SET_PDEATHSIG = 1  # prctl(2)
TOLD = {
    "train_loss": "training loss",
    "loss": "loss",
    "validation_loss": "validation loss",
    "validation_accuracy": "validation accuracy",
    "nmi": "NMI",
    "knn": "k-NN",
    "linear": "linear probe",
}
"""What a plain line says of an epoch, where its line of metrics.jsonl has it."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def train(
    config: Path,
    recipe: str = "",
    continued: str = "",
    leased: tuple[int, int] | None = None,
    ordered: Mapping[str, Any] | None = None,
) -> None:
    """Run or continue one training run, or work on a leased one (its number and try), and print what it came to.

    `ordered` holds fields of `folder.Orders`.
    """
    settings = load(config)
    console = Console(stderr=True)
    logs.configure(role="train", stream=sys.stderr, level=logging.WARNING if console.is_terminal else logging.INFO)
    chosen = named(recipe or (_recipe_of(settings.storage.root / "runs", continued) if continued else settings.training.recipe))
    _prepare_process()
    from training import cycle, upstream
    from training.folder import Orders, Stopped, Ticket
    from training.ranks import joined, world

    if int(os.environ.get("RANK", "0")) > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides when the run ends
        with joined() as ranks:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun tells all to end: the first finishes its epoch, and needs us
            upstream.assist(settings.storage.root, ranks)
        return
    progress: Bar | Lines = Bar(console) if console.is_terminal else Lines()
    ticket = Ticket(*leased) if leased else None
    with stop_on_signals() as stop, progress, joined() as ranks:
        if ticket or world() > 1:
            signal.signal(signal.SIGTERM, lambda *_: stop.set())  # torchrun hands on what it got: the second one is no insistence
            _end_with_parent(stop)
        try:
            outcome = cycle.run(
                settings,
                chosen,
                now=lambda: datetime.now(UTC),
                run_id="" if ticket else continued,
                progress=progress,
                orders=Orders(**ordered or {}),
                ranks=ranks,
                ticket=ticket,
                stop=stop.is_set,
            )
            ranks.told(None)  # the others go home
        except Stopped as error:
            sys.stderr.write(f"osteon: {error}\n")
            raise SystemExit(EXIT_STOPPED) from None
    say = sys.stdout.write
    say(f"{'gate' if outcome.version else 'result'}     {outcome.decision}: {outcome.words}\n")
    if outcome.version:
        say(f"version  {outcome.version}\n")
    if outcome.by_hand:
        say(f"by hand  {outcome.by_hand}\n")
    say(f"report   {outcome.folder / 'report.html'}\n")


class Bar:
    """A bar with the time left, for a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Bars(*columns, console=console)
        self._task = self._bars.add_task("opening the catalogue", total=None)

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bars.stop()

    def stage(self, what: str, total: int = 0) -> None:
        """Start a bar of its own for the stage, and fill the one before."""
        done = self._bars.tasks[self._task].completed
        self._bars.update(self._task, total=done or 1, completed=done or 1)
        self._task = self._bars.add_task(what, total=total or None)

    def advance(self, done: int) -> None:
        """Move the bar."""
        self._bars.update(self._task, completed=done)

    def within(self, done: float) -> None:
        """Move the bar within an epoch."""
        self._bars.update(self._task, completed=done)

    def epoch(self, fit: str, line: Mapping[str, Any]) -> None:
        """Say in the bar's text which fit runs, and how well."""
        from training.folder import loss_of

        self._bars.update(self._task, description=f"{fit}, loss {loss_of(line):.3f}")


class Lines:
    """Plain lines, for a pipe or a log."""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_error: object) -> None:
        sys.stderr.flush()

    def stage(self, what: str, total: int = 0) -> None:
        """Name the stage."""
        self._say(what + (f" ({total})" if total else ""))

    def advance(self, done: int) -> None:
        """Say nothing: the epochs do."""

    def within(self, done: float) -> None:
        """Say nothing: the epochs do."""

    def epoch(self, fit: str, line: Mapping[str, Any]) -> None:
        """Write one line an epoch."""
        told = [f"{title} {line[name]:.4f}" for name, title in TOLD.items() if line.get(name) is not None]
        told += ["best so far"] if line.get("best") and line.get("validation_loss") is not None else []
        self._say(f"{fit}, epoch {line['epoch']}: {', '.join(told)}, {line['seconds']:.1f} s")

    @staticmethod
    def _say(text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _prepare_process() -> None:
    """Set what has to be set before torch is loaded; neither changes a result.

    Threads that spin while they wait for a core make a step five times as dear on a busy machine. And a step frees and takes the
    same hundred megabytes again and again: told to keep them, glibc saves a fifth of the processor time.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with suppress(OSError, AttributeError):  # another C library has no mallopt
        libc = ctypes.CDLL(None)
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(parameter, 1 << 30)


def _end_with_parent(stop: threading.Event) -> None:
    """Let Linux send SIGTERM when torchrun dies: its worker has a session of its own and would go on without anybody's eye."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:
            stop.set()


def _recipe_of(runs: Path, run: str) -> str:
    """Say by which recipe a run was started."""
    file = runs / Path(run).name / "run.json"
    if not file.is_file():
        raise NotFound(f"there is no run {run!r} to continue; `osteon train list` shows what there is")
    try:
        return str(json.loads(file.read_bytes())["recipe"])
    except (ValueError, KeyError, TypeError):
        raise Tampered(f"run {run}: run.json is damaged; start a new run") from None


def main() -> None:
    """Read the command line; an error of Osteon is one line and an exit code."""
    parser = argparse.ArgumentParser(prog="python -m training", description="One training run.")
    parser.add_argument("--config", type=Path, default=Path("ae_config.toml"), help="the site's settings")
    parser.add_argument("--recipe", default="", help="default: [training] recipe")
    parser.add_argument("--run", default="", help="continue this run")
    parser.add_argument("--row", type=int, default=0, help="from the supervisor: number of the leased run")
    parser.add_argument("--try", type=int, default=0, dest="tries", help="from the supervisor: which try of it this is")
    parser.add_argument(
        "--orders", default="{}", help="what the run is to do beyond its recipe, as JSON: fields of folder.Orders"
    )
    given = parser.parse_args()
    try:
        ordered = json.loads(given.orders)
        train(given.config, given.recipe, given.run, (given.row, given.tries) if given.row else None, ordered)
    except OsteonError as error:
        sys.stderr.write(f"osteon: {error}\n")
        sys.exit(EXIT_RETRIABLE if isinstance(error, Retriable) else EXIT_FINAL)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # all is on the disk; threads of gloo that wind up while the interpreter ends have aborted a finished run (exit code -6)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
