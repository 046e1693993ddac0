"""Decoded images for training: each image of the archive is decoded once, never in an epoch.

In: instances and a way to read them. Out: uint8 rows of a memory-mapped file, found by SOP Instance UID. All of it can be
thrown away and built again from the archive. Two files per preprocessing::

    cache/<size>px-<digest>/pixels.u8     rows of size × size bytes, only ever appended or blanked
    cache/<size>px-<digest>/index.jsonl   one line an image, written after its row is on the disk; the last line of a UID counts

So a kill at any moment leaves at worst rows that no line names; the next build cuts them off. A line holds pseudonyms and
digests only. An image that cannot be decoded has a line with the reason and no row; it is tried again when its file changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from models import durable
from models.preprocess import Preprocessing
from node.keep.decode import Decoded, Decoders, Facts, decode
from node.keep.records import Instance

NO_ROW = -1
CHUNK = 32
"""Images decoded between two syncs: a kill costs two chunks at most, because the next one is decoded meanwhile."""
PROCESSES_FROM = 256
"""Images to decode that are worth starting processes for; fewer are decoded by threads before the processes are up."""
BLANKED = "blanked"
_NAME = re.compile(r"\d+px-[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Row:
    """What the cache knows of one image."""

    sop_uid: str
    source: str
    """Digest over header and pixels of the file it was made from; another file makes another row."""
    row: int
    """Position in the file of pixels; -1 when there are none."""
    digest: str
    """SHA-256 of the row's bytes: equal for equal pictures, whatever their syntax. Empty without a row."""
    mean: float
    """Mean grey level, 0…255."""
    spread: float
    """Standard deviation of the grey levels, 0…127."""
    taken_on: str
    """Date of the image as the archive's file gives it (YYYYMMDD, shifted), empty when it gives none."""
    problem: str = ""
    """Why there is no row."""
    manufacturer: str = ""
    """Of the unit, as the archive's file gives it; empty when it gives none, and in lines older than this field."""


