"""A PostgreSQL server of this machine's own programs, for the tests alone: on loopback, on a free port, in a folder of its own.

`cluster()` starts one for the length of a block; the fixture `postgresql` (tests/conftest.py) is one for a whole session. Where
PostgreSQL is not installed the test is skipped.
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from node.supervise import die_with_parent

OWNER = "postgres"
"""The superuser of the cluster; it needs no password, every other role does."""
READY_S = 60.0
QUICK = {"fsync": "off", "full_page_writes": "off"}
"""For tests that survive no power cut anyway: a commit then costs what it costs on a RAM disk."""


class Cluster:
    """One server, and the databases on it."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.port = _free_port()
        self._as = _unprivileged()
        self._settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(folder),
            "max_connections": "100",
            "shared_buffers": "32MB",
            "dynamic_shared_memory_type": "mmap",
            "autovacuum": "off",
        } | dict(settings)
        self._process: subprocess.Popen[bytes] | None = None
        self._templates: dict[str, str] = {}
        self._make()

    # --- the server --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the server; it answers on return. It ends with the process of the tests, however that ends."""
        options = [word for name, value in self._settings.items() for word in ("-c", f"{name}={value}")]
        log = open(self.folder / "log", "ab")  # noqa: SIM115 - the server's, closed here after it has it
        with log:
            self._process = subprocess.Popen(
                [_program("postgres"), "-D", str(self.data), *options],
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent(), **self._as,
            )  # fmt: skip
        deadline = monotonic() + READY_S
        while not self.answers():
            if self._process.poll() is not None or monotonic() > deadline:
                raise AssertionError(self.log()[-2000:])
            sleep(0.05)

    def stop(self, *, hard: bool = False) -> None:
        """Shut the server down: whoever is connected is disconnected; `hard`, as a crash does it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT if hard else signal.SIGINT)
            self._process.wait(60)
            self._process = None

    def switch_tls_on(self) -> bytes:
        """Give the server a certificate of its own and TLS; return the certificate."""
        certificate, key = self_signed("127.0.0.1")
        for name, data in (("server.crt", certificate), ("server.key", key)):
            (self.data / name).write_bytes(data)
            (self.data / name).chmod(0o600)
            if self._as:
                os.chown(self.data / name, self._as["user"], self._as["group"])
        self.sql("ALTER SYSTEM SET ssl = on", "SELECT pg_reload_conf()")
        deadline = monotonic() + READY_S
        while self.sql("SHOW ssl") != [("on",)]:
            assert monotonic() < deadline, "the server does not switch TLS on"
            sleep(0.05)
        return certificate

    def answers(self) -> bool:
        """Say whether the server takes connections."""
        import psycopg

        with suppress(psycopg.OperationalError):
            psycopg.connect(f"postgresql://{OWNER}@127.0.0.1:{self.port}/postgres", connect_timeout=5).close()
            return True
        return False

    def _make(self) -> None:
        self.data.mkdir(mode=0o700)
        for path in (self.folder, self.data):
            if self._as:
                os.chown(path, self._as["user"], self._as["group"])
        how = ["-U", OWNER, "-E", "UTF8", "--locale=C.UTF-8", *_collation(), "--auth=trust", "--no-sync"]
        told = subprocess.run(
            [_program("initdb"), "-D", str(self.data), *how],
            cwd=self.folder, capture_output=True, text=True, timeout=120, **self._as,
        )  # fmt: skip
        assert told.returncode == 0, told.stderr
        (self.data / "pg_hba.conf").write_text(
            f"host all {OWNER} 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\nlocal all {OWNER} trust\n"
        )

    # --- its databases -----------------------------------------------------------------------------------------------------

    def url(self, database: str = "postgres", *, user: str = OWNER) -> str:
        """Give the URL of a database as `[storage]` has it."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def sql(self, *statements: str, database: str = "postgres") -> list[Any]:
        """Run statements as the superuser, each committed by itself; give the rows of the last one."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def disconnect(self, database: str) -> int:
        """End every connection to a database, as an administrator or a firewall does; say how many there were."""
        import psycopg

        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            return len(connection.execute(query, [database]).fetchall())

    def deadlocks(self, database: str) -> int:
        """Count the deadlocks that the server had to end in a database."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            row = connection.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = %s", [database]).fetchone()
        return int(row[0]) if row else 0

    def create(self, *, template: str = "template1") -> str:
        """Make a database and give its name."""
        name = f"osteon_{secrets.token_hex(6)}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop(self, name: str) -> None:
        """Remove a database, also from under those who use it."""
        self.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def catalogue_template(self) -> str:
        """Give the name of a database with an empty catalogue in it, migrated once, to be copied."""
        from node.keep.catalogue import Catalogue

        if "catalogue" not in self._templates:
            name = self.create()
            Catalogue.open(self.url(name)).close()
            self._templates["catalogue"] = name
        return self._templates["catalogue"]

    def dump(self, database: str) -> str:
        """Give all that is in a database, as pg_dump writes it (bytes in hexadecimal)."""
        command = [_program("pg_dump"), "--inserts", self.url(database)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    def log(self) -> str:
        """Give what the server has logged."""
        return (self.folder / "log").read_text("utf-8", "replace")

    @contextmanager
    def database(self, *, template: str = "template1") -> Iterator[str]:
        """Give the URL of a database that is there for the length of a block."""
        name = self.create(template=template)
        try:
            yield self.url(name)
        finally:
            self.drop(name)

    def psql(self, *arguments: str, database: str = "postgres") -> str:
        """Run psql, as an administrator does."""
        command = [_program("psql"), "-X", "-v", "ON_ERROR_STOP=1", self.url(database), *arguments]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert told.returncode == 0, told.stderr
        return told.stdout


@contextmanager
def cluster(settings: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """Run a server for the length of a block: a quick one, or with the `settings` given and PostgreSQL's defaults else."""
    _program("initdb")
    folder = Path(tempfile.mkdtemp(prefix="osteon-postgresql-"))  # not tmp_path: its owner must be another than root
    server = Cluster(folder, QUICK if settings is None else settings)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def self_signed(address: str) -> tuple[bytes, bytes]:
    """Make a certificate of a day for an IP address, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    return certificate.public_bytes(pem), key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)


def _program(name: str) -> str:
    """Find a program of the newest PostgreSQL, which Debian keeps off the PATH, or skip the test."""
    places: Sequence[Path] = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda place: float(place.parent.name))
    path = os.pathsep.join([*(str(place) for place in reversed(places)), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip("postgresql is not installed here")
    return found


def _collation() -> Sequence[str]:
    """Choose an order of texts as far from Python's as a hospital's server may have it: dots and dashes count for nothing."""
    told = subprocess.run([_program("initdb"), "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    has_icu = int(re.findall(r"\d+", told)[0]) >= 15
    return ("--locale-provider=icu", "--icu-locale=en-US-u-ka-shifted") if has_icu else ()


def _unprivileged() -> dict[str, Any]:
    """Say as whom the server runs: it refuses root, so as `postgres` or `nobody` where the tests are root."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    pytest.skip("postgresql is not here: it does not run as root, and there is no user postgres or nobody")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
