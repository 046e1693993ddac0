"""When a role can do its job, and when it says that it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from roles import UNWATCHED, hand_in
from studies import image, study
from tiny_model import promote_tiny

from node import settings as site_settings
from node.commands.check import Verdict, findings
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.metrics.meters import ReplyMeters
from node.receive import intake as reception
from node.receive.intake import Intake
from node.reply import respond
from node.reply.respond import Reply
from node.settings import Settings


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with Pacs(tmp_path / "pacs", callers=["OSTEON"]) as running:
        yield running


def site_of(tmp_path: Path, pacs: Pacs | None = None, **pieces: object) -> Settings:
    destination = [{"name": "main", "ae_title": pacs.ae_title, "host": "127.0.0.1", "port": pacs.port}] if pacs else []
    values: dict[str, object] = {
        "node": {"port": 0, "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"]}]},
        "pacs": destination,
        "completion": {"quiet_s": 0.0},
        "metrics": UNWATCHED,
    }
    return site_settings.load(init_site(tmp_path / "site", **(values | pieces)))  # type: ignore[arg-type]


def test_a_receiver_is_ready_until_a_store_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    intake = Intake.open(site_of(tmp_path))
    try:
        intake.beat({})
        assert intake.troubles() == []
        monkeypatch.setattr(reception, "SILENT_S", -1.0)
        (told,) = intake.troubles()
        assert "databases have taken nothing" in told
        intake.archive.folder.rmdir()
        assert "archive/ cannot be written" in intake.troubles()
    finally:
        intake.close()


def test_too_little_room_is_a_trouble_of_both_roles_and_of_check(tmp_path: Path) -> None:
    settings = site_of(tmp_path, storage={"free_min_gb": 900000.0})
    intake, reply = Intake.open(settings), Reply.open(settings)
    try:
        assert any("free_min_gb" in told for told in intake.troubles())
        assert any("free_min_gb" in told for told in reply.ready().troubles)
    finally:
        intake.close()
        reply.close()
    assert [found.verdict for found in findings(settings) if found.what == "disk"] == [Verdict.FAIL]


def test_a_replier_without_a_model_is_ready_and_says_that_studies_wait(tmp_path: Path) -> None:
    with respond.opened(site_of(tmp_path)) as reply:
        reply.beat()
        reply.step()
        ready = reply.ready()
        assert ready.troubles == []
        assert "no model is in service" in str(ready.told["waiting"])


def test_a_model_that_does_not_work_makes_the_replier_unready(tmp_path: Path) -> None:
    settings = site_of(tmp_path)
    registry = CollectorRegistry()
    version = promote_tiny(settings.storage.root / "models")
    (settings.storage.root / "models" / "versions" / version / "model.onnx").unlink()
    with respond.opened(settings, meters=ReplyMeters(registry)) as reply:
        reply.step()
        (told,) = reply.ready().troubles
        assert told.startswith("the model in service does not work")
        assert registry.get_sample_value("osteon_model_trouble") == 1
        assert registry.get_sample_value("osteon_model_info", {"version": ""}) == 1


def test_a_pacs_that_is_away_does_not_make_the_replier_unready(tmp_path: Path, pacs: Pacs) -> None:
    settings = site_of(tmp_path, pacs)
    promote_tiny(settings.storage.root / "models")
    with respond.opened(settings) as reply:
        intake = Intake.open(settings)
        hand_in(intake, image())
        intake.close()
        pacs.stop()
        while reply.step():
            pass
        assert reply.deliver_step(settings.pacs[0])
        ready = reply.ready()
        assert (ready.troubles, ready.told["destinations_away"]) == ([], ["main"])


@pytest.mark.parametrize(("host", "verdict"), [("127.0.0.1", Verdict.OK), ("::1", Verdict.OK), ("0.0.0.0", Verdict.WARN)])  # noqa: S104
def test_check_warns_of_figures_that_others_can_read(tmp_path: Path, host: str, verdict: Verdict) -> None:
    settings = site_of(tmp_path, metrics=UNWATCHED | {"host": host})
    assert [found.verdict for found in findings(settings) if found.what == "metrics"] == [verdict]


# --- the time to answer ----------------------------------------------------------------------------------------------------


def _answered_after(reply: Reply, registry: CollectorRegistry, settings: Settings) -> float:
    """Let the replier work; give the seconds that the newest answer took by its own account."""
    before = registry.get_sample_value("osteon_answer_seconds_sum", {"destination": "main"}) or 0.0
    busy = True
    while busy:
        busy = reply.step()
        busy = reply.deliver_step(settings.pacs[0]) or busy
    return (registry.get_sample_value("osteon_answer_seconds_sum", {"destination": "main"}) or 0.0) - before


def test_the_time_to_answer_counts_from_the_first_image_of_the_round(
    tmp_path: Path, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, registry = site_of(tmp_path, pacs), CollectorRegistry()
    promote_tiny(settings.storage.root / "models")
    later = [timedelta()]
    now = reception._now
    for room in (reception, respond):
        monkeypatch.setattr(room, "_now", lambda: now() + later[0])
    intake = Intake.open(settings)
    try:
        with respond.opened(settings, meters=ReplyMeters(registry)) as reply:
            first, second = study(patient=1, images=2)
            hand_in(intake, first)
            later[0] += timedelta(minutes=10)
            assert 600 <= _answered_after(reply, registry, settings) < 700
            later[0] += timedelta(days=1)
            hand_in(intake, second)  # a new round: yesterday does not count
            later[0] += timedelta(minutes=5)
            assert 300 <= _answered_after(reply, registry, settings) < 400
            later[0] += timedelta(days=1)
            uid = intake.keys.uid(first.StudyInstanceUID)
            promote_tiny(settings.storage.root / "models", slope=3.0)
            reply.catalogue.studies.reopen(uid, now=respond._now(), by="test", reason="another model")
            later[0] += timedelta(minutes=1)
            assert 60 <= _answered_after(reply, registry, settings) < 160, "from the request on"
            assert registry.get_sample_value("osteon_answer_seconds_count", {"destination": "main"}) == 3
    finally:
        intake.close()
