"""Damaged input, always the same: the doors take it, hold it or refuse it, in time, and let no name through.

A failure names its case (`seed/number`); the number alone makes the damage again.
"""

from __future__ import annotations

import logging
import multiprocessing
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from mutate import NAME, TOKEN, Seed, damaged
from pydicom import dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from shared import FOLDER
from studies import image, quiet

from models.errors import OsteonError, Unreadable
from models.preprocess import display
from node import peer
from node.commands.init import init_site
from node.errors import NotAsAnnounced, NotUnderstood, Refused
from node.pseudonym import SiteKeys
from node.receive import labels
from node.receive.intake import Intake, Taken
from node.settings import load

# In production node.logs silences them; a warning of any other module stays an error here, because it would reach a log.
pytestmark = [pytest.mark.long, pytest.mark.timeout(240), pytest.mark.filterwarnings("ignore:::pydicom")]

SEED = 20260117
INTAKE_S, DISPLAY_S, LABELS_S = 60.0, 30.0, 15.0
CASE_S = 5.0
"""No damage may make an object take longer."""
SYNTAXES = (
    *(ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless),
    *(JPEGLosslessSV1, JPEGBaseline8Bit),
)
REAL_MAX_BYTES = 900_000


def made() -> list[FileDataset]:
    """Give small images in every transfer syntax."""
    options: dict[str, Any] = {"rows": 24, "columns": 16, "PatientID": TOKEN * 3, "AccessionNumber": TOKEN, "StudyID": TOKEN}
    images = []
    for number, syntax in enumerate(SYNTAXES):
        bits: dict[str, Any] = {"bits_stored": 8, "dtype": "uint8"} if syntax == JPEGBaseline8Bit else {}
        modality, charset = ("CR", "ISO_IR 100") if number % 2 else ("DX", "ISO_IR 192")
        images.append(image(patient=number, modality=modality, charset=charset, transfer_syntax=syntax, **bits, **options))
    return images


def real() -> list[FileDataset]:
    """Give the smaller real radiographs, where they are here."""
    images = []
    with quiet():
        for path in sorted((FOLDER / "data/dicom/files").glob("*.dcm")):
            if path.stat().st_size > REAL_MAX_BYTES:
                continue
            dataset = dcmread(path, force=True)
            if dataset.get("SOPClassUID") not in peer.IMAGE_CLASSES or "PixelData" not in dataset:
                continue
            syntax = dataset.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian)
            if syntax not in peer.IMAGE_SYNTAXES or dataset.get("Modality") not in ("CR", "DX", "MG"):
                continue
            dataset.file_meta.TransferSyntaxUID = syntax
            dataset.PatientID = TOKEN * 3
            images.append(dataset)
    return images


def seeds() -> list[Seed]:
    """Give what is to be damaged."""
    found = [Seed.of(f"made {one.file_meta.TransferSyntaxUID.name}", one) for one in made()]
    for number, one in enumerate(real()):
        try:
            found.append(Seed.of(f"real {number}", one))
        except Exception as error:  # what pydicom cannot write element by element is no start for this
            warnings.warn(f"real {number} left out: {type(error).__name__}", stacklevel=1)
    return found


def cases(start: list[Seed]) -> Iterator[tuple[str, Seed, bytes]]:
    """Damage without end: name of the case, the object before, its bytes now."""
    weights = [10 if seed.name.startswith("made") else 1 for seed in start]
    for number in count():
        rng = random.Random(f"{SEED} {number}")
        (seed,) = rng.choices(start, weights)
        if rng.random() < 0.8:
            seed = seed.anew(rng)
        yield f"{seed.name}/{number}", seed, damaged(seed, start[: len(SYNTAXES)], rng)


# --- the intake --------------------------------------------------------------------------------------------------------------


