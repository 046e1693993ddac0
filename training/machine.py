"""The machine: its name, its device sets, its processes; and which runs have lost theirs.

In: the settings' device, process numbers. Out: names that mean the same in the trainer and in its supervisor, which must not load
torch. A process is known by number, boot and moment of start, so that a number given anew is nobody's trainer.
"""

from __future__ import annotations

import os
import socket
import sys
from datetime import datetime, timedelta
from pathlib import Path

from node.keep.catalogue import Catalogue
from node.keep.records import Run, Worker

LEASE = timedelta(minutes=5)
"""A run of which nobody has said anything for so long has no trainer, unless that is seen to live on this machine."""
FAR = timedelta(days=1)
"""No lease is so long: a deadline beyond it was written before the clock was set back."""
NVIDIA = Path("/proc/driver/nvidia/gpus")


def host() -> str:
    """Name this machine."""
    return socket.gethostname()


def device_set(asked: str) -> str:
    """Name what a run on `[training] device` occupies: the processor or the GPUs of this machine, each as a whole."""
    gpu = asked == "cuda" or (asked == "auto" and NVIDIA.is_dir() and any(NVIDIA.iterdir()))
    return f"{host()}:{'gpu' if gpu else 'cpu'}"


def processes(asked: int, device: str) -> int:
    """Say how many processes a run has here: as many as the settings ask for, or one for each GPU, or one."""
    return asked or (len(list(NVIDIA.iterdir())) if device_set(device).endswith(":gpu") and NVIDIA.is_dir() else 1)


def launcher(processes: int) -> tuple[str, ...]:
    """Give the command that starts so many processes of the trainer here; the trainer's own options follow it.

    All of it is on this machine, whose name may be known to nobody, or stand for an address that the unit may not speak to. After
    `--` torchrun reads nothing as its own: our `--run` could be the beginning of its `--run-path`.
    """
    at = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes))
    return (sys.executable, "-m", "torch.distributed.run", *at, "-m", "--", "training")


def this_process() -> Worker:
    """Name the process that asks."""
    return Worker(host(), os.getpid(), _born(os.getpid()))


def lives(worker: Worker) -> bool:
    """Say whether this process of this machine still runs; a zombie does not."""
    return bool(worker.born) and _born(worker.pid) == worker.born


def _born(pid: int) -> str:
    """Give the boot and the clock tick of a process's start (proc(5), field 22); empty when there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot[:18]}:{fields[19]}"


def settle(catalogue: Catalogue, now: datetime) -> list[Run]:
    """Let go of the runs whose trainer has died; give those that still have one, or are being started."""
    still = []
    for run in catalogue.runs.busy():
        if run.worker is not None and run.host == host():
            lost = "" if lives(run.worker) else "its trainer was killed"
        else:
            until = run.leased_until or now
            lost = "" if now < until < now + FAR else f"nothing was heard of its trainer on {run.host}"
        if lost:
            catalogue.runs.lose(run.id, run.tries, lost, now=now)
        else:
            still.append(run)
    return still
