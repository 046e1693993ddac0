"""Runs and their queue: states change by one conditional update, a device set has one run, and old runs stay listed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import create_engine, text

from node.errors import NotFound, Occupied, WrongState
from node.keep.catalogue import Catalogue
from node.keep.catalogue.schema import MIGRATIONS
from node.keep.records import Origin, Run, RunState, Worker

NOW = datetime(2026, 11, 2, 2, 30, tzinfo=UTC)
LATER = NOW + timedelta(minutes=5)
ME = Worker("here", 42, "boot:1")


@pytest.fixture
def catalogue(catalogue_url: str) -> Iterator[Catalogue]:
    with Catalogue.open(catalogue_url) as opened:
        opened.timings.see("nightly", "{}", zone="UTC", named=("nightly",), now=NOW - timedelta(days=2))
        yield opened


def queued(catalogue: Catalogue, *, days: int = 0) -> Run:
    due_at = NOW + timedelta(days=days)
    assert catalogue.timings.queue("nightly", due_at=due_at, kind="finetune", recipe="phantom", now=due_at)
    run = catalogue.runs.last()
    assert run is not None
    return run


def leased(catalogue: Catalogue, devices: str = "here:cpu", *, now: datetime = NOW) -> Run | None:
    return catalogue.runs.lease(devices=devices, host="here", ready=lambda run: True, now=now, until=now + timedelta(minutes=5))


def running(catalogue: Catalogue, *, now: datetime = NOW) -> Run:
    run = leased(catalogue, now=now)
    assert run is not None
    return catalogue.runs.enter(run.id, run.tries, ME, until=now + timedelta(minutes=5))


def test_a_due_time_is_queued_once(catalogue: Catalogue) -> None:
    run = queued(catalogue)
    assert (run.schedule, run.due_at, run.state, run.origin) == ("nightly", NOW, RunState.QUEUED, Origin.SCHEDULE)
    assert not catalogue.timings.queue("nightly", due_at=NOW, kind="finetune", recipe="phantom", now=NOW)
    assert not catalogue.timings.skip("nightly", due_at=NOW, why="late", now=NOW)
    assert len(catalogue.runs.list()) == 1


def test_many_schedulers_at_once_queue_a_due_time_once(catalogue: Catalogue, catalogue_url: str) -> None:
    others = [Catalogue.open(catalogue_url) for _ in range(4)]
    won: list[bool] = []
    start = threading.Barrier(len(others))

    def ring(one: Catalogue) -> None:
        start.wait()
        won.append(one.timings.queue("nightly", due_at=NOW, kind="finetune", recipe="phantom", now=NOW))

    threads = [threading.Thread(target=ring, args=(one,)) for one in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in others:
        one.close()
    assert sorted(won) == [False, False, False, True]
    assert len(catalogue.runs.list()) == 1


def test_a_device_set_has_one_run_and_another_one_may_run_beside_it(catalogue: Catalogue) -> None:
    first = queued(catalogue)
    assert running(catalogue).id == first.id
    second = queued(catalogue, days=1)
    assert leased(catalogue) is None
    with pytest.raises(Occupied, match=f"here:cpu is occupied by run {first.id}"):
        catalogue.runs.start(kind="finetune", recipe="phantom", devices="here:cpu", worker=ME, now=NOW, until=LATER)
    assert [run.id for run in catalogue.runs.list()] == [second.id, first.id], "what could not start has left no row"
    beside = leased(catalogue, "here:gpu")
    assert beside is not None
    assert beside.id == second.id


def test_many_supervisors_at_once_start_one_run(catalogue: Catalogue, catalogue_url: str) -> None:
    for day in range(2):
        catalogue.runs.ask(kind="finetune", recipe="phantom", schedule=f"s{day}", by="me", reason="", now=NOW)
    others = [Catalogue.open(catalogue_url) for _ in range(4)]
    taken: list[Run | None] = []
    start = threading.Barrier(len(others))

    def supervise(one: Catalogue) -> None:
        start.wait()
        taken.append(leased(one))

    threads = [threading.Thread(target=supervise, args=(one,)) for one in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in others:
        one.close()
    assert sum(run is not None for run in taken) == 1
    assert len(catalogue.runs.busy()) == 1


def test_a_run_by_hand_occupies_its_device_set_and_is_nobody_elses(catalogue: Catalogue) -> None:
    run = catalogue.runs.start(kind="finetune", recipe="phantom", devices="here:cpu", worker=ME, now=NOW, until=LATER)
    assert (run.state, run.origin, run.worker, run.tries) == (RunState.RUNNING, Origin.TERMINAL, ME, 1)
    assert catalogue.runs.lose(run.id, 1, "killed", now=NOW)
    assert catalogue.runs.get(run.id).state is RunState.INTERRUPTED
    assert leased(catalogue) is None, "a supervisor does not go on with what a person began in a terminal"
    catalogue.runs.resume(run.id, by="dr", reason="the machine was needed", now=NOW)
    again = leased(catalogue)
    assert again is not None
    assert (again.id, again.tries, again.started_at) == (run.id, 2, NOW)
    acts = catalogue.history.acts(subject=f"run {run.id}")
    assert [(act.by, act.what, act.reason) for act in acts] == [("dr", "run resumed", "the machine was needed")]


def test_a_run_that_is_lost_three_times_has_failed_and_waits_longer_each_time(catalogue: Catalogue) -> None:
    run = queued(catalogue)
    now, waits = NOW, []
    for _ in range(2):
        assert running(catalogue, now=now).id == run.id
        assert catalogue.runs.lose(run.id, catalogue.runs.get(run.id).tries, "its trainer was killed", now=now)
        lost = catalogue.runs.get(run.id)
        assert lost.state is RunState.QUEUED
        assert lost.next_attempt_at is not None
        assert leased(catalogue, now=lost.next_attempt_at - timedelta(seconds=1)) is None
        waits.append(lost.next_attempt_at - now)
        now = lost.next_attempt_at
    running(catalogue, now=now)
    catalogue.runs.lose(run.id, 3, "its trainer was killed", now=now)
    failed = catalogue.runs.get(run.id)
    assert (failed.state, failed.reason) == (RunState.FAILED, "its trainer was killed; given up after 3 tries")
    assert waits[0] < waits[1]
    catalogue.runs.resume(run.id, by="dr", reason="more memory", now=now)
    running(catalogue, now=now)
    catalogue.runs.lose(run.id, 4, "its trainer was killed", now=now)
    assert catalogue.runs.get(run.id).state is RunState.QUEUED, "a person's word starts the count anew"


def test_a_clean_stop_costs_no_try(catalogue: Catalogue) -> None:
    run = queued(catalogue)
    for tries in range(1, 6):
        assert running(catalogue).tries == tries
        assert catalogue.runs.stop(run.id, tries, "told to stop", now=NOW)
        assert catalogue.runs.get(run.id).state is RunState.QUEUED


def test_a_trainer_that_lost_its_run_changes_nothing_any_more(catalogue: Catalogue) -> None:
    run = queued(catalogue)
    running(catalogue)
    catalogue.runs.lose(run.id, 1, "nothing was heard of it", now=NOW)
    running(catalogue, now=NOW + timedelta(hours=1))
    runs = catalogue.runs
    with pytest.raises(WrongState):
        runs.enter(run.id, 1, ME, until=LATER)
    with pytest.raises(WrongState):
        runs.enter(run.id, 2, ME, until=LATER)
    assert runs.renew(run.id, 1, until=LATER) is None
    assert not runs.bind(run.id, 1, "folder")
    assert not runs.done(run.id, 1, model_id="m", decision="promote", now=NOW)
    assert not runs.fail(run.id, 1, "late", now=NOW)
    assert runs.renew(run.id, 2, until=LATER) is RunState.RUNNING
    assert runs.done(run.id, 2, model_id="m", decision="refuse", now=NOW)
    done = runs.get(run.id)
    assert (done.state, done.model_id, done.decision, done.devices, done.worker) == (RunState.DONE, "m", "refuse", None, None)


def test_cancelling_strikes_out_what_waits_and_tells_what_runs(catalogue: Catalogue) -> None:
    waits = queued(catalogue)
    assert catalogue.runs.cancel(waits.id, by="dr", reason="not now", now=NOW).state is RunState.CANCELLED
    runs = queued(catalogue, days=1)
    running(catalogue)
    assert catalogue.runs.cancel(runs.id, by="dr", reason="wrong labels", now=NOW).state is RunState.CANCELLING
    assert leased(catalogue) is None, "its devices are occupied until its trainer has ended"
    assert catalogue.runs.renew(runs.id, 1, until=LATER) is RunState.CANCELLING
    catalogue.runs.stop(runs.id, 1, "the run was cancelled", now=NOW)
    ended = catalogue.runs.get(runs.id)
    assert (ended.state, ended.reason, ended.devices) == (RunState.CANCELLED, "wrong labels", None)
    for one in (waits, runs):
        with pytest.raises(WrongState, match="cancelled"):
            catalogue.runs.cancel(one.id, by="dr", reason="again", now=NOW)
    assert [act.what for act in catalogue.history.acts()] == ["run cancelled", "run cancelled"]


def test_a_run_is_found_by_number_or_folder(catalogue: Catalogue) -> None:
    run = queued(catalogue)
    running(catalogue)
    catalogue.runs.bind(run.id, 1, "20261102T023000-phantom")
    assert catalogue.runs.named(str(run.id)) == catalogue.runs.named("20261102T023000-phantom")
    for name in ("99", "nothing", ""):
        with pytest.raises(NotFound):
            catalogue.runs.named(name)
    done = catalogue.runs.get(run.id)
    assert catalogue.runs.last_of("nightly") == done
    assert catalogue.runs.last_learnt("finetune", "phantom") == done
    catalogue.runs.fail(run.id, 1, "no labels", now=NOW)
    assert catalogue.runs.last_learnt("finetune", "phantom") is None


def test_one_run_of_a_schedule_is_asked_for_at_a_time(catalogue: Catalogue) -> None:
    run = catalogue.runs.ask(kind="finetune", recipe="phantom", schedule="nightly", by="dr", reason="new labels", now=NOW)
    assert run.origin is Origin.PERSON
    with pytest.raises(WrongState, match=f"run {run.id}"):
        catalogue.runs.ask(kind="finetune", recipe="phantom", schedule="nightly", by="dr", reason="", now=LATER)


def test_runs_of_release_0_1_0_stay_listed(database_url: str) -> None:
    from alembic import command
    from alembic.config import Config

    if database_url.startswith("sqlite"):
        from pathlib import Path

        Path(database_url.removeprefix("sqlite:///")).parent.mkdir(parents=True)
    engine = create_engine(database_url)
    old = [
        ("run-1", "done", 20, "v1", "insufficient evidence"),
        ("run-2", "failed: recipe phantom needs more", 30, "", ""),
        ("run-3", "interrupted", 40, "", ""),
        ("run-4", "", None, "", ""),
    ]
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for folder, outcome, finished, model, decision in old:
            values = {"f": folder, "o": outcome, "e": finished, "m": model, "d": decision}
            connection.execute(
                text(
                    "INSERT INTO run (kind, folder, started_at, finished_at, outcome, model_id, decision) "
                    "VALUES ('finetune', :f, 10, :e, :o, :m, :d)"
                ),
                values,
            )
    engine.dispose()
    with Catalogue.open(database_url) as catalogue:
        runs = catalogue.runs.list()[::-1]
        assert [run.folder for run in runs] == ["run-1", "run-2", "run-3", "run-4"]
        assert [run.state for run in runs] == ["done", "failed", "interrupted", "interrupted"]
        assert [run.id for run in runs] == [1, 2, 3, 4]
        assert (runs[0].model_id, runs[0].decision, runs[1].reason) == (
            "v1",
            "insufficient evidence",
            "recipe phantom needs more",
        )
        assert runs[0].started_at == datetime(1970, 1, 1, 0, 0, 0, 10, tzinfo=UTC)
        assert catalogue.runs.resume(4, by="dr", reason="killed by the upgrade", now=NOW).state is RunState.QUEUED
        catalogue.runs.ask(kind="finetune", recipe="phantom", schedule="nightly", by="dr", reason="", now=NOW)
        assert catalogue.runs.list()[0].id == 5
