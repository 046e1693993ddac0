"""Training runs: when, where, and what became of them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Row, insert, select, update

from node.errors import NotFound
from node.keep.catalogue.schema import run
from node.keep.database import Database
from node.keep.records import Run

_Runs = list[Run]


class Runs:
    """The index of training runs; their folders hold the rest."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, kind: str, folder: str, now: datetime) -> int:
        """Enter a run that starts; its number is returned."""
        values = {"kind": kind, "folder": folder, "started_at": now, "outcome": "", "model_id": "", "decision": ""}
        entry = insert(run).values(values).returning(run.c.id)
        return self._database.write(lambda connection: int(connection.scalars(entry).one()))

    def finish(self, run_id: int, *, outcome: str, model_id: str, decision: str, now: datetime) -> None:
        """Enter what became of a run."""
        values = {"finished_at": now, "outcome": outcome, "model_id": model_id, "decision": decision}
        entry = update(run).where(run.c.id == run_id).values(values)
        if self._database.write(lambda connection: connection.execute(entry).rowcount) != 1:
            raise NotFound

    def last(self) -> Run | None:
        """Give the newest run; None when there was none."""
        with self._database.read() as connection:
            row = connection.execute(select(run).order_by(run.c.id.desc()).limit(1)).one_or_none()
        return None if row is None else _record(row)

    def list(self) -> _Runs:
        """Give all runs, the newest first."""
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(select(run).order_by(run.c.id.desc()))]


def _record(row: Row[Any]) -> Run:
    return Run(
        id=row.id,
        kind=row.kind,
        folder=row.folder,
        started_at=row.started_at,
        finished_at=row.finished_at,
        outcome=row.outcome,
        model_id=row.model_id,
        decision=row.decision,
    )
