"""The shelf of models: versions that never change, and which of them is in service since when, by whom and why.

In: an ONNX file with its card. Out: versions by name, the champion, the history. On disk, below `<root>/models`::

    versions/<id>/{model.onnx, card.json, corpus.json, reference.npz?}    written once; <id> = date + hash of the card
    aliases/<alias>.json                                                  a pointer, replaced atomically
    history.jsonl                                                         one line a move, appended and synced

A pointer carries the whole move that made it, and is written first: a crash before the line is in the history loses nothing,
for whoever reads next takes the move from the pointer. A file whose hash is not the one its card states is never handed out.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from models import durable
from models.card import Card, corpus_file, corpus_patients, sha256
from models.errors import NoSuchVersion, NotAllowed, Tampered

CHAMPION = "champion"
ALIASES = (CHAMPION, "challenger")
_NAME = re.compile(r"\d{8}-[0-9a-f]{10}")
Action = Literal["promote", "rollback"]


@dataclass(frozen=True, slots=True)
class Move:
    """One change of an alias."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    number: int
    """1, 2, 3, … over all aliases."""
    at: datetime
    """Never before the move that precedes it, even when a clock was set back."""
    action: Action
    alias: str
    version: str
    previous: str
    """What the alias named before; empty when nothing."""
    by: str
    reason: str
    decision: str
    """What the gate had said of the version."""


