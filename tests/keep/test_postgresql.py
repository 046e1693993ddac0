"""What only a server can do to a store: lose connections, restart, let two hosts meet, refuse a role."""

from __future__ import annotations

import builtins
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from postgres import self_signed
from shelf import Desk
from sqlalchemy import Column, Connection, Integer, MetaData, Table, insert, select, update

from node.errors import BadSettings, StoreBusy
from node.keep import database as database_module
from node.keep.catalogue import Catalogue
from node.keep.database import Database

if TYPE_CHECKING:
    from postgres import Cluster

metadata = MetaData()
thing = Table("thing", metadata, Column("id", Integer, primary_key=True), Column("value", Integer))


@pytest.fixture
def url(postgresql: Cluster) -> Iterator[str]:
    with postgresql.database() as url:
        yield url


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with closing(Database.open(url, metadata)) as opened:
        yield opened


@pytest.fixture(scope="module")
def restartable() -> Iterator[Cluster]:
    """Give a server of this file alone, with PostgreSQL's own defaults."""
    from postgres import cluster

    with cluster({}) as server:
        yield server


def add(number: int) -> Callable[[Connection], int]:
    return lambda connection: connection.execute(insert(thing).values(id=number, value=0).returning(thing.c.id)).scalar_one()


def ids(database: Database) -> list[int]:
    with database.read() as connection:
        return list(connection.scalars(select(thing.c.id).order_by(thing.c.id)))


def name_of(url: str) -> str:
    return url.rsplit("/", 1)[1]


# --- connections ---------------------------------------------------------------------------------------------------------------


def test_idle_connections_that_are_killed_are_replaced_unnoticed(postgresql: Cluster, url: str, database: Database) -> None:
    database.write(add(1))
    assert ids(database) == [1]
    assert postgresql.disconnect(name_of(url)) == 2
    assert database.write(add(2)) == 2
    assert ids(database) == [1, 2]


def test_a_connection_lost_in_a_write_is_busy_and_nothing_of_it_is_kept(
    postgresql: Cluster, url: str, database: Database
) -> None:
    def cut(connection: Connection) -> None:
        add(1)(connection)
        postgresql.disconnect(name_of(url))
        add(2)(connection)

    with pytest.raises(StoreBusy):
        database.write(cut)
    assert ids(database) == []
    assert database.write(add(3)) == 3


def test_a_commit_that_was_cut_off_is_never_called_a_success(postgresql: Cluster, url: str, database: Database) -> None:
    def cut(connection: Connection) -> None:
        add(1)(connection)
        postgresql.disconnect(name_of(url))

    with pytest.raises(StoreBusy):
        database.write(cut)
    assert ids(database) == []


def test_stores_come_back_by_themselves_when_the_server_does(restartable: Cluster) -> None:
    with restartable.database() as url, closing(Database.open(url, metadata)) as database:
        database.write(add(1))
        for hard in (False, True):
            restartable.stop(hard=hard)
            with pytest.raises(StoreBusy, match="cannot be reached"):
                database.write(add(2))
            with pytest.raises(StoreBusy, match="cannot be reached"):
                ids(database)
            restartable.start()
            assert ids(database) == [1], "what was committed survived the server's crash"
        assert database.write(add(2)) == 2


def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "BUSY_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(StoreBusy, match="cannot be reached"):
        Database.open(f"postgresql://osteon@127.0.0.1:{silent.getsockname()[1]}/osteon", metadata)


