"""Files survive a power cut, or are not there at all."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from models import durable


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record (call, name) of what reaches the disk: fsyncs by what they are of, renames and new folders by their name."""
    seen: list[tuple[str, str]] = []

    def spied(name: str, real: Callable[..., None], named: Callable[..., str]) -> Callable[..., None]:
        def call(*args: object, **kwargs: object) -> None:
            seen.append((name, named(*args)))
            real(*args, **kwargs)

        return call

    def of_descriptor(descriptor: int) -> str:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        return "temporary" if name.endswith(".tmp") else name

    monkeypatch.setattr(os, "fsync", spied("fsync", os.fsync, of_descriptor))
    monkeypatch.setattr(os, "replace", spied("rename", os.replace, lambda _from, to: Path(to).name))
    monkeypatch.setattr(os, "mkdir", spied("mkdir", os.mkdir, lambda path, *_mode: Path(path).name))
    return seen


def test_the_bytes_are_synced_before_the_name_and_that_before_the_return(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    durable.write(tmp_path / "one.dcm", b"pixels")
    assert calls == [("fsync", "temporary"), ("rename", "one.dcm"), ("fsync", tmp_path.name)]


def test_new_folders_are_synced_into_their_parents_from_the_top(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    durable.write(tmp_path / "pid" / "study" / "one.dcm", b"pixels")
    assert calls == [
        ("mkdir", "pid"),
        ("fsync", tmp_path.name),
        ("mkdir", "study"),
        ("fsync", "pid"),
        ("fsync", "temporary"),
        ("rename", "one.dcm"),
        ("fsync", "study"),
    ]


def test_a_folder_that_another_process_made_is_synced_before_anything_is_put_into_it(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    """It may not have come to that itself; once is enough."""
    (tmp_path / "pid" / "study").mkdir(parents=True)
    calls.clear()
    for _ in range(2):
        durable.make_folder(tmp_path / "pid" / "study", below=tmp_path)
    assert calls == [("fsync", "pid"), ("fsync", tmp_path.name)]


@pytest.mark.parametrize("hard_links", [False, True], ids=["rename", "hard links"])
def test_a_new_file_replaces_none_and_leaves_no_temporary_one(
    tmp_path: Path, hard_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hard_links:
        monkeypatch.setattr(durable, "_RENAME_NOREPLACE", 1 << 30)
    durable.write_with(tmp_path / "one", lambda file: _write(file, b"first"), replaces=False)
    with pytest.raises(FileExistsError):
        durable.write_with(tmp_path / "one", lambda file: _write(file, b"second"), replaces=False)
    assert (tmp_path / "one").read_bytes() == b"first"
    assert (tmp_path / "one").stat().st_nlink == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "one"]


def test_what_is_written_reads_back_with_its_mode_and_nothing_else_is_left(tmp_path: Path) -> None:
    durable.write(tmp_path / "a" / "one", b"first", mode=0o440)
    durable.write(tmp_path / "a" / "one", b"second", mode=0o600)
    durable.write_with(tmp_path / "a" / "two", lambda file: _write(file, b"third"))
    assert (tmp_path / "a" / "one").read_bytes() == b"second"
    assert (tmp_path / "a" / "two").read_bytes() == b"third"
    assert stat.S_IMODE((tmp_path / "a" / "one").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "a" / "two").stat().st_mode) == 0o440
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["one", "two"]


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable.write(tmp_path / "one", b"old")

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = full if step == "write" else lambda file: file.write(b"new")
    with monkeypatch.context() as patch:
        if step != "write":
            patch.setattr(os, {"fsync": "fsync", "rename": "replace"}[step], full)
        with pytest.raises(OSError, match="No space"):
            durable.write_with(tmp_path / "one", writer)
    assert list(tmp_path.iterdir()) == [tmp_path / "one"]
    assert (tmp_path / "one").read_bytes() == b"old"


def test_threads_that_need_the_same_new_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    def write(number: int) -> None:
        durable.write(tmp_path / "pid" / "study" / f"{number}", b"%d" % number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.read_bytes() for path in (tmp_path / "pid" / "study").iterdir()} == {b"%d" % number for number in range(16)}


def test_a_name_that_is_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"exists|[Nn]ot a directory"):
        durable.write(tmp_path / "file" / "one", b"")


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