class Cache:
    """The decoded images of one preprocessing, below `folder`."""

    def __init__(self, folder: Path, spec: Preprocessing) -> None:
        digest = hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()[:12]
        self.spec = spec
        self.size_px = spec.size_px
        self._place(folder / f"{spec.size_px}px-{digest}")

    def _place(self, folder: Path) -> None:
        self.folder = folder
        self._pixels = self.folder / "pixels.u8"
        self._index = self.folder / "index.jsonl"
        self._rows = self._known()

    @classmethod
    def all(cls, folder: Path) -> list[Cache]:
        """Give the caches of every preprocessing below `folder`, to blank images in; only their size is known."""
        found = []
        for each in sorted(folder.iterdir()) if folder.is_dir() else ():  # no glob, which passes over what it may not read
            if not _NAME.fullmatch(each.name):
                continue
            cache = cls(folder, Preprocessing(int(each.name.partition("px-")[0])))
            cache._place(each)
            found.append(cache)
        return found

    def __len__(self) -> int:
        return sum(row.row != NO_ROW for row in self._rows.values())

    def get(self, sop_uid: str) -> Row | None:
        """Give what is known of one image, None when it was never decoded or was blanked."""
        row = self._rows.get(sop_uid)
        return None if row is None or row.problem == BLANKED else row

    def pixels(self, sop_uids: Sequence[str]) -> NDArray[np.uint8]:
        """Read the images of `sop_uids`, in that order: (n, size, size) uint8, in memory of their own."""
        mapped, rows = self.mapped(sop_uids)
        return np.array(mapped[rows])

    def mapped(self, sop_uids: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Give the pictures of the cache without reading them, and in which rows those of `sop_uids` are, in that order.

        Returns
        -------
        tuple[NDArray[np.uint8], NDArray[np.int64]]
            (rows, size, size), read-only, memory-mapped: the whole file, not only what was asked for; and (n,) row numbers.
            An image that is blanked later is black from then on.

        Raises
        ------
        KeyError
            An image is not known or has no row.
        """
        rows = np.array([self._rows[uid].row for uid in sop_uids], np.int64)
        if not len(rows):
            return np.empty((0, self.size_px, self.size_px), np.uint8), rows
        if rows.min() == NO_ROW:
            raise KeyError("an image without a row")
        mapped = np.memmap(self._pixels, np.uint8, "r")
        whole = mapped[: len(mapped) // self._row_bytes * self._row_bytes]
        return whole.reshape(-1, self.size_px, self.size_px), rows

    def build(
        self,
        instances: Iterable[Instance],
        read: Callable[[Instance], Dataset],
        *,
        threads: int = 2,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> int:
        """Decode what is missing and give its number; whatever is done stays done when it is killed.

        Parameters
        ----------
        read
            Picklable when there may be many images (see `Decoders`).
        threads
            Images that are decoded at once; each in a process of its own when there are many.

        Raises
        ------
        NoDecoder
            No process can be started to decode in.
        """
        with self._alone(), ExitStack() as stack:
            missing = [one for one in instances if self._source_of(one.sop_uid) != _source(one)]
            work: Callable[[Instance], Decoded] = partial(decode, read=read, spec=self.spec)
            if threads > 1 and len(missing) >= PROCESSES_FROM:
                work = stack.enter_context(Decoders(read, self.spec, threads)).decode
            pool = stack.enter_context(ThreadPoolExecutor(max_workers=max(1, threads)))
            stack.callback(pool.shutdown, cancel_futures=True)
            todo, done = iter(missing), 0
            ahead: deque[list[tuple[Instance, Future[Decoded]]]] = deque()
            while done < len(missing):
                while len(ahead) < 2 and (chunk := list(islice(todo, CHUNK))):
                    ahead.append([(one, pool.submit(work, one)) for one in chunk])
                decoded = [_row(one, *future.result()) for one, future in ahead.popleft()]
                self._append(decoded)
                done += len(decoded)
                progress(done, len(missing))
            return len(missing)

    def blank(self, sop_uids: Iterable[str]) -> int:
        """Overwrite every row these images ever had with zeros and forget them; give how many there were."""
        with self._alone():
            wanted = {uid for uid in sop_uids if self.get(uid)}
            if not wanted:
                return 0
            rows = [line.row for line in self._lines() if line.sop_uid in wanted and line.row != NO_ROW]
            if rows:
                with open(self._pixels, "r+b") as file:
                    for row in rows:
                        file.seek(row * self._row_bytes)
                        file.write(bytes(self._row_bytes))
                    file.flush()
                    os.fsync(file.fileno())
            self._note([Row(uid, "", NO_ROW, "", 0.0, 0.0, "", BLANKED) for uid in sorted(wanted)])
            return len(wanted)

    def blank_others(self, sop_uids: Collection[str]) -> int:
        """Blank every image but these, and give how many there were."""
        others = [uid for uid in self._rows if uid not in sop_uids and self.get(uid)]
        return self.blank(others) if others else 0

    @property
    def _row_bytes(self) -> int:
        return self.size_px * self.size_px

    def _source_of(self, sop_uid: str) -> str:
        known = self._rows.get(sop_uid)
        return known.source if known else ""

    def _append(self, decoded: Sequence[tuple[Row, NDArray[np.uint8] | None]]) -> None:
        rows = []
        with open(self._pixels, "ab") as file:
            at = file.seek(0, os.SEEK_END) // self._row_bytes
            for row, grey in decoded:
                if grey is None:
                    rows.append(row)
                    continue
                file.write(grey.tobytes())
                rows.append(replace(row, row=at))
                at += 1
            file.flush()
            os.fsync(file.fileno())
        self._note(rows)

    def _note(self, rows: Sequence[Row]) -> None:
        """Write the lines of rows that are on the disk already."""
        with open(self._index, "ab") as file:
            file.writelines(_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        self._rows |= {row.sop_uid: row for row in rows}

    def _lines(self) -> Iterator[Row]:
        """Read the index; what a kill left torn is not a line, nor is a line whose row is not there."""
        if not self._index.is_file():
            return
        rows = self._pixels.stat().st_size // self._row_bytes if self._pixels.is_file() else 0
        with open(self._index, encoding="ascii", errors="replace") as file:
            for text in file:
                if not text.endswith("\n"):
                    return
                try:
                    line = Row(**json.loads(text))
                except (ValueError, TypeError):
                    continue
                if line.row < rows:
                    yield line

    def _known(self) -> dict[str, Row]:
        return {line.sop_uid: line for line in self._lines()}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only writer, start from what is on the disk, and cut off what an interrupted build left unnamed."""
        durable.make_folder(self.folder)
        for file in (self.folder / "lock", self._pixels, self._index):
            durable.touch(file)  # where the cache is shared, the replier blanks in it as another user than the trainer
        with open(self.folder / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lines = list(self._lines())
            self._rows = {line.sop_uid: line for line in lines}
            _cut(self._pixels, self._row_bytes * (1 + max((line.row for line in lines), default=NO_ROW)))
            text = b"".join(_line(line) for line in lines)
            if self._index.read_bytes() != text:
                durable.write(self._index, text, mode=0o600)  # a line that stayed could name the row that is written next
            yield


def _line(row: Row) -> bytes:
    return json.dumps(asdict(row)).encode("ascii") + b"\n"


def _cut(file: Path, size: int) -> None:
    if file.is_file() and file.stat().st_size > size:
        os.truncate(file, size)


def _source(instance: Instance) -> str:
    return hashlib.sha256(f"{instance.header_digest}/{instance.pixel_digest}".encode()).hexdigest()


def _row(instance: Instance, facts: Facts, grey: NDArray[np.uint8] | None) -> tuple[Row, NDArray[np.uint8] | None]:
    """Say of a decoded image what its line says; its place in the file is told by `_append`."""
    row = Row(
        sop_uid=instance.sop_uid,
        source="" if facts.passing else _source(instance),  # without a source it is tried again
        row=NO_ROW,
        digest="",
        mean=0.0,
        spread=0.0,
        taken_on=facts.taken_on,
        problem=facts.problem,
        manufacturer=facts.manufacturer,
    )
    if grey is None:
        return row, None
    digest = hashlib.sha256(grey.tobytes()).hexdigest()
    return replace(row, digest=digest, mean=round(float(grey.mean()), 4), spread=round(float(grey.std()), 4)), grey
