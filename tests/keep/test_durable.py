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


@pytest.mark.parametrize(("folder", "made", "read_only", "private"), [
    (0o2750, 0o2750, 0o440, 0o640),
    (0o2770, 0o2770, 0o440, 0o660),
    (0o2777, 0o2770, 0o440, 0o660),
    (0o2700, 0o2700, 0o440, 0o600),
    (0o0770, 0o0700, 0o440, 0o600),
])  # fmt: skip
def test_what_is_made_in_a_shared_folder_is_as_open_to_its_group_as_the_folder(
    folder: int, made: int, read_only: int, private: int, tmp_path: Path
) -> None:
    tmp_path.chmod(folder)
    before = os.umask(0o007)
    try:
        durable.write(tmp_path / "pid" / "study" / "one.dcm", b"pixels")
        durable.write(tmp_path / "pid" / "study" / "two", b"figures", mode=0o600)
    finally:
        os.umask(before)
    modes = [
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("pid", "pid/study", "pid/study/one.dcm", "pid/study/two")
    ]
    assert modes == [made, made, read_only, private]


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_the_umask_of_who_comes_first_does_not_decide_about_a_shared_file(umask: int, tmp_path: Path) -> None:
    tmp_path.chmod(0o2770)
    before = os.umask(umask)
    try:
        durable.write(tmp_path / "history.jsonl", b"", mode=0o600)
        durable.touch(tmp_path / "catalogue.db")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "history.jsonl").stat().st_mode) == 0o660
    assert stat.S_IMODE((tmp_path / "catalogue.db").stat().st_mode) == 0o660


def test_what_is_touched_keeps_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"precious")
    durable.touch(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == b"precious"


def test_a_folder_that_is_given_a_mode_has_that_also_below_a_shared_one(tmp_path: Path) -> None:
    tmp_path.chmod(0o2770)
    durable.make_folder(tmp_path / "keys", mode=0o700)
    durable.write(tmp_path / "keys" / "site.key", b"key", mode=0o600)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) & 0o777 == 0o700
    assert stat.S_IMODE((tmp_path / "keys" / "site.key").stat().st_mode) == 0o600


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
