"""A disk that forgets what was not synced: system calls recorded by strace are replayed up to any point, then the power goes.

A `Disk` knows of each file what was written and what was synced, of each folder which names are there and which were synced.
`Disk.rebuild` makes a real folder of it: with or without the names, and with or without the data, that no fsync stands for. The
two together are four disks; a real one after a power cut may be any of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CALLS = (
    "openat,open,creat,close,lseek,write,writev,pwrite64,pwritev,pwritev2,ftruncate,truncate,fallocate,copy_file_range,sendfile,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,mkdir,mkdirat,fsync,fdatasync,sendto,sendmsg"
)
UNHANDLED = {
    "copy_file_range",
    "sendfile",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
    "truncate",
    "pwritev",
    "pwritev2",
    "creat",
    "open",
}
"""Calls that the replay does not model: on the recorded folder they are a failure, not a gap."""


@dataclass
class File:
    """A file: what a reader sees now, and what is sure to be there after a power cut."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


@dataclass
class Folder:
    """A folder: its names now, and those that are sure to be there after a power cut."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One system call, at its start and again when it has returned."""

    name: str
    arguments: str
    result: int
    returned: bool

    @property
    def paths(self) -> list[str]:
        """The quoted strings, as paths."""
        return [data.decode("utf-8", "surrogateescape") for data in self.strings]

    @property
    def strings(self) -> list[bytes]:
        """The quoted strings."""
        return [bytes.fromhex(text.replace("\\x", "")) for text in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', self.arguments)]

    @property
    def descriptor(self) -> int:
        """The file descriptor that is the first argument."""
        return int(re.match(r"\d+", self.arguments)[0])  # type: ignore[index]

    @property
    def file(self) -> str:
        """The path of that descriptor, as the kernel knows it at this moment."""
        found = re.match(r"\d+<((?:\\x[0-9a-f]{2})*)>", self.arguments)
        return bytes.fromhex(found[1].replace("\\x", "")).decode() if found else ""

    @property
    def numbers(self) -> list[int]:
        """The numbers that follow the strings and descriptors."""
        return [int(text) for text in re.findall(r", (-?\d+)(?=,|$)", self.arguments)]


def calls(trace: Path) -> Iterator[Call]:
    """Read what `strace -f -y -xx` wrote; a call that another thread cut in two comes at its start and at its end."""
    begun: dict[str, tuple[str, str]] = {}
    for line in trace.read_text("ascii").splitlines():
        if found := re.match(r"(\d+) +(\w+)\((.*) <unfinished \.\.\.>$", line):
            begun[found[1]] = (found[2], found[3])
            yield Call(found[2], found[3], -1, returned=False)
        elif found := re.match(r"(\d+) +<\.\.\. (\w+) resumed>(.*)\) += (-?\d+)", line):
            name, arguments = begun.pop(found[1])
            yield Call(name, arguments + found[3], int(found[4]), returned=True)
        elif found := re.match(r"(\d+) +(\w+)\((.*)\) += (-?\d+)", line):
            yield Call(found[2], found[3], -1, returned=False)
            yield Call(found[2], found[3], int(found[4]), returned=True)


class Disk:
    """The tree below `root`, as it was when this was made, and what calls made of it since."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = _load(root)
        self.offsets: dict[int, int] = {}
        self.syncing: dict[str, bytes | dict[str, File | Folder]] = {}

    def apply(self, call: Call) -> bool:
        """Do what `call` did; True when the disk may have changed."""
        if call.name in ("fsync", "fdatasync"):
            return self._sync(call)
        if not call.returned or call.result < 0:
            return False
        if call.name in ("openat", "close", "lseek"):
            return self._position(call)
        if call.name in ("write", "writev", "pwrite64", "ftruncate", "fallocate"):
            return self._change(call)
        if any(self._is_inside(path) for path in call.paths) or self._is_inside(call.file):
            return self._rename(call)
        return False

    def rebuild(self, target: Path, *, all_names: bool, all_data: bool) -> None:
        """Make a real folder of what is left after a power cut."""
        _store(self.top, target, all_names=all_names, all_data=all_data)

    def _is_inside(self, path: str) -> bool:
        return path.startswith(f"{self.root}/")

    def _at(self, path: str) -> tuple[Folder, str]:
        folder = self.top
        *parts, name = Path(path).relative_to(self.root).parts
        for part in parts:
            inner = folder.names[part]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, name

    def _file(self, path: str) -> File | None:
        if not self._is_inside(path) or path.endswith(" (deleted)"):
            return None
        folder, name = self._at(path)
        found = folder.names[name]
        assert isinstance(found, File)
        return found

    def _sync(self, call: Call) -> bool:
        """What is on its way when an fsync begins is safe when it ends."""
        path = call.file
        if path != str(self.root) and not self._is_inside(path):
            return False
        folder, name = (None, "") if path == str(self.root) else self._at(path)
        found = self.top if folder is None else folder.names[name]
        if not call.returned:
            self.syncing[path] = bytes(found.data) if isinstance(found, File) else dict(found.names)
        elif call.result == 0:
            found.synced = self.syncing[path]
        return call.returned

    def _position(self, call: Call) -> bool:
        if call.name == "close":
            self.offsets.pop(call.descriptor, None)
        elif call.name == "lseek":
            self.offsets[call.descriptor] = call.result
        elif (path := _resolved(call)) and self._is_inside(path) and "O_DIRECTORY" not in call.arguments:
            folder, name = self._at(path)
            self.offsets[call.result] = 0
            assert "O_APPEND" not in call.arguments
            if "O_CREAT" in call.arguments and name not in folder.names:
                folder.names[name] = File()
                return True
            if "O_TRUNC" in call.arguments and isinstance(found := folder.names[name], File):
                found.data.clear()
                return True
        return False

    def _change(self, call: Call) -> bool:
        found = self._file(call.file)
        if found is None:
            return False
        if call.name in ("write", "writev", "pwrite64"):
            data = b"".join(call.strings)[: call.result]
            at = call.numbers[-1] if call.name == "pwrite64" else self.offsets[call.descriptor]
            if call.name != "pwrite64":
                self.offsets[call.descriptor] = at + len(data)
            found.data.extend(b"\0" * (at - len(found.data)))
            found.data[at : at + len(data)] = data
        else:
            length = call.numbers[-1] + (call.numbers[-2] if call.name == "fallocate" else 0)
            if call.name == "ftruncate":
                del found.data[length:]
            found.data.extend(b"\0" * (length - len(found.data)))
        return True

    def _rename(self, call: Call) -> bool:
        assert call.name not in UNHANDLED, call
        folder, name = self._at(call.paths[0])
        if call.name.startswith("mkdir"):
            folder.names[name] = Folder()
        elif call.name.startswith("rename"):
            to, new_name = self._at(call.paths[1])
            to.names[new_name] = folder.names.pop(name)
        elif call.name.startswith(("unlink", "rmdir")):
            del folder.names[name]
        else:
            return False
        return True


def _resolved(call: Call) -> str:
    return call.paths[0] if call.paths else ""


def _load(path: Path) -> Folder:
    """Take what stands at `path` for synced."""
    names: dict[str, File | Folder] = {}
    for entry in path.iterdir():
        names[entry.name] = _load(entry) if entry.is_dir() else File(bytearray(entry.read_bytes()), entry.read_bytes())
    return Folder(names, dict(names))


def _store(folder: Folder, target: Path, *, all_names: bool, all_data: bool) -> None:
    target.mkdir(mode=0o700)
    for name, entry in (folder.names if all_names else folder.synced).items():
        if isinstance(entry, Folder):
            _store(entry, target / name, all_names=all_names, all_data=all_data)
        else:
            (target / name).write_bytes(entry.data if all_data else entry.synced)
            (target / name).chmod(0o600)
