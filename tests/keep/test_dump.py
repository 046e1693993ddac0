"""A database as one portable file: exact, of one moment, and the same whatever database it came from or goes to."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from shelf import Desk, image
from sqlalchemy import MetaData, insert, select

from models.errors import Final, Tampered
from node.keep import dump
from node.keep.catalogue import Catalogue
from node.keep.catalogue.schema import HEAD, MIGRATIONS, metadata, study
from node.keep.database import Database, migrate
from node.keep.records import Label, Purpose, Role, Run, Worker
from node.keep.vault import METADATA

NOW = datetime(2026, 3, 1, 12, 0, 0, 1, tzinfo=UTC)


@pytest.fixture
def catalogue(catalogue_url: str) -> Iterator[Catalogue]:
    """Give a catalogue with something in every table."""
    with Catalogue.open(catalogue_url) as opened:
        desk = Desk(opened, NOW)
        desk.image("1")
        desk.answer("1")
        desk.image("1", 2)
        desk.answer("1")  # a result that names the one before
        desk.hold("2", detail="naïve – “quoted”\n")
        opened.labels.put_all([Label("OST-1", "1", "", "ewing", "reader", "2026-03-01", "histology")], now=NOW, by="it")
        opened.instances.dropped([("BodyPartExamined", "a" * 32)], NOW)
        begin(opened, "host cpu")
        opened.timings.see("nightly", "{}", zone="UTC", named=("nightly",), now=NOW)
        opened.roles.beat(Role("reply", "host", 1, NOW, {"model": "v1"}))
        opened.roles.set_flag("answers", "paused", by="it", reason="", now=NOW)
        yield opened


def begin(catalogue: Catalogue, devices: str) -> Run:
    until = NOW + timedelta(minutes=5)
    return catalogue.runs.start(
        kind="finetune", recipe="phantom", devices=devices, worker=Worker("host", 1, "boot 1"), now=NOW, until=until
    )


def plain(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Give what a dump says, table by table, in an order that no collation decides."""
    return {name: sorted(dump.rows(path, name), key=repr) for name in metadata.tables}


def loaded(url: str, path: Path, tables: MetaData = metadata, migrations: Path | None = MIGRATIONS) -> None:
    database = Database.open(url, MetaData())
    try:
        database.write(lambda connection: dump.load(connection, path, tables, migrations))
    finally:
        database.close()


def test_a_catalogue_comes_back_as_it_was_in_every_row(catalogue: Catalogue, database_url: str, tmp_path: Path) -> None:
    """From either database into either; counters go on where they stood."""
    first, second = tmp_path / "first.gz", tmp_path / "second.gz"
    counts = dump.write(catalogue.database, metadata, first)
    assert all(counts.values()), counts
    loaded(database_url, first)
    with Catalogue.open(database_url) as copy:
        assert dump.write(copy.database, metadata, second) == counts
        assert plain(second) == plain(first)
        assert copy.results.latest("1") == catalogue.results.latest("1")
        desk = Desk(copy, NOW)
        desk.image("3")
        new = desk.answer("3")
        assert new.id > max(row["id"] for row in plain(first)["result"])
        assert begin(copy, "host cuda").id == 2


def test_what_is_sealed_comes_back_byte_for_byte(database_url: str, tmp_path: Path) -> None:
    source = Database.open(f"sqlite:///{tmp_path}/source/vault.db", METADATA)
    sealed = bytes(range(256))
    studies = METADATA.tables["vault_studies"]
    source.write(lambda connection: connection.execute(insert(studies).values(study_uid="1", sealed=sealed, changed_at=NOW)))
    dump.write(source, METADATA, tmp_path / "vault.gz")
    source.close()
    loaded(database_url, tmp_path / "vault.gz", METADATA, None)
    target = Database.open(database_url, METADATA)
    with target.read() as connection:
        (row,) = connection.execute(select(studies)).all()
    target.close()
    assert (bytes(row.sealed), row.changed_at) == (sealed, NOW)


def test_a_dump_is_of_one_moment_while_others_write(catalogue: Catalogue, tmp_path: Path) -> None:
    """A patient and the study are written together, so a dump has as many of one kind as of the other."""
    stop = threading.Event()

    def receive() -> None:
        number = 100
        while not stop.is_set():
            pid, uid = f"OST-{number}", str(number)
            catalogue.instances.note(image(uid, pid=pid), purpose=Purpose.LEARN, calling_ae="PACS", locked=False, now=NOW)
            number += 1

    writer = threading.Thread(target=receive)
    writer.start()
    try:
        for number in range(5):
            path = tmp_path / f"{number}.gz"
            dump.write(catalogue.database, metadata, path)
            found = plain(path)
            patients, studies = ({row[key] for row in found[name]} for name, key in (("patient", "pid"), ("study", "pid")))
            assert {row["pid"] for row in found["instance"]} <= patients
            assert patients <= studies
    finally:
        stop.set()
        writer.join()


def test_a_dump_of_the_first_schema_is_migrated(database_url: str, tmp_path: Path) -> None:
    old = Database.open(f"sqlite:///{tmp_path}/old/catalogue.db", MetaData())
    old.write(lambda connection: migrate(connection, MIGRATIONS, revision="0001"))
    tables = MetaData()
    with old.read() as connection:
        tables.reflect(connection)
    tables.remove(tables.tables["alembic_version"])
    row = {"pid": "OST-1", "locked": True, "first_at": 1}
    old.write(lambda connection: connection.execute(insert(tables.tables["patient"]).values(row)))
    dump.write(old, tables, tmp_path / "old.gz")
    old.close()
    assert dump.revision(tmp_path / "old.gz") == "0001"
    loaded(database_url, tmp_path / "old.gz")
    with Catalogue.open(database_url) as catalogue:
        assert catalogue.instances.locked_patients() == {"OST-1"}
        dump.write(catalogue.database, metadata, tmp_path / "new.gz")
    assert dump.revision(tmp_path / "new.gz") == HEAD


def test_a_dump_of_a_newer_schema_is_refused_and_nothing_is_changed(catalogue: Catalogue, tmp_path: Path) -> None:
    path = tmp_path / "new.gz"
    dump.write(catalogue.database, metadata, path)
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.chmod(0o600)
    path.write_bytes(gzip.compress(b'{"revision":"9999"}\n' + b"".join(lines[1:])))
    with pytest.raises(Final, match="newer version"):
        catalogue.database.write(lambda connection: dump.load(connection, path, metadata, MIGRATIONS))
    assert catalogue.instances.find(image("1").sop_uid) is not None


def test_a_load_that_is_cut_short_leaves_what_was_there(catalogue: Catalogue, tmp_path: Path) -> None:
    path = tmp_path / "torn.gz"
    dump.write(catalogue.database, metadata, path)
    whole = gzip.decompress(path.read_bytes())
    path.chmod(0o600)
    path.write_bytes(gzip.compress(whole)[:-40])
    with pytest.raises(Tampered, match="damaged"):
        catalogue.database.write(lambda connection: dump.load(connection, path, metadata, MIGRATIONS))
    assert dump.count(catalogue.database, study) == 2
