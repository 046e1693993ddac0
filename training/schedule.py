"""When the trainer is to run by itself: due times of the schedules, and the queue of runs that they fill.

In: `[[schedule]]` of the settings, the catalogue's memory, a clock. Out: queued runs, one a due time. APScheduler rings and
nothing else: it keeps no truth, and a ring works out anew from the catalogue what is due. Nothing is trained here.

Local times: each comes once a day. One that daylight saving leaps over comes when the clock has leapt, one that is there twice
comes the first time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import tzlocal
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger

from models.errors import Retriable
from node import timetable
from node.keep.catalogue import Catalogue
from node.keep.catalogue.states import FAR
from node.keep.catalogue.timings import switch
from node.logs import event, safe_message
from node.settings import Schedule, Settings
from training.recipe import NoSuchRecipe, named

log = logging.getLogger("osteon.schedule")

JUST = timedelta(microseconds=1)
LOOK_BACK = (timedelta(hours=1), timedelta(days=1), timedelta(days=32), timedelta(days=366), timedelta(days=8 * 366))
"""Windows in which the newest missed due time is looked for; 29 February comes at least once in the last."""


class Times(BaseTrigger):  # type: ignore[misc]
    """The due times of one rhythm."""

    def __init__(self, *, cron: str, every: str, zone: str, since: datetime) -> None:
        self.zone = ZoneInfo(zone)
        self._since = since
        self._every = timetable.period(every) if every else None
        self._cron = _cron_trigger(cron) if cron else None

    def after(self, moment: datetime) -> datetime | None:
        """Give the first due time later than `moment`, in UTC."""
        if self._every is not None:
            return self._since + ((moment - self._since) // self._every + 1) * self._every
        assert self._cron is not None  # noqa: S101 - the settings see to it that a schedule has one of the two
        wall = moment.astimezone(self.zone).replace(tzinfo=UTC, fold=0)
        while (wall := self._cron.get_next_fire_time(None, wall)) is not None:
            if (due := _instant(wall, self.zone)) > moment:
                return due
            wall += JUST
        return None

    def newest(self, after: datetime, now: datetime) -> datetime | None:
        """Give the last due time later than `after` and not later than `now`."""
        for window in LOOK_BACK:
            due = self.after(max(after, now - window))
            if due is not None and due <= now:
                while (following := self.after(due)) is not None and following <= now:
                    due = following
                return due
        return None

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """Answer APScheduler; what was missed is not its business."""
        return self.after(now.astimezone(UTC))


def _cron_trigger(text: str) -> Any:
    """Give APScheduler's search through a calendar; it counts in wall-clock time, as if every day had 24 hours."""
    fields = timetable.cron(text)
    lists = {
        "minute": fields.minutes,
        "hour": fields.hours,
        "day": fields.days,
        "month": fields.months,
        "day_of_week": fields.weekdays,
    }
    return CronTrigger(**{name: ",".join(str(one) for one in values) for name, values in lists.items()}, timezone=UTC)


def _instant(wall: datetime, zone: ZoneInfo) -> datetime:
    """Give the moment, in UTC, at which clocks in `zone` first show at least this wall-clock time."""
    local = wall.replace(tzinfo=zone, fold=0)
    moment = local.astimezone(UTC)
    if moment.astimezone(zone).replace(tzinfo=None) == wall.replace(tzinfo=None):
        return moment
    early, late = local.replace(fold=1).astimezone(UTC), moment  # the leap lies between the two readings of a time it left out
    before = early.astimezone(zone).utcoffset()
    while late - early > timedelta(seconds=1):
        middle = early + (late - early) / 2
        early, late = (middle, late) if middle.astimezone(zone).utcoffset() == before else (early, middle)
    return late.replace(microsecond=0)


