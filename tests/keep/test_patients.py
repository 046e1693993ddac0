"""Patients whom the hospital merged are one person, on one side of every division."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from alembic import command
from alembic.config import Config
from labelled import pid as made_pid
from labelled import put, say, settings_of
from roles import hand_in
from sqlalchemy import Connection, create_engine, make_url, text
from studies import image, pixels
from test_custody import everything
from typer.testing import CliRunner

from models.preprocess import Preprocessing
from models.registry import Registry
from node import settings
from node.__main__ import build
from node.commands.init import init_site
from node.errors import BadKey, NotMergeable, StoreBusy
from node.keep import frozen
from node.keep.archive import Archive
from node.keep.cache import Cache
from node.keep.catalogue import Catalogue, patients
from node.keep.catalogue.patients import Merge
from node.keep.catalogue.schema import MIGRATIONS
from node.keep.records import Instance, Person, Purpose, Run, Worker
from node.receive.intake import Intake, Taken
from training import corpus
from training.recipe import named

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
A, B, C = ("OST-" + letter * 16 for letter in "ABC")
WHO = {"by": "someone", "reason": "HIS merge", "now": NOW}


def note(catalogue: Catalogue, pid: str, *, study: int, locked: bool = False) -> None:
    one = Instance(
        sop_uid=f"2.25.{study}1",
        series_uid=f"2.25.{study}2",
        study_uid=f"2.25.{study}",
        pid=pid,
        sop_class_uid="1.2.840.10008.5.1.4.1.1.1.1",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        path=f"{pid}/2.25.{study}/2.25.{study}2/2.25.{study}1.dcm",
        header_digest="",
        pixel_digest="",
        modality="DX",
        body_part="LEG",
        age_years=9,
        sex="F",
        device="",
        accession_key="",
        study_id_key="",
    )
    catalogue.instances.note(one, purpose=Purpose.ANSWER, calling_ae="SENDER", locked=locked, now=NOW)


@pytest.fixture
def catalogue(catalogue_url: str) -> Iterator[Catalogue]:
    with Catalogue.open(catalogue_url) as opened:
        yield opened


@pytest.mark.parametrize(
    ("locked_a", "locked_b", "named_by", "locked"),
    [
        (False, False, "", ()),
        (True, False, "", (A, B)),
        (False, True, "", (A, B)),
        (True, True, "", (A, B)),
        (True, False, "the corpus of v1", ()),
        (False, True, "the corpus of v1", ()),
    ],
)
def test_a_person_is_locked_whole_or_not_at_all(
    catalogue: Catalogue, locked_a: bool, locked_b: bool, named_by: str, locked: tuple[str, ...]
) -> None:
    note(catalogue, A, study=1, locked=locked_a)
    note(catalogue, B, study=2, locked=locked_b)
    before = catalogue.instances.locked_patients()
    catalogue.patients.merge(catalogue.patients.plan(A, B), named_by=named_by, **WHO)  # type: ignore[arg-type]
    assert catalogue.instances.locked_patients() == frozenset(locked)
    assert {image.locked for image in catalogue.instances.for_training()} == {bool(locked)}
    told = {(act.what, act.subject): act.reason for act in catalogue.history.acts()}
    assert told["patients merged", A] == told["patients merged", B] == f"{A} into {B}: HIS merge"
    left = {subject for what, subject in told if what == "left the locked set"}
    came = {subject for what, subject in told if what == "came into the locked set"}
    assert (left, came) == (before - set(locked), set(locked) - before)
    if left:
        assert all("the corpus of v1" in told["left the locked set", subject] for subject in left)


def test_every_pseudonym_leads_to_the_person(catalogue: Catalogue) -> None:
    note(catalogue, A, study=1)
    note(catalogue, B, study=2)
    assert catalogue.patients.person(A) == Person(A, frozenset({A}))
    assert catalogue.patients.person("OST-" + "Z" * 16).survivor == "OST-" + "Z" * 16
    catalogue.patients.merge(catalogue.patients.plan(A, B), named_by="", **WHO)  # type: ignore[arg-type]
    assert catalogue.patients.person(A) == catalogue.patients.person(B) == Person(B, frozenset({A, B}))
    assert {image.person for image in catalogue.instances.for_training()} == {B}
    # merged with one who was merged away: whoever remains there remains here; C never came, and follows when it does
    done = catalogue.patients.merge(catalogue.patients.plan(C, A), named_by="", **WHO)  # type: ignore[arg-type]
    assert (done.person, done.unseen) == (Person(B, frozenset({A, B, C})), (C,))
    note(catalogue, C, study=3, locked=True)
    assert catalogue.instances.locked_patients() == frozenset()
    assert {image.person for image in catalogue.instances.for_training()} == {B}


def test_the_same_merge_again_changes_nothing_and_turned_round_the_other_remains(catalogue: Catalogue) -> None:
    note(catalogue, A, study=1)
    note(catalogue, B, study=2)
    catalogue.patients.merge(catalogue.patients.plan(A, B), named_by="", **WHO)  # type: ignore[arg-type]
    acts = len(catalogue.history.acts())
    assert catalogue.patients.merge(catalogue.patients.plan(A, B), named_by="", **WHO).is_known  # type: ignore[arg-type]
    assert len(catalogue.history.acts()) == acts
    catalogue.patients.merge(catalogue.patients.plan(B, A), named_by="", **WHO)  # type: ignore[arg-type]
    assert catalogue.patients.person(B).survivor == A


def test_nobody_is_merged_with_nobody(catalogue: Catalogue) -> None:
    note(catalogue, A, study=1)
    with pytest.raises(NotMergeable, match="one and the same"):
        catalogue.patients.plan(A, A)
    with pytest.raises(NotMergeable, match="no image of either"):
        catalogue.patients.plan(B, C)
    assert catalogue.history.acts() == []


def test_two_merges_at_once_lose_neither(catalogue: Catalogue, catalogue_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both plan before either has written, wherever nothing makes one wait for the other."""
    for number, pid in enumerate((A, B, C), 1):
        note(catalogue, pid, study=number, locked=pid == C)
    both, plan = threading.Barrier(2), patients._plan

    def slow(connection: Connection, gone: str, kept: str) -> Merge:
        planned = plan(connection, gone, kept)
        with suppress(threading.BrokenBarrierError):
            both.wait(timeout=1)
        return planned

    def again_and_again(gone: str, kept: str) -> None:
        with Catalogue.open(catalogue_url) as other:
            for _attempt in range(5):
                with suppress(StoreBusy):
                    other.patients.merge(other.patients.plan(gone, kept), named_by="", **WHO)  # type: ignore[arg-type]
                    return

    monkeypatch.setattr(patients, "_plan", slow)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(again_and_again, *pair) for pair in ((A, B), (B, C))]:
            done.result()
    assert {catalogue.patients.person(pid) for pid in (A, B, C)} == {Person(C, frozenset({A, B, C}))}
    assert catalogue.instances.locked_patients() == {A, B, C}


