"""How good predictions are, with a number of cases and an interval beside every figure.

In: predictions by study with the patient and the truth. Out: figures, also by group of patients, curves, the paired difference of
two models. Pure: no disk, no clock; the resampling takes its seed. Patients, never images or studies, are resampled, because two
films of one child are not two children.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.card import Metric
from training.corpus import Fold, Sample

Floats = NDArray[np.float64]
BINS = 10
RESAMPLED = "bootstrap by patient"
NO_SPREAD = "Wilson over the patients of the smaller class: nothing varied when resampled"
OUT_OF_FOLD = "out of fold"
LOCKED = "locked patients"
"""Whom a figure was measured on, as its name ends."""
UNKNOWN = "unknown"
AGE_BANDS = ("0-4", "5-9", "10-14", "15-17", "18 and older")
FEW = 5
"""Patients below which a group gets no figures."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What one model says of some studies, in one order."""

    studies: tuple[str, ...]
    patients: tuple[str, ...]
    """One a study; may repeat."""
    truth: NDArray[np.int64]
    """(n,) index of the class."""
    probabilities: Floats
    """(n, classes), rows sum to 1."""
    urgent: tuple[int, ...]
    """Indices of the urgent classes."""

    @property
    def positive(self) -> NDArray[np.bool_]:
        """(n,) whether the truth is an urgent class."""
        return np.isin(self.truth, self.urgent)

    @property
    def score(self) -> Floats:
        """(n,) probability of the urgent classes together."""
        return np.asarray(self.probabilities[:, list(self.urgent)].sum(axis=1), np.float64)

    def to_plain(self) -> dict[str, Any]:
        """Give what was said as plain values."""
        return {
            "studies": list(self.studies),
            "patients": list(self.patients),
            "truth": self.truth.tolist(),
            "probabilities": self.probabilities.tolist(),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], urgent: tuple[int, ...]) -> Predictions:
        """Read back what `to_plain` gave."""
        truth, probabilities = np.array(plain["truth"], np.int64), np.array(plain["probabilities"], np.float64)
        return cls(tuple(plain["studies"]), tuple(plain["patients"]), truth, probabilities, urgent)

    def smaller_class(self) -> int:
        """Count the patients of the smaller side, urgent or not."""
        urgent = {patient for patient, positive in zip(self.patients, self.positive, strict=True) if positive}
        return min(len(urgent), len(set(self.patients) - urgent))


def softmax(logits: NDArray[np.floating]) -> Floats:
    """Turn logits (n, classes) into probabilities."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True)
    raised = np.exp(shifted)
    return np.asarray(raised / raised.sum(axis=1, keepdims=True), np.float64)


def by_study(samples: Sequence[Sample], logits: NDArray[np.floating], urgent: tuple[int, ...]) -> Predictions:
    """Combine calibrated logits of images (n, classes) into one prediction a study, as serving does: the mean, then softmax.

    Images of one study that are labelled differently, each on its own, are cases of their own: they share no truth.
    """
    cases = _cases(samples)
    first = [samples[rows[0]] for rows in cases]
    means = np.stack([np.asarray(logits, np.float64)[rows].mean(axis=0) for rows in cases])
    return Predictions(
        studies=tuple(sample.study_uid for sample in first),
        patients=tuple(sample.pid for sample in first),
        truth=np.array([sample.target for sample in first], np.int64),
        probabilities=softmax(means),
        urgent=urgent,
    )


def groups_of(samples: Sequence[Sample]) -> dict[str, tuple[str, ...]]:
    """Name the groups of each case, in the order of `by_study`: age band, sex, manufacturer, as its first image states them."""
    first = [samples[rows[0]] for rows in _cases(samples)]
    return {
        "age band": tuple(_age_band(sample.age_years) for sample in first),
        "sex": tuple(sample.sex or UNKNOWN for sample in first),
        "manufacturer": tuple(" ".join(sample.manufacturer.upper().split()) or UNKNOWN for sample in first),
    }


def _cases(samples: Sequence[Sample]) -> list[list[int]]:
    """Give the rows of each study and label, sorted by these."""
    rows: dict[tuple[str, int], list[int]] = {}
    for row, sample in enumerate(samples):
        rows.setdefault((sample.study_uid, sample.target), []).append(row)
    return [rows[case] for case in sorted(rows)]


def _age_band(years: int | None) -> str:
    return UNKNOWN if years is None else AGE_BANDS[bisect([5, 10, 15, 18], years)]


def wilson(hits: float, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """Give Wilson's score interval of a proportion; (0, 1) when there are no cases."""
    if n == 0:
        return 0.0, 1.0
    z = _normal_quantile(1 - alpha / 2)
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))  # rounding must not leave the share outside


