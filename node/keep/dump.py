"""A database as one portable file: written from one state of it, read back into any database that Osteon knows.

In: a database and its tables. Out: gzip of JSON lines, the same for SQLite and PostgreSQL, so that a set made on one is restored
on the other. Values are written as they stand (times as microseconds, sealed bytes as base64): nothing here opens what is sealed.

The first line says the revision of the tables, then each table has a line with its name and columns, and a line a row.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import (
    BigInteger,
    Connection,
    LargeBinary,
    MetaData,
    Table,
    TableClause,
    column,
    func,
    insert,
    inspect,
    select,
    table,
    text,
)

from models import durable
from models.errors import Tampered
from node.keep.database import REVISION, Database, UTCTime, migrate

Row = dict[str, Any]
CHUNK = 500
"""Rows of one insert."""


def write(database: Database, tables: MetaData, path: Path, *, mode: int = 0o600) -> dict[str, int]:
    """Write every table as it stands at one moment, durably, and give the number of rows of each."""
    counts: dict[str, int] = {}

    def fill(file: BinaryIO) -> None:
        with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=5, mtime=0) as out, database.read() as connection:
            if connection.dialect.name == "postgresql":  # each statement would see a state of its own
                connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
            _take_your_time(connection)
            out.write(_line({"revision": _revision(connection)}))
            for each in tables.sorted_tables:
                counts[each.name] = _write_table(connection, each, out)

    durable.write_with(path, fill, mode=mode)
    return counts


def rows(path: Path, name: str) -> Iterator[Row]:
    """Read the rows of one table from a dump."""
    for told, found in _tables(path):
        if told["table"] == name:
            yield from found


def revision(path: Path) -> str:
    """Say of which revision the tables of a dump are; "" when they have none.

    Raises
    ------
    Tampered
        It is no dump.
    """
    first = next(read_lines(path, path.name), None)
    if not isinstance(first, dict) or "revision" not in first:
        raise Tampered(f"{path.name} is no dump of a database; take another set")
    return str(first["revision"])


def load(connection: Connection, path: Path, tables: MetaData, migrations: Path | None = None) -> None:
    """Put a dump in the place of whatever these tables hold, and bring it to the newest revision; all within one transaction.

    Parameters
    ----------
    migrations
        Folder of the Alembic environment that makes the revision of the dump and leads on; None: the tables are made as `tables`.

    Raises
    ------
    Tampered
        It is no dump.
    Final
        A newer Osteon wrote it.
    """
    _take_your_time(connection)
    tables.drop_all(connection)
    if migrations is None:
        tables.create_all(connection)
    else:
        REVISION.drop(connection, checkfirst=True)
        migrate(connection, migrations, revision=revision(path))
    for told, found in _tables(path):
        target = _bare(told["table"], {name: LargeBinary() if name in told["bytes"] else None for name in told["columns"]})
        while chunk := list(islice(found, CHUNK)):
            connection.execute(insert(target), chunk)
        if told["counter"] and connection.dialect.name == "postgresql":
            _set_counter(connection, target, told["counter"])
    if migrations is not None:
        migrate(connection, migrations)


def count(database: Database, table_: Table) -> int:
    """Count the rows of a table; 0 when there is no such table."""
    with database.read() as connection:
        if not inspect(connection).has_table(table_.name):
            return 0
        return connection.scalar(select(func.count()).select_from(table_)) or 0


def size(database: Database) -> int:
    """Give the bytes that the database takes, so that room can be looked for before a dump is begun."""
    with database.read() as connection:
        if connection.dialect.name == "postgresql":
            return int(connection.scalar(text("SELECT pg_database_size(current_database())")) or 0)
        pages, page = (connection.scalar(text(f"PRAGMA {name}")) or 0 for name in ("page_count", "page_size"))
        return int(pages) * int(page)


def _take_your_time(connection: Connection) -> None:
    """Let a transaction over large tables take as long as it takes."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))


def _write_table(connection: Connection, each: Table, out: gzip.GzipFile) -> int:
    # times as they stand: no type of ours is needed to read them back
    raw = _bare(each.name, {one.name: BigInteger() if isinstance(one.type, UTCTime) else one.type for one in each.columns})
    counter = each.autoincrement_column
    told = {
        "table": each.name,
        "columns": [one.name for one in each.columns],
        "bytes": [one.name for one in each.columns if isinstance(one.type, LargeBinary)],
        "counter": counter.name if counter is not None else "",
    }
    out.write(_line(told))
    # parents before children, also within a table that refers to itself
    query = select(raw).order_by(*(raw.c[one.name] for one in each.primary_key))
    number = 0
    for row in connection.execution_options(yield_per=CHUNK).execute(query):
        out.write(_line([base64.b64encode(value).decode() if isinstance(value, bytes) else value for value in row]))
        number += 1
    return number


def _bare(name: str, columns: Mapping[str, Any]) -> TableClause:
    return table(name, *(column(each, kind) for each, kind in columns.items()))


def _tables(path: Path) -> Iterator[tuple[dict[str, Any], Iterator[Row]]]:
    """Give each table's line with its rows; they are to be read before the next table is asked for, or are passed over."""
    lines = read_lines(path, path.name)
    next(lines, None)
    pending: list[dict[str, Any]] = [told for told in islice(lines, 1) if isinstance(told, dict)]

    def found(told: dict[str, Any]) -> Iterator[Row]:
        for line in lines:
            if isinstance(line, dict):
                pending.append(line)
                return
            row = dict(zip(told["columns"], line, strict=True))
            yield row | {name: base64.b64decode(row[name]) for name in told["bytes"] if row[name] is not None}

    while pending:
        told = pending.pop()
        its = found(told)
        yield told, its
        for _passed_over in its:
            pass


def read_lines(path: Path, name: str) -> Iterator[Any]:
    """Give what stands in a file of compressed lines.

    Raises
    ------
    Tampered
        It is damaged; the message begins with `name`.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (EOFError, gzip.BadGzipFile, ValueError):
        raise Tampered(f"{name} is damaged; take another set") from None


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _revision(connection: Connection) -> str:
    if not inspect(connection).has_table(REVISION.name):
        return ""
    return str(connection.scalar(select(REVISION.c.version_num)) or "")


def _set_counter(connection: Connection, target: TableClause, name: str) -> None:
    """Let PostgreSQL's counter go on after the highest number that was put in by hand."""
    highest = connection.scalar(select(func.max(target.c[name])))
    if highest is not None:
        connection.execute(select(func.setval(func.pg_get_serial_sequence(f'"{target.name}"', name), highest)))
