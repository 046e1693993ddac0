"""A real Orthanc for a test, or a skip where none is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from shared import tool

from node.demo.orthanc import Orthanc


@contextmanager
def running_orthanc(folder: Path, *, callers: Mapping[str, int], port: int = 0, ae_title: str = "ORTHANC") -> Iterator[Orthanc]:
    """Run Orthanc for the length of a block; `callers` are the AE titles it answers, with the port it reaches them at."""
    tool("Orthanc")
    with Orthanc(folder, callers=callers, port=port, ae_title=ae_title) as running:
        yield running
