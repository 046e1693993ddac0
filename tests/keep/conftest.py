"""A fresh, empty database for each test of the stores, on SQLite and on PostgreSQL: one suite, two databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from postgres import Cluster

BACKENDS = ("sqlite", "postgresql")


@pytest.fixture(params=BACKENDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Give the URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/stores/catalogue.db"
        return
    server: Cluster = request.getfixturevalue("postgresql")
    with server.database() as url:
        yield url


@pytest.fixture(scope="session")
def empty_catalogue(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Give the file of an empty SQLite catalogue, so that not every test migrates its own."""
    from node.keep.catalogue import Catalogue

    file = tmp_path_factory.mktemp("empty") / "catalogue.db"
    Catalogue.open(f"sqlite:///{file}").close()
    return file.read_bytes()


@pytest.fixture(params=BACKENDS)
def catalogue_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Give the URL of an empty catalogue."""
    if request.param == "sqlite":
        file = tmp_path / "stores" / "catalogue.db"
        file.parent.mkdir(mode=0o700)
        file.write_bytes(request.getfixturevalue("empty_catalogue"))
        yield f"sqlite:///{file}"
        return
    server: Cluster = request.getfixturevalue("postgresql")
    with server.database(template=server.catalogue_template()) as url:
        yield url
