"""Whitening: what clusters are looked for in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training import cluster


def features(count: int, width: int, *, dead: int = 0) -> Tensor:
    """Draw features as a network gives them: none negative, some that no image has."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(count)).relu()
    drawn[:, width - dead :] = 0
    return drawn


def decomposed(rows: Tensor, dims: int) -> Tensor:
    """Whiten by the singular values of the features themselves, in double precision."""
    rows = rows.double() - rows.double().mean(dim=0)
    left, _, _ = torch.linalg.svd(rows, full_matrices=False)
    kept = left[:, :dims] * len(rows) ** 0.5
    return kept / kept.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("count", "width"), [(200, 24), (24, 200)])
def test_whitened_rows_lie_to_each_other_as_a_decomposition_of_the_features_says(count: int, width: int) -> None:
    found, expected = cluster.whiten(features(count, width), 8).double(), decomposed(features(count, width), 8)
    assert found.shape == (count, 8)
    assert torch.allclose(found @ found.T, expected @ expected.T, atol=1e-4)


@pytest.mark.parametrize(("count", "width"), [(32, 1280), (1500, 1280)])
def test_features_that_no_image_has_do_not_end_a_run(count: int, width: int) -> None:
    """EfficientNet's 1280 features with a few images, or with many features that are always zero."""
    for seed in range(2):
        rows = features(count + seed, width, dead=900)
        whitened = cluster.whiten(rows, 64)
        assert torch.isfinite(whitened).all()
        assert torch.allclose(whitened.norm(dim=1), torch.ones(len(rows)), atol=1e-4)


def test_what_torch_cannot_decompose_is_whitened_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = cluster.whiten(features(100, 20), 8)

    def gives_up(_matrix: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    found = cluster.whiten(features(100, 20), 8)
    assert torch.allclose(found @ found.T, expected @ expected.T, atol=1e-4)
