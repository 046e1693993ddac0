from __future__ import annotations

import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydicom import Dataset
from roles import hand_in
from studies import image
from typer.testing import CliRunner

from models.errors import Tampered
from node import settings
from node.commands.quarantine import app
from node.errors import BadKey, NotFound, NotReleasable
from node.keep.custody import Custody
from node.keep.quarantine import Quarantine
from node.keep.records import Held, Hold, Purpose
from node.receive.intake import Intake, Taken

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
RAW = b"SECRET^NAME and pixels"


def held(held_id: str = "0" * 31 + "1", reason: Hold = Hold.MODALITY) -> Held:
    return Held(
        id=held_id,
        reason=reason,
        detail="only CR and DX go to the archive",
        modality="MG",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.1.2",
        study_uid="2.25.1",
        sop_uid="2.25.3",
        pid="OST-AAAAAAAAAAAAAAAA",
        calling_ae="SENDER",
        purpose=Purpose.ANSWER,
    )


def test_what_is_held_reads_back_and_is_sealed_on_disk(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine", KEY)
    quarantine.put(RAW, held())
    assert quarantine.read(held().id) == RAW
    assert quarantine.ids() == [held().id]
    (file,) = (tmp_path / "quarantine").iterdir()
    assert b"SECRET" not in file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_another_key_opens_nothing(tmp_path: Path) -> None:
    Quarantine(tmp_path, KEY).put(RAW, held())
    with pytest.raises(BadKey):
        Quarantine(tmp_path, OTHER).read(held().id)


def test_a_file_under_another_name_does_not_open(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, KEY)
    quarantine.put(RAW, held())
    (tmp_path / f"{held().id}.sealed").rename(tmp_path / f"{'2' * 32}.sealed")
    with pytest.raises(Tampered):
        quarantine.read("2" * 32)


def test_discarded_is_gone(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, KEY)
    quarantine.put(RAW, held())
    quarantine.discard(held().id)
    quarantine.discard(held().id)
    assert quarantine.ids() == []
    with pytest.raises(NotFound):
        quarantine.read(held().id)


@pytest.mark.parametrize("held_id", ["../../etc/passwd", "", "*", "0" * 31 + "G"])
def test_an_id_is_no_path(tmp_path: Path, held_id: str) -> None:
    with pytest.raises(NotFound):
        Quarantine(tmp_path, KEY).read(held_id)
    with pytest.raises(NotFound):
        Quarantine(tmp_path, KEY).discard(held_id)


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(site: Path) -> Quarantine:
    """Hold one object in the quarantine of a fresh site."""
    with Custody.open(settings.load(site).storage) as stores:
        stores.quarantine.put(RAW, held())
        stores.catalogue.instances.hold(held(), now=datetime(2026, 3, 1, tzinfo=UTC))
        return stores.quarantine


def osteon(*words: str, site: Path, answer: str = "") -> str:
    result = CliRunner().invoke(app, [*words, "--config", str(site)], input=answer, catch_exceptions=False)
    return result.output


@pytest.mark.usefixtures("store")
def test_list_and_show_say_why_but_not_who(site: Path) -> None:
    listed, shown = osteon("list", site=site), osteon("show", held().id, site=site)
    for told in (listed, shown):
        assert all(word in told for word in (held().id, "modality", "MG", "2.25.1"))
        assert "SECRET" not in told
    assert "refused while the reason stands" in shown


def test_discard_asks_first_then_removes_file_and_row(site: Path, store: Quarantine) -> None:
    assert "Aborted" in osteon("discard", held().id, "--reason", "a test", site=site, answer="n\n")
    assert store.ids() == [held().id]
    osteon("discard", held().id, "--reason", "a test", "--yes", site=site)
    assert store.ids() == []
    assert "empty" in osteon("list", site=site)


def test_a_file_whose_row_was_never_written_is_listed_and_can_be_removed(site: Path, store: Quarantine) -> None:
    """A kill between the two leaves it; its sender was told no success."""
    lost = "f" * 32
    store.put(RAW, held(lost))
    assert f"{lost}  -                 not in the catalogue" in osteon("list", site=site)
    osteon("discard", lost, "--reason", "cut short", "--yes", site=site)
    assert store.ids() == [held().id]


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("words", [("show",), ("discard", "--reason", "x", "--yes")])
def test_an_unknown_id_is_said(site: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(NotFound, match="quarantine list"):
        osteon(words[0], "a" * 32, *words[1:], site=site)


def test_release_puts_an_image_into_the_archive_that_a_person_has_seen(site: Path) -> None:
    held_id = hold_one(site, image(BurnedInAnnotation="YES"))
    assert "archive" in osteon("show", held_id, site=site)
    osteon("release", held_id, "--reason", "only an L in the corner", site=site)
    intake = Intake.open(settings.load(site))
    assert intake.quarantine.ids() == []
    assert intake.catalogue.instances.held() == []
    assert intake.catalogue.instances.find(intake.keys.uid(image().SOPInstanceUID)) is not None
    intake.close()


@pytest.mark.parametrize(
    "attributes",
    [{"Modality": "MG", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.2"}, {"PatientID": ""}],
    ids=["modality", "no patient id"],
)
def test_nobody_can_release_what_the_archive_must_not_have(site: Path, attributes: dict[str, str]) -> None:
    held_id = hold_one(site, image(**attributes))  # type: ignore[arg-type]
    with pytest.raises(NotReleasable):
        osteon("release", held_id, "--reason", "please", site=site)
    assert held_id in osteon("list", site=site)


def hold_one(site: Path, one: Dataset) -> str:
    intake = Intake.open(settings.load(site))
    try:
        assert hand_in(intake, one) is Taken.HELD
        (held_id,) = intake.quarantine.ids()
        return held_id
    finally:
        intake.close()
