"""One database: an engine for reading, and one thread that commits all waiting writes together.

In: a URL (SQLite, or PostgreSQL where several hosts share it), tables, functions on a connection. Out: what those functions
return, after the COMMIT is through. A write must never be reported before it is durable, and one caller's error must never
touch another's write. No SQL about Osteon's things stands here: that is the catalogue's and the vault's.

Processes that use it are started afresh, never forked.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    cast,
    column,
    create_engine,
    event,
    exists,
    func,
    make_url,
    select,
    table,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from models import durable
from models.errors import Final, Retriable
from node.errors import BadSettings, NoSpace, NotPermitted, StoreBusy
from node.settings import load_url

T = TypeVar("T")

BUSY_S = 10.0
"""How long a write waits for another process before it is `StoreBusy`."""
STATEMENT_S = 60.0
"""How long a PostgreSQL server works on one statement, or waits inside a transaction for a process that does not go on."""
GROUP_MAX = 256
"""Writes of one commit at most."""
ALONE_MAX = 3
"""How often a write that met another host's in a deadlock is tried again by itself before it is `StoreBusy`."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
REVISION = Table("alembic_version", MetaData(), Column("version_num", String(32), primary_key=True))
"""Alembic's own table; read without importing Alembic."""
_MIGRATION_LOCK = 0x05E0
"""Key of PostgreSQL's advisory lock under which one process at a time migrates."""


class UTCTime(TypeDecorator[datetime]):
    """An aware datetime in UTC, stored as microseconds since 1970: exact, and compared alike by every database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Turn an aware datetime into microseconds; a naive one is a mistake of the caller."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone")
        return (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        """Turn microseconds into an aware datetime."""
        return None if value is None else _EPOCH + value * _MICROSECOND


def one_at_a_time(connection: Connection, key: int) -> None:
    """Let no other transaction that asks with this key go on before this one is over: what is read next stays true in it.

    SQLite has one writer anyway; on PostgreSQL it is an advisory lock, and the next statement sees what was committed before it.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({key})")


def insert_if_absent(connection: Connection, into: Table, **values: Any) -> bool:
    """Insert a row unless one with the same key is there; say whether it was inserted."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    entry = dialect.insert(into).values(values).on_conflict_do_nothing().returning(*into.primary_key)
    return connection.execute(entry).one_or_none() is not None


def put_row(connection: Connection, into: Table, **values: Any) -> None:
    """Insert a row, or replace what stands under its primary key."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    keys = [key.name for key in into.primary_key]
    rest = {name: value for name, value in values.items() if name not in keys}
    connection.execute(dialect.insert(into).values(values).on_conflict_do_update(index_elements=keys, set_=rest))


@dataclass(frozen=True)
class Server:
    """What a PostgreSQL server says of itself."""

    database: tuple[str, str]
    """The start of the server and the name of the database: two URLs that give the same mean one database."""
    settings: Mapping[str, str]
    """Those of `SERVER_SETTINGS`, as they count for this connection."""
    is_standby: bool
    """It follows another server and takes no writes."""
    is_in_clear: bool
    """The connection leaves this machine without TLS."""
    now: datetime
    """Its clock."""


SERVER_SETTINGS = ("fsync", "full_page_writes", "server_encoding")
_ASK_SERVER = select(
    cast(func.pg_postmaster_start_time(), Text),
    func.current_database(),
    func.clock_timestamp(),
    func.pg_is_in_recovery(),
    func.inet_server_addr().is_distinct_from(func.inet_client_addr()),
    select(column("ssl")).select_from(table("pg_stat_ssl")).where(column("pid") == func.pg_backend_pid()).scalar_subquery(),
    *(func.current_setting(name) for name in SERVER_SETTINGS),
)


def has_rows(url: str, *tables: Table) -> bool:
    """Say whether any of these tables is there and has a row. Nothing is made, migrated or changed by the look.

    Raises
    ------
    BadSettings, StoreBusy
        As `Database.open`.
    """
    file = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not (file.is_file() and file.stat().st_size):
        return False
    engine = _engine(url, for_writing=False)
    try:
        with engine.connect() as connection:
            return any(
                connection.dialect.has_table(connection, table.name)
                and connection.execute(select(table.primary_key.columns.values()[0]).limit(1)).first() is not None
                for table in tables
            )
    except (DBAPIError, PoolTimeout) as error:
        raise _told(error) from error
    finally:
        engine.dispose()


