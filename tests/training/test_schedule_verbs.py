"""`osteon train` and `osteon schedule` as an operator uses them."""

from __future__ import annotations

import json
import re
import sys
import webbrowser
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import journals
import pytest
import typer
from typer.testing import CliRunner, Result

from node.commands import check, serve
from node.commands.init import init_site
from node.commands.status import status as node_status
from node.errors import BadSettings, NotFound
from node.keep.catalogue import Catalogue
from node.keep.records import Role, Run
from node.settings import load
from training import machine, verbs

NIGHTLY = {"name": "nightly", "cron": "30 2 * * *", "timezone": "America/New_York", "recipe": "phantom"}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return init_site(tmp_path / "site", schedule=[NIGHTLY])


@pytest.fixture
def catalogue(site: Path) -> Iterator[Catalogue]:
    with Catalogue.open(load(site).storage.catalogue) as opened:
        yield opened


def train(*words: str, site: Path) -> Result:
    return CliRunner().invoke(verbs.app, [*words, "--config", str(site)])


def schedule(*words: str, site: Path) -> Result:
    return CliRunner().invoke(verbs.schedule_app, [*words, "--config", str(site)])


def status(site: Path) -> str:
    app = typer.Typer()
    app.command()(node_status)
    return CliRunner().invoke(app, ["--config", str(site)]).stdout


def now() -> datetime:
    return datetime.now(UTC)


def begun(catalogue: Catalogue, run: int) -> None:
    """Let this process be the trainer of a queued run."""
    until = now() + timedelta(minutes=5)
    leased = catalogue.runs.lease(devices="d", host=machine.host(), ready=lambda one: one.id == run, now=now(), until=until)
    assert leased is not None
    catalogue.runs.enter(run, leased.tries, machine.this_process(), until=until)
    catalogue.runs.bind(run, leased.tries, f"run-{run}")


def progress(site: Path, run: int, **told: object) -> None:
    folder = load(site).storage.root / "runs" / f"run-{run}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "progress.json").write_text(json.dumps({"stage": "training", "done": 12, "total": 40} | told))


def test_a_run_now_is_queued_and_the_operator_told_that_nobody_works_it_off(site: Path, catalogue: Catalogue) -> None:
    done = schedule("run-now", "nightly", "--reason", "new labels", site=site)
    assert done.exit_code == 0
    assert "run 1 of nightly waits" in done.stdout
    assert "No scheduler runs" in done.stdout
    assert "No scheduler runs" in train("status", site=site).stdout
    catalogue.roles.beat(Role("schedule", "here", 1, now()))
    assert "No scheduler runs" not in train("status", site=site).stdout
    assert [act.reason for act in catalogue.history.acts(subject="run 1")] == ["new labels"]


def test_an_unknown_schedule_or_run_is_named_with_what_there_is(site: Path) -> None:
    assert "there are: nightly" in str(schedule("run-now", "nightli", site=site).exception)
    assert "osteon train list" in str(train("cancel", "7", "--reason", "x", site=site).exception)
    assert "no run is under way" in str(train("watch", site=site).exception)


def test_the_table_shows_what_runs_what_waits_and_what_came_of_the_last(site: Path, catalogue: Catalogue) -> None:
    schedule("run-now", "nightly", site=site)
    begun(catalogue, 1)
    progress(site, 1, fit="fold 2", epoch=3, loss=0.4321, left_s=754)
    catalogue.timings.see("nightly", "x", zone="UTC", named=("nightly",), now=now() - timedelta(hours=1))
    catalogue.timings.queue("nightly", due_at=now(), kind="finetune", recipe="phantom", now=now())
    table = train("status", site=site).stdout
    assert "training 12 of 40, fold 2, epoch 3, loss 0.432, about 13 min left in this stage" in table
    assert "queued" in table
    assert "waits for its device set" in table
    schedule("pause", "nightly", "--reason", "upgrade", site=site)
    assert "its schedule is paused" in train("status", site=site).stdout
    assert "PAUSED" in status(site)
    catalogue.runs.done(1, 1, model_id="v1", decision="refuse", now=now())
    table = train("status", site=site).stdout
    assert "refuse, v1" in table
    assert "PAUSED" in schedule("list", site=site).stdout
    schedule("resume", "nightly", "--reason", "done", site=site)
    assert "PAUSED" not in schedule("list", site=site).stdout
    assert {act.reason for act in catalogue.history.acts(subject="schedule nightly")} == {"upgrade", "done"}


