"""The supervisor of `osteon serve`: each role is a child process, started again when it ends by itself.

In: commands. Out: an exit code. A child that soon ends with exit code 2 (its settings or keys are wrong) ends the
whole: starting it again would fail the same way. Children must never outlive the supervisor, also when it is killed.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from node.logs import event

log = logging.getLogger("osteon.supervise")

EXIT_FINAL = 2
GRACE_S = 30.0
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
STEADY_S = 60.0
"""A child that ran this long starts with a fresh back-off."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Child:
    """One role to keep running."""

    name: str
    command: tuple[str, ...]


class _Running:
    """One child: its process, or the moment of its next start."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.start_at = 0.0
        self.backoff_s = BACKOFF_FIRST_S

    def start(self) -> None:
        # A group of its own: Ctrl-C reaches the supervisor alone, whose SIGTERM would be the second signal, which ends at once.
        self.process = subprocess.Popen(
            self.child.command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent(), process_group=0
        )
        self.started_at = monotonic()
        event(log, "role started", child=self.child.name, pid=self.process.pid)

    def ended(self) -> bool:
        """Plan the next start when the process has just ended; True when starting it again is useless.

        What ran steadily had the right settings: it is started again whatever it says; if they are wrong now, it ends at once.
        """
        code = self.process.poll() if self.process else None
        if code is None:
            return False
        steady = monotonic() - self.started_at > STEADY_S
        if steady:
            self.backoff_s = BACKOFF_FIRST_S
        self.process, self.start_at = None, monotonic() + self.backoff_s
        event(log, "role ended", level=logging.ERROR, child=self.child.name, code=code, again_in_s=self.backoff_s)
        self.backoff_s = min(2 * self.backoff_s, BACKOFF_MAX_S)
        return code == EXIT_FINAL and not steady


def die_with_parent() -> Callable[[], None]:
    """Give what a child of this process does first: it asks Linux to be terminated when this one dies, however (prctl(2))."""
    parent = os.getpid()

    def ask() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before it could be asked about: nothing would ever end this child
                os._exit(1)

    return ask


def supervise(children: Sequence[Child], stop: threading.Event, *, poll_s: float = 0.2) -> int:
    """Keep `children` running until `stop` is set; give 0, or 2 when one of them says that starting it again is useless."""
    running = [_Running(child) for child in children]
    verdict = 0
    try:
        while not stop.is_set() and not verdict:
            for one in running:
                if one.process is None and monotonic() >= one.start_at:
                    one.start()
                elif one.ended():
                    verdict = EXIT_FINAL
            stop.wait(poll_s)
    finally:
        _end([one.process for one in running if one.process is not None])
    return verdict


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask every process to end, and force those that have not ended after the grace."""
    for process in processes:
        process.terminate()
    deadline = monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
