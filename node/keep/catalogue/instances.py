"""Images of the archive and of the quarantine, as the catalogue knows them, and the patients they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, TypedDict

from sqlalchemy import Connection, Row, delete, exists, func, or_, select, update

from node.errors import NotFound
from node.keep.catalogue import history, states
from node.keep.catalogue.schema import dropped_term, held, instance, patient, study
from node.keep.database import Database, insert_if_absent
from node.keep.records import Held, Hold, Instance, Purpose, StudyState, TrainingImage

_INSTANCE_FIELDS = [field.name for field in dataclasses.fields(Instance)]
_HELD_FIELDS = [field.name for field in dataclasses.fields(Held)]


class _Sender(TypedDict):
    """Who sent an image, and why."""

    purpose: Purpose
    calling_ae: str


class Instances:
    """Images, held instances, and the words that the vocabulary dropped."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- the archive -------------------------------------------------------------------------------------------------------

    def find(self, sop_uid: str) -> Instance | None:
        """Give one image of the archive; None when it is not known."""
        with self._database.read() as connection:
            row = connection.execute(select(instance).where(instance.c.sop_uid == sop_uid)).one_or_none()
        return None if row is None else _instance(row)

    def note(self, image: Instance, *, purpose: Purpose, calling_ae: str, locked: bool, now: datetime) -> bool:
        """Enter an image that stands in the archive; True when it is new. Its study moves by the late rule.

        `locked` counts only for a patient never seen before: nobody is placed twice.

        Raises
        ------
        IdentityConflict
            The study is another patient's. Nothing is entered.
        """

        def note(connection: Connection) -> bool:
            insert_if_absent(connection, patient, pid=image.pid, person=image.pid, locked=locked, first_at=now)
            states.see(connection, image.study_uid, pid=image.pid, purpose=purpose, calling_ae=calling_ae, now=now)
            values = {name: getattr(image, name) for name in _INSTANCE_FIELDS}
            new = insert_if_absent(connection, instance, **values, received_at=now, seen_at=now)
            moved = states.image_came if new else states.image_came_again
            moved(connection, image.study_uid, purpose=purpose, calling_ae=calling_ae, now=now)
            return new

        return self._database.write(note)

    def seen_again(self, instance_uid: str, *, purpose: Purpose, calling_ae: str, now: datetime) -> None:
        """Take note that a known image was sent again.

        Sent to be answered, it makes a study that was to be learned from one to be answered; nothing else moves.
        """

        def seen_again(connection: Connection) -> None:
            connection.execute(update(instance).where(instance.c.sop_uid == instance_uid).values(seen_at=now))
            uid = connection.scalar(select(instance.c.study_uid).where(instance.c.sop_uid == instance_uid))
            if uid is None:
                raise NotFound
            states.image_came_again(connection, uid, purpose=purpose, calling_ae=calling_ae, now=now)

        self._database.write(seen_again)

    def seen_at(self, sop_uid: str) -> datetime | None:
        """Say when an image was sent last; None when it is not known."""
        with self._database.read() as connection:
            return connection.scalar(select(instance.c.seen_at).where(instance.c.sop_uid == sop_uid))

    def correct(self, sop_uid: str, *, age_years: int | None, sex: str) -> None:
        """Note the age and sex of an image whose demographics the hospital corrected."""
        values = {"age_years": age_years, "sex": sex}
        self._database.write(
            lambda connection: connection.execute(update(instance).where(instance.c.sop_uid == sop_uid).values(values))
        )

    def refiled(self, image: Instance) -> None:
        """Note the file that now stands for a known image whose file was gone; it may have another syntax."""
        values = {name: getattr(image, name) for name in ("path", "transfer_syntax_uid", "header_digest", "pixel_digest")}
        self._database.write(
            lambda connection: connection.execute(update(instance).where(instance.c.sop_uid == image.sop_uid).values(values))
        )

    def of_study(self, study_uid: str) -> list[Instance]:
        """Give the images of a study, sorted by UID."""
        query = select(instance).where(instance.c.study_uid == study_uid)
        with self._database.read() as connection:  # sorted here: each server sorts texts by a locale of its own
            return sorted((_instance(row) for row in connection.execute(query)), key=_sop_uid)

    def for_training(self) -> list[TrainingImage]:
        """Give every image of the archive, sorted by UID, with its study's purpose; those of locked patients are marked."""
        query = (
            select(instance, patient.c.locked, patient.c.person, study.c.purpose)
            .join_from(instance, patient, patient.c.pid == instance.c.pid)
            .join(study, study.c.uid == instance.c.study_uid)
            .where(study.c.state != StudyState.REMOVED)
        )
        with self._database.read() as connection:
            images = [
                TrainingImage(
                    **{name: getattr(row, name) for name in _INSTANCE_FIELDS},
                    locked=row.locked,
                    purpose=Purpose(row.purpose),
                    person=row.person,
                )
                for row in connection.execute(query)
            ]
        return sorted(images, key=_sop_uid)

    def locked_patients(self) -> frozenset[str]:
        """Give every pseudonym of the persons that are set aside for evaluation."""
        with self._database.read() as connection:
            return frozenset(connection.scalars(select(patient.c.pid).where(patient.c.locked)))

    def pages(self, size: int) -> Iterator[list[tuple[str, str]]]:
        """Go through every image of the archive as (study, image), `size` at a time."""
        last = ""
        while True:
            query = select(instance.c.study_uid, instance.c.sop_uid).where(instance.c.sop_uid > last)
            with self._database.read() as connection:
                page = [
                    (row.study_uid, row.sop_uid) for row in connection.execute(query.order_by(instance.c.sop_uid).limit(size))
                ]
            if not page:
                return
            last = page[-1][1]
            yield page

    def count(self) -> int:
        """Count the images of the archive."""
        with self._database.read() as connection:
            return connection.scalar(select(func.count()).select_from(instance)) or 0

    # --- the quarantine ----------------------------------------------------------------------------------------------------

    def hold(self, newcomer: Held, *, now: datetime, seal: Callable[[], object] = lambda: None) -> None:
        """Enter an instance of the quarantine. A study that it surely belongs to moves by the late rule.

        The same instance held once more (the same `id`: the same entry) moves nothing, nor does one of doubtful identity; but
        from then on it is held anew, so that no limit takes it minutes after its sender was told that it is safe.

        Parameters
        ----------
        seal
            Asked when nobody can strike the row out: makes sure that the sealed file is there. `unhold` takes both or none.
        """

        def hold(connection: Connection) -> None:
            same = or_(
                exists().where(instance.c.sop_uid == newcomer.sop_uid),
                exists().where(held.c.sop_uid == newcomer.sop_uid, held.c.study_uid == newcomer.study_uid),
            )
            is_known = bool(newcomer.sop_uid) and bool(connection.scalar(select(same)))
            values = {name: getattr(newcomer, name) for name in _HELD_FIELDS}
            again = update(held).where(held.c.id == newcomer.id).values(held_at=now)
            if connection.execute(again).rowcount == 0:
                insert_if_absent(connection, held, **values, held_at=now)
            seal()
            if not newcomer.study_uid:
                return
            surely = newcomer.reason in states.HELD_AS_CONTENT
            sender = _Sender(purpose=newcomer.purpose, calling_ae=newcomer.calling_ae)
            new = states.see(connection, newcomer.study_uid, pid=newcomer.pid if surely else "", **sender, now=now)
            if surely and not new:
                moved = states.image_came_again if is_known else states.image_came
                moved(connection, newcomer.study_uid, **sender, now=now)

        self._database.write(hold)

    def held(self) -> list[tuple[Held, datetime]]:
        """Give what the quarantine holds, and since when, oldest first."""
        with self._database.read() as connection:
            return [(_held(row), row.held_at) for row in connection.execute(select(held).order_by(held.c.held_at, held.c.id))]

    def held_one(self, held_id: str) -> tuple[Held, datetime] | None:
        """Give one held instance and since when it is held; None when it is not known."""
        with self._database.read() as connection:
            row = connection.execute(select(held).where(held.c.id == held_id)).one_or_none()
        return None if row is None else (_held(row), row.held_at)

    def held_of_study(self, study_uid: str) -> list[Held]:
        """Give what the quarantine holds of a study, sorted by UID."""
        query = select(held).where(held.c.study_uid == study_uid)
        with self._database.read() as connection:
            return sorted((_held(row) for row in connection.execute(query)), key=lambda one: (one.sop_uid, one.id))

    def unhold(
        self, held_id: str, *, by: str, reason: str, decision: str, now: datetime, goes: Callable[[datetime], bool] | None = None
    ) -> bool:
        """Strike a held instance out because a person decided so ("released", "discarded"); the history keeps it.

        Parameters
        ----------
        goes
            Asked with the time since when it is held, while nobody can hold it anew: False leaves the row as it is. It removes
            the sealed file, where that goes, too: an object that comes again waits for the end of both, and finds no file.

        Returns
        -------
        bool
            Whether it is struck out.

        Raises
        ------
        NotFound
            The quarantine does not hold it.
        """

        def unhold(connection: Connection) -> bool:
            since = connection.scalar(select(held.c.held_at).where(held.c.id == held_id).with_for_update())
            if since is None:
                raise NotFound
            if goes is not None and not goes(since):
                return False
            connection.execute(delete(held).where(held.c.id == held_id))
            history.note(connection, by=by, what=f"quarantine: {decision}", subject=held_id, reason=reason, now=now)
            return True

        return self._database.write(unhold)

    # --- dropped words -----------------------------------------------------------------------------------------------------

    def dropped(self, terms: Sequence[tuple[str, str]], now: datetime) -> None:
        """Count words that the vocabulary does not know, as (keyword, keyed hash)."""
        if not terms:
            return

        def count(connection: Connection) -> None:
            for keyword, term in terms:
                if not insert_if_absent(connection, dropped_term, keyword=keyword, term=term, count=1, first_at=now, last_at=now):
                    this = dropped_term.c.keyword == keyword, dropped_term.c.term == term
                    connection.execute(update(dropped_term).where(*this).values(count=dropped_term.c.count + 1, last_at=now))

        self._database.write(count)

    def dropped_terms(self) -> list[tuple[str, str, int]]:
        """Give (keyword, keyed hash, count) of the words dropped, the most frequent first."""
        with self._database.read() as connection:
            found = [(row.keyword, row.term, row[2]) for row in connection.execute(select(dropped_term))]
        return sorted(found, key=lambda one: (-one[2], *one[:2]))


def _sop_uid(image: Instance) -> str:
    return image.sop_uid


def _instance(row: Row[Any]) -> Instance:
    return Instance(**{name: getattr(row, name) for name in _INSTANCE_FIELDS})


def _held(row: Row[Any]) -> Held:
    values = {name: getattr(row, name) for name in _HELD_FIELDS}
    return Held(**(values | {"reason": Hold(row.reason), "purpose": Purpose(row.purpose)}))
