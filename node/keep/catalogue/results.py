"""Results: findings as they were first written, one a (study content, model, settings)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, exists, select, update

from node.errors import StoreBusy
from node.keep.catalogue import states
from node.keep.catalogue.schema import document, result
from node.keep.database import Database, insert_if_absent
from node.keep.records import Findings, Result


class Results:
    """Findings of studies."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(
        self,
        study_uid: str,
        findings: Findings,
        *,
        content_digest: str,
        settings_digest: str,
        destinations: Sequence[str],
        now: datetime,
    ) -> Result:
        """Keep the findings of a claimed study and move it to `inferred`; without destinations, to `delivered`.

        The same content, model and settings give the result that is there, as it was first written: a repeat changes nothing,
        but a destination that is new gets the result too.
        """
        same = (
            result.c.study_uid == study_uid,
            result.c.content_digest == content_digest,
            result.c.model_id == findings.model_id,
            result.c.settings_digest == settings_digest,
        )

        def put(connection: Connection) -> Result:
            told = json.dumps(list(destinations))
            before = connection.execute(
                select(result.c.id, result.c.run).where(result.c.study_uid == study_uid).order_by(result.c.run.desc()).limit(1)
            ).one_or_none()
            new = insert_if_absent(
                connection,
                result,
                study_uid=study_uid,
                model_id=findings.model_id,
                content_digest=content_digest,
                settings_digest=settings_digest,
                findings=findings.to_json(),
                created_at=now,
                run=before.run + 1 if before else 1,
                predecessor=before.id if before else None,
                destinations=told,
            )
            row = connection.execute(select(result).where(*same)).one_or_none()
            if row is None:
                raise StoreBusy("another replier wrote another result of this study at this moment")
            if not new:
                connection.execute(update(result).where(result.c.id == row.id).values(destinations=told))
            states.classified(connection, study_uid, row.id, now=now)
            return _record(row)

        return self._database.write(put)

    def get(self, result_id: int) -> Result | None:
        """Give one result; None when it is not known."""
        with self._database.read() as connection:
            row = connection.execute(select(result).where(result.c.id == result_id)).one_or_none()
        return None if row is None else _record(row)

    def of_study(self, study_uid: str) -> list[Result]:
        """Give the results of a study, the first one first."""
        with self._database.read() as connection:
            query = select(result).where(result.c.study_uid == study_uid).order_by(result.c.run)
            return [_record(row) for row in connection.execute(query)]

    def latest(self, study_uid: str) -> Result | None:
        """Give the newest result of a study; None when there is none."""
        return next(reversed(self.of_study(study_uid)), None)

    def models(self) -> list[str]:
        """Name every model version that has answered a study, sorted."""
        with self._database.read() as connection:
            return sorted(connection.scalars(select(result.c.model_id).distinct()))

    def is_ours(self, original_sop_uid: str) -> bool:
        """Say whether a SOP Instance UID is one that this node ever gave a document."""
        with self._database.read() as connection:
            return bool(connection.scalar(select(exists().where(document.c.sop_uid == original_sop_uid))))


def _record(row: Row[Any]) -> Result:
    return Result(
        id=row.id,
        study_uid=row.study_uid,
        model_id=row.model_id,
        content_digest=row.content_digest,
        settings_digest=row.settings_digest,
        findings=Findings.from_json(row.findings),
        created_at=row.created_at,
        run=row.run,
        predecessor=row.predecessor,
    )
