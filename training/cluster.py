"""Features to clusters: whiten, assign, repair, draw evenly.

In: features of a set of images, seeds. Out: a cluster number for each image, and in which order images are shown. Functions on
arrays: no disk, no clock, no global state but the library's own threads. The same features and seed give the same numbers.

Caron et al., Deep Clustering for Unsupervised Learning of Visual Features, ECCV 2018 [0]; Caron et al., Unsupervised Learning of
Visual Features by Contrasting Cluster Assignments, NeurIPS 2020 [1], appendix on DeepCluster-v2.

Shapes: N images, D features, K clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.errors import Final
from training.recipe import seed_for, uniforms

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
TINY = 1e-12
EIGENVALUE_MIN = 1e-6
"""Of the largest one: directions with less variance are noise, and are not blown up to the variance of the others."""


class NotFinite(Final):
    """A network gives features that are no numbers."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which cluster each image is in."""

    labels: Labels
    """(N,) in 0…K-1."""
    centroids: Floats
    """(K, D); of unit length when the clustering is spherical."""
    distances: Floats
    """(N,) squared distance to the own centroid."""
    inertia: float
    """Sum of the distances as k-means left them, before any repair."""
    relocated: int
    """Empty or tiny clusters that were given half of the largest one."""
    empty: int
    """Clusters that stayed empty, because nothing was left to split."""

    @property
    def sizes(self) -> Labels:
        """(K,) images of each cluster."""
        return np.bincount(self.labels, minlength=len(self.centroids))


