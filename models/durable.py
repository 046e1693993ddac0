"""Files that survive a power cut: temporary name beside the target, write, fsync, rename, fsync of the folder.

In: a path and its bytes. Out: the file, whole or not there at all, under its name. A file must never be seen half written, and
nothing here may return before the bytes, the name and the folders above it are on the disk.

Everything belongs to its owner alone, unless a site shares a folder with a group (setgid, as `chmod 2750`): what is made in it is
then as open to that group as the folder is. So a trainer reads the archive as a user of its own, who cannot read the keys.
"""

from __future__ import annotations

import ctypes
import errno
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
_safe: set[Path] = set()
"""Folders whose names this process has brought to the disk itself."""
_SAFE_MAX = 10_000
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_NOT_HERE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
"""What a file system says that has no such call (rename without replacing: NFS; hard links: FAT, some network shares)."""


def write(path: Path, data: bytes, *, mode: int = 0o440) -> None:
    """Write `data` to `path`, durably and atomically; what was there is replaced.

    Raises
    ------
    OSError
        As the system says it (ENOSPC, EDQUOT, …); neither a part of the file nor the temporary file is left.
    """
    write_with(path, lambda file: _write_all(file, data), mode=mode)


def write_with(path: Path, writer: Callable[[BinaryIO], None], *, mode: int = 0o440, replaces: bool = True) -> None:
    """Let `writer` fill a file that then stands at `path`, durably and atomically; see `write`.

    Unless it `replaces` what stands there, a file that another process put there meanwhile is left alone, and this is a
    FileExistsError.
    """
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
        if replaces:
            temporary.replace(path)
        else:
            _publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def touch(path: Path, *, mode: int = 0o600) -> None:
    """Make an empty file for others to fill; one that is there is left alone.

    It is not even opened: to close a file again would drop every lock that this process holds on it (fcntl(2)), SQLite's too.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    os.fchmod(descriptor, shared(path.parent, mode))
    os.close(descriptor)


def shared(folder: Path, mode: int) -> int:
    """Give the mode of what is made in `folder`: `mode`, and where the folder is shared, its group may what its owner may.

    Never more than the folder itself grants its group, and nothing at all to others.
    """
    found = folder.stat().st_mode
    return mode | (mode >> 3 & found & stat.S_IRWXG if found & stat.S_ISGID else 0)


def make_folder(folder: Path, *, mode: int | None = None, below: Path | None = None) -> None:
    """Make `folder` and those missing above it; each one's name is on the disk before anything is put into it.

    Without a `mode` they are their owner's alone (0700), or shared as the folder above them is; with one they have that. Folders
    `below` another may be made by several processes: one that is there may have been made a moment ago by a process that has not
    synced it yet, so its name is synced here, too, once.
    """
    with _making:
        for each in () if below is None else (folder, *folder.parents):
            if each == below or each in _safe:
                break
            if each.is_dir():
                sync_folder(each.parent)
                _note_safe(each)
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for each in reversed(missing):
            with suppress(FileExistsError):  # another process was faster; its fsync may still be to come, so ours follows
                _mkdir(each, shared(each.parent, 0o700) if mode is None else mode)
            sync_folder(each.parent)
            _note_safe(each)


def _mkdir(folder: Path, mode: int) -> None:
    """Make a folder that its group may use as `mode` says, whatever the umask; setgid is passed on by the system.

    A chmod afterwards would have to name setgid, which the units forbid. What another thread makes at this moment may be its
    group's, too, never others'.
    """
    before = os.umask(0o007)
    try:
        folder.mkdir(mode)
    finally:
        os.umask(before)


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` (made, renamed, removed) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, path: Path) -> None:
    """Give a file its name unless the name is taken; no look before the leap, for another host may leap meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    old, new = os.fsencode(temporary), os.fsencode(path)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NOT_HERE:
            raise OSError(code, os.strerror(code), str(path))
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A server of NFS may have done it and its answer been lost: the repeated call then meets its own success.
        if not path.samefile(temporary):
            raise
    temporary.unlink()


def _note_safe(folder: Path) -> None:
    if len(_safe) >= _SAFE_MAX:
        _safe.clear()
    _safe.add(folder)


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)
