from __future__ import annotations

import json
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless
from roles import hand_in
from studies import image, pixels
from test_custody import everything
from typer.testing import CliRunner

from models.errors import Tampered
from node import settings
from node.commands.quarantine import WORDS, app
from node.errors import BadKey, NotFound, NotReleasable, Refused
from node.keep.custody import Custody
from node.keep.quarantine import Quarantine
from node.keep.records import Held, Hold, Purpose
from node.receive.intake import Intake, Taken

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
RAW = b"SECRET^NAME and pixels"
XA = "1.2.840.10008.5.1.4.1.1.12.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


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
    listed, shown = osteon("list", site=site), osteon("show", held().id, "--no-picture", site=site)
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
    assert "archive" in osteon("show", held_id, "--no-picture", site=site)
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


# --- the picture -----------------------------------------------------------------------------------------------------------


def show(held_id: str, folder: Path, *words: str, site: Path) -> str:
    return osteon("show", held_id, "--out", str(folder), *words, site=site)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "desk"
    made.mkdir(mode=0o700)
    return made


def test_show_makes_a_picture_for_its_owner_alone_and_the_history_says_who_looked(site: Path, folder: Path) -> None:
    held_id = hold_one(site, image(BurnedInAnnotation="YES", rows=1500, columns=600, PatientName="SECRET^NAME"))
    told = show(held_id, folder, "--reason", "is there a name in it", site=site)
    (file,) = folder.iterdir()
    assert str(file) in told
    assert all(words in told for words in ("text is burned into the pixels", "look at the picture first", "delete it"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with Image.open(file) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "L", (410, 1024))
        assert len(np.unique(np.asarray(picture))) > 50
    assert b"SECRET" not in file.read_bytes()
    with Custody.open(settings.load(site).storage) as stores:
        (act,) = stores.catalogue.history.acts(subject=held_id)
    assert (act.what, act.reason) == ("quarantine: looked at", "is there a name in it")


def test_show_without_a_picture_opens_nothing(site: Path, folder: Path) -> None:
    held_id = hold_one(site, image(BurnedInAnnotation="YES"))
    assert "reason" in show(held_id, folder, "--no-picture", site=site)
    assert list(folder.iterdir()) == []
    with Custody.open(settings.load(site).storage) as stores:
        assert stores.catalogue.history.acts() == []


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless])
def test_of_several_frames_the_first_is_shown(site: Path, folder: Path, syntax: str) -> None:
    frames = np.stack([np.full((40, 30), value, np.uint8) + np.arange(30, dtype=np.uint8) for value in (10, 200)])
    how = {"rows": 40, "columns": 30, "bits_stored": 8, "dtype": "uint8", "transfer_syntax": syntax}
    loop, last = (image(modality="XA", SOPClassUID=XA, Modality="XA", array=frame, **how) for frame in frames)  # type: ignore[arg-type]
    loop.NumberOfFrames = 2
    if syntax == ExplicitVRLittleEndian:
        loop.PixelData = frames.tobytes()
    else:
        loop.PixelData = encapsulate([get_frame(one.PixelData, 0, number_of_frames=1) for one in (loop, last)])
    told = show(hold_one(site, loop), folder, site=site)
    assert "the first of 2 frames" in told
    assert "only CR and DX" in told
    (file,) = folder.iterdir()
    with Image.open(file) as picture:
        assert picture.size == (30, 40)
        assert np.asarray(picture).max() < 100  # the other frame is as bright as 200


def test_a_screen_capture_is_shown_in_its_colours(site: Path, folder: Path) -> None:
    red = np.zeros((20, 30, 3), np.uint8)
    red[..., 0] = 250
    capture = image(rows=20, columns=30, bits_stored=8, dtype="uint8", array=red[..., 0], SOPClassUID=SECONDARY_CAPTURE)
    capture.SamplesPerPixel, capture.PlanarConfiguration, capture.PhotometricInterpretation = 3, 0, "RGB"
    capture.Modality, capture.PixelData = "OT", red.tobytes()
    show(hold_one(site, capture), folder, site=site)
    (file,) = folder.iterdir()
    with Image.open(file) as picture:
        assert picture.getpixel((3, 3)) == (250, 0, 0)


@pytest.mark.usefixtures("store")
def test_what_cannot_be_decoded_is_said_and_the_facts_stand(site: Path, folder: Path) -> None:
    told = show(held().id, folder, site=site)
    assert all(words in told for words in (held().id, "picture    none: ", "only CR and DX"))
    assert list(folder.iterdir()) == []


def test_a_picture_is_not_left_where_everybody_may_write(site: Path, folder: Path) -> None:
    held_id = hold_one(site, image(BurnedInAnnotation="YES"))
    folder.chmod(0o777)
    with pytest.raises(Refused, match="--out"):
        show(held_id, folder, site=site)
    with pytest.raises(Refused, match="--out"):
        show(held_id, folder / "not there", site=site)
    assert list(folder.iterdir()) == []


def test_every_reason_has_its_words() -> None:
    assert set(WORDS) == set(Hold)
    assert len({why for why, _what in WORDS.values()}) == len(Hold)


