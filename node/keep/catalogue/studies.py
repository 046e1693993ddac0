"""Studies: what is known of them, and the moves of their state (each written in `states.py`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, exists, func, or_, select, update

from node.keep.catalogue import history, states
from node.keep.catalogue.patients import PERSONS_LOCK, free, person
from node.keep.catalogue.schema import delivery, held, instance, patient, study
from node.keep.catalogue.schema import history as acts
from node.keep.database import Database, insert_if_absent, one_at_a_time
from node.keep.records import DeliveryState, Purpose, Study, StudyState

OPEN = (
    StudyState.RECEIVING,
    StudyState.COMPLETE,
    StudyState.INFERRING,
    StudyState.INFERRED,
    StudyState.DELIVERING,
    StudyState.WAITING,
    StudyState.FAILED,
)
"""On their way to an answer."""
REOPENED = "study reopened"
"""In the history: a person asked for an answer."""


class Studies:
    """Studies and their states."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- looking -----------------------------------------------------------------------------------------------------------

    def get(self, uid: str) -> Study | None:
        """Give one study; None when it is not known."""
        with self._database.read() as connection:
            return _get(connection, uid)

    def find(self, *, uid: str = "", accession_keys: Sequence[str] = ()) -> list[Study]:
        """Give the studies that a pseudonymous study, series or SOP UID means, or a keyed hash of accession number or study ID.

        Held instances are found too. Without any argument nothing is found.
        """
        keys = [key for key in accession_keys if key]
        hits: list[ColumnElement[bool]] = []
        if uid:
            is_image = instance.c.study_uid == study.c.uid, or_(instance.c.series_uid == uid, instance.c.sop_uid == uid)
            is_held = held.c.study_uid == study.c.uid, held.c.sop_uid == uid
            hits += [study.c.uid == uid, exists().where(*is_image), exists().where(*is_held)]
        if keys:
            has_key = or_(instance.c.accession_key.in_(keys), instance.c.study_id_key.in_(keys))
            hits.append(exists().where(instance.c.study_uid == study.c.uid, has_key))
        if not hits:
            return []
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(_select().where(or_(*hits)).order_by(study.c.first_at))]

    def uids(self) -> list[str]:
        """Name every study, sorted."""
        with self._database.read() as connection:
            return list(connection.scalars(select(study.c.uid).order_by(study.c.uid)))

    def remark(self, reason: str, uids: Collection[str]) -> None:
        """Let exactly these studies carry `reason`, where they have no other to tell; their states stay as they are."""

        def remark(connection: Connection) -> None:
            for uid in set(connection.scalars(select(study.c.uid).where(study.c.reason == reason))) - set(uids):
                connection.execute(update(study).where(study.c.uid == uid).values(reason=""))
            for uid in sorted(uids):
                connection.execute(update(study).where(study.c.uid == uid, study.c.reason == "").values(reason=reason))

        self._database.write(remark)

    def by_state(self) -> dict[StudyState, int]:
        """Count the studies of each state, also of those that are empty."""
        with self._database.read() as connection:
            found = connection.execute(select(study.c.state, func.count()).group_by(study.c.state)).all()
        counts = {StudyState(state): count for state, count in found}
        return {state: counts.get(state, 0) for state in StudyState}

    def count_since(self, since: datetime | None) -> int:
        """Count the studies that first came after `since`; all of them without it."""
        query = select(func.count()).select_from(study)
        with self._database.read() as connection:
            return connection.scalar(query if since is None else query.where(study.c.first_at > since)) or 0

    def oldest_open(self) -> Study | None:
        """Give the study that has waited longest on its way to an answer."""
        waiting = study.c.state.in_(OPEN), study.c.purpose == Purpose.ANSWER
        with self._database.read() as connection:
            row = connection.execute(_select().where(*waiting).order_by(study.c.last_at, study.c.uid).limit(1)).one_or_none()
        return None if row is None else _record(row)

    def asked_at(self, uid: str) -> datetime | None:
        """Say since when a study wants its answer: its first image of this round, or a person's later request."""
        requests = select(func.max(acts.c.at)).where(acts.c.what == REOPENED, acts.c.subject == uid)
        with self._database.read() as connection:
            times = connection.scalar(select(study.c.round_at).where(study.c.uid == uid)), connection.scalar(requests)
        return max((at for at in times if at is not None), default=None)

    def recent_errors(self, limit: int = 10) -> list[tuple[datetime, str, str]]:
        """Give (when, study UID, why) of studies and deliveries that did not go on, newest first."""
        stuck = [DeliveryState.HELD, DeliveryState.DEAD]
        at = func.coalesce(delivery.c.tried_at, delivery.c.created_at, type_=delivery.c.tried_at.type)
        of_studies = select(study.c.state_at, study.c.uid, study.c.reason).where(
            study.c.reason != "", study.c.state.not_in([StudyState.RECEIVING, StudyState.REMOVED])
        )
        of_deliveries = select(at.label("at"), delivery.c.study_uid, delivery.c.destination, delivery.c.reason).where(
            or_(delivery.c.state.in_(stuck), delivery.c.reason != "")
        )
        with self._database.read() as connection:
            found = [
                (row.state_at, row.uid, row.reason)
                for row in connection.execute(of_studies.order_by(study.c.state_at.desc()).limit(limit))
            ]
            found += [
                (row.at, row.study_uid, f"{row.destination}: {row.reason}")
                for row in connection.execute(of_deliveries.order_by(at.desc()).limit(limit))
            ]
        return sorted(found, reverse=True)[:limit]

    def content(self, uid: str) -> str:
        """Digest what the study consists of: the sorted UIDs of its images and of those held that surely belong to it.

        A study that was given to another patient is another one from then on, though its images are the same.

        Read it before the images: what comes in between then makes another content, never a lost one.
        """
        with self._database.read() as connection:
            return states.content(connection, uid)

    # --- moving ------------------------------------------------------------------------------------------------------------

    def complete_due(self, *, quiet_s: float, max_wait_s: float, now: datetime) -> list[tuple[str, StudyState]]:
        """Move on every study that was quiet for `quiet_s`, or whose first image of this round is `max_wait_s` old.

        To `complete` (to be answered, also when the modality alone holds every image), `learned`, or `quarantined`. Gives the UID
        and the new state of each.
        """
        due = states.is_due_to_complete(quiet_s=quiet_s, max_wait_s=max_wait_s, now=now)
        if not self._database.has(due):
            return []
        return self._database.write(lambda connection: states.complete(connection, due, now=now))

    def expire_due(self, *, answer_within_h: float, now: datetime) -> list[str]:
        """Expire what waits for its answer longer than that, counted from the last image or request; call it before claiming.

        Gives the UIDs.
        """
        due = states.is_due_to_expire(answer_within_h=answer_within_h, now=now)
        if not self._database.has(due):
            return []
        return self._database.write(lambda connection: states.expire(connection, due, now=now))

    def wake_waiting(self, now: datetime) -> int:
        """Queue the studies that waited for a model."""
        waiting = study.c.state == StudyState.WAITING
        if not self._database.has(waiting):
            return 0

        def wake(connection: Connection) -> int:
            uids = connection.scalars(select(study.c.uid).where(waiting)).all()
            return sum(states.change(connection, uid, StudyState.COMPLETE, now=now, where=waiting) for uid in uids)

        return self._database.write(wake)

    def claim(self, *, claim_s: float, now: datetime) -> Study | None:
        """Take the oldest study that is to be classified; nobody else gets it before `claim_s` seconds are over."""
        if not self._database.has(states.is_claimable(now)):
            return None

        def claim(connection: Connection) -> Study | None:
            uid = states.claim(connection, claim_s=claim_s, now=now)
            return None if uid is None else _get(connection, uid)

        return self._database.write(claim)

    def wait_for_model(self, uid: str, *, now: datetime) -> None:
        """Give a claimed study back until a model is in service."""
        self._database.write(lambda connection: states.stop_inferring(connection, uid, StudyState.WAITING, now=now))

    def fail(self, uid: str, *, reason: str, next_attempt_at: datetime | None, now: datetime) -> None:
        """Give a claimed study back because a step failed; without a next attempt only a person or a new image starts it."""
        self._database.write(
            lambda connection: states.stop_inferring(
                connection, uid, StudyState.FAILED, now=now, reason=reason, next_attempt_at=next_attempt_at
            )
        )

    def take_for_removal(self, keep: Mapping[Purpose, timedelta], *, now: datetime, limit: int) -> list[str]:
        """Mark studies that were kept for long enough as `removed`; those whose removal was cut short are given again."""
        cut_short = and_(study.c.state == StudyState.REMOVED, study.c.next_attempt_at.is_not(None))
        due = states.is_due_to_remove(keep, now=now) if keep else None
        if not self._database.has(cut_short if due is None else or_(cut_short, due)):
            return []
        return self._database.write(lambda connection: states.take_for_removal(connection, due, now=now, limit=limit))

    def removed(self, uid: str, *, now: datetime) -> None:
        """Note that images and identity of a study are gone; what is left of it is its row, with results and labels."""

        def removed(connection: Connection) -> None:
            states.removed(connection, uid, now=now)
            history.note(connection, by="retention", what="study removed", subject=uid, reason="[storage.keep_days]", now=now)

        self._database.write(removed)

    def reopen(self, uid: str, *, now: datetime, by: str = "", reason: str = "") -> None:
        """Queue a study for an answer by hand, whatever its age.

        Raises
        ------
        NotFound
            No such study.
        NotToBeAnswered
            It was sent to be learned from, or every image of it is in the quarantine for more than its modality.
        """

        def reopen(connection: Connection) -> None:
            states.reopen(connection, uid, now=now)
            history.note(connection, by=by, what=REOPENED, subject=uid, reason=reason, now=now)

        self._database.write(reopen)

    def reassign(self, uid: str, pid: str, *, locked: bool, named_by: str, by: str, reason: str, now: datetime) -> None:
        """Enter a study and its images under another patient, because it was sent under a wrong one. No file moves.

        A study that was answered, or is being, gets a round of its own for the patient whose it is. A study of this patient
        stays as it is.

        Parameters
        ----------
        locked
            Whether the patient belongs to the locked set, should it never have been seen before.
        named_by
            The frozen corpora that name the earlier patient, "" for none: the images may have trained, so the later one leaves
            the locked set.
        """

        def reassign(connection: Connection) -> None:
            one_at_a_time(connection, PERSONS_LOCK)
            before = connection.scalar(select(study.c.pid).where(study.c.uid == uid).with_for_update(key_share=True))
            if before == pid:
                return
            insert_if_absent(connection, patient, pid=pid, person=pid, locked=locked, first_at=now)
            connection.execute(update(study).where(study.c.uid == uid).values(pid=pid))
            connection.execute(update(instance).where(instance.c.study_uid == uid).values(pid=pid))
            told = f"from {before} to {pid}: {reason}"
            for subject in (uid, str(before), pid):
                history.note(connection, by=by, what=states.GIVEN, subject=subject, reason=told, now=now)
            free(connection, person(connection, pid).pseudonyms, named_by=named_by, by=by, now=now)
            states.given(connection, uid, now=now)

        self._database.write(reassign)


def _select() -> Select[Any]:
    images = select(func.count()).where(instance.c.study_uid == study.c.uid).scalar_subquery()
    return select(study, patient.c.locked, images.label("instances")).outerjoin_from(study, patient, patient.c.pid == study.c.pid)


def _get(connection: Connection, uid: str) -> Study | None:
    row = connection.execute(_select().where(study.c.uid == uid)).one_or_none()
    return None if row is None else _record(row)


def _record(row: Row[Any]) -> Study:
    return Study(
        uid=row.uid,
        pid=row.pid,
        state=StudyState(row.state),
        purpose=Purpose(row.purpose),
        calling_ae=row.calling_ae,
        first_at=row.first_at,
        last_at=row.last_at,
        instances=row.instances,
        late=row.late,
        attempts=row.attempts,
        next_attempt_at=row.next_attempt_at,
        claimed_until=row.claimed_until,
        reason=row.reason,
        locked=bool(row.locked),
    )
