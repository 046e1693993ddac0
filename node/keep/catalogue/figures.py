"""Figures for the metrics: how many of what stand where, each set read in one look."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import func, select

from node.keep.catalogue.schema import delivery, flag, held, instance, run, study, timing
from node.keep.catalogue.studies import OPEN
from node.keep.database import Database
from node.keep.records import (
    LAST_BACKUP,
    AnswerFigures,
    DeliveryFigures,
    DeliveryState,
    Hold,
    Purpose,
    ReceptionFigures,
    RunFigures,
    RunState,
    StudyState,
    TrainingFigures,
)


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
            backup = connection.scalar(select(flag.c.value).where(flag.c.name == LAST_BACKUP))
        counts = {StudyState(state): count for state, count in states}
        return AnswerFigures(
            studies={state: counts.get(state, 0) for state in StudyState},
            oldest_age_s=max(0.0, (datetime.now(UTC) - oldest).total_seconds()) if oldest else 0.0,
            deliveries=tuple(DeliveryFigures(name, DeliveryState(state), count, at) for name, state, count, at in deliveries),
            paused=switch == "paused",
            backup_at=datetime.fromisoformat(backup.split()[0]) if backup else None,
            training=self.training(),
        )

    def training(self) -> TrainingFigures:
        """Say where training stands."""
        with self._database.read() as connection:
            counts = connection.execute(select(run.c.kind, run.c.state, func.count()).group_by(run.c.kind, run.c.state)).all()
            newest = select(func.max(run.c.id)).where(run.c.started_at.is_not(None)).group_by(run.c.kind)
            last = connection.execute(select(run).where(run.c.id.in_(newest))).all()
            due = connection.execute(select(timing.c.name, timing.c.next_at).where(timing.c.next_at.is_not(None))).all()
        return TrainingFigures(
            runs={(kind, RunState(state)): count for kind, state, count in counts},
            last_runs=tuple(
                RunFigures(row.kind, RunState(row.state), row.decision, row.started_at, row.finished_at) for row in last
            ),
            next_at={row.name: row.next_at for row in due},
        )
