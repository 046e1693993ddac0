"""What all tests share: a fresh site, free ports, and a last word on what was not tested because it is not installed."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from postgres import Cluster

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as training/__main__.py: torch's threads must not spin on a busy machine
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # as models/runtime.py: a test may be the first that imports ONNX Runtime


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Give a function that names a free TCP port on loopback."""

    def ask() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port: int = listener.getsockname()[1]
            return port

    return ask


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Give the ae_config.toml of a fresh site: a caller SENDER (answer) on loopback, any free port, no PACS."""
    from roles import UNWATCHED

    from node.commands.init import init_site

    callers = [{"ae_title": "SENDER", "networks": ["127.0.0.0/8", "::1/128"], "purpose": "answer"}]
    return init_site(tmp_path / "site", node={"port": 0, "callers": callers}, completion={"quiet_s": 0.2}, metrics=UNWATCHED)


@pytest.fixture(params=["sqlite", "postgresql"])
def either_site(request: pytest.FixtureRequest, site: Path) -> Iterator[Path]:
    """Give the same fresh site twice: with its stores in files, and on PostgreSQL."""
    if request.param == "sqlite":
        yield site
        return
    server: Cluster = request.getfixturevalue("postgresql")
    with server.database(template=server.catalogue_template()) as catalogue, server.database() as vault:
        text = site.read_text("utf-8")
        for name, url in (("catalogue", catalogue), ("vault", vault)):
            text = re.sub(rf'(?m)^{name} = ".*"$', f'{name} = "{url}"', text)
        site.write_text(text, "utf-8")
        yield site


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Cluster]:
    """Give a PostgreSQL server that the tests of this session (this worker) share; skip where it is not installed."""
    from postgres import cluster

    with cluster() as server:
        yield server


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List last what the skipped tests asked for, by the reasons of tests/shared.py: they come back from xdist's workers, too."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple)]
    gone = {found[1] for reason in reasons if (found := re.search(r"(\S+) is not (?:installed|here)", reason))}
    if gone:
        terminalreporter.write_sep("=", "not installed here, tests skipped: " + ", ".join(sorted(gone)))
