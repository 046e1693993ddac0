"""Steady load for a minute and a half: a receiver and a replier do not grow, and results that come back change nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
from pydicom import dcmread
from roles import UNWATCHED, Role, running, send, until
from studies import study
from tiny_model import promote_tiny

from node import settings as site_settings
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.keep.catalogue import Catalogue
from node.keep.records import StudyState

WARM_UP_S, SOAK_S = 35.0, 90.0
PAUSE_S = 0.4
"""Between two studies; what the load is bounded by."""
ROWS, COLUMNS = 512, 384
GROWTH_MAX_MB = 16.0
"""Each study brings 0.8 MB of pixels: without its release this would be reached within seconds."""
HANDLES_MAX = 4
"""What the moment of looking may add: an association under way, a connection of the pool."""
ROUTED_BACK = 10


@dataclass
class Watched:
    """What a process holds, again and again."""

    process: psutil.Process
    memory_mb: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, role: Role) -> Watched:
        return cls(psutil.Process(role.process.pid))

    def look(self) -> None:
        self.memory_mb.append(self.process.memory_info().rss / 1e6)
        self.descriptors.append(self.process.num_fds())
        self.threads.append(self.process.num_threads())

    def growth(self, warm: int) -> tuple[float, int, int]:
        """Compare the last third after the warm-up with the first: median of the memory, least of what an association adds to."""
        third = (len(self.memory_mb) - warm) // 3
        early, late = slice(warm, warm + third), slice(-third, None)
        return (
            statistics.median(self.memory_mb[late]) - statistics.median(self.memory_mb[early]),
            min(self.descriptors[late]) - min(self.descriptors[early]),
            min(self.threads[late]) - min(self.threads[early]),
        )


@pytest.mark.long
@pytest.mark.timeout(300)
def test_nothing_grows_under_steady_load_and_results_that_come_back_change_nothing(
    tmp_path: Path, free_port: Callable[[], int], capfd: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    with Pacs(tmp_path / "pacs", callers=["OSTEON"]) as pacs:
        config = init_site(
            tmp_path / "site",
            node={"port": port, "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "purpose": "answer"}]},
            pacs=[{"name": "main", "ae_title": pacs.ae_title, "host": "127.0.0.1", "port": pacs.port}],
            completion={"quiet_s": 0.3},
            inference={"threads": 1},
            metrics=UNWATCHED,
        )
        settings = site_settings.load(config)
        promote_tiny(settings.storage.root / "models")
        with running("receive", config=config) as receiver, running("reply", config=config) as replier:
            receiver.event("listening")
            replier.event("replying")
            watched = {"receiver": Watched.of(receiver), "replier": Watched.of(replier)}
            sent, back, warm = 0, 0, 0
            began = monotonic()
            while (passed := monotonic() - began) < SOAK_S:
                images = study(patient=sent, images=2, rows=ROWS, columns=COLUMNS)
                assert send(images, port=port) == [0, 0]
                sent += 1
                for path in pacs.received[back : back + 2]:  # what the PACS routes back, ten times
                    assert send([dcmread(path)] * ROUTED_BACK, port=port) == [0] * ROUTED_BACK
                    back += 1
                for one in watched.values():
                    one.look()
                warm = len(watched["receiver"].memory_mb) if passed < WARM_UP_S else warm
                sleep(PAUSE_S)
            with Catalogue.open(settings.storage.catalogue) as catalogue:
                until(lambda: catalogue.studies.by_state()[StudyState.DELIVERED] == sent, seconds=60, told="all delivered")
                for path in pacs.received[back:]:
                    assert send([dcmread(path)] * ROUTED_BACK, port=port) == [0] * ROUTED_BACK
                sleep(2)  # in which a result taken for an image would lead to another answer
                assert catalogue.studies.by_state()[StudyState.DELIVERED] == sent
                assert catalogue.instances.count() == 2 * sent
                assert not catalogue.instances.held()
            assert len(pacs.received) == len(pacs.held("SR")) == sent
        growth = {name: one.growth(warm) for name, one in watched.items()}
        with capfd.disabled():
            for name, (memory, descriptors, threads) in growth.items():
                told = (
                    f"{memory:+.1f} MB of {watched[name].memory_mb[-1]:.0f}, {descriptors:+d} descriptors, {threads:+d} threads"
                )
                print(f"\nsoak: {sent} studies, {name} {told}", end="")
    assert sent > 40, "the load is too small to show anything"
    for name, (memory, descriptors, threads) in growth.items():
        assert memory < GROWTH_MAX_MB, name
        assert descriptors <= HANDLES_MAX, name
        assert threads <= HANDLES_MAX, name
    assert not [line for role in (receiver, replier) for line in role.events if line["level"] in ("warning", "error")]
    assert not receiver.noise + replier.noise
