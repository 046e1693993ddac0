"""What the training images looked like to the network: centroids, shares, distances. Numpy only.

In: pooled features of the training images. Out: a few hundred numbers that say whether a new image lies where the training images
lay. No row belongs to one patient: every centroid is the mean of the images of at least `MIN_PATIENTS` patients.

Features are whitened per dimension and compared by Euclidean distance to the nearest centroid. The distances are cross-fitted:
each image is measured against what the other patients alone say, as a new patient's image will be. (Measured against itself too,
with 40 patients 65 % of new ones would count as foreign.)
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models.errors import Tampered

MIN_PATIENTS = 5
FOLDS = 5
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.995)
OUTLIER = 0.995
"""Images farther from every centroid than this share of held-out training images were are not answered."""

_FIELDS = ("mean", "spread", "centroids", "shares", "quantiles", "distances")
_EPSILON = 1e-6

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Where the training images lay in feature space."""

    mean: Floats
    """(d,) of the training features."""
    spread: Floats
    """(d,) their standard deviation, never 0."""
    centroids: Floats
    """(k, d), whitened."""
    shares: Floats
    """(k,) the share of training images nearest to each, summing to 1."""
    quantiles: Floats
    """(q,) increasing, in 0…1."""
    distances: Floats
    """(q,) the distance of a patient who did not take part to the nearest centroid, at each quantile."""

    def __post_init__(self) -> None:
        k, d = self.centroids.shape if self.centroids.ndim == 2 else (0, 0)
        shapes_fit = self.mean.shape == self.spread.shape == (d,) and self.shares.shape == (k,) and k > 0
        if not shapes_fit or self.quantiles.shape != self.distances.shape or not (self.spread > 0).all():
            raise ValueError("the arrays of a reference do not fit together")
        if not all(np.isfinite(getattr(self, name)).all() for name in _FIELDS):
            raise ValueError("a reference holds finite numbers only")

    @classmethod
    def fit(
        cls, features: NDArray[np.floating], patients: Sequence[str], *, clusters: int = 8, seed: int = 0
    ) -> Reference | None:
        """Describe the training features; None when too few patients are there to describe any without pointing at one.

        Parameters
        ----------
        features
            (n, d), one row an image.
        patients
            The pseudonym of each row.
        clusters
            Wanted; those that rest on fewer than `MIN_PATIENTS` patients are dissolved into their neighbours.
        """
        x = np.asarray(features, dtype=np.float64)
        _, people = np.unique(np.asarray(patients), return_inverse=True)
        if x.ndim != 2 or len(x) != len(people):
            raise ValueError("one patient a row of features")
        if not np.isfinite(x).all():
            raise ValueError("features must be finite")
        if len(set(people.tolist())) < 2 * MIN_PATIENTS:
            return None
        generator = np.random.default_rng(seed)
        distances = []
        for held_out in np.array_split(generator.permutation(np.unique(people)), FOLDS):
            out = np.isin(people, held_out)
            distances.append(cls._describe(x[~out], people[~out], clusters, generator).distance(x[out]))
        reference = cls._describe(x, people, clusters, generator)
        return replace(reference, distances=np.quantile(np.concatenate(distances), QUANTILES))

    @classmethod
    def _describe(cls, x: Floats, people: NDArray[np.intp], clusters: int, generator: np.random.Generator) -> Reference:
        """Find mean, spread and centroids; the distances are still to come."""
        mean, spread = x.mean(axis=0), np.maximum(x.std(axis=0), _EPSILON)
        centroids, nearest = _clusters((x - mean) / spread, people, clusters, generator)
        shares = np.bincount(nearest, minlength=len(centroids)) / len(x)
        return cls(mean, spread, centroids, shares, np.asarray(QUANTILES), np.zeros(len(QUANTILES)))

    def distance(self, features: NDArray[np.floating]) -> Floats:
        """Give each row's distance to the nearest centroid, in whitened units."""
        white: Floats = (np.asarray(features, dtype=np.float64) - self.mean) / self.spread
        distances: Floats = np.sqrt(_squared(white, self.centroids).min(axis=1))
        return distances

    def is_outlier(self, features: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Say which rows lie farther out than the `OUTLIER` share of the training images did."""
        return np.asarray(self.distance(features) > np.interp(OUTLIER, self.quantiles, self.distances))

    def to_bytes(self) -> bytes:
        """Write the reference as it lies in `reference.npz`."""
        buffer = io.BytesIO()
        np.savez(buffer, **{name: getattr(self, name) for name in _FIELDS})
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Reference:
        """Read what `to_bytes` wrote.

        Raises
        ------
        Tampered
            It is no reference.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return cls(**{name: arrays[name].astype(np.float64) for name in _FIELDS})
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
            raise Tampered("reference.npz does not hold what a reference holds") from None


def _squared(rows: Floats, centroids: Floats) -> Floats:
    """Give all squared distances, (n, k)."""
    products = (rows**2).sum(axis=1)[:, None] - 2 * rows @ centroids.T + (centroids**2).sum(axis=1)[None]
    squared: Floats = np.maximum(products, 0)
    return squared


def _clusters(
    rows: Floats, people: NDArray[np.intp], wanted: int, generator: np.random.Generator
) -> tuple[Floats, NDArray[np.intp]]:
    """Find centroids by Lloyd's iterations from k-means++ seeds; dissolve the smallest until none points at few patients."""
    centroids = _seeds(rows, min(wanted, len(set(people.tolist())) // MIN_PATIENTS), generator)
    while True:
        for _ in range(20):
            nearest = _squared(rows, centroids).argmin(axis=1)
            centroids = np.stack([rows[nearest == k].mean(axis=0) for k in np.unique(nearest)])
        nearest = _squared(rows, centroids).argmin(axis=1)
        patients = np.array([len(set(people[nearest == k].tolist())) for k in range(len(centroids))])
        if len(centroids) == 1 or patients.min() >= MIN_PATIENTS:
            return np.stack([rows[nearest == k].mean(axis=0) for k in range(len(centroids))]), nearest
        centroids = np.delete(centroids, patients.argmin(), axis=0)


def _seeds(rows: Floats, count: int, generator: np.random.Generator) -> Floats:
    """Choose starting rows far from each other (k-means++, Arthur & Vassilvitskii 2007)."""
    chosen = rows[[generator.integers(len(rows))]]
    while len(chosen) < count:
        weights = _squared(rows, chosen).min(axis=1)
        total = weights.sum()
        pick = generator.choice(len(rows), p=weights / total) if total > 0 else generator.integers(len(rows))
        chosen = np.vstack([chosen, rows[pick]])
    return chosen
