"""Figures against an oracle, intervals against what is known of them, and the gate's decisions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    fbeta_score,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from models.card import Metric
from training import evaluate, promote
from training.corpus import Sample
from training.evaluate import Predictions
from training.promote import Evidence, Verdict
from training.recipe import Gate


def predictions(n: int, *, skill: float, seed: int = 0, per_patient: int = 1) -> Predictions:
    generator = np.random.default_rng(seed)
    truth = np.arange(n) % 2
    logit = skill * (0.5 - truth) * 2 + generator.normal(size=n)
    return Predictions(
        studies=tuple(f"2.25.{row}" for row in range(n)),
        patients=tuple(f"P{row // 2 // per_patient}-{row % 2}" for row in range(n)),
        truth=truth.astype(np.int64),
        probabilities=evaluate.softmax(np.stack([logit, np.zeros(n)], axis=1)),
        urgent=(0,),
    )


def test_figures_are_those_of_scikit_learn() -> None:
    """Of 40 urgent cases and 26 others: where both sides are alike, accuracy and balanced accuracy are the same figure."""
    said = evaluate._only(predictions(80, skill=0.6), [row for row in range(80) if row % 6 != 1])
    found = evaluate.metrics(said, "test", seed=1, draws=300)
    positive, told = said.truth == 0, said.probabilities.argmax(axis=1)
    called = told == 0
    expected = {
        "auc": roc_auc_score(positive, said.score),
        "accuracy": accuracy_score(said.truth, told),
        "balanced_accuracy": balanced_accuracy_score(said.truth, told),
        "recall_urgent": recall_score(positive, called),
        "precision_urgent": precision_score(positive, called),
        "f2_urgent": fbeta_score(positive, called, beta=2),
        "brier": brier_score_loss(positive, said.score),
    }
    assert {name: found[name].value for name in expected} == pytest.approx(expected)
    assert len({round(value, 6) for value in expected.values()}) == len(expected), "one could stand for another"
    expected_curve = roc_curve(positive, said.score, drop_intermediate=False)[:2]
    for ours, theirs in zip(evaluate.roc(said.positive, said.score), expected_curve, strict=True):
        assert ours == pytest.approx(theirs)
    assert all(metric.low <= metric.value <= metric.high and metric.n for name, metric in found.items() if name != "ece")
    assert {metric.n for metric in found.values()} >= {66, 40}


def test_the_calibration_error_is_the_mean_gap_of_the_tenths_weighed_by_their_cases() -> None:
    """Gaps of score and urgent share: 0.05 of one case, (0.33 - 1) / 2 of two, (1.95 - 2) / 2 of two."""
    score = np.array([0.05, 0.15, 0.18, 0.95, 1.0])
    names = tuple("abcde")
    said = Predictions(names, names, np.array([1, 1, 0, 0, 0]), np.stack([score, 1 - score], axis=1), urgent=(0,))
    found = evaluate.metrics(said, "test", seed=1, draws=50)["ece"]
    assert found.value == pytest.approx((0.05 + 0.67 + 0.05) / 5)


def test_wilson_is_the_textbook_interval() -> None:
    """Newcombe, Statistics in Medicine 1998, table I: 81 of 263 and 0 of 20."""
    assert evaluate.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert evaluate.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert evaluate.wilson(0, 0) == (0.0, 1.0)


def test_an_interval_holds_its_own_value() -> None:
    """Also where rounding, or the bias of a resampled calibration error, would leave it outside."""
    for n in range(1, 60):
        for hits in range(n + 1):
            low, high = evaluate.wilson(hits, n)
            assert 0 <= low <= hits / n <= high <= 1
    for skill in (0.0, 0.5, 3.0):
        found = evaluate.metrics(predictions(15, skill=skill), "test", seed=1, draws=200)
        assert all(metric.low <= metric.value <= metric.high for metric in found.values())


def test_studies_of_one_patient_are_not_counted_as_patients() -> None:
    many = evaluate.auc_with_interval(predictions(120, skill=0.5), "test", seed=1)
    few = evaluate.auc_with_interval(predictions(120, skill=0.5, per_patient=10), "test", seed=1)
    assert many is not None
    assert few is not None
    assert (many.n, few.n) == (120, 12)
    shares = [
        evaluate.metrics(predictions(120, skill=0.5, per_patient=each), "test", seed=1, draws=50)["accuracy"] for each in (1, 10)
    ]
    assert shares[0].value == shares[1].value
    assert shares[1].high - shares[1].low > 2 * (shares[0].high - shares[0].low)


def test_a_perfect_separation_of_few_patients_is_not_certain() -> None:
    found = evaluate.auc_with_interval(predictions(12, skill=50), "test", seed=1)
    assert found is not None
    assert found.value == found.high == 1
    assert found.low < 0.7


def test_a_score_without_spread_is_not_certain_either() -> None:
    found = evaluate.metrics(predictions(12, skill=50), "test", seed=1, draws=100)
    for name in ("f2_urgent", "balanced_accuracy"):
        assert found[name].value == found[name].high == 1
        assert found[name].low < 0.7


def test_f2_is_left_out_where_nobody_is_urgent() -> None:
    nobody = replace(predictions(20, skill=0.5), truth=np.ones(20, np.int64))
    assert "f2_urgent" not in evaluate.metrics(nobody, "test", seed=1, draws=50)


def test_a_model_does_not_differ_from_itself_and_paired_is_narrower() -> None:
    one, other = predictions(100, skill=1, seed=1), predictions(100, skill=0.2, seed=2)
    same = evaluate.difference(one, one, "same", seed=3)
    apart = evaluate.difference(one, other, "apart", seed=3)
    assert same is not None
    assert apart is not None
    assert (same.low, same.value, same.high) == (0, 0, 0)
    assert apart.low > 0
    perfect = evaluate.difference(predictions(20, skill=3, seed=1), predictions(20, skill=3, seed=2), "both perfect", seed=3)
    assert perfect is not None
    assert perfect.low < -0.05  # twenty patients cannot show that


def test_images_of_a_study_are_combined_as_serving_does() -> None:
    samples = [Sample(f"2.25.{n}", f"2.25.9{n // 2}", f"P{n // 2}", n // 2, 9, "F", "", 0, 0) for n in range(4)]
    logits = np.array([[2.0, 0], [-1, 0], [0, 1], [0, 3]])
    combined = evaluate.by_study(samples, logits, (0,))
    assert combined.probabilities == pytest.approx(evaluate.softmax(np.array([[0.5, 0], [0, 2]])))
    assert combined.truth.tolist() == [0, 1]


def test_images_of_a_study_that_show_different_things_are_not_one_case() -> None:
    """Labels of images: the healthy side may be in the same study, and its truth is not the other side's."""
    samples = [Sample(f"2.25.{n}", "2.25.9", "P", target, 9, "F", "", 0, 0) for n, target in enumerate((1, 0))]
    combined = evaluate.by_study(samples, np.array([[0.0, 3], [3, 0]]), (0,))
    assert combined.truth.tolist() == [0, 1]
    assert combined.probabilities.argmax(axis=1).tolist() == [0, 1]
    assert combined.studies == ("2.25.9", "2.25.9")