class Registry:
    """The shelf in one folder. Any number of processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    # --- versions -------------------------------------------------------------------------------------------------------------

    def add(self, onnx: Path, card: Card, *, corpus: Collection[str], reference: Path | None = None) -> str:
        """Shelve a version and give its name; the same version again changes nothing.

        Parameters
        ----------
        onnx
            One file with its weights inside (`external_data=False`).
        corpus
            The pseudonyms of every patient whose images trained it; `card.corpus_sha256` is the hash of `corpus_file(corpus)`.

        Raises
        ------
        Tampered
            A file does not have the hash that the card states.
        """
        files = {"model.onnx": onnx.read_bytes(), "corpus.json": corpus_file(corpus), "card.json": card.to_json().encode()}
        if reference is not None:
            files["reference.npz"] = reference.read_bytes()
        version = version_id(card)
        _check(version, card, files)
        durable.make_folder(self._versions)
        with self._locked():
            if (self._versions / version).is_dir():
                return version
            self._sweep()
            half_written = self._versions / f".{version}"
            for name, data in files.items():
                durable.write(half_written / name, data)
            half_written.rename(self._versions / version)
            durable.sync_folder(self._versions)
        return version

    def versions(self) -> list[str]:
        """Name all versions, by the day they were made."""
        if not self._versions.is_dir():
            return []
        return sorted(each.name for each in self._versions.iterdir() if _NAME.fullmatch(each.name))

    def folder(self, version: str) -> Path:
        """Say where a version lies.

        Raises
        ------
        NoSuchVersion
            The shelf does not hold it.
        """
        if not _NAME.fullmatch(version) or not (self._versions / version).is_dir():
            raise NoSuchVersion(f"there is no model version {version!r} here; `osteon models list` shows what there is")
        return self._versions / version

    def card(self, version: str) -> Card:
        """Read the card of a version; `Tampered` when it is not the one that was shelved."""
        card = Card.from_json(self._read(version, "card.json"))
        if version_id(card) != version:
            raise Tampered(f"{version}: card.json is not the card that was shelved under this name")
        return card

    def model(self, version: str) -> bytes:
        """Read the ONNX file of a version; `Tampered` when its hash is not the card's."""
        return self._checked(version, "model.onnx", self.card(version).onnx_sha256)

    def reference(self, version: str) -> bytes | None:
        """Read the reference statistics of a version, None when it has none; `Tampered` when the hash is not the card's."""
        wanted = self.card(version).reference_sha256
        return self._checked(version, "reference.npz", wanted) if wanted else None

    def corpus(self, version: str) -> frozenset[str]:
        """Give the pseudonyms of all patients whose images trained a version; `Tampered` when the hash is not the card's."""
        return corpus_patients(self._checked(version, "corpus.json", self.card(version).corpus_sha256))

    def verify(self, version: str) -> Card:
        """Check every file of a version against its card and give the card; `Tampered` when one differs."""
        self.model(version), self.reference(version), self.corpus(version)
        return self.card(version)

    # --- aliases and history --------------------------------------------------------------------------------------------------

    def champion(self) -> str | None:
        """Name the version in service, None when there is none."""
        return self.alias(CHAMPION)

    def alias(self, name: str) -> str | None:
        """Name the version that an alias points to, None when it points to nothing."""
        move = self._pointer(name)
        return move.version if move else None

    def promote(
        self,
        version: str,
        *,
        by: str,
        reason: str,
        decision: str,
        now: datetime,
        locked: Collection[str],
        alias: str = CHAMPION,
    ) -> Move:
        """Point an alias to a version, and record who did so and why. Pointing it where it points already changes nothing.

        Parameters
        ----------
        locked
            The pseudonyms of the locked patients of today.

        Raises
        ------
        NotAllowed
            The frozen corpus of the version names a locked patient, or nobody or no reason is given.
        NoSuchVersion
            The shelf does not hold it.
        Tampered
            Its files are not the ones that were shelved.
        """
        self.verify(version)
        if seen := self.corpus(version) & set(locked):
            raise NotAllowed(f"{version} was trained on {len(seen)} of the locked patients; it can never be put into service")
        with self._locked():
            return self._move("promote", alias, version, by=by, reason=reason, decision=decision, now=now)

    def rollback(self, *, by: str, reason: str, now: datetime) -> str:
        """Put the champion before this one back into service and give its name.

        Raises
        ------
        NoSuchVersion
            There was none before.
        """
        with self._locked():
            stack: list[str] = []  # the champions that led here, without those that were rolled back
            for move in self.history():
                if move.alias == CHAMPION:
                    stack = [*stack, move.version] if move.action == "promote" else stack[:-1]
            if len(stack) < 2:
                raise NoSuchVersion("there is no earlier champion to go back to")
            version = stack[-2]
            decision = self.verify(version).decision
            self._move("rollback", CHAMPION, version, by=by, reason=reason, decision=decision, now=now)
        return version

    def history(self) -> list[Move]:
        """Give all moves, oldest first."""
        moves = {move.number: move for move in self._recorded()}
        for name in ALIASES:
            if pointer := self._pointer(name):
                moves.setdefault(pointer.number, pointer)
        return [moves[number] for number in sorted(moves)]

    def champion_at(self, when: datetime) -> Move | None:
        """Give the move that had put the champion of that moment into service; None when there was none."""
        before = [move for move in self.history() if move.alias == CHAMPION and move.at <= when]
        return before[-1] if before else None

    # --- within ---------------------------------------------------------------------------------------------------------------

    @property
    def _versions(self) -> Path:
        return self._folder / "versions"

    @property
    def _history_file(self) -> Path:
        return self._folder / "history.jsonl"

    def _read(self, version: str, name: str) -> bytes:
        try:
            return (self.folder(version) / name).read_bytes()
        except FileNotFoundError:
            raise Tampered(f"{version}: {name} is missing") from None

    def _checked(self, version: str, name: str, wanted: str) -> bytes:
        data = self._read(version, name)
        if sha256(data) != wanted:
            raise Tampered(f"{version}: {name} does not have the hash that its card states; it is not used")
        return data

    def _pointer(self, alias: str) -> Move | None:
        if alias not in ALIASES:
            raise NoSuchVersion(f"there is no alias {alias!r}: {', '.join(ALIASES)}")
        try:
            data = (self._folder / "aliases" / f"{alias}.json").read_bytes()
        except FileNotFoundError:
            return None
        return _move(data, f"aliases/{alias}.json")

    def _move(self, action: Action, alias: str, version: str, *, by: str, reason: str, decision: str, now: datetime) -> Move:
        if not by.strip() or not reason.strip():
            raise NotAllowed("a model is put into service by a named person, or by the gate, for a stated reason")
        moves, current = self.history(), self._pointer(alias)
        if current and current.version == version:
            return current
        at = max(now, moves[-1].at) if moves else now
        previous = current.version if current else ""
        move = Move(len(moves) + 1, at, action, alias, version, previous, by.strip(), reason.strip(), decision)
        self._record(moves)  # what a crash kept out of the history, before its pointer is replaced
        durable.write(self._folder / "aliases" / f"{alias}.json", _line(move), mode=0o640)
        self._record([*moves, move])
        return move

    def _recorded(self) -> list[Move]:
        try:
            whole, _, _torn = self._history_file.read_bytes().rpartition(b"\n")
        except FileNotFoundError:
            return []
        return [_move(line, f"history.jsonl, line {number}") for number, line in enumerate(whole.splitlines(), start=1) if line]

    def _record(self, moves: list[Move]) -> None:
        """Append to the history the moves it lacks; a torn last line, of a crash while appending, is cut off first."""
        recorded = {move.number for move in self._recorded()}
        missing = [move for move in moves if move.number not in recorded]
        if not missing:
            return
        if not self._history_file.exists():
            durable.write(self._history_file, b"", mode=0o640)
        with self._history_file.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write(b"".join(_line(move) for move in missing))
            file.flush()
            os.fsync(file.fileno())

    def _sweep(self) -> None:
        """Remove what a killed `add` left half written."""
        for left in self._versions.glob(".*"):
            shutil.rmtree(left)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one process at a time change the shelf."""
        durable.make_folder(self._folder)
        durable.touch(self._folder / ".lock")
        with (self._folder / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def version_id(card: Card) -> str:
    """Name a version: the day (UTC) it was made and the hash of its card, which states the hashes of its files."""
    return f"{card.created_at.astimezone(UTC):%Y%m%d}-{sha256(card.to_json().encode())[:10]}"


def _check(version: str, card: Card, files: dict[str, bytes]) -> None:
    stated = {"model.onnx": card.onnx_sha256, "corpus.json": card.corpus_sha256, "reference.npz": card.reference_sha256}
    for name, wanted in stated.items():
        if (sha256(files[name]) if name in files else "") != wanted:
            raise Tampered(f"{version}: {name} does not have the hash that its card states; it is not shelved")


_moves: TypeAdapter[Move] = TypeAdapter(Move)


def _line(move: Move) -> bytes:
    return json.dumps(_moves.dump_python(move, mode="json")).encode() + b"\n"


def _move(line: bytes, where: str) -> Move:
    try:
        return _moves.validate_json(line)
    except ValidationError:
        raise Tampered(f"{where}: not a move of an alias; restore it from a backup") from None
