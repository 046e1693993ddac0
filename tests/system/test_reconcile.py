"""What a disk, a hand or a kill did to the stores is found, mended where nothing is guessed, and never leads to an answer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Machine, machine, other_modality
from pydicom.uid import JPEGLSLossless
from studies import study
from tiny_model import promote_tiny

from node.commands.archive import _findings, _means, _opened
from node.demo.pacs import Pacs
from node.keep import reconcile
from node.keep.records import StudyState
from node.receive.intake import Taken


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with Pacs(tmp_path / "pacs", callers=["OSTEON"]) as running:
        yield running


@pytest.fixture
def here(tmp_path: Path, pacs: Pacs) -> Machine:
    return machine(tmp_path / "site", pacs)


def files(here: Machine) -> list[Path]:
    return sorted((here.root / "archive").rglob("*.dcm"))


def age(file: Path, *, hours: float = 48) -> Path:
    """Let a file look as if it were written long ago."""
    at = time.time() - 3600 * hours
    os.utime(file, (at, at))
    return file


def verify(here: Machine, *more: str, code: int = 1) -> str:
    return here.osteon("archive", "verify", *more, code=code)


def test_a_whole_archive_is_whole(here: Machine) -> None:
    here.send(*study(patient=1), other_modality(2))
    assert "2 images: each has its file" in verify(here, code=0)
    assert "2 images" in verify(here, "--quick", code=0)
    assert "All is as it should be" in here.osteon("archive", "repair", "--yes")


def test_an_image_whose_file_is_gone_comes_back_when_the_pacs_sends_it_again(here: Machine) -> None:
    promote_tiny(here.root / "models")
    images = study(patient=1)
    here.send(*images)
    here.work()
    before = here.reports()
    lost = files(here)[0]
    content = lost.read_bytes()
    lost.unlink()
    told = verify(here, "--quick")
    assert "image without its file: 1" in told
    assert lost.name in told
    here.osteon("archive", "repair", code=1)
    assert "send the study again" not in here.osteon("status", "--study", images[0].AccessionNumber), "nothing without --yes"
    here.osteon("archive", "repair", "--yes", code=1)
    assert "send the study again" in here.osteon("status", "--study", images[0].AccessionNumber)
    assert here.send(*images) == [Taken.KNOWN, Taken.KNOWN]
    assert lost.read_bytes() == content
    verify(here, code=0)
    here.osteon("archive", "repair", "--yes")
    assert "send the study again" not in here.osteon("status", "--study", images[0].AccessionNumber)
    here.work()
    assert here.reports() == before, "no second answer"


def test_a_known_image_in_another_syntax_fills_its_gap_and_one_with_other_pixels_does_not(here: Machine) -> None:
    (image,) = study(patient=1, images=1)
    here.send(image)
    (lost,) = files(here)
    lost.unlink()
    (other,) = study(patient=1, images=1)
    other.PixelData = bytes(len(other.PixelData))
    assert here.send(other) == [Taken.HELD]
    assert not lost.exists()
    (compressed,) = study(patient=1, images=1, transfer_syntax=JPEGLSLossless)
    assert here.send(compressed) == [Taken.KNOWN]
    verify(here, code=0)


def test_a_damaged_file_is_set_aside_and_comes_back_when_the_pacs_sends_it_again(here: Machine) -> None:
    images = study(patient=1)
    here.send(*images)
    file = files(here)[1]
    content = file.read_bytes()
    damaged(file)
    assert "not what was archived: 1" in verify(here)
    assert file.exists()
    here.osteon("archive", "repair", "--yes", code=1)
    assert not file.exists()
    assert (here.root / "damaged" / file.name).exists()
    here.send(*images)
    assert file.read_bytes() == content
    verify(here, code=0)


def test_lost_and_damaged_files_come_back_from_the_copies_of_a_backup(here: Machine, tmp_path: Path) -> None:
    here.send(*study(patient=1))
    made = here.backup(tmp_path / "sets", "--copy-archive")
    gone, rotten = files(here)
    content = gone.read_bytes(), rotten.read_bytes()
    gone.unlink()
    rotten.chmod(0o600)
    rotten.write_bytes(b"rot" * 1000)
    here.osteon("archive", "repair", "--yes", "--against", str(made.folder))
    assert (gone.read_bytes(), rotten.read_bytes()) == content
    verify(here, code=0)


def test_one_flipped_bit_is_found_where_a_backup_has_the_hash(here: Machine, tmp_path: Path) -> None:
    """Also where no image is concerned: in the preamble, which neither digest of the catalogue covers."""
    here.send(*study(patient=1, images=1))
    made = here.backup(tmp_path / "sets")
    (file,) = files(here)
    file.chmod(0o600)
    file.write_bytes(b"\1" + file.read_bytes()[1:])
    verify(here, code=0)
    assert "not what was archived: 1" in verify(here, "--against", str(made.folder))


@pytest.mark.parametrize("copies", [[], ["--copy-archive"]])
def test_an_image_that_came_again_since_the_backup_in_another_syntax_is_left_where_it_is(
    here: Machine, tmp_path: Path, copies: list[str]
) -> None:
    here.send(*study(patient=1))
    made = here.backup(tmp_path / "sets", *copies)
    lost = files(here)[0]
    lost.unlink()
    assert here.send(*study(patient=1, transfer_syntax=JPEGLSLossless)) == [Taken.KNOWN, Taken.KNOWN]
    content = lost.read_bytes()
    for quick in ([], ["--quick"]):
        verify(here, "--against", str(made.folder), *quick, code=0)
    here.osteon("archive", "repair", "--yes", "--against", str(made.folder))
    assert lost.read_bytes() == content
    damaged(lost)
    assert "not what was archived: 1" in verify(here, "--against", str(made.folder)), "damage is found all the same"


def test_a_damaged_image_that_comes_again_before_it_is_repaired_is_left_where_it_is(here: Machine) -> None:
    images = study(patient=1, images=1)
    here.send(*images)
    (file,) = files(here)
    content = file.read_bytes()
    damaged(file)
    with _opened(here.settings) as (stores, vault):
        found = _findings(stores, {}, quick=False)
        assert [one.kind for one in found] == [reconcile.Kind.OTHER_FILE]
        file.unlink()
        here.send(*images)
        reconcile.repair(found, _means(here.settings, stores, vault, None, {}))
    assert file.read_bytes() == content
    assert not (here.root / "damaged").exists()


def damaged(file: Path) -> None:
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-10] + bytes(10))


def test_a_file_without_a_row_is_entered_again_to_be_learned_from_and_is_never_answered(here: Machine) -> None:
    """As after a restore of yesterday's catalogue: its study may have been answered already."""
    promote_tiny(here.root / "models")
    images = study(patient=1, PatientAge="012Y")
    here.send(*images)
    with here.catalogue() as catalogue:
        (uid,) = catalogue.studies.uids()
        rows = catalogue.instances.of_study(uid)
    forget_rows(here, uid)
    for file in files(here):
        age(file)
    assert "file without its row: 2" in verify(here)
    here.osteon("archive", "repair", "--yes")
    verify(here, code=0)
    with here.catalogue() as catalogue:
        again = catalogue.instances.of_study(uid)
    for row, before in zip(again, rows, strict=True):
        for name in before.__slots__:
            assert name == "device" or getattr(row, name) == getattr(before, name), name
    here.work()
    assert here.state(images[0]) is StudyState.LEARNED
    assert here.reports() == {}
    here.send(*images)
    here.work()
    assert here.answers(images[0]) == [images[0].PatientName], "sent again to be answered, it is"


