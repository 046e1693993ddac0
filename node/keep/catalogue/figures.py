"""Figures for the metrics: how many of what stand where, each set read in one look."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import func, select

from node.keep.catalogue.schema import delivery, flag, held, instance, run, study
from node.keep.catalogue.studies import OPEN
from node.keep.database import Database
from node.keep.records import (
    AnswerFigures,
    DeliveryFigures,
    DeliveryState,
    Hold,
    Purpose,
    ReceptionFigures,
    RunFigures,
    StudyState,
)

RUNNING = "running"


class Figures:
    """Counts, ages, last times."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def reception(self) -> ReceptionFigures:
        """Count what the archive and the quarantine hold."""
        with self._database.read() as connection:
            images = connection.scalar(select(func.count()).select_from(instance)) or 0
            kept = connection.execute(select(held.c.reason, func.count()).group_by(held.c.reason)).all()
        return ReceptionFigures(images=images, held={Hold(reason): count for reason, count in kept})

    def answers(self) -> AnswerFigures:
        """Say where studies, deliveries and runs stand."""
        waiting = study.c.state.in_(OPEN), study.c.purpose == Purpose.ANSWER
        with self._database.read() as connection:
            states = connection.execute(select(study.c.state, func.count()).group_by(study.c.state)).all()
            oldest = connection.scalar(select(func.min(study.c.last_at)).where(*waiting))
            deliveries = connection.execute(
                select(delivery.c.destination, delivery.c.state, func.count(), func.max(delivery.c.sent_at)).group_by(
                    delivery.c.destination, delivery.c.state
                )
            ).all()
            switch = connection.scalar(select(flag.c.value).where(flag.c.name == "answers"))
            runs = connection.execute(
                select(run.c.kind, run.c.started_at, run.c.finished_at, run.c.outcome, run.c.decision).order_by(run.c.id)
            ).all()
        counts = {StudyState(state): count for state, count in states}
        told = [RunFigures(row.kind, _outcome(row.outcome), row.decision, row.started_at, row.finished_at) for row in runs]
        by_outcome: dict[tuple[str, str], int] = {}
        for one in told:
            by_outcome[one.kind, one.outcome] = by_outcome.get((one.kind, one.outcome), 0) + 1
        return AnswerFigures(
            studies={state: counts.get(state, 0) for state in StudyState},
            oldest_age_s=max(0.0, (datetime.now(UTC) - oldest).total_seconds()) if oldest else 0.0,
            deliveries=tuple(DeliveryFigures(name, DeliveryState(state), count, at) for name, state, count, at in deliveries),
            paused=switch == "paused",
            runs=by_outcome,
            last_runs=tuple({one.kind: one for one in told}.values()),
        )


def _outcome(outcome: str) -> str:
    """Give the word of an outcome; what follows the colon is a sentence for people."""
    return outcome.partition(":")[0] or RUNNING
