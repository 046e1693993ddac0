"""Probes: what features tell of the labels, by classifiers that never saw the patient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from training import evaluate, probe

CLASSES = 2


def patients(count: int, images: int = 2) -> list[str]:
    return [f"P{number}" for number in range(count) for _ in range(images)]


def targets(names: list[str]) -> list[int]:
    return [int(name[1:]) % CLASSES for name in names]


def heard(names: list[str], *, signal: float, dims: int = 16, seed: int = 0) -> NDArray[np.float64]:
    """Draw features of which one direction tells the class, so many deviations apart."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(len(names), dims))
    rows[:, 0] += signal * (np.array(targets(names)) - 0.5)
    return rows


def aucs(rows: NDArray[np.float64], names: list[str], **options: Any) -> dict[str, float]:
    truth = np.array(targets(names))
    said = probe.out_of_fold(rows, truth.tolist(), names, CLASSES, **{"folds": 4, "repeats": 3, "seed": 5} | options)
    return {kind: evaluate.auc(truth == 1, logits[:, 1] - logits[:, 0]) for kind, logits in said.items()}


def test_features_that_tell_the_class_are_told_from_noise_by_both_probes() -> None:
    names = patients(40)
    informed, noise = aucs(heard(names, signal=6), names), aucs(heard(names, signal=0), names)
    assert informed.keys() == set(probe.KINDS)
    for kind in probe.KINDS:
        assert informed[kind] > 0.85, kind
        assert 0.2 < noise[kind] < 0.7, kind


def test_a_patient_is_never_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    names = patients(12, 3)
    rows = np.stack([np.arange(36), np.tile([0, 1], 18)], axis=1).astype(np.float64)
    sides: list[tuple[set[str], set[str]]] = []

    def watched(train: NDArray[np.float64], truth: NDArray[np.int64], test: NDArray[np.float64], classes: int) -> object:
        sides.append(({names[int(row[0])] for row in train}, {names[int(row[0])] for row in test}))
        assert set(truth.tolist()) == set(range(classes))
        return np.full((len(test), classes), 1 / classes)

    monkeypatch.setattr(probe, "_linear", watched)
    probe.out_of_fold(rows, targets(names), names, CLASSES, folds=3, repeats=2, seed=1)
    assert len(sides) == 6
    for train, test in sides:
        assert not train & test
        assert train | test == set(names)
    for of_repeat in (sides[:3], sides[3:]):
        assert sum(len(test) for _, test in of_repeat) == 12  # each is tested once
    assert [test for _, test in sides[:3]] != [test for _, test in sides[3:]]  # and dealt anew


def test_what_only_tells_the_patient_is_of_no_use() -> None:
    """Features that know each patient by heart would be perfect if images of one were on both sides."""
    names = patients(30, 4)
    by_patient = np.random.default_rng(0).normal(size=(30, 16)).repeat(4, axis=0)
    for kind, value in aucs(by_patient, names).items():
        assert 0.2 < value < 0.75, kind


def test_every_image_gets_probabilities_and_the_same_ones_again() -> None:
    names = patients(20)
    rows = heard(names, signal=2)
    one, two, other = (
        probe.out_of_fold(rows, targets(names), names, CLASSES, folds=4, repeats=2, seed=seed) for seed in (5, 5, 6)
    )
    for kind in probe.KINDS:
        assert np.allclose(np.exp(one[kind]).sum(axis=1), 1, atol=1e-5)
        assert np.array_equal(one[kind], two[kind])
        assert not np.array_equal(one[kind], other[kind])


def test_the_frequent_class_does_not_win_by_its_number() -> None:
    """Noise about three patients in four of one class says nothing for it."""
    names = patients(40)
    truth = [int(int(name[1:]) % 4 == 0) for name in names]
    rows = np.random.default_rng(3).normal(size=(80, 8))
    said = probe.out_of_fold(rows, truth, names, CLASSES, folds=4, repeats=4, seed=1)
    for kind in probe.KINDS:
        assert 0.3 < np.exp(said[kind][:, 1]).mean() < 0.7, kind


def test_features_of_zeros_or_of_one_value_are_no_reason_to_fail() -> None:
    names = patients(12)
    for rows in (np.zeros((24, 5)), np.ones((24, 5))):
        for value in aucs(rows, names).values():
            assert np.isfinite(value)


@pytest.mark.parametrize(
    ("counts", "folds", "enough"), [((5, 5), 5, True), ((5, 4), 5, False), ((9, 0), 5, False), ((3, 3), 3, True)]
)
def test_a_probe_is_possible_where_every_class_has_a_patient_for_each_fold(
    counts: tuple[int, int], folds: int, *, enough: bool
) -> None:
    told = [one for one, count in enumerate(counts) for _ in range(2 * count)]  # two images of each patient
    names = [f"{one}-{number // 2}" for one, count in enumerate(counts) for number in range(2 * count)]
    assert probe.possible(told, names, CLASSES, folds) is enough
