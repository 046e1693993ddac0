"""One thread writes, all who wait share a commit, and nobody pays for another's mistake."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import Column, Connection, Integer, MetaData, Table, event, func, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError

from models.errors import Final
from node.errors import BadSettings, NoSpace, StoreBusy
from node.keep import database as database_module
from node.keep.catalogue import Catalogue
from node.keep.catalogue.schema import HEAD, MIGRATIONS
from node.keep.catalogue.schema import metadata as catalogue_tables
from node.keep.database import Database, UTCTime, has_rows, insert_if_absent, put_row

metadata = MetaData()
thing = Table("thing", metadata, Column("id", Integer, primary_key=True), Column("value", Integer), Column("at", UTCTime))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database.open(database_url, metadata)
    yield opened
    opened.close()


def add(number: int, *, then: Callable[[], object] = lambda: None) -> Callable[[Connection], int]:
    def work(connection: Connection) -> int:
        connection.execute(insert(thing).values(id=number))
        then()
        return number

    return work


def ids(database: Database) -> list[int]:
    with database.read() as connection:
        return list(connection.scalars(select(thing.c.id).order_by(thing.c.id)))


class Crowd:
    """Threads that write at once: all of them wait behind one write that holds the writer, so they meet in one group."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.outcomes: dict[int, object] = {}

    def run(self, works: dict[int, Callable[[Connection], object]]) -> dict[int, object]:
        inside, go = threading.Event(), threading.Event()

        def first(_connection: Connection) -> None:
            inside.set()
            assert go.wait(10)

        def one(number: int) -> None:
            try:
                self.outcomes[number] = self.database.write(works[number])
            except Exception as error:
                self.outcomes[number] = error

        blocker = threading.Thread(target=self.database.write, args=(first,))
        blocker.start()
        assert inside.wait(10)
        threads = [threading.Thread(target=one, args=(number,)) for number in works]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while self.database._writer._waiting.qsize() < len(works):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        go.set()
        for thread in [blocker, *threads]:
            thread.join(10)
        return self.outcomes


def commits_of(database: Database) -> list[int]:
    """Count, from now on, the commits; each entry is the number of rows there were before it."""
    seen: list[int] = []
    event.listen(database._writer._engine, "commit", lambda _connection: seen.append(1))
    return seen


def test_writes_that_wait_share_one_commit(database: Database) -> None:
    commits = commits_of(database)
    outcomes = Crowd(database).run({number: add(number) for number in range(20)})
    assert outcomes == {number: number for number in range(20)}
    assert ids(database) == list(range(20))
    assert len(commits) == 2, "one of the write that held the thread, one of all the others"


def test_an_error_in_one_write_harms_no_other(database: Database) -> None:
    database.write(add(3))

    def wrong() -> None:
        raise ZeroDivisionError

    works: dict[int, Callable[[Connection], object]] = {number: add(number) for number in range(8)}
    works[5] = add(50, then=wrong)  # writes a row first, which must go with it; 3 collides with the row that is there
    outcomes = Crowd(database).run(works)
    assert isinstance(outcomes.pop(3), IntegrityError)
    assert isinstance(outcomes.pop(5), ZeroDivisionError)
    assert outcomes == {number: number for number in (0, 1, 2, 4, 6, 7)}
    assert ids(database) == [0, 1, 2, 3, 4, 6, 7]