class Database:
    """A database of this machine or this site; safe to use from any thread of the process that opened it."""

    def __init__(self, readers: Engine, writer: Engine) -> None:
        self._readers = readers
        self._writer = Writer(writer)

    @classmethod
    def open(cls, url: str, metadata: MetaData, *, migrations: Path | None = None, head: str = "") -> Database:
        """Open the database, make it when it is not there, and bring its tables up to date.

        Parameters
        ----------
        metadata
            The tables. They are made as they stand here when there are no `migrations`.
        migrations
            Folder of an Alembic environment that leads from any earlier state to `head`.
        head
            The revision that this code expects; Alembic is imported only when the database has another.

        Raises
        ------
        BadSettings
            The URL names no database that Osteon knows, its driver is not installed, or the environment lacks it.
        StoreBusy, NoSpace
            It cannot be opened now.
        NotPermitted
            Another release wrote it, and this database role may not migrate it.
        Final
            A newer Osteon wrote it.
        """
        database = cls(_engine(url, for_writing=False), _engine(url, for_writing=True))
        try:
            database._bring_up_to_date(metadata, migrations, head)
        except BaseException:
            database.close()
            raise
        return database

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish the writes that wait, then let go of every connection."""
        self._writer.close()
        self._readers.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Give a connection that sees one state of the database and cannot change it."""
        try:
            with self._readers.connect() as connection:
                yield connection
        except (DBAPIError, PoolTimeout) as error:
            raise _told(error) from error

    def server(self) -> Server | None:
        """Ask the server about itself; None where there is none (SQLite)."""
        with self.read() as connection:
            if connection.dialect.name != "postgresql":
                return None
            started, name, now, is_standby, is_away, is_sealed, *values = connection.execute(_ASK_SERVER).one()
        settings = dict(zip(SERVER_SETTINGS, values, strict=True))
        return Server((started, name), settings, is_standby, is_away and not is_sealed, now)

    def has(self, where: ColumnElement[bool]) -> bool:
        """Say whether any row meets `where`: the look before a write, so that an idle daemon does not sync twice a second."""
        with self.read() as connection:
            return bool(connection.scalar(select(exists().where(where))))

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction and return its value when that is committed.

        Several callers' work shares one COMMIT; each runs in a savepoint, so that its error undoes its own changes alone and is
        raised to it alone. `work` may run in another thread and must do nothing but use its connection.

        Raises
        ------
        StoreBusy
            Another process kept the database for longer than `BUSY_S`, or it cannot be reached.
        NoSpace
            The disk is full.
        """
        return self._writer.write(work)

    def _bring_up_to_date(self, metadata: MetaData, migrations: Path | None, head: str) -> None:
        """Make or migrate the tables unless they are as this code expects; one process does it, the others wait."""

        def is_current(connection: Connection) -> bool:
            if migrations is None:
                return all(connection.dialect.has_table(connection, name) for name in metadata.tables)
            return _is_at(connection, head)

        def bring(connection: Connection) -> None:
            one_at_a_time(connection, _MIGRATION_LOCK)
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")  # a large table takes the time it takes
            if is_current(connection):
                return
            if migrations is None:
                metadata.create_all(connection)
            else:
                migrate(connection, migrations)

        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                with self.read() as connection:
                    if is_current(connection):
                        return
                self.write(bring)
                return
            except NotPermitted as error:  # a role that reads and notes, as the trainer's
                raise NotPermitted(
                    "the database was left by another release of Osteon, or is empty, and this database role may not change its "
                    "tables: start any role of this release once as the owner of the database"
                ) from error
            except StoreBusy:  # two processes that turn one new file to WAL do not wait for each other by themselves
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


class Writer:
    """The one thread of this process that writes: it takes all work that waits and commits it together."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: SimpleQueue[_Work | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def write(self, work: Callable[[Connection], T]) -> T:
        """Hand `work` to the thread and wait until it is committed; see `Database.write`."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("a write inside a write: use the connection that was given")
        mine = _Work(work)
        with self._lock:  # nothing is put behind the mark of the end
            if self._closed:
                raise StoreBusy("the store is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="osteon-writer", daemon=True)
                self._thread.start()
            self._waiting.put(mine)
        value: T = mine.outcome.result()
        return value

    def close(self) -> None:
        """Commit what waits, then end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        if self._thread is not None:
            self._thread.join()
        self._engine.dispose()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            group, more = [first], True
            while more and len(group) < GROUP_MAX:
                try:
                    following = self._waiting.get_nowait()
                except Empty:
                    break
                if following is None:
                    self._waiting.put(None)  # the end comes after this group
                    break
                group.append(following)
            self._commit(group)

    def _commit(self, group: Sequence[_Work]) -> None:
        """Run the group in one transaction; tell each caller its own outcome after the COMMIT."""
        self._transact(group)
        for work in sorted(group, key=lambda one: one.collided):  # nobody else waits for those that are tried again
            for _attempt in range(ALONE_MAX):
                if work.collided:  # the server ended a deadlock at its cost; alone, it holds no lock of its neighbours'
                    self._transact([work])
            work.tell()

    def _transact(self, group: Sequence[_Work]) -> None:
        try:
            with self._engine.connect() as connection, connection.begin():
                for work in group:
                    work.attempt(connection)
        except Exception as error:
            # Not one caller's mistake: BEGIN, COMMIT or the way back to a savepoint failed, so nothing of the group is written.
            # SQLite undoes the whole transaction when the disk is full; then the savepoint is gone, and the cause is its work's.
            cause = next((work.error for work in group if isinstance(work.error, Retriable)), _told(error))
            for work in group:
                work.error = work.error or cause


