"""A daemon is a step and a loop.

In: a step that does one unit of work and says whether there may be more. Out: nothing. The loop owns signals, the pause
between idle steps, the back-off after a retriable error and the heartbeat; it must never swallow an error it does not know.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from models.errors import Retriable
from node.logs import event

log = logging.getLogger("osteon.daemon")

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 60.0


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Give an event that SIGTERM and SIGINT set; a second signal ends the process at once.

    The handlers found are put back on the way out.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise SystemExit(128 + number)
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(
    step: Callable[[], bool],
    stop: threading.Event,
    *,
    pause_s: float = 0.5,
    heartbeat: Callable[[], None] = lambda: None,
    heartbeat_s: float = 5.0,
) -> None:
    """Repeat `step` until `stop` is set; rest `pause_s` after a step that found nothing to do.

    A `Retriable` error is logged and followed by a pause that doubles up to a minute; any other error ends the loop. One of the
    heartbeat is logged, and no more.
    """
    from time import monotonic

    backoff_s, next_beat = BACKOFF_FIRST_S, 0.0
    while not stop.is_set():
        if monotonic() >= next_beat:
            next_beat = monotonic() + heartbeat_s
            try:
                heartbeat()
            except Retriable as error:  # a sign of life that cannot be left keeps nobody from his work
                event(log, "step put off", level=logging.WARNING, step="sign of life", error=str(error), again_in_s=heartbeat_s)
        try:
            wait_s = 0.0 if step() else pause_s
            backoff_s = BACKOFF_FIRST_S
        except Retriable as error:
            event(log, "step put off", level=logging.WARNING, error=str(error), again_in_s=backoff_s)
            wait_s, backoff_s = backoff_s, min(2 * backoff_s, BACKOFF_MAX_S)
        if wait_s:
            stop.wait(wait_s)
