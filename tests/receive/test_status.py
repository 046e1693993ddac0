"""What a peer is told: every error that reception can meet has a status, and none of them is a success or a warning."""

from __future__ import annotations

import errno
import inspect
import re
from pathlib import Path

import pytest

from models import errors as models_errors
from node import errors as node_errors
from node.receive import status

FOLDER = Path(node_errors.__file__).parent
RECEPTION = [
    *(FOLDER / "receive").glob("*.py"),
    *(FOLDER / "keep").rglob("*.py"),
    FOLDER / "settings.py",
    FOLDER / "errors.py",
]
"""The modules whose errors can reach the handler of a C-STORE."""
ELSEWHERE = {"NotFound", "NotReleasable", "NotToBeAnswered", "BadLabels", "NotEmpty", "NotMergeable", "WrongState", "NoDecoder"}
"""Raised there for the command line, the replier and the trainer alone."""


def leaves() -> set[type[BaseException]]:
    found = {
        kind
        for module in (models_errors, node_errors)
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, models_errors.OsteonError)
    }
    return {kind for kind in found if not set(kind.__subclasses__()) & found}


def raised() -> set[str]:
    """Name what the modules of reception raise."""
    return {name for file in RECEPTION for name in re.findall(r"raise (\w+)", file.read_text("utf-8"))}


def by_name(kinds: set[type[BaseException]]) -> list[type[BaseException]]:
    return sorted(kinds, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", by_name({kind for kind in leaves() if kind.__name__ in raised() - ELSEWHERE}))
def test_every_error_of_reception_stands_in_the_table(kind: type[BaseException]) -> None:
    assert kind in status.STATUS


@pytest.mark.parametrize("kind", by_name(leaves()))
def test_no_error_is_answered_with_a_success_or_a_warning(kind: type[BaseException]) -> None:
    code = status.status_of(kind())
    assert code != status.SUCCESS
    assert code not in (0x0001, 0x0107, 0x0116)
    assert not 0xB000 <= code <= 0xBFFF


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (node_errors.NoSpace(), 0xA700),
        (OSError(errno.ENOSPC, "full"), 0xA700),
        (MemoryError(), 0xA700),
        (node_errors.TooLarge(), 0xA700),
        (node_errors.NotAsAnnounced(), 0xA900),
        (node_errors.NotUnderstood(), 0xC000),
        (node_errors.Refused(), 0x0122),
        (ZeroDivisionError(), 0xC001),
    ],
)
def test_the_statuses_are_those_of_the_standard(error: BaseException, code: int) -> None:
    assert status.status_of(error) == code