def test_watching_ends_with_the_run_and_tells_by_its_exit_code(
    site: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it looks, the run moves on: the pause between two looks is the world's turn."""
    for code, end in (
        (0, lambda run: catalogue.runs.done(run, 1, model_id="v", decision="refuse", now=now())),
        (2, lambda run: catalogue.runs.fail(run, 1, "the loss is nan", now=now())),
        (
            143,
            lambda run: (catalogue.runs.cancel(run, by="dr", reason="no", now=now()), catalogue.runs.stop(run, 1, "", now=now())),
        ),
    ):
        run = catalogue.runs.ask(kind="finetune", recipe="phantom", schedule="nightly", by="me", reason="", now=now()).id
        world = iter(
            [
                lambda run=run: begun(catalogue, run),
                lambda run=run: progress(site, run),
                lambda run=run: progress(site, run, done=12.4),
                lambda run=run: progress(site, run, done=13, fit="fold 0", epoch=1, loss=0.5),
                lambda run=run, end=end: end(run),
            ]
        )
        monkeypatch.setattr("time.sleep", lambda _s, world=world: next(world)())
        done = train("watch", site=site)
        assert done.exit_code == code
        assert "training 12 of 40\ntraining 13 of 40, fold 0, epoch 1, loss 0.500\n" in done.stdout
        assert f"run {run} is " in done.stdout.splitlines()[-1]


def test_status_shows_the_next_run_in_local_time_and_in_the_zone_of_the_schedule(
    site: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nightly     next run not planned: no scheduler runs" in status(site)
    catalogue.timings.see("nightly", "x", zone="America/New_York", named=("nightly",), now=now())
    catalogue.timings.plan("nightly", datetime(2026, 12, 1, 7, 30, tzinfo=UTC))
    assert "nightly     next run not planned: no scheduler runs" in status(site), "a scheduler that was killed left it"
    catalogue.roles.beat(Role(name="schedule", host="here", pid=1, seen_at=datetime.now(UTC)))
    monkeypatch.setenv("TZ", "Europe/Berlin")
    import time

    time.tzset()
    try:
        assert "next run 2026-12-01 02:30 EST (2026-12-01 08:30 CET here)" in status(site)
        catalogue.timings.skip("nightly", due_at=now() + timedelta(hours=1), why="only 12 of 50 new studies", now=now())
        assert "passed over: only 12 of 50 new studies" in status(site)
        assert "passed over: only 12 of 50 new studies" in schedule("list", site=site).stdout
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_run_that_ended_without_a_decision_is_shown_with_its_reason(site: Path, catalogue: Catalogue) -> None:
    schedule("run-now", "nightly", site=site)
    begun(catalogue, 1)
    catalogue.runs.fail(1, 1, "recipe phantom needs 5 labelled patients", now=now())
    assert "has not come to a decision; it is failed (recipe phantom needs 5" in train("show", "run-1", site=site).stdout
    assert "failed  recipe phantom needs 5" in train("list", site=site).stdout
    assert "last run    failed" in status(site)


def test_resuming_lets_go_of_a_trainer_that_was_killed_first(site: Path, catalogue: Catalogue) -> None:
    dead = machine.Worker(machine.host(), machine.this_process().pid, "another start")
    catalogue.runs.start(kind="finetune", recipe="phantom", devices="d", worker=dead, now=now(), until=now())
    done = train("resume", "1", "--reason", "it was killed", site=site)
    assert done.exit_code == 0, done.exception
    assert catalogue.runs.get(1).state == "queued"


def test_settings_named_before_the_verb_are_not_passed_over(site: Path) -> None:
    done = CliRunner().invoke(verbs.schedule_app, ["--config", str(site), "pause", "nightly", "--reason", "which site?"])
    assert done.exit_code == 2
    assert "after the verb" in done.output


def test_the_scheduler_does_not_start_where_nothing_can_be_trained(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with exit code 2 (final): the unit is not started again and again."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "apscheduler" else name)
    done = CliRunner().invoke(verbs.schedule_app, ["--config", str(site)])
    assert isinstance(done.exception, BadSettings)
    assert "apscheduler is not installed" in str(done.exception)


def test_check_names_a_schedule_that_cannot_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = load(init_site(tmp_path, schedule=[{**NIGHTLY, "recipe": "no_such"}]))
    found = [(one.verdict, one.told) for one in check._schedules(site)]
    assert [verdict for verdict, _ in found] == ["FAIL"]
    assert "nightly: there is no recipe 'no_such'" in found[0][1]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = next(one.told for one in check._schedules(site))
    assert "apscheduler, torch, torchvision is not installed" in told
    assert "let another machine of this catalogue run them" in told
    assert [one.verdict for one in check._schedules(site)] == ["warn"], "a machine that never trains may name them, too"
    monkeypatch.undo()
    good = load(init_site(tmp_path / "good", schedule=[NIGHTLY]))
    assert [(one.verdict, one.told) for one in check._schedules(good)] == [("ok", "nightly")]


@pytest.mark.parametrize(("schedules", "missing", "roles"), [(1, False, 3), (0, False, 2), (1, True, 2)])
def test_serve_runs_the_schedule_where_there_is_one_and_it_can_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedules: int, missing: bool, roles: int
) -> None:
    site = init_site(tmp_path, schedule=[NIGHTLY] * schedules)
    if missing:
        monkeypatch.setattr(serve, "missing_to_train", lambda: ["apscheduler"])
    served: list[str] = []
    monkeypatch.setattr("node.supervise.supervise", lambda children, stop: served.extend(one.name for one in children) or 0)
    with pytest.raises(typer.Exit):
        serve.serve(site)
    assert served == ["receive", "reply", "schedule"][:roles]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cron": "60 2 * * *"}, 'minute "60"'),
        ({"cron": "0 2 30 2 *"}, "never comes"),
        ({"every": "6h"}, "one of the two"),
        ({"cron": ""}, "one of the two"),
        ({"timezone": "Europe/Atlantis"}, "Europe/Atlantis"),
        ({"timezone": "../etc/passwd"}, "no time zone"),
        ({"kind": "sweep"}, "cycle"),
        ({"name": "12"}, "pattern"),
        ({"when": {"new_studies": -1}}, "greater than"),
        ({"when": {"quiet_hours": "7-19"}}, "22:00-06:00"),
    ],
)
def test_a_wrong_schedule_is_named_with_its_line(tmp_path: Path, change: dict[str, object], says: str) -> None:
    from node.errors import BadSettings

    with pytest.raises(BadSettings, match="line ") as error:
        init_site(tmp_path, schedule=[{**NIGHTLY, "name": "good"}, {**NIGHTLY, **change}])
    assert "schedule.1" in str(error.value)
    assert says in str(error.value)


