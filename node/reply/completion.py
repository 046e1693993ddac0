"""Which studies are complete, and which are too old to answer.

In: the catalogue and the clock. Out: studies in their next state. All times come from the database, so a restart forgets nothing.
"""

from __future__ import annotations

import logging
from datetime import datetime

from node.keep.catalogue import Catalogue
from node.logs import event
from node.settings import Completion

log = logging.getLogger("osteon.reply")


def advance(catalogue: Catalogue, rules: Completion, *, now: datetime) -> bool:
    """Move studies that are quiet or have waited long enough, and expire those that nobody answered; True when any moved."""
    completed = catalogue.studies.complete_due(quiet_s=rules.quiet_s, max_wait_s=rules.max_wait_s, now=now)
    expired = catalogue.studies.expire_due(answer_within_h=rules.answer_within_h, now=now)
    for uid, state in completed:
        event(log, "study complete", study=uid, state=state)
    for uid in expired:
        event(log, "study expired", study=uid, level=logging.WARNING)
    return bool(completed or expired)
