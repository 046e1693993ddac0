"""What a role counts while it works, as Prometheus metrics.

In: what happened, told by the role at its rim. Out: a registry. Labels take few values that are known beforehand: a calling AE
title only of those listed, a destination only of those in the settings, reasons and statuses of our own. Nothing here may hold up
what is counted, and a pseudonym is no label either.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

import node
from node.keep.records import Abstention, DeliveryState, Hold
from node.metrics.disk import Disk
from node.settings import Storage

OTHER = "other"
INTAKE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
INFERENCE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
ANSWER_BUCKETS = (10, 30, 60, 120, 180, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400, 259200)
OUTCOMES = ("new", "known", "ours", "held")
"""Of an instance that was answered 0000 (`node.receive.intake.Taken`)."""
CLASS, FAILED = "class", "failed"
"""Of a classification, beside the abstentions: the model named a class; it went wrong and is tried again."""
ATTEMPTS = {
    DeliveryState.SENT: "sent",
    DeliveryState.PENDING: "put off",
    DeliveryState.HELD: "held",
    DeliveryState.DEAD: "given up",
}
"""Of an attempt to deliver, by the state that it left."""


def new_registry(storage: Storage) -> CollectorRegistry:
    """Give a registry with what every role shows: version, process, disks."""
    registry = CollectorRegistry()
    Info("osteon_build", "Version of Osteon", registry=registry).info({"version": node.__version__})
    ProcessCollector(registry=registry)
    registry.register(Disk(storage))
    return registry


class ReceiveMeters:
    """What the receiver counts."""

    def __init__(self, registry: CollectorRegistry | None = None, *, callers: Iterable[str] = ()) -> None:
        to = registry or CollectorRegistry()
        self._callers = frozenset(caller.strip() for caller in callers)
        self._accepted = Counter("osteon_associations_accepted", "Associations accepted", ["calling_ae"], registry=to)
        self._rejected = Counter("osteon_associations_rejected", "Associations rejected", ["reason"], registry=to)
        self._aborted = Counter("osteon_associations_aborted", "Associations that ended by an abort", ["calling_ae"], registry=to)
        self.open = Gauge("osteon_associations_open", "Associations open now", registry=to)
        self._instances = Counter(
            "osteon_instances", "Instances answered with success, by what became of them", ["calling_ae", "outcome"], registry=to
        )
        self._bytes = Counter("osteon_received_bytes", "Bytes of data sets answered with success", ["calling_ae"], registry=to)
        self._held = Counter("osteon_instances_held", "Instances put into the quarantine", ["reason"], registry=to)
        self._refused = Counter("osteon_instances_refused", "C-STORE requests answered with a failure", ["status"], registry=to)
        self._seconds = Histogram(
            "osteon_intake_seconds", "From the last byte of an instance to its answer", buckets=INTAKE_BUCKETS, registry=to
        )
        for caller in (*self._callers, OTHER):
            self._accepted.labels(caller), self._aborted.labels(caller), self._bytes.labels(caller)
            for outcome in OUTCOMES:
                self._instances.labels(caller, outcome)
        for hold in Hold:
            self._held.labels(hold)

    def expect(self, *, reasons: Iterable[str], statuses: Iterable[str]) -> None:
        """Start reasons of rejections and statuses of refusals at 0: what first appears at 1 has not grown, for Prometheus."""
        for reason in reasons:
            self._rejected.labels(reason)
        for status in statuses:
            self._refused.labels(status)

    def accepted(self, calling_ae: str) -> None:
        """Count an association that was let in."""
        self._accepted.labels(self._listed(calling_ae)).inc()

    def rejected(self, reason: str) -> None:
        """Count an association that was not; `reason` is one of our own words."""
        self._rejected.labels(reason).inc()

    def aborted(self, calling_ae: str) -> None:
        """Count an association that ended by an abort, of either side."""
        self._aborted.labels(self._listed(calling_ae)).inc()

    def taken(self, outcome: str, *, calling_ae: str, size: int, seconds: float, reason: str = "") -> None:
        """Count an instance that was answered 0000; `reason` says why it is held, if it is."""
        caller = self._listed(calling_ae)
        self._instances.labels(caller, outcome).inc()
        self._bytes.labels(caller).inc(size)
        self._seconds.observe(seconds)
        if reason:
            self._held.labels(reason).inc()

    def refused(self, status: str) -> None:
        """Count a C-STORE that was answered with a failure."""
        self._refused.labels(status).inc()

    def _listed(self, calling_ae: str) -> str:
        title = calling_ae.strip()
        return title if title in self._callers else OTHER


class ReplyMeters:
    """What the replier counts."""

    def __init__(self, registry: CollectorRegistry | None = None, *, destinations: Iterable[str] = ()) -> None:
        to = registry or CollectorRegistry()
        self._classified = Counter(
            "osteon_classifications", "Studies classified, by what was said of them", ["outcome"], registry=to
        )
        self._inference = Histogram(
            "osteon_inference_seconds", "From the claim of a study to its findings", buckets=INFERENCE_BUCKETS, registry=to
        )
        self._attempts = Counter(
            "osteon_delivery_attempts", "Attempts to deliver a result", ["destination", "outcome"], registry=to
        )
        self._answer = Histogram(
            "osteon_answer_seconds",
            "From the first image of a study, or a person's request, to its result in the PACS",
            ["destination"],
            buckets=ANSWER_BUCKETS,
            registry=to,
        )
        self._model = Info("osteon_model", "Version at work here, empty when none is", registry=to)
        self._since = Gauge(
            "osteon_model_in_service_timestamp_seconds", "When that version was put into service, 0 when none is", registry=to
        )
        self._trouble = Gauge("osteon_model_trouble", "1 when the version in service does not work here", registry=to)
        self.model("", since=None, trouble=False)
        for outcome in (CLASS, FAILED, *Abstention):
            self._classified.labels(outcome)
        for destination in destinations:
            self._answer.labels(destination)
            for outcome in ATTEMPTS.values():
                self._attempts.labels(destination, outcome)

    def classified(self, outcome: str, *, seconds: float) -> None:
        """Count a study that was classified: with a class, an abstention, or a failure."""
        self._classified.labels(outcome).inc()
        self._inference.observe(seconds)

    def delivered(self, destination: str, state: DeliveryState) -> None:
        """Count an attempt to deliver by the state that it left."""
        self._attempts.labels(destination, ATTEMPTS[state]).inc()

    def answered(self, destination: str, *, seconds: float) -> None:
        """Note how long a study took from its first image to its result in the PACS."""
        self._answer.labels(destination).observe(seconds)

    def model(self, version: str, *, since: datetime | None, trouble: bool) -> None:
        """Say which version is at work."""
        self._model.info({"version": version})
        self._since.set(since.timestamp() if since else 0)
        self._trouble.set(trouble)
