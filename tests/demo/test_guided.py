"""The guided run's parts: it touches no foreign folder, tells the truth, leaves nothing behind; either PACS routes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from io import StringIO
from pathlib import Path

import labelled
import psutil
import pytest
from pydicom import dcmread
from rich.console import Console
from roles import until
from shared import tool

from node.commands.init import init_site
from node.demo import guided, hospital, orthanc
from node.demo.pacs import Pacs
from node.keep.catalogue import Catalogue
from node.keep.records import RunState, Worker
from node.settings import Pacs as Peer
from node.settings import load
from training import machine
from training.schedule import Timekeeper
from training.supervise import Supervisor

TRAINER = Path(__file__).parents[1] / "trainer.py"


def demo_site(folder: Path) -> Path:
    """Make the site of a demo, without starting anything."""
    return guided._site(init_site, folder / "site", 11112, Peer(name="pacs", ae_title="PACS", host="127.0.0.1", port=4242))


def test_a_folder_that_is_no_demo_is_not_emptied(tmp_path: Path) -> None:
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    with pytest.raises(guided.DemoFailed, match="not a demo"):
        guided.run(tmp_path, make_site=init_site, console=Console(file=StringIO()))
    assert precious.exists()


def test_one_untrue_check_makes_the_summary_untrue(tmp_path: Path) -> None:
    story = guided.Story(tmp_path, Console(file=StringIO()))
    assert not story.true
    story.check("water is wet", true=True)
    assert story.true
    story.check("pigs fly", true=False)
    story.write()
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["true"] is False
    assert told["checks"] == {"water is wet": True, "pigs fly": False}


@pytest.mark.parametrize("which", ["orthanc", "ours"])
def test_either_pacs_routes_a_study_to_the_node(
    which: str, tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if which == "orthanc":
        tool("Orthanc")
    else:
        monkeypatch.setattr(orthanc, "executable", lambda: None)
    files, _ = hospital.real_study(tmp_path / "real", date(2026, 5, 1))
    with (
        Pacs(tmp_path / "node", callers=["PACS"], ae_title=hospital.NODE_AE, port=free_port()) as node,
        hospital.running_pacs(tmp_path / "pacs", node.port) as pacs,
    ):
        hospital.send(files, pacs.peer, calling=hospital.MODALITY_AE)
        assert pacs.reports() == []
        pacs.route(dcmread(files[0], stop_before_pixels=True).StudyInstanceUID)
        until(lambda: len(node.held("CR")) == len(files), seconds=30, told="the routed study")
        sent = {dcmread(file).SOPInstanceUID: dcmread(file) for file in files}
        for file in node.held("CR"):
            came = dcmread(file)
            assert came.file_meta.TransferSyntaxUID == sent[came.SOPInstanceUID].file_meta.TransferSyntaxUID
            assert came.PixelData == sent[came.SOPInstanceUID].PixelData


def test_a_stopped_demo_leaves_no_process_behind(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    demo = subprocess.Popen(
        [sys.executable, "-m", "node", "demo", "--folder", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def children() -> list[psutil.Process]:
        return [process for process in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(process.info["cmdline"] or ())]

    try:
        until(lambda: len(children()) >= 4, seconds=60, told="demo, PACS, node and a role")
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(60) == 130
    finally:
        demo.kill()
        demo.wait()
    until(lambda: not children(), seconds=30, told="the end of every child")


def test_the_schedule_of_the_demo_runs_once_when_the_labels_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guided, "NEW_LABELS", 2)
    config = demo_site(tmp_path)
    now = labelled.NOW - timedelta(seconds=115)
    with Catalogue.open(load(config).storage.catalogue) as catalogue:
        keeper = Timekeeper(load(config), catalogue, now=lambda: now)
        keeper.begin()

        def rings() -> int:
            nonlocal now
            now += timedelta(minutes=1)
            keeper.ring(guided.SCHEDULE)
            return len(catalogue.runs.list())

        assert rings() == 0, "nothing is labelled yet"
        labelled.fill(config, patients=2)
        assert rings() == 1
        run = catalogue.runs.lease(devices="d", host="h", ready=lambda run: True, now=now, until=now + timedelta(minutes=5))
        assert run is not None
        assert (run.kind, run.recipe, run.due_at) == ("cycle", guided.RECIPE, labelled.NOW + timedelta(seconds=5))
        assert rings() == 1, "no label is new since the run began"
        catalogue.runs.enter(run.id, run.tries, Worker("h", 1, "b"), until=now + timedelta(minutes=5))
        assert catalogue.runs.done(run.id, run.tries, model_id="m", decision="refuse", now=now)
        assert rings() == 1
        keeper.end()


@pytest.mark.parametrize("trainer", ["work", "stubborn"])
def test_a_demo_that_is_stopped_while_it_trains_leaves_no_trainer(
    trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guided, "GRACE_S", 20.0 if trainer == "work" else 1.0)
    config = demo_site(tmp_path)
    site = load(config)
    with Catalogue.open(site.storage.catalogue) as catalogue:
        run = catalogue.runs.ask(
            kind="cycle", recipe="phantom", schedule=guided.SCHEDULE, by="me", reason="a test", now=datetime.now(UTC)
        )
        supervisor = Supervisor(
            site,
            catalogue,
            lambda run: (
                *(sys.executable, str(TRAINER), site.storage.catalogue, str(tmp_path), str(run.id), str(run.tries)),
                trainer,
            ),
            now=lambda: datetime.now(UTC),
        )
        over = threading.Event()

        def supervise() -> None:
            while not over.wait(0.1):
                supervisor.step()

        thread = threading.Thread(target=supervise)
        thread.start()
        try:
            until(lambda: (tmp_path / "environment").exists(), seconds=60, told="a trainer at work")
            worker = catalogue.runs.get(run.id).worker
            assert worker is not None
            assert machine.lives(worker)
            guided._end_runs(site, config)
            assert catalogue.runs.get(run.id).state is RunState.CANCELLED
            until(lambda: not machine.lives(worker) and not supervisor._started, told="the end of the trainer")
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize("offered", [True, False])
def test_what_the_pretraining_came_to_is_told_as_the_run_left_it(tmp_path: Path, *, offered: bool) -> None:
    (tmp_path / "pretrain").mkdir()
    accuracy = {"value": 0.43, "low": 0.2, "high": 0.7, "n": 21}
    classifier = {"clusters": 8, "accuracy": accuracy, "accuracy_by_patient": accuracy, "chance": 0.21, "best_epoch": 3}
    probe = {"offered": offered, "words": "The probes' own words.", "metrics": [{"name": "AUC, k-NN, start", "value": 0.8}]}
    for name, plain in (
        ("pretraining-corpus", {"images": [{}] * 195}),
        ("pretrain/classifier", classifier),
        ("pretrain/probe", probe),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(plain))
    found = guided._pretraining(tmp_path)
    assert (found["offered"], found["words"], found["probes"]) == (offered, probe["words"], probe["metrics"])
    told = guided._told(found)
    assert "8 clusters of 195 images" in told
    assert "0.43 on 21 images (largest cluster 0.21)" in told
    assert told.endswith("; offered by the probes" if offered else "; not offered by the probes")
