"""Small grey pictures of the archive's images, decoded here or in processes of their own.

In: instances, a way to read them, a preprocessing. Out: for each instance its grey values or the reason there are none. An image
must never be lost, nor end or stall its caller, because a codec crashed over it: the picture is tried again in a fresh process.

A decoding process is a fresh interpreter, never a fork (the caller may have threads) and no child of `multiprocessing`, which
would import the caller's main module, and torch with it. It lives by its standard input: when the caller is gone, however, the
pipe ends and so does the process. What it reads from there its own parent wrote; what comes back is never unpickled, because a
codec worked on strange bytes over there.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from models.errors import OsteonError
from models.preprocess import Preprocessing, preprocess
from node.errors import NoDecoder
from node.keep.records import Instance

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from node.keep.decode import serve; serve()"
_READY = b"ready\n"
_OUT_OF_MEMORY = b"out of memory\n"
_TRIES = 2
"""Processes that one image may end before it is given up: the first end may have been the system's doing."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True, slots=True)
class Facts:
    """What is told of one image beside its picture."""

    taken_on: str = ""
    """Date of the image as the archive's file gives it (YYYYMMDD, shifted), empty when it gives none."""
    manufacturer: str = ""
    """Of the unit, as the archive's file gives it; empty when it gives none."""
    problem: str = ""
    """Why there is no picture."""
    passing: bool = False
    """The problem says nothing about the image (a disk was away, a process was ended): it is worth another try."""


Decoded = tuple[Facts, NDArray[np.uint8] | None]
"""The facts, and (size, size) grey values; None exactly when the facts name a problem."""


def decode(instance: Instance, read: Callable[[Instance], Dataset], spec: Preprocessing) -> Decoded:
    """Decode one image in this process; what is wrong with it is told, not raised.

    Raises
    ------
    MemoryError
        The machine's trouble, not the image's.
    """
    date = manufacturer = ""
    try:
        dataset = read(instance)
        date = _taken_on(dataset)
        manufacturer = str(dataset.get("Manufacturer") or "")
        grey = np.rint(preprocess(dataset, spec)[0] * 255).astype(np.uint8)
    except MemoryError:
        raise
    except Exception as error:  # pydicom raises anything on a damaged file, an OSError that no system call gave among it
        problem = str(error) if isinstance(error, OsteonError) else "the file cannot be read"
        return Facts(date, manufacturer, problem, isinstance(error, OSError) and error.errno is not None), None
    return Facts(date, manufacturer), grey


class Decoders:
    """Processes that decode for the threads that ask: each works on one image at a time; to be used as a context.

    Parameters
    ----------
    read
        Is sent to the processes, so it must be picklable: a function of a module (not of the one that was started), or a bound
        method such as `Archive.read`.
    count
        How many processes there are at most, and how many threads may ask at once.
    """

    def __init__(self, read: Callable[[Instance], Dataset], spec: Preprocessing, count: int) -> None:
        self._work = pickle.dumps((read, spec))
        self._size_px = spec.size_px
        self._idle: SimpleQueue[_Process | None] = SimpleQueue()
        self._count = count

    def __enter__(self) -> Decoders:
        for _ in range(self._count):
            self._idle.put(None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for _ in range(self._count):
            if process := self._idle.get():
                process.end()

    def decode(self, instance: Instance) -> Decoded:
        """Decode one image in another process, as `decode` does.

        Raises
        ------
        NoDecoder
            No process can be started.
        MemoryError
            As in `decode`.
        """
        process = self._idle.get()
        try:
            for _ in range(_TRIES):
                process = process or _Process(self._work, self._size_px)
                try:
                    return process.decode(instance)
                except _Ended:
                    process.end()
                    process = None
        except BaseException:
            if process:
                process.end()  # who knows what it was about to say
            process = None
            raise
        finally:
            self._idle.put(process)
        return Facts(problem="decoding the image ended its process", passing=True), None


class _Ended(Exception):
    """The process is gone."""


class _Process:
    """One decoding process, as its parent sees it."""

    def __init__(self, work: bytes, size_px: int) -> None:
        self._size_px = size_px
        # a session of its own: a Ctrl-C or a SIGTERM for the group is for the caller to answer. Warnings of pydicom would
        # repeat values of the data set on stderr.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._to, self._from = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        try:
            self._send(work)
            ready = self._from.readline() == _READY
        except _Ended:
            ready = False
        except BaseException:
            self.end()
            raise
        if not ready:
            self.end()
            raise NoDecoder("a process for decoding images does not start: out of memory, or another installation than this one")

    def decode(self, instance: Instance) -> Decoded:
        self._send(pickle.dumps(instance))
        line = self._from.readline()
        if line == _OUT_OF_MEMORY:
            raise MemoryError("a decoding process ran out of memory")
        if not line.endswith(b"\n"):
            raise _Ended
        facts = Facts(**json.loads(line))
        if facts.problem:
            return facts, None
        data = self._from.read(self._size_px * self._size_px)
        if len(data) != self._size_px * self._size_px:
            raise _Ended
        return facts, np.frombuffer(data, np.uint8).reshape(self._size_px, self._size_px)

    def end(self) -> None:
        """End the process, whatever it is doing: it holds nothing that could be lost."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._to, self._from):
            with suppress(BrokenPipeError):
                pipe.close()

    def _send(self, data: bytes) -> None:
        try:
            self._to.write(data)
            self._to.flush()
        except BrokenPipeError:
            raise _Ended from None


def serve() -> None:
    """Be a decoding process: decode what standard input names until it ends."""
    with suppress(OSError, AttributeError):  # another C library has no mallopt
        libc = ctypes.CDLL(None)
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            # each image takes and frees the same tens of megabytes: given back to the system, their pages cost more than decoding
            libc.mallopt(parameter, 1 << 30)
    into = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a codec that prints must not speak in between
    read, spec = pickle.load(sys.stdin.buffer)  # noqa: S301  # from the process that started this one
    _say(into, _READY)
    with suppress(EOFError, BrokenPipeError):  # the caller is done, or gone
        while True:
            _say(into, *_answer(pickle.load(sys.stdin.buffer), read, spec))  # noqa: S301  # as above
    os._exit(0)  # nothing is left to write, and a broken pipe would be told at exit


def _answer(instance: Any, read: Callable[[Instance], Dataset], spec: Preprocessing) -> tuple[bytes, bytes]:
    try:
        facts, grey = decode(instance, read, spec)
    except MemoryError:
        return _OUT_OF_MEMORY, b""
    return json.dumps(asdict(facts)).encode("ascii") + b"\n", b"" if grey is None else grey.tobytes()


def _say(into: IO[bytes], *parts: bytes) -> None:
    into.writelines(parts)
    into.flush()


def _taken_on(dataset: Dataset) -> str:
    """Give the date of the image: the first of these that the file has; the archive's dates are shifted by whole weeks."""
    for keyword in ("AcquisitionDate", "AcquisitionDateTime", "ContentDate", "SeriesDate", "StudyDate"):
        date = str(dataset.get(keyword) or "")[:8]
        if len(date) == 8 and date.isdigit():
            return date
    return ""
