"""Decoding in processes of their own: what is right, what is wrong and what dies there."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import decoding
import numpy as np
import psutil
import pytest
import studies
from test_cache import instance

from models.preprocess import Preprocessing, preprocess
from node.errors import NoDecoder
from node.keep.archive import Archive
from node.keep.decode import Decoders

SPEC = Preprocessing(32)
EXPECTED = np.rint(preprocess(studies.image(), SPEC)[0] * 255)


@pytest.mark.parametrize("read", [decoding.read_without_torch, decoding.read_chattering])
def test_a_process_gives_the_picture_without_torch_and_whatever_a_codec_prints(read: Callable[..., studies.Dataset]) -> None:
    with Decoders(read, SPEC, 1) as decoders:
        for _ in range(2):
            facts, grey = decoders.decode(instance(1))
            assert grey is not None, facts.problem
            assert np.array_equal(grey, EXPECTED)


def test_an_archive_can_be_read_from_a_process(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    clean = studies.image()
    clean.PatientID = "OST-AAAAAAAAAAAAAAAA"
    there, _ = archive.put(clean, replace(instance(1), path=""))
    with Decoders(archive.read, SPEC, 1) as decoders:
        facts, grey = decoders.decode(there)
        assert grey is not None, facts.problem
        assert np.array_equal(grey, EXPECTED)
        assert decoders.decode(replace(there, sop_uid="2.25.404"))[0].passing  # the file is away


def test_an_image_whose_process_was_killed_is_tried_again(tmp_path: Path) -> None:
    with Decoders(decoding.read_or_die_once, SPEC, 1) as decoders:
        facts, grey = decoders.decode(replace(instance(1), path=str(tmp_path / "first")))
    assert grey is not None, facts.problem


def test_want_of_memory_is_no_fault_of_the_image() -> None:
    with Decoders(decoding.read_out_of_memory, SPEC, 1) as decoders, pytest.raises(MemoryError):
        decoders.decode(instance(1))


def test_processes_that_cannot_start_are_an_error_and_no_unreadable_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Decoders(decoding.read_or_fail, SPEC, 1) as decoders, pytest.raises(NoDecoder):
        decoders.decode(instance(1))


def test_no_process_is_left_when_the_work_is_done() -> None:
    before = set(psutil.Process().children())
    with Decoders(decoding.read_or_fail, SPEC, 2) as decoders:
        decoders.decode(instance(1))
        assert set(psutil.Process().children()) > before
    assert set(psutil.Process().children()) == before


def test_no_process_outlives_a_caller_that_was_killed(tmp_path: Path) -> None:
    """It was decoding at that moment, and another one was waiting for work."""
    script = f"""
import sys
sys.path[:] = {sys.path!r}
import decoding
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from node.keep.decode import Decoders
from test_cache import SPEC, instance
with Decoders(decoding.read_for_ever, SPEC, 2) as decoders, ThreadPoolExecutor(2) as pool:
    list(pool.map(decoders.decode, [replace(instance(n), path={str(tmp_path)!r}) for n in range(101)]))
"""
    caller = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 60
        while len(pids := [int(file.name) for file in tmp_path.iterdir()]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        caller.kill()
        caller.wait()
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
