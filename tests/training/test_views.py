"""Views for pretraining: functions of their draws, within what the recipe allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from training import views
from training.views import DRAWS, view

WHOLE = (1.0, 1.0)


def pictures(n: int = 4, size: int = 64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(n).integers(0, 256, (n, size, size), np.uint8))


def draws(n: int = 4, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random((n, DRAWS))


def seen(
    rows: Tensor,
    drawn: NDArray[np.float64],
    size_px: int = 32,
    *,
    scale: tuple[float, float] = (0.4, 1.0),
    flip: bool = False,
    brightness: float = 0.0,
    contrast: float = 0.0,
) -> Tensor:
    return view(rows, drawn, size_px, scale=scale, flip=flip, brightness=brightness, contrast=contrast)


def lying(kind: int, n: int = 200, size: int = 64) -> Tensor:
    """Give pictures that brighten from left to right (0) or from top to bottom (1) by 3 levels a pixel."""
    ramp = torch.arange(size, dtype=torch.uint8) * 3
    return (ramp.expand(size, size) if kind == 0 else ramp.unsqueeze(1).expand(size, size)).expand(n, size, size)


@pytest.mark.parametrize("size_px", [16, 32, 96])
def test_a_view_is_of_the_asked_size_grey_and_between_0_and_1(size_px: int) -> None:
    found = view(pictures(50), draws(50), size_px, scale=(0.1, 1.0), flip=True, brightness=0.5, contrast=0.9)
    assert found.shape == (50, 1, size_px, size_px)
    assert found.dtype == torch.float32
    assert 0 <= found.min() < 0.01
    assert 0.99 < found.max() <= 1


def test_the_same_draws_give_the_same_view_whoever_stands_beside_it() -> None:
    rows, drawn = pictures(6), draws(6)
    found = view(rows, drawn, 32, scale=(0.2, 1.0), flip=True, brightness=0.1, contrast=0.1)
    assert torch.equal(found, view(rows, drawn, 32, scale=(0.2, 1.0), flip=True, brightness=0.1, contrast=0.1))
    at = [4, 1]
    assert torch.equal(found[at], view(rows[at], drawn[at], 32, scale=(0.2, 1.0), flip=True, brightness=0.1, contrast=0.1))
    for one in range(DRAWS):
        other = drawn.copy()
        other[:, one] = (other[:, one] + 0.5) % 1
        assert not torch.equal(found, view(rows, other, 32, scale=(0.2, 1.0), flip=True, brightness=0.1, contrast=0.1)), one


def test_the_whole_picture_unchanged_is_what_serving_sees() -> None:
    rows = pictures(3, 32)
    assert torch.allclose(seen(rows, draws(3), scale=WHOLE), rows.unsqueeze(1) / 255, atol=1e-6)


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.15, 0.4)], ids=["large", "small"])
def test_a_view_shows_a_share_of_the_area_within_the_range(scale: tuple[float, float]) -> None:
    """On a ramp the step between two pixels of a view tells how wide the part is that it shows."""
    for kind in (0, 1):
        found = seen(lying(kind), draws(200), 32, scale=scale) * 255 / 3
        across = found[:, 0, 8] if kind == 0 else found[:, 0, :, 8]
        side = (across[:, 26] - across[:, 5]) / 21 * 32 / 64  # share of the side
        area = side.square()
        assert scale[0] - 0.06 < area.min() < scale[0] + 0.1
        assert scale[1] - 0.1 < area.max() < scale[1] + 0.06


def test_parts_lie_anywhere_in_the_picture_and_never_outside() -> None:
    """A ramp without a zero: what lies outside would be black."""
    for kind in (0, 1):
        rows = lying(kind) + 60
        found = seen(rows, draws(200), scale=(0.15, 0.4)) * 255
        assert found.min() >= 59
        middle = found.mean(dim=(1, 2, 3))
        assert middle.min() < 60 + 0.35 * 190
        assert middle.max() > 60 + 0.65 * 190


def test_nothing_is_mirrored_where_flips_are_off_and_half_of_the_views_where_they_are_on() -> None:
    """A radiograph whose side matters must not be turned."""
    rows, drawn = lying(0), draws(200)
    turned = [seen(rows, drawn, flip=flip)[:, 0, 16].diff(dim=1).mean(dim=1) < 0 for flip in (False, True)]
    assert not turned[0].any()
    assert torch.equal(turned[1], torch.from_numpy(drawn[:, 3] < 0.5))
    assert 70 < turned[1].sum() < 130
    upright = seen(lying(1), drawn, flip=True)[:, 0, :, 16].diff(dim=1).mean(dim=1)
    assert (upright > 0).all()  # never upside down


def test_a_mirrored_view_is_the_mirror_image_of_the_same_part() -> None:
    rows, drawn = pictures(8), draws(8)
    drawn[:, 3] = 0.2
    assert torch.equal(seen(rows, drawn, flip=True), seen(rows, drawn, flip=False).flip(-1))


def test_brightness_and_contrast_stay_within_what_is_allowed() -> None:
    grey = torch.full((100, 16, 16), 128, dtype=torch.uint8)
    found = seen(grey, draws(100), 16, brightness=0.08, contrast=0.15)[:, 0, 0, 0]
    low, high = 128 / 255 * 0.85 - 0.08, 128 / 255 * 1.15 + 0.08
    assert low <= found.min() < low + 0.06
    assert high - 0.06 < found.max() <= high
    plain = seen(grey, draws(100), 16)
    assert torch.allclose(plain, torch.tensor(128 / 255))


def test_a_part_that_is_smaller_than_its_view_is_enlarged_and_never_of_nothing() -> None:
    found = seen(pictures(20, 12), draws(20), 32, scale=(0.001, 0.01))
    assert found.shape == (20, 1, 32, 32)
    assert (found.flatten(1).std(dim=1) > 0).all()  # still a part of several pixels


def test_a_part_is_made_smaller_without_aliases() -> None:
    """A grating of single pixels is grey when seen from afar."""
    grating = ((torch.arange(128) % 2) * 255).to(torch.uint8).expand(2, 128, 128)
    found = seen(grating, draws(2), 32, scale=WHOLE)
    assert torch.allclose(found[..., 4:-4], torch.tensor(0.5), atol=0.03)
    expected = functional.interpolate(grating[:, None], size=(32, 32), mode="bilinear", antialias=True) / 255
    assert torch.allclose(found, expected, atol=1 / 255)


def test_a_gpu_shows_the_same_part_as_a_processor() -> None:
    """What a GPU computes in one go is tried on a processor here: on a ramp both see the same grey, to a pixel's width."""
    drawn = draws(60)
    side, mirrored = np.sqrt(0.3 + 0.7 * drawn[:, 0]), drawn[:, 3] < 0.5
    for kind in (0, 1):
        one, other = (part(lying(kind, 60), side, drawn, mirrored, 32).float() for part in (views._parts, views._grid))
        assert (one - other).abs().max() <= 3 * 1.5
