"""What a person writes as a timetable means what cron makes of it, or is refused with what to write instead."""

from __future__ import annotations

from datetime import time, timedelta

import pytest

from node.timetable import Hours, cron, period


@pytest.mark.parametrize(
    ("field", "days"),
    [
        ("0", ("sun",)),
        ("7", ("sun",)),
        ("1", ("mon",)),
        ("1-5", ("mon", "tue", "wed", "thu", "fri")),
        ("mon-fri", ("mon", "tue", "wed", "thu", "fri")),
        ("5-7", ("fri", "sat", "sun")),
        ("fri-sun", ("fri", "sat", "sun")),
        ("0,6", ("sun", "sat")),
        ("SAT", ("sat",)),
        ("*/2", ("sun", "tue", "thu", "sat")),
        ("*", ("sun", "mon", "tue", "wed", "thu", "fri", "sat")),
    ],
)
def test_weekdays_are_those_of_cron(field: str, days: tuple[str, ...]) -> None:
    assert cron(f"0 2 * * {field}").weekdays == days


def test_the_other_fields_are_spelt_out() -> None:
    line = cron("*/20 8-18/5 1,15 jan-mar *")
    assert (line.minutes, line.hours, line.days, line.months) == ((0, 20, 40), (8, 13, 18), (1, 15), (1, 2, 3))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("30 2 * *", "five fields"),
        ("@daily", "five fields"),
        ("60 2 * * *", "minute"),
        ("0 24 * * *", "hour"),
        ("0 2 0 * *", "day"),
        ("0 2 * 13 *", "month"),
        ("0 2 * * 8", "weekday"),
        ("0 2 * * caturday", "sun, mon"),
        ("0 2 * * sat-mon", "backwards"),
        ("0 2 1 * mon", "two schedules"),
        ("0 2 30 2 *", "never comes"),
        ("0 2 31 4,6,9,11 *", "never comes"),
        ("*/0 2 * * *", "minute"),
        ("1-2-3 2 * * *", "write a number"),
        ("5/2 2 * * *", "write a number"),
        ("L 2 * * *", "minute"),
    ],
)
def test_what_is_no_cron_line_says_what_to_write(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cron(text)


def test_29_february_comes() -> None:
    assert cron("0 2 29 2 *").days == (29,)


def test_periods() -> None:
    assert [period(text) for text in ("90min", "6h", "7d", "2w")] == [
        timedelta(minutes=90),
        timedelta(hours=6),
        timedelta(days=7),
        timedelta(days=14),
    ]
    for wrong in ("", "6", "0h", "h", "1y", "-1h", "2000d", "1.5h"):
        with pytest.raises(ValueError, match="6h"):
            period(wrong)


def test_hours_of_the_day_may_pass_midnight() -> None:
    day, night = Hours.read("07:00-19:00"), Hours.read("22:00-06:30")
    assert [day.hold(time(*at)) for at in ((6, 59), (7, 0), (18, 59), (19, 0))] == [False, True, True, False]
    assert [night.hold(time(*at)) for at in ((21, 59), (22, 0), (0, 0), (6, 29), (6, 30))] == [False, True, True, True, False]
    for wrong in ("7-19", "07:00-07:00", "24:00-06:00", "07:00", "07:60-08:00"):
        with pytest.raises(ValueError, match="07:00-19:00"):
            Hours.read(wrong)
