"""How often the gate errs, by simulation: `make bench-gate` prints the tables of docs/gate.md.

In: nothing; every seed is fixed. Out: tables on the terminal. The decisions are those of the product (`evaluate.difference`,
`evaluate.auc_with_interval`, `promote.decide` with the recipe's defaults); only the predictions are invented. They are binormal:
a model's score of a patient is N(0, 1), plus what separates the classes by the wanted AUC when the patient is of the urgent
class. Two models' scores of one patient correlate within the class. Every patient has one study.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from statistics import NormalDist
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from models.card import Metric
from training import evaluate
from training.evaluate import Predictions
from training.promote import Evidence, Verdict, decide
from training.recipe import Gate

SIZES = ((4, 2), (10, 6), (20, 11), (41, 22), (60, 30), (100, 60), (300, 200))
"""Locked patients of the urgent class and others."""
SERVICE_AUC = 0.88
BASELINE_AUC = 0.65
DIFFERENCES = (0.03, 0.0, -0.02, -0.05, -0.10)
"""True AUC of the candidate minus that of the model in service."""
CORRELATION = 0.7
CORRELATIONS = (0.3, 0.5, 0.7, 0.9)
FIRST = (0.5, 0.7, 0.88)
"""True AUC of a first candidate."""
REPEATED = (0.0, -0.02, -0.05)
LOOKS = (1, 5, 10, 20)
STEPS = (0.01, 0.02, 0.05)
REPEATS = 1000
CHAINS = 100
BOOTSTRAP_SEEDS = 8
RULES = Gate()
NO_MINIMUM = replace(RULES, gate_min=0)

Floats = NDArray[np.float64]
Size = tuple[int, int]
T = TypeVar("T")


def main() -> None:
    """Print all tables, with as many processes as there are cores."""
    began = time.monotonic()
    print(
        f"AUC of the model in service {SERVICE_AUC}, margin {RULES.margin}, alpha {RULES.alpha}, minimum {RULES.gate_min}, "
        f"{RULES.draws} resamplings, {REPEATS} simulated sites a cell, correlation {CORRELATION} within the class\n"
    )
    with ProcessPoolExecutor(initializer=_prepare) as pool:
        for table in (against_champion, by_correlation, first_champion, repeated_looks, steps_down):
            table(pool)
    spent = sum(os.times()[:4])
    print(f"\n{time.monotonic() - began:.0f} s; processor time {spent:.0f} s, {os.cpu_count()} cores")


def against_champion(pool: Executor) -> None:
    """Shares of the three decisions on one candidate, by size and true difference, without and with the minimum."""
    print("Promote / refuse / insufficient evidence, %, by the true difference; last what the minimum makes of the row\n")
    _head("locked patients", *(f"{apart:+.2f}" for apart in DIFFERENCES), "with the minimum")
    for size, cells in _rows(pool, _judged, SIZES, DIFFERENCES):
        ruled = "the same" if all(free == ruled for free, ruled in cells) else " or ".join({ruled for _, ruled in cells})
        _row(_name(size), *(free for free, _ in cells), ruled)


def _judged(size: Size, apart: float) -> tuple[str, str]:
    free, ruled = Counter[Verdict](), Counter[Verdict]()
    for candidate, service in _sites(size, (SERVICE_AUC + apart, SERVICE_AUC), CORRELATION, REPEATS):
        evidence = _against(candidate, service)
        free[decide(evidence, NO_MINIMUM).verdict] += 1
        ruled[decide(evidence, RULES).verdict] += 1
    return _shares(free), _shares(ruled)


def by_correlation(pool: Executor) -> None:
    """How the share of equal candidates that pass hangs on the likeness of the two models."""
    print("\nEqual candidates that are promoted without the minimum, %, by the correlation of the two scores\n")
    _head("locked patients", *CORRELATIONS)
    for size, cells in _rows(pool, _equal_promoted, SIZES, CORRELATIONS):
        _row(_name(size), *cells)


def _equal_promoted(size: Size, correlation: float) -> str:
    return _percent(_promoted(*pair) for pair in _sites(size, (SERVICE_AUC, SERVICE_AUC), correlation, REPEATS))


def first_champion(pool: Executor) -> None:
    """Shares of the three decisions on a first model, beside a baseline whose score is independent within the class."""
    print(
        f"\nA first model beside a trivial baseline of AUC {BASELINE_AUC}, by its true AUC: "
        "promote / refuse / insufficient evidence, %, without the minimum\n"
    )
    _head("locked patients", *(f"{auc:.2f}" for auc in FIRST))
    for size, cells in _rows(pool, _judged_first, SIZES, FIRST):
        _row(_name(size), *cells)


def _judged_first(size: Size, auc: float) -> str:
    sites = _sites(size, (auc, BASELINE_AUC), 0.0, REPEATS)
    return _shares(Counter(decide(_first(*pair), NO_MINIMUM).verdict for pair in sites))


def repeated_looks(pool: Executor) -> None:
    """How often one of many candidates is promoted over one model, all judged on the same locked patients."""
    print(
        f"\nAt least one of so many candidates is promoted over the same model on the same locked patients, % ({CHAINS} sites)\n"
    )
    _head("locked patients", "true difference of each", *LOOKS)
    for size, cells in _rows(pool, _promoted_once, SIZES[4:], REPEATED):
        for apart, shares in zip(REPEATED, cells, strict=True):
            _row(_name(size), f"{apart:+.2f}", *shares)


def _promoted_once(size: Size, apart: float) -> list[str]:
    aucs = (SERVICE_AUC, *[SERVICE_AUC + apart] * LOOKS[-1])
    firsts = [
        next((look for look, one in enumerate(candidates, start=1) if _promoted(one, service)), LOOKS[-1] + 1)
        for service, *candidates in _sites(size, aucs, CORRELATION, CHAINS)
    ]
    return [_percent(first <= count for first in firsts) for count in LOOKS]


def steps_down(pool: Executor) -> None:
    """What is lost when each candidate is truly a step worse than the model in service, and takes its place when promoted."""
    print(
        f"\n{LOOKS[-1]} candidates, each truly a step below the model in service, which it replaces when promoted "
        f"({CHAINS} sites)\n"
    )
    _head("locked patients", "step", "true AUC lost, mean", "most", "lost more than the margin, %")
    for size, cells in _rows(pool, _lost, SIZES[4:], STEPS):
        for step, lost in zip(STEPS, cells, strict=True):
            _row(_name(size), step, f"{lost.mean():.3f}", f"{lost.max():.2f}", _percent(lost > RULES.margin + 1e-9))


def _lost(size: Size, step: float) -> Floats:
    return np.array([_lost_at(size, step, seed) for seed in range(CHAINS)])


def _lost_at(size: Size, step: float, seed: int) -> float:
    """Follow one site and give the true AUC it ends below its start."""
    generator = np.random.default_rng((seed, *size))
    common = generator.normal(size=sum(size))
    auc = SERVICE_AUC
    service = _predictions(size, _score(generator, common, size, auc, CORRELATION))
    for _ in range(LOOKS[-1]):
        candidate = _predictions(size, _score(generator, common, size, auc - step, CORRELATION))
        if _promoted(candidate, service):
            service, auc = candidate, auc - step
    return SERVICE_AUC - auc


# Invented sites ------------------------------------------------------------------------------------------------------------


def _sites(size: Size, aucs: Sequence[float], correlation: float, count: int) -> Iterable[list[Predictions]]:
    """Give what models of these true AUCs say of the locked patients of so many sites."""
    for seed in range(count):
        generator = np.random.default_rng((seed, *size))
        common = generator.normal(size=sum(size))
        yield [_predictions(size, _score(generator, common, size, auc, correlation)) for auc in aucs]


def _score(generator: np.random.Generator, common: Floats, size: Size, auc: float, correlation: float) -> Floats:
    urgent = np.arange(sum(size)) < size[0]
    own = generator.normal(size=sum(size))
    apart = np.sqrt(2) * NormalDist().inv_cdf(auc)
    return np.asarray(np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own + apart * urgent)


def _predictions(size: Size, score: Floats) -> Predictions:
    likely = 1 / (1 + np.exp(-score))
    names = _names(sum(size))
    truth = (np.arange(sum(size)) >= size[0]).astype(np.int64)
    return Predictions(names, names, truth, np.stack([likely, 1 - likely], axis=1), (0,))


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"P{number}" for number in range(count))


# Decisions -----------------------------------------------------------------------------------------------------------------


def _against(candidate: Predictions, service: Predictions) -> Evidence:
    """Give what the gate sees of a candidate beside a model in service; the rule quotes the candidate's own AUC only."""
    value = evaluate.auc(candidate.positive, candidate.score)
    own = Metric("AUC", value, value, value, len(candidate.patients))
    return Evidence(candidate.smaller_class(), own, _difference(candidate, service), "in service", "", {})


