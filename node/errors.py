"""The node's branch of the error tree.

The root is in `models/errors.py`; the class says what a caller may do::

    Retriable
    ├── PeerAway          a peer does not answer, or not in time
    ├── NoSpace           the disk is full (ENOSPC, EDQUOT)
    ├── StoreBusy         the catalogue or the vault did not take a write in time
    ├── Occupied          the device set has a training run
    └── NoDecoder         a process for decoding images does not start
    Final
    ├── BadSettings       ae_config.toml is wrong: names file, key and line
    ├── BadKey            a key is missing, too short, world-readable, swapped or not the one that sealed this
    ├── LostStore         one store of the site is gone while the others are full: nothing is begun anew beside them
    ├── RotationUnfinished  the vault lies under two keys until `osteon vault rotate` has run again
    ├── StillRunning      a role is at work where everything must be stopped
    ├── NotMergeable      patients that cannot be made one
    ├── Refused           an object that is not taken in at all (`status` says which answer)
    ├── NotAsAnnounced    a data set with another SOP class or instance than the C-STORE request names
    ├── NotUnderstood     bytes that are no data set
    ├── TooLarge          an object over the size limit
    ├── IdentityConflict  an instance that names another patient than its study
    ├── PixelConflict     an instance with other pixels than the one archived under its UID
    ├── NotReleasable     what the quarantine holds for a reason that a person cannot override
    ├── NotPermitted      what the database role of this process may not do
    ├── NotFound          nothing under the identifier the user gave
    ├── NotToBeAnswered   a study that was sent to be learned from
    ├── WrongState        a training run is not in a state in which this can be done
    ├── NotEmpty          stores that are to be restored into and hold something already
    └── BadLabels         a label table with rows that cannot be taken: nothing is imported
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from models.errors import Final, Retriable


class PeerAway(Retriable):
    """The peer does not answer."""


class NoSpace(Retriable):
    """The disk is full."""


class StoreBusy(Retriable):
    """The store did not take the write in time."""


class Occupied(Retriable):
    """The device set has a training run already; `osteon train status` shows it."""


class NoDecoder(Retriable):
    """A process for decoding images does not start."""


class BadSettings(Final):
    """The settings are not valid."""


class BadKey(Final):
    """The key is missing, malformed, readable by others, or not the key that sealed this."""


class LostStore(Final):
    """A store of this site is gone or empty while the others are not."""


class RotationUnfinished(Final):
    """The rotation of the vault key is unfinished: run `osteon vault rotate` again with the same keys."""


class StillRunning(Final):
    """A role of this site is at work; stop it first."""


class NotMergeable(Final):
    """These patients cannot be made one."""


class Refused(Final):
    """The object is not of a kind this node takes in."""


class NotAsAnnounced(Final):
    """The data set is of another SOP class or instance than the C-STORE request says."""


class NotUnderstood(Final):
    """The bytes are no DICOM data set in the transfer syntax of the presentation context."""


class TooLarge(Final):
    """The object is larger than `[node] max_object_mb`."""


class IdentityConflict(Final):
    """The instance names another patient than the earlier instances of its study."""


class PixelConflict(Final):
    """The archive holds other pixels under this SOP Instance UID."""


class NotPermitted(Final):
    """The database role may not do this: connect as another one, or grant it the right (deploy/postgresql/roles.sql)."""


class NotReleasable(Final):
    """The quarantine holds this for a reason that a release cannot override."""


class NotFound(Final):
    """Nothing is known under this identifier."""


class NotEmpty(Final):
    """A store holds something already; a set is restored into empty ones."""


class BadLabels(Final):
    """The label table has rows that cannot be imported; nothing was imported."""


class NotToBeAnswered(Final):
    """The study was sent to be learned from; it is never answered."""


class WrongState(Final):
    """The training run is not in a state in which this can be done."""


@contextmanager
def disk_full_said() -> Iterator[None]:
    """Turn the operating system's "no space left" into `NoSpace`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace from None
        raise