class _Work:
    """One caller's write, and what became of it."""

    def __init__(self, run: Callable[[Connection], Any]) -> None:
        self.run = run
        self.value: Any = None
        self.error: Exception | None = None
        self.collided = False
        self.outcome: Future[Any] = Future()

    def attempt(self, connection: Connection) -> None:
        """Run inside a savepoint. What this raises has ended the whole transaction (a full disk, a lost connection)."""
        self.error, self.collided = None, False
        savepoint = connection.begin_nested()
        try:
            self.value = self.run(connection)
            savepoint.commit()
        except Exception as error:
            self.error, self.collided = _told(error), _sqlstate(error) in _COLLISIONS
            savepoint.rollback()

    def tell(self) -> None:
        """Wake the caller."""
        if self.error is not None:
            self.outcome.set_exception(self.error)
        else:
            self.outcome.set_result(self.value)


def _engine(place: str, *, for_writing: bool) -> Engine:
    """Make an engine for one kind of use; what a database promises is switched on for every connection."""
    try:
        url = make_url(load_url(place))
    except (ArgumentError, ValueError):  # neither may be shown: it repeats the URL
        raise BadSettings("a database URL must read sqlite:///FILE or postgresql://…") from None
    backend = url.get_backend_name()
    if backend == "postgresql":
        return _postgresql_engine(url, for_writing=for_writing)
    if backend != "sqlite" or not url.database or url.database == ":memory:":
        raise BadSettings("a database URL must read sqlite:///FILE or postgresql://…")
    return _sqlite_engine(url, Path(url.database), for_writing=for_writing)


def _sqlite_engine(url: URL, file: Path, *, for_writing: bool) -> Engine:
    _make_file(file)
    engine = create_engine(url, hide_parameters=True, connect_args={"timeout": BUSY_S})

    def on_connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself: `on_begin` does
        for pragma in (
            ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON")
            if for_writing
            else ("query_only = ON", "foreign_keys = ON")
        ):
            connection.execute(f"PRAGMA {pragma}")

    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if for_writing else "BEGIN")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    return engine


