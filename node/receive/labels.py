"""A label table under hospital identifiers -> labels under pseudonyms.

In: the text of a CSV file, keys, and what the catalogue knows. Out: labels, and problems by line number. Pure. Nothing here may
repeat a patient identifier in a message, guess which study is meant, or let a part of a table through when a row has a problem
(the caller imports only what came without one).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from io import StringIO

from node.keep.records import Label, Study
from node.pseudonym import SiteKeys

REQUIRED = ("patient_id", "study", "label", "reader", "labelled_on", "confirmed_by")
OPTIONAL = ("issuer", "sop_instance_uid", "first_treatment_on")
CONFIRMED_BY = ("histology", "culture", "follow-up", "opinion")


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be imported."""

    line: int
    """In the file, from 1."""
    what: str
    """A sentence without an identifier."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row under pseudonyms; which study it means is not looked up yet."""

    line: int
    pid: str
    study_uid: str
    """The pseudonym, should the row name the study by a UID."""
    accession_keys: tuple[str, ...]
    """The keyed hashes, should it name it by an accession number."""
    sop_uid: str
    """Empty: the label is the study's."""
    label: str
    reader: str
    labelled_on: date
    confirmed_by: str
    first_treatment_on: date | None
    """Shifted by the patient's offset."""


def read(text: str, keys: SiteKeys, default_issuer: str) -> tuple[list[Row], list[Problem]]:
    """Read the table; separated by commas or, when the header has none, by semicolons."""
    header = text.lstrip("\ufeff").split("\n", 1)[0]
    table = csv.DictReader(StringIO(text.lstrip("\ufeff")), delimiter="," if "," in header else ";", strict=True)
    try:
        names = [(name or "").strip() for name in table.fieldnames or ()]
    except csv.Error:
        return [], [Problem(1, "the header is no CSV: is a quotation mark missing?")]
    table.fieldnames = names
    if complaint := _complain_of_header(names):
        return [], [Problem(1, complaint)]
    rows: list[Row] = []
    problems: list[Problem] = []
    try:
        for cells in table:
            if None in cells or None in cells.values():
                problems.append(Problem(table.line_num, f"the row has not {len(names)} cells as the header has"))
                continue
            values = {name: cell.strip() for name, cell in cells.items()}
            row = _row(table.line_num, values, keys, default_issuer)
            (problems if isinstance(row, Problem) else rows).append(row)  # type: ignore[arg-type]
    except csv.Error:
        problems.append(Problem(table.line_num, "the line is no CSV: is a quotation mark missing?"))
    return rows, problems


def resolve(
    rows: Sequence[Row],
    *,
    studies: Callable[[Row], Sequence[Study]],
    pseudonyms: Callable[[str], Collection[str]] = lambda pid: (pid,),
    study_of_image: Callable[[str], str | None],
    stored: Sequence[Label],
) -> tuple[list[Label], list[Problem]]:
    """Find the study of each row, and say what is unknown, ambiguous, double or contradictory.

    Parameters
    ----------
    studies
        Gives every study that the row's study column may mean.
    pseudonyms
        Gives every pseudonym of the person to whom a pseudonym belongs: merged patients have several.
    study_of_image
        Gives the pseudonymous study of a pseudonymous image, None when it is unknown.
    stored
        The labels imported earlier. The same label again is no problem; another label is one, unless its reader corrects it at a
        later date.

    Returns
    -------
    tuple[list[Label], list[Problem]]
        The labels that are new or corrected, and the problems.
    """
    labels: list[Label] = []
    problems: list[Problem] = []
    first: dict[tuple[str, str], tuple[int, str, str]] = {}  # (study, image) -> line, label, reader
    for row in rows:
        found = _study(row, studies(row), pseudonyms(row.pid), study_of_image)
        if isinstance(found, Problem):
            problems.append(found)
            continue
        label = _label(row, found)
        line, said, reader = first.setdefault((label.study_uid, label.sop_uid), (row.line, label.label, label.reader))
        if line != row.line and (said != label.label or reader == label.reader):
            what = "contradicts" if said != label.label else "repeats"
            problems.append(Problem(row.line, f"the row {what} line {line}, which labels the same study or image"))
        elif any(_contradicts(label, earlier) for earlier in stored):
            problems.append(Problem(row.line, "another label is stored; its reader can correct it with a later labelled_on"))
        elif any(_forgets_treatment(label, earlier) for earlier in stored):
            problems.append(
                Problem(row.line, "a day of first treatment is stored, and the row states none; it may be changed, not left out")
            )
        elif label not in stored:
            labels.append(label)
    return labels, problems