class Timekeeper:
    """Fills the queue: one for each process that runs the role."""

    def __init__(self, settings: Settings, catalogue: Catalogue, *, now: Callable[[], datetime]) -> None:
        self._settings, self._catalogue, self._now = settings, catalogue, now
        self._schedules = {one.name: one for one in settings.schedule}
        self._times: dict[str, Times] = {}
        self._again: set[str] = set()
        self.troubles: dict[str, str] = {}
        """Why a schedule is not run, by name."""
        self._bell = BackgroundScheduler(timezone=UTC, executors={"default": ThreadPoolExecutor(1)})

    def begin(self) -> None:
        """Take up every schedule where it was left, make up for what was missed, and ring from now on.

        A schedule whose recipe is unknown is left out and told of: reception must not end for it.
        """
        for name, schedule in self._schedules.items():
            try:
                named(self._settings.recipe_of(schedule))
            except NoSuchRecipe as error:
                self.troubles[name] = str(error)
                event(log, "schedule left out", level=logging.ERROR, schedule=name, error=str(error))
                continue
            self._times[name] = self._take_up(schedule)
            self.ring(name)
            self._bell.add_job(
                self.ring,
                self._times[name],
                args=(name,),
                id=name,
                replace_existing=True,
                coalesce=True,
                max_instances=1,
                misfire_grace_time=None,
            )
        self._bell.start()
        self.plan()

    def end(self) -> None:
        """Ring no more."""
        if self._bell.running:
            self._bell.shutdown(wait=True)
        with suppress(Retriable):  # what is shown as planned is then out of date, no more
            for name in self._times:
                self._catalogue.timings.plan(name, None)

    def ring(self, name: str) -> None:
        """Deal with the newest due time of a schedule that has not been dealt with; older ones are covered by it."""
        try:
            known = self._catalogue.timings.get(name)
            if known is not None:
                self._deal(self._schedules[name], self._times[name], known.considered_at)
            self._again.discard(name)
        except Retriable as error:
            self._again.add(name)
            event(log, "due time put off", level=logging.WARNING, schedule=name, error=safe_message(error))

    def plan(self) -> None:
        """Say in the catalogue what comes next, ring again where the store was busy, and notice a clock that was set."""
        for name in tuple(self._again):
            self.ring(name)
        now = self._now()
        for name, times in self._times.items():
            known = self._catalogue.timings.get(name)
            if known is not None and known.considered_at > now + FAR:
                self._catalogue.timings.rewind(name, now)
            self._catalogue.timings.plan(name, times.after(now))
        self._bell.wakeup()

    def _take_up(self, schedule: Schedule) -> Times:
        """Find a schedule's memory; what a former rhythm had due is dealt with before the new one counts."""
        now, definition = self._now().replace(microsecond=0), definition_of(schedule, self._settings)
        zone = definition["timezone"]
        text = json.dumps(definition, sort_keys=True)
        timings = self._catalogue.timings
        known = timings.see(schedule.name, text, zone=zone, named=tuple(self._schedules), now=now)
        if known.definition != text:
            self._deal(schedule, _times(json.loads(known.definition), known.since), known.considered_at)
            timings.change(schedule.name, before=known.definition, after=text, zone=zone, now=now)
            event(log, "schedule changed", schedule=schedule.name)
            known = timings.see(schedule.name, text, zone=zone, named=tuple(self._schedules), now=now)
        return _times(definition, known.since)

    def _deal(self, schedule: Schedule, times: Times, considered_at: datetime) -> None:
        now = self._now()
        due_at = times.newest(min(considered_at, now), now)
        if due_at is None:
            return
        timings, recipe = self._catalogue.timings, self._settings.recipe_of(schedule)
        paused = self._catalogue.roles.flag(switch(schedule.name)) == "paused"
        why = "the schedule is paused" if paused else self._lacks(schedule, recipe)
        if why:
            if timings.skip(schedule.name, due_at=due_at, why=why, now=now):
                event(log, "due time passed over", schedule=schedule.name, due_at=due_at.isoformat(), why=why)
        elif timings.queue(schedule.name, due_at=due_at, kind=schedule.kind, recipe=recipe, now=now):
            event(log, "run queued", schedule=schedule.name, due_at=due_at.isoformat(), kind=schedule.kind, recipe=recipe)

    def _lacks(self, schedule: Schedule, recipe: str) -> str:
        """Say what a due run lacks, empty when nothing."""
        when = schedule.when
        if not when.new_studies and not when.new_labels:
            return ""
        last = self._catalogue.runs.last_learnt(schedule.kind, recipe)
        since = last.started_at if last else None
        counted = (
            ("studies", when.new_studies, self._catalogue.studies.count_since(since)),
            ("labels", when.new_labels, self._catalogue.labels.count_since(since)),
        )
        asked = [(what, wanted, there) for what, wanted, there in counted if wanted]
        if any(there >= wanted for _, wanted, there in asked):
            return ""
        told = " and ".join(f"{there} of {wanted} new {what}" for what, wanted, there in asked)
        return f"only {told} since {f'run {last.id} began' if last else 'the beginning'}"


def definition_of(schedule: Schedule, settings: Settings) -> dict[str, str]:
    """Give what makes a schedule this one, whatever it is called."""
    zone = schedule.timezone or tzlocal.get_localzone_name() or "UTC"
    rhythm = {"cron": " ".join(schedule.cron.split()), "every": schedule.every, "timezone": zone}
    return rhythm | {"kind": schedule.kind, "recipe": settings.recipe_of(schedule)}


def _times(definition: dict[str, str], since: datetime) -> Times:
    return Times(cron=definition["cron"], every=definition["every"], zone=definition["timezone"], since=since)
