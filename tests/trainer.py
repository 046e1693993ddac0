"""A trainer that does nothing, as a process: it takes the run it was started for as a real one does, and ends when it is told to.

    python trainer.py URL FOLDER RUN TRY work|stubborn|broken|balks|dies

`work` ends well when FOLDER/finish is there and stops on SIGTERM; `stubborn` does not hear SIGTERM; `broken` cannot begin;
`balks` cannot the first time; `dies` is killed the first time. FOLDER/stamps says which trainer began and ended, in that order.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import sleep

from node.keep.catalogue import Catalogue
from training.machine import this_process


def main(url: str, folder: Path, run: int, tries: int, how: str) -> int:
    """Work on one run."""
    if how == "broken" or (how == "balks" and tries == 1):
        sys.stderr.write("osteon: nothing goes\n")
        return 2
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))
    with Catalogue.open(url) as catalogue:
        catalogue.runs.enter(run, tries, this_process(), until=datetime.now(UTC) + timedelta(minutes=5))
        catalogue.runs.bind(run, tries, f"run-{run}")
        with (folder / "begun").open("a") as begun:
            begun.write(f"{run} {tries} {os.getpid()}\n")
        stamp(folder, run, tries, "begins")
        if how == "dies" and tries == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "environment").write_text("\n".join(os.environ))
        while not (folder / "finish").exists():
            if told and how == "work":
                catalogue.runs.stop(run, tries, "told to stop", now=datetime.now(UTC))
                return 143
            sleep(0.02)
        stamp(folder, run, tries, "ends")
        catalogue.runs.done(run, tries, model_id="m", decision="refuse", now=datetime.now(UTC))
    return 0


def stamp(folder: Path, run: int, tries: int, what: str) -> None:
    """Say what this trainer does now."""
    with (folder / "stamps").open("a") as stamps:
        stamps.write(f"{run} {tries} {what}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]))
