"""Read the pages that a role shows, as Prometheus and a person with curl would."""

from __future__ import annotations

import json
from http.client import HTTPConnection
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def get(port: int, path: str, *, method: str = "GET") -> tuple[int, str]:
    """Ask a role of this machine for a page: status and body."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def told(port: int, path: str) -> tuple[int, dict[str, Any]]:
    """Give status and JSON of /healthz or /readyz."""
    code, body = get(port, path)
    return code, json.loads(body)


def scrape(port: int) -> list[Sample]:
    """Give every sample of /metrics."""
    code, body = get(port, "/metrics")
    assert code == 200
    return [sample for family in text_string_to_metric_families(body) for sample in family.samples]


def value(samples: list[Sample], name: str, **labels: str) -> float:
    """Give the one value of a series."""
    (found,) = [sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()]
    return float(found)
