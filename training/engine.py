"""How a step is computed on this machine: device, number format, memory layout.

In: the device, a network to try. Out: an `Engine`, which the run writes down and obeys when it goes on: the same engine gives the
same bits on the CPU. Nothing of a recipe is decided here; whether bf16 pays depends on processor and network, so it is tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Format = Literal["float32", "bfloat16"]
TRY_S = 1.0
"""For each of the two formats."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What computes a step, and how."""

    device: str = "cpu"
    format: Format = "float32"
    channels_last: bool = True

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in the chosen format inside; weights stay float32."""
        if self.format == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    def place(self, module: AnyModule) -> AnyModule:
        """Put a network where and as this engine wants it."""
        module = module.to(self.device)
        return module.to(memory_format=torch.channels_last) if self.channels_last else module

    def lay(self, images: Tensor) -> Tensor:
        """Put a batch of images (B, C, S, S) where and as this engine wants it."""
        images = images.to(self.device, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def chosen(device: str, build: Callable[[], nn.Module], size_px: int, *, batch: int = 16) -> Engine:
    """Time a training step of the network in both formats for about two seconds and give the quicker engine.

    On a GPU of compute capability 8 or more bf16 is taken without a trial, as it always pays there.
    """
    if torch.device(device).type == "cuda":
        return Engine(device, "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32")
    engines = [Engine(device, "float32"), Engine(device, "bfloat16")]
    with torch.random.fork_rng(devices=[]):
        return min(engines, key=lambda engine: _step_s(engine, engine.place(build()), size_px, batch))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that the batch is too large for the memory."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def fits(size: int, device: str) -> bool:
    """Say whether so many bytes of pictures may lie on the device for good: half of what is free, and never on the CPU."""
    if torch.device(device).type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return size <= free // 2


def _step_s(engine: Engine, network: nn.Module, size_px: int, batch: int) -> float:
    """Give the seconds of the fastest training step seen within `TRY_S`, two at least."""
    images = engine.lay(torch.zeros(batch, 1, size_px, size_px))
    network.train()
    began, taken = time.perf_counter(), list[float]()
    while len(taken) < 2 or time.perf_counter() - began < TRY_S:
        started = time.perf_counter()
        with engine.autocast():
            logits, _ = network(images)
        logits.float().square().mean().backward()
        network.zero_grad(set_to_none=True)
        taken.append(time.perf_counter() - started)
    return min(taken)