def test_what_was_said_of_a_smaller_person_locks_no_greater_one(catalogue: Catalogue) -> None:
    for number, pid in enumerate((A, B, C), 1):
        note(catalogue, pid, study=number, locked=pid == C)
    plan = catalogue.patients.plan(B, C)
    catalogue.patients.merge(catalogue.patients.plan(A, B), named_by="", **WHO)  # type: ignore[arg-type]
    with pytest.raises(StoreBusy, match="run the same merge again"):
        catalogue.patients.merge(plan, named_by="", **WHO)  # type: ignore[arg-type]
    assert catalogue.instances.locked_patients() == {C}


def test_in_a_catalogue_of_before_everybody_is_a_person_alone(database_url: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(mode=0o700)
    engine = create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        before = text("INSERT INTO patient (pid, locked, first_at) VALUES (:pid, :locked, 1)")
        connection.execute(before, [{"pid": A, "locked": True}, {"pid": B, "locked": False}])
    engine.dispose()
    with Catalogue.open(database_url) as opened:
        assert opened.patients.person(A) == Person(A, frozenset({A}))
        assert opened.patients.person(B) == Person(B, frozenset({B}))
        assert opened.instances.locked_patients() == {A}


# --- images after a merge --------------------------------------------------------------------------------------------------


@pytest.fixture
def intake(site: Path) -> Iterator[Intake]:
    opened = Intake.open(settings.load(site))
    yield opened
    opened.close()


def of(patient: str, **more: Any) -> Any:
    """Give an image of one study, under this PatientID."""
    return image(PatientID=patient, PatientName=f"SECRET^{patient}", **more)


def merge(intake: Intake, gone: str, kept: str) -> None:
    gone, kept = (intake.keys.pid("HOSPITAL", patient) for patient in (gone, kept))
    intake.catalogue.patients.merge(intake.catalogue.patients.plan(gone, kept), named_by="", **WHO)  # type: ignore[arg-type]


def known_as(intake: Intake) -> bytes:
    """Give the PatientID under which the study would be answered."""
    identity = intake.vault.study(intake.keys.uid(image().StudyInstanceUID))
    return next(element.value.strip() for element in identity.patient if element.tag == 0x00100020)


def test_a_newer_image_under_the_surviving_number_corrects_the_study(intake: Intake) -> None:
    assert hand_in(intake, of("A1")) is Taken.NEW
    assert hand_in(intake, of("B1", instance=2)) is Taken.HELD
    merge(intake, "A1", "B1")
    assert hand_in(intake, of("B1", instance=3, PatientBirthDate="20100101", PatientSex="M")) is Taken.NEW
    assert known_as(intake) == b"B1"
    assert hand_in(intake, of("A1", instance=4)) is Taken.NEW  # an old copy turns nothing back
    assert known_as(intake) == b"B1"
    (held,) = intake.catalogue.instances.held()
    assert intake.release(held[0].id, by="me", reason="merged") is Taken.NEW
    assert intake.catalogue.instances.count() == 4
    assert {one.person for one in intake.catalogue.instances.for_training()} == {intake.keys.pid("HOSPITAL", "B1")}


def test_a_known_image_under_the_surviving_number_is_known_and_stays_where_it_lies(intake: Intake) -> None:
    hand_in(intake, of("A1"))
    merge(intake, "A1", "B1")
    before = everything(intake.archive.folder)
    assert hand_in(intake, of("B1")) is Taken.KNOWN
    assert everything(intake.archive.folder) == before
    assert known_as(intake) == b"B1"
    assert hand_in(intake, of("B1", array=pixels(seed=9))) is Taken.HELD
    assert {one.reason for one, _at in intake.catalogue.instances.held()} == {"other pixels under a known UID"}


def test_a_third_patient_is_still_another_one(intake: Intake) -> None:
    hand_in(intake, of("A1"))
    merge(intake, "A1", "B1")
    assert hand_in(intake, of("C1", instance=2)) is Taken.HELD
    assert known_as(intake) == b"A1"


# --- the command -----------------------------------------------------------------------------------------------------------


def osteon(*words: str, site: Path, typed: str = "", code: int = 0) -> str:
    result = CliRunner().invoke(build(), [*words, "--config", str(site)], input=typed, catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert "SECRET" not in result.output
    return result.output


@pytest.fixture
def two(site: Path) -> Path:
    """Give a site with a study of SECRETA and one of SECRETB."""
    intake = Intake.open(settings.load(site))
    hand_in(intake, image(PatientID="SECRETA", PatientName="SECRET^A"))
    hand_in(intake, image(patient=2, PatientID="SECRETB", PatientName="SECRET^B"))
    intake.close()
    return site


def _pids(site: Path) -> tuple[str, str]:
    intake = Intake.open(settings.load(site))
    try:
        return intake.keys.pid("HOSPITAL", "SECRETA"), intake.keys.pid("HOSPITAL", "SECRETB")
    finally:
        intake.close()


def test_hospital_identifiers_come_by_a_table_and_are_kept_nowhere(two: Path) -> None:
    a, b = _pids(two)
    before = everything(two.parent)
    table = "gone,kept,kept_issuer\nSECRETA,SECRETB,\n"
    words = ("patients", "merge", "--from", "-", "--reason", "HIS ticket 12")
    assert f"{a} into {b}" in osteon(*words, "--dry-run", site=two, typed=table)
    assert everything(two.parent) == before
    told = osteon(*words, site=two, typed=table)
    assert "1 of 1 studies now leave under the identity that remains" in told
    intake = Intake.open(settings.load(two))
    assert known_as(intake) == b"SECRETB"
    intake.close()
    assert "0 of 1 studies" in osteon(*words, site=two, typed=table)  # again is harmless
    history = osteon("history", "--subject", a, site=two)
    assert all(word in history for word in ("patients merged", f"{a} into {b}", "HIS ticket 12"))
    assert not [name for name, (_mode, data) in everything(two.parent).items() if b"SECRETA" in data or b"SECRETB" in data]


def test_pseudonyms_may_be_arguments_and_identifiers_may_not(two: Path) -> None:
    a, b = _pids(two)
    before = everything(two.parent)
    for wrong in (("SECRETA", "SECRETB"), (a,), (a, b, "--from", "-")):
        result = CliRunner().invoke(build(), ["patients", "merge", *wrong, "--reason", "x", "--config", str(two)])
        assert result.exit_code == 2
        assert "SECRETA" not in result.output
    assert everything(two.parent) == before
    assert "merged" in osteon("patients", "merge", a, b, "--reason", "x", site=two)


def test_an_identity_that_the_vault_does_not_know_is_never_made_up(two: Path) -> None:
    told = osteon("patients", "merge", "--from", "-", "--reason", "x", site=two, typed="gone;kept\nSECRETA;NEW7\n")
    assert "keep the identity that is gone until an image comes under the other" in told
    intake = Intake.open(settings.load(two))
    assert known_as(intake) == b"SECRETA"
    assert hand_in(intake, image(instance=2, PatientID="NEW7", PatientName="SECRET^A")) is Taken.NEW
    assert known_as(intake) == b"NEW7"
    intake.close()


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("gone,kept\nSECRETA,SECRETB\nNOBODY1,NOBODY2\n", "line 3: no image of either"),
        ("gone,kept\nSECRETA,UNKNOWN\n", "line 2: the PatientID is a placeholder"),
        ("gone,kept\nSECRETA\n", "line 2: the row has not 2 cells"),
        ("gone,kept,why\nSECRETA,SECRETB,x\n", "the columns are gone, kept"),
        ('gone,kept\n"SECRETA,SECRETB\n', "is no CSV"),
        ("", "the columns are gone, kept"),
    ],
)
def test_a_table_is_merged_whole_or_not_at_all(two: Path, table: str, told: str) -> None:
    before = everything(two.parent)
    with pytest.raises(NotMergeable, match=told) as error:
        osteon("patients", "merge", "--from", "-", "--reason", "x", site=two, typed=table)
    assert "SECRET" not in str(error.value)
    assert everything(two.parent) == before


