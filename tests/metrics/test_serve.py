"""The pages of a role: what they say, and that they never get into the way of its work."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import monotonic

import pages
import pytest
from prometheus_client import CollectorRegistry, Counter
from roles import until

from node.metrics import serve
from node.metrics.figures import Figures
from node.metrics.serve import Health, Ready, serving
from node.settings import Metrics

Serve = Callable[..., AbstractContextManager[CollectorRegistry]]


@pytest.fixture
def port(free_port: Callable[[], int]) -> int:
    return free_port()


@pytest.fixture
def served(port: int) -> Serve:
    """Serve the pages of a receiver for a block; give its registry."""

    @contextmanager
    def serve_them(health: Health | None = None, ready: Callable[[], Ready] = Ready) -> Iterator[CollectorRegistry]:
        registry = CollectorRegistry()
        settings = Metrics(receive_port=port)
        with serving(settings, "receive", registry=registry, health=health or Health(), ready=ready):
            until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), told="the pages")
            yield registry

    return serve_them


def test_a_role_shows_three_pages_and_nothing_else(served: Serve, port: int) -> None:
    with served() as registry:
        Counter("osteon_things", "Things", registry=registry).inc(3)
        assert pages.told(port, "/healthz")[1]["role"] == "receive"
        assert pages.value(pages.scrape(port), "osteon_things_total") == 3
        for path in ("/", "/metrics/", "/metrics?name[]=osteon_things_total", "/../ae_config.toml", "/healthz/../metrics"):
            assert pages.get(port, path)[0] == 404, path
        for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "OPTIONS"):
            assert pages.get(port, "/metrics", method=method)[0] == 501, method
        assert pages.get(port, "/metrics", method="HEAD") == (200, "")


def test_only_loopback_is_reached(served: Serve, port: int) -> None:
    with served():
        names = {row[4][0] for row in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        for address in names - {"127.0.0.1", "127.0.1.1"}:
            with socket.socket() as caller:
                caller.settimeout(2)
                assert caller.connect_ex((address, port)) != 0


def test_a_loop_that_does_not_turn_makes_the_role_unhealthy(served: Serve, port: int) -> None:
    now = [1000.0]
    health = Health(lambda: now[0])
    inside = threading.Event()
    turn, other = health.loop("work", lambda: inside.is_set(), stuck_s=60), health.loop("other", lambda: False, stuck_s=60)
    with served(health):
        assert pages.told(port, "/healthz")[0] == 200
        now[0] += 61
        other()
        code, told = pages.told(port, "/healthz")
        assert (code, told["healthy"], told["stuck"]) == (503, False, ["work"])
        samples = pages.scrape(port)
        assert pages.value(samples, "osteon_healthy") == 0
        assert pages.value(samples, "osteon_loop_age_seconds", loop="work") == 61
        turn()
        assert pages.told(port, "/healthz")[0] == 200


def test_a_step_that_began_long_ago_and_has_not_returned_is_stuck() -> None:
    now = [0.0]
    health = Health(lambda: now[0])
    seen: list[list[str]] = []

    def step() -> bool:
        now[0] += 100
        seen.append(health.stuck())
        return True

    assert health.loop("work", step, stuck_s=60)() is True
    assert seen == [["work"]]
    assert health.stuck() == []


def test_work_that_does_not_come_to_its_end_is_stuck() -> None:
    now = [0.0]
    health = Health(lambda: now[0])
    go, inside = threading.Event(), threading.Barrier(3)

    def work(number: int, *, twice: bool) -> int:
        inside.wait(30)
        go.wait(30)
        return number * (1 + twice)

    take_in = health.work("intake", work, stuck_s=60)
    assert health.ages() == {"intake": 0}
    threads = [threading.Thread(target=take_in, args=(number,), kwargs={"twice": True}) for number in (1, 2)]
    for thread in threads:
        thread.start()
    inside.wait(30)
    now[0] += 61
    assert health.stuck() == ["intake"]
    go.set()
    for thread in threads:
        thread.join(30)
    assert (health.ages(), health.stuck()) == ({"intake": 0}, [])


def test_an_unready_role_says_why(served: Serve, port: int) -> None:
    troubles: list[str] = []
    with served(ready=lambda: Ready(troubles, {"model": "v1"})):
        assert pages.told(port, "/readyz") == (200, {"role": "receive", "ready": True, "troubles": [], "model": "v1"})
        troubles.append("the disk is full")
        code, told = pages.told(port, "/readyz")
        assert (code, told["ready"], told["troubles"]) == (503, False, ["the disk is full"])
        assert pages.value(pages.scrape(port), "osteon_ready") == 0


def test_a_port_in_use_is_said_once_and_tried_again(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serve, "AGAIN_S", 0.05)
    caplog.set_level(logging.INFO, "osteon")
    with socket.create_server(("127.0.0.1", port)) as other:
        began = monotonic()
        with serving(Metrics(receive_port=port), "receive", registry=CollectorRegistry(), health=Health(), ready=Ready):
            assert monotonic() - began < 5, "the role does not wait for its pages"
            until(lambda: caplog.records)
            other.close()
            until(lambda: len(caplog.records) > 1)
            assert pages.told(port, "/healthz")[0] == 200
    first, second = caplog.records
    assert (first.getMessage(), second.getMessage()) == ("metrics not served", "metrics served")
    assert first.osteon_fields["port"] == port  # type: ignore[attr-defined]


def test_a_port_of_0_shows_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "osteon")
    before = threading.active_count()
    with serving(Metrics(reply_port=0), "reply", registry=CollectorRegistry(), health=Health(), ready=Ready):
        assert threading.active_count() == before
    assert not caplog.records


def test_silent_clients_are_few_and_do_not_hold_up_the_end(served: Serve, port: int) -> None:
    with served():
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(serve.THREADS)]
        until(lambda: _is_closed_at_once(port), told="one more is closed")
        ended = monotonic()
    assert monotonic() - ended < 3
    for each in silent:
        each.close()


def test_a_place_is_free_again_when_a_client_is_gone(served: Serve, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve._Handler, "timeout", 0.2)
    with served():
        for _ in range(3 * serve.THREADS):
            assert pages.told(port, "/healthz")[0] == 200
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(serve.THREADS)]
        try:
            until(lambda: _answers(port), told="after the silent ones have had their time")
        finally:
            for each in silent:
                each.close()


def _is_closed_at_once(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port)) as one_more:
        one_more.settimeout(1)
        try:
            return one_more.recv(1) == b""
        except TimeoutError:
            return False


def _answers(port: int) -> bool:
    try:
        return pages.told(port, "/healthz")[0] == 200
    except (ConnectionError, OSError):
        return False


# --- figures of the catalogue ----------------------------------------------------------------------------------------------


def counted(registry: CollectorRegistry) -> float:
    Counter("osteon_things", "Things", registry=registry).inc()
    return 1


def test_a_catalogue_that_fails_costs_its_own_figures_alone(served: Serve, port: int) -> None:
    def fail() -> int:
        raise RuntimeError("SECRET^NAME")

    with served() as registry:
        registry.register(Figures(fail, lambda _found: iter(())))
        counted(registry)
        samples = pages.scrape(port)
        assert pages.value(samples, "osteon_things_total") == 1
        assert pages.value(samples, "osteon_scrape_errors_total") == 1
        assert pages.value(pages.scrape(port), "osteon_scrape_errors_total") == 2, "an error is not kept: it is asked again"
        assert "SECRET" not in pages.get(port, "/metrics")[1]


def test_a_catalogue_that_hangs_keeps_a_scrape_for_a_moment_only(
    served: Serve, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.metrics.figures.WAIT_S", 0.1)
    go, asked = threading.Event(), []

    def hang() -> int:
        asked.append(1)
        go.wait(60)
        return 1

    with served() as registry:
        registry.register(Figures(hang, lambda _found: iter(())))
        counted(registry)
        for _ in range(3):
            samples = pages.scrape(port)
            assert pages.value(samples, "osteon_things_total") == 1
        assert pages.value(samples, "osteon_scrape_errors_total") == 3
        assert asked == [1], "one question at a time"
        go.set()
        until(lambda: pages.value(pages.scrape(port), "osteon_scrape_errors_total") == 3)


def test_a_storm_of_scrapes_is_one_question() -> None:
    now, asked = [0.0], []

    def ask() -> int:
        asked.append(1)
        return len(asked)

    figures = Figures(ask, lambda _found: iter(()), clock=lambda: now[0])
    storm = [threading.Thread(target=lambda: list(figures.collect())) for _ in range(20)]
    for thread in storm:
        thread.start()
    for thread in storm:
        thread.join(30)
    assert asked == [1]
    now[0] += 6
    list(figures.collect())
    assert asked == [1, 1]