def person(n: int, *, age: int | None = 9, sex: str = "F", manufacturer: str = "") -> Sample:
    return Sample(f"2.25.{n}", f"2.25.{n}", f"P{n}", n % 2, age, sex, "", 0, 0, manufacturer)


def test_groups_stand_beside_the_studies_they_are_of() -> None:
    ages = (0, 4, 5, 9, 10, 14, 15, 17, 18, None)
    samples = [person(20 - n, age=age) for n, age in enumerate(ages)]  # by study they are the other way round
    samples.append(replace(samples[0], sop_uid="2.25.99"))  # a second image of a study is no second case
    named = evaluate.groups_of(samples)
    said = evaluate.by_study(samples, np.zeros((len(samples), 2)), (0,))
    band_of = dict(zip(said.studies, named["age band"], strict=True))
    bands = ("0-4", "0-4", "5-9", "5-9", "10-14", "10-14", "15-17", "15-17", "18 and older", "unknown")
    assert band_of == {f"2.25.{20 - n}": band for n, band in enumerate(bands)}
    one_maker = evaluate.groups_of([person(1, manufacturer="Acme  Imaging "), person(2, manufacturer="ACME IMAGING", sex="")])
    assert one_maker["manufacturer"] == ("ACME IMAGING", "ACME IMAGING")
    assert one_maker["sex"] == ("F", "unknown")


def test_each_group_has_its_own_figures_and_a_small_one_none() -> None:
    said = predictions(80, skill=1)
    young = [row < 36 for row in range(80)]
    bands = ["5-9" if one else "10-14" for one in young]
    bands[-3:] = ["unknown"] * 3
    sexes = ["M" if truth else "F" for truth in said.truth]
    found = {(one.kind, one.value): one for one in evaluate.by_group(said, {"age band": bands, "sex": sexes}, "test", seed=1)}
    assert list(found)[:3] == [("age band", "5-9"), ("age band", "10-14"), ("age band", "unknown")]
    group = found["age band", "5-9"]
    right = (said.probabilities.argmax(axis=1) == said.truth)[:36]
    assert group.patients == (18, 18)
    assert group.figures["accuracy"].value == pytest.approx(right.mean())
    assert group.figures["auc"].value == pytest.approx(roc_auc_score(said.truth[:36] == 0, said.score[:36]))
    assert group.figures["recall_urgent"].n == 18
    assert all(metric.low < metric.high and "5-9" in metric.name for metric in group.figures.values())
    assert found["age band", "unknown"].patients == (1, 2)
    assert found["age band", "unknown"].figures == {}
    every = evaluate.metrics(said, "all", seed=1).keys()
    assert group.figures.keys() == every
    assert found["sex", "F"].figures.keys() == every - {"auc"}  # all of them urgent
    assert found["sex", "M"].figures.keys() == every - {"auc", "recall_urgent", "f2_urgent"}


