"""A new key for vault and quarantine: everything that the old key sealed is sealed with the new one.

In: both keys. Out: stores that the new key alone opens. A kill at any moment leaves every row and file under one of the two keys,
and the mark of an unfinished rotation, which keeps every role from starting until `rotate` has run again. Nothing here may
begin before everything opens with the old key, or seal with a key that is not safe on the disk.

The canary is sealed anew with the mark, before any row: whoever still holds the old key is refused his next write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection, Table, delete, func, select, update

from models.errors import Tampered
from node.errors import BadKey, RotationUnfinished
from node.keep.database import Database, put_row
from node.keep.quarantine import Quarantine
from node.keep.seal import Seal, key_id
from node.keep.vault import CANARY, INSTANCES, META, METADATA, ROTATION, SITE, STUDIES, instance_row, meta_row, pages, study_row

Progress = Callable[[int], None]
"""Told how many rows or files more are done."""


class Rotation:
    """One change of the vault key, begun or to be continued."""

    def __init__(self, vault_url: str, quarantine: Quarantine, *, old: bytes, new: bytes) -> None:
        self._old, self._new = Seal(old), Seal(new)
        if self._old.key_id == self._new.key_id:
            raise BadKey("the new key is the old one: name another place with --new-key")
        self._quarantine = quarantine
        self._database = Database.open(vault_url, METADATA)

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    def __enter__(self) -> Rotation:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def count(self) -> int:
        """Count the rows and files there are to seal."""
        with self._database.read() as connection:
            rows = sum(connection.scalar(select(func.count()).select_from(table)) or 0 for table in (STUDIES, INSTANCES))
        return rows + len(self._quarantine.ids())

    def is_begun(self) -> bool:
        """Say whether a rotation to this new key is under way or through, False when nothing is sealed with it yet.

        Raises
        ------
        RotationUnfinished
            Another rotation is: the two keys are not those it began with.
        BadKey
            The vault opens with neither key.
        """
        with self._database.read() as connection:
            told = {row.name: bytes(row.sealed) for row in connection.execute(select(META))}
        if ROTATION in told:
            if key_id(told[ROTATION]) != self._new.key_id:
                raise RotationUnfinished("a rotation to another key is unfinished: run it again with the --new-key it began with")
            if self._new.open(told[ROTATION], meta_row(ROTATION)) != self._old.key_id:
                raise RotationUnfinished("the rotation began with another old key: name the place of that one with --old-key")
            return True
        sealed_with = key_id(told.get(CANARY, b""))
        if sealed_with not in (self._old.key_id, self._new.key_id):
            raise BadKey("neither key opens this vault: name the place of the key that sealed it with --old-key")
        return sealed_with == self._new.key_id

    def require_all(self, progress: Progress) -> None:
        """Open everything with the old key, before anything is changed.

        Raises
        ------
        Tampered
            With how much does not open. Nothing was changed.
        """
        broken = 0
        for table in (STUDIES, INSTANCES):
            for page in pages(self._database, table):
                for row in page:
                    broken += not _opens(self._old, bytes(row.sealed), _place(table, row))
                    progress(1)
        for held_id in self._quarantine.ids():
            broken += not self._quarantine.opens(held_id)
            progress(1)
        if broken:
            raise Tampered(
                f"{broken} sealed rows or files do not open with the old key; nothing was changed. `osteon vault verify` lists "
                "them: restore them from a backup, or discard those of the quarantine"
            )

    def begin(self) -> None:
        """Leave the mark, and seal the canary with the new key: from here on the old one writes nothing more."""

        def begin(connection: Connection) -> None:
            query = select(META).where(META.c.name.in_([CANARY, SITE]))
            if connection.dialect.name == "postgresql":
                query = query.with_for_update()  # waits for who is writing
            for row in connection.execute(query).all():
                plain = self._old.open(bytes(row.sealed), meta_row(row.name))
                sealed = self._new.seal(plain, meta_row(row.name))
                connection.execute(update(META).where(META.c.name == row.name).values(sealed=sealed))
            put_row(connection, META, name=ROTATION, sealed=self._new.seal(self._old.key_id, meta_row(ROTATION)))

        self._database.write(begin)

    def reseal(self, progress: Progress) -> None:
        """Seal everything with the new key that is not sealed with it yet, a page at a time.

        Raises
        ------
        Tampered, BadKey
            Something opens with neither key.
        """
        for table in (STUDIES, INSTANCES):
            for page in pages(self._database, table):
                old = [row for row in page if key_id(bytes(row.sealed)) != self._new.key_id]
                if old:
                    self._database.write(partial(self._reseal, table, old))
                progress(len(page))
        for held_id in self._quarantine.ids():
            self._quarantine.reseal(held_id, self._new)
            progress(1)

    def finish(self) -> None:
        """Take the mark away: the new key alone opens everything."""
        self._database.write(lambda connection: connection.execute(delete(META).where(META.c.name == ROTATION)))

    def _reseal(self, table: Table, rows: Sequence[Any], connection: Connection) -> None:
        for row in rows:
            place = _place(table, row)
            sealed = self._new.seal(self._old.open(bytes(row.sealed), place), place)
            this = [key == getattr(row, key.name) for key in table.primary_key]
            connection.execute(update(table).where(*this).values(sealed=sealed))


def _place(table: Table, row: Any) -> str:
    return study_row(row.study_uid) if table is STUDIES else instance_row(row.study_uid, row.sop_uid)


def _opens(seal: Seal, sealed: bytes, place: str) -> bool:
    try:
        seal.open(sealed, place)
    except (BadKey, Tampered):
        return False
    return True
