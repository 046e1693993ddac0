"""Who a pseudonym is: the only place that can lead from a pseudonymous study back to a patient.

In: identities as they came. Out: the identity of a study, for its SR. Every value is sealed and bound to its row; in clear there
are pseudonymous UIDs and times alone. Nothing here may log an identity, let two patients share a study, or write a row under
another key than the one that sealed the vault.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydicom.datadict import keyword_for_tag
from sqlalchemy import Column, Connection, LargeBinary, MetaData, String, Table, and_, delete, func, or_, select, update

from models.errors import Final, Tampered
from node.errors import BadKey, IdentityConflict, NotFound, RotationUnfinished
from node.keep.database import Database, Server, UTCTime, has_rows, insert_if_absent
from node.keep.records import Identity, Person, RawElement
from node.keep.records import StudyIdentity as StudyIdentity
from node.keep.seal import Seal, key_id
from node.logs import event

log = logging.getLogger("osteon.vault")

METADATA = MetaData()
META = Table("vault_meta", METADATA, Column("name", String(32), primary_key=True), Column("sealed", LargeBinary, nullable=False))
SCHEMA = 1
"""The shape of the tables that this code reads and writes. Release 0.1.0 wrote none: it is 1. Code with a higher one migrates in
`open`."""
STUDIES = Table(
    "vault_studies",
    METADATA,
    Column("study_uid", String(64), primary_key=True),
    Column("sealed", LargeBinary, nullable=False),
    Column("changed_at", UTCTime, nullable=False),
)
INSTANCES = Table(
    "vault_instances",
    METADATA,
    Column("study_uid", String(64), primary_key=True),
    Column("sop_uid", String(64), primary_key=True),
    Column("sealed", LargeBinary, nullable=False),
    Column("first_at", UTCTime, nullable=False),
)


CANARY, SITE, ROTATION, SHAPE = "canary", "site", "rotation", "schema"
"""Rows of `META`: what only the vault's key opens; the site key's fingerprint; there while a rotation is under way; the number of
`SCHEMA`, in clear, for a change of key must not touch it."""
PAGE = 256
"""Rows read at once where all are gone through."""


@dataclass(frozen=True, slots=True)
class Looked:
    """One sealed row, as a look through the whole vault finds it."""

    study_uid: str
    sop_uid: str
    """Empty: the row is the study's own."""
    identity: Identity | None
    """Of an instance only its own UIDs are filled in; None: it does not open with this key, or is damaged."""


class Remembered(StrEnum):
    """What an identity was to the vault."""

    NEW = "new"
    """The instance was not known."""
    KNOWN = "known"
    """Nothing new."""
    CORRECTED = "corrected"
    """The demographics of the study's patient changed; the newest ones are kept."""


