"""The supervisor keeps roles running, and gives up where starting again is useless."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from roles import until

from node.supervise import Child, supervise


def run(children: list[Child], stop: threading.Event) -> list[int]:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(supervise(children, stop, poll_s=0.02)))
    thread.start()
    until(lambda: codes or stop.is_set(), seconds=30)
    thread.join(30)
    return codes


def test_a_role_that_ends_is_started_again(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    code = f"open({str(marks)!r}, 'a').write('x'); import sys; sys.exit(1)"
    stop = threading.Event()
    threading.Thread(target=lambda: (until(lambda: marks.exists() and len(marks.read_text()) >= 3), stop.set())).start()
    assert run([Child("one", (sys.executable, "-c", code))], stop) == [0]


def test_a_role_with_wrong_settings_ends_the_whole(tmp_path: Path) -> None:
    children = [
        Child("wrong", (sys.executable, "-c", "raise SystemExit(2)")),
        Child("right", (sys.executable, "-c", "import time; time.sleep(600)")),
    ]
    assert run(children, threading.Event()) == [2]
