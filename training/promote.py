"""The gate: may this candidate go into service?

In: what candidate, model in service and trivial baselines showed on the locked patients, what the recipes showed out of fold, and
the rules the recipe fixed before the run. Out: one of three decisions and the words for it. Pure: it moves nothing; `cycle` moves
the alias on `promote` alone.
A worse model must never get in, and what the data cannot show must be said and not decided (docs/design.md, promise 11).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from models.card import Metric
from training.recipe import Gate


class Verdict(StrEnum):
    """What the gate says."""

    PROMOTE = "promote"
    """Shown not to be worse by the margin (or, for a first model, better than chance and than the trivial baselines)."""
    REFUSE = "refuse"
    """Shown to be worse (or, for a first model, not better than chance or than a trivial baseline)."""
    INSUFFICIENT = "insufficient evidence"
    """The locked patients cannot show it either way: a person decides."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the locked patients showed, and what the folds did."""

    smaller_class: int
    """Locked patients in the smaller class."""
    auc: Metric | None
    """Of the candidate; None when a class is missing among the locked patients."""
    against_champion: Metric | None
    """Candidate minus model in service; None when there is none or it cannot be compared."""
    champion: str | None
    """The version in service."""
    incomparable: str
    """Why the model in service cannot be compared, empty when it can."""
    against_baselines: Mapping[str, Metric]
    """Candidate minus each trivial baseline."""
    out_of_fold: Metric | None = None
    """The recipe minus that of the model in service, out of fold on the same folds; None when that cannot be said."""
    out_of_fold_why: str = ""
    """Why it cannot be said, empty when it can or was not asked."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict and its reasons, as a person reads them."""

    verdict: Verdict
    words: str


def decide(evidence: Evidence, rules: Gate) -> Decision:
    """Judge one candidate.

    Only locked patients decide. What the folds showed is told to the person who has to, where they cannot.
    """
    decision = _by_locked_patients(evidence, rules)
    told_besides = _by_folds(evidence) if decision.verdict is Verdict.INSUFFICIENT else ""
    return replace(decision, words=f"{decision.words} {told_besides}") if told_besides else decision


def _by_folds(evidence: Evidence) -> str:
    """Say how the recipe did beside that of the model in service, empty when nobody asked."""
    if evidence.out_of_fold is not None:
        return (
            f"Out of fold, on the same folds and seed, AUC of this recipe minus that of the model in service "
            f"({evidence.champion}): {told(evidence.out_of_fold)}; this compares recipes, and promotes nothing by itself."
        )
    if evidence.out_of_fold_why:
        return f"The recipes cannot be compared out of fold: {evidence.out_of_fold_why}."
    return ""


def _by_locked_patients(evidence: Evidence, rules: Gate) -> Decision:
    """Judge by the rules."""
    if evidence.auc is None:
        words = "The locked patients do not hold both an urgent and another class: nothing can be compared."
        return Decision(Verdict.INSUFFICIENT, words)
    if evidence.smaller_class < rules.gate_min:
        against = f", {told(evidence.against_champion)} against the model in service" if evidence.against_champion else ""
        return Decision(
            Verdict.INSUFFICIENT,
            f"{evidence.smaller_class} locked patients in the smaller class; below {rules.gate_min} the gate promotes nothing by "
            f"itself. On them the candidate has an AUC of {told(evidence.auc)}{against}.",
        )
    if evidence.champion is not None:
        return _against_champion(evidence, rules)
    return _first(evidence.auc, evidence.against_baselines)


def _against_champion(evidence: Evidence, rules: Gate) -> Decision:
    """Ask for not being worse by the margin."""
    found = evidence.against_champion
    if found is None:
        return Decision(
            Verdict.INSUFFICIENT, f"The model in service ({evidence.champion}) cannot be compared: {evidence.incomparable}."
        )
    said = f"AUC candidate minus model in service ({evidence.champion}): {told(found)}, margin {rules.margin:g}"
    if found.high < 0:  # by however little: small steps down within the margin would add up
        return Decision(Verdict.REFUSE, f"Worse. {said}.")
    if found.low > -rules.margin:
        return Decision(Verdict.PROMOTE, f"Not worse by the margin. {said}.")
    return Decision(Verdict.INSUFFICIENT, f"It may be worse by more than the margin, and it may not. {said}.")


def _first(auc: Metric, against_baselines: Mapping[str, Metric]) -> Decision:
    """Ask a first model to beat chance and the trivial baselines."""
    said = f"AUC {told(auc)}"
    if auc.low <= 0.5:
        verdict = Verdict.INSUFFICIENT if auc.high > 0.5 else Verdict.REFUSE
        return Decision(verdict, f"Not shown to be better than chance. {said}.")
    unbeaten = {name: found for name, found in against_baselines.items() if found.low <= 0}
    if unbeaten:
        verdict = Verdict.REFUSE if any(found.high <= 0 for found in unbeaten.values()) else Verdict.INSUFFICIENT
        against = "; ".join(f"AUC minus that of {name}: {told(found)}" for name, found in unbeaten.items())
        return Decision(verdict, f"Not shown to be better than what needs no picture. {said}; {against}.")
    return Decision(Verdict.PROMOTE, f"The first model: better than chance and than {' and '.join(against_baselines)}. {said}.")


def told(metric: Metric) -> str:
    """Say a figure in words: value, interval, patients."""
    return f"{metric.value:.3f} ({metric.low:.3f} to {metric.high:.3f}, {metric.n} patients)"