def test_a_line_of_a_table_counts_for_the_lines_after_it(site: Path) -> None:
    """A was learned from, C is locked: A into B, then B into C, makes one person who was learned from."""
    intake = Intake.open(settings.load(site))
    made = {number: intake.keys.pid("HOSPITAL", f"SECRET{number}") for number in range(1, 200)}
    fraction = intake.settings.training.locked
    c = next(number for number, pid in made.items() if intake.keys.is_locked(pid, fraction))
    a, b = [number for number, pid in made.items() if not intake.keys.is_locked(pid, fraction)][:2]
    for number in (a, b, c):
        hand_in(intake, image(patient=number, PatientID=f"SECRET{number}", PatientName="SECRET"))
    assert intake.catalogue.instances.locked_patients() == {made[c]}
    shelf = Registry(intake.settings.storage.root / "models")
    version = tiny_model.shelve(shelf, site.parent, corpus=(made[a],))
    table = f"gone,kept\nSECRET{a},SECRET{b}\nSECRET{b},SECRET{c}\n"
    told = osteon("patients", "merge", "--from", "-", "--reason", "x", site=site, typed=table)
    assert f"leaves the locked set: the corpus of {version}" in told
    assert intake.catalogue.patients.person(made[a]).pseudonyms == {made[a], made[b], made[c]}
    assert intake.catalogue.instances.locked_patients() == frozenset()
    intake.close()


