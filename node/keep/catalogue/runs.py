"""Training runs and their queue: every change of a run's state stands in this file (docs/design.md, section 6).

In: who does what, and the time. Out: the run in its next state, or the word that it was not ours to change. Work is claimed by a
conditional update whose row count is believed. Two runs must never occupy one device set: the database itself refuses that. A
trainer is known by run and try; whoever holds an older try changes nothing any more.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from node.errors import NotFound, Occupied, WrongState
from node.keep.catalogue import history
from node.keep.catalogue.schema import run
from node.keep.catalogue.states import is_past
from node.keep.database import Database, insert_if_absent
from node.keep.records import Origin, Run, RunState, Worker

BUSY = (RunState.RUNNING, RunState.CANCELLING)
"""A device set is occupied."""
OPEN = (RunState.QUEUED, *BUSY)
"""It has not come to an end."""
LOSSES_MAX = 3
"""So many starts that did not end in good order, and the run has failed."""
RETRY_FIRST = timedelta(minutes=1)
"""A lost run is started again after this, then after four times as long."""

_Runs = list[Run]


class Runs:
    """The index of training runs; their folders hold the rest."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- who wants a run ---------------------------------------------------------------------------------------------------

    def ask(self, *, kind: str, recipe: str, schedule: str, by: str, reason: str, now: datetime) -> Run:
        """Queue a run of a schedule because a person says so.

        Raises
        ------
        WrongState
            One of this schedule waits already.
        """

        def ask(connection: Connection) -> int:
            waiting = select(run.c.id).where(run.c.schedule == schedule, run.c.state == RunState.QUEUED)
            if (found := connection.scalar(waiting)) is not None:
                raise WrongState(f"run {found} of {schedule} waits already; `osteon train status` says for what")
            values = _new(kind, recipe, now) | {"schedule": schedule, "origin": Origin.PERSON, "due_at": now, "reason": reason}
            run_id = int(connection.scalars(insert(run).values(values).returning(run.c.id)).one())
            history.note(connection, by=by, what="run asked for", subject=f"run {run_id}", reason=reason, now=now)
            return run_id

        return self.get(self._database.write(ask))

    def cancel(self, run_id: int, *, by: str, reason: str, now: datetime) -> Run:
        """Strike out a run that waits; tell the trainer of one that runs to finish its epoch and end.

        Raises
        ------
        WrongState
            It has ended already.
        """

        def cancel(connection: Connection) -> None:
            waits = run.c.state == RunState.QUEUED
            ended = _change(
                connection, run_id, RunState.CANCELLED, waits, now, reason=reason, finished_at=now, next_attempt_at=None
            )
            if not ended and not _change(
                connection, run_id, RunState.CANCELLING, run.c.state == RunState.RUNNING, now, reason=reason
            ):
                raise WrongState(f"run {run_id} is {self.get(run_id).state}; only a run that waits or runs can be cancelled")
            history.note(connection, by=by, what="run cancelled", subject=f"run {run_id}", reason=reason, now=now)

        self._database.write(cancel)
        return self.get(run_id)

    def resume(self, run_id: int, *, by: str, reason: str, now: datetime) -> Run:
        """Queue a run again that failed, was cancelled or interrupted; it goes on from its last finished step.

        Raises
        ------
        WrongState
            It is done, or has not ended.
        """

        def resume(connection: Connection) -> None:
            stopped = run.c.state.in_((RunState.FAILED, RunState.CANCELLED, RunState.INTERRUPTED))
            also = {"origin": Origin.PERSON, "reason": reason, "losses": 0, "finished_at": None, "next_attempt_at": None}
            if not _change(connection, run_id, RunState.QUEUED, stopped, now, **also):
                raise WrongState(
                    f"run {run_id} is {self.get(run_id).state}; only one that ended without a decision can be resumed"
                )
            history.note(connection, by=by, what="run resumed", subject=f"run {run_id}", reason=reason, now=now)

        self._database.write(resume)
        return self.get(run_id)

    # --- who works on it ---------------------------------------------------------------------------------------------------

    def lease(self, *, devices: str, host: str, ready: Callable[[Run], bool], now: datetime, until: datetime) -> Run | None:
        """Take the oldest run that waits and is `ready`, when the device set is free; None when there is none."""
        due = run.c.next_attempt_at.is_(None) | is_past(run.c.next_attempt_at, now)
        for one in self._where(run.c.state == RunState.QUEUED, due):
            if not ready(one):
                continue
            free = (run.c.state == RunState.QUEUED) & (run.c.tries == one.tries)
            origin = Origin.PERSON if one.origin is Origin.TERMINAL else one.origin
            try:
                if self._occupy(one.id, free, devices, host, None, now, until, origin=origin):
                    return self.get(one.id)
            except Occupied:
                return None
        return None

    def start(self, *, kind: str, recipe: str, devices: str, worker: Worker, now: datetime, until: datetime) -> Run:
        """Enter a run that a person starts in the foreground; it runs.

        Raises
        ------
        Occupied
            The device set has a run.
        """
        values = _new(kind, recipe, now) | {"origin": Origin.TERMINAL, "due_at": None}

        def start(connection: Connection) -> int:
            run_id = int(connection.scalars(insert(run).values(values).returning(run.c.id)).one())
            _occupied(connection, run_id, run.c.state == RunState.QUEUED, devices, worker.host, worker, now, until)
            return run_id

        try:
            return self.get(self._database.write(start))
        except IntegrityError:
            raise self._taken(devices) from None

    def take(self, run_id: int, *, devices: str, worker: Worker, now: datetime, until: datetime) -> Run:
        """Go on with a run in the foreground.

        Raises
        ------
        Occupied
            The device set has a run.
        WrongState
            Another process works on it.
        """
        rests = run.c.state.not_in(BUSY)
        if not self._occupy(run_id, rests, devices, worker.host, worker, now, until, origin=Origin.TERMINAL):
            raise WrongState(f"another process works on run {run_id}; `osteon train status` shows it")
        return self.get(run_id)

    def enter(self, run_id: int, tries: int, worker: Worker, *, until: datetime) -> Run:
        """Name the process that a supervisor started for a leased run.

        Raises
        ------
        WrongState
            The run is not leased for this try, or has a trainer.
        """
        values = {"host": worker.host, "pid": worker.pid, "born": worker.born, "leased_until": until}
        if not self._update(run_id, _is_ours(tries) & run.c.pid.is_(None), **values):
            raise WrongState(f"run {run_id} was not leased for this trainer (try {tries}), or another one works on it")
        return self.get(run_id)

    def bind(self, run_id: int, tries: int, folder: str) -> bool:
        """Say in which folder a run works."""
        return self._update(run_id, _is_ours(tries), folder=folder)

    def renew(self, run_id: int, tries: int, *, until: datetime) -> RunState | None:
        """Move the deadline of a run that is worked on and give its state; None when it is not this try's any more."""
        if not self._update(run_id, _is_ours(tries), leased_until=until):
            return None
        return self.get(run_id).state

    # --- how it ends -------------------------------------------------------------------------------------------------------

    def done(self, run_id: int, tries: int, *, model_id: str, decision: str, now: datetime) -> bool:
        """Enter what a run came to."""
        also = {"model_id": model_id, "decision": decision, "finished_at": now, "reason": ""}
        return self._leave(run_id, tries, now, lambda was: (RunState.DONE, also))

    def fail(self, run_id: int, tries: int, reason: str, *, now: datetime) -> bool:
        """Enter that a run would fail the same way again."""
        return self._leave(run_id, tries, now, lambda was: (RunState.FAILED, {"finished_at": now, "reason": reason}))

    def stop(self, run_id: int, tries: int, reason: str, *, now: datetime) -> bool:
        """Enter that a trainer was told to stop and did so in good order; it goes on as if it had not been."""

        def stopped(was: Run) -> tuple[RunState, dict[str, Any]]:
            return _unfinished(was, now, reason) or (RunState.QUEUED, {"reason": reason})

        return self._leave(run_id, tries, now, stopped)

    def lose(self, run_id: int, tries: int, reason: str, *, now: datetime) -> bool:
        """Enter that a trainer ended without a result: the run is tried again later, at most `LOSSES_MAX` times in all."""

        def lost(was: Run) -> tuple[RunState, dict[str, Any]]:
            if unfinished := _unfinished(was, now, reason):
                return unfinished
            losses = was.losses + 1
            if losses >= LOSSES_MAX:
                told = f"{reason}; given up after {losses} tries"
                return RunState.FAILED, {"reason": told, "finished_at": now, "losses": losses}
            again = now + RETRY_FIRST * 4 ** (losses - 1)
            return RunState.QUEUED, {"reason": reason, "next_attempt_at": again, "losses": losses}

        return self._leave(run_id, tries, now, lost)

    # --- what there is -----------------------------------------------------------------------------------------------------

    def get(self, run_id: int) -> Run:
        """Give one run.

        Raises
        ------
        NotFound
            There is none of this number.
        """
        if found := self._where(run.c.id == run_id):
            return found[0]
        raise NotFound(f"there is no run {run_id}; `osteon train list` shows what there is")

    def named(self, name: str) -> Run:
        """Give the run of this number or folder.

        Raises
        ------
        NotFound
            There is none.
        """
        if name.isdecimal() and len(name) < 10:
            return self.get(int(name))
        if name and (found := self._where(run.c.folder == name)):
            return found[0]
        raise NotFound(f"there is no run {name!r}; `osteon train list` shows what there is")

    def busy(self) -> _Runs:
        """Give the runs that occupy a device set, the oldest first."""
        return self._where(run.c.state.in_(BUSY))

    def open(self) -> _Runs:
        """Give the runs that wait or run, the oldest first."""
        return self._where(run.c.state.in_(OPEN))

    def last(self) -> Run | None:
        """Give the newest run; None when there was none."""
        return next(iter(self.list()), None)

    def list(self) -> _Runs:
        """Give all runs, the newest first."""
        return self._where()[::-1]

    def last_of(self, schedule: str) -> Run | None:
        """Give the newest run of a schedule."""
        return next(reversed(self._where(run.c.schedule == schedule)), None)

    def last_learnt(self, kind: str, recipe: str) -> Run | None:
        """Give the newest run of this kind and recipe that is done or under way: what came after its start is new."""
        learnt = run.c.state.in_((RunState.DONE, *BUSY))
        found = self._where(learnt, run.c.kind == kind, run.c.recipe == recipe)
        return max(found, key=lambda one: one.started_at or one.state_at, default=None)

    def _where(self, *conditions: ColumnElement[bool]) -> _Runs:
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(select(run).where(*conditions).order_by(run.c.id))]

    # --- one change --------------------------------------------------------------------------------------------------------

    def _update(self, run_id: int, where: ColumnElement[bool], **values: Any) -> bool:
        entry = update(run).where(run.c.id == run_id, where).values(values)
        return self._database.write(lambda connection: connection.execute(entry).rowcount) == 1

    def _occupy(
        self,
        run_id: int,
        where: ColumnElement[bool],
        devices: str,
        host: str,
        worker: Worker | None,
        now: datetime,
        until: datetime,
        *,
        origin: Origin,
    ) -> bool:
        def occupy(connection: Connection) -> bool:
            return _occupied(connection, run_id, where, devices, host, worker, now, until, origin=origin)

        try:
            return self._database.write(occupy)
        except IntegrityError:
            raise self._taken(devices) from None

    def _taken(self, devices: str) -> Occupied:
        there = next((str(one.folder or one.id) for one in self.busy() if one.devices == devices), "another run")
        return Occupied(f"{devices} is occupied by run {there}; `osteon train status` shows it, `osteon train cancel` ends it")

    def _leave(self, run_id: int, tries: int, now: datetime, becomes: Callable[[Run], tuple[RunState, dict[str, Any]]]) -> bool:
        """Let go of the device set; False when the run is not this try's any more."""

        def leave(connection: Connection) -> bool:
            row = connection.execute(select(run).where(run.c.id == run_id, _is_ours(tries))).one_or_none()
            if row is None:
                return False
            was = _record(row)
            state, also = becomes(was)
            free = {"devices": None, "leased_until": None, "pid": None, "born": ""}
            return _change(connection, run_id, state, _is_ours(tries) & (run.c.state == was.state), now, **(free | also))

        return self._database.write(leave)


