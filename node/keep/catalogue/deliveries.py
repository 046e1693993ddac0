"""Deliveries: one row a result and destination, and every document that left or may have left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, func, insert, literal, or_, select, update

from node.errors import NotFound
from node.keep.catalogue import history, states
from node.keep.catalogue.schema import delivery, document, result, study
from node.keep.database import Database, insert_if_absent
from node.keep.records import Delivery, DeliveryState, Document, Purpose, StudyState

_Deliveries = list[Delivery]


class Deliveries:
    """Results on their way to destinations."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- to be sent --------------------------------------------------------------------------------------------------------

    def open_due(self, *, answers_on: bool, now: datetime) -> int:
        """Write one pending row a destination for every inferred study; nothing while answers are off.

        A destination that has the result already keeps its row; one for which it was given up gets another chance. Call
        `Studies.expire_due` first: what grew too old while answers were off must not leave.
        """
        inferred = and_(study.c.state == StudyState.INFERRED, study.c.purpose == Purpose.ANSWER)
        if not answers_on or not self._database.has(inferred):
            return 0

        def open_due(connection: Connection) -> int:
            found = connection.execute(
                select(study.c.uid, result.c.id, result.c.destinations)
                .join_from(study, result, result.c.id == study.c.result_id)
                .where(inferred)
                .order_by(study.c.last_at)
                .with_for_update(of=study, key_share=True, skip_locked=True)
            ).all()
            for row in found:
                for destination in json.loads(row.destinations):
                    key = {"result_id": row.id, "destination": destination}
                    is_new = insert_if_absent(
                        connection,
                        delivery,
                        **key,
                        study_uid=row.uid,
                        state=DeliveryState.PENDING,
                        attempts=0,
                        created_at=now,
                        reason="",
                        edition=1,
                    )
                    if not is_new:  # the same result once more: a person asked for it, so what was given up is due again
                        dead = and_(delivery.c.state == DeliveryState.DEAD, *(delivery.c[name] == key[name] for name in key))
                        connection.execute(update(delivery).where(dead).values(state=DeliveryState.PENDING, **_fresh(now)))
                states.deliver(connection, row.uid, now=now)
            return len(found)

        return self._database.write(open_due)

    def claim(self, *, claim_s: float, now: datetime, destinations: Sequence[str] | None = None) -> Delivery | None:
        """Take the oldest due row for `claim_s` seconds; the destination that was tried longest ago comes first.

        So a destination that does not answer costs one attempt, and the next one's turn comes before its second.
        """
        free = and_(
            delivery.c.state == DeliveryState.PENDING,
            or_(delivery.c.next_attempt_at.is_(None), states.is_past(delivery.c.next_attempt_at, now)),
            or_(delivery.c.claimed_until.is_(None), states.is_past(delivery.c.claimed_until, now)),
        )
        if destinations is not None:
            free = and_(free, delivery.c.destination.in_(list(destinations)))
        if not self._database.has(free):
            return None
        tried = (
            select(delivery.c.destination, func.max(delivery.c.tried_at).label("at")).group_by(delivery.c.destination).subquery()
        )
        oldest = (
            select(delivery.c.id)
            .join_from(delivery, tried, tried.c.destination == delivery.c.destination)
            .where(free)
            .order_by(tried.c.at.asc().nulls_first(), delivery.c.created_at, delivery.c.id)
            .limit(states.CLAIM_LOOK)
        )

        def claim(connection: Connection) -> Delivery | None:
            values = {"claimed_until": now + timedelta(seconds=claim_s), "tried_at": now, "attempts": delivery.c.attempts + 1}
            for delivery_id in connection.scalars(oldest.with_for_update(of=delivery, key_share=True, skip_locked=True)).all():
                if connection.execute(update(delivery).where(delivery.c.id == delivery_id, free).values(values)).rowcount == 1:
                    return _get(connection, delivery_id)
            return None

        return self._database.write(claim)

    def stamp(self, delivery_id: int, built: Document, *, now: datetime) -> Delivery:
        """Note the document that is about to leave; call it before its first byte does.

        Where this edition has no document yet, or the same one, the row that comes back holds it: send it. Where another one
        was noted, it may have left, so its UIDs are taken: the row that comes back has the next edition and no document. Build
        it anew for that edition, with `documents_before` as predecessors, and stamp again.
        """

        def stamp(connection: Connection) -> Delivery:
            # Locked by itself first: a look that waited for the lock would show the document of before the wait.
            connection.execute(select(delivery.c.id).where(delivery.c.id == delivery_id).with_for_update(key_share=True))
            row = _get(connection, delivery_id)
            if row.document is None:
                connection.execute(
                    insert(document).values(
                        delivery_id=delivery_id,
                        edition=row.edition,
                        sop_class_uid=built.sop_class_uid,
                        sop_uid=built.sop_uid,
                        series_uid=built.series_uid,
                        sha256=built.sha256,
                        stamped_at=now,
                    )
                )
            elif row.document != built:
                connection.execute(update(delivery).where(delivery.c.id == delivery_id).values(edition=row.edition + 1))
            return _get(connection, delivery_id)

        return self._database.write(stamp)

    def documents_before(self, delivery_id: int) -> list[Document]:
        """Give the documents of this study that this destination has or may have, older than this edition, oldest first."""
        with self._database.read() as connection:
            this = _get(connection, delivery_id)
            run = select(result.c.run).where(result.c.id == this.result_id).scalar_subquery()
            earlier = or_(result.c.run < run, and_(delivery.c.id == delivery_id, document.c.edition < this.edition))
            rows = connection.execute(
                select(document)
                .join_from(document, delivery, delivery.c.id == document.c.delivery_id)
                .join(result, result.c.id == delivery.c.result_id)
                .where(delivery.c.study_uid == this.study_uid, delivery.c.destination == this.destination, earlier)
                .order_by(result.c.run, document.c.edition)
            )
            return [Document(row.sop_class_uid, row.sop_uid, row.series_uid, row.sha256) for row in rows]

    # --- what became of it -------------------------------------------------------------------------------------------------

    def sent(self, delivery_id: int, now: datetime) -> None:
        """Close the row: the destination answered success or a warning."""
        first = func.coalesce(delivery.c.sent_at, literal(now, delivery.c.sent_at.type))
        self._change(delivery_id, DeliveryState.SENT, reason="", now=now, only_pending=False, sent_at=first)

    def retry_at(self, delivery_id: int, *, reason: str, next_attempt_at: datetime, now: datetime) -> None:
        """Put the row off until then."""
        self._change(delivery_id, DeliveryState.PENDING, reason=reason, now=now, next_attempt_at=next_attempt_at)

    def hold(self, delivery_id: int, reason: str, now: datetime) -> None:
        """Stop the row until a person decides: the destination names another patient for this study."""
        self._change(delivery_id, DeliveryState.HELD, reason=reason, now=now)

    def kill(self, delivery_id: int, reason: str, now: datetime) -> None:
        """Give the row up until a person revives it."""
        self._change(delivery_id, DeliveryState.DEAD, reason=reason, now=now)

    def kill_unknown(self, destinations: Sequence[str], now: datetime) -> int:
        """Give up what is on its way to a destination that is none any more, for nobody would ever send it; say how many."""
        nobodys = and_(delivery.c.state == DeliveryState.PENDING, delivery.c.destination.not_in(list(destinations)))
        if not self._database.has(nobodys):
            return 0

        def kill(connection: Connection) -> int:
            rows = connection.execute(select(delivery.c.id, delivery.c.study_uid).where(nobodys)).all()
            dead = {"state": DeliveryState.DEAD, "reason": "the settings name no [[pacs]] of this name any more"}
            for row in rows:
                connection.execute(update(delivery).where(delivery.c.id == row.id, nobodys).values(dead))
                states.settle(connection, row.study_uid, now=now)
            return len(rows)

        return self._database.write(kill)

    def revive(self, delivery_id: int | None, now: datetime, *, by: str = "", reason: str = "") -> int:
        """Offer one row, or all that are not sent, again now; say how many. The time to give up counts from now.

        Raises
        ------
        NotFound
            No such delivery.
        """
        stuck = delivery.c.state.in_([DeliveryState.HELD, DeliveryState.DEAD])
        is_free = or_(delivery.c.claimed_until.is_(None), states.is_past(delivery.c.claimed_until, now))
        put_off = and_(delivery.c.state == DeliveryState.PENDING, delivery.c.next_attempt_at > now, is_free)

        def revive(connection: Connection) -> int:
            these = select(delivery.c.id).where(or_(stuck, put_off))
            if delivery_id is not None:
                _get(connection, delivery_id)
                these = these.where(delivery.c.id == delivery_id)
            ids = connection.scalars(these).all()
            for each in ids:
                connection.execute(
                    update(delivery).where(delivery.c.id == each).values(state=DeliveryState.PENDING, **_fresh(now))
                )
                history.note(connection, by=by, what="delivery retried", subject=str(each), reason=reason, now=now)
            return len(ids)

        return self._database.write(revive)

    # --- looking -----------------------------------------------------------------------------------------------------------

    def get(self, delivery_id: int) -> Delivery | None:
        """Give one row; None when it is not known."""
        with self._database.read() as connection:
            row = connection.execute(_select().where(delivery.c.id == delivery_id)).one_or_none()
        return None if row is None else _record(row)

    def list(self, states: Sequence[DeliveryState] | None = None) -> _Deliveries:
        """Give the rows, all or those in `states`, oldest first."""
        query = _select().order_by(delivery.c.id)
        if states is not None:
            query = query.where(delivery.c.state.in_(states))
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(query)]

    def of_study(self, study_uid: str) -> _Deliveries:
        """Give the rows of one study, oldest first."""
        with self._database.read() as connection:
            query = _select().where(delivery.c.study_uid == study_uid).order_by(delivery.c.id)
            return [_record(row) for row in connection.execute(query)]

    def by_state(self) -> dict[DeliveryState, int]:
        """Count the rows of each state, also of those that are empty."""
        with self._database.read() as connection:
            found = connection.execute(select(delivery.c.state, func.count()).group_by(delivery.c.state)).all()
        counts = {DeliveryState(state): count for state, count in found}
        return {state: counts.get(state, 0) for state in DeliveryState}

    def _change(
        self, delivery_id: int, state: DeliveryState, *, reason: str, now: datetime, only_pending: bool = True, **also: Any
    ) -> None:
        """Move a row, let go of its claim, and move its study on in the same breath; what is sent stays sent."""
        where = delivery.c.id == delivery_id
        if only_pending:
            where = and_(where, delivery.c.state == DeliveryState.PENDING)
        values = {"state": state, "reason": reason, "next_attempt_at": None, "claimed_until": None} | also

        def change(connection: Connection) -> None:
            connection.execute(update(delivery).where(where).values(values))
            states.settle(connection, _get(connection, delivery_id).study_uid, now=now)

        self._database.write(change)


