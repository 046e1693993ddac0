"""The three pages of a role: `/healthz` (it lives), `/readyz` (it can do its job), `/metrics` (its figures, for Prometheus).

In: the turns of the role's loops, a question whether it is ready, a registry. Out: short answers to GET on `[metrics] host`.
Nothing here may hold up the role or its end, keep it from starting, change anything, or name a patient.
"""

from __future__ import annotations

import json
import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from typing import Any, ParamSpec, TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from node.logs import event
from node.settings import Metrics, RoleName

log = logging.getLogger("osteon.metrics")
P = ParamSpec("P")
T = TypeVar("T")

STUCK_S = 120.0
"""A loop that has not turned for so long is stuck: its longest rest, after an error, is a minute."""
REQUEST_S = 5.0
"""How long a client may keep one read or write waiting."""
THREADS = 8
"""Requests answered at once; one more is closed."""
AGAIN_S = 10.0
"""How long to wait before a port that is in use is tried again."""
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
"""What every Prometheus reads."""
_POLL_S = 0.2


class Health:
    """The loops of a role and when each last turned, and the work in its threads and since when it is under way."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._turned: dict[str, float] = {}
        self._begun: dict[str, dict[object, float]] = {}
        self._stuck_s: dict[str, float] = {}

    def loop(self, name: str, step: Callable[[], bool], *, stuck_s: float = STUCK_S) -> Callable[[], bool]:
        """Give `step`, which from now on notes its turns under `name`."""
        self._turned[name], self._stuck_s[name] = self._clock(), stuck_s

        def turn() -> bool:
            self._turned[name] = self._clock()
            try:
                return step()
            finally:
                self._turned[name] = self._clock()

        return turn

    def work(self, name: str, do: Callable[P, T], *, stuck_s: float = STUCK_S) -> Callable[P, T]:
        """Give `do`, whose calls, in whatever threads, from now on count as loops that turn when they return."""
        begun = self._begun[name] = {}
        self._stuck_s[name] = stuck_s

        def watched(*args: P.args, **named: P.kwargs) -> T:
            call = object()
            begun[call] = self._clock()
            try:
                return do(*args, **named)
            finally:
                del begun[call]

        return watched

    def ages(self) -> dict[str, float]:
        """Give the seconds since each loop turned, and since the oldest call of each work under way began."""
        now = self._clock()
        turned = {name: now - at for name, at in self._turned.items()}
        return turned | {name: now - min([now, *begun.copy().values()]) for name, begun in self._begun.items()}

    def stuck(self) -> list[str]:
        """Name the loops that have not turned for too long, and the work that does not come to its end."""
        return [name for name, age_s in self.ages().items() if age_s > self._stuck_s[name]]


@dataclass(frozen=True, slots=True)
class Ready:
    """Whether a role can do its job now."""

    troubles: Sequence[str] = ()
    """Why it cannot, each a sentence without an identity; empty when it can."""
    told: Mapping[str, object] = field(default_factory=dict)
    """What else a person may want to know who looks here first."""


@contextmanager
def serving(
    settings: Metrics, role: RoleName, *, registry: CollectorRegistry, health: Health, ready: Callable[[], Ready]
) -> Iterator[None]:
    """Serve the pages of `role` for the length of a block; nothing at all when its port is 0.

    A port in use is logged and tried again: the role's work matters more than its figures.
    """
    port = settings.port(role)
    if not port:
        yield
        return
    registry.register(_State(health, ready))
    stop = threading.Event()
    pages = _Pages(role, registry, health, ready)
    server = threading.Thread(target=_serve, args=(settings.host, port, pages, stop), name="metrics", daemon=True)
    server.start()
    try:
        yield
    finally:
        stop.set()
        server.join(2 * _POLL_S)


class _State:
    """Health and readiness as figures, so that one scrape tells all."""

    def __init__(self, health: Health, ready: Callable[[], Ready]) -> None:
        self._health, self._ready = health, ready

    def collect(self) -> Iterator[Metric]:
        healthy, ready = not self._health.stuck(), not self._ready().troubles
        yield GaugeMetricFamily("osteon_healthy", "1 when every loop of the role turns, as /healthz says", value=healthy)
        yield GaugeMetricFamily("osteon_ready", "1 when the role can do its job, as /readyz says", value=ready)
        ages = GaugeMetricFamily("osteon_loop_age_seconds", "Seconds since a loop of the role last turned", labels=["loop"])
        for name, age_s in self._health.ages().items():
            ages.add_metric([name], age_s)
        yield ages


class _Told:
    """A registry without the times at which its series were made: half of the page, and used by nothing."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


@dataclass(frozen=True, slots=True)
class _Answer:
    code: int
    content_type: str
    body: bytes


class _Pages:
    """What is answered to each path."""

    def __init__(self, role: str, registry: CollectorRegistry, health: Health, ready: Callable[[], Ready]) -> None:
        self._role, self._registry, self._health, self._ready = role, registry, health, ready

    def answer(self, path: str) -> _Answer:
        if path == "/healthz":
            stuck, ages = self._health.stuck(), self._health.ages()
            told = {"stuck": stuck, "seconds_since_turn": {name: round(age_s, 1) for name, age_s in ages.items()}}
            return self._json(503 if stuck else 200, {"healthy": not stuck, **told})
        if path == "/readyz":
            ready = self._ready()
            return self._json(
                503 if ready.troubles else 200, {"ready": not ready.troubles, "troubles": list(ready.troubles), **ready.told}
            )
        if path == "/metrics":
            return _Answer(200, TEXT_FORMAT, generate_latest(_Told(self._registry)))
        return self._json(404, {"pages": ["/healthz", "/readyz", "/metrics"]})

    def _json(self, code: int, told: Mapping[str, object]) -> _Answer:
        return _Answer(code, "application/json", json.dumps({"role": self._role, **told}, default=str).encode() + b"\n")


def _serve(host: str, port: int, pages: _Pages, stop: threading.Event) -> None:
    """Answer until `stop`; the thread of `serving`."""
    said = False
    while not stop.is_set():
        try:
            server = _Server(host, port, pages)
        except OSError as error:
            if not said:
                event(
                    log, "metrics not served", level=logging.ERROR, host=host, port=port, error=error.strerror, again_in_s=AGAIN_S
                )
                said = True
            stop.wait(AGAIN_S)
            continue
        with server:
            event(log, "metrics served", host=host, port=port)
            while not stop.is_set():
                server.handle_request()


class _Server(ThreadingHTTPServer):
    """The standard library's server, with bounds."""

    daemon_threads = True
    timeout = _POLL_S

    def __init__(self, host: str, port: int, pages: _Pages) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.pages = pages
        self._free = threading.BoundedSemaphore(THREADS)
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server for the name of this machine, as HTTPServer would."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, unless too many are at work."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, then let the next one in."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: a client that went away is nobody's trouble, and the standard answer is a traceback."""


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of three pages."""

    server: _Server
    timeout = REQUEST_S
    server_version, sys_version = "osteon", ""

    def do_GET(self) -> None:
        """Answer with a page."""
        self._send(with_body=True)

    def do_HEAD(self) -> None:
        """Answer with the head of a page."""
        self._send(with_body=False)

    def _send(self, *, with_body: bool) -> None:
        answer = self.server.pages.answer(self.path)
        self.send_response(answer.code)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if with_body:
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the standard library's
        """Log nothing: a scrape is no unit of work."""
