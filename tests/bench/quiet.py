"""Times that can be relied on: ways that take turns, and how much of the machine others used meanwhile (Linux).

In: ways, each a function that works once and gives the seconds that count. Out: rounds, in each of which every way was timed,
and the median of the ratios within a round: what drifts (clock, temperature, the host's other guests) meets both ways alike. A
round in which other processes used more than `FOREIGN_MAX` of the processors is dropped, as long as another one is left.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FOREIGN_MAX = 0.05
"""Share of all processors."""

Way = Callable[[], float]


@dataclass(frozen=True)
class Sample:
    """One way, once."""

    seconds: float
    foreign: float
    """Share of all processors that other processes used meanwhile."""


Round = Mapping[str, Sample]


def wall(work: Callable[[], object]) -> Way:
    """Make a way of some work all of which counts."""

    def way() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return way


def timed(way: Way) -> Sample:
    """Time a way once; processes that it starts must have ended when it returns, or they count as foreign."""
    started, busy, own = time.perf_counter(), _busy_s(), _own_s()
    seconds = way()
    capacity = (time.perf_counter() - started) * (os.cpu_count() or 1)
    return Sample(seconds, max(0.0, (_busy_s() - busy) - (_own_s() - own)) / max(capacity, 1e-9))


def rounds(ways: Mapping[str, Way], count: int, say: Callable[[str], None]) -> list[Round]:
    """Let the ways take turns `count` times; who is first changes from round to round."""
    done: list[Round] = []
    for number in range(count):
        names = list(ways) if number % 2 == 0 else list(reversed(ways))
        taken = {}
        for name in names:
            say(f"round {number + 1} of {count}: {name}")
            taken[name] = timed(ways[name])
        done.append(taken)
    return done


def undisturbed(done: Sequence[Round]) -> list[Round]:
    """Give the rounds that count: those in which others did next to nothing, or all when there is none."""
    return [one for one in done if foreign([one]) <= FOREIGN_MAX] or list(done)


def foreign(done: Sequence[Round]) -> float:
    """Give the largest share of the processors that others used while a sample of these rounds was taken."""
    return max(sample.foreign for one in done for sample in one.values())


def ratio(done: Sequence[Round], above: str, below: str) -> float:
    """Give the median, over the rounds that count, of the seconds of one way over those of another."""
    return statistics.median(one[above].seconds / one[below].seconds for one in undisturbed(done))


def median_s(done: Sequence[Round], name: str) -> float:
    """Give the median seconds of a way over the rounds that count."""
    return statistics.median(one[name].seconds for one in undisturbed(done))


def _busy_s() -> float:
    """Give the processor seconds that were not idle since the machine started, those the host took for others included."""
    user, nice, system, _idle, _iowait, *rest = Path("/proc/stat").read_text("ascii").splitlines()[0].split()[1:9]
    return sum(map(int, (user, nice, system, *rest))) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """Give the processor seconds of this process and of the ended ones that it had started."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
