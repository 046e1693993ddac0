"""From features to clusters: the known defects of the public DeepCluster code are not here (docs/training.md)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from training import cluster
from training.cluster import NotFinite

K = 7


def blobs(
    sizes: list[int], *, dims: int = 6, seed: int = 0, apart: float = 20.0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Draw heaps of rows around middles far from each other; say which heap each row is of."""
    random = np.random.default_rng(seed)
    middles = random.normal(0, apart, (len(sizes), dims))
    of = np.repeat(np.arange(len(sizes)), sizes)
    return (middles[of] + random.normal(0, 0.1, (len(of), dims))).astype(np.float32), of


def unlike(seed: int = 0, n: int = 40, dims: int = 10) -> Tensor:
    """Draw features whose directions have different variances, off the origin."""
    random = np.random.default_rng(seed)
    return torch.from_numpy((random.normal(0, 1, (n, dims)) * np.linspace(5, 0.5, dims) + 3).astype(np.float32))


def named(count: int) -> list[str]:
    return [f"2.25.{number}" for number in range(count)]


# --- whitening ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "dims", "kept"), [(40, 4, 4), (40, 64, 10), (6, 8, 5)])
def test_whitening_is_what_a_singular_value_decomposition_says(n: int, dims: int, kept: int) -> None:
    features = unlike(n=n)
    found = cluster.whiten(features, dims).numpy()
    centred = features.numpy().astype(np.float64) - features.numpy().mean(axis=0, dtype=np.float64)
    left, _values, _ = np.linalg.svd(centred, full_matrices=False)  # columns of `left` are the whitened components
    expected = left[:, :kept] / np.linalg.norm(left[:, :kept], axis=1, keepdims=True)
    assert found.shape == (n, kept)
    signs = np.sign((found * expected).sum(axis=0))  # an eigenvector has none of its own
    assert np.allclose(found * signs, expected, atol=2e-3)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_a_row_of_zeros_poisons_neither_whitening_nor_clusters() -> None:
    """Its length is none, and to divide by it would give no number: the features of a black image, less their mean of zero."""
    half = unlike(n=20).round()  # whole numbers: their mean is zero to the bit, and so is the row
    features = torch.cat([half, torch.zeros(1, half.shape[1]), -half])
    rows = cluster.whiten(features, 4)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    assert not rows[20].any()
    assert torch.allclose(lengths[torch.arange(41) != 20], torch.ones(40))
    for spherical in (False, True):
        found = cluster.kmeans(rows.numpy(), 3, seed=1, spherical=spherical)
        assert np.isfinite(found.centroids).all()
        assert np.isfinite(found.inertia)
        assert found.sizes.sum() == 41


def test_whitening_of_features_that_are_all_the_same_is_finite() -> None:
    assert torch.isfinite(cluster.whiten(torch.full((9, 5), 0.3), 4)).all()


def test_noise_is_not_blown_up_to_the_size_of_a_component() -> None:
    """Where features have fewer dimensions than are asked for, the rest is rounding."""
    random = np.random.default_rng(0)
    flat = random.normal(size=(50, 2)) @ random.normal(size=(2, 8))
    noisy = torch.from_numpy((flat + random.normal(0, 1e-5, flat.shape)).astype(np.float32))
    rows = cluster.whiten(noisy, 8)
    assert rows[:, 2:].abs().max() < 0.1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_no_numbers_are_refused_by_the_names_of_their_images(wrong: float) -> None:
    features = unlike(n=9)
    cluster.require_finite(features, named(9))
    features[4, 2] = wrong
    with pytest.raises(NotFinite, match=r"of 1 images are not finite: 2\.25\.4$"):
        cluster.require_finite(features, named(9))
    features[:, 1] = wrong
    with pytest.raises(NotFinite, match=r"of 9 images .* 2\.25\.4 and 4 more$"):
        cluster.require_finite(features, named(9))


def test_the_spread_of_features_is_nothing_when_all_images_look_alike() -> None:
    assert cluster.spread(torch.full((5, 3), 2.0)) == pytest.approx(0, abs=1e-3)
    assert cluster.spread(torch.eye(50)) > 0.9
    assert cluster.spread(torch.zeros(5, 3)) <= 1


# --- k-means -------------------------------------------------------------------------------------------------------------------


def test_heaps_that_lie_apart_are_found_and_every_figure_is_of_the_labels() -> None:
    rows, of = blobs([30, 20])
    found = cluster.kmeans(rows, 2, seed=4)
    assert cluster.nmi(of, found.labels) == pytest.approx(1)
    assert sorted(found.sizes) == [20, 30]
    assert (found.relocated, found.empty) == (0, 0)
    for one in range(2):
        assert np.allclose(found.centroids[one], rows[found.labels == one].mean(axis=0), atol=1e-3)
    own = np.square(rows - found.centroids[found.labels]).sum(axis=1)
    assert np.allclose(found.distances, own, atol=1e-2)
    assert found.inertia == pytest.approx(own.sum(), rel=1e-2)


