"""Weights on the disk, whole or not at all.

In: a module's state. Out: one file, written durably, read back without running any code that a file could hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from models import durable


def save(state: Mapping[str, Any], file: Path) -> None:
    """Write `state` (tensors and plain values) to `file`; a kill leaves the old file or the new one."""
    buffer = BytesIO()
    torch.save(dict(state), buffer)
    durable.write(file, buffer.getvalue(), mode=0o600)


def load(file: Path) -> dict[str, Any]:
    """Read back what `save` wrote."""
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state
