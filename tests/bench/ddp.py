"""What it costs to train in two processes of one thread instead of one process of two threads. Run by `make bench-ddp`.

In: networks, sizes. Out: a table of images per second both ways, and what two processes cost. Both ways go through the same code
(`training.pretrain`) with the same batch over all, in rounds that take turns in the same two processes: while one works alone,
the other waits. So both have the same of the machine. The figure is for processors; it says nothing of GPUs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as the trainer sets it

import numpy as np
import torch
from machine import machine

from models.networks import build
from training import pretrain
from training.engine import Engine, chosen
from training.machine import launcher
from training.pretrain import Gallery, Part
from training.ranks import Ranks, joined, world
from training.recipe import Classifier

NETWORKS = ("resnet18", "efficientnet_lite0")
SIZES_PX = (128, 224)
BATCH, CLASSES, THREADS = 128, 100, 2
"""Half of a recipe's batch: both ways fit into 16 GB. A smaller one makes two processes dearer: gradients go round each step."""
COST = 0.10
"""Target: the share of the images per second that two processes may cost."""


@dataclass(frozen=True)
class Way:
    """One way to train, ready to go through an epoch."""

    threads: int
    parts: tuple[Any, ...]
    """Method, module, optimiser, part."""

    @classmethod
    def of(cls, arch: str, gallery: Gallery, engine: Engine, ranks: Ranks, threads: int) -> Way:
        """Set up the classifier of cluster numbers."""
        part = Part(engine, ranks, THREADS, seed=1, size_px=gallery.rows.shape[-1], batch=len(gallery))
        labels, everything = np.arange(len(gallery)) % CLASSES, np.arange(len(gallery))
        torch.manual_seed(0)
        method = pretrain._Supervised(
            partial(build, arch, start="random"), gallery, labels, everything, everything, Classifier(), part
        )
        optimiser = torch.optim.SGD(method.groups(), lr=1e-4)
        return cls(threads, (method, pretrain._parallel(method.network, part), optimiser, part))

    def seconds(self, epoch: int) -> float:
        """Go through an epoch."""
        method, module, optimiser, part = self.parts
        torch.set_num_threads(self.threads)
        plan = method.plan(epoch)
        started = time.perf_counter()
        pretrain._one_epoch(method, module, optimiser, plan, epoch, 1000, part)
        return time.perf_counter() - started


def main() -> None:
    """Start two processes, which print the machine and a line for each network and size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a step, over both processes")
    given = parser.parse_args()
    if world() == 1:
        os.execv(sys.executable, (*launcher(2)[:-3], "--", __file__, *sys.argv[1:]))  # noqa: S606 - no shell is meant
    with joined() as ranks:
        if ranks.first:
            print(machine(("torch",)))
            print(f"batch {given.batch} over all, {given.rounds} rounds of one step each way, images per second (medians)\n")
            print(f"{'network':20} {'px':>4} {'format':>9} {'1 x 2 threads':>14} {'2 x 1 thread':>13} {'cost':>8}", flush=True)
        missed = [measure(arch, size_px, given, ranks) > COST for arch in NETWORKS for size_px in SIZES_PX]
        if ranks.first:
            print(f"\ntarget: cost at most {COST:.0%}: {'MISSED' if any(missed) else 'met'}")


def measure(arch: str, size_px: int, given: argparse.Namespace, ranks: Ranks) -> float:
    """Time both ways by turns; give the cost on rank 0, and zero elsewhere."""
    rows = np.random.default_rng(0).integers(0, 256, (given.batch, size_px, size_px), np.uint8)
    gallery = Gallery(rows, np.arange(len(rows)), tuple(f"1.2.{one}" for one in range(len(rows))))
    torch.set_num_threads(THREADS)
    engine = ranks.told(chosen("cpu", partial(build, arch, 2, "random"), size_px) if ranks.first else None)
    both = Way.of(arch, gallery, engine, ranks, THREADS // ranks.size)
    alone = Way.of(arch, gallery, engine, Ranks(), THREADS)
    taken: dict[str, list[float]] = {"both": [], "alone": []}
    for turn in range(given.rounds + 1):
        for which in ("both", "alone") if turn % 2 else ("alone", "both"):
            ranks.follow()
            if which == "both":
                taken[which].append(both.seconds(turn + 1))
            elif ranks.first:
                taken[which].append(alone.seconds(turn + 1))
    if not ranks.first:
        return 0.0
    one, two = (np.array(taken[which][1:]) for which in ("alone", "both"))  # the first round warms up
    cost = 1 - statistics.median(one / two)
    speeds = [given.batch / statistics.median(each) for each in (one, two)]
    print(f"{arch:20} {size_px:4} {engine.format:>9} {speeds[0]:14.1f} {speeds[1]:13.1f} {cost:8.1%}", flush=True)
    return cost


if __name__ == "__main__":
    main()