def auc(positive: NDArray[np.bool_], score: NDArray[np.floating]) -> float:
    """Give the area under the ROC curve: how often an urgent case scores above another one, ties half (Mann and Whitney)."""
    kernel = _kernel(positive, score)
    return float(kernel.mean()) if kernel.size else math.nan


def metrics(predictions: Predictions, of: str, *, seed: int, draws: int = 2000, alpha: float = 0.05) -> dict[str, Metric]:
    """Give every figure that a report states, each with its interval and the patients it rests on.

    `of` ends their names ("AUC, out of fold"). A figure without a case (the precision of a class never said) is left out.
    """
    truth, said = predictions.truth, predictions.probabilities.argmax(axis=1)
    positive, called = predictions.positive, np.isin(said, predictions.urgent)
    weights = resample(predictions, seed=seed, draws=draws)
    once = np.ones((1, len(truth)))

    def share(name: str, hits: NDArray[np.bool_], among: NDArray[np.bool_]) -> Metric | None:
        count, cases = int((hits & among).sum()), int(among.sum())
        if not cases:
            return None
        people = len({patient for patient, counted in zip(predictions.patients, among, strict=True) if counted})
        low, high = wilson(count / cases * people, people, alpha)  # two studies of one child are not two children
        return Metric(f"{name}, {of}", count / cases, low, high, people, f"Wilson over the patients, {cases} studies")

    def resampled(name: str, measure: Callable[[Floats], Floats], *, is_share: bool = False) -> Metric:
        value, drawn = float(measure(once)[0]), measure(weights)
        if is_share:
            low, high, method = _interval(value, drawn, predictions, alpha)
            return Metric(f"{name}, {of}", value, low, high, len(set(predictions.patients)), method)
        low, high = (float(edge) for edge in np.quantile(drawn, [alpha / 2, 1 - alpha / 2]))
        low, high = min(low, value), max(high, value)  # resampling moves a calibration error upwards, beyond its own value
        return Metric(f"{name}, {of}", value, low, high, len(set(predictions.patients)), f"{RESAMPLED}, {len(truth)} studies")

    everywhere = np.ones(len(truth), np.bool_)
    found = {
        "auc": auc_with_interval(predictions, of, seed=seed, draws=draws, alpha=alpha),
        "accuracy": share("accuracy", said == truth, everywhere),
        "balanced_accuracy": resampled("balanced accuracy", lambda drawn: _balanced(truth, said, drawn), is_share=True),
        "recall_urgent": share("recall of the urgent class", called, positive),
        "precision_urgent": share("precision of the urgent class", positive, called),
        "f2_urgent": (
            resampled("F2 of the urgent class", lambda drawn: _f_beta(positive, called, drawn, beta=2), is_share=True)
            if positive.any()
            else None
        ),
        "brier": resampled("Brier score", lambda drawn: _brier(predictions, drawn)),
        "ece": resampled("expected calibration error", lambda drawn: _ece(predictions, drawn)),
    }
    return {name: metric for name, metric in found.items() if metric is not None}


