"""What people did: who, when, what, to what, why. Append only; written in the transaction of the act itself."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, insert, select

from node.keep.catalogue.schema import history
from node.keep.database import Database
from node.keep.records import Act


def note(connection: Connection, *, by: str, what: str, subject: str, reason: str, now: datetime) -> None:
    """Write one line of history."""
    connection.execute(insert(history).values(at=now, by=by, what=what, subject=subject, reason=reason))


class History:
    """The acts of people on this node."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def note(self, *, by: str, what: str, subject: str, reason: str, now: datetime) -> None:
        """Write down an act that changes nothing in the catalogue itself."""
        self._database.write(lambda connection: note(connection, by=by, what=what, subject=subject, reason=reason, now=now))

    def acts(self, *, subject: str = "", limit: int = 100) -> list[Act]:
        """Give the newest acts first, all or those on one subject (a study, a held instance, a delivery, a flag)."""
        query = select(history).order_by(history.c.id.desc()).limit(limit)
        if subject:
            query = query.where(history.c.subject == subject)
        with self._database.read() as connection:
            return [Act(row.at, row.by, row.what, row.subject, row.reason) for row in connection.execute(query)]
