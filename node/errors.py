"""The node's branch of the error tree (`models/errors.py` holds the root)::

Retriable
├── PeerAway          a peer does not answer, or not in time
├── NoSpace           the disk is full (ENOSPC, EDQUOT)
└── StoreBusy         the catalogue or the vault did not take a write in time
Final
├── BadSettings       ae_config.toml is wrong: names file, key and line
├── BadKey            a key is missing, too short, world-readable or not the one that sealed this
├── Refused           an object that is not taken in at all (`status` says which answer)
├── TooLarge          an object over the size limit
├── NotFound          nothing under the identifier the user gave
└── BadLabels         a label table with rows that cannot be taken: nothing is imported
"""

from __future__ import annotations

from models.errors import Final, Retriable


class PeerAway(Retriable):
    """The peer does not answer."""


class NoSpace(Retriable):
    """The disk is full."""


class StoreBusy(Retriable):
    """The store did not take the write in time."""


class BadSettings(Final):
    """The settings are not valid."""


class BadKey(Final):
    """The key is missing, malformed, readable by others, or not the key that sealed this."""


class Refused(Final):
    """The object is not of a kind this node takes in."""


class TooLarge(Final):
    """The object is larger than `[node] max_object_mb`."""


class NotFound(Final):
    """Nothing is known under this identifier."""


class BadLabels(Final):
    """The label table has rows that cannot be imported; nothing was imported."""
