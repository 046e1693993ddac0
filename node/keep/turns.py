"""Whose turn it is: what looks at all stores together, and what removes from them, do not meet.

In: the storage root. Out: a turn, for as long as a block runs; it ends with the process, however that ends. Reception and answers
take no turn: they only add.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models import durable

LOCK = "housekeeping.lock"


@contextmanager
def looking(root: Path) -> Iterator[None]:
    """Hold a turn for looking; many may look at once, and each waits until nobody removes."""
    with _locked(root, fcntl.LOCK_SH):
        yield


@contextmanager
def removing(root: Path) -> Iterator[bool]:
    """Hold the turn for removing, and say whether it is one's own: not while a backup, a repair or another host is at it."""
    with _locked(root, fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
        yield mine


@contextmanager
def _locked(root: Path, how: int) -> Iterator[bool]:
    durable.make_folder(root)
    with open(os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            yield False
        else:
            yield True