def auc_with_interval(predictions: Predictions, of: str, *, seed: int, draws: int = 2000, alpha: float = 0.05) -> Metric | None:
    """Give the AUC with the interval of the resampled patients; None when one side has no case.

    A perfect separation has no spread to resample: its interval is Wilson's for the patients of the smaller class.
    """
    if predictions.smaller_class() == 0:
        return None
    value = auc(predictions.positive, predictions.score)
    drawn = _weighted_auc(predictions, resample(predictions, seed=seed, draws=draws))
    low, high, method = _interval(value, drawn, predictions, alpha)
    return Metric(f"AUC, {of}", value, low, high, len(set(predictions.patients)), method)


def _interval(value: float, drawn: Floats, predictions: Predictions, alpha: float) -> tuple[float, float, str]:
    """Give the interval of a value between 0 and 1 and how it was made; Wilson's where nothing varied when resampled."""
    low, high = (float(edge) for edge in np.quantile(drawn, [alpha / 2, 1 - alpha / 2]))
    method = f"{RESAMPLED}, {len(predictions.truth)} studies"
    if low == high:
        cases = predictions.smaller_class()
        (low, high), method = wilson(round(value * cases), cases, alpha), NO_SPREAD
    return min(low, value), max(high, value), method


def difference(
    candidate: Predictions, other: Predictions, of: str, *, seed: int, draws: int = 2000, alpha: float = 0.05
) -> Metric | None:
    """Give candidate minus other in AUC on the same studies, resampling the same patients for both; None without both sides.

    When both are resampled without any spread although they do not say the same (two perfect separations), the interval is
    widened to what the patients of the smaller class could have hidden.
    """
    if candidate.studies != other.studies:
        raise ValueError("a paired difference needs the same studies in the same order")
    if candidate.smaller_class() == 0:
        return None
    weights = resample(candidate, seed=seed, draws=draws)
    value = auc(candidate.positive, candidate.score) - auc(other.positive, other.score)
    drawn = _weighted_auc(candidate, weights) - _weighted_auc(other, weights)
    low, high = (float(edge) for edge in np.quantile(drawn, [alpha / 2, 1 - alpha / 2]))
    method = f"paired {RESAMPLED}, {len(candidate.truth)} studies"
    if low == high and not np.allclose(candidate.score, other.score, rtol=0, atol=1e-4):
        cases = candidate.smaller_class()
        hidden = 1 - wilson(cases, cases, alpha)[0]
        low, high, method = value - hidden, value + hidden, NO_SPREAD
    return Metric(of, value, low, high, len(set(candidate.patients)), method)


@dataclass(frozen=True, slots=True)
class CrossValidated:
    """What a recipe showed out of fold, and on what ground."""

    predictions: Predictions
    classes: tuple[str, ...]
    """Names, in the order of the probabilities."""
    folds: tuple[Fold, ...]
    seed: int
    """Of the recipe."""
    labels: str
    """Digest of the images and what each was labelled (`Corpus.label_digest`)."""


def out_of_fold_difference(
    candidate: CrossValidated, other: CrossValidated, of: str, *, seed: int, draws: int = 2000, alpha: float = 0.05
) -> tuple[Metric | None, str]:
    """Give candidate minus other in AUC out of fold; or None and why, unless both learned and were tested on the same ground.

    It compares two recipes and not two models: no network of a fold is the one on the shelf.
    """
    if why := _other_ground(candidate, other):
        return None, why
    found = difference(candidate.predictions, other.predictions, of, seed=seed, draws=draws, alpha=alpha)
    return found, "" if found else "one side has no case"


def _other_ground(candidate: CrossValidated, other: CrossValidated) -> str:
    """Say in what two cross-validations differ that must not, empty when they can be compared."""
    if candidate.classes != other.classes:
        return "the classes are not the same"
    if candidate.folds != other.folds:
        return "the patients or their folds are not the same"
    if candidate.labels != other.labels or candidate.predictions.studies != other.predictions.studies:
        return "the images or their labels are not the same"
    return "" if candidate.seed == other.seed else "the seeds are not the same"