class Vault:
    """The sealed store of identities."""

    def __init__(self, database: Database, key: bytes) -> None:
        self._database = database
        self._seal = Seal(key)

    @classmethod
    def open(cls, url: str, key: bytes) -> Vault:
        """Open the vault at a database URL; a new one is made for `key`.

        Raises
        ------
        BadKey
            `key` is not the one that sealed this vault; nothing was written.
        RotationUnfinished
            It lies under two keys.
        Tampered
            What tells its key is gone while identities are there.
        Final
            A newer version of Osteon wrote it.
        """
        vault = cls(Database.open(url, METADATA), key)
        try:
            with vault._database.read() as connection:
                told = set(connection.scalars(select(META.c.name)))
                is_empty = connection.scalar(select(STUDIES.c.study_uid).limit(1)) is None
            if ROTATION in told:
                raise RotationUnfinished
            if CANARY not in told and not is_empty:
                raise Tampered("the vault holds identities but not the row that tells its key; restore it from a backup")
            known = vault._schema()
            if known is not None and known > SCHEMA:
                raise Final("the vault was written by a newer version of Osteon: install that version again")
            vault._check(
                CANARY,
                "osteon",
                "this is not the key that sealed this vault ([storage] vault_key): name the one that did, which after a change "
                "of the key is the new one",
            )
            if known is None:
                row = {"name": SHAPE, "sealed": str(SCHEMA).encode()}
                vault._database.write(lambda connection: insert_if_absent(connection, META, **row))
        except BaseException:
            vault.close()
            raise
        return vault

    @staticmethod
    def sealed_with(url: str) -> bytes | None:
        """Name the key of the vault at `url` by its id, None for one that is not there or empty; the look changes nothing."""
        if not has_rows(url, META):
            return None
        with Database.open(url, METADATA) as database, database.read() as connection:
            sealed = connection.scalar(select(META.c.sealed).where(META.c.name == CANARY))
        return None if sealed is None else key_id(bytes(sealed))

    @staticmethod
    def is_full(url: str) -> bool:
        """Say whether the vault at `url` knows anybody; the look makes and changes nothing."""
        return has_rows(url, STUDIES)

    def require_key(self) -> None:
        """Make sure that this process still holds the key of the vault: call it before anything else is sealed with it.

        Raises
        ------
        BadKey, RotationUnfinished
            The key was changed under this process, or is being changed.
        """
        with self._database.read() as connection:
            self._require_key(connection)

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    def __enter__(self) -> Vault:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def server(self) -> Server | None:
        """Ask the server of the vault about itself; None where there is none (SQLite)."""
        return self._database.server()

    def check_site(self, fingerprint: str) -> None:
        """Hold the site key against the one this vault was first used with: another would give other pseudonyms, silently.

        Parameters
        ----------
        fingerprint
            Any value derived from the site key one way.

        Raises
        ------
        BadKey
            It is another site key; nothing was written.
        """
        complaint = (
            "this is not the site key whose pseudonyms are in this vault ([storage] site_key); put the site's own key back: "
            "another one makes other pseudonyms"
        )
        self._check(SITE, fingerprint, complaint)

    def remember(self, identity: Identity, *, now: datetime, person: Person | None = None) -> Remembered:
        """Keep who an instance is; durable on return.

        Corrected demographics (same patient identifier, another name, birth date or sex) replace the study's earlier ones.

        Parameters
        ----------
        person
            The merged patients among whom `identity` is: a study of another of them is no other patient's, and becomes the
            surviving one's as soon as an image says so.

        Raises
        ------
        IdentityConflict
            The study is another patient's: the patient identifiers differ, or birth date and sex both do. Nothing was written.
        BadKey, RotationUnfinished
            The key of the vault was changed under this process. Nothing was written.
        """
        remembered, changed = self._database.write(lambda connection: self._remember(connection, identity, now, person))
        if changed:
            _tell(identity.study_uid, identity.pid, changed)
        return remembered

    def newest(self, study_uids: Sequence[str], *, pid: str) -> Identity | None:
        """Give the patient `pid` as the newest of these studies states it; None when none of them is this patient's."""
        with self._database.read() as connection:
            query = select(STUDIES.c.study_uid, STUDIES.c.sealed).where(STUDIES.c.study_uid.in_(study_uids))
            for row in connection.execute(query.order_by(STUDIES.c.changed_at.desc())):
                known = self._study_of(row.study_uid, bytes(row.sealed))
                if known.pid == pid:
                    return known
        return None

    def hand_over(self, study_uids: Sequence[str], to: Identity, *, now: datetime) -> list[str]:
        """Write the patient of `to` into studies; give those that changed by it. All of them or none."""

        def hand_over(connection: Connection) -> list[tuple[str, Sequence[int]]]:
            self._require_key(connection, for_update=True)
            changed = []
            for study_uid in study_uids:
                known = self._known(connection, study_uid, for_update=True)
                if known is not None and (corrected := handed_over(known, to)) != known:
                    changed.append((study_uid, self._replace(connection, known, corrected, now)))
            return changed

        changed = self._database.write(hand_over)
        for study_uid, tags in changed:
            _tell(study_uid, to.pid, tags)
        return [study_uid for study_uid, _tags in changed]

    def study(self, study_uid: str) -> StudyIdentity:
        """Say whose study it is.

        Raises
        ------
        NotFound
            The vault does not know the study.
        """
        with self._database.read() as connection:
            known = self._known(connection, study_uid)
        if known is None:
            raise NotFound(f"the vault knows no study {study_uid}")
        return StudyIdentity(
            pid=known.pid,
            study_uid=study_uid,
            original_study_uid=known.original_study_uid,
            character_set=known.character_set,
            patient=known.patient,
            study=known.study,
        )

    def knows(self, study_uid: str) -> bool:
        """Say whether the study has an identity here."""
        return self._database.has(STUDIES.c.study_uid == study_uid)

    def instances(self, study_uid: str) -> list[Identity]:
        """Give the identity of every instance of a study, by pseudonymous UID; patient and study elements are the study's."""
        with self._database.read() as connection:
            known = self._known(connection, study_uid)
            query = select(INSTANCES.c.sop_uid, INSTANCES.c.sealed).where(INSTANCES.c.study_uid == study_uid)
            rows = sorted(connection.execute(query).all(), key=lambda row: str(row.sop_uid))
        if known is None:
            return []
        opened = [(sop_uid, self._open(sealed, instance_row(study_uid, sop_uid))) for sop_uid, sealed in rows]
        return [replace(known, sop_uid=sop_uid, **own) for sop_uid, own in opened]

    # --- going through all of it -------------------------------------------------------------------------------------------

    def count(self) -> int:
        """Count the sealed rows."""
        with self._database.read() as connection:
            return sum(connection.scalar(select(func.count()).select_from(table)) or 0 for table in (STUDIES, INSTANCES))

    def rows(self) -> Iterator[Looked]:
        """Open every sealed row, the studies first; one that does not open is given all the same."""
        for table in (STUDIES, INSTANCES):
            for page in pages(self._database, table):
                for row in page:
                    yield self._looked(row.study_uid, getattr(row, "sop_uid", ""), bytes(row.sealed))

    def unknown(self, images: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Give those of these (study, image), by pseudonymous UIDs, whose identity is not here."""
        with self._database.read() as connection:
            query = select(INSTANCES.c.study_uid, INSTANCES.c.sop_uid)
            known = {
                (row.study_uid, row.sop_uid)
                for row in connection.execute(query.where(INSTANCES.c.study_uid.in_({study_uid for study_uid, _ in images})))
            }
        return [image for image in images if image not in known]

    def _looked(self, study_uid: str, sop_uid: str, sealed: bytes) -> Looked:
        try:
            if not sop_uid:
                return Looked(study_uid, sop_uid, self._study_of(study_uid, sealed))
            own = self._open(sealed, instance_row(study_uid, sop_uid))
        except (BadKey, Tampered, ValueError, KeyError):
            return Looked(study_uid, sop_uid, None)
        nothing = Identity(
            pid="",
            study_uid=study_uid,
            sop_uid=sop_uid,
            original_study_uid="",
            character_set=None,
            patient=(),
            study=(),
            birth_date="",
            sex="",
            **own,
        )
        return Looked(study_uid, sop_uid, nothing)

    def known(self, study_uid: str) -> frozenset[str]:
        """Name the instances of a study whose identity is here, by pseudonymous UID; nothing is opened."""
        query = select(INSTANCES.c.sop_uid).join_from(INSTANCES, STUDIES, STUDIES.c.study_uid == INSTANCES.c.study_uid)
        with self._database.read() as connection:
            return frozenset(connection.scalars(query.where(INSTANCES.c.study_uid == study_uid)))

    def forget(self, study_uid: str) -> None:
        """Remove who a study is; nothing leads back from its pseudonym any more but the site key."""

        def forget(connection: Connection) -> None:
            for table in (INSTANCES, STUDIES):
                connection.execute(delete(table).where(table.c.study_uid == study_uid))

        self._database.write(forget)

    # --- within one transaction --------------------------------------------------------------------------------------------

    def _require_key(self, connection: Connection, *, for_update: bool = False) -> None:
        """See that the vault is sealed with our key; `for_update`, it stays so until the commit: a rotation waits for us."""
        query = select(META.c.sealed).where(META.c.name == CANARY)
        sealed = connection.scalar(query.with_for_update(read=True) if for_update else query)
        if sealed is not None and key_id(bytes(sealed)) == self._seal.key_id:
            return
        if connection.scalar(select(META.c.name).where(META.c.name == ROTATION)):
            raise RotationUnfinished
        raise BadKey("the key of the vault was changed while this ran; put the new one into [storage] vault_key and start again")

    def _remember(
        self, connection: Connection, new: Identity, now: datetime, person: Person | None
    ) -> tuple[Remembered, Sequence[int]]:
        self._require_key(connection, for_update=True)
        known = self._known(connection, new.study_uid, for_update=True)
        changed: Sequence[int] = ()
        if known is None:
            row = {"study_uid": new.study_uid, "sealed": self._sealed_study(new), "changed_at": now}
            if not insert_if_absent(connection, STUDIES, **row):  # another receiver was faster (PostgreSQL)
                return self._remember(connection, new, now, person)
        elif known.pid != new.pid and person is not None and {known.pid, new.pid} <= person.pseudonyms:
            if new.pid == person.survivor:
                changed = self._replace(connection, known, handed_over(known, new), now)
        else:
            if is_conflict(known, new):
                raise IdentityConflict
            corrected, changed = correct(known, new)
            if changed:
                self._replace(connection, known, corrected, now)
        own = {
            "series_uid": new.series_uid,
            "sop_class_uid": new.sop_class_uid,
            "original_series_uid": new.original_series_uid,
            "original_sop_uid": new.original_sop_uid,
        }
        sealed = self._sealed(own, instance_row(new.study_uid, new.sop_uid))
        row = {"study_uid": new.study_uid, "sop_uid": new.sop_uid, "sealed": sealed, "first_at": now}
        is_new = insert_if_absent(connection, INSTANCES, **row)
        return (Remembered.CORRECTED if changed else Remembered.NEW if is_new else Remembered.KNOWN), changed

    def _known(self, connection: Connection, study_uid: str, *, for_update: bool = False) -> Identity | None:
        """Give the study's identity, with no instance in it; `for_update`, no other receiver changes it before the commit."""
        query = select(STUDIES.c.sealed).where(STUDIES.c.study_uid == study_uid)
        sealed = connection.scalar(query.with_for_update() if for_update else query)
        return None if sealed is None else self._study_of(study_uid, sealed)

    def _replace(self, connection: Connection, known: Identity, corrected: Identity, now: datetime) -> Sequence[int]:
        """Write the corrected identity of a study; give the tags in which it differs from the earlier one."""
        where = STUDIES.c.study_uid == known.study_uid
        connection.execute(update(STUDIES).where(where).values(sealed=self._sealed_study(corrected), changed_at=now))
        before, after = ({element.tag: _bare(element) for element in one.patient} for one in (known, corrected))
        return sorted(tag for tag in before | after if before.get(tag) != after.get(tag))

    def _study_of(self, study_uid: str, sealed: bytes) -> Identity:
        told = self._open(sealed, study_row(study_uid))
        (character_set, patient, study) = (_elements(told.pop(name)) for name in ("character_set", "patient", "study"))
        nobody = dict.fromkeys(("series_uid", "sop_uid", "sop_class_uid", "original_series_uid", "original_sop_uid"), "")
        return Identity(
            study_uid=study_uid,
            character_set=character_set[0] if character_set else None,
            patient=patient,
            study=study,
            **told,
            **nobody,
        )

    def _sealed_study(self, identity: Identity) -> bytes:
        told = {
            "pid": identity.pid,
            "original_study_uid": identity.original_study_uid,
            "character_set": _told([identity.character_set] if identity.character_set else []),
            "patient": _told(identity.patient),
            "study": _told(identity.study),
            "birth_date": identity.birth_date,
            "sex": identity.sex,
        }
        return self._sealed(told, study_row(identity.study_uid))

    def _schema(self) -> int | None:
        """Give the shape of the tables; None in a new vault, and in one that release 0.1.0 wrote."""
        with self._database.read() as connection:
            told = connection.scalar(select(META.c.sealed).where(META.c.name == SHAPE))
        return None if told is None else int(told)

    def _check(self, name: str, value: str, complaint: str) -> None:
        """Keep `value` under `name` at the first call, complain if it is another later."""
        context = meta_row(name)

        def work(connection: Connection) -> bytes:
            insert_if_absent(connection, META, name=name, sealed=self._seal.seal(value.encode(), context))
            return bytes(connection.execute(select(META.c.sealed).where(META.c.name == name)).scalar_one())

        with self._database.read() as connection:
            sealed = connection.scalar(select(META.c.sealed).where(META.c.name == name))
        sealed = sealed if sealed is not None else self._database.write(work)
        try:
            kept = self._seal.open(sealed, context)
        except BadKey:
            raise BadKey(complaint) from None
        if kept != value.encode():
            raise BadKey(complaint)

    def _sealed(self, value: object, context: str) -> bytes:
        return self._seal.seal(json.dumps(value, separators=(",", ":")).encode(), context)

    def _open(self, sealed: bytes, context: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._seal.open(sealed, context))
        return value


# --- pure: what is the same patient, and what is a correction --------------------------------------------------------------


def is_conflict(known: Identity, new: Identity) -> bool:
    """Say whether two instances of one study name two patients: what is empty disagrees with nothing."""
    birth_dates_differ = bool(known.birth_date and new.birth_date) and known.birth_date != new.birth_date
    sexes_differ = bool(known.sex and new.sex) and known.sex != new.sex
    return known.pid != new.pid or (birth_dates_differ and sexes_differ)


def correct(known: Identity, new: Identity) -> tuple[Identity, Sequence[int]]:
    """Bring the patient of `known` up to what `new` says; give the tags that changed, none when the two say the same.

    Padding is no change, and what `new` leaves out or empty takes nothing away. When the character set changes with the patient,
    an element that only the old one can spell is taken from `new`, or left out: one study identity is in one character set.
    """
    same_set = _terms(known) == _terms(new)
    before = {element.tag: element for element in known.patient}
    said = {element.tag: element for element in new.patient if _bare(element)}

    def is_news(tag: int, element: RawElement) -> bool:
        old = before.get(tag)
        return old is None or _bare(old) != _bare(element) or not (same_set or _is_plain(element))

    changed = [tag for tag, element in said.items() if is_news(tag, element)]
    if not changed:
        return known, ()
    study = known.study
    if not same_set:
        before = {tag: element for tag, element in before.items() if _is_plain(element)}
        news = {element.tag: element for element in new.study}
        study = tuple(news[e.tag] if e.tag in news and not _is_plain(e) else e for e in study if _is_plain(e) or e.tag in news)
    patient = tuple(element for _tag, element in sorted((before | said).items()))
    return replace(
        known,
        character_set=new.character_set,
        patient=patient,
        study=study,
        birth_date=new.birth_date or known.birth_date,
        sex=new.sex or known.sex,
    ), changed


def handed_over(known: Identity, to: Identity) -> Identity:
    """Give the study of `known` to the patient of `to`, whole: nothing of the earlier patient stays.

    Study elements that only the old character set can spell are taken from `to` where it is of this study, else left out.
    """
    study = known.study
    if _terms(known) != _terms(to):
        news = {element.tag: element for element in to.study} if to.study_uid == known.study_uid else {}
        study = tuple(e if _is_plain(e) else news[e.tag] for e in study if _is_plain(e) or e.tag in news)
    return replace(
        known,
        pid=to.pid,
        character_set=to.character_set,
        patient=to.patient,
        study=study,
        birth_date=to.birth_date,
        sex=to.sex,
    )


def _bare(element: RawElement) -> bytes:
    return element.value.strip(b" \0")


def _terms(identity: Identity) -> list[bytes]:
    value = identity.character_set.value if identity.character_set else b""
    return [term.strip(b" \0") for term in value.split(b"\\")]


def _is_plain(element: RawElement) -> bool:
    return element.value.isascii() and b"\x1b" not in element.value


def _told(elements: Sequence[RawElement]) -> list[list[object]]:
    return [[element.tag, element.vr, element.value.hex()] for element in elements]


def _elements(told: Sequence[Any]) -> tuple[RawElement, ...]:
    return tuple(RawElement(tag, vr, bytes.fromhex(value)) for tag, vr, value in told)


def _tell(study_uid: str, pid: str, changed: Sequence[int]) -> None:
    event(log, "identity corrected", study=study_uid, pid=pid, changed=" ".join(keyword_for_tag(tag) for tag in changed))


# --- the sealed rows -------------------------------------------------------------------------------------------------------


def study_row(study_uid: str) -> str:
    """Name the place of a study's row, to which its envelope is bound."""
    return f"vault_studies:{study_uid}"


def instance_row(study_uid: str, sop_uid: str) -> str:
    """Name the place of an instance's row."""
    return f"vault_instances:{study_uid}:{sop_uid}"


def meta_row(name: str) -> str:
    """Name the place of a row of `META`."""
    return f"vault_meta:{name}"


def pages(database: Database, table: Table) -> Iterator[Sequence[Any]]:
    """Go through a table of sealed rows by its key, a page at a time."""
    keys = list(table.primary_key)
    last: Sequence[str] = ()
    while True:
        query = select(*keys, table.c.sealed).order_by(*keys).limit(PAGE)
        if last:
            ahead = [
                and_(*(key == at for key, at in zip(keys[:n], last[:n], strict=True)), keys[n] > last[n])
                for n in range(len(keys))
            ]
            query = query.where(or_(*ahead))
        with database.read() as connection:
            page = connection.execute(query).all()
        if not page:
            return
        last = tuple(page[-1])[: len(keys)]
        yield page
