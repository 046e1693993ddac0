"""Who was learned from: the frozen corpora of all model versions, and of all runs that have frozen one.

In: pseudonyms. Out: which corpora name one of them. What cannot be read counts as naming everybody: a patient too few in the
locked set is a pity, one too many there is a wrong answer. What this machine does not see must never count as naming nobody.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from models.errors import OsteonError
from models.registry import Registry
from node.errors import NotMergeable
from node.keep.catalogue import Catalogue

_NOT_VISIBLE = (
    "{} is not visible here, so that this machine cannot tell who was learned from: do it on a machine that sees runs/ and "
    "models/ of this site, as a user who may read them"
)


def naming(catalogue: Catalogue, root: Path, pids: Collection[str]) -> str:
    """Say in words which frozen corpora below the storage root name one of these pseudonyms, "" when none does.

    Raises
    ------
    NotMergeable
        The catalogue knows of runs or models that this machine does not see.
    """
    _require_visible(catalogue, root)
    found = [*_versions(root, frozenset(pids)), *_runs(root, frozenset(pids))]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _require_visible(catalogue: Catalogue, root: Path) -> None:
    """Make sure that the folders here are the site's: empty ones are made on every machine.

    The folder of a run that ended may have been removed by hand: who was learned from stands in its model, and a run that is
    continued holds its lists against the locked set again.
    """
    runs = [run for run in catalogue.runs.list() if run.folder]
    models = {run.model_id for run in runs} | set(catalogue.results.models())
    if (models - {""}) and not _names(root / "models" / "versions"):
        raise NotMergeable(_NOT_VISIBLE.format("models/"))
    if runs and _names(root / "runs") is None:
        raise NotMergeable(_NOT_VISIBLE.format("runs/"))
    under_way = {run.id for run in catalogue.runs.open()}
    for run in runs:
        folder = root / "runs" / run.folder
        if _names(folder) is None and (run.id in under_way or folder.exists()):
            raise NotMergeable(_NOT_VISIBLE.format(f"runs/{run.folder}"))


def _names(folder: Path) -> list[str] | None:
    """Name what is in a folder, None when it is not there or may not be read."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return None


def _versions(root: Path, pids: frozenset[str]) -> Iterator[str]:
    registry = Registry(root / "models")
    for version in registry.versions():
        try:
            if not pids.isdisjoint(registry.corpus(version)):
                yield f"the corpus of {version}"
        except (OsteonError, OSError):
            yield f"the corpus of {version} (damaged: it may name anybody)"


def _runs(root: Path, pids: frozenset[str]) -> Iterator[str]:
    for run in _names(root / "runs") or []:
        for file in sorted((root / "runs" / run).glob("*corpus*.json")):
            try:
                if not pids.isdisjoint(_texts(json.loads(file.read_bytes()))):
                    yield f"the corpus of run {run}"
            except (ValueError, OSError):
                yield f"the corpus of run {run} (damaged: it may name anybody)"


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