# --- whose it is -----------------------------------------------------------------------------------------------------------


def patient_of(site: Path) -> tuple[bytes, set[str], int]:
    """Give the PatientID under which the study would be answered, the pseudonyms of its images, and how many there are."""
    with Custody.open(settings.load(site).storage) as stores:
        uid = stores.keys.uid(image().StudyInstanceUID)
        images = stores.catalogue.instances.of_study(uid)
        identity = stores.vault.study(uid)
        patient = next(element.value.strip() for element in identity.patient if element.tag == 0x00100020)
        assert stores.catalogue.patients.whose(uid) in {one.pid for one in images}
        return patient, {one.pid for one in images}, len(images)


def take_in(site: Path, *images: Dataset) -> str:
    """Hand images in, and give the pseudonym that HOSPITAL's RIGHT has."""
    intake = Intake.open(settings.load(site))
    for one in images:
        assert hand_in(intake, one) is Taken.NEW
    intake.close()
    return intake.keys.pid("HOSPITAL", "RIGHT")


@pytest.mark.parametrize(
    "wrong", [{"PatientID": ""}, {"PatientID": "UNKNOWN"}, {"PatientID": "OTHER", "PatientName": "Other^One"}]
)
def test_an_image_of_doubtful_patient_is_taken_in_as_its_studys(site: Path, wrong: dict[str, str]) -> None:
    right = {"PatientID": "RIGHT", "PatientName": "M\xfcller^R", "charset": "ISO_IR 100"}
    pid = take_in(site, image(**right))  # type: ignore[arg-type]
    held_id = hold_one(site, image(instance=2, **wrong))  # type: ignore[arg-type]
    assert "--as-patient study" in osteon("show", held_id, "--no-picture", site=site)
    told = osteon("release", held_id, "--as-patient", "study", "--reason", "I know the boy", site=site)
    assert "Correct the PatientID in the PACS" in told
    assert patient_of(site) == (b"RIGHT", {pid}, 2)
    with Custody.open(settings.load(site).storage) as stores:
        identity = stores.vault.study(stores.keys.uid(image().StudyInstanceUID))
        assert "M\xfcller^R".encode("latin-1") in {element.value.strip() for element in identity.patient}
        (act,) = stores.catalogue.history.acts(subject=held_id)
        assert (act.what, act.reason) == ("quarantine: released as patient of the study", "I know the boy")
        assert stores.quarantine.ids() == []


def test_the_studys_patient_may_be_named_by_pseudonym_or_by_what_is_typed(site: Path) -> None:
    pid = take_in(site, image(PatientID="RIGHT"))
    one = hold_one(site, image(instance=2, PatientID=""))
    assert "released" in osteon("release", one, "--as-patient", pid, "--reason", "x", site=site)
    two = hold_one(site, image(instance=3, PatientID=""))
    typed = osteon("release", two, "--as-patient", "ask", "--reason", "x", site=site, answer="RIGHT\n\n")
    assert "released" in typed
    assert patient_of(site) == (b"RIGHT", {pid}, 3)


def test_a_study_that_came_under_a_wrong_patient_first_is_corrected(site: Path) -> None:
    take_in(site, image(PatientID="WRONG"))
    held_id = hold_one(site, image(instance=2, PatientID="RIGHT"))
    asked = osteon("release", held_id, "--as-patient", "newcomer", "--reason", "x", site=site, answer="n\n")
    assert "Aborted" in asked
    assert patient_of(site)[0] == b"WRONG"
    osteon("release", held_id, "--as-patient", "newcomer", "--reason", "the CR room mixed them up", "--yes", site=site)
    pid = take_in(site, image(instance=3, PatientID="RIGHT"))
    assert patient_of(site) == (b"RIGHT", {pid}, 3)
    intake = Intake.open(settings.load(site))
    assert hand_in(intake, image(PatientID="RIGHT")) is Taken.KNOWN  # the corrected copy of the first image
    assert hand_in(intake, image(instance=4, PatientID="WRONG")) is Taken.HELD
    assert {act.what for act in intake.catalogue.history.acts(subject=pid)} == {"study given to another patient"}
    intake.close()


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ({"instance": 2, "Modality": "OT", "SOPClassUID": SECONDARY_CAPTURE}, "only CR and DX"),
        ({"instance": 1, "array": pixels(seed=9)}, "other pixels"),
        ({"instance": 1, "SeriesInstanceUID": "1.2.3.4"}, "in another series"),
    ],
)
def test_a_release_that_is_refused_gives_no_study_away(site: Path, what: dict[str, Any], told: str) -> None:
    """The image is held because it names another patient; what else is wrong with it shows when it is released."""
    take_in(site, image(PatientID="WRONG"))
    before = patient_of(site)
    held_id = hold_one(site, image(PatientID="RIGHT", **what))
    with Custody.open(settings.load(site).storage) as stores:
        assert stores.catalogue.instances.held()[0][0].reason is Hold.PATIENT_CONFLICT
    files = everything(site.parent / "data" / "archive")
    with pytest.raises(NotReleasable, match=told):
        osteon("release", held_id, "--as-patient", "newcomer", "--reason", "x", "--yes", site=site)
    assert patient_of(site) == before
    assert everything(site.parent / "data" / "archive") == files
    with Custody.open(settings.load(site).storage) as stores:
        assert stores.catalogue.history.acts() == []
        assert stores.quarantine.ids() == [held_id]