def _complain_of_header(names: Sequence[str]) -> str:
    missing = [name for name in REQUIRED if name not in names]
    unknown = [name for name in names if name not in REQUIRED + OPTIONAL]
    if missing:
        return (
            f"the header lacks {', '.join(missing)}; the columns are {', '.join(REQUIRED)} and, if wanted, {', '.join(OPTIONAL)}"
        )
    if unknown:
        return f"{len(unknown)} unknown column(s); the columns are {', '.join(REQUIRED + OPTIONAL)}"
    return "a column stands twice" if len(set(names)) != len(names) else ""


def _row(line: int, cells: dict[str, str], keys: SiteKeys, default_issuer: str) -> Row | Problem:
    empty = [name for name in REQUIRED if not cells[name]]
    if empty:
        return Problem(line, f"empty: {', '.join(empty)}")
    if any(len(cells[name]) > 64 or "\0" in cells[name] for name in cells):
        return Problem(line, "a cell is longer than 64 characters, or holds a null character")
    if not re.fullmatch(r"\w[\w .+-]*", cells["label"]):
        return Problem(line, "the label is not a word (letters, digits, spaces and . + - _)")
    if cells["confirmed_by"].lower() not in CONFIRMED_BY:
        return Problem(line, f"confirmed_by is none of {', '.join(CONFIRMED_BY)}")
    labelled_on, treated_on = _date(cells["labelled_on"]), _date(cells.get("first_treatment_on", ""))
    if labelled_on is None or (treated_on is None and cells.get("first_treatment_on")):
        return Problem(line, "a date is not written as 2024-03-31")
    issuer, image = cells.get("issuer") or default_issuer, cells.get("sop_instance_uid", "")
    try:
        shifted = treated_on and treated_on + timedelta(days=keys.days(issuer, cells["patient_id"]))
    except OverflowError:
        return Problem(line, "first_treatment_on is too long ago")
    return Row(
        line=line,
        pid=keys.pid(issuer, cells["patient_id"]),
        study_uid=keys.uid(cells["study"]),
        accession_keys=tuple({keys.accession(one, cells["study"]): None for one in (issuer, default_issuer)}),
        sop_uid=keys.uid(image) if image else "",
        label=cells["label"],
        reader=cells["reader"],
        labelled_on=labelled_on,
        confirmed_by=cells["confirmed_by"].lower(),
        first_treatment_on=shifted,
    )


def _study(
    row: Row, found: Sequence[Study], pseudonyms: Collection[str], study_of_image: Callable[[str], str | None]
) -> str | Problem:
    """Give the pseudonymous UID of the one study that a row means."""
    if not found:
        return Problem(row.line, "no such study was received")
    own = sorted({study.uid for study in found if study.pid in pseudonyms})
    if not own:
        return Problem(row.line, "the study was received, but of another patient (or issuer)")
    if row.sop_uid:
        image_of = study_of_image(row.sop_uid)
        return image_of if image_of in own else Problem(row.line, "no such image was received in this study")
    if len(own) > 1:
        return Problem(row.line, f"{len(own)} studies of the patient have this accession number; name the study by its UID")
    return own[0]


def _label(row: Row, study_uid: str) -> Label:
    return Label(
        pid=row.pid,
        study_uid=study_uid,
        sop_uid=row.sop_uid,
        label=row.label,
        reader=row.reader,
        labelled_on=row.labelled_on.isoformat(),
        confirmed_by=row.confirmed_by,
        first_treatment_on=row.first_treatment_on.isoformat() if row.first_treatment_on else "",
    )


def _contradicts(new: Label, stored: Label) -> bool:
    if (new.study_uid, new.sop_uid) != (stored.study_uid, stored.sop_uid) or new.label == stored.label:
        return False
    return new.reader != stored.reader or new.labelled_on <= stored.labelled_on


def _forgets_treatment(new: Label, stored: Label) -> bool:
    """Say whether `new` would replace a label and lose the day from which on the patient's images do not train."""
    place = (new.study_uid, new.sop_uid, new.reader) == (stored.study_uid, stored.sop_uid, stored.reader)
    return place and bool(stored.first_treatment_on) and not new.first_treatment_on


def _date(text: str) -> date | None:
    try:
        return date.fromisoformat(text) if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else None
    except ValueError:
        return None
