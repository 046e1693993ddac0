"""From a hospital's tools to a real PACS and back: dcmtk sends, the served node answers, Orthanc holds the report."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orthanc import running_orthanc
from pydicom import dcmread
from roles import UNWATCHED, running, until
from shared import tool
from studies import part10, study
from tiny_model import promote_tiny

from node import settings as site_settings
from node.commands.init import init_site


def rest(url: str, path: str) -> Any:
    with urllib.request.urlopen(url + path, timeout=10) as answer:  # noqa: S310  a PACS of ours on loopback
        return answer.read() if path.endswith("/file") else json.loads(answer.read())


def test_a_study_routed_with_storescu_is_answered_in_orthanc(tmp_path: Path, free_port: Callable[[], int]) -> None:
    storescu, echoscu = tool("storescu"), tool("echoscu")
    images = study(patient=1, images=2, PatientName="Test^Älteste")
    files = []
    for number, image in enumerate(images):
        files.append(tmp_path / f"{number}.dcm")
        files[-1].write_bytes(part10(image))
    port = free_port()
    with running_orthanc(tmp_path / "orthanc", callers={"OSTEON": port, "SENDER": port}) as orthanc:
        config = init_site(
            tmp_path / "site",
            node={"port": port, "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"]}]},
            pacs=[{"name": "main", "ae_title": orthanc.ae_title, "host": "127.0.0.1", "port": orthanc.port}],
            completion={"quiet_s": 1.0},
            metrics=UNWATCHED,
        )
        promote_tiny(site_settings.load(config).storage.root / "models")
        send = [storescu, "-R", "-aet", "SENDER", "127.0.0.1"]
        subprocess.run([*send, "-aec", orthanc.ae_title, str(orthanc.port), *map(str, files)], check=True, timeout=60)
        with running("serve", config=config) as role:
            role.event("listening")
            subprocess.run([echoscu, "-aet", "SENDER", "-aec", "OSTEON", "127.0.0.1", str(port)], check=True, timeout=30)
            subprocess.run([*send, "-aec", "OSTEON", str(port), *map(str, files)], check=True, timeout=60)
            role.event("result delivered")
        studies = rest(orthanc.url, "/studies")
        assert len(studies) == 1
        series = [rest(orthanc.url, f"/series/{one}") for one in rest(orthanc.url, f"/studies/{studies[0]}")["Series"]]
        (report,) = [one for one in series if one["MainDicomTags"]["Modality"] == "SR"]
        received = tmp_path / "sr.dcm"
        received.write_bytes(rest(orthanc.url, f"/instances/{report['Instances'][0]}/file"))
    sr = dcmread(received)
    assert sr.PatientName == images[0].PatientName
    assert sr.StudyInstanceUID == images[0].StudyInstanceUID
    shown = subprocess.run([tool("dsrdump"), "+Pc", str(received)], capture_output=True, text=True, timeout=30, check=True)
    assert "FOR RESEARCH USE ONLY" in shown.stdout
    assert "PatientIdentityRemoved" not in sr


def test_an_unplugged_pacs_gets_its_result_once_it_is_back(tmp_path: Path, free_port: Callable[[], int]) -> None:
    storescu = tool("storescu")
    image = study(patient=1, images=1)[0]
    file = tmp_path / "1.dcm"
    file.write_bytes(part10(image))
    port, pacs_port = free_port(), free_port()
    config = init_site(
        tmp_path / "site",
        node={"port": port, "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"]}]},
        pacs=[{"name": "main", "ae_title": "ORTHANC", "host": "127.0.0.1", "port": pacs_port, "timeout_s": 3.0}],
        completion={"quiet_s": 0.2},
        delivery={"retry_first_s": 0.5, "retry_max_s": 1.0},
        metrics=UNWATCHED,
    )
    promote_tiny(site_settings.load(config).storage.root / "models")
    with running("serve", config=config) as role:
        role.event("listening")
        subprocess.run(
            [storescu, "-R", "-aet", "SENDER", "-aec", "OSTEON", "127.0.0.1", str(port), str(file)], check=True, timeout=60
        )
        assert "is it running and reachable?" in role.event("result not delivered")["reason"]
        with running_orthanc(tmp_path / "orthanc", callers={"OSTEON": port}, port=pacs_port) as orthanc:
            until(lambda: rest(orthanc.url, "/instances"), seconds=60, told="the report")
            role.event("result delivered")
            assert len(rest(orthanc.url, "/instances")) == 1
