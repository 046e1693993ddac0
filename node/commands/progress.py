"""How far a long verb is: a bar on a terminal, a line every tenth part elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Give what is told (what, done, of how many) while a verb runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True) as bars:
        tasks = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield told


def _lines() -> Callable[[str, int, int], None]:
    said: dict[str, int] = {}

    def told(what: str, done: int, total: int) -> None:
        tenth = 10 * done // total if total else 10
        if tenth > said.get(what, 0):
            said[what] = tenth
            typer.echo(f"{what}: {done} of {total}", err=True)

    return told
