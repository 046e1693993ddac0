"""What tests of the pretraining share: small galleries, a part, states held against each other to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from labelled import texture
from torch import nn

from models.networks import Network
from training.engine import Engine
from training.pretrain import Gallery, Line, Part
from training.ranks import Ranks

SIZE_PX = 32
WIDTH = 32
CLOCKS = {"seconds", "clustering_s"}


def network(classes: int) -> Network:
    """Build a small network of random weights from torch's generator."""
    widths = (1, 8, 16, WIDTH)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return Network(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), WIDTH, classes, mean=0.449, spread=0.226)


def gallery(count: int = 60, *, seed: int = 0) -> Gallery:
    """Draw pictures of two textures; their rows lie in another order than the pictures."""
    rows = np.stack([(texture(one % 2, seed + one, SIZE_PX) >> 4).astype(np.uint8) for one in range(count)])
    return Gallery(rows[::-1].copy(), np.arange(count)[::-1].copy(), tuple(f"2.25.{seed}.{one}" for one in range(count)))


def part(*, batch: int = 16, **options: Any) -> Part:
    """Give one process on the CPU in float32."""
    return Part(Engine(), Ranks(), threads=1, seed=7, size_px=SIZE_PX, batch=batch, **options)


def timeless(lines: Sequence[Line]) -> list[Line]:
    """Give the lines of epochs without what a clock says in them."""
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def require_same(one: Any, other: Any, at: str = "state") -> None:
    """Hold two states against each other, all that is in them, to the bit; but what a clock says."""
    assert type(one) is type(other), at
    if isinstance(one, Mapping):
        names = one.keys() - CLOCKS
        assert names == other.keys() - CLOCKS, at
        for name in names:
            require_same(one[name], other[name], f"{at}/{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), at
        for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            require_same(mine, theirs, f"{at}/{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), at
    else:
        assert one == other, at