def test_nobody_is_told_of_success_before_the_commit(database: Database) -> None:
    told: list[int] = []
    at_commit: list[int] = []
    event.listen(database._writer._engine, "commit", lambda _connection: at_commit.append(len(told)))
    threads = [threading.Thread(target=lambda number=number: told.append(database.write(add(number)))) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert at_commit[0] == 0
    assert sorted(told) == list(range(10))


def test_a_commit_that_fails_fails_every_write_of_the_group(database: Database) -> None:
    def lost(_connection: Connection) -> None:
        raise DBAPIError("COMMIT", None, _sqlite_error(sqlite3.SQLITE_FULL))

    event.listen(database._writer._engine, "commit", lost)
    outcomes: list[object] = []

    def one(number: int) -> None:
        with pytest.raises(NoSpace) as caught:
            database.write(add(number))
        outcomes.append(caught.value)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    event.remove(database._writer._engine, "commit", lost)
    assert len(outcomes) == 4
    assert ids(database) == []
    assert database.write(add(1)) == 1


def test_a_disk_that_is_full_is_said_and_what_was_there_stays(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path}/small.db", metadata)
    database.write(add(1))

    def limit(connection: Connection) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 3")

    def fill(connection: Connection) -> None:
        connection.execute(insert(thing), [{"id": number} for number in range(2, 5000)])

    database.write(limit)
    outcomes = Crowd(database).run({0: fill, 10000: add(10000)})
    assert isinstance(outcomes[0], NoSpace)
    # SQLite undoes the whole transaction then: the neighbour is told so too, unless its own came in the next one
    assert outcomes[10000] == 10000 or isinstance(outcomes[10000], NoSpace)
    assert ids(database) == ([1, 10000] if outcomes[10000] == 10000 else [1])
    assert database.write(add(2)) == 2, "what fits still goes in"
    database.close()


def test_a_database_locked_by_another_process_is_busy_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "BUSY_S", 0.05)
    database = Database.open(f"sqlite:///{tmp_path}/shared.db", metadata)
    other = sqlite3.connect(tmp_path / "shared.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreBusy):
        database.write(add(1))
    assert ids(database) == [], "reading goes on meanwhile"
    other.execute("COMMIT")
    assert database.write(add(1)) == 1
    other.close()
    database.close()


def test_reading_sees_what_was_committed_and_changes_nothing(database: Database) -> None:
    database.write(add(1))
    with database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(thing)) == 1
        database.write(add(2))
        assert connection.scalar(select(func.count()).select_from(thing)) == 1, "one look sees one state"
    assert ids(database) == [1, 2]
    with pytest.raises((DBAPIError, StoreBusy), match=r"readonly|no writes"), database.read() as connection:
        connection.execute(insert(thing).values(id=3))
    assert ids(database) == [1, 2]


def test_a_write_inside_a_write_is_refused_instead_of_hanging(database: Database) -> None:
    with pytest.raises(RuntimeError, match="inside a write"):
        database.write(lambda _connection: database.write(add(1)))


def test_a_closed_database_says_so(database: Database) -> None:
    database.write(add(1))
    database.close()
    database.close()
    with pytest.raises(StoreBusy, match="closed"):
        database.write(add(2))


def test_closing_finishes_what_waits(database_url: str) -> None:
    database = Database.open(database_url, metadata)
    told: list[int] = []
    threads = [threading.Thread(target=lambda number=number: told.append(database.write(add(number)))) for number in range(12)]
    inside, go = threading.Event(), threading.Event()

    def first(_connection: Connection) -> None:
        inside.set()
        assert go.wait(10)

    blocker = threading.Thread(target=database.write, args=(first,))
    blocker.start()
    assert inside.wait(10)
    for thread in threads:
        thread.start()
    while database._writer._waiting.qsize() < len(threads):
        time.sleep(0.001)
    closing = threading.Thread(target=database.close)
    closing.start()
    go.set()
    for thread in [blocker, *threads, closing]:
        thread.join(10)
    assert sorted(told) == list(range(12))
    again = Database.open(database_url, metadata)
    assert ids(again) == list(range(12))
    again.close()


def test_sqlite_keeps_its_promises_on_every_connection(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path}/new/folder/one.db", metadata)

    def pragmas(connection: Connection) -> dict[str, object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names}

    assert database.write(pragmas) == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10000}
    database.write(add(1))
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new" / "folder").iterdir()}
    assert files == dict.fromkeys(["one.db", "one.db-wal", "one.db-shm"], 0o600)
    assert stat.S_IMODE((tmp_path / "new" / "folder").stat().st_mode) == 0o700
    database.close()


def test_each_commit_of_sqlite_reaches_the_disk(tmp_path: Path) -> None:
    """`synchronous=FULL` syncs the WAL at each commit: strace counts the fsyncs of a process that writes five times."""
    program = (
        "import sys\n"
        "from sqlalchemy import *\n"
        "from node.keep.database import Database\n"
        "metadata = MetaData(); thing = Table('thing', metadata, Column('id', Integer, primary_key=True))\n"
        f"database = Database.open('sqlite:///{tmp_path}/one.db', metadata)\n"
        "for number in range(5):\n"
        "    sys.stderr.write(f'before {number}\\n'); sys.stderr.flush()\n"
        "    database.write(lambda connection: connection.execute(insert(thing).values(id=number)).rowcount)\n"
        "sys.stderr.write('before 5\\n')\n"
    )
    if not any(os.access(f"{folder}/strace", os.X_OK) for folder in os.environ["PATH"].split(":")):
        pytest.skip("strace is not installed: it shows the fsyncs of SQLite")
    command = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync,write", "-s", "16", sys.executable, "-c", program]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if told.returncode != 0 and "ptrace" in told.stderr:
        pytest.skip("strace may not trace here")
    parts = told.stderr.split('"before ')
    assert len(parts) == 7, told.stderr[-2000:]
    assert all("sync(" in part and "one.db-wal" in part for part in parts[1:6])