@pytest.mark.parametrize("is_named", [False, True], ids=["newcomer", "by pseudonym"])
def test_a_study_that_was_half_given_away_is_given_away_by_the_next_release(
    site: Path, monkeypatch: pytest.MonkeyPatch, is_named: bool
) -> None:
    """Killed between vault and catalogue."""
    take_in(site, image(PatientID="WRONG"))
    held_id = hold_one(site, image(instance=2, PatientID="RIGHT"))
    intake = Intake.open(settings.load(site))
    whose = intake.keys.pid("HOSPITAL", "RIGHT") if is_named else "newcomer"
    monkeypatch.setattr(intake.catalogue.studies, "reassign", _killed)
    with pytest.raises(KeyboardInterrupt):
        intake.release(held_id, by="me", reason="x", whose=whose)
    intake.close()
    assert patient_of(site)[0] == b"RIGHT"
    intake = Intake.open(settings.load(site))
    for patient in ("WRONG", "RIGHT"):
        assert hand_in(intake, image(instance=3, PatientID=patient)) is Taken.HELD
    intake.close()
    osteon("release", held_id, "--as-patient", whose, "--reason", "x", "--yes", site=site)
    with Custody.open(settings.load(site).storage) as stores:
        assert patient_of(site) == (b"RIGHT", {stores.keys.pid("HOSPITAL", "RIGHT")}, 2)


def test_what_comes_again_while_it_is_released_is_not_listed_without_its_file(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sender is told that it is held: then it is, or it was released in one step with its file."""
    take_in(site, image(PatientID="RIGHT"))
    wrong = image(instance=2, PatientID="OTHER")
    held_id = hold_one(site, wrong)
    intake = Intake.open(settings.load(site))
    unhold = intake.catalogue.instances.unhold

    def and_it_comes_again(*arguments: Any, **more: Any) -> bool:
        assert hand_in(intake, wrong) is Taken.HELD
        went = unhold(*arguments, **more)
        assert hand_in(intake, wrong) is Taken.HELD
        return went

    monkeypatch.setattr(intake.catalogue.instances, "unhold", and_it_comes_again)
    intake.release(held_id, by="me", reason="x", whose="study")
    assert [held.id for held, _since in intake.catalogue.instances.held()] == intake.quarantine.ids() == [held_id]
    intake.close()


def _killed(*_arguments: object, **_more: object) -> None:
    raise KeyboardInterrupt


def test_who_may_have_been_learned_from_leaves_the_locked_set_with_the_study(site: Path) -> None:
    take_in(site, image(PatientID="WRONG"))
    held_id = hold_one(site, image(instance=2, PatientID="RIGHT"))
    with Custody.open(settings.load(site).storage) as stores:
        wrong, right = (stores.keys.pid("HOSPITAL", patient) for patient in ("WRONG", "RIGHT"))
    run = site.parent / "data" / "runs" / "one"
    run.mkdir()
    (run / "corpus.json").write_text(json.dumps({"training": [{"pid": wrong}]}))
    site.write_text(site.read_text("utf-8").replace("locked = 0.2", "locked = 0.999999"), "utf-8")
    osteon("release", held_id, "--as-patient", right, "--reason", "x", "--yes", site=site)
    with Custody.open(settings.load(site).storage) as stores:
        assert right not in stores.catalogue.instances.locked_patients()
        (act,) = stores.catalogue.history.acts(subject=held_id)
        assert act.what == "quarantine: released as patient of the newcomer"
        assert "left the locked set" in {act.what for act in stores.catalogue.history.acts(subject=right)}


def test_nobody_is_made_up_and_nobody_else_is_put_in(site: Path) -> None:
    alone = hold_one(site, image(PatientID=""))
    with pytest.raises(NotReleasable, match="nothing says whose it is"):
        osteon("release", alone, "--as-patient", "study", "--reason", "x", site=site)
    osteon("discard", alone, "--reason", "x", "--yes", site=site)
    take_in(site, image(PatientID="RIGHT"))
    held_id = hold_one(site, image(instance=2, PatientID="OTHER"))
    with pytest.raises(NotReleasable, match="neither the patient of the study"):
        osteon("release", held_id, "--as-patient", "OST-" + "A" * 16, "--reason", "x", "--yes", site=site)
    with pytest.raises(NotReleasable, match="say whose it is with --as-patient"):
        osteon("release", held_id, "--reason", "x", site=site)
    assert "does not belong on a command line" in osteon("release", held_id, "--as-patient", "RIGHT", "--reason", "x", site=site)
    osteon("discard", held_id, "--reason", "x", "--yes", site=site)
    burned = hold_one(site, image(instance=3, PatientID="RIGHT", BurnedInAnnotation="YES"))
    with pytest.raises(NotReleasable, match="is not in doubt"):
        osteon("release", burned, "--as-patient", "study", "--reason", "x", site=site)
