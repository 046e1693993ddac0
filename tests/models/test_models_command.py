"""`osteon models`: what is on the shelf, what is in service, and how that changes."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import tiny_model
from typer.testing import CliRunner

from models import durable
from models.card import IMAGENET
from models.errors import NoSuchVersion, NoSuchWeights, NotAllowed, OsteonError, Tampered
from models.registry import Registry
from node.commands.models import app
from node.errors import PeerAway
from node.keep.catalogue import Catalogue
from node.keep.records import Instance, Purpose
from node.settings import Settings, load

Osteon = Callable[..., str]


@pytest.fixture
def settings(site: Path) -> Settings:
    return load(site)


@pytest.fixture
def shelf(settings: Settings) -> Registry:
    return Registry(settings.storage.root / "models")


@pytest.fixture
def osteon(site: Path) -> Osteon:
    """Give a function that runs `osteon models …` and gives what it prints, or raises what it raised."""

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, [*words, "--config", str(site)])
        if isinstance(done.exception, OsteonError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    return run


def test_an_empty_shelf_says_how_to_fill_it(osteon: Osteon) -> None:
    assert "osteon train run" in osteon("list")


def test_list_shows_metrics_with_n_and_who_is_champion(osteon: Osteon, shelf: Registry, tmp_path: Path) -> None:
    one, two = (tiny_model.shelve(shelf, tmp_path, slope=slope) for slope in (1.0, 2.0))
    osteon("promote", one, "--reason", "a trial")
    lines = osteon("list").splitlines()
    (row,) = [line for line in lines if one in line]
    assert "champion" in row
    assert "0.810 (0.620 to 0.970; n = 16)" in row
    assert "insufficient evidence" in row
    assert "champion" not in next(line for line in lines if two in line)


def test_promotion_is_a_named_decision_that_stays_in_the_history(osteon: Osteon, shelf: Registry, tmp_path: Path) -> None:
    one, two = (tiny_model.shelve(shelf, tmp_path, slope=slope) for slope in (1.0, 2.0))
    said = osteon("promote", one, "--reason", "seen [by] all")
    assert one in said
    assert getpass.getuser() in said
    assert "insufficient evidence" in said
    said = osteon("promote", two, "--reason", "better", "--by", "Dr Who")
    assert f"instead of:     {one}" in said
    assert shelf.champion() == two
    assert shelf.history()[-1].decision == "insufficient evidence"
    told = osteon("history")
    for what in (one, two, "Dr Who", "seen [by] all", "better"):
        assert what in told
    assert "already" in osteon("promote", two, "--reason", "again")
    assert len(shelf.history()) == 2


def test_history_at_a_moment_names_the_model_of_that_moment(osteon: Osteon, shelf: Registry, tmp_path: Path) -> None:
    version = tiny_model.shelve(shelf, tmp_path)
    shelf.promote(version, by="Dr Who", reason="good", decision="promote", now=datetime(2026, 3, 1, 14, tzinfo=UTC), locked=())
    assert "no model was in service" in osteon("history", "--at", "2026-03-01T13:59+00:00")
    told = osteon("history", "--at", "2026-03-01T14:05+00:00")
    assert version in told
    assert "Dr Who" in told


def test_rollback_is_one_command(osteon: Osteon, shelf: Registry, tmp_path: Path) -> None:
    one, two = (tiny_model.shelve(shelf, tmp_path, slope=slope) for slope in (1.0, 2.0))
    for version in (one, two):
        osteon("promote", version, "--reason", "x")
    assert one in osteon("rollback", "--reason", "worse in the ward")
    assert shelf.champion() == one
    with pytest.raises(NoSuchVersion):
        osteon("rollback", "--reason", "further")


def test_a_damaged_version_is_listed_as_such_and_can_be_left(osteon: Osteon, shelf: Registry, tmp_path: Path) -> None:
    first, second = (tiny_model.shelve(shelf, tmp_path, slope=slope) for slope in (4.0, 3.0))
    for version in (first, second):
        osteon("promote", version, "--reason", "good")
    card = shelf.folder(second) / "card.json"
    card.chmod(0o600)
    card.write_text("{}")
    listed = next(line for line in osteon("list").splitlines() if second in line)
    assert "DAMAGED" in listed
    assert "champion" in listed
    assert f"in service now: {first}" in osteon("rollback", "--reason", "damaged")
    assert shelf.champion() == first


def test_who_acts_is_named_even_where_the_user_has_no_name(
    osteon: Osteon, shelf: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", nobody)
    osteon("promote", tiny_model.shelve(shelf, tmp_path), "--reason", "good")
    assert shelf.history()[-1].by.startswith("uid ")


def test_promotion_refuses_a_version_trained_on_a_locked_patient(
    osteon: Osteon, settings: Settings, shelf: Registry, tmp_path: Path
) -> None:
    version = tiny_model.shelve(shelf, tmp_path, corpus=["OST-A", "OST-LOCKED"])
    image = Instance(
        sop_uid="2.25.1", series_uid="2.25.2", study_uid="2.25.3", pid="OST-LOCKED", sop_class_uid="1.2",
        transfer_syntax_uid="1.2", path="a", header_digest="", pixel_digest="", modality="CR", body_part="", age_years=9,
        sex="F", device="", accession_key="", study_id_key="",
    )  # fmt: skip
    with Catalogue.open(settings.storage.catalogue) as catalogue:
        catalogue.instances.note(image, purpose=Purpose.LEARN, calling_ae="SENDER", locked=True, now=datetime.now(UTC))
    with pytest.raises(NotAllowed, match="locked"):
        osteon("promote", version, "--reason", "please")
    assert shelf.champion() is None


def test_show_checks_the_files_first(osteon: Osteon, shelf: Registry, tmp_path: Path) -> None:
    version = tiny_model.shelve(shelf, tmp_path)
    assert '"recipe": "phantom"' in osteon("show", version)
    file = shelf.folder(version) / "model.onnx"
    file.chmod(0o600)
    file.write_bytes(b"other")
    with pytest.raises(Tampered):
        osteon("show", version)


def test_fetch_without_a_network_says_what_to_do(osteon: Osteon, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(PeerAway, match="put it to") as refused:
        osteon("fetch", "resnet18")
    assert str(settings.storage.root / "models" / "weights" / "resnet18-f37072fd.pth") in str(refused.value)


def test_fetch_keeps_nothing_of_another_hash(osteon: Osteon, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(b"an error page"))
    with pytest.raises(Tampered):
        osteon("fetch", "resnet18")
    assert not (settings.storage.root / "models" / "weights").exists()


def test_fetch_leaves_alone_what_is_there(osteon: Osteon, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from models import card

    file = settings.storage.root / "models" / "weights" / IMAGENET["resnet18"].filename
    durable.write(file, b"weights")
    monkeypatch.setattr(card, "sha256", lambda data: IMAGENET["resnet18"].sha256)
    assert "is there already" in osteon("fetch", "resnet18")
    with pytest.raises(NoSuchWeights):
        osteon("fetch", "efficientnet_lite0")


def test_fetch_says_where_only_the_beginning_of_a_hash_is_known(
    osteon: Osteon, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from models import card

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(b"weights"))
    monkeypatch.setattr(card, "sha256", lambda data: "c1103571" + "0" * 56)
    assert "first 8 digits of the hash as expected" in osteon("fetch", "densenet201")
    assert (settings.storage.root / "models" / "weights" / "densenet201-c1103571.pth").read_bytes() == b"weights"
