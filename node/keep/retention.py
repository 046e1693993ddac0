"""What is kept for so long and no longer: `[storage.keep_days]`, enforced while the node runs.

In: the limits and the clock. Out: studies in the state `removed`, whose images, decoded pictures and identities are gone;
results, documents, labels and the place in the locked set stay, for promises 5, 6, 7 and 10 rest on them. Nothing here may remove
what still has to be answered or delivered, nor anything while a training run is at work.

The order makes a kill harmless: the catalogue says `removed` first, the rows go last. Whatever is left between is removed by the
next pass, and an image that comes meanwhile is refused with a status that makes its sender try again.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from node.errors import NotFound
from node.keep import turns
from node.keep.archive import Archive
from node.keep.cache import Cache
from node.keep.catalogue import Catalogue
from node.keep.records import Instance, Purpose
from node.logs import event

log = logging.getLogger("osteon.retention")

BATCH = 20
"""Studies of one step."""
SILENT = timedelta(days=1)
"""A run whose lease is over for so long has no trainer any more, though nobody may have entered that."""
DAMAGED = "damaged"
"""Where `osteon archive repair` puts files that are not what was archived."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What one process needs to remove what was kept for long enough."""

    root: Path
    archive: Archive
    catalogue: Catalogue
    keep: dict[Purpose, timedelta]
    """How long after its last image a study of this purpose is kept; a purpose that is not named is kept for ever."""
    keep_held: timedelta | None
    """How long an object of the quarantine is kept; None: for ever."""
    forget: Callable[[str], None]
    """Removes a study's identity from the vault."""
    discard: Callable[[str], None]
    """Removes a sealed object from the quarantine."""

    def step(self, now: datetime) -> bool:
        """Remove some of what is due; True when there may be more. Nothing while a backup, a repair or a training run works.

        Without any limit, too: a removal that was cut short is finished, or its study would refuse its images for ever.
        """
        with turns.removing(self.root) as mine:
            if not mine or self._is_training(now):
                return False
            uids = self.catalogue.studies.take_for_removal(self.keep, now=now, limit=BATCH)
            images = {uid: self.catalogue.instances.of_study(uid) for uid in uids}
            for cache in Cache.all(self.root / "cache") if images else ():
                cache.blank(image.sop_uid for each in images.values() for image in each)
            for uid in uids:
                self._remove(uid, images[uid], now)
            return self._remove_held(now) or bool(uids)

    def _is_training(self, now: datetime) -> bool:
        """Ask the catalogue, which knows the runs of every host and user, and the folders that may be read here."""
        leases = [run.leased_until for run in self.catalogue.runs.busy()]
        is_leased = any(until is not None and now - SILENT < until < now + SILENT for until in leases)
        return is_leased or is_training(self.root / "runs")

    def _remove(self, uid: str, images: Sequence[Instance], now: datetime) -> None:
        for image in images:
            self.archive.withdraw(image)
            (self.root / DAMAGED / f"{image.sop_uid}.dcm").unlink(missing_ok=True)
        for folder in sorted({self.archive.path(image).parents[depth] for image in images for depth in (0, 1, 2)}, reverse=True):
            with suppress(OSError):  # not empty: an image of another study of this patient
                folder.rmdir()
        self.forget(uid)
        self.catalogue.studies.removed(uid, now=now)
        event(log, "study removed", study=uid, images=len(images))

    def _remove_held(self, now: datetime) -> bool:
        if self.keep_held is None:
            return False
        before = now - self.keep_held
        due = [held.id for held, at in self.catalogue.instances.held() if at < before][:BATCH]
        for held_id in due:
            with suppress(NotFound):  # a person was faster
                self._remove_one_held(held_id, now, before)
        return bool(due)

    def _remove_one_held(self, held_id: str, now: datetime, before: datetime) -> None:
        def goes(since: datetime) -> bool:
            if since >= before:  # it came again
                return False
            self.discard(held_id)  # the file first: should the rest be cut short, the row is still there for the next pass
            return True

        reason = f"kept for {(now - before).days} days"
        if self.catalogue.instances.unhold(held_id, by="retention", reason=reason, decision="removed", now=now, goes=goes):
            event(log, "held object removed", held=held_id)


def is_training(runs: Path) -> bool:
    """Say whether a training run is seen at work: it holds the lock of its folder, whoever started it.

    A folder that may not be read here says nothing, nor does one of another host: of these the catalogue knows.
    """
    try:
        folders = list(runs.iterdir())
    except OSError:
        return False
    return any(_is_locked(folder / "lock") for folder in folders)


def _is_locked(lock: Path) -> bool:
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
