"""A run in two processes: ends as one, is killed and goes on, is stopped, runs out of memory; no process is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import several
import torch
from labelled import labelled_site

from models.registry import Registry
from training import machine

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
TORCHRUN = machine.launcher(2)[:-3]  # all but `-m -- training`
HERE = {"PYTHONPATH": str(Path(several.__file__).parents[1])}
CLOCK = {"seconds", "clustering_s"}


class Site:
    """A copy of a site, and the run in it."""

    def __init__(self, made: Path, folder: Path, recipe: str = "tiny") -> None:
        shutil.copytree(made, folder / "site")
        self.folder, self.config = folder, folder / "site" / "ae_config.toml"
        self.data, self._recipe = folder / "site" / "data", recipe

    def started(self, processes: int, *words: str, fault: str = "none", kind: str = "pretrain") -> subprocess.Popen[str]:
        """Start a new run, or go on with the one there is."""
        (self.folder / "fault").write_text(fault)
        for old in self.folder.glob("epochs-*"):
            old.unlink()
        orders = () if "--run" in words else ("--recipe", self._recipe, "--orders", json.dumps({"kind": kind}))
        trainer = (several.__file__, "train", str(self.folder), "--config", str(self.config), *orders, *words)
        command = [*TORCHRUN, "--", *trainer] if processes > 1 else [sys.executable, *trainer]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | HERE)

    def ran(self, processes: int, *words: str, fault: str = "none", kind: str = "pretrain") -> tuple[int, str]:
        """Run to the end; give exit code and what was said."""
        process = self.started(processes, *words, fault=fault, kind=kind)
        said, _ = process.communicate(timeout=400)
        return process.returncode, said

    @property
    def run(self) -> Path:
        """The folder of the one run."""
        (found,) = (each for each in (self.data / "runs").iterdir() if (each / "run.json").exists())
        return found

    def epochs(self, rank: int = 0) -> list[int]:
        """Number the epochs that a process began since the last start, those of the classifier after those of DeepCluster."""
        file = self.folder / f"epochs-{rank}"
        return [int(line.split()[0]) for line in file.read_text().splitlines()] if file.exists() else []

    def batches(self) -> set[int]:
        """Give the batches of DeepCluster and classifier since the last start."""
        return {int(line.split()[1]) for line in (self.folder / "epochs-0").read_text().splitlines()}

    def left_behind(self) -> list[int]:
        """Give the ranks whose process still lives."""
        return [rank for rank in (0, 1) if Path(f"/proc/{(self.folder / f'pid-{rank}').read_text()}").exists()]

    def learned(self) -> dict[str, Any]:
        """Give all bits of what a pretraining left, without what the clock wrote."""
        place = self.run / "pretrain"
        left: dict[str, Any] = {}
        for name in ("state", "classifier"):
            state = torch.load(place / f"{name}.pt", weights_only=True)
            state["lines"] = [{key: value for key, value in line.items() if key not in CLOCK} for line in state["lines"]]
            left |= dict(flat(state, name))
        with np.load(place / "clusters.npz") as clusters:
            left |= {f"clusters/{name}": clusters[name].tobytes() for name in clusters}
        left["backbone"] = json.loads((place / "probe.json").read_text())["sha256"]
        return left


def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Name every number and tensor of a state."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}/{key}")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from flat(inner, f"{name}/{place}")
    elif isinstance(value, torch.Tensor):
        yield name, value.numpy().tobytes()
    else:
        yield name, value


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a site."""
    folder = tmp_path_factory.mktemp("made") / "site"
    labelled_site(folder, patients=30, is_locked=lambda patient: patient % 5 == 4, training={"device": "cpu"})
    return folder


