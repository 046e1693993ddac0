"""The first study's objects are valid and say nothing that the sets do not; its site is made through the door, in steps."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import first_run
import numpy as np
import pytest
from first_run import SETS, Radiograph
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.encaps import get_frame
from pydicom.filewriter import dcmwrite
from shared import data, tool

from models.preprocess import Preprocessing, preprocess
from node.keep.records import Purpose, TrainingImage

A_FEW = 4


def real(name: str) -> list[tuple[Radiograph, bytes]]:
    """Give the first pictures of a set, or skip the test."""
    folder = data(name).parent
    jpegs = first_run.pictures(folder, name)
    listed = {one.file: one for one in first_run.radiographs(folder, name)}
    return [(listed[file], jpeg) for (file, jpeg), _ in zip(jpegs, range(A_FEW), strict=False)]


@pytest.mark.parametrize("name", SETS)
def test_a_wrapped_picture_is_a_valid_dx_object(name: str, tmp_path: Path) -> None:
    dciodvfy = tool("dciodvfy")
    for one, jpeg in real(name):
        dcmwrite(file := tmp_path / "one.dcm", first_run.wrapped(one, jpeg), enforce_file_format=True)
        judged = subprocess.run([dciodvfy, "-new", str(file)], capture_output=True, text=True, timeout=60, check=False)
        assert "DXImageForPresentation" in judged.stderr
        assert [line for line in judged.stderr.splitlines() if line.startswith("Error")] == [], one.file


@pytest.mark.parametrize("name", SETS)
def test_a_wrapped_picture_holds_the_jpeg_byte_for_byte_and_can_be_read(name: str, tmp_path: Path) -> None:
    for one, jpeg in real(name):
        dcmwrite(file := tmp_path / "one.dcm", first_run.wrapped(one, jpeg), enforce_file_format=True)
        read = dcmread(file)
        assert get_frame(read.PixelData, 0, number_of_frames=1)[: len(jpeg)] == jpeg
        assert first_run._picture(file) == one.sha256 == hashlib.sha256(jpeg).hexdigest()
        assert preprocess(read, Preprocessing(160)).std() > 0.02


def test_dcmtk_decodes_what_the_jpeg_shows(tmp_path: Path) -> None:
    dcmdjpeg = tool("dcmdjpeg")
    one, jpeg = real("knee_kl")[0]
    dcmwrite(tmp_path / "one.dcm", first_run.wrapped(one, jpeg), enforce_file_format=True)
    subprocess.run([dcmdjpeg, str(tmp_path / "one.dcm"), str(tmp_path / "plain.dcm")], check=True, timeout=60)
    shown = np.asarray(Image.open(BytesIO(jpeg)), np.int16)
    assert np.abs(dcmread(tmp_path / "plain.dcm").pixel_array.astype(np.int16) - shown).max() <= 1  # decoders round differently


def test_what_must_not_be_split_is_one_patient_and_every_picture_is_a_study_of_its_own() -> None:
    images = first_run.everything(data("knee_kl").parent)
    assert len({one.sop_uid for one in images}) == len({one.study_uid for one in images}) == len(images)
    for name, column in (("knee_kl", "patient"), ("knee_gornale", "group"), ("spine_scoliosis", "group")):
        these = [one for one in images if one.set_name == name]
        assert len({one.patient_id for one in these}) == len({one.row[column] for one in these}) < len(these)
        assert len({(one.patient_id, one.row[column]) for one in these}) == len({one.patient_id for one in these})


def test_no_picture_that_must_be_held_is_in_a_task() -> None:
    folder = data("spine_scoliosis").parent
    held = [one for one in first_run.radiographs(folder, "spine_scoliosis") if one.is_burned_in]
    assert len(held) == len(first_run.BURNED_IN["spine_scoliosis"])
    assert {one.row["naming"] for one in held} == {"TAIS"}


def test_an_object_states_of_the_patient_what_the_set_states_and_no_more() -> None:
    def made(**row: str) -> Dataset:
        jpeg = picture(0)
        return first_run.wrapped(Radiograph("spine_scoliosis", "norm_000.jpg", "", "7", row), jpeg)

    known, unknown = made(age="14", sex="F"), made(age="", sex="")
    assert (known.PatientAge, known.PatientSex, known.PatientBirthDate) == ("014Y", "F", "")
    assert "PatientAge" not in unknown
    assert unknown.PatientSex == ""
    assert made(age="0.8", sex="M").PatientAge == "010M"


# ---- the draw ----------------------------------------------------------------------------------------------------------------


def archived(one: Radiograph, *, locked: bool) -> TrainingImage:
    return TrainingImage(
        sop_uid=one.sop_uid, series_uid="1", study_uid=one.study_uid, pid=one.patient_id, sop_class_uid="1",
        transfer_syntax_uid="1", path="", header_digest="", pixel_digest="", modality="DX", body_part="KNEE", age_years=None,
        sex="", device="", accession_key="", study_id_key="", locked=locked, purpose=Purpose.LEARN, person=one.patient_id,
    )  # fmt: skip


def knees(patients: int) -> list[tuple[Radiograph, TrainingImage]]:
    """Give both knees of so many patients, of grades 0 to 4 in turn; every fifth patient is locked."""
    found = []
    for number in range(patients):
        for side in "LR":
            grade = str((number + (side == "R")) % 5)
            one = Radiograph("knee_kl", f"{number}{side}.jpg", "", str(number), {"kl": grade})
            found.append((one, archived(one, locked=number % 5 == 4)))
    return found


def test_the_draw_takes_each_patient_once_and_labels_all_of_the_locked() -> None:
    images = knees(100)
    locked = {one.file for one, image in images if image.locked and one.row["kl"] != "2"}
    given = first_run.knee_labels(images, less_severe=20, severe=10)
    drawn = [each for each in given if each.one.file not in locked]
    assert {each.one.file for each in given} >= locked
    assert Counter(each.label for each in drawn) == {"knee_kl_0_1": 20, "knee_kl_3_4": 10}
    assert len({each.one.patient for each in drawn}) == 30
    assert all(first_run.KL_CLASS[each.one.row["kl"]] == each.label for each in given)


def test_the_draw_is_the_same_in_any_order_of_the_images() -> None:
    images = knees(100)
    forth, back = (first_run.knee_labels(some, less_severe=20, severe=10) for some in (images, images[::-1]))
    assert {each.one.file for each in forth} == {each.one.file for each in back}


def test_a_draw_that_cannot_be_filled_is_an_error() -> None:
    with pytest.raises(first_run.StudyFailed, match="knee_kl_3_4"):
        first_run.knee_labels(knees(10), less_severe=1, severe=10)


# ---- the steps, on a small invented copy of the five sets --------------------------------------------------------------------


def picture(seed: int) -> bytes:
    """Draw a small grey JPEG."""
    grey = np.random.default_rng(seed).integers(0, 256, (40, 64), dtype=np.uint8)
    Image.fromarray(grey).save(out := BytesIO(), "JPEG", quality=80)
    return out.getvalue()


def put(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write one set as the real ones lie there."""
    (folder / name).mkdir(parents=True)
    with tarfile.open(folder / name / "images.tar", "w") as images:
        for row in rows:
            jpeg = picture(int.from_bytes(hashlib.sha256(row["file"].encode()).digest()[:4], "big"))
            row["sha256"] = hashlib.sha256(jpeg).hexdigest()
            member = tarfile.TarInfo(row["file"])
            member.size = len(jpeg)
            images.addfile(member, BytesIO(jpeg))
    with (folder / name / "labels.csv").open("w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


@pytest.fixture
def invented(tmp_path: Path) -> Path:
    """Give a folder with an invented copy of the five sets: 24 knees, and one or two pictures of the others."""
    folder = tmp_path / "data"
    put(folder, "knee_kl", [{"file": f"{n}R.jpg", "kl": n % 2 * 4, "patient": n, "side": "R"} for n in range(24)])
    put(folder, "knee_gornale", [{"file": "g0.jpg", "group": 0, "width": 640}])
    put(folder, "fracatlas_subset", [{"file": "IMG0.jpg", "fracatlas_id": "IMG0"}])
    spine = {"sex": "F", "age": 14, "label": "scoliosis"}
    put(
        folder,
        "spine_scoliosis",
        [
            {"file": "scol_072.jpg", "group": 1, "naming": "S/N"} | spine,
            {"file": "scol_076.jpg", "group": 2, "naming": "TAIS"} | spine,
        ],
    )
    put(folder, "cxr_ccby", [{"file": "cxr_002.jpg", "patient": "219", "view": "AP Supine"}])
    return folder


MADE = ("wrapped.json", "sent.json", "labelled.json")


def test_the_site_is_made_through_the_door_and_no_step_is_done_twice(
    invented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(first_run, "LESS_SEVERE", 1)
    monkeypatch.setattr(first_run, "SEVERE", 1)
    site = tmp_path / "site"
    command = ["label", "--data", str(invented), "--site", str(site), "--associations", "2"]
    assert first_run.main(command) == 0
    sent, labelled = (json.loads((site / name).read_text("utf-8")) for name in ("sent.json", "labelled.json"))
    assert (sent["sent"], sent["archived"]) == (29, 28)
    assert sent["sets"]["spine_scoliosis"]["held"] == {"burned-in annotation": 1}
    assert sent["studies"] == {"learned": 28, "quarantined": 1}
    knee = labelled["tasks"]["study_knee"]
    assert {name: count["patients"] for name, count in knee["to_train_on"].items()} == {"knee_kl_0_1": 1, "knee_kl_3_4": 1}
    assert sum(count["images"] for count in knee["locked"].values()) == sent["sets"]["knee_kl"]["locked_images"]
    spine = labelled["tasks"]["study_spine"]
    assert spine["to_train_on"]["scoliosis"]["images"] + spine["locked"]["scoliosis"]["images"] == 1

    before = {name: (site / name).read_bytes() for name in MADE}
    capsys.readouterr()
    assert first_run.main(command) == 0
    assert capsys.readouterr().out.count("(done before)") == 3
    assert {name: (site / name).read_bytes() for name in MADE} == before


def test_a_sending_that_was_cut_short_goes_on_with_what_the_node_does_not_have(invented: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = ["send", "--data", str(invented), "--site", str(site)]
    assert first_run.main(command) == 0
    told = json.loads((site / "sent.json").read_text("utf-8"))
    assert told.pop("last_sending")["images"] == 29
    (site / "sent.json").unlink()
    assert first_run.main(command) == 0
    again = json.loads((site / "sent.json").read_text("utf-8"))
    assert again.pop("last_sending")["images"] == 0
    assert again == told


def test_a_picture_that_is_not_the_one_its_table_names_is_refused(
    invented: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = invented / "cxr_ccby" / "labels.csv"
    table.write_text(table.read_text("utf-8").replace(first_run.radiographs(invented, "cxr_ccby")[0].sha256, "0" * 64), "utf-8")
    assert first_run.main(["wrap", "--data", str(invented), "--site", str(tmp_path / "site")]) == 2
    assert "cxr_ccby/cxr_002.jpg is not the picture" in capsys.readouterr().err
    assert not (tmp_path / "site" / "wrapped.json").exists()
