"""docs/conformance.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from node import peer
from node.receive import status
from node.reply import report

PAGE = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Give the cells of the first table after a heading or a first column's title."""
    after = PAGE[PAGE.index(heading) :].splitlines()
    lines: list[str] = []
    for line in after:
        if line.startswith("|"):
            lines.append(line)
        elif lines:
            break
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_accepted_classes_are_those_of_the_code() -> None:
    told = {row[1]: row[2] for row in rows("| SOP class | UID |")}
    assert set(told) == set(map(str, peer.IMAGE_CLASSES + peer.RESULT_CLASSES))
    assert {uid for uid, fate in told.items() if fate == "archive"} == set(map(str, peer.ARCHIVED_CLASSES))
    assert {uid for uid, fate in told.items() if fate == "quarantine"} == set(map(str, peer.QUARANTINED_CLASSES))


def test_the_transfer_syntaxes_stand_in_the_order_of_preference() -> None:
    assert [row[1] for row in rows("| transfer syntax | UID |")] == list(map(str, peer.IMAGE_SYNTAXES))


def test_every_status_is_explained() -> None:
    told = {int(row[0][:4], 16) for row in rows("### Statuses of C-STORE")}
    used = {value for name, value in vars(status).items() if name.isupper() and isinstance(value, int)}
    assert told == used


def test_the_private_codes_are_those_of_the_report() -> None:
    told = {row[0]: row[1] for row in rows("### Private codes")}
    assert told == {code.value: code.meaning for code in report.PRIVATE_CODES}
    assert report.PRIVATE_SCHEME in PAGE


@pytest.mark.parametrize("setting", re.findall(r"`\[+([a-z.]+)\]+ ([a-z_, ]+)`", PAGE))
def test_named_settings_exist(setting: tuple[str, str]) -> None:
    from node.settings import Settings

    table, keys = setting
    kind: Any = Settings
    for name in table.split("."):
        kind = kind.model_fields[name].annotation
        kind = (get_args(kind) or (kind,))[0]  # of a list of tables, the table
    assert set(keys.split(", ")) <= set(kind.model_fields)