def test_a_file_of_nobody_is_told_and_left_where_it_is(here: Machine) -> None:
    here.send(*study(patient=1, images=1))
    with here.catalogue() as catalogue:
        (uid,) = catalogue.studies.uids()
    forget_rows(here, uid, identity=True)
    (file,) = files(here)
    age(file)
    told = here.osteon("archive", "repair", "--yes", code=1)
    assert "so that the vault learns whose it is" in told
    assert file.exists()


def test_an_image_without_its_identity_is_found_and_sent_again_it_has_one(here: Machine) -> None:
    images = study(patient=1)
    here.send(*images)
    with here.catalogue() as catalogue:
        (uid,) = catalogue.studies.uids()
    forget_identity(here, uid)
    assert "image without its identity: 2" in verify(here, "--quick")
    here.osteon("archive", "repair", "--yes", code=1)
    here.send(*images)
    verify(here, code=0)


def test_left_overs_of_kills_are_swept_after_a_day_and_strangers_are_told(here: Machine) -> None:
    here.send(*study(patient=1, images=1))
    folder = files(here)[0].parent
    old, young = age(touched(folder / ".x.dcm.0.tmp")), touched(folder / ".y.dcm.0.tmp")
    sealed = age(touched(here.root / "quarantine" / ".z.sealed.0.tmp"))
    stranger = touched(folder / "notes.txt")
    told = here.osteon("archive", "repair", "--yes", code=1)
    assert "temporary file of a killed process: 2" in told
    assert "notes.txt" in told
    assert [path.exists() for path in (old, sealed, young, stranger)] == [False, False, True, True]


def test_the_quarantine_is_held_against_its_rows(here: Machine) -> None:
    here.send(other_modality(1))
    (sealed,) = (here.root / "quarantine").glob("*.sealed")
    nobodys = age(touched(sealed.with_name("0" * 32 + ".sealed")))
    sealed.unlink()
    told = verify(here, "--quick")
    assert "held object without its sealed file: 1" in told
    assert "sealed file that the catalogue does not know: 1" in told
    here.osteon("archive", "repair", "--yes", code=1)
    with here.catalogue() as catalogue:
        assert catalogue.instances.held() == []
    assert nobodys.exists()


def touched(file: Path) -> Path:
    file.write_bytes(b"x")
    return file


def forget_rows(here: Machine, uid: str, *, identity: bool = False) -> None:
    """Take a study out of the catalogue, as the restore of an older one does."""
    from sqlalchemy import delete

    from node.keep.catalogue.schema import instance
    from node.keep.catalogue.schema import study as studies

    with here.catalogue() as catalogue:
        for table, key in ((instance, instance.c.study_uid), (studies, studies.c.uid)):
            catalogue.database.write(lambda connection, table=table, key=key: connection.execute(delete(table).where(key == uid)))  # type: ignore[misc]
    if identity:
        forget_identity(here, uid)


def forget_identity(here: Machine, uid: str) -> None:
    with here.vault() as vault:
        vault.forget(uid)
