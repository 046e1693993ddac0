from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)
from studies import image

from models import durable
from node.errors import NoSpace, PixelConflict, Refused
from node.keep import archive as archive_module
from node.keep.archive import Archive
from node.keep.records import Instance

PID = "OST-ABCDEFGHIJKLMNOP"
INSTANCE = Instance(
    sop_uid="2.25.3", series_uid="2.25.2", study_uid="2.25.1", pid=PID, sop_class_uid="1.2.840.10008.5.1.4.1.1.1.1",
    transfer_syntax_uid=str(ExplicitVRLittleEndian), path="", header_digest="", pixel_digest="", modality="DX", body_part="leg",
    age_years=12, sex="F", device="", accession_key="", study_id_key="",
)  # fmt: skip


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path / "archive")


def clean(**attributes: object) -> Dataset:
    """Make what the archive is given: an image under pseudonyms."""
    pseudonyms = {"PatientID": PID, "PatientName": PID, "SOPInstanceUID": INSTANCE.sop_uid}
    return image(**(pseudonyms | attributes))  # type: ignore[arg-type]


def test_an_image_reads_back_as_it_was(archive: Archive) -> None:
    given = clean()
    filled, is_new = archive.put(given, INSTANCE)
    assert is_new
    back = archive.read(filled)
    assert back.PixelData == given.PixelData
    assert back.PatientID == PID
    assert archive.digests(back) == (filled.header_digest, filled.pixel_digest)
    assert filled.path == f"{PID}/2.25.1/2.25.2/2.25.3.dcm"
    assert archive.path(filled) == archive.folder / filled.path


def test_files_are_read_only_and_folders_closed_to_others(archive: Archive) -> None:
    filled, _ = archive.put(clean(), INSTANCE)
    path = archive.path(filled)
    assert stat.S_IMODE(path.stat().st_mode) == 0o440
    while path != archive.folder:
        path = path.parent
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_the_same_image_again_is_no_work(archive: Archive) -> None:
    first, _ = archive.put(clean(), INSTANCE)
    before = archive.path(first).stat()
    again, is_new = archive.put(clean(), INSTANCE)
    assert (again, is_new) == (first, False)
    assert archive.path(first).stat() == before


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless],
)
def test_the_same_image_in_another_syntax_is_no_work(archive: Archive, syntax: str) -> None:
    first, _ = archive.put(clean(), INSTANCE)
    again, is_new = archive.put(clean(transfer_syntax=syntax), INSTANCE)
    assert (again, is_new) == (first, False)
    assert again.transfer_syntax_uid == ExplicitVRLittleEndian, "it describes the file that stands"


def test_lossy_compression_written_into_the_header_is_the_same_image(archive: Archive) -> None:
    first, _ = archive.put(clean(), INSTANCE)
    lossy = clean(transfer_syntax=JPEGLSLossless, LossyImageCompression="01", LossyImageCompressionRatio="9.5")
    assert archive.put(lossy, INSTANCE) == (first, False)


def test_a_header_digest_sees_every_nested_value_but_no_way_of_spelling(archive: Archive) -> None:
    one, other, spelt = clean(), clean(), clean()
    other.AnatomicRegionSequence[0].CodeMeaning = "Upper leg"
    spelt["AnatomicRegionSequence"].is_undefined_length = True
    spelt.AnatomicRegionSequence[0].is_undefined_length_sequence_item = True
    assert archive.digests(one)[0] != archive.digests(other)[0]
    assert archive.digests(one) == archive.digests(spelt)
    assert archive.digests(one)[0] != archive.digests(clean(PhotometricInterpretation="MONOCHROME1"))[0]


def test_words_of_a_lookup_table_are_the_same_in_both_byte_orders(archive: Archive) -> None:
    little, big = clean(), clean(transfer_syntax=ExplicitVRBigEndian)
    for dataset, order in ((little, "little"), (big, "big")):
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [3, 0, 16])
        item.add_new("LUTData", "OW", b"".join(value.to_bytes(2, order) for value in (1, 500, 60000)))  # type: ignore[arg-type]
        dataset.VOILUTSequence = [item]
    assert archive.digests(little)[0] == archive.digests(big)[0]