@dataclass(frozen=True, slots=True)
class Group:
    """The figures of some patients who have something in common."""

    kind: str
    """What they have in common: age band, sex, manufacturer."""
    value: str
    """Which one, for example 5-9."""
    patients: tuple[int, ...]
    """By class."""
    figures: Mapping[str, Metric]
    """Those of `metrics`, each where it has cases; empty where the patients are too few for any."""


def by_group(
    predictions: Predictions,
    groups: Mapping[str, Sequence[str]],
    of: str,
    *,
    seed: int,
    draws: int = 2000,
    alpha: float = 0.05,
) -> list[Group]:
    """Give the figures of `metrics` for each value of each kind of group.

    `groups` names, for each kind, the value of each study, as `groups_of` does. A group of fewer than 5 patients is listed
    without figures: they would say more of single patients than of the model.
    """
    found = []
    for kind, values in groups.items():
        for value in sorted(set(values), key=_group_order):
            here = _only(predictions, [row for row, one in enumerate(values) if one == value])
            enough = len(set(here.patients)) >= FEW
            figures = metrics(here, f"{of}, {kind} {value}", seed=seed, draws=draws, alpha=alpha) if enough else {}
            found.append(Group(kind, value, _patients_by_class(here), figures))
    return found


def _group_order(value: str) -> tuple[bool, int, str]:
    return value == UNKNOWN, AGE_BANDS.index(value) if value in AGE_BANDS else 0, value


def _only(predictions: Predictions, rows: Sequence[int]) -> Predictions:
    return replace(
        predictions,
        studies=tuple(predictions.studies[row] for row in rows),
        patients=tuple(predictions.patients[row] for row in rows),
        truth=predictions.truth[rows],
        probabilities=predictions.probabilities[rows],
    )


def _patients_by_class(predictions: Predictions) -> tuple[int, ...]:
    cases = set(zip(predictions.patients, predictions.truth.tolist(), strict=True))
    return tuple(sum(truth == index for _, truth in cases) for index in range(predictions.probabilities.shape[1]))


def resample(predictions: Predictions, *, seed: int, draws: int) -> Floats:
    """Draw patients with replacement, urgent and other ones apart; give the weight of each study: (draws, n)."""
    positive = predictions.positive
    patients = sorted(set(predictions.patients))
    urgent = {patient for patient, yes in zip(predictions.patients, positive, strict=True) if yes}
    generator = np.random.default_rng(seed)
    counts = np.zeros((draws, len(patients)))
    for side in (urgent, set(patients) - urgent):
        columns = [column for column, patient in enumerate(patients) if patient in side]
        if columns:
            counts[:, columns] = generator.multinomial(len(columns), [1 / len(columns)] * len(columns), size=draws)
    column_of = {patient: column for column, patient in enumerate(patients)}
    return np.asarray(counts[:, [column_of[patient] for patient in predictions.patients]])


def roc(positive: NDArray[np.bool_], score: NDArray[np.floating], weights: Floats | None = None) -> tuple[Floats, Floats]:
    """Give the ROC curve: false positive rates and true positive rates, from (0, 0) to (1, 1)."""
    order = np.argsort(-np.asarray(score, np.float64), kind="stable")
    counted = np.ones(len(order)) if weights is None else weights[order]
    hits, alarms = np.cumsum(positive[order] * counted), np.cumsum(~positive[order] * counted)
    last = np.append(np.diff(np.asarray(score)[order]) != 0, True)
    true = np.concatenate([[0.0], hits[last] / max(hits[-1], 1e-12)])
    false = np.concatenate([[0.0], alarms[last] / max(alarms[-1], 1e-12)])
    return false, true


def confusion(predictions: Predictions) -> NDArray[np.int64]:
    """Count studies by truth (rows) and what was said (columns)."""
    classes = predictions.probabilities.shape[1]
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (predictions.truth, predictions.probabilities.argmax(axis=1)), 1)
    return table