def queue(connection: Connection, *, kind: str, recipe: str, schedule: str, due_at: datetime, now: datetime) -> bool:
    """Enter the run of a due time, inside a write; False when it is there already."""
    values = _new(kind, recipe, now) | {"schedule": schedule, "origin": Origin.SCHEDULE, "due_at": due_at}
    return insert_if_absent(connection, run, **values)


def rename_schedule(connection: Connection, old: str, new: str) -> None:
    """Let the runs of a schedule follow it to its new name, inside a write."""
    connection.execute(update(run).where(run.c.schedule == old).values(schedule=new))


def waiting(connection: Connection, schedule: str) -> int | None:
    """Give the number of a run of this schedule that waits."""
    return connection.scalar(select(run.c.id).where(run.c.schedule == schedule, run.c.state == RunState.QUEUED))


def _new(kind: str, recipe: str, now: datetime) -> dict[str, Any]:
    texts = dict.fromkeys(("schedule", "folder", "host", "born", "reason", "model_id", "decision"), "")
    return texts | {"kind": kind, "recipe": recipe, "state": RunState.QUEUED, "state_at": now, "tries": 0, "losses": 0}


def _is_ours(tries: int) -> ColumnElement[bool]:
    return run.c.state.in_(BUSY) & (run.c.tries == tries)


