"""The processes of one run: who computes which part, and how results meet.

In: what torchrun tells a process. Out: `Ranks`; with one process everything here does nothing. Rank 0 alone knows catalogue, run
folder and people; the others wait for work (`told`), do it with rank 0, and wait again. All ranks must call the same methods in
the same order. No process may outlive the others: one that finds another gone ends, and torchrun ends who cannot see it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from models.errors import Retriable

PATIENCE = timedelta(days=30)
"""The others wait for work while rank 0 decodes or fine-tunes: that is no fault."""
STEP = timedelta(hours=1)
"""Within a piece of work nobody waits for longer: on a GPU the clock alone tells that another process is gone."""


class Gone(Retriable):
    """Another process of this run has ended; what it said stands above. The run goes on from its last state."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process among those of its run."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Number of the process on its machine: its GPU."""
    here: int = 1
    """Processes of the run on this machine, which share its cores."""
    patient: Any = field(default=None, compare=False, repr=False)
    """The group over which the others wait for work."""

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def mine(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give this process its even part of a batch; the batch is a multiple of `size`."""
        return np.split(positions, self.size)[self.rank]

    def told(self, value: Any) -> Any:
        """Give every process what rank 0 has, however long that takes.

        Raises
        ------
        Gone
            As from everything below: a process has ended.
        """
        if self.size == 1:
            return value
        box = [value]
        with met():
            distributed.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def follow(self) -> None:
        """Wait for rank 0, over the processor, where its end is seen at once."""
        self.told(None)

    def mean(self, value: float) -> float:
        """Give the mean of a number over the processes, the same bits to each."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        with met():
            distributed.all_reduce(total)
        return float(total[0]) / self.size

    def together(self, parts: Tensor) -> list[Tensor]:
        """Give rank 0 the parts (each of the same shape) of all processes in their order, on the CPU; the others nothing."""
        if self.size == 1:
            return [parts]
        parts = parts.contiguous().cpu()
        gathered = [torch.empty_like(parts) for _ in range(self.size)] if self.first else None
        with met():
            distributed.gather(parts, gathered, dst=0)
        return gathered or []

    def same(self, value: Tensor) -> Tensor:
        """Give every process rank 0's tensor; shape and type are those of `value` everywhere."""
        if self.size > 1:
            with met():
                distributed.broadcast(value, src=0)
        return value


@contextmanager
def met() -> Iterator[None]:
    """Say `Gone` where processes were to meet and one did not come."""
    try:
        yield
    except RuntimeError as error:
        told = str(error)
        if isinstance(error, distributed.DistError) or "gloo" in told:  # gloo has no error of its own: it names its source file
            raise Gone(f"another process of this run has ended ({told.splitlines()[0][:160]})") from error
        raise


def world() -> int:
    """Say how many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes of the run; without torchrun, or with one process, there are none."""
    if world() == 1:
        yield Ranks()
        return
    local, here = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    if here == world() and sys.platform == "linux":
        # the machine's own name may be known to nobody, or stand for an address that a unit may not speak to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local)  # what names no GPU by number is on this one, not all of it on the first
    # numbers of the cluster phase travel over gloo, gradients on a GPU over nccl
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=STEP)
    in_order = False
    try:
        patient = distributed.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), local, here, patient)
        in_order = True
    finally:
        if in_order or not on_gpu:  # nccl waits for everybody when it is put away, and they may be in the middle of a step
            distributed.destroy_process_group()
