"""The README's first command, from a clean clone, as a newcomer has it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydicom import dcmread

ROOT = Path(__file__).resolve().parents[2]
PROMISED_S = 360
"""All that the demo shows, once everything is installed, on two cores."""


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_make_demo_from_a_clean_clone_shows_what_it_promises(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None or shutil.which("make") is None:
        pytest.skip("git is not here")
    clone = tmp_path / "osteon"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)], check=True, timeout=120)
    clean = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH", "OSTEON_CONFIG")}
    command = ["make", "demo", f"PYTHON={getattr(sys, '_base_executable', sys.executable)}"]
    done = subprocess.run(
        command, cwd=clone, env=clean, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1700, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    told = json.loads((clone / "build/demo/summary.json").read_text("utf-8"))
    assert told["true"]
    assert all(told["checks"].values())
    assert told["seconds_total"] <= PROMISED_S, told["seconds"]
    assert told["schedule"]["due_at"]
    pretraining = told["pretraining"]
    assert pretraining["accuracy"]["n"] > 0
    assert {"AUC, k-NN, start", "AUC, k-NN, pretrained"} <= {metric["name"] for metric in pretraining["probes"]}
    assert pretraining["offered"] == told["started_from"].startswith("pretrained by run ")
    assert pretraining["words"].startswith("Offered" if pretraining["offered"] else "Not offered")
    assert told["gate"]["decision"] == "insufficient evidence"
    assert told["promoted"]["by"]
    assert told["promoted"]["reason"]
    assert all(metric["n"] > 0 and metric["low"] <= metric["value"] <= metric["high"] for metric in told["metrics"])
    sr = dcmread(told["sr_file"])
    assert (sr.StudyInstanceUID, sr.SOPInstanceUID) == (told["study_uid"], told["sr_uid"])
    assert "fibroma" in done.stdout
