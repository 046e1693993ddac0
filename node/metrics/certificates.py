"""When the certificates that this role presents end.

In: their files. Out: figures. They are read at each scrape, for they are renewed without a restart; one that cannot be read shows
nothing, and `osteon check` says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from models.errors import OsteonError
from node import tls


class Certificates:
    """The end of each certificate, by what it is for; without TLS there is none."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = {name: file for name, file in files.items() if file}

    def collect(self) -> Iterator[Metric]:
        """Look now."""
        ends = GaugeMetricFamily(
            "osteon_certificate_end_timestamp_seconds", "When a certificate of ours stops being valid", labels=["certificate"]
        )
        for name, file in self._files.items():
            try:
                ends.add_metric([name], tls.ends(file).timestamp())
            except OsteonError:
                continue
        yield ends