def test_with_a_wrong_vault_key_nobody_is_merged(two: Path) -> None:
    a, b = _pids(two)
    (two.parent / "keys" / "vault.key").write_bytes(base64.b64encode(bytes(range(32))))
    before = everything(two.parent)
    with pytest.raises(BadKey):
        osteon("patients", "merge", a, b, "--reason", "x", site=two)
    assert everything(two.parent) == before


def test_without_a_terminal_nothing_is_asked_and_at_one_it_is(two: Path) -> None:
    assert "no terminal" in osteon("patients", "merge", "--reason", "x", site=two, code=2)
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "node", "patients", "merge", "--reason", "x", "--config", str(two)]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(ours, b"SECRETA\n\nSECRETB\nHOSPITAL\n")
    out, errors = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, errors
    assert "1 of 1 studies" in out
    assert "SECRET" not in out


# --- learning --------------------------------------------------------------------------------------------------------------

RECIPE = replace(named("phantom"), size_px=32, folds=3)


def frozen_of(site: Path) -> corpus.Corpus:
    root = settings_of(site).storage.root
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        chosen, left_out = corpus.choose(catalogue.instances.for_training(), catalogue.labels.all(), RECIPE)
    cache = Cache(root / "cache", Preprocessing(RECIPE.size_px))
    cache.build([one.image for one in chosen], Archive(root / "archive").read, threads=1)
    return corpus.freeze(chosen, left_out, cache, RECIPE)