def reliability(predictions: Predictions) -> list[tuple[float, float, int]]:
    """Give for each filled tenth of the score: mean score, share that is urgent, cases."""
    bins = _bins(predictions.score)
    found = [(bins == one) for one in range(BINS)]
    return [
        (float(predictions.score[one].mean()), float(predictions.positive[one].mean()), int(one.sum()))
        for one in found
        if one.any()
    ]


def _kernel(positive: NDArray[np.bool_], score: NDArray[np.floating]) -> Floats:
    above = np.asarray(score, np.float64)[positive][:, None] - np.asarray(score, np.float64)[~positive][None, :]
    return np.asarray((np.sign(above) + 1) / 2, np.float64)


def _weighted_auc(predictions: Predictions, weights: Floats) -> Floats:
    positive = predictions.positive
    kernel = _kernel(positive, predictions.score)
    high, low = weights[:, positive], weights[:, ~positive]
    return np.asarray(((high @ kernel) * low).sum(axis=1) / (high.sum(axis=1) * low.sum(axis=1)))


def _balanced(truth: NDArray[np.int64], said: NDArray[np.int64], weights: Floats) -> Floats:
    """Give the mean recall over the classes that occur, for each row of weights."""
    recalls = []
    for one in np.unique(truth):
        among = truth == one
        total = weights[:, among].sum(axis=1)
        hits = weights[:, among & (said == one)].sum(axis=1)
        recalls.append(np.where(total > 0, hits / np.maximum(total, 1e-12), np.nan))
    return np.asarray(np.nanmean(np.stack(recalls), axis=0))


def _f_beta(positive: NDArray[np.bool_], called: NDArray[np.bool_], weights: Floats, *, beta: float) -> Floats:
    """Give F-beta for each row of weights: recall counts beta times as much as precision (van Rijsbergen, 1979)."""
    hits, missed, alarms = (
        weights[:, among].sum(axis=1) for among in (positive & called, positive & ~called, ~positive & called)
    )
    return np.asarray((1 + beta**2) * hits / ((1 + beta**2) * hits + beta**2 * missed + alarms))


def _brier(predictions: Predictions, weights: Floats) -> Floats:
    wrong = (predictions.score - predictions.positive) ** 2
    return np.asarray((weights @ wrong) / weights.sum(axis=1))


def _bins(score: Floats) -> NDArray[np.int64]:
    return np.minimum((score * BINS).astype(np.int64), BINS - 1)


def _ece(predictions: Predictions, weights: Floats) -> Floats:
    """Give the expected calibration error of the urgent score over ten equal bins (Naeini et al., AAAI 2015)."""
    gap = predictions.score - predictions.positive
    bins = _bins(predictions.score)
    total = sum(np.abs(weights[:, bins == one] @ gap[bins == one]) for one in range(BINS))
    return np.asarray(total / weights.sum(axis=1))


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


# Trivial baselines ---------------------------------------------------------------------------------------------------------


def age_and_sex(samples: Sequence[Sample]) -> Floats:
    """Give what a guess from the header alone would use: age in years, male, female; (n, 3)."""
    return np.array(
        [[float(sample.age_years or 0), float(sample.sex == "M"), float(sample.sex == "F")] for sample in samples], np.float64
    )


def grey(samples: Sequence[Sample]) -> Floats:
    """Give what a guess without any shape would use: mean grey and spread; (n, 2)."""
    return np.array([[sample.mean, sample.spread] for sample in samples], np.float64)


BASELINES: Mapping[str, Callable[[Sequence[Sample]], Floats]] = {"age and sex": age_and_sex, "mean grey and spread": grey}
"""What a network has to beat to have learned anything from the picture."""


def trivial(
    train: Sequence[Sample], test: Sequence[Sample], features: Callable[[Sequence[Sample]], Floats], classes: int
) -> Floats:
    """Fit a logistic regression on `train` and give the log-probabilities of `test`: (n, classes)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features(train), [sample.target for sample in train])
    said = np.full((len(test), classes), 1e-6)
    said[:, model.classes_] = np.maximum(model.predict_proba(features(test)), 1e-6)
    return np.asarray(np.log(said))
