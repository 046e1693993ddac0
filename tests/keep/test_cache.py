"""The cache of decoded images: right, incremental, whole after a kill, blankable."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import decoding
import numpy as np
import pytest
import studies
from pydicom import dcmread
from pydicom.dataset import Dataset

from models.errors import Unreadable
from models.preprocess import Preprocessing, preprocess
from node.keep import cache as room
from node.keep.cache import Cache
from node.keep.records import Instance

SPEC = Preprocessing(32)


def instance(number: int, *, pixel_digest: str = "p") -> Instance:
    return Instance(
        sop_uid=studies.uid("sop", number),
        series_uid="2.25.1",
        study_uid="2.25.2",
        pid="OST-AAAAAAAAAAAAAAAA",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.1",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        path=str(number),
        header_digest="h",
        pixel_digest=pixel_digest,
        modality="CR",
        body_part="LEG",
        age_years=9,
        sex="F",
        device="",
        accession_key="",
        study_id_key="",
    )


def read(one: Instance) -> Dataset:
    return studies.image(patient=1, instance=int(one.path))


def test_a_row_is_what_serving_sees(tmp_path: Path) -> None:
    cache = Cache(tmp_path, SPEC)
    images = [instance(number) for number in (1, 2, 3)]
    assert cache.build(images, read) == 3
    rows = cache.pixels([images[2].sop_uid, images[0].sop_uid])
    for row, number in zip(rows, (3, 1), strict=True):
        assert np.array_equal(row.astype(np.float32) / 255, preprocess(read(instance(number)), SPEC)[0])
    known = cache.get(images[0].sop_uid)
    assert known is not None
    assert (known.taken_on, known.manufacturer) == (studies.STUDY_DATE, "Canon Inc.")


def test_a_line_from_before_the_manufacturer_is_still_read(tmp_path: Path) -> None:
    cache = Cache(tmp_path, SPEC)
    cache.build([instance(1)], read)
    index = cache.folder / "index.jsonl"
    line = json.loads(index.read_text())
    del line["manufacturer"]
    index.write_text(json.dumps(line) + "\n")
    again = Cache(tmp_path, SPEC)
    known = again.get(instance(1).sop_uid)
    assert known is not None
    assert (known.manufacturer, known.row) == ("", 0)
    assert again.build([instance(1)], read) == 0


def test_nothing_is_decoded_twice_and_a_changed_file_is(tmp_path: Path) -> None:
    images = [instance(number) for number in (1, 2)]
    Cache(tmp_path, SPEC).build(images, read)
    again = Cache(tmp_path, SPEC)
    assert again.build([*images, instance(3)], read) == 1
    assert again.build([replace(images[0], pixel_digest="other", path="9")], read) == 1
    assert np.array_equal(again.pixels([images[0].sop_uid])[0] / np.float32(255), preprocess(read(instance(9)), SPEC)[0])
    assert len(Cache(tmp_path, SPEC)) == 3


def test_unreadable_images_are_recorded_and_not_tried_again(tmp_path: Path) -> None:
    tries = []

    def broken(one: Instance) -> Dataset:
        tries.append(one.sop_uid)
        raise Unreadable("no codec")

    cache = Cache(tmp_path, SPEC)
    cache.build([instance(1)], broken)
    cache.build([instance(1)], broken)
    known = Cache(tmp_path, SPEC).get(instance(1).sop_uid)
    assert known is not None
    assert (known.row, known.problem, len(tries), len(cache)) == (room.NO_ROW, "no codec", 1, 0)
    with pytest.raises(KeyError):
        cache.pixels([instance(1).sop_uid])


@pytest.mark.parametrize("lost", ["index line torn", "row without line", "line without row"])
def test_what_a_kill_leaves_is_repaired(tmp_path: Path, lost: str) -> None:
    """A kill between any two writes costs at most the images that were not yet in the index."""
    cache = Cache(tmp_path, SPEC)
    cache.build([instance(1), instance(2)], read)
    index, pixels = cache.folder / "index.jsonl", cache.folder / "pixels.u8"
    if lost == "index line torn":
        index.write_bytes(index.read_bytes()[:-20])
    elif lost == "row without line":
        pixels.write_bytes(pixels.read_bytes() + b"x" * 700)
    else:
        pixels.write_bytes(pixels.read_bytes()[:-1])
    again = Cache(tmp_path, SPEC)
    again.build([instance(number) for number in (1, 2, 3)], read)
    uids = [instance(number).sop_uid for number in (1, 2, 3)]
    for cached in (again, Cache(tmp_path, SPEC)):
        for row, number in zip(cached.pixels(uids), (1, 2, 3), strict=True):
            assert np.array_equal(row / np.float32(255), preprocess(read(instance(number)), SPEC)[0])
    assert pixels.stat().st_size == 3 * 32 * 32


def test_a_killed_build_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CHUNK", 2)

    def killed_at_four(one: Instance) -> Dataset:
        if one.path == "4":
            raise KeyboardInterrupt
        return read(one)

    images = [instance(number) for number in range(1, 6)]
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path, SPEC).build(images, killed_at_four)
    told: list[tuple[int, int]] = []
    assert Cache(tmp_path, SPEC).build(images, read, progress=lambda done, total: told.append((done, total))) == 3
    assert told == [(2, 3), (3, 3)]


def test_blanked_rows_are_zero_on_the_disk_and_forgotten(tmp_path: Path) -> None:
    cache = Cache(tmp_path, SPEC)
    cache.build([instance(1), instance(2)], read)
    cache.build([replace(instance(1), pixel_digest="newer")], read)  # its older row must go too
    before = cache.pixels([instance(2).sop_uid])
    assert cache.blank([instance(1).sop_uid, "2.25.404"]) == 1
    again = Cache(tmp_path, SPEC)
    assert again.get(instance(1).sop_uid) is None
    assert np.array_equal(again.pixels([instance(2).sop_uid]), before)
    on_disk = np.fromfile(cache.folder / "pixels.u8", np.uint8).reshape(3, -1)
    assert [bool(row.any()) for row in on_disk] == [False, True, False]
    assert again.build([instance(1)], read) == 1


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_cache_in_a_shared_folder_can_be_blanked_by_the_group_and_one_in_a_private_one_by_its_owner_alone(
    umask: int, tmp_path: Path
) -> None:
    """The trainer fills it, the replier blanks in it, and they are two users."""
    before = os.umask(umask)
    try:
        for name, mode, wanted in (("shared", 0o2770, (0o2770, 0o660)), ("private", 0o700, (0o700, 0o600))):
            (tmp_path / name).mkdir()
            (tmp_path / name).chmod(mode)
            cache = Cache(tmp_path / name, SPEC)
            cache.build([instance(1), instance(2)], read)
            cache.blank([instance(1).sop_uid])
            found = {stat.S_IMODE(file.stat().st_mode) for file in cache.folder.iterdir()}
            assert (stat.S_IMODE(cache.folder.stat().st_mode), found) == (wanted[0], {wanted[1]})
    finally:
        os.umask(before)


def test_a_cache_that_may_not_be_read_is_no_empty_one(tmp_path: Path) -> None:
    """Retention would believe that nothing is left."""
    if os.geteuid() != 0:
        pytest.skip("acting as another user needs root")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    Cache(tmp_path / "cache", SPEC).build([instance(1)], read)
    (tmp_path / "cache").chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            Cache.all(tmp_path / "cache")
    finally:
        os.seteuid(0)


def test_another_preprocessing_has_rows_of_its_own(tmp_path: Path) -> None:
    Cache(tmp_path, SPEC).build([instance(1)], read)
    other = Cache(tmp_path, Preprocessing(16))
    assert other.get(instance(1).sop_uid) is None
    other.build([instance(1)], read)
    assert other.pixels([instance(1).sop_uid]).shape == (1, 16, 16)


def test_a_line_whose_row_is_lost_never_names_the_row_of_another_image(tmp_path: Path) -> None:
    images = [instance(number) for number in (1, 2)]
    cache = Cache(tmp_path, SPEC)
    cache.build(images, read)
    (cache.folder / "pixels.u8").unlink()
    Cache(tmp_path, SPEC).build(images[1:], read)
    Cache(tmp_path, SPEC).build([instance(3)], read)
    again = Cache(tmp_path, SPEC)
    assert again.get(images[0].sop_uid) is None
    assert again.build(images, read) == 1
    assert np.array_equal(again.pixels([images[0].sop_uid])[0] / np.float32(255), preprocess(read(images[0]), SPEC)[0])


def test_a_line_that_cannot_be_read_costs_its_image_only(tmp_path: Path) -> None:
    images = [instance(number) for number in (1, 2)]
    cache = Cache(tmp_path, SPEC)
    cache.build(images, read)
    index = cache.folder / "index.jsonl"
    first, second = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"\0" * (len(first) - 1) + b"\n" + second)
    assert Cache(tmp_path, SPEC).build(images, read) == 1


def test_a_disk_that_was_away_is_no_unreadable_image(tmp_path: Path) -> None:
    def away(_one: Instance) -> Dataset:
        raise OSError(errno.EIO, "Input/output error")

    cache = Cache(tmp_path, SPEC)
    cache.build([instance(1)], away)
    known = cache.get(instance(1).sop_uid)
    assert known is not None
    assert known.problem == "the file cannot be read"
    assert Cache(tmp_path, SPEC).build([instance(1)], read) == 1
    assert len(Cache(tmp_path, SPEC)) == 1


def test_a_damaged_file_of_the_archive_stops_no_build(tmp_path: Path) -> None:
    def damaged(one: Instance) -> Dataset:
        return dcmread(BytesIO(b"nothing")) if one.path == "1" else read(one)

    cache = Cache(tmp_path, SPEC)
    cache.build([instance(1), instance(2)], damaged)
    known = cache.get(instance(1).sop_uid)
    assert known is not None
    assert known.problem
    assert len(cache) == 1


def test_many_images_are_decoded_in_processes_to_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [instance(number) for number in range(1, 8)]
    Cache(tmp_path / "threads", SPEC).build(images, decoding.read_or_fail)
    monkeypatch.setattr(room, "PROCESSES_FROM", 2)
    monkeypatch.setattr(room, "CHUNK", 2)
    told: list[tuple[int, int]] = []
    cache = Cache(tmp_path / "processes", SPEC)
    assert cache.build(images, decoding.read_or_fail, progress=lambda done, total: told.append((done, total))) == 7
    assert told == [(2, 7), (4, 7), (6, 7), (7, 7)]
    for name in ("pixels.u8", "index.jsonl"):
        assert (cache.folder / name).read_bytes() == next((tmp_path / "threads").glob(f"*/{name}")).read_bytes()
    known = cache.get(instance(decoding.BROKEN).sop_uid)
    assert known is not None
    assert known.problem == "no codec"


def test_a_process_that_dies_costs_no_other_image_and_its_own_is_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PROCESSES_FROM", 2)
    images = [instance(number) for number in range(1, 7)]
    cache = Cache(tmp_path, SPEC)
    cache.build(images, decoding.read_or_die)
    assert len(cache) == 5
    known = cache.get(instance(decoding.DEADLY).sop_uid)
    assert known is not None
    assert known.problem == "decoding the image ended its process"
    assert Cache(tmp_path, SPEC).build(images, read) == 1


def test_an_interrupted_build_in_processes_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PROCESSES_FROM", 2)
    monkeypatch.setattr(room, "CHUNK", 2)

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    images = [instance(number) for number in range(1, 8)]
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path, SPEC).build(images, decoding.read_or_fail, progress=stop)
    assert Cache(tmp_path, SPEC).build(images, read) == 5