class _Listening(logging.Handler):
    """Keeps what was logged with a name in it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if TOKEN in str(record.__dict__):
            self.told.append(str(record.__dict__))


@pytest.fixture
def listening() -> Iterator[_Listening]:
    handler = _Listening()
    logger = logging.getLogger("osteon")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a folder in memory where there is one: what is tested here are more cases, not disks."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as made_here:  # noqa: S108
        (Path(made_here) / "temporary").mkdir()
        monkeypatch.setenv("TMPDIR", f"{made_here}/temporary")
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(made_here)


@pytest.fixture
def intake(folder: Path) -> Iterator[Intake]:
    callers = [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "purpose": "answer"}]
    opened = Intake.open(load(init_site(folder / "site", node={"port": 0, "callers": callers})))
    yield opened
    opened.close()


def give(intake: Intake, seed: Seed, raw: bytes) -> Taken:
    return intake.take_in(
        raw,
        transfer_syntax_uid=seed.syntax,
        sop_class_uid=seed.sop_class,
        sop_instance_uid=seed.sop_uid,
        calling_ae="SENDER",
        called_ae="OSTEON",
    )


def test_damaged_objects_are_taken_held_or_refused_and_let_no_name_through(
    intake: Intake, listening: _Listening, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcomes: Counter[str] = Counter()
    slowest = (0.0, "")
    until = monotonic() + INTAKE_S
    for case, seed, raw in cases(seeds()):
        began = monotonic()
        if began > until:
            break
        try:
            outcome = str(give(intake, seed, raw))
        except (Refused, NotUnderstood, NotAsAnnounced) as error:
            outcome = type(error).__name__ + ("" if TOKEN not in str(error) else ": the error repeats a name")
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__} came out of the intake") from error
        outcomes[outcome] += 1
        took = monotonic() - began
        slowest = max(slowest, (took, case))
        assert took < CASE_S, f"{case} took {took:.1f} s"
        assert not listening.told, f"{case}: a name was logged"
        if outcome == Taken.NEW:
            assert_nameless(intake, seed, case)
    told = capfd.readouterr()
    with capfd.disabled():
        print(f"\nintake: {outcomes.total()} objects, {dict(outcomes)}, slowest {slowest[0] * 1000:.0f} ms ({slowest[1]})")
    assert TOKEN not in told.out + told.err
    assert outcomes.keys() == {Taken.NEW, Taken.KNOWN, Taken.HELD, "NotUnderstood", "NotAsAnnounced"}
    for path in folder.rglob("*"):
        assert TOKEN not in path.name
        if path.is_file() and path.suffix != ".dcm":  # sealed, catalogue, vault, temporary
            assert TOKEN.encode() not in path.read_bytes(), path


def assert_nameless(intake: Intake, seed: Seed, case: str) -> None:
    """Look for the name in an archived file. Pixels are not text: what a splice put among them nobody can tell."""
    kept = intake.catalogue.instances.find(intake.keys.uid(seed.sop_uid))
    assert kept is not None, case
    raw = intake.archive.path(kept).read_bytes()
    pixels = dcmread(intake.archive.path(kept)).PixelData
    assert TOKEN.encode() not in raw.replace(pixels, b""), f"{case}: a name is in the archive"


# --- the decoders ------------------------------------------------------------------------------------------------------------


def _show_until(end_s: float, at: Any, told: Any) -> None:
    """Decode in a process of its own: a codec that crashes takes it along, and the parent knows the case."""
    warnings.simplefilter("ignore")
    outcomes: Counter[str] = Counter()
    slowest = (0.0, "")
    until = monotonic() + end_s
    for number, (case, seed, raw) in enumerate(cases(seeds())):
        if monotonic() > until:
            break
        at.value = number
        try:
            dataset = read_dataset(BytesIO(raw), seed.implicit, seed.little_endian)
        except Exception:  # refused at the door
            outcomes["no data set"] += 1
            continue
        shown_to = FileDataset("", dataset, is_implicit_VR=seed.implicit, is_little_endian=seed.little_endian)
        shown_to.file_meta = FileMetaDataset()
        shown_to.file_meta.TransferSyntaxUID = UID(seed.syntax)
        began = monotonic()
        try:
            grey = display(shown_to)
            outcome = "shown" if grey.ndim == 2 and grey.dtype.name == "uint8" else f"{case}: shape {grey.shape}"
        except Unreadable as error:
            outcome = f"{case}: the error repeats a value" if TOKEN in str(error) else "Unreadable"
        except MemoryError:
            outcome = f"{case}: MemoryError"
        except Exception as error:
            outcome = f"{case}: {type(error).__name__}"
        outcomes[outcome] += 1
        slowest = max(slowest, (monotonic() - began, case))
    told.send((dict(outcomes), slowest))


def test_damaged_images_are_shown_or_unreadable(capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    at = context.Value("l", -1, lock=False)
    child = context.Process(target=_show_until, args=(DISPLAY_S, at, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(DISPLAY_S + 60):
            pytest.fail(f"case {at.value}: the decoder hangs")
        outcomes, slowest = ours.recv()
    except EOFError:
        child.join(30)
        pytest.fail(f"case {at.value}: the decoder ended with {child.exitcode}")
    finally:
        child.kill()
        child.join(30)
    with capfd.disabled():
        print(f"\ndisplay: {sum(outcomes.values())} images, {outcomes}, slowest {slowest[0] * 1000:.0f} ms ({slowest[1]})")
    assert set(outcomes) <= {"no data set", "shown", "Unreadable"}
    assert slowest[0] < CASE_S, slowest


# --- the labels --------------------------------------------------------------------------------------------------------------

HEADER = "patient_id,issuer,study,sop_instance_uid,label,reader,labelled_on,confirmed_by,first_treatment_on"
ROW = f"{TOKEN * 3},HOSP,{{}},2.25.{{}},ewing,Dr {NAME},2024-03-31,histology,2024-04-01"
_CELLS = (
    *('"', '""', "\0", "\r", "\n", "\r\n", ";", ",", "\t", "\ufeff", "\u2028", "\x85", "9999-12-31", "0001-01-01"),
    *("٣٠٢٤-03-31", "=cmd()", "x" * 70, "x" * 140_000, "Ewing's", "ｅｗｉｎｇ", "\x1b[2J", "patient_id", "None", "é"),
)


def test_damaged_tables_give_rows_or_problems_and_repeat_no_name(capfd: pytest.CaptureFixture[str]) -> None:
    keys = SiteKeys.derive(b"k" * 32)
    outcomes: Counter[str] = Counter()
    until = monotonic() + LABELS_S
    for case in count():
        if monotonic() > until:
            break
        rng = random.Random(f"{SEED} labels {case}")
        table = "\n".join([HEADER, *(ROW.format(number, number) for number in range(rng.randrange(1, 6)))])
        if rng.random() < 0.2:
            table = table.replace(",", ";")
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(table) + 1)
            table = table[:at] + rng.choice((*_CELLS, "")) + table[at + rng.choice((0, 0, 1, 5, 40)) :]
        try:
            rows, problems = labels.read(table, keys, "HOSP")
        except OsteonError as error:
            outcomes[type(error).__name__] += 1
            continue
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}") from error
        outcomes["rows"] += len(rows)
        outcomes["problems"] += len(problems)
        assert not any(TOKEN in problem.what for problem in problems), case
        assert all(row.pid.startswith("OST-") and len(row.label) <= 64 for row in rows), case
    with capfd.disabled():
        print(f"\nlabels: {case} tables, {dict(outcomes)}")
    assert outcomes["rows"]
    assert outcomes["problems"]


def test_the_same_number_is_the_same_damage() -> None:
    start = [Seed.of("made", one) for one in made()]
    once, again = ([raw for (_, _, raw), _ in zip(cases(start), range(200), strict=False)] for _ in range(2))
    assert once == again
    assert len(set(once)) > 190
    assert all(TOKEN.encode() in b"".join(seed.parts) for seed in start)
