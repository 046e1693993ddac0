"""Weights on the disk, whole or not at all; and beside them the batch that fits into the memory.

In: a module's state. Out: one file, written durably, read back without running any code that a file could hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from models import durable
from models.errors import Tampered


def save(state: Mapping[str, Any], file: Path) -> None:
    """Write `state` (tensors and plain values) to `file`; a kill leaves the old file or the new one."""
    buffer = BytesIO()
    torch.save(dict(state), buffer)
    durable.write(file, buffer.getvalue(), mode=0o600)


def load(file: Path) -> dict[str, Any]:
    """Read back what `save` wrote.

    Raises
    ------
    Tampered
        The file is damaged.
    """
    data = file.read_bytes()
    try:
        state: dict[str, Any] = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many kinds on a damaged file
        raise Tampered(
            f"{file.parent.name}/{file.name} of the run is damaged ({type(error).__name__}): start a new run"
        ) from None
    return state


def fitting(noted: Path, batch: int) -> int:
    """Give the batch that `halve` noted in this file, or `batch` where nothing was noted.

    Raises
    ------
    Tampered
        The file is damaged.
    """
    try:
        return int(json.loads(noted.read_bytes())["batch"]) if noted.is_file() else batch
    except (ValueError, KeyError, TypeError):
        raise Tampered(f"{noted.parent.name}/{noted.name} of the run is damaged: start a new run") from None


def halve(noted: Path, batch: int) -> int:
    """Note that `batch` did not fit into the memory, and give half of it."""
    told = {"batch": batch // 2, "because": f"a batch of {batch} did not fit into the memory"}
    durable.write(noted, json.dumps(told).encode(), mode=0o600)
    return batch // 2
