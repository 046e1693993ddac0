"""The guided run's parts: it touches no foreign folder, tells the truth, leaves nothing behind; either PACS routes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from io import StringIO
from pathlib import Path

import psutil
import pytest
from pydicom import dcmread
from rich.console import Console
from roles import until
from shared import tool

from node.commands.init import init_site
from node.demo import guided, hospital, orthanc
from node.demo.pacs import Pacs


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
