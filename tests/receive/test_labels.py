"""A label table: all of it or nothing, under pseudonyms, with every problem by its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import pytest
import studies
from roles import hand_in
from typer.testing import CliRunner

from models.errors import OsteonError
from node.keep.records import Label
from node.pseudonym import SiteKeys
from node.receive import labels
from node.receive.intake import Intake
from node.settings import load

KEYS = SiteKeys.derive(b"k" * 32)
HEADER = "patient_id,issuer,study,sop_instance_uid,label,reader,labelled_on,confirmed_by,first_treatment_on"


def table(*rows: str, header: str = HEADER) -> str:
    return "\n".join((header, *rows)) + "\n"


# --- reading, pure -----------------------------------------------------------------------------------------------------------


def test_a_row_is_read_under_pseudonyms_and_its_treatment_date_moves_with_the_archive() -> None:
    rows, problems = labels.read(table("PID1,,ACC1,,ewing,rb,2024-05-01,histology,2024-04-02"), KEYS, "HOSP")
    assert not problems
    (row,) = rows
    assert row.pid == KEYS.pid("HOSP", "PID1")
    assert row.accession_keys == (KEYS.accession("HOSP", "ACC1"),)
    assert row.first_treatment_on == date(2024, 4, 2) + timedelta(days=KEYS.days("HOSP", "PID1"))
    assert row.labelled_on == date(2024, 5, 1)
    assert "PID1" not in str(row)
    assert "ACC1" not in str(row)


@pytest.mark.parametrize("text", ["\ufeff" + HEADER, HEADER.replace(",", ";"), HEADER + "\r"])
def test_what_spreadsheets_do_to_a_table_is_understood(text: str) -> None:
    separator = ";" if ";" in text else ","
    row = "PID1,,1.2.3,,ewing,rb,2024-05-01,Histology,".replace(",", separator)
    rows, problems = labels.read(text + "\n" + row + "\n", KEYS, "HOSP")
    assert (len(rows), problems) == (1, [])


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (",,ACC1,,ewing,rb,2024-05-01,histology,", "empty: patient_id"),
        ("P,,ACC1,,,rb,2024-05-01,histology,", "empty: label"),
        ("P,,ACC1,,ewing,rb,01.05.2024,histology,", "a date is not written"),
        ("P,,ACC1,,ewing,rb,2024-02-30,histology,", "a date is not written"),
        ("P,,ACC1,,ewing,rb,2024-05-01,histology,soon", "a date is not written"),
        ("P,,ACC1,,ewing,rb,2024-05-01,rumour,", "confirmed_by is none of"),
        ("P,,ACC1,,ewing,rb,2024-05-01", "cells"),
        ("P,,ACC1,,ewing,rb,2024-05-01,histology,,,", "cells"),
        ("P,,ACC1,,=cmd(),rb,2024-05-01,histology,", "not a word"),
        ('P,,"ACC1,,ewing,rb,2024-05-01,histology,', "no CSV"),
        ("P,,ACC1,,ewing,rb,2024-05-01,histology,0001-01-01", "too long ago"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_by_its_line_and_not_by_its_patient(row: str, what: str) -> None:
    good = "PID1,,ACC1,,ewing,rb,2024-05-01,histology,"
    rows, problems = labels.read(table(good, row), KEYS, "HOSP")
    assert len(rows) == 1
    (problem,) = problems
    assert what in problem.what
    assert problem.line in (2, 3)


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ("patient_id,study", "lacks label"),
        (HEADER + ",weight", "unknown"),
        (HEADER + ",label", "twice"),
        ("", "lacks"),
        (f'"{HEADER}', "no CSV"),
        (HEADER.replace("study", "stu\rdy"), "no CSV"),
    ],
)
def test_a_header_that_is_not_the_table_s_is_one_problem(header: str, what: str) -> None:
    rows, (problem,) = labels.read(table("x", header=header), KEYS, "HOSP")
    assert not rows
    assert problem.line == 1
    assert what in problem.what


# --- with what was received --------------------------------------------------------------------------------------------------


@pytest.fixture
def received(site: Path) -> Iterator[Path]:
    """A site that has received: patient 1 with two studies under one accession number, patient 2 with one study."""
    intake = Intake.open(load(site))
    for patient, study in ((1, 1), (1, 2), (2, 1)):
        for image in studies.study(patient=patient, study=study, images=1):
            image.AccessionNumber = f"ACC{patient}"
            hand_in(intake, image)
    intake.close()
    return site


def run(site: Path, folder: Path, *rows: str, dry: bool = False) -> tuple[str, OsteonError | None]:
    """Import a table; give what was printed and the error, if any."""
    from node.commands.labels import app

    file = folder / "labels.csv"
    file.write_text(table(*rows), "utf-8")
    result = CliRunner().invoke(app, ["import", str(file), "--config", str(site), *(["--dry-run"] if dry else [])])
    if result.exception is not None and not isinstance(result.exception, OsteonError):
        raise result.exception
    return result.output, result.exception


def stored(site: Path) -> list[Label]:
    from node.keep.catalogue import Catalogue

    with Catalogue.open(load(site).storage.catalogue) as catalogue:
        return catalogue.labels.all()


FIRST, OTHER = studies.image(patient=1, study=1), studies.image(patient=2, study=1)


def row(
    image: object, *, label: str = "ewing", reader: str = "rb", on: str = "2024-05-01", study: str = "", sop: str = ""
) -> str:
    return f"{image.PatientID},,{study or image.StudyInstanceUID},{sop},{label},{reader},{on},histology,"  # type: ignore[attr-defined]


def test_a_table_is_imported_under_pseudonyms_by_uid_accession_number_and_image(received: Path, tmp_path: Path) -> None:
    output, error = run(
        received, tmp_path, row(FIRST), row(FIRST, sop=FIRST.SOPInstanceUID), row(OTHER, study="ACC2", label="omy")
    )
    assert error is None
    assert "3 labels imported" in output
    found = stored(received)
    assert sorted((one.label, bool(one.sop_uid)) for one in found) == [("ewing", False), ("ewing", True), ("omy", False)]
    assert all(one.pid.startswith("OST-") for one in found)
    assert FIRST.PatientID not in output


def test_a_dry_run_shows_what_would_be_imported_and_imports_nothing(received: Path, tmp_path: Path) -> None:
    output, error = run(received, tmp_path, row(FIRST), row(OTHER, label="omy"), dry=True)
    assert error is None
    assert "label ewing: 1 rows, 1 studies, 1 patients" in output
    assert "label omy: 1 rows" in output
    assert not stored(received)


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (row(FIRST, study="ACC1"), "2 studies of the patient have this accession number"),
        (row(FIRST, study="NOSUCH"), "no such study was received"),
        (row(FIRST, study=OTHER.StudyInstanceUID), "of another patient"),
        (row(FIRST, sop="1.2.3"), "no such image was received in this study"),
        (row(OTHER, label="omy"), "contradicts line 2"),
        (row(OTHER), "repeats line 2"),
        (row(OTHER, label="omy", reader="xy"), "contradicts line 2"),
    ],
)
def test_one_bad_row_is_listed_by_its_line_and_nothing_is_imported(received: Path, tmp_path: Path, bad: str, what: str) -> None:
    output, error = run(received, tmp_path, row(OTHER), bad)
    assert error is not None
    assert re.search(rf"line 3: .*{what}", output)
    assert not stored(received)
    assert FIRST.PatientID not in output + str(error)


def test_the_same_table_again_changes_nothing(received: Path, tmp_path: Path) -> None:
    run(received, tmp_path, row(FIRST))
    output, error = run(received, tmp_path, row(FIRST))
    assert error is None
    assert "0 labels imported" in output
    assert len(stored(received)) == 1


def test_another_label_is_a_contradiction_unless_its_reader_corrects_it_later(received: Path, tmp_path: Path) -> None:
    run(received, tmp_path, row(FIRST))
    for contradiction in (row(FIRST, label="omy"), row(FIRST, label="omy", reader="xy", on="2024-06-01")):
        output, error = run(received, tmp_path, contradiction)
        assert error is not None
        assert "line 2: another label is stored" in output
    _, error = run(received, tmp_path, row(FIRST, label="omy", on="2024-06-01"))
    assert error is None
    assert [one.label for one in stored(received)] == ["omy"]


def test_a_row_without_the_day_of_treatment_does_not_wipe_out_the_stored_one(received: Path, tmp_path: Path) -> None:
    """Images after that day must not train, so it is never forgotten for want of a column."""
    told, _ = run(received, tmp_path, row(FIRST) + "2024-04-02")
    assert "1 labels imported" in told
    told, error = run(received, tmp_path, row(FIRST, on="2024-06-01"))
    assert error is not None
    assert "line 2: a day of first treatment is stored" in told
    (label,) = stored(received)
    assert label.first_treatment_on


def test_two_readers_may_agree(received: Path, tmp_path: Path) -> None:
    _, error = run(received, tmp_path, row(FIRST), row(FIRST, reader="xy"))
    assert error is None
    assert len(stored(received)) == 2


def test_the_list_names_nobody(received: Path, tmp_path: Path) -> None:
    from node.commands.labels import app

    run(received, tmp_path, row(FIRST))
    result = CliRunner().invoke(app, ["list", "--config", str(received)])
    assert result.exit_code == 0
    assert "ewing" in result.output
    assert FIRST.PatientID not in result.output
    assert FIRST.StudyInstanceUID not in result.output
