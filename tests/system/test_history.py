"""Everything a person does stands in the history, with who and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from roles import hand_in
from studies import image, study
from tiny_model import shelve
from typer.testing import CliRunner

from models.registry import Registry
from node import settings
from node.__main__ import build
from node.receive.intake import Intake

WHY = "because of ticket 4711"


@pytest.fixture
def intake(site: Path) -> Any:
    """Give a site with a learned and an answered study, an image of no patient, and two held ones."""
    opened = Intake.open(settings.load(site))
    for one in (*study(), image(instance=3, PatientID=""), image(instance=4, BurnedInAnnotation="YES"), image(patient=2)):
        hand_in(opened, one)
    yield opened
    opened.close()


def _held(intake: Intake, number: int) -> str:
    return intake.catalogue.instances.held()[number][0].id


def _version(intake: Intake, slope: float) -> str:
    root = intake.settings.storage.root
    return shelve(Registry(root / "models"), root, slope=slope)


def _labels(intake: Intake) -> str:
    file = intake.settings.storage.root / "labels.csv"
    header = "patient_id,study,label,reader,labelled_on,confirmed_by"
    file.write_text(f"{header}\nPID00001,ACC001001,ewing_sarcoma,r1,2024-04-01,histology\n")
    return str(file)


def _pids(intake: Intake) -> tuple[str, str]:
    return intake.keys.pid("HOSPITAL", "PID00001"), intake.keys.pid("HOSPITAL", "PID00002")


ACTS: dict[str, Callable[[Intake], list[list[str]]]] = {
    "reply pause": lambda _: [["reply", "pause"]],
    "reply resume": lambda _: [["reply", "resume"]],
    "reply study": lambda _: [["reply", "study", "ACC002001"]],
    "quarantine show": lambda intake: [["quarantine", "show", _held(intake, 0), "--out", str(intake.settings.storage.root)]],
    "quarantine release": lambda intake: [["quarantine", "release", _held(intake, 1)]],
    "quarantine release as": lambda intake: [["quarantine", "release", _held(intake, 0), "--as-patient", "study"]],
    "quarantine discard": lambda intake: [["quarantine", "discard", _held(intake, 0), "--yes"]],
    "models promote": lambda intake: [["models", "promote", _version(intake, 1.0)], ["models", "promote", _version(intake, 2.0)]],
    "models rollback": lambda intake: [*ACTS["models promote"](intake), ["models", "rollback"]],
    "patients merge": lambda intake: [["patients", "merge", *_pids(intake)]],
    "labels import": lambda intake: [["labels", "import", _labels(intake)]],
    "vault rotate": lambda intake: [["vault", "rotate", "--new-key", str(intake.settings.storage.root / "new.key")]],
}


@pytest.mark.parametrize("act", ACTS)
def test_an_act_stands_in_the_history_with_its_reason(
    intake: Intake, site: Path, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "meier")
    acts = ACTS[act](intake)
    for words in acts:
        result = CliRunner().invoke(build(), [*words, "--reason", WHY, "--config", str(site)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    told = CliRunner().invoke(build(), ["history", "--config", str(site)]).output.splitlines()
    told = [line for line in told if "the locked set" not in line]  # what follows of a merge has a reason of its own
    assert len(told) >= len(acts)
    assert all("meier" in line and WHY in line for line in told)


def test_the_history_of_nothing_says_so(site: Path) -> None:
    assert "Nobody did anything yet." in CliRunner().invoke(build(), ["history", "--config", str(site)]).output
    assert "to vault." in CliRunner().invoke(build(), ["history", "--subject", "vault", "--config", str(site)]).output
