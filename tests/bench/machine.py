"""The machine that a benchmark ran on, in two lines: a figure without it says nothing."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from models.runtime import physical_cores


def machine(packages: Sequence[str]) -> str:
    """Name the processor, what else ran on it just now, and the versions of `packages`."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{_processor()}, {physical_cores()} physical cores, load {os.getloadavg()[0]:.1f} at the start\n"
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {versions}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
