"""From predictions to the decision: what gets past the gate, and what is said where it cannot tell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from training import evaluate, promote
from training.corpus import Fold
from training.evaluate import CrossValidated, Predictions
from training.promote import Decision, Evidence, Verdict
from training.recipe import Gate

CHAMPION = "20260101-0123456789"
FOLDS = tuple(Fold((f"P{n + 1}",), (f"P{n}",)) for n in range(3))


def pair(urgent: int, others: int, *, lead: float) -> tuple[Predictions, Predictions]:
    """Give candidate and model in service on the same patients; the candidate's classes are `lead` further apart."""
    generator = np.random.default_rng(1)
    truth = np.array([0] * urgent + [1] * others)
    shared, own = generator.normal(size=len(truth)), 0.3 * generator.normal(size=(2, len(truth)))
    return said(shared + own[0] + (1.6 + lead) * (truth == 0), truth), said(shared + own[1] + 1.6 * (truth == 0), truth)


def said(logit: np.ndarray, truth: np.ndarray) -> Predictions:
    return Predictions(
        studies=tuple(f"2.25.{row}" for row in range(len(truth))),
        patients=tuple(f"P{row}" for row in range(len(truth))),
        truth=truth.astype(np.int64),
        probabilities=evaluate.softmax(np.stack([logit, np.zeros(len(truth))], axis=1)),
        urgent=(0,),
    )


def judged(candidate: Predictions, champion: Predictions, **options: object) -> Decision:
    evidence: dict[str, object] = {
        "smaller_class": candidate.smaller_class(),
        "auc": evaluate.auc_with_interval(candidate, "locked patients", seed=2),
        "against_champion": evaluate.difference(candidate, champion, "difference", seed=2),
        "champion": CHAMPION,
        "incomparable": "",
        "against_baselines": {},
    }
    return promote.decide(Evidence(**(evidence | options)), Gate())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lead", "verdict"),
    [(-1.2, Verdict.REFUSE), (0.0, Verdict.PROMOTE), (1.2, Verdict.PROMOTE)],
    ids=["worse", "equal", "better"],
)
def test_with_enough_patients_a_worse_candidate_is_refused_and_a_better_one_accepted(lead: float, verdict: Verdict) -> None:
    assert judged(*pair(300, 200, lead=lead)).verdict is verdict


@pytest.mark.parametrize("lead", [-1.2, 0.0, 1.2], ids=["worse", "equal", "better"])
def test_too_few_patients_are_insufficient_evidence_whatever_they_seem_to_show(lead: float) -> None:
    decision = judged(*pair(41, 22, lead=lead))
    assert decision.verdict is Verdict.INSUFFICIENT
    assert "22 locked patients" in decision.words


def cross_validated(predictions: Predictions) -> CrossValidated:
    return CrossValidated(predictions, ("ewing_sarcoma", "acute_osteomyelitis"), FOLDS, seed=7, labels="3f2a")


def test_who_decides_in_place_of_the_gate_is_told_what_the_folds_showed() -> None:
    better, in_service = pair(100, 60, lead=1.2)
    found, why = evaluate.out_of_fold_difference(cross_validated(better), cross_validated(in_service), "out of fold", seed=3)
    assert (found is not None, why) == (True, "")
    decision = judged(*pair(20, 11, lead=0), out_of_fold=found)
    assert decision.verdict is Verdict.INSUFFICIENT  # however clear the folds are
    assert promote.told(found) in decision.words  # type: ignore[arg-type]
    assert "promotes nothing by itself" in decision.words
    assert "folds" not in judged(*pair(300, 200, lead=1.2), out_of_fold=found).words  # there the locked patients decided


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"folds": FOLDS[:2]}, "folds"),
        ({"seed": 8}, "seeds"),
        ({"classes": ("acute_osteomyelitis", "ewing_sarcoma")}, "classes"),
        ({"predictions": pair(100, 61, lead=0)[1]}, "images"),
        ({"labels": "3f2b"}, "labels"),
    ],
)
def test_recipes_are_compared_on_the_same_ground_only_and_the_reason_is_said(other: dict[str, object], why: str) -> None:
    ours, theirs = (cross_validated(one) for one in pair(100, 60, lead=1.2))
    found, reason = evaluate.out_of_fold_difference(ours, replace(theirs, **other), "out of fold", seed=3)  # type: ignore[arg-type]
    assert found is None
    assert why in reason
    assert reason in judged(*pair(20, 11, lead=0), out_of_fold_why=reason).words