def test_a_group_is_as_large_as_its_patients_and_not_its_studies() -> None:
    few = predictions(40, skill=1, per_patient=10)  # 40 studies of 4 patients
    (group,) = evaluate.by_group(few, {"sex": ["F"] * 40}, "test", seed=1)
    assert (group.patients, group.figures) == ((2, 2), {})


def test_trivial_baselines_find_what_needs_no_picture() -> None:
    generator = np.random.default_rng(0)
    samples = [
        Sample(f"2.25.{n}", f"2.25.{n}", f"P{n}", n % 2, int(8 + 4 * (n % 2) + generator.integers(3)), "F", "", 90, 20)
        for n in range(60)
    ]
    by_age = evaluate.trivial(samples[:40], samples[40:], evaluate.age_and_sex, 2)
    by_grey = evaluate.trivial(samples[:40], samples[40:], evaluate.grey, 2)
    assert evaluate.auc(evaluate.by_study(samples[40:], by_age, (0,)).positive, np.exp(by_age[:, 0])) > 0.9
    assert np.exp(by_grey) == pytest.approx(0.5, abs=0.01)


def figure(value: float, low: float, high: float) -> Metric:
    return Metric("AUC", value, low, high, 200)


def judged(*, smaller: int = 100, auc: Metric | None = figure(0.9, 0.85, 0.95), **options: object) -> promote.Decision:  # noqa: B008
    evidence: dict[str, object] = {
        "smaller_class": smaller,
        "auc": auc,
        "against_champion": None,
        "champion": None,
        "incomparable": "",
        "against_baselines": {"age and sex": figure(0.3, 0.2, 0.4), "mean grey and spread": figure(0.3, 0.2, 0.4)},
    }
    return promote.decide(Evidence(**(evidence | options)), Gate())  # type: ignore[arg-type]


def test_a_first_model_has_to_beat_chance_and_what_needs_no_picture() -> None:
    assert judged().verdict is Verdict.PROMOTE
    assert judged(auc=figure(0.6, 0.49, 0.7)).verdict is Verdict.INSUFFICIENT
    assert judged(auc=figure(0.4, 0.3, 0.5)).verdict is Verdict.REFUSE
    level = judged(against_baselines={"age and sex": figure(0.05, -0.02, 0.1)})
    assert level.verdict is Verdict.INSUFFICIENT
    assert "age and sex" in level.words
    assert judged(against_baselines={"age and sex": figure(-0.1, -0.2, 0.0)}).verdict is Verdict.REFUSE


@pytest.mark.parametrize(
    ("apart", "verdict"),
    [
        (figure(0.0, -0.049, 0.05), Verdict.PROMOTE),
        (figure(0.0, -0.05, 0.05), Verdict.INSUFFICIENT),
        (figure(0.02, -0.08, 0.12), Verdict.INSUFFICIENT),
        (figure(-0.2, -0.3, -0.1), Verdict.REFUSE),
        (figure(-0.02, -0.03, -0.01), Verdict.REFUSE),  # shown to be worse, though by less than the margin
    ],
)
def test_a_candidate_has_to_be_shown_not_worse_by_the_margin(apart: Metric, verdict: Verdict) -> None:
    decision = judged(champion="20260101-0123456789", against_champion=apart)
    assert decision.verdict is verdict
    assert "margin 0.05" in decision.words


def test_below_the_minimum_nothing_is_promoted_however_good_it_looks() -> None:
    better = figure(0.3, 0.2, 0.4)
    for options in ({}, {"champion": "20260101-0123456789", "against_champion": better}):
        decision = judged(smaller=29, **options)
        assert decision.verdict is Verdict.INSUFFICIENT
        assert "29 locked patients" in decision.words
    assert judged(smaller=30).verdict is Verdict.PROMOTE


def test_what_cannot_be_compared_is_not_decided() -> None:
    assert judged(auc=None).verdict is Verdict.INSUFFICIENT
    decision = judged(champion="20260101-0123456789", incomparable="it knows other classes")
    assert decision.verdict is Verdict.INSUFFICIENT
    assert "other classes" in decision.words
