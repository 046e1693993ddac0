"""Views of a radiograph for pretraining: a random part of it, mirrored, brighter or darker.

In: uint8 rows and uniform draws, one row of draws an image. Out: float32 in 0…1 of the asked size. No randomness of its own: the
same draws give the same views. On the CPU each part is resized in uint8 (the vectorised path of torch); on a GPU the whole batch
is one `grid_sample`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

DRAWS = 6
"""Uniform numbers a view needs: share of the area, two positions, flip, brightness, contrast."""
SIDE_MIN = 8


def view(
    rows: Tensor,
    draws: NDArray[np.float64],
    size_px: int,
    *,
    scale: tuple[float, float],
    flip: bool,
    brightness: float,
    contrast: float,
) -> Tensor:
    """Give one view of each of `rows` (n, s, s) uint8 by its row of `draws` (n, 6) in 0…1: (n, 1, size_px, size_px) float32.

    The part is a square of a share of the area between the two of `scale`: radiographs are not stretched. The cache holds them
    padded to a square, and positions are even over it.
    """
    side = np.sqrt(scale[0] + draws[:, 0] * (scale[1] - scale[0]))
    mirrored = (draws[:, 3] < 0.5) & flip
    parts = _grid(rows, side, draws, mirrored, size_px) if rows.is_cuda else _parts(rows, side, draws, mirrored, size_px)
    around = torch.from_numpy(np.asarray(draws[:, 4:6] * 2 - 1, np.float32)).to(rows.device)
    gain = ((1 + around[:, 1] * contrast) / 255).view(-1, 1, 1, 1)
    offset = (around[:, 0] * brightness).view(-1, 1, 1, 1)
    return parts.float().mul_(gain).add_(offset).clamp_(0, 1)


def _parts(
    rows: Tensor, side: NDArray[np.float64], draws: NDArray[np.float64], mirrored: NDArray[np.bool_], size_px: int
) -> Tensor:
    whole = rows.shape[-1]
    edges = np.clip(np.rint(side * whole), min(SIDE_MIN, whole), whole).astype(int)
    tops, lefts = ((draws[:, axis] * (whole - edges + 1)).astype(int) for axis in (1, 2))

    out = torch.empty(len(rows), 1, size_px, size_px, dtype=torch.uint8)
    place = out.numpy()  # torch would share out the copying of one picture among threads of its own, for longer than it takes

    def cut(span: range) -> None:
        for row in span:
            top, left, edge = int(tops[row]), int(lefts[row]), int(edges[row])
            part = rows[row, top : top + edge, left : left + edge][None, None]
            if mirrored[row]:  # before it is resized: most parts grow by that, and the result is the same to the bit
                part = part.flip(-1)
            if edge != size_px:
                part = functional.interpolate(part, size=(size_px, size_px), mode="bilinear", antialias=True)
            place[row] = part[0].numpy()

    hands = min(torch.get_num_threads(), len(rows))
    if hands == 1:
        cut(range(len(rows)))
    else:
        list(_hands(hands).map(cut, [range(hand, len(rows), hands) for hand in range(hands)]))
    return out


@cache
def _hands(count: int) -> ThreadPoolExecutor:
    """Keep the threads that cut parts: torch resizes one picture in one thread, and the others would wait."""
    return ThreadPoolExecutor(count, thread_name_prefix="views")


def _grid(
    rows: Tensor, side: NDArray[np.float64], draws: NDArray[np.float64], mirrored: NDArray[np.bool_], size_px: int
) -> Tensor:
    theta = torch.zeros(len(rows), 2, 3)
    edges, place = torch.from_numpy(side).float(), torch.from_numpy(draws[:, 1:3] * 2 - 1).float()
    theta[:, 0, 0] = torch.where(torch.from_numpy(mirrored), -edges, edges)
    theta[:, 1, 1] = edges
    theta[:, 0, 2], theta[:, 1, 2] = place[:, 1] * (1 - edges), place[:, 0] * (1 - edges)
    grid = functional.affine_grid(theta.to(rows.device), [len(rows), 1, size_px, size_px], align_corners=False)
    return functional.grid_sample(rows.unsqueeze(1).float(), grid, mode="bilinear", align_corners=False)
