"""What a peer is told when something goes wrong: errors of the tree -> C-STORE statuses.

In: an exception. Out: a status of PS3.4 table B.2-1 or PS3.7 9.1.1.1.9. Nothing here may turn an error into a success or a
warning. The classes say what a peer may do: A7xx, the same object may be taken later; all others, it will not.
"""

from __future__ import annotations

from models.errors import Final, Retriable, Tampered, Unreadable
from node.errors import (
    BadKey,
    BadSettings,
    IdentityConflict,
    LostStore,
    NoSpace,
    NotAsAnnounced,
    NotPermitted,
    NotUnderstood,
    PixelConflict,
    Refused,
    RotationUnfinished,
    StoreBusy,
    TooLarge,
)

SUCCESS = 0x0000
"""PS3.7 annex C; here it means: safe on disk, or one of our own results."""
INVALID_SOP_INSTANCE = 0x0117
"""PS3.7 annex C; the request names no SOP Instance."""
SOP_CLASS_NOT_SUPPORTED = 0x0122
"""PS3.7 annex C; of a class or syntax that this node does not take."""
NOT_AUTHORISED = 0x0124
"""PS3.7 annex C; the association was not admitted."""
OUT_OF_RESOURCES = 0xA700
"""PS3.4 table B.2-1, A7xx."""
DOES_NOT_MATCH = 0xA900
"""PS3.4 table B.2-1, A9xx: the data set does not match the SOP class."""
CANNOT_UNDERSTAND = 0xC000
"""PS3.4 table B.2-1, Cxxx."""
UNEXPECTED = 0xC001
"""Of the Cxxx range: an error that this table does not know, a fault of ours."""

STATUS: dict[type[BaseException], int] = {
    NoSpace: OUT_OF_RESOURCES,
    StoreBusy: OUT_OF_RESOURCES,
    TooLarge: OUT_OF_RESOURCES,
    MemoryError: OUT_OF_RESOURCES,
    # The node's own trouble, which its operator can mend: the peer may come again.
    OSError: OUT_OF_RESOURCES,
    BadKey: OUT_OF_RESOURCES,
    LostStore: OUT_OF_RESOURCES,
    RotationUnfinished: OUT_OF_RESOURCES,
    BadSettings: OUT_OF_RESOURCES,
    NotPermitted: OUT_OF_RESOURCES,
    Tampered: OUT_OF_RESOURCES,
    Retriable: OUT_OF_RESOURCES,
    Refused: SOP_CLASS_NOT_SUPPORTED,
    NotAsAnnounced: DOES_NOT_MATCH,
    NotUnderstood: CANNOT_UNDERSTAND,
    Unreadable: CANNOT_UNDERSTAND,
    # Intake answers these two with the quarantine; should one escape, the object is not safe and the peer must know.
    IdentityConflict: CANNOT_UNDERSTAND,
    PixelConflict: CANNOT_UNDERSTAND,
    Final: CANNOT_UNDERSTAND,
}
"""The most specific class counts."""
FAILURES = (INVALID_SOP_INSTANCE, NOT_AUTHORISED, UNEXPECTED, *sorted(set(STATUS.values())))
"""Every status that says no."""


def status_of(error: BaseException) -> int:
    """Give the status for `error`, by its nearest class in the table."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), UNEXPECTED)
