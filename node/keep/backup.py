"""One consistent set of what a site knows, and the way back: catalogue, vault, quarantine, shelf of models, list of the archive.

In: the stores of a site. Out: a folder named by its time, whole or not there at all. Everything in it is as sealed as it was; the
keys must never be in it, nor the set be where what it saves is. Below the folder of the backups::

    20260301T120000Z/manifest.json       versions, time, whose keys, size and SHA-256 of every file, counts
    20260301T120000Z/catalogue.jsonl.gz  every table, portable between SQLite and PostgreSQL (`dump.py`)
    20260301T120000Z/vault.jsonl.gz      likewise; its rows stay sealed
    20260301T120000Z/archive.jsonl.gz    path, size, time and SHA-256 of every catalogued image
    20260301T120000Z/quarantine/…        the sealed objects that the catalogue names
    20260301T120000Z/models/…            versions, aliases, history
    archive/…                            with `copy_archive`: the images, each copied once, anew only when its bytes are others

Intake writes vault, then archive, then catalogue; so the catalogue is read first: each row in the set has its identity and its
file. Files that never change are linked to the set before, where the file system allows.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import Connection, MetaData, delete

import node
from models import durable
from models.errors import Final, Tampered
from node.errors import BadKey, BadSettings, NoSpace, NotEmpty, NotFound, disk_full_said
from node.keep import dump, turns
from node.keep.catalogue import history, states
from node.keep.catalogue.schema import MIGRATIONS, flag, role
from node.keep.catalogue.schema import metadata as catalogue_tables
from node.keep.catalogue.schema import study as studies
from node.keep.database import Database, put_row

FORMAT = 1
MANIFEST = "manifest.json"
CATALOGUE, VAULT, ARCHIVE = "catalogue.jsonl.gz", "vault.jsonl.gz", "archive.jsonl.gz"
RESTORING = "restoring.json"
"""Stands in the storage root from the first byte of a restore to the last: the same set may be restored again over it."""
SHELF = ("aliases", "history.jsonl", "looks.jsonl", "versions")
"""What of the shelf is copied, in this order: an alias names a version that stands already."""
_NAME = "%Y%m%dT%H%M%SZ"
_SPARE = 64 << 20
"""Bytes that must stay free beside a set or a restored store."""

Told = Callable[[str, int, int], None]
"""Who is told how far it is: what, done, of how many."""


def _silent(_what: str, _done: int, _total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Whose:
    """Which keys a site has, and how it reads a patient's number, without saying anything of the keys."""

    site: str
    """Derived from the site key one way."""
    vault_key: str
    """Id of the key that seals the vault."""
    default_issuer: str
    """With another one, an image sent again would get another pseudonym."""

    @property
    def keys(self) -> str:
        """Name the pair of keys in 32 letters."""
        return hashlib.sha256(f"{self.site}\n{self.vault_key}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Stores:
    """What is saved."""

    root: Path
    catalogue: Database
    vault: Database
    vault_tables: MetaData
    whose: Callable[[], Whose]
    """Holds the keys against the stores and tells whose they are; asked when nobody can change the key of the vault any more."""


@dataclass(frozen=True, slots=True)
class Set:
    """One whole set."""

    folder: Path
    made_at: datetime
    osteon: str
    whose: Whose
    counts: Mapping[str, int]
    files: Mapping[str, Mapping[str, Any]]
    """By path within the set: size and SHA-256, and time of the source where the file was copied."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(int(each["size"]) for each in self.files.values())

    @property
    def missing(self) -> int:
        """Catalogued images that had no file when the set was made."""
        return self.counts.get("missing", 0)


# --- making --------------------------------------------------------------------------------------------------------------------


def make(stores: Stores, folder: Path, *, copy_archive: bool = False, now: datetime, told: Told = _silent) -> Set:
    """Save one set in `folder` while the node runs, and give it when it is whole and on the disk.

    Raises
    ------
    NoSpace
        There is not room enough, by what the stores take now.
    BadSettings
        Another backup writes into `folder` now.
    BadKey, RotationUnfinished
        The keys are not those of the stores.
    """
    durable.make_folder(folder)
    with _alone(folder), turns.looking(stores.root):
        whose = stores.whose()  # within the turn: a rotation of the key that was waited for has sealed everything with another
        for left in folder.glob(".*.partial"):
            shutil.rmtree(left)
        previous = next(reversed(sets(folder)), None)
        _require_room(folder, _needed(stores, folder, previous, copy_archive=copy_archive))
        name = now.astimezone(UTC).strftime(_NAME)
        if (folder / name).exists():
            raise BadSettings(f"{folder / name} is there already; wait a second")
        partial = folder / f".{name}.partial"
        with disk_full_said():
            maker = _Maker(stores, partial, previous, told)
            maker.run()
            if copy_archive:
                _mirror(stores.root / "archive", folder / "archive", partial / ARCHIVE, told)
            plain = {
                "format": FORMAT,
                "osteon": node.__version__,
                "made_at": now.astimezone(UTC).isoformat(),
                "whose": asdict(whose),
                "counts": maker.counts,
                "files": dict(sorted(maker.files.items())),
            }
            durable.write(partial / MANIFEST, (json.dumps(plain, indent=1) + "\n").encode(), mode=0o600)
            partial.rename(folder / name)
            durable.sync_folder(folder)
        return read(folder / name)


class _Maker:
    """Fills one set, in the order in which its parts must be read."""

    def __init__(self, stores: Stores, folder: Path, previous: Set | None, told: Told) -> None:
        self.stores, self.folder, self.previous, self.told = stores, folder, previous, told
        self.counts: dict[str, int] = {}
        self.files: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        durable.make_folder(self.folder)
        self._dump("catalogue", self.stores.catalogue, catalogue_tables, CATALOGUE)
        self._dump("vault", self.stores.vault, self.stores.vault_tables, VAULT)
        self._copy_quarantine()
        self._copy_shelf()
        self._list_archive()

    def _dump(self, name: str, database: Database, tables: MetaData, file: str) -> None:
        self.told(name, 0, 1)
        found = dump.write(database, tables, self.folder / file)
        self.counts |= {f"{name}.{table}": number for table, number in found.items()}
        self._note(file)
        self.told(name, 1, 1)

    def _copy_quarantine(self) -> None:
        ids = [row["id"] for row in dump.rows(self.folder / CATALOGUE, "held")]
        sources = [(f"quarantine/{each}.sealed", self.stores.root / "quarantine" / f"{each}.sealed") for each in ids]
        self._copy("quarantine", sources)

    def _copy_shelf(self) -> None:
        shelf = self.stores.root / "models"
        found = [
            file
            for part in SHELF
            for file in ([shelf / part] if (shelf / part).is_file() else sorted((shelf / part).rglob("*")))
            if file.is_file() and not any(piece.startswith(".") for piece in file.relative_to(shelf).parts)
        ]
        self._copy("models", [(f"models/{file.relative_to(shelf).as_posix()}", file) for file in found])

    def _copy(self, what: str, sources: Sequence[tuple[str, Path]]) -> None:
        copied = 0
        for done, (name, source) in enumerate(sources, start=1):
            copied += self._take(name, source)
            self.told(what, done, len(sources))
        self.counts[what] = copied

    def _take(self, name: str, source: Path) -> bool:
        """Copy a file, or link it to the set before when it has not changed since; False when it is gone meanwhile."""
        target = self.folder / name
        try:
            at = source.stat()
            before = self.previous.files.get(name) if self.previous else None
            if before and self.previous and (before["size"], before.get("mtime_ns")) == (at.st_size, at.st_mtime_ns):
                durable.make_folder(target.parent)
                try:
                    os.link(self.previous.folder / name, target)
                    durable.sync_folder(target.parent)
                    self.files[name] = dict(before)
                    return True
                except OSError:  # a file system without links, or the file before is gone
                    pass
            copy(source, target)
        except FileNotFoundError:
            return False
        self._note(name, mtime_ns=at.st_mtime_ns)
        return True

    def _list_archive(self) -> None:
        """Write the list of the images; a file whose size and time are as in the set before has its hash from there."""
        archive, total = self.stores.root / "archive", self.counts["catalogue.instance"]
        before = {one["path"]: one for one in images(self.previous.folder)} if self.previous else {}
        missing = size = 0

        def lines() -> Iterator[bytes]:
            nonlocal missing, size
            for done, row in enumerate(dump.rows(self.folder / CATALOGUE, "instance"), start=1):
                self.told("archive", done, total)
                try:
                    at = (archive / row["path"]).stat()
                    known = before.get(row["path"], {})
                    same = (known.get("size"), known.get("mtime_ns")) == (at.st_size, at.st_mtime_ns)
                    digest = known["sha256"] if same else sha256(archive / row["path"])
                except FileNotFoundError:
                    missing += 1
                    continue
                size += at.st_size
                one = {"path": row["path"], "size": at.st_size, "mtime_ns": at.st_mtime_ns, "sha256": digest}
                yield json.dumps(one, separators=(",", ":")).encode() + b"\n"

        def fill(file: BinaryIO) -> None:
            with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=5, mtime=0) as out:
                out.writelines(lines())

        durable.write_with(self.folder / ARCHIVE, fill, mode=0o600)
        self._note(ARCHIVE)
        self.counts |= {"archive": total - missing, "archive.bytes": size, "missing": missing}

    def _note(self, name: str, **also: int) -> None:
        file = self.folder / name
        self.files[name] = {"size": file.stat().st_size, "sha256": sha256(file), **also}


def _mirror(archive: Path, mirror: Path, listed: Path, told: Told) -> None:
    """Copy what the mirror does not have as it is listed: a file that was lost or removed, and came again, is another one.

    A copy has the time of what was copied, so that it is looked into only where that differs.
    """
    wanted = list(_images(listed))
    for done, one in enumerate(wanted, start=1):
        told("archive copy", done, len(wanted))
        target, stated = mirror / one["path"], (one["size"], one["mtime_ns"])
        if target.is_file() and (target.stat().st_size, target.stat().st_mtime_ns) == stated:
            continue
        if not target.is_file() or sha256(target) != one["sha256"]:
            copy(archive / one["path"], target, mode=0o440)
        os.utime(target, ns=(one["mtime_ns"], one["mtime_ns"]))


def _needed(stores: Stores, folder: Path, previous: Set | None, *, copy_archive: bool) -> int:
    """Say how many bytes a set can take: databases as they are now, and what the set before does not have already."""
    copied = previous.files if previous else {}
    kept = [*(stores.root / "quarantine").glob("*.sealed"), *(stores.root / "models").rglob("*")]
    new = sum(each.stat().st_size for each in kept if each.is_file())
    linked = sum(int(one["size"]) for name, one in copied.items() if "mtime_ns" in one)
    needed = dump.size(stores.catalogue) + dump.size(stores.vault) + max(0, new - linked)
    if copy_archive:
        there = sum(file.stat().st_size for file in (folder / "archive").rglob("*.dcm"))
        needed += max(0, sum(file.stat().st_size for file in (stores.root / "archive").rglob("*.dcm")) - there)
    return needed


# --- what there is -------------------------------------------------------------------------------------------------------------


def sets(folder: Path) -> list[Set]:
    """Give the whole sets in a folder, oldest first."""
    named = (each for each in sorted(folder.iterdir()) if re.fullmatch(r"\d{8}T\d{6}Z", each.name)) if folder.is_dir() else ()
    return [read(each) for each in named if (each / MANIFEST).is_file()]


def read(folder: Path) -> Set:
    """Read what a set says of itself.

    Raises
    ------
    NotFound
        It is no set, or was never finished.
    Tampered, Final
        Its manifest cannot be read, or another version wrote it.
    """
    try:
        plain = json.loads((folder / MANIFEST).read_bytes())
        if plain["format"] != FORMAT:
            raise Final(f"{folder}: this set has format {plain['format']}; use the version of Osteon that made it")
        made_at = datetime.fromisoformat(plain["made_at"])
        return Set(folder, made_at, plain["osteon"], Whose(**plain["whose"]), plain["counts"], plain["files"])
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{folder} is no backup set; `osteon backup list` shows what there is") from None
    except (ValueError, KeyError, TypeError):
        raise Tampered(f"{folder}: the manifest is damaged; take another set") from None


def images(folder: Path) -> Iterator[dict[str, Any]]:
    """Read a set's list of the archive: path, size, mtime_ns, sha256 of each image."""
    yield from _images(folder / ARCHIVE)


def verify(one: Set, told: Told = _silent) -> list[str]:
    """Hold every file of a set against the manifest and give what is wrong, a line each."""
    wrong = []
    for done, (name, stated) in enumerate(one.files.items(), start=1):
        told("files", done, len(one.files))
        file = one.folder / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != stated["size"] or sha256(file) != stated["sha256"]:
            wrong.append(f"{name} is not what the manifest says")
    return wrong


def prune(folder: Path, keep: int) -> list[str]:
    """Remove all sets but the newest `keep` and name those that went; the mirror of the archive stays."""
    gone = sets(folder)[:-keep] if keep > 0 else []
    for one in gone:
        away = folder / f".{one.folder.name}.partial"  # not a set any more from here on, whatever happens
        one.folder.rename(away)
        durable.sync_folder(folder)
        shutil.rmtree(away)
    return [one.folder.name for one in gone]


# --- the way back --------------------------------------------------------------------------------------------------------------


def require_keys(one: Set, whose: Whose) -> None:
    """Refuse a set that these keys do not open, or whose patients would be named otherwise here.

    Raises
    ------
    BadKey, BadSettings
        What differs, and what to do.
    """
    if one.whose.site != whose.site:
        raise BadKey(
            f"{one.folder.name} was made under another site key: put that key where [storage] site_key says, and try again"
        )
    if one.whose.vault_key != whose.vault_key:
        raise BadKey(
            f"{one.folder.name} was sealed with another vault key: put that key where [storage] vault_key says, and try again"
        )
    if one.whose.default_issuer != whose.default_issuer:
        raise BadSettings(
            f"{one.folder.name} was made with another [node] default_issuer; with this one, every image sent again would get "
            "another pseudonym. Set it to what it was"
        )


def restore(
    one: Set, root: Path, *, catalogue_url: str, vault_url: str, vault_tables: MetaData, by: str, now: datetime,
    told: Told = _silent,
) -> int:  # fmt: skip
    """Put a set into empty stores and give the number of images that were copied back from the mirror beside it.

    Killed at any moment, it is to be called again with the same set. The catalogue comes last. What was answered after the set
    was made looks unanswered in it, and another model may have answered: such studies are `expired`, to be answered by hand,
    and answers are paused. What has its result in the set leaves as the same bytes as before, or does not leave again.

    Raises
    ------
    NotEmpty
        A store has content of its own; nothing was written.
    Tampered
        A file of the set is not what its manifest says; nothing was written.
    NoSpace
        There is not room enough; nothing was written.
    """
    if wrong := verify(one, told):
        raise Tampered(f"{one.folder}: {'; '.join(wrong[:3])}; take another set")
    again = _begin(one, root)
    opened = [(VAULT, vault_url, vault_tables, None), (CATALOGUE, catalogue_url, catalogue_tables, MIGRATIONS)]
    databases = [Database.open(url, MetaData()) for _file, url, _tables, _migrations in opened]
    try:
        contents = _contents(root, databases, vault_tables)
        if contents and not again:
            raise NotEmpty(
                f"a set is restored into empty stores only, and there is {' and '.join(contents)} already: name empty databases "
                "and an empty root in [storage], or move what is there away"
            )
        _require_room(root, one.size + 8 * sum(int(one.files[name]["size"]) for name in (CATALOGUE, VAULT)))
        durable.write(root / RESTORING, json.dumps(_named(one)).encode(), mode=0o600)
        with disk_full_said():
            _put_files(one, root, told)
            copied = _put_images(one, root, told)
            for database, (file, _url, tables, migrations) in zip(databases, opened, strict=True):
                _put_rows(one, database, file, tables, migrations, told, by=by, now=now)
        (root / RESTORING).unlink()
        durable.sync_folder(root)
        return copied
    finally:
        for database in databases:
            database.close()


def _begin(one: Set, root: Path) -> bool:
    """Say whether a restore of this very set was cut short here."""
    durable.make_folder(root)
    try:
        begun = json.loads((root / RESTORING).read_bytes())
    except FileNotFoundError:
        return False
    if begun != _named(one):
        raise NotEmpty(f"a restore of {begun['set']} was begun here and not finished: finish it, or empty the stores")
    return True


def _named(one: Set) -> dict[str, str]:
    return {"set": one.folder.name, "manifest": sha256(one.folder / MANIFEST)}


def _contents(root: Path, databases: Sequence[Database], vault_tables: MetaData) -> list[str]:
    """Name the stores that hold something; images may be there already, for their files come back by another way."""
    vault, catalogue = databases
    found = []
    if dump.count(catalogue, studies):
        found.append("a study in the catalogue")
    if dump.count(vault, vault_tables.tables["vault_studies"]):
        found.append("an identity in the vault")
    if any((root / "quarantine").glob("*.sealed")):
        found.append("an object in the quarantine")
    if any((root / "models" / "versions").glob("[0-9]*")):
        found.append("a model version")
    return found


def _put_files(one: Set, root: Path, told: Told) -> None:
    wanted = {name: stated for name, stated in one.files.items() if name.startswith(("quarantine/", "models/"))}
    shelf_last = sorted(wanted, key=lambda name: (name.startswith("models/aliases/"), name))  # an alias after its version
    for done, name in enumerate(shelf_last, start=1):
        told("files", done, len(wanted))
        if not (root / name).is_file() or sha256(root / name) != wanted[name]["sha256"]:
            mode = 0o440 if name.startswith("models/versions/") else 0o600
            copy(one.folder / name, root / name, mode=mode)


def _put_images(one: Set, root: Path, told: Told) -> int:
    """Copy the images back from the mirror beside the set, where there is one and its copy is what the set lists."""
    mirror, copied = one.folder.parent / "archive", 0
    if not mirror.is_dir():
        return 0
    for done, image in enumerate(images(one.folder), start=1):
        told("archive", done, one.counts["archive"])
        source, target = mirror / image["path"], root / "archive" / image["path"]
        if source.is_file() and not target.exists() and sha256(source) == image["sha256"]:
            copy(source, target, mode=0o440)
            copied += 1
    return copied


def _put_rows(
    one: Set, database: Database, file: str, tables: MetaData, migrations: Path | None, told: Told, *, by: str, now: datetime
) -> None:
    """Load a database whole, in one transaction: after a kill it is there or it is not."""
    name = file.partition(".")[0]
    told(name, 0, 1)

    def load(connection: Connection) -> None:
        dump.load(connection, one.folder / file, tables, migrations)
        if file == CATALOGUE:
            connection.execute(delete(role))  # processes of the lost machine
            put_row(connection, flag, name="answers", value="paused")
            states.set_aside(connection, made_at=one.made_at, now=now)
            reason = f"restored from {one.folder.name}, made {one.made_at:%Y-%m-%d %H:%M} UTC"
            history.note(connection, by=by, what="answers: paused", subject="answers", reason=reason, now=now)

    content = studies if file == CATALOGUE else tables.tables["vault_studies"]
    there = dump.count(database, content)
    if not there:
        database.write(load)
    elif there != one.counts[f"{name}.{content.name}"]:
        raise NotEmpty(f"something else wrote into the {name} since the restore was begun; empty the stores, and start again")
    told(name, 1, 1)


# --- files ---------------------------------------------------------------------------------------------------------------------


def copy(source: Path, target: Path, *, mode: int = 0o600) -> None:
    """Copy a file, durably."""
    with source.open("rb") as file:
        durable.write_with(target, lambda out: shutil.copyfileobj(file, out, 1 << 20), mode=mode)


def sha256(path: Path) -> str:
    """Hash a file, a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _images(listed: Path) -> Iterator[dict[str, Any]]:
    yield from dump.read_lines(listed, f"{listed}: the list of the archive")


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        raise NoSpace(
            f"{needed / 2**30:.1f} GiB may be needed below {folder}, and {free / 2**30:.1f} GiB are free; nothing was written"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one backup at a time write into a folder."""
    with open(os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadSettings(f"another backup writes into {folder} now; wait for its end") from None
        yield
