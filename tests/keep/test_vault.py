from __future__ import annotations

import base64
import json
import logging
import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import MetaData, update

from models.errors import Final, Tampered
from node import settings
from node.errors import BadKey, IdentityConflict, NotFound
from node.keep import vault as vault_module
from node.keep.database import Database
from node.keep.records import Identity, RawElement
from node.keep.vault import Remembered, Vault
from node.receive.intake import Intake

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
CHARACTER_SET, NAME, PATIENT_ID, BIRTH_DATE, SEX, DESCRIPTION = (
    0x00080005,
    0x00100010,
    0x00100020,
    0x00100030,
    0x00100040,
    0x00081030,
)


def identity(
    *,
    study: int = 1,
    instance: int = 1,
    pid: str = "OST-AAAAAAAAAAAAAAAA",
    name: bytes = b"SECRET^NAME",
    birth_date: str = "20130501",
    sex: str = "F",
    character_set: bytes = b"ISO_IR 100",
    description: bytes = b"Lower leg",
) -> Identity:
    """Make the identity of one instance."""
    return Identity(
        pid=pid,
        study_uid=f"2.25.{study}",
        series_uid=f"2.25.{study}1",
        sop_uid=f"2.25.{study}1{instance}",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.1.1",
        original_study_uid=f"1.2.276.{study}",
        original_series_uid=f"1.2.276.{study}.1",
        original_sop_uid=f"1.2.276.{study}.1.{instance}",
        character_set=RawElement(CHARACTER_SET, "CS", character_set),
        patient=(
            RawElement(NAME, "PN", name),
            RawElement(PATIENT_ID, "LO", b"12345 "),
            RawElement(BIRTH_DATE, "DA", birth_date.encode()),
            RawElement(SEX, "CS", sex.encode()),
        ),
        study=(RawElement(DESCRIPTION, "LO", description),),
        birth_date=birth_date,
        sex=sex,
    )


@pytest.fixture
def url(database_url: str) -> str:
    return database_url


@pytest.fixture
def file_url(file: Path) -> str:
    return f"sqlite:///{file}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "vault" / "vault.db"


def test_what_was_remembered_comes_back_to_the_byte(url: str) -> None:
    first = identity(name="Müller^Zoë ".encode("latin-1"))
    with Vault.open(url, KEY) as vault:
        assert vault.remember(first, now=NOW) is Remembered.NEW
        assert vault.remember(identity(instance=2, name="Müller^Zoë ".encode("latin-1")), now=NOW) is Remembered.NEW
        assert vault.remember(first, now=NOW) is Remembered.KNOWN
    with Vault.open(url, KEY) as vault:
        study = vault.study("2.25.1")
        assert (study.patient, study.study, study.character_set) == (first.patient, first.study, first.character_set)
        assert (study.pid, study.original_study_uid) == (first.pid, "1.2.276.1")
        assert [one.original_sop_uid for one in vault.instances("2.25.1")] == ["1.2.276.1.1.1", "1.2.276.1.1.2"]
        assert vault.instances("2.25.1")[0] == first
        assert vault.instances("2.25.9") == []
        with pytest.raises(NotFound):
            vault.study("2.25.9")


def test_nothing_of_an_identity_is_in_the_files_in_clear(file_url: str, file: Path) -> None:
    vault = Vault.open(file_url, KEY)
    vault.remember(identity(), now=NOW)
    vault.remember(identity(name=b"NEXT^NAME"), now=NOW)
    everything = b"".join(path.read_bytes() for path in file.parent.iterdir())
    vault.close()
    everything += file.read_bytes()
    for secret in (
        b"SECRET",
        b"NEXT",
        b"12345",
        b"20130501",
        b"Lower leg",
        b"1.2.276",
        json.dumps("SECRET").encode(),
        b"SECRET".hex().encode(),
    ):
        assert secret not in everything


def test_only_the_owner_can_read_the_vault(file_url: str, file: Path) -> None:
    with Vault.open(file_url, KEY) as vault:
        vault.remember(identity(), now=NOW)
        assert {stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()} == {0o600}
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_another_key_is_refused_at_the_door_and_nothing_is_written(file_url: str, file: Path) -> None:
    with Vault.open(file_url, KEY) as vault:
        vault.remember(identity(), now=NOW)
    before = _rows(file)
    with pytest.raises(BadKey, match="not the key that sealed this vault"):
        Vault.open(file_url, OTHER)
    assert _rows(file) == before


def test_another_site_key_is_refused(file_url: str, file: Path) -> None:
    with Vault.open(file_url, KEY) as vault:
        vault.check_site("fingerprint of the site key")
        vault.check_site("fingerprint of the site key")
        before = _rows(file)
        with pytest.raises(BadKey, match="site key"):
            vault.check_site("fingerprint of another")
        assert _rows(file) == before


def test_a_node_whose_site_key_was_replaced_does_not_start(site: Path) -> None:
    """It would give every patient a second pseudonym, and nobody would notice."""
    Intake.open(settings.load(site)).close()
    key = Path(settings.load(site).storage.site_key)
    key.write_bytes(base64.b64encode(OTHER))
    with pytest.raises(BadKey, match="site key"):
        Intake.open(settings.load(site))


@pytest.mark.parametrize(
    "newcomer",
    [
        identity(instance=2, pid="OST-BBBBBBBBBBBBBBBB"),
        identity(instance=2, birth_date="19500101", sex="M"),
    ],
    ids=["another patient id", "another birth date and sex"],
)
def test_two_patients_in_one_study_are_a_conflict_and_nothing_is_written(file_url: str, file: Path, newcomer: Identity) -> None:
    with Vault.open(file_url, KEY) as vault:
        vault.remember(identity(), now=NOW)
        before = _rows(file)
        with pytest.raises(IdentityConflict) as told:
            vault.remember(newcomer, now=NOW)
        assert _rows(file) == before
    assert "SECRET" not in str(told.value)


