"""Who a pseudonym is: the only place that can lead from a pseudonymous study back to a patient.

In: identities as they came. Out: the identity of a study, for its SR. Every value is sealed and bound to its row; in clear there
are pseudonymous UIDs and times alone. Nothing here may log an identity, let two patients share a study, or write a row under
another key than the one that sealed the vault.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydicom.datadict import keyword_for_tag
from sqlalchemy import Column, Connection, LargeBinary, MetaData, String, Table, select, update

from models.errors import Final
from node.errors import BadKey, IdentityConflict, NotFound
from node.keep.database import Database, Server, UTCTime, insert_if_absent
from node.keep.records import Identity, RawElement
from node.keep.records import StudyIdentity as StudyIdentity
from node.keep.seal import Seal
from node.logs import event

log = logging.getLogger("osteon.vault")

_METADATA = MetaData()
_META = Table(
    "vault_meta", _METADATA, Column("name", String(32), primary_key=True), Column("sealed", LargeBinary, nullable=False)
)
_SCHEMA = "schema"
"""The one row of `vault_meta` that is not sealed, for a change of key must not touch it: the shape of the tables, a number."""
SCHEMA = 1
"""The shape that this code reads and writes. Release 0.1.0 wrote none: it is 1. Code with a higher one migrates in `open`."""
_STUDIES = Table(
    "vault_studies",
    _METADATA,
    Column("study_uid", String(64), primary_key=True),
    Column("sealed", LargeBinary, nullable=False),
    Column("changed_at", UTCTime, nullable=False),
)
_INSTANCES = Table(
    "vault_instances",
    _METADATA,
    Column("study_uid", String(64), primary_key=True),
    Column("sop_uid", String(64), primary_key=True),
    Column("sealed", LargeBinary, nullable=False),
    Column("first_at", UTCTime, nullable=False),
)


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
        Final
            A newer version of Osteon wrote it.
        """
        vault = cls(Database.open(url, _METADATA), key)
        try:
            known = vault._schema()
            if known is not None and known > SCHEMA:
                raise Final("the vault was written by a newer version of Osteon: install that version again")
            vault._check("canary", "osteon", "this is not the key that sealed this vault ([storage] vault_key)")
            if known is None:
                row = {"name": _SCHEMA, "sealed": str(SCHEMA).encode()}
                vault._database.write(lambda connection: insert_if_absent(connection, _META, **row))
        except BaseException:
            vault.close()
            raise
        return vault

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
        self._check("site", fingerprint, "this is not the site key whose pseudonyms are in this vault ([storage] site_key)")

    def remember(self, identity: Identity, *, now: datetime) -> Remembered:
        """Keep who an instance is; durable on return.

        Corrected demographics (same patient identifier, another name, birth date or sex) replace the study's earlier ones.

        Raises
        ------
        IdentityConflict
            The study is another patient's: the patient identifiers differ, or birth date and sex both do. Nothing was written.
        """
        remembered, changed = self._database.write(lambda connection: self._remember(connection, identity, now))
        if changed:
            keywords = " ".join(keyword_for_tag(tag) for tag in changed)
            event(log, "identity corrected", study_uid=identity.study_uid, pid=identity.pid, changed=keywords)
        return remembered

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

    def instances(self, study_uid: str) -> list[Identity]:
        """Give the identity of every instance of a study, by pseudonymous UID; patient and study elements are the study's."""
        with self._database.read() as connection:
            known = self._known(connection, study_uid)
            query = select(_INSTANCES.c.sop_uid, _INSTANCES.c.sealed).where(_INSTANCES.c.study_uid == study_uid)
            rows = sorted(connection.execute(query).all(), key=lambda row: str(row.sop_uid))
        if known is None:
            return []
        opened = [(sop_uid, self._open(sealed, _instance_row(study_uid, sop_uid))) for sop_uid, sealed in rows]
        return [replace(known, sop_uid=sop_uid, **own) for sop_uid, own in opened]

    # --- within one transaction --------------------------------------------------------------------------------------------

    def _remember(self, connection: Connection, new: Identity, now: datetime) -> tuple[Remembered, Sequence[int]]:
        known = self._known(connection, new.study_uid, for_update=True)
        changed: Sequence[int] = ()
        if known is None:
            row = {"study_uid": new.study_uid, "sealed": self._sealed_study(new), "changed_at": now}
            if not insert_if_absent(connection, _STUDIES, **row):  # another receiver was faster (PostgreSQL)
                return self._remember(connection, new, now)
        else:
            if is_conflict(known, new):
                raise IdentityConflict
            corrected, changed = correct(known, new)
            if changed:
                where = _STUDIES.c.study_uid == new.study_uid
                connection.execute(update(_STUDIES).where(where).values(sealed=self._sealed_study(corrected), changed_at=now))
        own = {
            "series_uid": new.series_uid,
            "sop_class_uid": new.sop_class_uid,
            "original_series_uid": new.original_series_uid,
            "original_sop_uid": new.original_sop_uid,
        }
        sealed = self._sealed(own, _instance_row(new.study_uid, new.sop_uid))
        row = {"study_uid": new.study_uid, "sop_uid": new.sop_uid, "sealed": sealed, "first_at": now}
        is_new = insert_if_absent(connection, _INSTANCES, **row)
        return (Remembered.CORRECTED if changed else Remembered.NEW if is_new else Remembered.KNOWN), changed

    def _known(self, connection: Connection, study_uid: str, *, for_update: bool = False) -> Identity | None:
        """Give the study's identity, with no instance in it; `for_update`, no other receiver changes it before the commit."""
        query = select(_STUDIES.c.sealed).where(_STUDIES.c.study_uid == study_uid)
        sealed = connection.scalar(query.with_for_update() if for_update else query)
        if sealed is None:
            return None
        told = self._open(sealed, _study_row(study_uid))
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
        return self._sealed(told, _study_row(identity.study_uid))

    def _schema(self) -> int | None:
        """Give the shape of the tables; None in a new vault, and in one that release 0.1.0 wrote."""
        with self._database.read() as connection:
            told = connection.scalar(select(_META.c.sealed).where(_META.c.name == _SCHEMA))
        return None if told is None else int(told)

    def _check(self, name: str, value: str, complaint: str) -> None:
        """Keep `value` under `name` at the first call, complain if it is another later."""
        context = f"vault_meta:{name}"

        def work(connection: Connection) -> bytes:
            insert_if_absent(connection, _META, name=name, sealed=self._seal.seal(value.encode(), context))
            return bytes(connection.execute(select(_META.c.sealed).where(_META.c.name == name)).scalar_one())

        with self._database.read() as connection:
            sealed = connection.scalar(select(_META.c.sealed).where(_META.c.name == name))
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


def _study_row(study_uid: str) -> str:
    return f"vault_studies:{study_uid}"


def _instance_row(study_uid: str, sop_uid: str) -> str:
    return f"vault_instances:{study_uid}:{sop_uid}"
