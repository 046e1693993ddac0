"""Where tests find what is no part of the project: shared data and system programs. What is missing is a skip with its reason."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("OSTEON_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def data(name: str) -> Path:
    """Give the folder `name` of the shared data, or skip the test."""
    folder = FOLDER / "data" / name
    if not folder.is_dir():
        pytest.skip(f"shared/data/{name} is not here")
    return folder


def tool(name: str) -> str:
    """Give the path of the program `name` (on the PATH, in the sbin folders or beside this Python), or skip the test."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", str(Path(sys.executable).parent)])
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found
