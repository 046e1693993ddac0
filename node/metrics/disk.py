"""The disks that the stores lie on: how full they are, and whether that or their rights keep a role from its work.

In: the places of the stores. Out: figures, and troubles in words. Nothing here may write.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from node.settings import Storage


class Disk:
    """Free and total bytes where the stores of this machine lie."""

    def __init__(self, storage: Storage) -> None:
        self._places = places(storage)

    def collect(self) -> Iterator[Metric]:
        """Look now."""
        free = GaugeMetricFamily("osteon_disk_free_bytes", "Bytes free for us on the disk of a store", labels=["store"])
        total = GaugeMetricFamily("osteon_disk_bytes", "Bytes of the disk of a store", labels=["store"])
        for store, folder in self._places.items():
            try:
                usage = shutil.disk_usage(folder)
            except OSError:
                continue  # the readiness says so
            free.add_metric([store], usage.free)
            total.add_metric([store], usage.total)
        yield from (free, total)


def places(storage: Storage) -> dict[str, Path]:
    """Give the folders of the stores that lie on disks of this machine: `root`, and the databases that are files."""
    found = {"root": storage.root}
    for name, url in (("catalogue", storage.catalogue), ("vault", storage.vault)):
        if url.startswith("sqlite:///"):
            found[name] = Path(url.removeprefix("sqlite:///")).parent
    return found


def troubles(storage: Storage, *, written: Sequence[str] = (), read: Sequence[str] = ()) -> list[str]:
    """Say what is wrong with the folders `written` and `read` below the root, and with the room on every disk."""
    found = [f"{name}/ cannot be written" for name in written if not os.access(storage.root / name, os.W_OK | os.X_OK)]
    found += [f"{name}/ cannot be read" for name in read if not os.access(storage.root / name, os.R_OK | os.X_OK)]
    for store, folder in places(storage).items():
        try:
            free_gb = shutil.disk_usage(folder).free / 1e9
        except OSError as error:
            found.append(f"the disk of {store} cannot be reached ({error.strerror})")
            continue
        if free_gb < storage.free_min_gb:
            found.append(
                f"{free_gb:.1f} GB free on the disk of {store}, less than [storage] free_min_gb = {storage.free_min_gb:g}"
            )
    return found
