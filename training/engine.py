"""How a step is computed on this machine: device, number format, memory layout.

In: the device, a network to try. Out: an `Engine`, which the run writes down and obeys when it goes on: the same engine gives the
same bits on the CPU. Nothing of a recipe is decided here; whether bf16 and channels_last pay depends on processor and network, so
they are tried. Matrix products outside autocast keep all their bits (torch's default): TF32 would blur the whitening.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from models.errors import Final

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Format = Literal["float32", "bfloat16"]
TRY_S = 0.5
"""For each of the four engines."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What computes a step, and how."""

    device: str = "cpu"
    format: Format = "float32"
    channels_last: bool = True

    @property
    def gpu(self) -> int | None:
        """Number of the GPU; None on a processor."""
        device = torch.device(self.device)
        return (device.index or 0) if device.type == "cuda" else None

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in the chosen format inside; weights stay float32."""
        if self.format == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    def place(self, module: AnyModule) -> AnyModule:
        """Put a network where and as this engine wants it."""
        if self.gpu is not None:
            torch.backends.cudnn.benchmark = True  # batches have one size: the quickest kernels are looked for once
        module = module.to(self.device)
        return module.to(memory_format=torch.channels_last) if self.channels_last else module

    def bring(self, rows: Tensor) -> Tensor:
        """Put uint8 rows (n, S, S) where views are made of them: a quarter of the bytes that the views would be."""
        if self.gpu is None or rows.is_cuda:
            return rows
        return rows.pin_memory().to(self.device, non_blocking=True)

    def lay(self, images: Tensor) -> Tensor:
        """Put a batch of images (B, C, S, S) where and as this engine wants it."""
        images = images.to(self.device, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def chosen(device: str, build: Callable[[], nn.Module], size_px: int, *, batch: int = 16) -> Engine:
    """Time a training step of the network in both formats and layouts for about two seconds and give the quickest engine."""
    formats: list[Format] = ["float32", "bfloat16"]
    if torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        formats = ["float32"]
    engines = [Engine(device, each, channels_last=last) for each in formats for last in (True, False)]
    with torch.random.fork_rng(devices=[]):
        return min(engines, key=lambda engine: _step_s(engine, engine.place(build()), size_px, batch))


class Diverged(Final):
    """The loss is not finite: a smaller learning rate is needed."""


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
    """Give the seconds of the fastest training step seen within `TRY_S`, two at least after the one that sets up."""
    images = engine.lay(torch.zeros(batch, 1, size_px, size_px))
    network.train()
    began, taken = time.perf_counter(), list[float]()
    while len(taken) < 3 or time.perf_counter() - began < TRY_S:
        started = time.perf_counter()
        with engine.autocast():
            logits, _ = network(images)
        logits.float().square().mean().backward()
        network.zero_grad(set_to_none=True)
        if engine.gpu is not None:
            torch.cuda.synchronize(engine.gpu)  # a step is over when the GPU is done, not when it has been told
        taken.append(time.perf_counter() - started)
    return min(taken[1:])
