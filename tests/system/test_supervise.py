"""The supervisor keeps roles running, and gives up where starting again is useless."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from roles import until

from node import supervise as supervisor
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


def test_a_role_that_ran_well_is_started_again_whatever_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One role's trouble under way must not end the others: the settings were good when it started."""
    monkeypatch.setattr(supervisor, "STEADY_S", 0.0)
    marks = tmp_path / "marks"
    code = f"open({str(marks)!r}, 'a').write('x'); raise SystemExit(2)"
    stop = threading.Event()
    threading.Thread(target=lambda: (until(lambda: marks.exists() and len(marks.read_text()) >= 2), stop.set())).start()
    assert run([Child("one", (sys.executable, "-c", code))], stop) == [0]


def test_ctrl_c_lets_a_role_finish_what_it_does(tmp_path: Path) -> None:
    """A terminal signals its whole foreground group; each role must still get one signal, from the supervisor."""
    signals, ready = tmp_path / "signals", tmp_path / "ready"
    role = f"""
import signal, time
got = []
for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, lambda number, frame: got.append(number))
open({str(ready)!r}, "w").close()
while not got:
    time.sleep(0.05)
time.sleep(0.5)
open({str(signals)!r}, "w").write(str(len(got)))
"""
    code = f"""
import sys
from node.daemon import stop_on_signals
from node.supervise import Child, supervise
with stop_on_signals() as stop:
    sys.exit(supervise([Child("one", (sys.executable, "-c", {role!r}))], stop, poll_s=0.02))
"""
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    until(ready.exists)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 0
    assert signals.read_text() == "1"


def test_a_child_whose_supervisor_is_killed_while_it_starts_does_not_begin(tmp_path: Path) -> None:
    """Linux tells a child of a death that comes after the child has asked to be told, and of no earlier one."""
    child, began = tmp_path / "child", tmp_path / "began"
    code = f"""
import os, subprocess, sys, time
from node.supervise import die_with_parent
parent, ask = os.getpid(), die_with_parent()
def late():
    open({str(child)!r}, "w").write(f"{{os.getpid()}} ")
    while os.getppid() == parent:
        time.sleep(0.01)
    ask()
subprocess.Popen([sys.executable, "-c", "open({str(began)!r}, 'w').close(); import time; time.sleep(600)"], preexec_fn=late)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    pid = int(until(lambda: child.exists() and child.read_text().endswith(" ") and child.read_text()))
    process.kill()
    process.wait(30)
    until(lambda: not _lives(pid), told="the child has ended")
    assert not began.exists()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
