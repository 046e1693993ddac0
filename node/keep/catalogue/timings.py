"""How far the due times of each schedule have been dealt with.

In: what a scheduler works out from the settings. Out: the truth that outlives it. A due time is dealt with by one conditional
update, in the transaction that enters its run, so that two schedulers, a restart or a kill make one run of it and not two.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, delete, select, update

from node.keep.catalogue import runs
from node.keep.catalogue.schema import flag, timing
from node.keep.database import Database, insert_if_absent, put_row
from node.keep.records import Timing


class Timings:
    """The memory of the schedules."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def see(self, name: str, definition: str, *, zone: str, named: Collection[str], now: datetime) -> Timing:
        """Make sure that a schedule is known; one of the same definition that the settings name no more hands over its memory."""

        def see(connection: Connection) -> None:
            if connection.scalar(select(timing.c.name).where(timing.c.name == name)) is not None:
                return
            same = select(timing.c.name).where(timing.c.definition == definition, timing.c.name.not_in(named))
            old = connection.scalar(same.order_by(timing.c.name))
            if old is not None:
                connection.execute(update(timing).where(timing.c.name == old).values(name=name))
                runs.rename_schedule(connection, old, name)
                paused = connection.scalar(select(flag.c.value).where(flag.c.name == switch(old)))
                if paused is not None:
                    put_row(connection, flag, name=switch(name), value=paused)
                    connection.execute(delete(flag).where(flag.c.name == switch(old)))
                return
            insert_if_absent(
                connection, timing, name=name, definition=definition, zone=zone, since=now, considered_at=now, said=""
            )

        if self.get(name) is None:
            self._database.write(see)
        found = self.get(name)
        assert found is not None  # noqa: S101 - see() has entered it
        return found

    def change(self, name: str, *, before: str, after: str, zone: str, now: datetime) -> bool:
        """Give a schedule another definition: it counts from now, for what was due before has been dealt with."""
        entry = update(timing).where(timing.c.name == name, timing.c.definition == before)
        values = {"definition": after, "zone": zone, "since": now, "considered_at": now}
        return self._database.write(lambda connection: connection.execute(entry.values(values)).rowcount) == 1

    def queue(self, name: str, *, due_at: datetime, kind: str, recipe: str, now: datetime) -> bool:
        """Deal with a due time by queueing its run; when one of this schedule waits already, that one does for both."""

        def queue(connection: Connection) -> bool:
            waits = runs.waiting(connection, name)
            said = f"run {waits} still waits and does for this time too" if waits is not None else "queued"
            if not _consider(connection, name, due_at, said, now) or waits is not None:
                return False
            return runs.queue(connection, kind=kind, recipe=recipe, schedule=name, due_at=due_at, now=now)

        return self._database.write(queue)

    def skip(self, name: str, *, due_at: datetime, why: str, now: datetime) -> bool:
        """Deal with a due time by passing it over."""
        return self._database.write(lambda connection: _consider(connection, name, due_at, f"passed over: {why}", now))

    def rewind(self, name: str, now: datetime) -> None:
        """Count from now, for the clock was set back by days: what was dealt with lies in a time that is still to come."""
        entry = update(timing).where(timing.c.name == name, timing.c.considered_at > now)
        self._database.write(lambda connection: connection.execute(entry.values(considered_at=now)))

    def plan(self, name: str, next_at: datetime | None) -> None:
        """Say when a schedule is due next; None when no scheduler runs it any more."""
        known = self.get(name)
        if known is not None and known.next_at != next_at:
            entry = update(timing).where(timing.c.name == name).values(next_at=next_at)
            self._database.write(lambda connection: connection.execute(entry))

    def get(self, name: str) -> Timing | None:
        """Give what is known of a schedule; None before a scheduler has seen it."""
        return self.all().get(name)

    def all(self) -> dict[str, Timing]:
        """Give what is known of every schedule, by name."""
        with self._database.read() as connection:
            return {row.name: _record(row) for row in connection.execute(select(timing).order_by(timing.c.name))}


def switch(name: str) -> str:
    """Name the flag that pauses a schedule."""
    return f"schedule {name}"


def _consider(connection: Connection, name: str, due_at: datetime, said: str, now: datetime) -> bool:
    """Note that a due time was dealt with; False when somebody else has done so."""
    entry = update(timing).where(timing.c.name == name, timing.c.considered_at < due_at)
    return connection.execute(entry.values(considered_at=due_at, said=said, said_at=now)).rowcount == 1


def _record(row: Row[Any]) -> Timing:
    return Timing(**row._mapping)
