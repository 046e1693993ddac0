"""What could not be taken in safely, sealed, one file an object, until a person decides.

In: the bytes as they came and what may be said of them (`Held`). Out: the same bytes, for a release alone. They are identified
data: nothing here may write them in clear, or name a file by anything but the derived id.
"""

from __future__ import annotations

import re
from pathlib import Path

from models import durable
from models.errors import Tampered
from node.errors import BadKey, NotFound, disk_full_said
from node.keep.records import Held
from node.keep.seal import Seal, key_id


class Quarantine:
    """A folder of sealed files."""

    def __init__(self, folder: Path, key: bytes) -> None:
        self.folder = folder
        self._seal = Seal(key)
        durable.make_folder(folder)

    def put(self, raw: bytes, held: Held) -> None:
        """Seal `raw` under the id of `held`; it survives a power cut on return."""
        with disk_full_said():
            durable.write(self._file(held.id), self._seal.seal(raw, _context(held.id)), mode=0o600)

    def read(self, held_id: str) -> bytes:
        """Give the bytes as they came.

        Raises
        ------
        NotFound
            Nothing is in the quarantine under this id.
        """
        try:
            sealed = self._file(held_id).read_bytes()
        except FileNotFoundError:
            raise _unknown(held_id) from None
        return self._seal.open(sealed, _context(held_id))

    def holds(self, held_id: str) -> bool:
        """Say whether a sealed file stands under this id; if so, it survives a power cut on return.

        It is opened, because a network file system may answer `stat` from what it saw before; and its name may be of a process
        that was killed before it had synced the folder.
        """
        try:
            self._file(held_id).open("rb").close()
        except FileNotFoundError:
            return False
        durable.sync_folder(self.folder)
        return True

    def discard(self, held_id: str) -> None:
        """Remove what is held for good; an id that is gone already is no error."""
        self._file(held_id).unlink(missing_ok=True)
        durable.sync_folder(self.folder)

    def opens(self, held_id: str) -> bool:
        """Say whether the file opens with this key and is whole; one that a person discarded meanwhile is not in the way."""
        try:
            self.read(held_id)
        except (BadKey, Tampered):
            return False
        except NotFound:
            pass
        return True

    def reseal(self, held_id: str, new: Seal) -> None:
        """Seal what is held with another key; done already is done. A kill leaves the file under one of the two.

        Raises
        ------
        BadKey, Tampered
            It opens with neither.
        """
        file = self._file(held_id)
        try:
            sealed = file.read_bytes()
        except FileNotFoundError:  # discarded meanwhile
            return
        if key_id(sealed) == new.key_id:
            return
        with disk_full_said():
            durable.write(file, new.seal(self._seal.open(sealed, _context(held_id)), _context(held_id)), mode=0o600)

    def ids(self) -> list[str]:
        """Name everything that is held."""
        return sorted(file.stem for file in self.folder.glob("*.sealed"))

    def _file(self, held_id: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{8,64}", held_id):  # an id comes from the command line, too
            raise _unknown(held_id)
        return self.folder / f"{held_id}.sealed"


def _unknown(held_id: str) -> NotFound:
    return NotFound(f"the quarantine holds nothing under {held_id}; `osteon quarantine list` shows what it holds")


def _context(held_id: str) -> str:
    return f"quarantine:{held_id}"