def test_other_pixels_under_a_uid_are_refused_and_the_first_stay(archive: Archive) -> None:
    first, _ = archive.put(clean(), INSTANCE)
    other = clean(instance=2)
    with pytest.raises(PixelConflict):
        archive.put(other, INSTANCE)
    assert archive.digests(archive.read(first)) == (first.header_digest, first.pixel_digest)


@pytest.mark.parametrize("hard_links", [False, True], ids=["rename", "hard links"])
@pytest.mark.parametrize("same", [False, True])
def test_of_two_receivers_that_write_one_uid_at_once_the_second_is_compared_with_the_first(
    archive: Archive, same: bool, hard_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither found a file when it looked; the other's is complete when the first one's bytes are on the disk."""
    if hard_links:  # as on NFS, which knows no rename that does not replace
        monkeypatch.setattr(durable, "_RENAME_NOREPLACE", 1 << 30)
    first, second = clean(), clean() if same else clean(instance=2)
    real = archive_module.dcmwrite

    def overtaken(*arguments: Any, **named: Any) -> None:
        monkeypatch.setattr(archive_module, "dcmwrite", real)
        assert Archive(archive.folder).put(second, INSTANCE)[1]
        real(*arguments, **named)

    monkeypatch.setattr(archive_module, "dcmwrite", overtaken)
    if same:
        kept, is_new = archive.put(first, INSTANCE)
        assert not is_new
        assert kept.pixel_digest == archive.digests(second)[1]
    else:
        with pytest.raises(PixelConflict):
            archive.put(first, INSTANCE)
    assert archive.read(INSTANCE).PixelData == second.PixelData
    assert [path.name for path in archive.path(INSTANCE).parent.iterdir()] == [archive.path(INSTANCE).name]


def test_corrected_demographics_are_no_other_image(archive: Archive) -> None:
    first, _ = archive.put(clean(PatientSex="F", PatientAge="012Y"), INSTANCE)
    corrected = clean(PatientSex="M", PatientAge="011Y", transfer_syntax=RLELossless)
    assert archive.put(corrected, INSTANCE) == (first, False)


@pytest.mark.parametrize(
    "change",
    [
        {"pid": "../../../etc"},
        {"pid": "PID00001"},
        {"study_uid": "../x"},
        {"study_uid": "1.2.3"},
        {"series_uid": ""},
        {"sop_uid": "2.25./etc/passwd"},
        {"sop_uid": "2.25.1\n"},
        {"sop_uid": "2.25." + "1" * 60},
        {"sop_uid": "1.2.840.10008.1.1"},
    ],
)
def test_only_pseudonyms_become_paths(archive: Archive, change: dict[str, str]) -> None:
    with pytest.raises(Refused):
        archive.put(clean(), replace(INSTANCE, **change))  # type: ignore[arg-type]
    assert list(archive.folder.iterdir()) == []


def test_a_path_in_a_record_is_not_believed(archive: Archive) -> None:
    assert archive.path(replace(INSTANCE, path="../../etc/passwd")) == archive.folder / PID / "2.25.1/2.25.2/2.25.3.dcm"


def test_a_full_disk_is_said_and_leaves_nothing(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    durable.make_folder(archive.path(INSTANCE).parent)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace):
        archive.put(clean(), INSTANCE)
    assert [path for path in archive.folder.rglob("*") if path.is_file()] == []


def test_withdrawn_is_gone_and_may_be_put_again(archive: Archive) -> None:
    filled, _ = archive.put(clean(), INSTANCE)
    archive.withdraw(filled)
    archive.withdraw(filled)
    assert not archive.path(filled).exists()
    assert archive.put(clean(instance=2), INSTANCE)[1]
