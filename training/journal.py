"""One line an epoch: `metrics.jsonl` and its like.

In: a file, lines as mappings. Out: what of them is whole. A kill or a power cut may tear a line; a torn one is no line, and must
never end whoever reads. Torch is not loaded here: verbs read journals, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models import durable


def read(file: Path) -> list[dict[str, Any]]:
    """Give the lines that are whole; none when there is no file."""
    lines = []
    for text in file.read_text(encoding="ascii", errors="replace").splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def write(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Put these lines in place of all there are."""
    durable.write(file, b"".join(map(_text, lines)), mode=0o600)


def note(file: Path, line: Mapping[str, Any]) -> None:
    """Add a line."""
    with open(file, "ab") as out:
        out.write(_text(line))


def _text(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode("ascii") + b"\n"
