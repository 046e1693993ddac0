"""Several processes compute what one would, or what one would that norms each half of a batch by itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import several
import torch
from torch import Tensor
from torch.nn import functional

from training import machine
from training.ranks import Ranks

METHODS = ("deepcluster", "deepcluster2")
TORCHRUN = machine.launcher(2)[:-3]  # all but `-m -- training`
HERE = {"PYTHONPATH": str(Path(several.__file__).parents[1])}
"""The processes take the code that these tests lie beside."""


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Let two processes take three steps by each method; give what each of the two saw."""
    folder = tmp_path_factory.mktemp("steps")
    command = [*TORCHRUN, several.__file__, "steps", str(folder), *METHODS]
    subprocess.run(command, check=True, timeout=240, env=os.environ | HERE)
    return {each: [torch.load(folder / f"{each}-2-{rank}.pt", weights_only=False) for rank in (0, 1)] for each in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_cluster_as_one(taken: dict[str, list[dict[str, Any]]], method: str) -> None:
    """Same weights, same assignment of every image; and both processes have it."""
    one = several.steps(method, Ranks())
    first, second = taken[method]
    assert all(torch.equal(one["start"][name], value) for name, value in first["start"].items())
    assert torch.equal(first["labels"], one["labels"])
    assert torch.equal(second["labels"], one["labels"])
    figures = ("empty", "relocated", "sizes", "inertia", "nmi")
    assert [first["line"][name] for name in figures] == [one["line"][name] for name in figures]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_step_as_one_that_norms_each_half_of_a_batch_by_itself(
    taken: dict[str, list[dict[str, Any]]], method: str
) -> None:
    halves = taken[method]
    before = torch.get_num_threads()
    torch.set_num_threads(several.THREADS // 2)
    try:
        expected, weights = reference(halves, method)
    finally:
        torch.set_num_threads(before)
    found = np.mean([half["losses"] for half in halves], axis=0)
    assert len(found) == 3
    assert np.abs(found - expected).max() < 1e-4, (found, expected)
    assert abs(halves[0]["line"]["loss"] - np.mean(expected)) < 1e-4
    for name, value in halves[0]["end"].items():
        assert torch.equal(value, halves[1]["end"][name]), f"{name}: the processes have come apart"
        if name in weights:
            assert torch.allclose(value, weights[name], atol=1e-4), name


def test_every_image_of_a_batch_is_seen_by_one_process(taken: dict[str, list[dict[str, Any]]]) -> None:
    first, second = taken["deepcluster2"]
    for mine, theirs in zip(first["positions"], second["positions"], strict=True):
        assert len(mine) == len(theirs) == several.BATCH // 2
        assert not set(mine) & set(theirs)
    everything = np.concatenate(first["positions"] + second["positions"])
    assert sorted(everything) == list(range(3 * several.BATCH))


def reference(halves: list[dict[str, Any]], method: str) -> tuple[list[float], dict[str, Tensor]]:
    """Take the same steps in one process, each half normed by its own statistics; give the losses and the weights at the end.

    In the layout and with the threads of the processes: what another convolution rounds otherwise grows to 1e-3 in three steps.
    """
    how = several.how(method)
    network = several.network(how.clusters if method == "deepcluster" else 2)
    if method == "deepcluster2":
        network.project(how.dims)
    network.load_state_dict(halves[0]["start"])
    network.to(memory_format=torch.channels_last).train()
    if method == "deepcluster":  # the head has no momentum
        optimisers = [
            torch.optim.SGD(network.backbone.parameters(), how.lr, momentum=how.momentum, weight_decay=how.weight_decay),
            torch.optim.SGD(network.head.parameters(), how.lr, weight_decay=how.weight_decay),
        ]
    else:
        optimisers = [torch.optim.SGD(network.parameters(), how.lr, momentum=how.momentum, weight_decay=how.weight_decay)]
    losses = []
    for step, count in enumerate([3] * 3):
        lr = how.lr * (warmed(step / count) if method == "deepcluster2" else 1.0)
        each = []
        for half in halves:
            views = half["views"][step]
            logits = torch.cat([network(one)[0] for one in views])
            labels = half["labels"][torch.from_numpy(half["positions"][step])].repeat(len(views))
            if method == "deepcluster2":
                logits = functional.normalize(logits) @ half["prototypes"].T / how.temperature
            each.append(functional.cross_entropy(logits, labels))
        loss = (each[0] + each[1]) / 2
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = lr
            optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimiser in optimisers:
            optimiser.step()
        losses.append(float(loss.detach()))
    return losses, {name: value.detach() for name, value in network.named_parameters()}


def warmed(done: float) -> float:
    """Give the share of the learning rate: linear for a tenth of the training, a half cosine after it."""
    return max(done / 0.1, 1e-3) if done < 0.1 else 0.5 * (1 + np.cos(np.pi * (done - 0.1) / 0.9))