def _fresh(now: datetime) -> dict[str, Any]:
    """Give what makes a row due now, with its full time for retries."""
    return {"attempts": 0, "created_at": now, "next_attempt_at": None, "claimed_until": None}


def _select() -> Select[Any]:
    its = and_(document.c.delivery_id == delivery.c.id, document.c.edition == delivery.c.edition)
    return select(
        delivery, document.c.sop_class_uid, document.c.sop_uid, document.c.series_uid, document.c.sha256
    ).outerjoin_from(delivery, document, its)


def _get(connection: Connection, delivery_id: int) -> Delivery:
    row = connection.execute(_select().where(delivery.c.id == delivery_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no delivery {delivery_id}; `osteon delivery list` shows what there is")
    return _record(row)


def _record(row: Row[Any]) -> Delivery:
    return Delivery(
        id=row.id,
        result_id=row.result_id,
        study_uid=row.study_uid,
        destination=row.destination,
        state=DeliveryState(row.state),
        attempts=row.attempts,
        created_at=row.created_at,
        next_attempt_at=row.next_attempt_at,
        claimed_until=row.claimed_until,
        reason=row.reason,
        document=None if row.sha256 is None else Document(row.sop_class_uid, row.sop_uid, row.series_uid, row.sha256),
        edition=row.edition,
        sent_at=row.sent_at,
    )
