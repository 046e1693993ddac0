"""`osteon delivery list` and `retry`, on a catalogue with one delivery in each state."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import answers
import pytest
from studies import image, part10
from typer.testing import CliRunner

from node import settings
from node.commands.delivery import app
from node.errors import NotFound
from node.keep.catalogue import Catalogue
from node.keep.records import DeliveryState, Instance, Purpose

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)


@pytest.fixture
def url(site: Path) -> str:
    """Fill the catalogue of a site: one result for three destinations, of which one has it, one is held, one given up."""
    url = settings.load(site).storage.catalogue
    identity = answers.identity(part10(image()))
    instance = Instance(
        sop_uid=identity.sop_uid,
        series_uid=identity.series_uid,
        study_uid=identity.study_uid,
        pid=identity.pid,
        sop_class_uid=identity.sop_class_uid,
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        path="a/b/c.dcm",
        header_digest="h",
        pixel_digest="p",
        modality="DX",
        body_part="LEG",
        age_years=12,
        sex="F",
        device="",
        accession_key="",
        study_id_key="",
    )
    with Catalogue.open(url) as catalogue:
        catalogue.instances.note(instance, purpose=Purpose.ANSWER, calling_ae="SENDER", locked=False, now=NOW)
        later = NOW + timedelta(minutes=10)
        catalogue.studies.complete_due(quiet_s=1, max_wait_s=60, now=later)
        study = catalogue.studies.claim(claim_s=60, now=later)
        assert study is not None
        catalogue.results.put(
            study.uid,
            answers.findings([identity]),
            content_digest=catalogue.studies.content(study.uid),
            settings_digest="s",
            destinations=["away", "has-it", "other-patient"],
            now=later,
        )
        assert catalogue.deliveries.open_due(answers_on=True, now=later) > 0
        ids = {row.destination: row.id for row in catalogue.deliveries.list()}
        catalogue.deliveries.kill(ids["away"], reason="away: no association", now=later)
        catalogue.deliveries.sent(ids["has-it"], now=later)
        catalogue.deliveries.hold(ids["other-patient"], reason="other-patient: holds this study under another patient", now=later)
    return url


def states(url: str) -> dict[str, DeliveryState]:
    with Catalogue.open(url) as catalogue:
        return {row.destination: row.state for row in catalogue.deliveries.list()}


def osteon_delivery(*arguments: str, site: Path) -> str:
    done = CliRunner().invoke(app, [*arguments, "--config", str(site)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_list_shows_each_delivery_and_why_it_stands(site: Path, url: str) -> None:
    told = osteon_delivery("list", site=site)
    for text in ("dead", "away: no association", "sent", "held", "another patient", answers.identity(part10(image())).study_uid):
        assert text in told
    held = osteon_delivery("list", "--state", "held", site=site)
    assert "other-patient" in held
    assert "has-it" not in held
    assert "No deliveries" in osteon_delivery("list", "--state", "pending", site=site)
    assert "no such state" in osteon_delivery("list", "--state", "lost", site=site)


def test_retry_starts_one_or_all_again_and_keeps_the_reason(site: Path, url: str) -> None:
    with Catalogue.open(url) as catalogue:
        ids = {row.destination: str(row.id) for row in catalogue.deliveries.list()}
    osteon_delivery("retry", ids["away"], "--reason", "network repaired", site=site)
    assert states(url)["away"] is DeliveryState.PENDING
    assert states(url)["other-patient"] is DeliveryState.HELD
    osteon_delivery("retry", "--all", "--reason", "patients merged", site=site)
    assert states(url) == {
        "away": DeliveryState.PENDING,
        "other-patient": DeliveryState.PENDING,
        "has-it": DeliveryState.SENT,
    }
    with Catalogue.open(url) as catalogue:
        assert {act.reason for act in catalogue.history.acts()} >= {"network repaired", "patients merged"}


def test_what_is_sent_or_unknown_is_not_retried(site: Path, url: str) -> None:
    with Catalogue.open(url) as catalogue:
        (sent,) = catalogue.deliveries.list([DeliveryState.SENT])
    for number in (str(sent.id), "4711"):
        with pytest.raises(NotFound):
            osteon_delivery("retry", number, "--reason", "x", site=site)


def test_retry_wants_a_reason_and_a_delivery(site: Path, url: str) -> None:
    assert "--reason" in osteon_delivery("retry", "1", site=site)
    assert "--all" in osteon_delivery("retry", "--reason", "x", site=site)
