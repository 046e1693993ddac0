"""Ways to read an image that a decoding process can be given: a fresh interpreter finds them by this module's name."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import studies
from pydicom.dataset import Dataset

from models.errors import Unreadable
from node.keep.records import Instance

BROKEN, DEADLY = 3, 4


def read_or_fail(one: Instance) -> Dataset:
    """Read an image; that of `BROKEN` cannot be decoded."""
    if one.path == str(BROKEN):
        raise Unreadable("no codec")
    return studies.image(patient=1, instance=int(one.path))


def read_or_die(one: Instance) -> Dataset:
    """Read an image; that of `DEADLY` ends the process as a crashed codec does."""
    if one.path == str(DEADLY):
        os.abort()
    return studies.image(patient=1, instance=int(one.path))


def read_or_die_once(one: Instance) -> Dataset:
    """Read an image; the process that is the first to do so, by the file that `path` names, ends."""
    try:
        Path(one.path).touch(exist_ok=False)
    except FileExistsError:
        return studies.image()
    os.abort()


def read_out_of_memory(_one: Instance) -> Dataset:
    """Find no memory."""
    raise MemoryError


def read_without_torch(_one: Instance) -> Dataset:
    """Read an image where torch is not loaded."""
    if "torch" in sys.modules:
        raise Unreadable("torch is loaded")
    return studies.image()


def read_chattering(_one: Instance) -> Dataset:
    """Read an image as a codec does that prints."""
    os.write(1, b"premature end of data\n" * 100)
    return studies.image()


def read_for_ever(one: Instance) -> Dataset:
    """Say which process reads, in the folder that `path` names, and be long about it."""
    (Path(one.path) / str(os.getpid())).touch()
    time.sleep(2)
    return studies.image()
