"""Archive, catalogue, vault and quarantine held against each other, and what can be mended without guessing.

In: the stores, and where a backup is at hand its list of hashes. Out: findings, one a thing that is not as it should be. Repair
never invents: what has no other copy is told, so that the PACS sends it again; what comes back as a study of its own comes back
as one to be learned from, so that no repair can lead to an answer that nobody asked for.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from io import BytesIO
from pathlib import Path

from pydicom import Dataset, dcmread

from models import durable
from node.errors import NotFound
from node.keep.archive import Archive
from node.keep.catalogue import Catalogue
from node.keep.records import Instance, Purpose, StudyState

YOUNG_S = 600.0
"""A file without a row may be on its way into the catalogue for so long."""
LEFT_OVER_S = 86400.0
"""A temporary file that is older than a day was left by a kill."""
DAMAGED = "damaged"
"""Folder below the root for files that are not what was archived: out of the way, so that the image can be sent again."""
GONE = "an image has no file in the archive: send the study again from the PACS"
COPIED_BACK = "is copied back from the backup"
_UID = re.compile(r"2\.25\.[0-9]+")


class Kind(StrEnum):
    """What is not as it should be."""

    NO_FILE = "image without its file"
    """The catalogue knows it, the archive does not hold it."""
    OTHER_FILE = "file that is not what was archived"
    """Cut short, changed or unreadable."""
    NO_ROW = "file without its row"
    """The archive holds it, the catalogue does not know it."""
    NO_IDENTITY = "image without its identity"
    """The vault does not know whose it is: no answer can be given."""
    LEFT_OVER = "temporary file of a killed process"
    """Never part of the archive."""
    STRANGER = "file that Osteon did not put there"
    """Its name is none of ours."""
    HELD_NO_FILE = "held object without its sealed file"
    """The catalogue names it, the quarantine does not hold it."""
    HELD_NO_ROW = "sealed file that the catalogue does not know"
    """Its sender was told no success, or the catalogue is older than the file."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    kind: Kind
    path: str
    """Below the storage root; made of pseudonyms."""
    study_uid: str = ""
    instance: Instance | None = None
    """The catalogue's row, where there is one."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a backup says of a file."""

    size: int
    sha256: str
    mtime_ns: int
    made_at: datetime
    """When the backup began."""


@dataclass(frozen=True, slots=True)
class Stores:
    """What is held against each other."""

    root: Path
    archive: Archive
    catalogue: Catalogue
    identities: Callable[[str], frozenset[str]]
    """Gives the SOP Instance UIDs whose identity the vault knows, of one study."""


Told = Callable[[str, int, int], None]


def verify(stores: Stores, *, known: Mapping[str, Known], quick: bool, told: Told) -> Iterator[Finding]:
    """Go through every study of catalogue and archive, then the quarantine.

    Parameters
    ----------
    known
        By path below the archive: what the last backup says of the file.
    quick
        Look whether each file is there (and of the size that the backup says), not into it.
    """
    folders = _folders(stores.archive.folder)
    uids = sorted({*stores.catalogue.studies.uids(), *folders})
    for done, uid in enumerate(uids, start=1):
        told("studies", done, len(uids))
        yield from _of_study(stores, uid, folders.get(uid, []), known, quick=quick)
    yield from _strangers(stores)
    yield from _of_quarantine(stores)


def _folders(archive: Path) -> dict[str, list[Path]]:
    """Find the folder of each study; a study of two patients has two, which is an error that shows in its rows."""
    found: dict[str, list[Path]] = {}
    for each in archive.glob("OST-*/*"):
        if each.is_dir() and _UID.fullmatch(each.name):
            found.setdefault(each.name, []).append(each)
    return found


def _of_study(stores: Stores, uid: str, folders: list[Path], known: Mapping[str, Known], *, quick: bool) -> Iterator[Finding]:
    study = stores.catalogue.studies.get(uid)
    if study is not None and study.state is StudyState.REMOVED and study.next_attempt_at is not None:
        return  # retention goes on with it
    rows = {one.path: one for one in stores.catalogue.instances.of_study(uid)}
    identities = stores.identities(uid) if rows else frozenset()
    for path, row in rows.items():
        file = stores.archive.folder / path
        if not file.is_file():
            yield Finding(Kind.NO_FILE, f"archive/{path}", uid, row)
        elif not _is_as_archived(stores, row, file, known.get(path), quick=quick):
            yield Finding(Kind.OTHER_FILE, f"archive/{path}", uid, row)
        if row.sop_uid not in identities:
            yield Finding(Kind.NO_IDENTITY, f"archive/{path}", uid, row)
    for file in sorted(file for folder in folders for file in folder.glob("*/*.dcm")):
        path = file.relative_to(stores.archive.folder).as_posix()
        if path not in rows and not file.name.startswith(".") and _age_s(file) > YOUNG_S:
            yield Finding(Kind.NO_ROW, f"archive/{path}", uid)


