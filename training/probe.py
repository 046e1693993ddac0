"""How much features tell of the labels, without training the network: a k-NN and a linear probe.

In: features of labelled images, targets, patients. Out: probabilities of each image from a classifier that never saw its patient.
A pretraining is judged by them against its own start weights (docs/training.md): its loss and its NMI do not predict whether it
is of use. Locked patients must never come here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.recipe import uniforms

Floats = NDArray[np.float64]
NEIGHBOURS = 20
TEMPERATURE = 0.07
"""Of the neighbours' votes (Wu et al., CVPR 2018)."""
STRENGTH = 0.01
"""Inverse weight of the linear probe's penalty: mild enough for a thousand features and a few dozen images."""
KINDS = {"knn": "k-NN", "linear": "linear probe"}
"""The probes by their key in figures and journals, and as they are called."""


def possible(targets: Sequence[int], patients: Sequence[str], classes: int, folds: int) -> bool:
    """Say whether every class has a patient for each fold."""
    of_class: dict[int, set[str]] = {}
    for target, patient in zip(targets, patients, strict=True):
        of_class.setdefault(target, set()).add(patient)
    return all(len(of_class.get(one, ())) >= folds for one in range(classes))


def out_of_fold(
    features: NDArray[np.floating],
    targets: Sequence[int],
    patients: Sequence[str],
    classes: int,
    *,
    folds: int,
    repeats: int,
    seed: int,
) -> dict[str, Floats]:
    """Give for each kind of probe the log-probabilities (N, classes) of features (N, D), the mean over `repeats` divisions.

    Each division deals the patients of every class over `folds` folds; images of one patient stay together.
    """
    rows, truth = np.asarray(features, np.float64), np.asarray(targets, np.int64)
    said = {kind: np.zeros((len(rows), classes)) for kind in KINDS}
    for repeat in range(repeats):
        fold_of = _deal(truth, patients, folds, seed, repeat)
        for fold in range(folds):
            test = np.array([fold_of[patient] == fold for patient in patients])
            for kind, guess in (("knn", _neighbours), ("linear", _linear)):
                said[kind][test] += guess(rows[~test], truth[~test], rows[test], classes)
    return {kind: np.log(np.maximum(total / repeats, 1e-6)) for kind, total in said.items()}


def _deal(truth: NDArray[np.int64], patients: Sequence[str], folds: int, seed: int, repeat: int) -> dict[str, int]:
    class_of = {patient: int(target) for target, patient in zip(truth, patients, strict=True)}
    names = sorted(class_of)
    drawn = dict(zip(names, uniforms(seed, "probe", repeat, names)[:, 0].tolist(), strict=True))
    ordered = sorted(names, key=lambda name: (class_of[name], drawn[name]))
    return {name: place % folds for place, name in enumerate(ordered)}


def _neighbours(train: Floats, truth: NDArray[np.int64], test: Floats, classes: int) -> Floats:
    """Let the nearest images by cosine vote; classes weigh the same."""
    train, test = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (train, test))
    similar = test @ train.T  # (test, train)
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, : max(3, min(NEIGHBOURS, len(train) // 5))]
    weights = np.exp((np.take_along_axis(similar, nearest, axis=1) - 1) / TEMPERATURE)
    weights *= (1 / np.maximum(np.bincount(truth, minlength=classes), 1))[truth[nearest]]
    votes = np.stack([(weights * (truth[nearest] == one)).sum(axis=1) for one in range(classes)], axis=1)
    return np.asarray(votes / votes.sum(axis=1, keepdims=True))


def _linear(train: Floats, truth: NDArray[np.int64], test: Floats, classes: int) -> Floats:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train, truth)
    said = np.zeros((len(test), classes))
    said[:, model.classes_] = model.predict_proba(test)
    return said