def test_two_processes_that_make_one_catalogue_do_not_disturb_each_other(database_url: str) -> None:
    program = f"from node.keep.catalogue import Catalogue\nCatalogue.open({database_url!r}).close()\n"
    processes = [subprocess.Popen([sys.executable, "-W", "error", "-c", program]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    with Catalogue.open(database_url) as catalogue:
        assert catalogue.instances.count() == 0


def test_a_second_look_at_a_file_takes_no_lock_from_the_first(tmp_path: Path) -> None:
    """Closing any descriptor of a file drops every lock of the process on it (fcntl(2)).

    Another process that then closes its last connection would take itself for the last of all and remove the log under us: what
    was committed into it would be gone.
    """
    file = tmp_path / "things.db"
    url = f"sqlite:///{file}"
    first = Database.open(url, metadata)
    first.write(add(1))
    Database.open(url, metadata).close()
    has_rows(url, thing)
    assert _counted_by_another_process(file) == 1
    first.write(add(2))
    assert _counted_by_another_process(file) == 2
    first.close()


def _counted_by_another_process(file: Path) -> int:
    code = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute('SELECT count(*) FROM thing').fetchone())"
    return int(subprocess.run([sys.executable, "-c", code, str(file)], check=True, capture_output=True, text=True).stdout)


def test_the_migrations_make_what_the_schema_says(database_url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]
    with Catalogue.open(database_url) as catalogue, catalogue.database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), catalogue_tables) == []


def test_alembic_is_not_imported_when_there_is_nothing_to_migrate(database_url: str) -> None:
    Catalogue.open(database_url).close()
    program = (
        "import sys\nfrom node.keep.catalogue import Catalogue\n"
        f"with Catalogue.open({database_url!r}) as catalogue:\n    catalogue.studies.by_state()\n"
        "assert not {'alembic', 'torch', 'mako'} & set(sys.modules), sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)


def test_a_database_of_a_newer_version_is_left_alone(database_url: str) -> None:
    with Catalogue.open(database_url) as catalogue:
        catalogue.database.write(
            lambda connection: connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'").rowcount
        )
    with pytest.raises(Final, match="newer version of Osteon"):
        Catalogue.open(database_url)


@pytest.mark.parametrize("url", ["nonsense", "sqlite://", "sqlite:///:memory:", "mysql+pymysql://host/name"])
def test_a_url_that_names_no_database_of_ours_is_refused(url: str) -> None:
    with pytest.raises(BadSettings, match="sqlite:///FILE"):
        Database.open(url, metadata)


def test_times_come_back_exact_and_in_utc(database: Database) -> None:
    times = [
        datetime(2026, 2, 28, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(2026, 3, 1, 1, 0, 0, 1, tzinfo=timezone(timedelta(hours=2))),
        datetime(1969, 12, 31, tzinfo=UTC),
    ]
    for number, at in enumerate(times):
        database.write(
            lambda connection, number=number, at=at: connection.execute(insert(thing).values(id=number, at=at)).rowcount
        )
    with database.read() as connection:
        found = list(connection.scalars(select(thing.c.at).order_by(thing.c.at)))
        before = connection.scalar(select(func.count()).where(thing.c.at < times[0]))
    assert found == sorted(times)
    assert {at.tzinfo for at in found} == {UTC}
    assert before == 2
    with pytest.raises(StatementError, match="without a zone"):
        database.write(lambda connection: connection.execute(insert(thing).values(id=9, at=datetime(2026, 1, 1))).rowcount)  # noqa: DTZ001


def test_a_row_is_inserted_once_and_replaced_by_its_key(database: Database) -> None:
    assert database.write(lambda connection: insert_if_absent(connection, thing, id=1, value=1))
    assert not database.write(lambda connection: insert_if_absent(connection, thing, id=1, value=2))
    database.write(lambda connection: put_row(connection, thing, id=1, value=3))
    database.write(lambda connection: put_row(connection, thing, id=2, value=4))
    with database.read() as connection:
        assert connection.execute(select(thing.c.id, thing.c.value).order_by(thing.c.id)).all() == [(1, 3), (2, 4)]


def _sqlite_error(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = code
    return error
