"""The words of a timetable: cron lines, periods, hours of the day. Pure.

In: what a person wrote in the settings. Out: numbers, or a `ValueError` that says what to write instead. Cron's weekdays are
those of cron (0 and 7 are Sunday); no clock is read here, and no library that counts the days otherwise is asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import time, timedelta

WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
LONGEST = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
"""Days of each month, in a leap year."""
UNITS = {"min": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
LONGEST_PERIOD = timedelta(days=366)


@dataclass(frozen=True, slots=True)
class Cron:
    """The five fields of a cron line, each as the numbers at which it fires."""

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: tuple[int, ...]
    months: tuple[int, ...]
    weekdays: tuple[str, ...]
    """By name: libraries count them from other days."""


def cron(text: str) -> Cron:
    """Read a cron line: minute, hour, day of the month, month, day of the week.

    Raises
    ------
    ValueError
        It is none, names a day that never comes, or restricts both kinds of day (which cron joins by "or", others by "and").
    """
    fields = text.split()
    if len(fields) != 5:
        raise ValueError('a cron line has five fields (minute hour day month weekday), such as "30 2 * * sat"')
    minutes, hours, days = (
        _field(field, low, high, what)
        for field, (low, high, what) in zip(fields, ((0, 59, "minute"), (0, 23, "hour"), (1, 31, "day")), strict=False)
    )
    months = _field(fields[3], 1, 12, "month", {name: number for number, name in enumerate(MONTHS, start=1)})
    weekdays = _field(fields[4], 0, 7, "weekday", {name: number for number, name in enumerate(WEEKDAYS)})
    if not fields[2].startswith("*") and not fields[4].startswith("*"):
        raise ValueError("restrict the day of the month or the day of the week, not both: write two schedules")
    if min(days) > max(LONGEST[month - 1] for month in months):
        raise ValueError("this day never comes: no such month has it")
    return Cron(minutes, hours, days, months, tuple(dict.fromkeys(WEEKDAYS[day % 7] for day in weekdays)))


def _field(text: str, low: int, high: int, what: str, names: dict[str, int] | None = None) -> tuple[int, ...]:
    """Spell out one field: `*`, `5`, `mon`, `1-5`, `*/15`, `8-18/2`, and lists of these."""
    chosen: set[int] = set()
    for part in text.lower().split(","):
        found = re.fullmatch(r"(\*|([a-z]+|\d+)(?:-([a-z]+|\d+))?)(?:/(\d+))?", part)
        if not found or (found[4] and not found[3] and found[1] != "*"):
            raise ValueError(f'{what} "{part}": write a number, a range such as {low}-{low + 2}, a list, "*" or "*/2"')
        first, last = (_number(one, names or {}, what) if one else None for one in (found[2], found[3]))
        if what == "weekday" and last == 0 and first:  # fri-sun
            last = 7
        start = low if first is None else first
        end = (high - (what == "weekday") if first is None else first) if last is None else last
        step = int(found[4] or 1)
        if not (low <= start <= end <= high and step):
            raise ValueError(f'{what} "{part}" is outside {low} to {high}, or runs backwards')
        chosen.update(range(start, end + 1, step))
    return tuple(sorted(chosen))


def _number(word: str, names: dict[str, int], what: str) -> int:
    if word.isdecimal():
        return int(word)
    if word not in names:
        raise ValueError(f'{what} "{word}" is unknown' + (f"; there are {', '.join(names)}" if names else ""))
    return names[word]


def period(text: str) -> timedelta:
    """Read how often something is done: `90min`, `6h`, `7d`, `2w`."""
    found = re.fullmatch(r"(\d{1,6})\s*(min|h|d|w)", text.strip())
    length = int(found[1]) * UNITS[found[2]] if found else timedelta(0)
    if not timedelta(0) < length <= LONGEST_PERIOD:
        raise ValueError('write a number and a unit (min, h, d, w), a year at most, such as "6h" or "7d"')
    return length


@dataclass(frozen=True, slots=True)
class Hours:
    """A part of the day, from the first moment up to the last, not included; it may pass midnight."""

    first: time
    last: time

    @classmethod
    def read(cls, text: str) -> Hours:
        """Read `07:00-19:00`."""
        found = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)", text.strip())
        if not found or found[1] + found[2] == found[3] + found[4]:
            raise ValueError('write two different times of day, such as "07:00-19:00" or "22:00-06:00"')
        return cls(time(int(found[1]), int(found[2])), time(int(found[3]), int(found[4])))

    def hold(self, at: time) -> bool:
        """Say whether this time of day lies within."""
        if self.first < self.last:
            return self.first <= at < self.last
        return at >= self.first or at < self.last
