"""Patients, and which of them are one person because the hospital merged them.

A merge moves no image: it says under which pseudonym a person counts, and settles once for all of them whether the person is in
the locked set (docs/design.md, promise 10). It cannot be undone: what was frozen or corrected by it meanwhile stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, select, update

from node.errors import NotMergeable, StoreBusy
from node.keep.catalogue import history
from node.keep.catalogue.schema import instance, patient, study
from node.keep.database import Database, insert_if_absent, one_at_a_time
from node.keep.records import Person

PERSONS_LOCK = 0x05E1
"""Key under which one process at a time says who is whom: a plan made beside another merge would undo it."""


@dataclass(frozen=True, slots=True)
class Merge:
    """What a merge does, or would do."""

    gone: str
    kept: str
    person: Person
    """Everybody who is one person after it."""
    locked_before: frozenset[str]
    """Those of them who are in the locked set before it."""
    unseen: tuple[str, ...]
    """Those of the two of whom no image came yet."""
    is_known: bool
    """The two are one person already, under this surviving pseudonym: there is nothing to do."""


class Patients:
    """Who is whom, under pseudonyms."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def person(self, pid: str) -> Person:
        """Give the person to whom a pseudonym belongs; a patient never merged, or never seen, is a person alone."""
        with self._database.read() as connection:
            return person(connection, pid)

    def whose(self, study_uid: str) -> str:
        """Give the pseudonym under which a study stands, "" when no image told it yet."""
        with self._database.read() as connection:
            return connection.scalar(select(study.c.pid).where(study.c.uid == study_uid)) or ""

    def studies(self, pids: Iterable[str]) -> list[str]:
        """Give the studies of these patients, sorted."""
        with self._database.read() as connection:
            return list(connection.scalars(select(study.c.uid).where(study.c.pid.in_(list(pids))).order_by(study.c.uid)))

    def plan(self, gone: str, kept: str) -> Merge:
        """Say what merging `gone` into `kept` would do.

        Raises
        ------
        NotMergeable
            The two are the same patient, or no image of either ever came.
        """
        with self._database.read() as connection:
            return _plan(connection, gone, kept)

    def merge(self, plan: Merge, *, named_by: str, by: str, reason: str, now: datetime) -> Merge:
        """Make two patients one person, whose PatientID from now on is that of `plan.kept`.

        Parameters
        ----------
        named_by
            The frozen corpora that name one of the plan's pseudonyms, "" for none: such a person leaves the locked set. Where
            there is none and one of them is locked, the person is.

        Raises
        ------
        NotMergeable
            As `plan`.
        StoreBusy
            The person has become another one since the plan: what `named_by` says may not hold. Nothing was changed.
        """
        gone, kept = plan.gone, plan.kept

        def merge(connection: Connection) -> Merge:
            one_at_a_time(connection, PERSONS_LOCK)
            now_planned = _plan(connection, gone, kept)
            if now_planned.person != plan.person:
                raise StoreBusy("another merge changed one of these patients at this moment: run the same merge again")
            if now_planned.is_known:
                return now_planned
            them = now_planned.person.pseudonyms
            locked = bool(now_planned.locked_before) and not named_by
            for pid in sorted(them):
                insert_if_absent(connection, patient, pid=pid, person=pid, locked=locked, first_at=now)
            values = {"person": now_planned.person.survivor, "locked": locked}
            connection.execute(update(patient).where(patient.c.pid.in_(them)).values(values))
            for subject in (gone, kept):
                told = f"{gone} into {kept}: {reason}"
                history.note(connection, by=by, what="patients merged", subject=subject, reason=told, now=now)
            _note_lock(connection, them, now_planned.locked_before, locked, named_by, by=by, now=now)
            return now_planned

        return self._database.write(merge)

    def free(self, pid: str, *, named_by: str, by: str, now: datetime) -> None:
        """Take a person out of the locked set, because a frozen corpus names one of the pseudonyms; who is not in it stays."""

        def free_all(connection: Connection) -> None:
            one_at_a_time(connection, PERSONS_LOCK)
            free(connection, person(connection, pid).pseudonyms, named_by=named_by, by=by, now=now)

        self._database.write(free_all)


def person(connection: Connection, pid: str) -> Person:
    """Give the person to whom a pseudonym belongs."""
    survivor = connection.scalar(select(patient.c.person).where(patient.c.pid == pid)) or pid
    return Person(survivor, frozenset(connection.scalars(select(patient.c.pid).where(patient.c.person == survivor))) | {pid})


def is_same_person(connection: Connection, one: str, other: str) -> bool:
    """Say whether two pseudonyms belong to one person."""
    return one == other or other in person(connection, one).pseudonyms


def free(connection: Connection, pids: frozenset[str], *, named_by: str, by: str, now: datetime) -> None:
    """Take these pseudonyms of one person out of the locked set, where frozen corpora name the person."""
    was_locked = _locked(connection, pids)
    if named_by and was_locked:
        connection.execute(update(patient).where(patient.c.pid.in_(pids)).values(locked=False))
        _note_lock(connection, pids, was_locked, False, named_by, by=by, now=now)


def _plan(connection: Connection, gone: str, kept: str) -> Merge:
    if gone == kept:
        raise NotMergeable("the two are one and the same patient: nothing to merge")
    one, other = person(connection, gone), person(connection, kept)
    together = one.pseudonyms | other.pseudonyms
    # a patient who was merged away earlier is followed to the one who remains, unless the two are turned round
    survivor = kept if one == other else other.survivor
    seen = set(connection.scalars(select(instance.c.pid).distinct().where(instance.c.pid.in_(together))))
    seen |= set(connection.scalars(select(study.c.pid).distinct().where(study.c.pid.in_(together))))
    unseen = tuple(pid for pid in (gone, kept) if pid not in seen)
    if not seen:
        raise NotMergeable(
            "no image of either patient ever came: check the two identifiers, their issuers, and which site this is"
        )
    known = one == other and one.survivor == survivor
    return Merge(gone, kept, Person(survivor, together), _locked(connection, together), unseen, known)


def _locked(connection: Connection, pids: frozenset[str]) -> frozenset[str]:
    return frozenset(connection.scalars(select(patient.c.pid).where(patient.c.pid.in_(pids), patient.c.locked)))


def _note_lock(
    connection: Connection, pids: frozenset[str], before: frozenset[str], locked: bool, named_by: str, *, by: str, now: datetime
) -> None:
    """Let the history say who left the locked set, or came into it, and why."""
    if not before:
        return
    what = "came into the locked set" if locked else "left the locked set"
    why = "merged with a locked patient; no frozen corpus names either" if locked else f"the person is named by {named_by}"
    for pid in sorted(pids - before if locked else before):
        history.note(connection, by=by, what=what, subject=pid, reason=why, now=now)
