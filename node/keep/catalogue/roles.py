"""Signs of life of the processes, and the switches that people set while they run."""

from __future__ import annotations

import json
from datetime import datetime, timedelta

from sqlalchemy import Connection, delete, or_, select

from node.keep.catalogue import history
from node.keep.catalogue.schema import flag, role
from node.keep.database import Database, insert_if_absent, put_row
from node.keep.records import Role

FORGET_AFTER = timedelta(minutes=10)
"""A process that was silent for so long is struck out by the next beat of its role on its host: it was restarted."""


class Roles:
    """Processes and switches."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def beat(self, sign: Role) -> None:
        """Leave a sign of life."""

        def beat(connection: Connection) -> None:
            silent = role.c.seen_at < sign.seen_at - FORGET_AFTER
            ahead = role.c.seen_at > sign.seen_at + FORGET_AFTER  # the clock was set back since
            gone = role.c.name == sign.name, role.c.host == sign.host, or_(silent, ahead)
            connection.execute(delete(role).where(*gone))
            told = json.dumps(dict(sign.told), default=str)
            put_row(connection, role, name=sign.name, host=sign.host, pid=sign.pid, seen_at=sign.seen_at, told=told)

        self._database.write(beat)

    def leave(self, name: str, host: str, pid: int) -> None:
        """Strike out a process that ends in good order: it is not silent, it is gone."""
        this = role.c.name == name, role.c.host == host, role.c.pid == pid
        self._database.write(lambda connection: connection.execute(delete(role).where(*this)))

    def all(self) -> list[Role]:
        """Give the last sign of life of each process, by role, the newest first."""
        with self._database.read() as connection:
            rows = connection.execute(select(role).order_by(role.c.name, role.c.seen_at.desc())).all()
        return [Role(row.name, row.host, row.pid, row.seen_at, json.loads(row.told)) for row in rows]

    def flag(self, name: str) -> str | None:
        """Give the value of a switch; None when nobody ever set it."""
        with self._database.read() as connection:
            return connection.scalar(select(flag.c.value).where(flag.c.name == name))

    def remember_flag(self, name: str, value: str) -> None:
        """Note what the node itself found, once; what stands there stays."""
        if self.flag(name) is None:
            self._database.write(lambda connection: insert_if_absent(connection, flag, name=name, value=value))

    def set_flag(self, name: str, value: str, *, by: str, reason: str, now: datetime) -> None:
        """Set a switch; the history keeps who and why."""

        def set_flag(connection: Connection) -> None:
            put_row(connection, flag, name=name, value=value)
            history.note(connection, by=by, what=f"{name}: {value}", subject=name, reason=reason, now=now)

        self._database.write(set_flag)