def _first(candidate: Predictions, baseline: Predictions) -> Evidence:
    own = evaluate.auc_with_interval(candidate, "", seed=_seed(candidate), draws=RULES.draws, alpha=RULES.alpha)
    return Evidence(candidate.smaller_class(), own, None, None, "", {"age and sex": _difference(candidate, baseline)})


def _difference(candidate: Predictions, other: Predictions) -> Metric:
    found = evaluate.difference(candidate, other, "", seed=_seed(candidate), draws=RULES.draws, alpha=RULES.alpha)
    assert found is not None
    return found


def _promoted(candidate: Predictions, service: Predictions) -> bool:
    return decide(_against(candidate, service), NO_MINIMUM).verdict is Verdict.PROMOTE


def _seed(candidate: Predictions) -> int:
    """Give one of a few seeds of the bootstrap, so that no table hangs on the luck of one."""
    return int(candidate.score[0] * 1e9) % BOOTSTRAP_SEEDS


def _prepare() -> None:
    """Make a process fast: one thread; bootstrap weights, which hang on size and seed alone, are drawn once for each."""
    threadpool_limits(1)
    real: Callable[..., Floats] = evaluate.resample
    drawn: dict[tuple[int, int, int, int], Floats] = {}

    def remembered(predictions: Predictions, *, seed: int, draws: int) -> Floats:
        key = (len(predictions.truth), int(predictions.positive.sum()), seed, draws)
        if key not in drawn:
            drawn[key] = real(predictions, seed=seed, draws=draws)
        return drawn[key]

    evaluate.resample = remembered


# The terminal --------------------------------------------------------------------------------------------------------------


def _rows(
    pool: Executor, cell: Callable[[Size, float], T], sizes: Sequence[Size], columns: Sequence[float]
) -> Iterable[tuple[Size, list[T]]]:
    """Work out a table, row by row."""
    waiting = {size: [pool.submit(cell, size, column) for column in columns] for size in reversed(sizes)}  # the longest first
    for size in sizes:
        yield size, [one.result() for one in waiting[size]]


def _head(*cells: object) -> None:
    _row(*cells)
    _row(*["---"] * len(cells))


def _row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def _name(size: Size) -> str:
    return f"{size[0]} + {size[1]}"


def _shares(found: Counter[Verdict]) -> str:
    return " / ".join(f"{100 * found[verdict] / found.total():.0f}" for verdict in Verdict)


def _percent(hits: Iterable[bool]) -> str:
    return f"{100 * np.mean(list(hits)):.0f}"


if __name__ == "__main__":
    main()
