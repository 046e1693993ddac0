"""Files that survive a power cut: temporary name beside the target, write, fsync, rename, fsync of the folder.

In: a path and its bytes. Out: the file, whole or not there at all, under its name. A file must never be seen half written, and
nothing here may return before the bytes, the name and the folders above it are on the disk.

Everything belongs to its owner alone, unless a site shares a folder with a group (setgid, as `chmod 2750`): what is made in it is
then as open to that group as the folder is. So a trainer reads the archive as a user of its own, who cannot read the keys.
"""

from __future__ import annotations

import os
import secrets
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_making = threading.Lock()
"""Held from the look for a folder to the fsync of its parent: nobody else takes it for safe before it is."""


def write(path: Path, data: bytes, *, mode: int = 0o440) -> None:
    """Write `data` to `path`, durably and atomically; what was there is replaced.

    Raises
    ------
    OSError
        As the system says it (ENOSPC, EDQUOT, …); neither a part of the file nor the temporary file is left.
    """
    write_with(path, lambda file: _write_all(file, data), mode=mode)


def write_with(path: Path, writer: Callable[[BinaryIO], None], *, mode: int = 0o440) -> None:
    """Let `writer` fill a file that then stands at `path`, durably and atomically; see `write`."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    # 0600 until it is whole: the final mode may let others read it
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            writer(file)
            file.flush()
            os.fchmod(file.fileno(), shared(path.parent, mode))
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def touch(path: Path, *, mode: int = 0o600) -> None:
    """Make an empty file for others to fill, or see that one can be written that is there."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, shared(path.parent, mode))
    except FileExistsError:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    os.close(descriptor)


def shared(folder: Path, mode: int) -> int:
    """Give the mode of what is made in `folder`: `mode`, and where the folder is shared, its group may what its owner may.

    Never more than the folder itself grants its group, and nothing at all to others.
    """
    found = folder.stat().st_mode
    return mode | (mode >> 3 & found & stat.S_IRWXG if found & stat.S_ISGID else 0)


def make_folder(folder: Path, *, mode: int | None = None) -> None:
    """Make `folder` and those missing above it; each one's name is on the disk before anything is put into it.

    Without a `mode` they are their owner's alone (0700), or shared as the folder above them is; with one they have that.
    """
    with _making:
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for each in reversed(missing):
            with suppress(FileExistsError):  # another process was faster; its fsync may still be to come, so ours follows
                each.mkdir(shared(each.parent, 0o700) if mode is None else mode)  # setgid is passed on by the system
            sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` (made, renamed, removed) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)
