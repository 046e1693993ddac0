"""Labels of studies and images, under pseudonyms (docs/design.md, promise 14)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, func, select

from node.errors import BadLabels
from node.keep.catalogue import history
from node.keep.catalogue.patients import is_same_person
from node.keep.catalogue.schema import label, study
from node.keep.database import Database, put_row
from node.keep.records import Label

_FIELDS = [field.name for field in dataclasses.fields(Label)]


class Labels:
    """What readers say of studies and images."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put_all(self, labels: Sequence[Label], *, now: datetime, by: str, reason: str = "") -> int:
        """Keep all the labels or none; say how many are new or changed. A reader's newer word replaces the older one.

        Raises
        ------
        BadLabels
            A label's study is not known, or is another patient's. Nothing is kept.
        """

        def put_all(connection: Connection) -> int:
            changed = 0
            for each in labels:
                known = connection.scalar(select(study.c.pid).where(study.c.uid == each.study_uid))
                if known is None or not is_same_person(connection, known, each.pid):
                    raise BadLabels(f"study {each.study_uid} is not known for this patient; nothing was imported")
                its_place = label.c.study_uid == each.study_uid, label.c.sop_uid == each.sop_uid, label.c.reader == each.reader
                before = connection.execute(select(*(label.c[name] for name in _FIELDS)).where(*its_place)).one_or_none()
                if before is not None and Label(**before._mapping) == each:
                    continue
                put_row(connection, label, **dataclasses.asdict(each), imported_at=now)
                changed += 1
                if before is not None:
                    told = f"{before.label} by {before.reader} on {before.labelled_on} became {each.label} on {each.labelled_on}"
                    history.note(connection, by=by, what="label changed", subject=each.study_uid, reason=told, now=now)
            if changed:
                told = f"{changed} labels" + (f": {reason}" if reason else "")
                history.note(connection, by=by, what="labels imported", subject="labels", reason=told, now=now)
            return changed

        return self._database.write(put_all)

    def all(self) -> list[Label]:
        """Give every label, sorted by study, image and reader."""
        with self._database.read() as connection:
            found = [Label(**row._mapping) for row in connection.execute(select(*(label.c[name] for name in _FIELDS)))]
        return sorted(found, key=lambda one: (one.study_uid, one.sop_uid, one.reader))

    def count_since(self, since: datetime | None) -> int:
        """Count the labels that were imported, or changed, after `since`; all of them without it."""
        query = select(func.count()).select_from(label)
        with self._database.read() as connection:
            return connection.scalar(query if since is None else query.where(label.c.imported_at > since)) or 0
