"""Who was learned from: the frozen corpora of all model versions, and of all runs that have frozen one.

In: pseudonyms. Out: which corpora name one of them. What cannot be read counts as naming everybody: a patient too few in the
locked set is a pity, one too many there is a wrong answer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from models.errors import OsteonError
from models.registry import Registry


def naming(root: Path, pids: Collection[str]) -> str:
    """Say in words which frozen corpora below the storage root name one of these pseudonyms, "" when none does."""
    found = [*_versions(root, frozenset(pids)), *_runs(root, frozenset(pids))]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _versions(root: Path, pids: frozenset[str]) -> Iterator[str]:
    registry = Registry(root / "models")
    for version in registry.versions():
        try:
            if not pids.isdisjoint(registry.corpus(version)):
                yield f"the corpus of {version}"
        except (OsteonError, OSError):
            yield f"the corpus of {version} (damaged: it may name anybody)"


def _runs(root: Path, pids: frozenset[str]) -> Iterator[str]:
    for file in sorted((root / "runs").glob("*/*corpus*.json")):
        try:
            if not pids.isdisjoint(_texts(json.loads(file.read_bytes()))):
                yield f"the corpus of run {file.parent.name}"
        except (ValueError, OSError):
            yield f"the corpus of run {file.parent.name} (damaged: it may name anybody)"


def _texts(value: object) -> Iterator[str]:
    """Give every text in a frozen list but those of its part of locked patients, whom nothing was learned from."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key != "locked":
                yield from _texts(each)