def _is_as_archived(stores: Stores, row: Instance, file: Path, known: Known | None, *, quick: bool) -> bool:
    """Say whether a file is the one that was archived last.

    What a backup says counts no longer where the PACS has sent the image since and another file stands there: it was lost or
    removed, and came again, maybe in another syntax. Then the digests of the catalogue alone tell.
    """
    if is_whole(stores.archive, row, file, known, quick=quick):
        return True
    if known is None or file.stat().st_mtime_ns == known.mtime_ns:
        return False
    seen_at = stores.catalogue.instances.seen_at(row.sop_uid)
    return seen_at is not None and seen_at > known.made_at and is_whole(stores.archive, row, file, None, quick=False)


def is_whole(archive: Archive, row: Instance, file: Path, known: Known | None, *, quick: bool) -> bool:
    """Say whether a file is the one that was archived."""
    if known is not None and file.stat().st_size != known.size:
        return False
    if quick:
        return file.stat().st_size > 0
    data = file.read_bytes()
    if known is not None and hashlib.sha256(data).hexdigest() != known.sha256:
        return False
    try:
        return archive.digests(dcmread(BytesIO(data))) == (row.header_digest, row.pixel_digest)
    except MemoryError:
        raise
    except Exception:  # pydicom raises anything on a damaged file
        return False


def _strangers(stores: Stores) -> Iterator[Finding]:
    for folder in (stores.archive.folder, stores.root / "quarantine"):
        for file in sorted(folder.rglob("*")):
            if not file.is_file() or file.suffix in (".dcm", ".sealed"):
                continue
            path = file.relative_to(stores.root).as_posix()
            if file.suffix != ".tmp":
                yield Finding(Kind.STRANGER, path)
            elif _age_s(file) > LEFT_OVER_S:
                yield Finding(Kind.LEFT_OVER, path)


def _of_quarantine(stores: Stores) -> Iterator[Finding]:
    sealed = {file.stem: file for file in (stores.root / "quarantine").glob("*.sealed")}
    held = {one.id: one for one, _at in stores.catalogue.instances.held()}
    for each in sorted(held.keys() - sealed.keys()):
        yield Finding(Kind.HELD_NO_FILE, f"quarantine/{each}.sealed", held[each].study_uid)
    for each in sorted(sealed.keys() - held.keys()):
        if _age_s(sealed[each]) > YOUNG_S:
            yield Finding(Kind.HELD_NO_ROW, f"quarantine/{each}.sealed")


def _age_s(file: Path) -> float:
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:  # gone meanwhile
        return 0.0


# --- mending -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Means:
    """What a repair may use."""

    stores: Stores
    mirror: Path
    """Copies of the archive that a backup made; may not exist."""
    known: Mapping[str, Known]
    is_locked: Callable[[str], bool]
    """Says of a patient never seen whether the person belongs to the locked share."""
    keys_of: Callable[[str], tuple[str, str]]
    """Gives the keyed hashes of accession number and study ID of a study, from the vault."""
    body_part: Callable[[Dataset], str]
    """Reads the vocabulary's term from a pseudonymised data set."""
    by: str
    now: datetime


def remedy(finding: Finding, means: Means) -> str:
    """Say what a repair will do about a finding; "" when a person has to do it, and `advice` says what."""
    if finding.kind in (Kind.NO_FILE, Kind.OTHER_FILE) and _copy_of(finding, means) is not None:
        return COPIED_BACK
    if finding.kind is Kind.NO_ROW and _described(finding, means) is None:
        return ""
    return _REMEDIES.get(finding.kind, "")


def advice(finding: Finding) -> str:
    """Say what a person has to do about a finding that no repair mends, or that it mends in part."""
    return _ADVICE.get(finding.kind, "")


def asks_for_more(finding: Finding, told: str) -> bool:
    """Say whether a finding whose remedy is `told` still needs the PACS: its image is nowhere."""
    return finding.kind in (Kind.NO_FILE, Kind.OTHER_FILE) and told != COPIED_BACK


def repair(findings: Sequence[Finding], means: Means) -> None:
    """Do what `remedy` says; the history keeps it, and studies that lack an image say so until it is there again."""
    lacking = set()
    for finding in findings:
        if (told := remedy(finding, means)) and not _has_come_again(finding, means):
            _mend(finding, told, means)
        if finding.kind in (Kind.NO_FILE, Kind.OTHER_FILE) and not (means.stores.root / finding.path).is_file():
            lacking.add(finding.study_uid)
    means.stores.catalogue.studies.remark(GONE, lacking)


def _has_come_again(finding: Finding, means: Means) -> bool:
    """Look once more before an image's file is replaced or moved away: the PACS may have sent it since it was found amiss."""
    if finding.kind not in (Kind.NO_FILE, Kind.OTHER_FILE) or finding.instance is None:
        return False
    row, file = means.stores.catalogue.instances.find(finding.instance.sop_uid), means.stores.root / finding.path
    if row is None or not file.is_file():
        return row is None  # removed meanwhile: there is nothing to mend
    known = means.known.get(finding.path.removeprefix("archive/"))
    return _is_as_archived(means.stores, row, file, known, quick=False)


