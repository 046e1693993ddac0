"""Mild changes to a batch of radiographs, as a positioning on another day would make.

In: uint8 rows of the cache and uniform draws, one row of draws an image. Out: float32 in 0…1. Flips, shifts, rotations and
brightness in one `grid_sample`; no randomness of its own, so the same draws give the same batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from training.recipe import Augmentation

DRAWS = 6
"""Uniform numbers an image needs: flip, two shifts, rotation, brightness, contrast."""


def plain(rows: Tensor) -> Tensor:
    """Turn uint8 rows (n, s, s) into what the network eats: (n, 1, s, s) float32 in 0…1."""
    return rows.unsqueeze(1).float().div_(255)


def augment(rows: Tensor, draws: NDArray[np.float64], spec: Augmentation) -> Tensor:
    """Change each image of `rows` (n, s, s) uint8 by its row of `draws` (n, 6) in 0…1; give (n, 1, s, s) float32 in 0…1.

    What a shift or a rotation uncovers is black, as the padding of `models.preprocess` is.
    """
    drawn = torch.from_numpy(np.asarray(draws, np.float32)).to(rows.device)
    around = drawn * 2 - 1
    flip = torch.where((drawn[:, 0] < 0.5) & spec.flip, -1.0, 1.0)
    angle = around[:, 3] * math.radians(spec.rotate_deg)
    theta = torch.zeros(len(rows), 2, 3, device=rows.device)
    theta[:, 0, 0] = angle.cos() * flip
    theta[:, 0, 1] = -angle.sin()
    theta[:, 1, 0] = angle.sin() * flip
    theta[:, 1, 1] = angle.cos()
    theta[:, :, 2] = around[:, 1:3] * 2 * spec.shift  # the grid is 2 wide
    images = plain(rows)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    gain = 1 + around[:, 5, None, None, None] * spec.contrast
    offset = around[:, 4, None, None, None] * spec.brightness
    return (moved * gain + offset * (moved > 0)).clamp_(0, 1)