@pytest.fixture(scope="module")
def undisturbed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Give a pretraining of two processes that nobody disturbed."""
    site = Site(made, tmp_path_factory.mktemp("undisturbed"))
    code, said = site.ran(2)
    assert code == 0, said
    assert site.epochs() == site.epochs(1) == [1, 2, 3, 4, 1, 2, 3]
    assert site.left_behind() == []
    return site


def require_same(site: Site, undisturbed: Site) -> None:
    found, expected = site.learned(), undisturbed.learned()
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if found[name] != value]


def test_a_whole_run_in_two_processes_leaves_what_one_process_leaves(made: Path, tmp_path: Path) -> None:
    sites = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        site = Site(made, folder)
        code, said = site.ran(processes, kind="cycle")
        assert code == 0, said
        assert "gate     " in said
        assert len(Registry(site.data / "models").versions()) == 1
        assert json.loads((site.run / "run.json").read_text())["processes"] == processes
        sites.append(site)
    files = [{str(each.relative_to(site.run)) for each in site.run.rglob("*")} for site in sites]
    assert files[0] == files[1]
    assert sites[1].left_behind() == []


def kill_and_go_on(site: Site, rank: int) -> None:
    """Let one process be killed in the third epoch, and go on to the end."""
    began = time.monotonic()
    code, said = site.ran(2, fault=f"killed {rank} 3")
    assert code != 0, said
    assert site.left_behind() == [], f"after {time.monotonic() - began:.0f} s"
    assert site.epochs(rank) == [1, 2, 3]
    code, said = site.ran(2, "--run", site.run.name)
    assert code == 0, said
    assert site.epochs() == [3, 4, 1, 2, 3], "it goes on from the state of the second epoch"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_whose_one_process_is_killed_goes_on_to_the_bits_of_one_that_was_not(
    made: Path, undisturbed: Site, tmp_path: Path, rank: int
) -> None:
    site = Site(made, tmp_path)
    kill_and_go_on(site, rank)
    require_same(site, undisturbed)


def test_a_run_of_deepcluster2_whose_one_process_is_killed_goes_on_to_the_same_bits(made: Path, tmp_path: Path) -> None:
    """The bank of embeddings, of which each process fills a part, is in the state."""
    undisturbed, site = (Site(made, tmp_path / name, "banked") for name in ("undisturbed", "killed"))
    code, said = undisturbed.ran(2)
    assert code == 0, said
    kill_and_go_on(site, 0)
    require_same(site, undisturbed)
    assert {"state/bank", "clusters/centroids"} < undisturbed.learned().keys()


@pytest.mark.parametrize("told", ["first process", "torchrun"])
def test_a_run_that_is_told_to_stop_ends_its_epoch_and_leaves_no_process(
    made: Path, undisturbed: Site, tmp_path: Path, told: str
) -> None:
    """The supervisor tells the first process; systemd and Slurm tell torchrun, which tells all and kills after 30 s."""
    site = Site(made, tmp_path)
    process = site.started(2, fault="slow")
    until = time.monotonic() + 300
    while len(site.epochs()) < 2:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid-0").read_text()) if told == "first process" else process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert site.left_behind() == []
    state = torch.load(site.run / "pretrain" / "state.pt", weights_only=True)
    assert state["epoch"] <= len(site.epochs()) < 4, said
    if told == "first process":
        assert "told to stop" in said
        assert state["epoch"] == len(site.epochs()), "the epoch under way was finished, and no other one begun"
    code, said = site.ran(2, "--run", site.run.name)
    assert code == 0, said
    require_same(site, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_where_the_memory_of_one_process_is_too_small_all_end_and_go_on_with_half_the_batch(
    made: Path, tmp_path: Path, rank: int
) -> None:
    site = Site(made, tmp_path)
    code, said = site.ran(2, fault=f"memory {rank} 2")
    assert code != 0, said
    assert site.left_behind() == []
    noted = json.loads((site.run / "pretrain" / "batch-state.json").read_text())
    assert noted["batch"] == several.BATCH // 2
    code, said = site.ran(2, "--run", site.run.name)
    assert code == 0, said
    assert site.epochs() == [2, 3, 4, 1, 2, 3]
    assert site.batches() == {several.BATCH // 2, several.BATCH}, "DeepCluster with half of it, the classifier as the recipe says"


def test_another_number_of_processes_is_refused_until_a_person_says_so_and_then_told(made: Path, tmp_path: Path) -> None:
    site = Site(made, tmp_path)
    site.ran(2, fault="killed 1 3")
    code, said = site.ran(1, "--run", site.run.name)
    assert code == 2, said
    assert "2 processes (now 1; --other-processes" in said
    assert json.loads((site.run / "run.json").read_text())["processes"] == 2
    code, said = site.ran(1, "--run", site.run.name, "--orders", '{"other_processes": true}', fault="killed 0 4")
    assert code == -signal.SIGKILL, said
    bound = json.loads((site.run / "run.json").read_text())
    assert (bound["processes"], [(each["was"], each["became"]) for each in bound["other_processes"]]) == (1, [(2, 1)])
    code, said = site.ran(1, "--run", site.run.name)  # what was said once holds
    assert code == 0, said
    assert "Begun with 2 processes, gone on with 1" in json.loads((site.run / "pretrain" / "probe.json").read_text())["words"]