def _change(connection: Connection, run_id: int, state: RunState, where: ColumnElement[bool], now: datetime, **also: Any) -> bool:
    values = {"state": state, "state_at": now} | also
    return connection.execute(update(run).where(run.c.id == run_id, where).values(values)).rowcount == 1


def _occupied(
    connection: Connection,
    run_id: int,
    where: ColumnElement[bool],
    devices: str,
    host: str,
    worker: Worker | None,
    now: datetime,
    until: datetime,
    **also: Any,
) -> bool:
    """Give the device set to a run; the unique column refuses a second one."""
    started = select(run.c.started_at).where(run.c.id == run_id)
    values = {
        "devices": devices,
        "host": host,
        "pid": worker.pid if worker else None,
        "born": worker.born if worker else "",
        "leased_until": until,
        "next_attempt_at": None,
        "finished_at": None,
        "started_at": connection.scalar(started) or now,
        "tries": run.c.tries + 1,
    }
    return _change(connection, run_id, RunState.RUNNING, where, now, **(values | also))


def _unfinished(was: Run, now: datetime, reason: str) -> tuple[RunState, dict[str, Any]] | None:
    """Say what becomes of a run that nobody is to go on with by himself; None when it is queued again."""
    if was.state is RunState.CANCELLING:
        return RunState.CANCELLED, {"finished_at": now}
    if was.origin is Origin.TERMINAL:
        return RunState.INTERRUPTED, {"finished_at": now, "reason": reason}
    return None


def _record(row: Row[Any]) -> Run:
    return Run(
        id=row.id,
        kind=row.kind,
        recipe=row.recipe,
        schedule=row.schedule,
        origin=Origin(row.origin),
        state=RunState(row.state),
        state_at=row.state_at,
        due_at=row.due_at,
        folder=row.folder,
        started_at=row.started_at,
        finished_at=row.finished_at,
        tries=row.tries,
        losses=row.losses,
        next_attempt_at=row.next_attempt_at,
        devices=row.devices,
        leased_until=row.leased_until,
        host=row.host,
        worker=Worker(row.host, row.pid, row.born) if row.pid is not None else None,
        reason=row.reason,
        model_id=row.model_id,
        decision=row.decision,
    )