def reported(site: Path, catalogue: Catalogue, *, with_page: bool = True) -> Path:
    """Let a run have come to an end, with or without its page."""
    run = catalogue.runs.ask(kind="finetune", recipe="phantom", schedule="nightly", by="me", reason="", now=now()).id
    begun(catalogue, run)
    progress(site, run)
    folder = load(site).storage.root / "runs" / f"run-{run}"
    if with_page:
        (folder / "report.html").write_text("<!doctype html>")
    catalogue.runs.done(run, 1, model_id="v", decision="refuse", now=now())
    return folder


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a person sit before a screen; give the addresses that are opened on it."""
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: not opened.append(address))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("os.isatty", lambda _fd: True)
    return opened


def test_the_newest_report_is_opened_where_a_person_sits_before_a_screen(
    site: Path, catalogue: Catalogue, browser: list[str]
) -> None:
    older, newer = reported(site, catalogue), reported(site, catalogue)
    reported(site, catalogue, with_page=False)
    assert train("report", site=site).stdout == f"opened {newer / 'report.html'}\n"
    train("report", "1", site=site)
    assert browser == [(folder / "report.html").as_uri() for folder in (newer, older)]


@pytest.mark.parametrize("lacking", ["display", "terminal", "browser"])
def test_where_nobody_could_see_a_report_its_path_is_printed(
    site: Path, catalogue: Catalogue, browser: list[str], monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    if lacking == "display":
        monkeypatch.delenv("DISPLAY")
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    elif lacking == "terminal":
        monkeypatch.setattr("os.isatty", lambda _fd: False)
    else:
        monkeypatch.setattr(webbrowser, "open", lambda _address: False)
    folder = reported(site, catalogue)
    assert train("report", site=site).stdout == f"{folder / 'report.html'}\n"
    assert browser == []


def test_a_report_that_is_not_there_is_said_with_what_helps(site: Path, catalogue: Catalogue) -> None:
    assert "no run has a report yet" in str(train("report", site=site).exception)
    reported(site, catalogue, with_page=False)
    assert "no run has a report yet" in str(train("report", site=site).exception)
    assert "run-1 has no report yet; `osteon train report run-1 --print`" in str(train("report", "run-1", site=site).exception)
    schedule("run-now", "nightly", site=site)
    assert "run 2 has left nothing yet; it is queued" in str(train("report", "2", site=site).exception)


def test_a_summary_tells_decision_figures_probe_and_clusters_without_a_page(site: Path, catalogue: Catalogue) -> None:
    folder = reported(site, catalogue, with_page=False)
    assert "result   not there yet" in train("report", "1", "--print", site=site).stdout
    metric = {"name": "AUC, locked patients", "value": 0.8125, "low": 0.7, "high": 0.9, "n": 41, "method": "bootstrap"}
    decided = {"decision": "refuse", "words": "It is shown to be worse.", "metrics": [metric]}
    (folder / "decision.json").write_text(json.dumps(decided))
    (folder / "pretrain").mkdir()
    lines = "".join(f"{json.dumps(line)}\n" for line in journals.pretraining(12))
    (folder / "pretrain" / "metrics.jsonl").write_text(lines + '{"epoch": 13, "kn')
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in journals.folds()))
    told = train("report", "1", "--print", site=site).stdout
    assert "gate     refuse: It is shown to be worse." in told
    assert "0.812  (0.700 to 0.900, 41 patients)" in told
    assert "probe    k-NN: 0.720 in epoch 12, best 0.720 in epoch 12" in told
    assert "probe    linear: 0.820 in epoch 12" in told
    assert "clusters smallest 3, quartiles 20 / 46 / 55, largest 140 images in epoch 12" in told
    assert "page     not drawn yet" in told
    assert "probes " not in told
    words = "Not offered: below the start weights (AUC minus start: k-NN -0.043 (-0.100 to +0.013, 41 patients))."
    probed = [metric | {"name": "AUC, k-NN, start"}, metric | {"name": "AUC, k-NN, pretrained", "value": 0.77}]
    (folder / "pretrain" / "probe.json").write_text(json.dumps({"offered": False, "words": words, "metrics": probed}))
    told = train("report", "1", "--print", site=site).stdout
    assert f"probes   {words}" in told
    assert re.search(r"AUC, k-NN, start +0\.812 .*\nAUC, k-NN, pretrained +0\.770 ", told)


def test_a_summary_of_a_sweep_lays_the_numbers_of_clusters_side_by_side(site: Path, catalogue: Catalogue) -> None:
    folder = reported(site, catalogue)
    row = {"k": 50, "chance": 0.05, "knn": 0.7, "linear": 0.8, "offered": True}
    rows = [
        row | {"accuracy": {"value": 0.6, "low": 0.5, "high": 0.7, "n": 90}, "over_chance": 0.55},
        row | {"k": 100, "accuracy": {"value": 0.03, "low": 0, "high": 0.1, "n": 90}, "over_chance": -0.02, "knn": None},
    ]
    (folder / "sweep.json").write_text(json.dumps({"rows": rows, "by_study_rule": 50, "by_probes": 100}))
    (folder / "outcome.json").write_text(
        json.dumps({"decision": "swept", "words": "Number of clusters by the study's rule: 50."})
    )
    shown = train("show", "1", site=site).stdout
    assert "result   swept: Number of clusters by the study's rule: 50." in shown
    assert "not come to a decision" not in shown
    told = train("report", "1", "--print", site=site).stdout
    assert "gate" not in told
    assert "sweep    by the study's rule 50 clusters, by the probes 100" in told
    heading, first, second = (line.split() for line in told.splitlines()[2:5])
    assert heading[0] == "clusters"
    assert first == ["50", "0.600", "(0.500", "to", "0.700)", "0.050", "+0.550", "0.700", "0.800", "yes"]
    assert (second[0], second[6], second[7]) == ("100", "-0.020", "–")
    assert all(line in shown for line in told.splitlines()[1:5])


def test_a_run_that_no_gate_judged_is_not_said_to_be_judged_by_it(site: Path, catalogue: Catalogue) -> None:
    run = catalogue.runs.ask(kind="pretrain", recipe="phantom", schedule="", by="me", reason="", now=now()).id
    begun(catalogue, run)
    catalogue.runs.done(run, 1, model_id="", decision="not offered", now=now())
    told = train("watch", "1", site=site).stdout
    assert "run 1 is done" in told
    assert "result: not offered" in told
    assert "gate" not in told


# --- what a run is told to do -------------------------------------------------------------------------------------------------


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object]]]:
    """Give recipe and orders of each run that would have started."""
    started: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(verbs, "_train", lambda _config, recipe, orders, *_: started.append((recipe, orders)))
    return started


def ran(catalogue: Catalogue, kind: str) -> Run:
    run = catalogue.runs.ask(kind=kind, recipe="phantom", schedule="nightly", by="me", reason="", now=now()).id
    begun(catalogue, run)
    catalogue.runs.done(run, 1, model_id="", decision="", now=now())
    return catalogue.runs.get(run)


@pytest.mark.parametrize(
    ("words", "recipe", "orders"),
    [
        (("run",), "", {"kind": "cycle"}),
        (("run", "--only", "pretrain", "--recipe", "ewing"), "ewing", {"kind": "pretrain"}),
        (("run", "--only", "finetune"), "", {"kind": "finetune"}),
        (("sweep", "--clusters", "200,50,50"), "", {"kind": "sweep", "clusters": [50, 200], "epochs": 0}),
        (
            ("sweep", "--clusters", "2, 9", "--epochs", "4", "--recipe", "ewing"),
            "ewing",
            {"kind": "sweep", "clusters": [2, 9], "epochs": 4},
        ),
    ],
)
def test_a_run_is_started_with_what_the_operator_said(
    site: Path, ordered: list[tuple[str, dict[str, object]]], words: tuple[str, ...], recipe: str, orders: dict[str, object]
) -> None:
    assert train(*words, site=site).exit_code == 0
    assert ordered == [(recipe, orders)]


@pytest.mark.parametrize("kind", ["cycle", "pretrain"])
def test_a_run_is_extended_by_its_number_or_folder_as_what_it_is(
    site: Path, catalogue: Catalogue, ordered: list[tuple[str, dict[str, object]]], kind: str
) -> None:
    run = ran(catalogue, kind)
    for name in (str(run.id), run.folder):
        assert train("extend", name, "--epochs", "9", site=site).exit_code == 0
    assert ordered == [("phantom", {"kind": kind, "extends": run.folder, "epochs": 9})] * 2


def test_a_run_without_a_pretraining_to_go_on_with_is_not_extended(
    site: Path, catalogue: Catalogue, ordered: list[tuple[str, dict[str, object]]]
) -> None:
    for kind in ("finetune", "sweep"):
        refused = train("extend", str(ran(catalogue, kind).id), "--epochs", "9", site=site).exception
        assert isinstance(refused, NotFound)
        assert f"is of kind {kind}: it has no pretraining to go on with" in str(refused)
    waiting = catalogue.runs.ask(kind="pretrain", recipe="phantom", schedule="nightly", by="me", reason="", now=now()).id
    refused = train("extend", str(waiting), "--epochs", "9", site=site).exception
    assert f"run {waiting} has left nothing yet; it is queued" in str(refused)
    assert ordered == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("sweep", "--clusters", "50;100"), "--clusters: numbers with commas between them"),
        (("sweep", "--clusters", ""), "--clusters: numbers with commas between them"),
        (("sweep", "--clusters", "1,50"), "--clusters: two clusters or more"),
        (("run", "--only", "sweep"), "--only: pretrain or finetune"),
    ],
)
def test_what_cannot_be_ordered_is_said_in_one_line_and_starts_nothing(
    site: Path, ordered: list[tuple[str, dict[str, object]]], words: tuple[str, ...], says: str
) -> None:
    refused = train(*words, site=site)
    assert refused.exit_code == 2
    assert f"Invalid value for {says}" in re.sub(r"[│\s]+", " ", refused.output)
    assert ordered == []


def test_a_run_that_never_began_is_not_gone_on_with_in_the_foreground(
    site: Path, catalogue: Catalogue, ordered: list[tuple[str, dict[str, object]]]
) -> None:
    """Without its folder another run would be started, by the default recipe."""
    catalogue.runs.ask(kind="pretrain", recipe="phantom", schedule="", by="me", reason="", now=now())
    refused = train("resume", "1", "--other-processes", "--reason", "two now", site=site).exception
    assert "run 1 has left nothing yet" in str(refused)
    assert ordered == []
    assert [act.what for act in catalogue.history.acts(subject="run 1")] == ["run asked for"]
