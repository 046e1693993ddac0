"""Logs: one line a unit of work, JSON on a pipe, text on a terminal.

Nothing here may print what a patient's header holds: the loggers of pynetdicom, pydicom, highdicom and SQLAlchemy, which
would, are set quiet by their public settings, and an exception of a foreign library is logged by its class alone.
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TextIO

from models.errors import OsteonError

QUIET = ("pynetdicom", "pydicom", "highdicom", "sqlalchemy", "alembic", "psycopg", "PIL", "matplotlib", "onnxruntime")
_FIELDS = "osteon_fields"
_BOUND: contextvars.ContextVar[dict[str, object] | None] = contextvars.ContextVar("osteon_bound", default=None)


def event(logger: logging.Logger, what: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log one line: `what` happened, with `fields` (pseudonymous UIDs, durations, AE titles, statuses; never an identity).

    `study` is always the pseudonymous UID of the study: by it a study is followed through all roles.
    """
    logger.log(level, what, extra={_FIELDS: (_BOUND.get() or {}) | fields})


@contextmanager
def bound(**fields: object) -> Iterator[None]:
    """Add `fields` to every line that this thread logs within the block."""
    token = _BOUND.set((_BOUND.get() or {}) | fields)
    try:
        yield
    finally:
        _BOUND.reset(token)


def safe_message(error: BaseException) -> str:
    """Say what went wrong without repeating data: Osteon's own messages in full, a foreign error by its class alone."""
    return str(error) if isinstance(error, OsteonError) else type(error).__name__


def where(error: BaseException) -> str:
    """Say what kind of error it is and where it happened, without its message or any value: fit to be shown to anybody."""
    places = [f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    return "\n".join([f"unexpected {type(error).__name__}; please report it with these lines", *places])


def _thread_died(what: threading.ExceptHookArgs) -> None:
    """Log the end of a thread by an error of whatever kind: the interpreter would print its message."""
    told = "" if what.exc_value is None else where(what.exc_value)
    name = what.thread.name if what.thread else ""
    event(logging.getLogger("osteon.thread"), "thread died", level=logging.ERROR, thread=name, error=told)


class _Lines(logging.Formatter):
    """One record as one line of JSON, or of text on a terminal."""

    def __init__(self, *, as_json: bool, role: str) -> None:
        super().__init__()
        self.as_json, self.role = as_json, role

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, _FIELDS, {}))
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = safe_message(record.exc_info[1])
        at = datetime.fromtimestamp(record.created, UTC)
        if self.as_json:
            line = {"at": at.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
            return json.dumps(
                line | {"role": self.role or record.name.removeprefix("osteon."), "event": record.getMessage()} | fields,
                default=str,
            )
        told = " ".join(f"{name}={value}" for name, value in fields.items())
        return f"{at.astimezone():%H:%M:%S} {record.levelname.lower():7} {record.getMessage()}  {told}".rstrip()


def configure(*, role: str = "", stream: TextIO | None = None, as_json: bool | None = None, level: int = logging.INFO) -> None:
    """Send Osteon's log lines to `stream` (stdout) under the `role` of this process, and silence what would log identities."""
    out = sys.stdout if stream is None else stream
    handler = logging.StreamHandler(out)
    handler.setFormatter(_Lines(as_json=not out.isatty() if as_json is None else as_json, role=role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.ERROR)
    logging.getLogger("osteon").setLevel(level)
    for name in QUIET:
        quiet = logging.getLogger(name)
        quiet.handlers[:] = [logging.NullHandler()]
        quiet.setLevel(logging.CRITICAL + 1)
        quiet.propagate = False
    threading.excepthook = _thread_died
    warnings.filterwarnings("ignore", module=r"(pydicom|pynetdicom|highdicom)(\.|$)")