def require_finite(features: Tensor, ids: Sequence[str]) -> None:
    """Refuse features (N, D) that are no numbers: one of them would poison every centroid.

    Raises
    ------
    NotFinite
        The message names the images, at most five of them.
    """
    bad = (~torch.isfinite(features).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        named = ", ".join(ids[row] for row in bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise NotFinite(f"the features of {len(bad)} images are not finite: {named}")


def spread(features: Tensor) -> float:
    """Say how much features (N, D) differ from image to image: 0 when all are the same, about 1 when they share no direction."""
    rows = _unit(features.float())
    return float((1 - rows.mean(dim=0).square().sum()).clamp_(min=0).sqrt())


def alike(rows: Floats) -> float:
    """Give the share of the largest group of rows (N, D) that are the same to five decimals, by their projection on one line."""
    line = np.random.default_rng(rows.shape[1]).standard_normal(rows.shape[1])
    _, counts = np.unique(np.round(rows @ line, 5), return_counts=True)
    return float(counts.max() / len(rows))


def whiten(features: Tensor, dims: int) -> Tensor:
    """Project features (N, D) on their first principal components, each of unit variance, then scale each row to length 1 [0].

    Gives (N, min(dims, D, N - 1)) float32. By the smaller of covariance and inner products, and its eigenvectors: several times
    as fast as a decomposition of the features themselves. A row of zeros stays one.
    """
    rows = features.float()
    rows = rows - rows.mean(dim=0)  # (N, D)
    count, width = rows.shape
    kept = max(1, min(dims, width, count - 1))
    if count > width:
        values, vectors = _eigenvectors(rows.T @ rows / count)  # (D), (D, D)
        along = rows @ vectors[:, -kept:]
    else:
        values, vectors = _eigenvectors(rows @ rows.T / count)  # (N), (N, N)
        along = vectors[:, -kept:] * (values[-kept:].clamp(min=0) * count).sqrt()
    values = values[-kept:]
    values = values.clamp(min=float(values[-1]) * EIGENVALUE_MIN + TINY)
    return _unit((along * values.rsqrt()).flip(1))  # (N, kept), the largest component first


def kmeans(
    rows: Floats,
    k: int,
    *,
    seed: int,
    iterations: int = 20,
    spherical: bool = False,
    smallest: int = 2,
    threads: int = 0,
    gpu: int | None = None,
) -> Assignment:
    """Put rows (N, D) into `k` clusters by faiss, and repair what it leaves empty or smaller than `smallest`.

    `spherical`: rows are of length 1, and so are the centroids, as DeepCluster-v2 needs them [1].
    `threads`: those of faiss, 0 as it is. `gpu`: where it works, when faiss was built for GPUs; None is the CPU.

    Raises
    ------
    ValueError
        There are fewer rows than clusters.
    """
    if not 1 < k <= len(rows):
        raise ValueError(f"{k} clusters of {len(rows)} images: k must lie between 2 and the number of images")
    rows = np.ascontiguousarray(rows, np.float32)
    parameters = faiss.ClusteringParameters()
    parameters.niter, parameters.seed, parameters.spherical = iterations, seed % (2**31 - 1), spherical
    parameters.min_points_per_centroid, parameters.max_points_per_centroid = 1, len(rows)  # neither complain nor leave rows out
    clustering = faiss.Clustering(rows.shape[1], k, parameters)
    index = _index(rows.shape[1], gpu)
    before = faiss.omp_get_max_threads()
    try:
        if threads:
            faiss.omp_set_num_threads(threads)
        clustering.train(rows, index)
        centroids = faiss.vector_to_array(clustering.centroids).reshape(k, -1).copy()
        distances, nearest = index.search(rows, 1)
    finally:
        faiss.omp_set_num_threads(before)
    labels, inertia = nearest[:, 0].astype(np.int64), float(distances.sum())
    relocated = _repair(rows, labels, k, smallest)
    if relocated:
        centroids = _means(rows, labels, centroids, spherical=spherical)
        distances = np.square(rows - centroids[labels]).sum(axis=1, dtype=np.float32)[:, None]
    empty = int((np.bincount(labels, minlength=k) == 0).sum())
    return Assignment(labels, centroids, distances[:, 0], inertia, relocated, empty)


def draw_evenly(labels: Labels, count: int, *, seed: int, epoch: int, ids: Sequence[str]) -> tuple[Labels, Labels]:
    """Draw `count` images so that every non-empty cluster is drawn equally often, at most one more than another [0].

    Gives positions (count,) in 0…N-1, in the order of `labels` and `ids` and of nothing else, and how often each was drawn before
    (count,): an image of a small cluster comes several times, and is to look different each time.
    """
    rank = uniforms(seed, "draw", epoch, ids)[:, 0]
    order = np.lexsort((rank, labels))  # by cluster, and within one by chance
    found, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    each = np.full(len(found), count // len(found))
    generator = np.random.default_rng(seed_for(seed, "draw", epoch))
    each[generator.permutation(len(found))[: count % len(found)]] += 1
    turns = np.arange(count) - np.repeat(np.cumsum(each) - each, each)  # 0, 1, … within each cluster
    sizes, starts = np.repeat(sizes, each), np.repeat(starts, each)
    mixed = generator.permutation(count)
    return order[starts + turns % sizes][mixed], (turns // sizes)[mixed]


def nmi(one: Labels, other: Labels) -> float:
    """Give the normalised mutual information of two assignments: 1 for the same clusters under whatever numbers."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(one, other))


def _unit(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / length.clamp(min=TINY)


def _eigenvectors(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Give the eigenvalues, ascending, and the eigenvectors of a symmetric matrix.

    Features that no image has leave many eigenvalues at zero, and torch's algorithm (MKL's) may give up over them; numpy's does
    not.
    """
    try:
        values, vectors = torch.linalg.eigh(covariance)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not list it
        plain = np.linalg.eigh(covariance.double().cpu().numpy())
        values, vectors = (torch.from_numpy(each).float().to(covariance.device) for each in plain)
    return values, vectors


def _index(dims: int, gpu: int | None) -> faiss.Index:
    """Give an exact index, on the GPU of this number where faiss was built for one."""
    index: faiss.Index = faiss.IndexFlatL2(dims)
    if gpu is not None and getattr(faiss, "get_num_gpus", lambda: 0)() > gpu:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, index)
    return index


def _repair(rows: Floats, labels: Labels, k: int, smallest: int) -> int:
    """Dissolve tiny clusters, then give each empty one the outer half of the largest; change `labels` and count the moves."""
    sizes = np.bincount(labels, minlength=k)
    tiny = np.flatnonzero((sizes > 0) & (sizes < smallest))
    if len(tiny) and len(tiny) + (sizes == 0).sum() < k:
        kept = np.flatnonzero(sizes >= smallest)
        means = np.stack([rows[labels == one].mean(axis=0) for one in kept])
        for one in tiny:
            for row in np.flatnonzero(labels == one):
                labels[row] = kept[np.square(means - rows[row]).sum(axis=1).argmin()]
    moved = 0
    sizes = np.bincount(labels, minlength=k)
    for one in np.flatnonzero(sizes == 0):
        largest = int(sizes.argmax())
        members = np.flatnonzero(labels == largest)
        if len(members) < 2 * smallest or not (apart := _outer_half(rows[members])).any():
            break
        labels[members[apart]] = one
        sizes[one], sizes[largest] = apart.sum(), len(members) - apart.sum()
        moved += 1
    return moved


def _outer_half(rows: Floats) -> NDArray[np.bool_]:
    """Mark the half of rows (M, D) on the side of the one farthest from the middle; none when all are the same."""
    middle = rows.mean(axis=0)
    axis = rows[np.square(rows - middle).sum(axis=1).argmax()] - middle
    along = (rows - middle) @ axis
    marked = np.zeros(len(rows), np.bool_)
    if np.ptp(along) > TINY:
        marked[np.argsort(-along, kind="stable")[: len(rows) // 2]] = True
    return marked


def _means(rows: Floats, labels: Labels, centroids: Floats, *, spherical: bool) -> Floats:
    """Give the centroids that belong to the labels; an empty cluster keeps its own."""
    sums = np.zeros_like(centroids)
    np.add.at(sums, labels, rows)
    sizes = np.bincount(labels, minlength=len(centroids))
    filled = sizes > 0
    centroids = centroids.copy()
    centroids[filled] = sums[filled] / sizes[filled, None]
    if spherical:
        centroids[filled] /= np.maximum(np.linalg.norm(centroids[filled], axis=1, keepdims=True), TINY)
    return centroids