def test_the_same_seed_gives_the_same_clusters_and_another_one_others() -> None:
    rows = cluster.whiten(unlike(n=200), 6).numpy()
    first, again, other = (cluster.kmeans(rows, 12, seed=seed, iterations=3) for seed in (2**62 + 5, 2**62 + 5, 7))
    assert np.array_equal(first.labels, again.labels)
    assert np.array_equal(first.centroids, again.centroids)
    assert cluster.nmi(first.labels, other.labels) < 0.999


def test_the_number_of_threads_changes_no_cluster_and_is_put_back() -> None:
    import faiss

    rows = cluster.whiten(unlike(n=300), 6).numpy()
    before = faiss.omp_get_max_threads()
    one, two = (cluster.kmeans(rows, 9, seed=3, threads=threads) for threads in (1, 2))
    assert np.array_equal(one.labels, two.labels)
    assert faiss.omp_get_max_threads() == before


def test_spherical_clusters_have_centroids_of_unit_length() -> None:
    rows = cluster.whiten(unlike(n=90), 5).numpy()
    assert np.allclose(np.linalg.norm(cluster.kmeans(rows, 8, seed=1, spherical=True).centroids, axis=1), 1, atol=1e-5)
    repaired = cluster.kmeans(np.repeat(rows[:6], [40, 1, 1, 2, 2, 2], axis=0), 6, seed=1, spherical=True, smallest=2)
    assert np.allclose(np.linalg.norm(repaired.centroids, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(("k", "n"), [(6, 5), (1, 5), (0, 5)])
def test_more_clusters_than_images_or_fewer_than_two_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{k} clusters of {n} images"):
        cluster.kmeans(np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32), k, seed=0)


def test_as_many_clusters_as_images_are_no_reason_to_fail() -> None:
    found = cluster.kmeans(blobs([1] * 6)[0], 6, seed=0)
    assert found.sizes.sum() == 6


def test_tiny_clusters_are_dissolved_and_their_place_is_given_to_half_of_the_largest() -> None:
    """An image far from all others has a cluster of its own; two heaps share what is left."""
    rows, of = blobs([40, 20, 1], seed=3)
    found = cluster.kmeans(rows, 3, seed=1, smallest=2)
    sizes = np.bincount(found.labels, minlength=3)
    assert found.relocated == 1
    assert (found.empty, sizes.sum(), list(found.sizes)) == (0, 61, list(sizes))
    assert sizes.min() >= 10
    lone = found.labels[of == 2][0]
    assert sizes[lone] > 1
    for one in range(3):
        assert np.allclose(found.centroids[one], rows[found.labels == one].mean(axis=0), atol=1e-2)
    assert np.allclose(found.distances, np.square(rows - found.centroids[found.labels]).sum(axis=1), rtol=1e-3, atol=1e-2)
    kept = cluster.kmeans(rows, 3, seed=1, smallest=1)
    assert sorted(kept.sizes) == [1, 20, 40]


def test_an_empty_cluster_gets_half_of_the_largest() -> None:
    labels = np.repeat([0, 2], [30, 10])
    rows, _ = blobs([30, 10])
    assert cluster._repair(rows, labels, 3, 2) == 1
    assert list(np.bincount(labels)) == [15, 15, 10]


def test_clusters_stay_empty_where_nothing_is_left_to_split_and_are_counted() -> None:
    """Most pictures are the same one: no cluster of it has two halves."""
    rows = np.zeros((30, 4), np.float32)
    rows[0] = 1
    found = cluster.kmeans(rows, 5, seed=0, smallest=2)
    assert found.empty == (found.sizes == 0).sum() >= 3
    assert found.sizes.sum() == 30
    assert np.isfinite(found.centroids).all()


def test_clusters_are_sought_on_the_gpu_of_the_number_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorders stand for faiss built for two GPUs."""
    rows, _ = blobs([30, 20])
    asked: list[tuple[object, int]] = []
    on_gpu = cluster.faiss.IndexFlatL2(rows.shape[1])

    def moved(resources: object, number: int, index: object) -> object:
        asked.append((resources, number))
        return on_gpu

    monkeypatch.setattr(cluster.faiss, "get_num_gpus", lambda: 2, raising=False)
    monkeypatch.setattr(cluster.faiss, "StandardGpuResources", lambda: "resources", raising=False)
    monkeypatch.setattr(cluster.faiss, "index_cpu_to_gpu", moved, raising=False)
    on_cpu = cluster.kmeans(rows, 2, seed=4)
    cluster.kmeans(rows, 2, seed=4, gpu=2)  # there is none of this number
    assert (asked, on_gpu.ntotal) == ([], 0)
    found = cluster.kmeans(rows, 2, seed=4, gpu=1)
    assert asked == [("resources", 1)]
    assert on_gpu.ntotal == 2  # it holds the centroids: the search was there
    assert np.array_equal(found.labels, on_cpu.labels)


# --- draws ---------------------------------------------------------------------------------------------------------------------


def drawn(labels: NDArray[np.int64], count: int, ids: list[str], *, epoch: int = 1) -> list[tuple[str, int]]:
    positions, turns = cluster.draw_evenly(labels, count, seed=11, epoch=epoch, ids=ids)
    return [(ids[at], turn) for at, turn in zip(positions.tolist(), turns.tolist(), strict=True)]


@pytest.mark.parametrize("order", ["as drawn", "by cluster", "backwards"])
@pytest.mark.parametrize("missing", [(), (0, 3)])
def test_every_cluster_that_has_images_is_drawn_as_often_as_any_other_whatever_the_order(
    order: str, missing: tuple[int, ...]
) -> None:
    """The public code loses this when its data set is in the order of the clusters: 0 to 165 draws instead of 43."""
    random = np.random.default_rng(5)
    labels = random.choice([one for one in range(K) if one not in missing], size=200)
    labels[:120] = 1  # one large cluster
    ids = np.array(named(200))
    at = {"as drawn": np.arange(200), "by cluster": np.argsort(labels, kind="stable"), "backwards": np.arange(200)[::-1]}[order]
    labels, ids = labels[at], ids[at]
    cluster_of = dict(zip(ids.tolist(), labels.tolist(), strict=True))
    shown = drawn(labels, 200, ids.tolist())
    counts = Counter(cluster_of[one] for one, _ in shown)
    assert len(shown) == 200
    assert counts.keys() == set(labels.tolist())
    assert max(counts.values()) - min(counts.values()) <= 1


def test_what_is_drawn_hangs_on_the_image_and_not_on_its_place() -> None:
    labels = np.random.default_rng(1).integers(0, K, 90)
    ids = np.array(named(90))
    mixed = np.random.default_rng(2).permutation(90)
    assert Counter(drawn(labels, 90, ids.tolist())) == Counter(drawn(labels[mixed], 90, ids[mixed].tolist()))


def test_a_second_draw_of_an_image_in_an_epoch_is_another_turn() -> None:
    labels = np.repeat([0, 1], [3, 37])
    shown = drawn(labels, 40, named(40))
    assert len(set(shown)) == 40  # no image twice in the same turn
    of_small = Counter(one for one, _ in shown if one in named(3))
    assert sum(of_small.values()) == 20
    assert max(of_small.values()) - min(of_small.values()) <= 1
    assert {turn for one, turn in shown if one in named(3)} == set(range(7))
    assert {turn for one, turn in shown if one not in named(3)} == {0}


def test_draws_are_mixed_repeatable_and_new_in_each_epoch() -> None:
    labels = np.repeat(np.arange(4), 25)
    shown = drawn(labels, 100, named(100))
    assert shown == drawn(labels, 100, named(100))
    assert shown != drawn(labels, 100, named(100), epoch=2)
    cluster_of = dict(zip(named(100), labels.tolist(), strict=True))
    first = Counter(cluster_of[one] for one, _ in shown[:20])
    assert len(first) == 4  # not cluster by cluster


def test_the_surplus_of_a_draw_falls_on_another_cluster_each_epoch() -> None:
    labels = np.repeat(np.arange(3), 10)
    favoured = set()
    for epoch in range(20):
        counts = Counter(int(labels[named(30).index(one)]) for one, _ in drawn(labels, 31, named(30), epoch=epoch))
        favoured.add(max(counts, key=lambda one: counts[one]))
    assert favoured == {0, 1, 2}


# --- agreement -----------------------------------------------------------------------------------------------------------------


def test_agreement_of_two_assignments_does_not_hang_on_their_numbers() -> None:
    one = np.random.default_rng(0).integers(0, 5, 300)
    other = np.random.default_rng(1).integers(0, 5, 300)
    assert cluster.nmi(one, (one + 3) % 5) == pytest.approx(1)
    assert cluster.nmi(one, other) < 0.05
    mixed = np.where(np.arange(300) < 150, one, other)
    assert cluster.nmi(one, mixed) == pytest.approx(normalized_mutual_info_score(one, mixed))
    assert 0.1 < cluster.nmi(one, mixed) < 0.6


def test_images_with_one_and_the_same_features_are_counted() -> None:
    rows = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    assert cluster.alike(rows) == pytest.approx(1 / 200)
    rows[:80] = rows[0]
    assert cluster.alike(rows) == pytest.approx(80 / 200)