def test_no_wait_for_another_host_is_endless(postgresql: Cluster, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    monkeypatch.setattr(database_module, "BUSY_S", 0.2)
    with closing(Database.open(url, metadata)) as database, psycopg.connect(url) as other:
        database.write(add(1))
        other.execute("UPDATE thing SET value = 5")
        began = time.monotonic()
        with pytest.raises(StoreBusy):
            database.write(lambda connection: connection.execute(update(thing).values(value=6)).rowcount)
        assert time.monotonic() - began < 5
        other.rollback()
        assert database.write(lambda connection: connection.execute(update(thing).values(value=6)).rowcount) == 1


def test_a_host_that_freezes_within_a_write_holds_nobody_for_ever(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "STATEMENT_S", 1.5)
    with closing(Database.open(url, metadata)) as frozen, closing(Database.open(url, metadata)) as other:
        frozen.write(add(1))
        inside, go = threading.Event(), threading.Event()
        outcome: list[Exception] = []

        def freeze(connection: Connection) -> None:
            connection.execute(update(thing).values(value=1))
            inside.set()
            assert go.wait(20)
            connection.execute(update(thing).values(value=2))

        def run() -> None:
            try:
                frozen.write(freeze)
            except StoreBusy as error:
                outcome.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert inside.wait(10)
        assert other.write(lambda connection: connection.execute(update(thing).values(value=3)).rowcount) == 1
        go.set()
        thread.join(20)
        assert len(outcome) == 1
        with other.read() as connection:
            assert connection.scalar(select(thing.c.value)) == 3


def test_a_commit_waits_for_the_disk_whatever_the_server_thinks(postgresql: Cluster, url: str) -> None:
    postgresql.sql(f"ALTER DATABASE {name_of(url)} SET synchronous_commit = off")
    with closing(Database.open(url, metadata)) as database:
        asked = database.write(lambda connection: connection.exec_driver_sql("SHOW synchronous_commit").scalar())
        assert asked == "on"


# --- two hosts meet ------------------------------------------------------------------------------------------------------------


def test_a_deadlock_of_two_hosts_ends_well_for_both(postgresql: Cluster, url: str) -> None:
    with closing(Database.open(url, metadata)) as one, closing(Database.open(url, metadata)) as other:
        one.write(add(1))
        one.write(add(2))
        both = threading.Barrier(2)
        outcomes: list[object] = []

        def crosswise(database: Database, *order: int) -> None:
            tried: list[int] = []

            def work(connection: Connection) -> None:
                tried.append(1)
                for at, number in enumerate(order):
                    connection.execute(update(thing).where(thing.c.id == number).values(value=thing.c.value + 1))
                    if at == 0 and len(tried) == 1:
                        both.wait(20)

            try:
                database.write(work)
                outcomes.append(len(tried))
            except Exception as error:
                outcomes.append(error)

        threads = [threading.Thread(target=crosswise, args=(one, 1, 2)), threading.Thread(target=crosswise, args=(other, 2, 1))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(map(str, outcomes)) == ["1", "2"], "one was the victim and was tried again"
        with one.read() as connection:
            assert list(connection.scalars(select(thing.c.value))) == [2, 2]


class Hosts:
    """Threads that each stand for a host with a catalogue of its own opened; an error of one is kept."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.stop = threading.Event()

    def start(self, work: Callable[[Desk], None]) -> threading.Thread:
        def run() -> None:
            try:
                with Catalogue.open(self.url) as catalogue:
                    work(Desk(catalogue))
            except BaseException as error:
                self.errors.append(error)

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()
        return self.threads[-1]

    def reply(self, desk: Desk) -> None:
        """Complete, claim, answer and send what there is, until told to stop; claims of others soon end for it."""
        while not self.stop.is_set():
            desk.later(hours=1)
            desk.complete()
            if claimed := desk.claim():
                with suppress(StoreBusy):  # as node.daemon does: tried again in the next step
                    desk.put(claimed.uid)
            desk.open()
            if delivery := desk.take():
                desk.send(delivery)


def test_two_receivers_and_two_repliers_on_the_same_studies_never_deadlock(postgresql: Cluster) -> None:
    """Images of the same few studies come to two hosts at once while two repliers complete, claim and answer them."""
    studies, images = [str(number) for number in range(1, 5)], 24

    def receive(desk: Desk) -> None:
        for number in range(1, images + 1):
            for study in studies:
                desk.image(study, number)

    with postgresql.database(template=postgresql.catalogue_template()) as url:
        hosts = Hosts(url)
        receivers = [hosts.start(receive) for _ in range(2)]
        for _ in range(2):
            hosts.start(hosts.reply)
        for receiver in receivers:
            receiver.join(120)
        hosts.stop.set()
        for thread in hosts.threads:
            thread.join(60)
        assert not hosts.errors, hosts.errors
        with Catalogue.open(url) as catalogue:
            assert catalogue.instances.count() == images * len(studies)
        assert postgresql.deadlocks(name_of(url)) == 0


# --- who may, and what is told -------------------------------------------------------------------------------------------------

PASSWORD = "Sesame-9d1f"


@pytest.fixture
def guarded_url(postgresql: Cluster, url: str) -> Iterator[str]:
    """Give the URL of a database whose owner needs a password, without the password."""
    name = name_of(url)
    postgresql.sql(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'", f"ALTER DATABASE {name} OWNER TO {name}")
    yield postgresql.url(name, user=name)
    postgresql.sql(f"ALTER DATABASE {name} OWNER TO postgres", database="postgres")
    postgresql.sql(f"DROP OWNED BY {name}", f"DROP ROLE {name}", database=name)


def test_a_password_comes_from_the_password_file(guarded_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pgpass"
    file.write_text(f"127.0.0.1:*:*:{name_of(guarded_url)}:{PASSWORD}\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))
    with closing(Database.open(guarded_url, metadata)) as database:
        assert database.write(add(1)) == 1


def test_a_whole_url_comes_from_the_environment(guarded_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTEON_CATALOGUE", guarded_url.replace("@", f":{PASSWORD}@"))
    with closing(Database.open("env:OSTEON_CATALOGUE", metadata)) as database:
        assert database.write(add(1)) == 1
    monkeypatch.delenv("OSTEON_CATALOGUE")
    with pytest.raises(BadSettings, match="OSTEON_CATALOGUE"):
        Database.open("env:OSTEON_CATALOGUE", metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.replace("@", ":wrong-Sesame@"),
        lambda url: url.replace("@", f":{PASSWORD}@") + "_is_not_there",
        lambda url: url.replace("@127.0.0.1", f":{PASSWORD}@127.0.0.2"),
        lambda url: url.replace("@", f":{PASSWORD}@") + "?sslmode=require",
        lambda url: url.replace("@", f":{PASSWORD}@") + "?sslmode=nonsense",
        lambda url: url.replace("@", f":{PASSWORD}@") + "?nonsense=1",
        lambda url: url.replace("@127.0.0.1:", f":{PASSWORD}@127.0.0.1:port"),
    ],
    ids=["wrong password", "no database", "no server", "no TLS", "bad sslmode", "unknown option", "no URL"],
)
def test_no_error_repeats_a_password(guarded_url: str, change: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "BUSY_S", 1.0)
    monkeypatch.setenv("OSTEON_CATALOGUE", change(guarded_url))
    with pytest.raises((StoreBusy, BadSettings)) as caught:
        Database.open("env:OSTEON_CATALOGUE", metadata)
    assert "Sesame" not in str(caught.value)


def test_a_connection_is_encrypted_and_the_server_verified_when_the_url_says_so(
    restartable: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "BUSY_S", 1.0)
    certificate = restartable.switch_tls_on()
    (tmp_path / "ca.pem").write_bytes(certificate)
    (tmp_path / "other.pem").write_bytes(self_signed("127.0.0.1")[0])
    with restartable.database() as url:
        with closing(Database.open(f"{url}?sslmode=verify-full&sslrootcert={tmp_path}/ca.pem", metadata)) as database:
            query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            assert database.write(lambda connection: connection.exec_driver_sql(query).scalar()) is True
        with pytest.raises(StoreBusy, match="certificate verify failed"):
            Database.open(f"{url}?sslmode=verify-full&sslrootcert={tmp_path}/other.pem&connect_timeout=2", metadata)


def test_a_missing_driver_is_said_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == "psycopg":
            raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadSettings, match=r"pip install 'osteon\[postgres\]'"):
        Database.open("postgresql://osteon@127.0.0.1/osteon", metadata)


def test_the_server_tells_what_a_check_asks(restartable: Cluster, postgresql: Cluster) -> None:
    with closing(Database.open(restartable.url(), metadata)) as database:
        safe = database.server()
        assert safe is not None
        assert dict(safe.settings) == {"fsync": "on", "full_page_writes": "on", "server_encoding": "UTF8"}
        assert (safe.is_standby, safe.is_in_clear) == (False, False)
    with (
        postgresql.database() as one,
        postgresql.database() as other,
        closing(Database.open(one, metadata)) as first,
        closing(Database.open(other, metadata)) as second,
    ):
        told, same, another = first.server(), first.server(), second.server()
        assert told is not None
        assert same is not None
        assert another is not None
        assert told.settings["fsync"] == "off"
        assert told.database == same.database != another.database


def test_sqlite_has_no_server(tmp_path: Path) -> None:
    with closing(Database.open(f"sqlite:///{tmp_path}/one.db", metadata)) as database:
        assert database.server() is None
