"""Figures that stand in the catalogue, as Prometheus metrics: one look a scrape, shared by all scrapes of a few seconds.

In: the catalogue. Out: gauges. A catalogue that does not answer costs its own figures, counted as a scrape error: never the
others, and never more than the wait below.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from time import monotonic
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from node.keep.catalogue import Catalogue
from node.keep.records import AnswerFigures, DeliveryState, Hold, ReceptionFigures, TrainingFigures
from node.metrics.meters import OTHER

T = TypeVar("T")

FRESH_S = 5.0
"""What was read so lately is told again."""
WAIT_S = 3.0
"""How long a scrape waits for the catalogue; Prometheus gives up after 10 s."""


class Figures(Generic[T]):
    """A collector that asks and tells; one question at a time, however many scrape."""

    def __init__(
        self, ask: Callable[[], T], tell: Callable[[T], Iterator[Metric]], *, clock: Callable[[], float] = monotonic
    ) -> None:
        self._ask, self._tell, self._clock = ask, tell, clock
        self._lock = threading.Lock()
        self._asked: Future[T] | None = None
        self._asked_at = 0.0
        self._errors = 0

    def collect(self) -> Iterator[Metric]:
        """Give the figures, or none when the catalogue does not answer in time."""
        try:
            found = self._answer().result(WAIT_S)
        except Exception:  # whatever the store says: the other figures must still be told
            with self._lock:
                self._errors += 1
        else:
            yield from self._tell(found)
        yield CounterMetricFamily(
            "osteon_scrape_errors", "Scrapes for which the catalogue gave no figures in time", value=self._errors
        )

    def _answer(self) -> Future[T]:
        """Give the answer that is fresh or under way, or ask anew."""
        with self._lock:
            if self._asked is not None:
                done = self._asked.done()
                fresh = self._clock() - self._asked_at < FRESH_S
                if not done or (fresh and self._asked.exception() is None):
                    return self._asked
            self._asked, self._asked_at = Future(), self._clock()
            threading.Thread(target=self._fill, args=(self._asked,), name="figures", daemon=True).start()
            return self._asked

    def _fill(self, asked: Future[T]) -> None:
        try:
            asked.set_result(self._ask())
        except BaseException as error:  # handed to whoever waits
            asked.set_exception(error)


def of_reception(catalogue: Catalogue) -> Figures[ReceptionFigures]:
    """Tell what the archive and the quarantine hold."""
    return Figures(catalogue.figures.reception, _tell_reception)


def of_answers(catalogue: Catalogue, *, destinations: Collection[str], answers: bool) -> Figures[AnswerFigures]:
    """Tell where studies, deliveries and runs stand; `answers` is what the settings say of them."""
    return Figures(catalogue.figures.answers, lambda found: _tell_answers(found, destinations, answers=answers))


def of_training(catalogue: Catalogue) -> Figures[TrainingFigures]:
    """Tell where training stands, on a machine that answers nothing."""
    return Figures(catalogue.figures.training, _tell_training)


def _tell_reception(found: ReceptionFigures) -> Iterator[Metric]:
    yield GaugeMetricFamily("osteon_images", "Images in the archive", value=found.images)
    held = GaugeMetricFamily("osteon_quarantine_instances", "Instances in the quarantine", labels=["reason"])
    for reason in Hold:
        held.add_metric([reason], found.held.get(reason, 0))
    yield held


def _tell_answers(found: AnswerFigures, destinations: Collection[str], *, answers: bool) -> Iterator[Metric]:
    studies = GaugeMetricFamily("osteon_studies", "Studies in each state", labels=["state"])
    for state, count in found.studies.items():
        studies.add_metric([state], count)
    yield studies
    oldest = found.oldest_age_s
    yield GaugeMetricFamily(
        "osteon_oldest_study_age_seconds",
        "Seconds since the last image (or request) of the study that waits longest for its answer, 0 when none does",
        value=oldest,
    )
    yield from _tell_deliveries(found, destinations)
    yield GaugeMetricFamily(
        "osteon_answers_on", "1 when results may leave: the settings and the switch say so", value=answers and not found.paused
    )
    yield GaugeMetricFamily(
        "osteon_backup_last_timestamp_seconds",
        "When the newest whole backup was made, 0 when none ever was",
        value=found.backup_at.timestamp() if found.backup_at else 0,
    )
    yield from _tell_training(found.training)


def _tell_deliveries(found: AnswerFigures, destinations: Collection[str]) -> Iterator[Metric]:
    """Tell them by destination; what the settings do not name any more is one destination, `other`."""
    counts = {(name, state): 0 for name in destinations for state in DeliveryState}
    last = dict.fromkeys(destinations, 0.0)
    for one in found.deliveries:
        name = one.destination if one.destination in destinations else OTHER
        counts[name, one.state] = counts.get((name, one.state), 0) + one.count
        if one.last_sent_at is not None:
            last[name] = max(last.get(name, 0.0), one.last_sent_at.timestamp())
    deliveries = GaugeMetricFamily(
        "osteon_deliveries", "Results in each state with a destination", labels=["destination", "state"]
    )
    for (name, state), count in counts.items():
        deliveries.add_metric([name, state], count)
    sent = GaugeMetricFamily(
        "osteon_delivery_last_success_timestamp_seconds",
        "When a destination last took a result, 0 when never",
        labels=["destination"],
    )
    for name, at in last.items():
        sent.add_metric([name], at)
    yield from (deliveries, sent)


def _tell_training(found: TrainingFigures) -> Iterator[Metric]:
    runs = GaugeMetricFamily("osteon_runs", "Runs of the trainer in each state", labels=["kind", "state"])
    begun = GaugeMetricFamily("osteon_run_last_started_timestamp_seconds", "When the newest run of a kind began", labels=["kind"])
    ended = GaugeMetricFamily(
        "osteon_run_last_finished_timestamp_seconds", "When the newest run of a kind ended, 0 while it has not", labels=["kind"]
    )
    last = GaugeMetricFamily(
        "osteon_run_last_info",
        "1: the state of the newest run of a kind that was begun, and what the gate said",
        labels=["kind", "state", "decision"],
    )
    due = GaugeMetricFamily("osteon_schedule_next_timestamp_seconds", "When a schedule is due next", labels=["schedule"])
    for (kind, state), count in found.runs.items():
        runs.add_metric([kind, state], count)
    for one in found.last_runs:
        begun.add_metric([one.kind], one.started_at.timestamp())
        ended.add_metric([one.kind], one.finished_at.timestamp() if one.finished_at else 0)
        last.add_metric([one.kind, one.state, one.decision], 1)
    for name, at in found.next_at.items():
        due.add_metric([name], at.timestamp())
    yield from (runs, begun, ended, last, due)