def test_a_person_is_in_one_fold_and_counts_once(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    for patient in range(8):
        say(site, put(site, patient, kind=patient % 2), ("ewing_sarcoma", "acute_osteomyelitis")[patient % 2])
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        catalogue.patients.merge(catalogue.patients.plan(made_pid(0), made_pid(2)), named_by="", **WHO)  # type: ignore[arg-type]
    frozen_lists = frozen_of(site)
    assert len(frozen_lists.training) == 8
    assert set(frozen_lists.patients) == {made_pid(patient) for patient in range(1, 8)}
    folds = corpus.make_folds(frozen_lists.training, RECIPE)
    assert sum(made_pid(2) in fold.test for fold in folds) == 1
    assert not any(made_pid(0) in fold.test for fold in folds)


def test_days_of_one_number_are_not_compared_with_dates_of_the_other(tmp_path: Path) -> None:
    """Each number's dates are shifted by an offset of its own: nobody knows which came first."""
    site = init_site(tmp_path)
    one, other = put(site, 0), put(site, 2)
    say(site, one, "ewing_sarcoma", treated="2024-06-01")
    say(site, other, "ewing_sarcoma")
    assert len(frozen_of(site).training) == 2
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        catalogue.patients.merge(catalogue.patients.plan(one.pid, other.pid), named_by="", **WHO)  # type: ignore[arg-type]
    lists = frozen_of(site)
    assert [sample.sop_uid for sample in lists.training] == [one.sop_uid]
    assert lists.left_out["first treatment known under another number of the patient"] == 1


def test_what_a_run_or_a_version_froze_is_found(tmp_path: Path, catalogue: Catalogue) -> None:
    root = tmp_path
    (root / "runs" / "one").mkdir(parents=True)
    lists = {"training": [{"pid": A}], "locked": [{"pid": B}], "left_out": {}}
    (root / "runs" / "one" / "corpus.json").write_text(json.dumps(lists))
    assert frozen.naming(catalogue, root, {A, C}) == "the corpus of run one"
    assert frozen.naming(catalogue, root, {B, C}) == ""
    (root / "runs" / "two").mkdir()
    (root / "runs" / "two" / "corpus.json").write_text("{")
    assert frozen.naming(catalogue, root, {C}) == "the corpus of run two (damaged: it may name anybody)"


def test_what_a_version_was_trained_on_is_found(tmp_path: Path, catalogue: Catalogue) -> None:
    shelf = Registry(tmp_path / "models")
    version = tiny_model.shelve(shelf, tmp_path, corpus=(A, B))
    assert frozen.naming(catalogue, tmp_path, {B, C}) == f"the corpus of {version}"
    assert frozen.naming(catalogue, tmp_path, {C}) == ""
    file = shelf.folder(version) / "corpus.json"
    file.chmod(0o600)
    file.write_text("[]")
    assert "damaged" in frozen.naming(catalogue, tmp_path, {C})


def a_run(catalogue: Catalogue, folder: str) -> Run:
    """Let a trainer of another machine have begun a run."""
    worker = Worker("elsewhere", 1, "boot")
    row = catalogue.runs.start(kind="finetune", recipe="phantom", devices="d", worker=worker, now=NOW, until=NOW)
    assert catalogue.runs.bind(row.id, row.tries, folder)
    return row


def test_where_the_runs_are_not_seen_nobody_is_said_to_be_named_by_none(tmp_path: Path, catalogue: Catalogue) -> None:
    for name in ("runs", "models"):  # made by `osteon init` on every machine
        (tmp_path / name).mkdir()
    assert frozen.naming(catalogue, tmp_path, {A}) == ""
    row = a_run(catalogue, "one")
    with pytest.raises(NotMergeable, match="runs/one is not visible here"):
        frozen.naming(catalogue, tmp_path, {A})
    (tmp_path / "runs" / "one").mkdir()
    assert frozen.naming(catalogue, tmp_path, {A}) == ""
    assert catalogue.runs.done(row.id, row.tries, model_id="v1", decision="promote", now=NOW)
    with pytest.raises(NotMergeable, match="models/ is not visible here"):
        frozen.naming(catalogue, tmp_path, {A})
    tiny_model.shelve(Registry(tmp_path / "models"), tmp_path, corpus=(A,))
    (tmp_path / "runs" / "one").rmdir()  # its study protocol has ended; its model names whom it learned from
    assert "the corpus of" in frozen.naming(catalogue, tmp_path, {A})
    (tmp_path / "runs").rmdir()
    with pytest.raises(NotMergeable, match="runs/ is not visible here"):
        frozen.naming(catalogue, tmp_path, {A})


def test_a_run_whose_folder_may_not_be_read_names_nobody_less(tmp_path: Path, catalogue: Catalogue) -> None:
    row = a_run(catalogue, "one")
    catalogue.runs.fail(row.id, row.tries, "x", now=NOW)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").write_text("a folder that does not open")
    with pytest.raises(NotMergeable, match="as a user who may read them"):
        frozen.naming(catalogue, tmp_path, {A})


def test_a_merge_is_refused_where_nobody_can_tell_who_was_learned_from(two: Path) -> None:
    a, b = _pids(two)
    with Catalogue.open(settings.load(two).storage.catalogue) as catalogue:
        a_run(catalogue, "elsewhere")
    with pytest.raises(NotMergeable, match="runs/elsewhere is not visible here"):
        osteon("patients", "merge", a, b, "--reason", "x", site=two)
    with Catalogue.open(settings.load(two).storage.catalogue) as catalogue:
        assert catalogue.patients.person(a) == Person(a, frozenset({a}))


def test_lists_that_were_frozen_between_look_and_merge_are_seen_after_it(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = _pids(two)
    config = settings.load(two)
    with Catalogue.open(config.storage.catalogue) as catalogue:
        is_locked = text("UPDATE patient SET locked = true WHERE pid = :pid")
        catalogue.database.write(lambda connection: connection.execute(is_locked, {"pid": a}))
        done = patients.Patients.merge

        def merge(self: patients.Patients, plan: Merge, **more: Any) -> Merge:
            folder = config.storage.root / "runs" / "one"
            folder.mkdir()
            (folder / "corpus.json").write_text(json.dumps({"training": [{"pid": b}], "locked": [{"pid": a}]}))
            return done(self, plan, **more)

        monkeypatch.setattr(patients.Patients, "merge", merge)
        osteon("patients", "merge", a, b, "--reason", "x", site=two)
        assert catalogue.instances.locked_patients() == frozenset()
        assert "the corpus of run one" in next(act.reason for act in catalogue.history.acts(subject=a))
