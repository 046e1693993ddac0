"""The processes of one run: who computes which part, and how results meet.

In: what torchrun tells a process. Out: `Ranks`; with one process everything here does nothing. Rank 0 alone knows catalogue, run
folder and people; the others wait for work (`orders`), do it with rank 0, and wait again. All ranks must call the same methods in
the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

PATIENCE = timedelta(days=30)
"""The others wait while rank 0 decodes, clusters or fine-tunes: that is no fault, and a dead rank is torchrun's to see."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process among those of its run."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Number of the process on its machine: its GPU."""

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def mine(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give this process its even part of a batch; the batch is a multiple of `size`."""
        return np.split(positions, self.size)[self.rank]

    def told(self, value: Any) -> Any:
        """Give every process what rank 0 has."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, value: float) -> float:
        """Give the mean of a number over the processes, the same bits to each."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        distributed.all_reduce(total)
        return float(total[0]) / self.size

    def together(self, parts: Tensor) -> list[Tensor]:
        """Give rank 0 the parts (each of the same shape) of all processes in their order; the others nothing."""
        if self.size == 1:
            return [parts]
        parts = parts.contiguous().cpu()
        gathered = [torch.empty_like(parts) for _ in range(self.size)] if self.first else None
        distributed.gather(parts, gathered, dst=0)
        return gathered or []

    def same(self, value: Tensor) -> Tensor:
        """Give every process rank 0's tensor; shape and type are those of `value` everywhere."""
        if self.size > 1:
            distributed.broadcast(value, src=0)
        return value


def world() -> int:
    """Say how many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes of the run; without torchrun, or with one process, there are none."""
    if world() == 1:
        yield Ranks()
        return
    # numbers of the cluster phase travel over gloo, gradients on a GPU over nccl
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        distributed.destroy_process_group()
