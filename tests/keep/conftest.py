"""A fresh, empty database for each test of the stores: SQLite always, PostgreSQL too where `OSTEON_TEST_POSTGRES` names a server.

The variable is a URL that may create databases, for example `postgresql+psycopg://osteon@127.0.0.1:5432/postgres`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url

SERVER = os.environ.get("OSTEON_TEST_POSTGRES", "")


@pytest.fixture(params=["sqlite", *(["postgresql"] if SERVER else [])])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Give the URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/stores/catalogue.db"
        return
    name = f"osteon_{secrets.token_hex(6)}"
    server = create_engine(SERVER, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield make_url(SERVER).set(database=name).render_as_string(hide_password=False)
    finally:
        with server.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        server.dispose()


@pytest.fixture(scope="session")
def empty_catalogue(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Give the file of an empty SQLite catalogue, so that not every test migrates its own."""
    from node.keep.catalogue import Catalogue

    file = tmp_path_factory.mktemp("empty") / "catalogue.db"
    Catalogue.open(f"sqlite:///{file}").close()
    return file.read_bytes()


@pytest.fixture
def catalogue_url(database_url: str, empty_catalogue: bytes) -> str:
    """Give the URL of an empty catalogue."""
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(mode=0o700)
        Path(url.database).write_bytes(empty_catalogue)
    return database_url