def _postgresql_engine(url: URL, *, for_writing: bool) -> Engine:
    """Connect through psycopg; what the URL says itself (sslmode, passfile, a longer timeout) goes to libpq as it stands."""
    # A server that vanishes without a word (no power, a firewall that forgets) is given up, instead of waited for for hours.
    patience = {
        "connect_timeout": round(BUSY_S),
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": round(1000 * 3 * BUSY_S),
        "application_name": "osteon",
    }
    try:
        engine = create_engine(
            url.set(drivername="postgresql+psycopg"),
            hide_parameters=True,
            pool_pre_ping=True,
            # Claims look again at a row that another host changed meanwhile (13.2.1); a look sees one state (13.2.2).
            isolation_level="READ COMMITTED" if for_writing else "REPEATABLE READ",
            connect_args={name: value for name, value in patience.items() if name not in url.query},
        )
    except ImportError:
        raise BadSettings(
            "a database of the settings is on PostgreSQL, and its driver is not installed: pip install 'osteon[postgres]'"
        ) from None
    session = {
        "lock_timeout": round(1000 * BUSY_S),
        "statement_timeout": round(1000 * STATEMENT_S),
        "idle_in_transaction_session_timeout": round(1000 * STATEMENT_S),
        # promise 1, whatever the server's default is: a COMMIT returns when it is on the disk
        **({"synchronous_commit": "on"} if for_writing else {"default_transaction_read_only": "on"}),
    }

    def on_connect(connection: Any, _record: object) -> None:
        connection.execute("; ".join(f"SET {name} = '{value}'" for name, value in session.items()))
        connection.commit()

    event.listen(engine, "connect", on_connect)
    return engine


def _make_file(file: Path) -> None:
    """Make the file readable by its owner alone, or shared as its folder is; so are -wal and -shm, by SQLite."""
    durable.make_folder(file.parent)
    durable.touch(file)


def _is_at(connection: Connection, head: str) -> bool:
    if not connection.dialect.has_table(connection, REVISION.name):
        return False
    return list(connection.scalars(select(REVISION.c.version_num))) == [head]


def migrate(connection: Connection, migrations: Path, *, revision: str = "head") -> None:
    """Run Alembic's upgrade to a revision, the newest unless told otherwise, in the transaction of `connection`."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, revision)
    except CommandError as error:
        raise Final("the database was written by a newer version of Osteon: install that version again") from error


def _told(error: Exception) -> Exception:
    """Turn what the driver says into an error of the tree where it may succeed later; anything else stays what it is."""
    if isinstance(error, PoolTimeout):
        return StoreBusy("every connection to the database is in use")
    if not isinstance(error, DBAPIError) or error.orig is None:
        return error
    if hasattr(error.orig, "sqlite_errorcode"):
        return _told_by_sqlite(error, error.orig.sqlite_errorcode & 0xFF)
    return _told_by_postgresql(error, _sqlstate(error))


def _told_by_sqlite(error: DBAPIError, code: int) -> Exception:
    if code == sqlite3.SQLITE_FULL:
        return NoSpace()
    return StoreBusy() if code in _PASSING else error


def _told_by_postgresql(error: DBAPIError, state: str | None) -> Exception:
    said = " ".join(str(error.orig).split())[:300]
    if state is None and isinstance(error, OperationalError):
        return StoreBusy(f"the database cannot be reached: {said}")  # libpq's words: host, port and role, never a password
    if state is None and error.statement is None:
        return BadSettings(f"the URL of a database is not understood: {said}")
    if state == "53100":
        return NoSpace()
    if state == "42501":
        return NotPermitted(f"the database role may not do this: {_primary(error)}")
    if state == "25006":
        return StoreBusy("the database takes no writes now; is the server a standby?")
    if error.connection_invalidated or str(state)[:2] in _PASSING_SQLSTATES:
        return StoreBusy()
    return error


def _primary(error: DBAPIError) -> str:
    """Give the first line of what the server said: it names the table, no value."""
    said: str = getattr(getattr(error.orig, "diag", None), "message_primary", None) or ""
    return said


_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}
_PASSING_SQLSTATES = {"08", "40", "53", "55", "57"}
"""Connection lost, serialisation or deadlock, out of resources, lock not available, shut down (PostgreSQL, appendix A)."""
_COLLISIONS = {"40001", "40P01"}
"""Serialisation failure, deadlock."""


def _sqlstate(error: Exception) -> str | None:
    return getattr(getattr(error, "orig", None), "sqlstate", None)
