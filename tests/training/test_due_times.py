"""Due times under a stepped clock: each comes once, whatever daylight saving, restarts, renames and second schedulers do."""

from __future__ import annotations

import datetime as clockwork
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from apscheduler.schedulers import base
from labelled import CLASSES, labelled_site, put, say
from roles import until

from node.commands.init import init_site
from node.keep.catalogue import Catalogue
from node.keep.records import Run, RunState, Worker
from node.settings import Settings, load
from training.schedule import Timekeeper, Times

BERLIN = ZoneInfo("Europe/Berlin")
NIGHTLY = {"name": "nightly", "cron": "30 2 * * *", "timezone": "Europe/Berlin", "recipe": "phantom"}


def berlin(*at: int) -> datetime:
    return datetime(*at, tzinfo=BERLIN).astimezone(UTC)  # type: ignore[arg-type]


def fired(times: Times, start: datetime, end: datetime) -> list[str]:
    """List the due times of a stretch, in the words of a clock on the wall."""
    found, at = [], start
    while (following := times.after(at)) is not None and following <= end:
        found.append(f"{following.astimezone(BERLIN):%d %H:%M %z}")
        at = following
    return found


def times(cron: str = "", every: str = "", since: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> Times:
    return Times(cron=cron, every=every, zone="Europe/Berlin", since=since)


# --- daylight saving -----------------------------------------------------------------------------------------------------------


def test_in_spring_a_time_that_is_left_out_comes_when_the_clock_has_leapt() -> None:
    assert fired(times("30 2 * * *"), berlin(2026, 3, 28, 0), berlin(2026, 3, 30, 12)) == [
        "28 02:30 +0100",
        "29 03:00 +0200",
        "30 02:30 +0200",
    ]


def test_in_autumn_a_time_that_is_there_twice_comes_once() -> None:
    assert fired(times("30 2 * * *"), berlin(2026, 10, 24, 0), berlin(2026, 10, 26, 12)) == [
        "24 02:30 +0200",
        "25 02:30 +0200",
        "26 02:30 +0100",
    ]


def test_west_of_greenwich_it_is_the_same() -> None:
    zone = ZoneInfo("America/New_York")
    rhythm = Times(cron="30 2 * * *", every="", zone="America/New_York", since=datetime(2026, 1, 1, tzinfo=UTC))
    at, found = datetime(2026, 3, 7, 6, tzinfo=UTC), []
    for _ in range(3):
        at = rhythm.after(at) or at
        found.append(f"{at.astimezone(zone):%d %H:%M %z}")
    assert found == ["07 02:30 -0500", "08 03:00 -0400", "09 02:30 -0400"]


def test_every_moment_of_the_two_nights_agrees_on_what_comes_next() -> None:
    """A scheduler that starts in the hole, or in the hour that is there twice, sees the same due times."""
    for first, last in ((berlin(2026, 3, 28, 20), berlin(2026, 3, 29, 9)), (berlin(2026, 10, 24, 20), berlin(2026, 10, 25, 9))):
        for line in ("30 2 * * *", "*/20 * * * *", "0 2-4 * * *"):
            rhythm = times(line)
            due, at = [], first
            while at < last:
                at = rhythm.after(at) or last
                due.append(at)
            assert due == sorted(set(due))
            moment = first
            while moment < last - timedelta(hours=1):
                assert rhythm.after(moment) == next(one for one in due if one > moment)
                moment += timedelta(minutes=7)


def test_a_period_counts_hours_and_not_what_the_clock_shows() -> None:
    since = berlin(2026, 3, 28, 12)
    assert fired(times(every="12h", since=since), since, berlin(2026, 3, 30, 2)) == [
        "29 00:00 +0100",
        "29 13:00 +0200",
        "30 01:00 +0200",
    ]


def test_the_newest_missed_time_is_found_however_long_ago() -> None:
    rhythm = times("30 2 * * *")
    now = berlin(2026, 10, 26, 12)
    assert rhythm.newest(berlin(2026, 1, 1), now) == berlin(2026, 10, 26, 2, 30)
    assert rhythm.newest(berlin(2026, 10, 26, 2, 30), now) is None
    assert rhythm.newest(berlin(2026, 10, 26, 2, 29), now) == berlin(2026, 10, 26, 2, 30)
    assert times("0 0 29 2 *").newest(berlin(2020, 1, 1), now) == berlin(2024, 2, 29)
    assert times("* * * * *").newest(berlin(2020, 1, 1), now) == now
    assert times(every="7d").newest(berlin(2020, 1, 1), datetime(2026, 1, 16, tzinfo=UTC)) == datetime(2026, 1, 15, tzinfo=UTC)


def test_sunday_is_sunday() -> None:
    """The library counts weekdays from Monday; cron's 0 is Sunday."""
    due = times("0 2 * * 0").after(berlin(2026, 1, 1))
    assert due is not None
    assert due.astimezone(BERLIN).strftime("%A") == "Sunday"


# --- the queue, under a stepped clock -------------------------------------------------------------------------------------------


class Site:
    """A site whose clock is set by hand; `start` is a scheduler that begins, looks at what is due, and is killed or ended."""

    def __init__(self, folder: Path, now: datetime) -> None:
        self.config = init_site(folder)
        self.shipped = self.config.read_text()
        self.now = now
        self.schedule(NIGHTLY)
        self.catalogue = Catalogue.open(self.settings.storage.catalogue)
        self.running: list[Timekeeper] = []

    @property
    def settings(self) -> Settings:
        return load(self.config)

    def schedule(self, *schedules: dict[str, object]) -> None:
        """Write the schedules of the settings anew."""
        from node.commands.init import render

        self.config.write_text(render(self.shipped, {"schedule": list(schedules)}))  # type: ignore[dict-item]

    def start(self) -> Timekeeper:
        keeper = Timekeeper(self.settings, self.catalogue, now=lambda: self.now)
        keeper.begin()
        self.running.append(keeper)
        return keeper

    def restart(self) -> Timekeeper:
        for keeper in self.running:
            keeper.end()
        self.running.clear()
        return self.start()

    def at(self, *when: int) -> None:
        """Set the clock, and let every scheduler look at what is due."""
        self.now = berlin(*when)
        for keeper in self.running:
            for name in [one.name for one in self.settings.schedule]:
                keeper.ring(name)

    def due(self) -> list[str]:
        """List what was queued, the oldest first."""
        runs = self.catalogue.runs.list()[::-1]
        return [f"{run.schedule} {run.due_at.astimezone(BERLIN):%m-%d %H:%M}" for run in runs if run.due_at]

    def said(self, name: str = "nightly") -> str:
        timing = self.catalogue.timings.get(name)
        return timing.said if timing else ""

    def work_off(self) -> Run:
        """Let the run that waits come to its end."""
        until_ = self.now + timedelta(minutes=5)
        run = self.catalogue.runs.lease(devices="d", host="h", ready=lambda run: True, now=self.now, until=until_)
        assert run is not None
        self.catalogue.runs.enter(run.id, run.tries, Worker("h", 1, "b"), until=until_)
        self.catalogue.runs.bind(run.id, run.tries, f"folder-{run.id}")
        assert self.catalogue.runs.done(run.id, run.tries, model_id="m", decision="refuse", now=self.now)
        return run


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    one = Site(tmp_path / "site", berlin(2026, 11, 2, 12))
    yield one
    for keeper in one.running:
        keeper.end()
    one.catalogue.close()


def test_a_new_schedule_runs_from_its_next_due_time_on(site: Site) -> None:
    site.start()
    site.at(2026, 11, 3, 2, 29)
    assert site.due() == []
    site.at(2026, 11, 3, 2, 30)
    site.at(2026, 11, 3, 2, 31)
    assert site.due() == ["nightly 11-03 02:30"]
    (run,) = site.catalogue.runs.list()
    assert (run.kind, run.recipe, run.state) == ("cycle", "phantom", RunState.QUEUED)


@pytest.mark.parametrize("night", [(2026, 3, 29), (2026, 10, 25)])
def test_a_night_of_daylight_saving_has_one_run_though_the_scheduler_is_started_anew_every_twenty_minutes(
    tmp_path: Path, night: tuple[int, int, int]
) -> None:
    one = Site(tmp_path / "site", berlin(*night) - timedelta(hours=1))
    one.start()
    end = berlin(*night, 9)
    while one.now < end:
        one.now += timedelta(minutes=20)
        one.restart()
        if any(run.state is RunState.QUEUED for run in one.catalogue.runs.list()):
            one.work_off()
    assert len(one.due()) == 1
    one.running.pop().end()
    one.catalogue.close()


def test_what_was_missed_is_made_up_for_once(site: Site) -> None:
    """Five nights without a scheduler are one run, that of the last night."""
    site.start()
    for keeper in site.running:
        keeper.end()
    site.running.clear()
    site.now = berlin(2026, 11, 7, 9)
    site.start()
    assert site.due() == ["nightly 11-07 02:30"]
    site.restart()
    assert site.due() == ["nightly 11-07 02:30"]


def test_a_run_that_still_waits_does_for_the_next_due_time_too(site: Site) -> None:
    site.start()
    site.at(2026, 11, 3, 3)
    site.at(2026, 11, 4, 3)
    assert site.due() == ["nightly 11-03 02:30"]
    assert "still waits" in site.said()
    site.work_off()
    site.at(2026, 11, 5, 3)
    assert site.due() == ["nightly 11-03 02:30", "nightly 11-05 02:30"]


def test_two_schedulers_on_one_database_make_one_run_of_a_due_time(site: Site) -> None:
    first, second = site.start(), site.start()
    other = Catalogue.open(site.settings.storage.catalogue)  # as another process has it
    third = Timekeeper(site.settings, other, now=lambda: site.now)
    third.begin()
    site.running.append(third)
    for day in range(3, 8):
        site.at(2026, 11, day, 2, 30)
        site.work_off()
    assert site.due() == [f"nightly 11-0{day} 02:30" for day in range(3, 8)]
    for keeper in (first, second, third):
        keeper.end()
    site.running.clear()
    other.close()


def test_a_renamed_schedule_loses_nothing_and_doubles_nothing(site: Site) -> None:
    site.start()
    site.at(2026, 11, 3, 2, 30)
    site.schedule({**NIGHTLY, "name": "by-night"})
    site.now = berlin(2026, 11, 3, 2, 40)
    site.restart()
    assert site.due() == ["by-night 11-03 02:30"], "queued under the old name, not queued again, and still its own"
    site.work_off()
    site.running.pop().end()
    site.schedule({**NIGHTLY, "name": "nightly2"})
    site.now = berlin(2026, 11, 4, 9)  # renamed while its time came and no scheduler ran
    site.start()
    assert site.due() == ["nightly2 11-03 02:30", "nightly2 11-04 02:30"]


def test_a_paused_schedule_stays_paused_under_its_new_name(site: Site) -> None:
    site.start()
    site.catalogue.roles.set_flag("schedule nightly", "paused", by="it", reason="no", now=site.now)
    site.schedule({**NIGHTLY, "name": "other"})
    site.restart()
    site.at(2026, 11, 3, 3)
    assert site.due() == []
    assert site.said("other") == "passed over: the schedule is paused"


def test_a_changed_schedule_counts_from_the_change(site: Site) -> None:
    site.start()
    site.at(2026, 11, 3, 2, 30)
    site.work_off()
    site.schedule({**NIGHTLY, "cron": "0 4 * * *"})
    site.now = berlin(2026, 11, 3, 5)
    site.restart()
    assert site.due() == ["nightly 11-03 02:30"], "04:00 of this day was before the change"
    site.at(2026, 11, 4, 3)
    assert len(site.due()) == 1
    site.at(2026, 11, 4, 4)
    assert site.due() == ["nightly 11-03 02:30", "nightly 11-04 04:00"]


def test_what_the_old_rhythm_had_due_is_not_lost_by_a_change(site: Site) -> None:
    site.start().end()
    site.running.clear()
    site.schedule({**NIGHTLY, "cron": "0 4 * * *"})
    site.now = berlin(2026, 11, 3, 3)
    site.start()
    assert site.due() == ["nightly 11-03 02:30"]


def test_a_paused_schedule_passes_over_and_is_not_made_up_for(site: Site) -> None:
    site.start()
    site.catalogue.roles.set_flag("schedule nightly", "paused", by="it", reason="upgrade", now=site.now)
    site.at(2026, 11, 3, 3)
    site.catalogue.roles.set_flag("schedule nightly", "on", by="it", reason="done", now=site.now)
    site.at(2026, 11, 3, 4)
    assert site.due() == []
    site.at(2026, 11, 4, 4)
    assert site.due() == ["nightly 11-04 02:30"]


def test_a_clock_that_was_set_back_neither_doubles_nor_stops_a_schedule(site: Site) -> None:
    site.start()
    site.at(2026, 11, 3, 2, 31)
    site.work_off()
    site.at(2026, 11, 3, 1, 45)
    site.at(2026, 11, 3, 2, 35)
    assert len(site.due()) == 1
    site.now = berlin(2025, 11, 3, 1, 45)
    site.running[0].plan()
    site.at(2025, 11, 3, 2, 35)
    assert site.due()[1:] == ["nightly 11-03 02:30"]


def test_conditions_count_what_came_since_the_last_finished_run(tmp_path: Path) -> None:
    config = labelled_site(tmp_path, patients=4)
    one = Site(tmp_path / "other", berlin(2026, 11, 2, 12))
    one.config, one.shipped = config, config.read_text()
    one.schedule({**NIGHTLY, "when": {"new_studies": 3, "new_labels": 2}})
    one.catalogue.close()
    one.catalogue = Catalogue.open(one.settings.storage.catalogue)
    one.start()
    one.at(2026, 11, 3, 3)
    assert len(one.due()) == 1, "everything is new before the first run"
    one.work_off()
    one.at(2026, 11, 4, 3)
    assert len(one.due()) == 1
    assert one.said() == "passed over: only 0 of 3 new studies and 0 of 2 new labels since run 1 began"
    one.catalogue.runs.ask(kind="cycle", recipe="phantom", schedule="nightly", by="me", reason="", now=one.now)
    running = one.catalogue.runs.lease(devices="d", host="h", ready=lambda run: True, now=one.now, until=one.now)
    assert running is not None
    one.at(2026, 11, 4, 10)
    one.at(2026, 11, 5, 3)
    assert "since run 2 began" in one.said(), "what a run under way has begun with is not new"
    one.catalogue.runs.fail(running.id, running.tries, "a test", now=one.now)
    import labelled

    labelled.NOW, before = one.now, labelled.NOW
    try:
        for patient in (10, 11):
            say(config, put(config, patient), CLASSES[0])
    finally:
        labelled.NOW = before
    one.at(2026, 11, 6, 3)
    assert len(one.due()) == 3, "two new labels suffice, though only two studies are new"
    one.running.pop().end()
    one.catalogue.close()


def test_a_schedule_with_an_unknown_recipe_is_left_out_and_the_others_run(site: Site) -> None:
    site.schedule({**NIGHTLY, "recipe": "no_such"}, {**NIGHTLY, "name": "good"})
    keeper = site.start()
    assert "no_such" in keeper.troubles["nightly"]
    keeper_names = ["good"]
    site.now = berlin(2026, 11, 3, 3)
    for name in keeper_names:
        keeper.ring(name)
    assert site.due() == ["good 11-03 02:30"]


# --- APScheduler itself ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch, site: Site) -> Callable[[datetime], None]:
    """Put APScheduler under the site's clock; give what sets that clock."""

    class Stepped(datetime):
        @classmethod
        def now(cls, tz: clockwork.tzinfo | None = None) -> datetime:  # type: ignore[override]
            return site.now.astimezone(tz)

    monkeypatch.setattr(base, "datetime", Stepped)

    def step(now: datetime) -> None:
        site.now = now
        for keeper in site.running:
            keeper.plan()

    return step


def test_apscheduler_rings_at_each_due_time_and_a_late_ring_is_not_dropped(
    site: Site, stepped: Callable[[datetime], None]
) -> None:
    """Its default drops what is a second late; here the clock leaps hours past the due time."""
    site.start()
    for at in (berlin(2026, 11, 3, 2, 30), berlin(2026, 11, 4, 7), berlin(2026, 11, 6, 2, 30)):
        before = len(site.due())
        stepped(at)
        until(lambda before=before: len(site.due()) > before)
        site.work_off()
    assert site.due() == ["nightly 11-03 02:30", "nightly 11-04 02:30", "nightly 11-06 02:30"]
    timing = site.catalogue.timings.get("nightly")
    assert timing is not None
    assert timing.next_at == berlin(2026, 11, 7, 2, 30)