def _mend(finding: Finding, told: str, means: Means) -> None:
    catalogue, file = means.stores.catalogue, means.stores.root / finding.path
    copy = _copy_of(finding, means)
    if finding.kind is Kind.LEFT_OVER:
        file.unlink(missing_ok=True)
        durable.sync_folder(file.parent)
    elif finding.kind is Kind.HELD_NO_FILE:
        with suppress(NotFound):  # a person was faster
            catalogue.instances.unhold(
                file.stem,
                by=means.by,
                reason="its sealed file is gone",
                decision="lost",
                now=means.now,
                goes=lambda _since: not file.is_file(),  # it may have come again since it was missed
            )
        return  # the history has it
    elif finding.kind is Kind.NO_ROW:
        _enter(finding, means)
    elif copy is not None:
        durable.write(file, copy)
    elif finding.kind is Kind.OTHER_FILE:
        _set_aside(file, means.stores.root)
    catalogue.history.note(by=means.by, what=f"archive: {finding.kind}"[:64], subject=file.stem, reason=told, now=means.now)


_REMEDIES = {
    Kind.NO_FILE: "is marked at its study; send that again from the PACS",
    Kind.OTHER_FILE: "is moved to the folder damaged; send its study again from the PACS",
    Kind.NO_ROW: "is entered again, to be learned from",
    Kind.LEFT_OVER: "is removed",
    Kind.HELD_NO_FILE: "is struck out",
}
_ADVICE = {
    Kind.NO_FILE: "send the study again from the PACS",
    Kind.OTHER_FILE: "send the study again from the PACS",
    Kind.NO_ROW: "send the study again from the PACS, so that the vault learns whose it is",
    Kind.NO_IDENTITY: "send the study again from the PACS",
    Kind.STRANGER: "move it away, after a look at who put it there",
    Kind.HELD_NO_ROW: "`osteon quarantine discard` removes it, after it was sent again",
}


def _copy_of(finding: Finding, means: Means) -> bytes | None:
    """Give the bytes of a good copy of an image, None when no backup has one."""
    path = finding.path.removeprefix("archive/")
    known, copy = means.known.get(path), means.mirror / path
    if finding.instance is None or known is None or not copy.is_file():
        return None
    if not is_whole(means.stores.archive, finding.instance, copy, known, quick=False):
        return None
    return copy.read_bytes()


def _described(finding: Finding, means: Means) -> Instance | None:
    """Read from a file what its row said, None when it is not one of ours, or nobody knows whose it is.

    The unit is not known from the file, and stays empty.
    """
    file = means.stores.root / finding.path
    try:
        clean = dcmread(file)
        keys = means.keys_of(finding.study_uid)
        instance = _row_of(clean, file, body_part=means.body_part(clean), accession_key=keys[0], study_id_key=keys[1])
        header, pixels = means.stores.archive.digests(clean)
        if means.stores.archive.path(instance) != file:
            return None
    except MemoryError:
        raise
    except Exception:  # pydicom raises anything on a damaged file, `keys_of` and `path` errors of ours
        return None
    if instance.sop_uid not in means.stores.identities(finding.study_uid):
        return None
    return replace(instance, header_digest=header, pixel_digest=pixels)


def _row_of(clean: Dataset, file: Path, *, body_part: str, accession_key: str, study_id_key: str) -> Instance:
    return Instance(
        sop_uid=str(clean.SOPInstanceUID),
        series_uid=str(clean.SeriesInstanceUID),
        study_uid=str(clean.StudyInstanceUID),
        pid=str(clean.PatientID),
        sop_class_uid=str(clean.SOPClassUID),
        transfer_syntax_uid=str(clean.file_meta.TransferSyntaxUID),
        path=Path(*file.parts[-4:]).as_posix(),
        header_digest="",
        pixel_digest="",
        modality=str(clean.get("Modality") or ""),
        body_part=body_part,
        age_years=_years(str(clean.get("PatientAge") or "")),
        sex=str(clean.get("PatientSex") or ""),
        device="",
        accession_key=accession_key,
        study_id_key=study_id_key,
    )


def _years(age: str) -> int | None:
    """Give completed years of an age string (AS); None when it is none."""
    a_year = {"Y": 1, "M": 12, "W": 52, "D": 365}
    return int(age[:3]) // a_year[age[3]] if re.fullmatch(r"\d{3}[DWMY]", age) else None


def _enter(finding: Finding, means: Means) -> None:
    instance = _described(finding, means)
    if instance is not None:
        means.stores.catalogue.instances.note(
            instance, purpose=Purpose.LEARN, calling_ae="", locked=means.is_locked(instance.pid), now=means.now
        )


def _set_aside(file: Path, root: Path) -> None:
    """Move a file that is not what was archived out of the way; it may still be looked at."""
    durable.make_folder(root / DAMAGED)
    file.replace(root / DAMAGED / file.name)
    durable.sync_folder(root / DAMAGED)
    durable.sync_folder(file.parent)