@pytest.mark.parametrize(
    ("change", "keyword"),
    [
        ({"name": b"Married^Name"}, "PatientName"),
        ({"birth_date": "20130502"}, "PatientBirthDate"),
        ({"sex": "M"}, "PatientSex"),
    ],
)
def test_corrected_demographics_replace_the_earlier_ones_and_are_logged(
    url: str, caplog: pytest.LogCaptureFixture, change: dict[str, str], keyword: str
) -> None:
    corrected = identity(**change)  # type: ignore[arg-type]
    with Vault.open(url, KEY) as vault, caplog.at_level(logging.INFO, "osteon.vault"):
        vault.remember(identity(), now=NOW)
        assert vault.remember(corrected, now=NOW) is Remembered.CORRECTED
        assert vault.study("2.25.1").patient == corrected.patient
        assert vault.remember(corrected, now=NOW) is Remembered.KNOWN
        assert vault.instances("2.25.1") == [corrected]
    assert [record.osteon_fields["changed"] for record in caplog.records] == [keyword]  # type: ignore[attr-defined]
    # not the whole record: digits of its time and thread are anybody's
    told = "".join(record.getMessage() + str(record.osteon_fields) for record in caplog.records)  # type: ignore[attr-defined]
    assert not any(secret in told for secret in ("SECRET", "Married", "201305", "12345"))


def test_a_later_image_does_not_change_what_the_study_is_called(url: str) -> None:
    with Vault.open(url, KEY) as vault:
        vault.remember(identity(), now=NOW)
        assert vault.remember(identity(instance=2, description=b"Something else"), now=NOW) is Remembered.NEW
        assert vault.study("2.25.1").study == identity().study


def test_padding_and_missing_values_correct_nothing(url: str) -> None:
    padded, poorer = identity(name=b"SECRET^NAME "), identity(birth_date="", sex="")
    with Vault.open(url, KEY) as vault:
        vault.remember(identity(), now=NOW)
        assert vault.remember(padded, now=NOW) is Remembered.KNOWN
        assert vault.remember(poorer, now=NOW) is Remembered.KNOWN
        assert vault.remember(replace(poorer, patient=poorer.patient[:2]), now=NOW) is Remembered.KNOWN
        assert vault.study("2.25.1").patient == identity().patient


def test_a_correction_in_another_character_set_leaves_nothing_that_cannot_be_read(url: str) -> None:
    """One study identity is in one character set: what only the old one can spell is taken from the newcomer."""
    latin = identity(name="Müller^Zoë".encode("latin-1"), description="Füße".encode("latin-1"))
    utf8 = identity(name="Müller^Zoë".encode(), description="Füße".encode(), character_set=b"ISO_IR 192")
    with Vault.open(url, KEY) as vault:
        vault.remember(latin, now=NOW)
        assert vault.remember(utf8, now=NOW) is Remembered.CORRECTED
        study = vault.study("2.25.1")
        assert (study.character_set, study.patient, study.study) == (utf8.character_set, utf8.patient, utf8.study)
        without = replace(latin, study=())
        vault.remember(without, now=NOW)
        assert vault.study("2.25.1").study == ()


def test_a_row_moved_under_another_study_is_found(file_url: str, file: Path) -> None:
    with Vault.open(file_url, KEY) as vault:
        vault.remember(identity(), now=NOW)
        vault.remember(identity(study=2, pid="OST-BBBBBBBBBBBBBBBB"), now=NOW)
    connection = sqlite3.connect(file)
    other = "SELECT sealed FROM vault_studies WHERE study_uid = '2.25.2'"
    connection.execute(f"UPDATE vault_studies SET sealed = ({other}) WHERE study_uid = '2.25.1'")  # noqa: S608
    connection.commit()
    connection.close()
    with Vault.open(file_url, KEY) as vault, pytest.raises(Tampered):
        vault.study("2.25.1")


def test_a_vault_of_a_newer_version_is_left_alone(url: str) -> None:
    Vault.open(url, KEY).close()
    with closing(Database.open(url, MetaData())) as database:
        newer = vault_module.META.c.name == vault_module.SHAPE
        changed = update(vault_module.META).where(newer).values(sealed=b"2")
        assert database.write(lambda connection: connection.execute(changed).rowcount) == 1
    with pytest.raises(Final, match="newer version of Osteon"):
        Vault.open(url, KEY)


def test_of_two_patients_that_come_at_once_one_gets_the_study(url: str) -> None:
    """The decision and the write are one transaction, whatever comes in between."""

    def attempt(vault: Vault, pid: str, study: int, together: threading.Barrier) -> str:
        together.wait()
        try:
            return vault.remember(identity(study=study, pid=pid), now=NOW)
        except IdentityConflict:
            return "conflict"

    with Vault.open(url, KEY) as one, Vault.open(url, KEY) as two, ThreadPoolExecutor() as pool:
        for study in range(1, 6):
            together = threading.Barrier(2)
            first = pool.submit(attempt, one, "OST-AAAAAAAAAAAAAAAA", study, together)
            second = pool.submit(attempt, two, "OST-BBBBBBBBBBBBBBBB", study, together)
            assert {first.result(), second.result()} == {Remembered.NEW, "conflict"}


def _rows(file: Path) -> list[object]:
    connection = sqlite3.connect(file)
    try:
        return [
            row
            for table in ("vault_meta", "vault_studies", "vault_instances")
            for row in connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()  # noqa: S608
        ]
    finally:
        connection.close()
