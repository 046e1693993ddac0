"""`osteon receive` as a process: it says where it listens, takes in, shows that it lives, and ends when told."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import studies
from roles import Role, send, until

from node import logs
from node.commands import receive
from node.keep.catalogue import Catalogue
from node.receive import association
from node.settings import load


def test_the_role_takes_in_until_it_is_told_to_stop(site: Path) -> None:
    role = Role("receive", "--config", str(site))
    try:
        listening = role.event("listening")
        assert role.events[0] is listening  # the first line names the port
        assert send(studies.study(images=2), port=listening["port"]) == [0x0000, 0x0000]
        with Catalogue.open(load(site).storage.catalogue) as catalogue:
            assert catalogue.instances.count() == 2
            assert until(lambda: [sign.name for sign in catalogue.roles.all()]) == ["receive"]
        role.process.send_signal(signal.SIGTERM)
        assert role.wait(20) == 0
        with Catalogue.open(load(site).storage.catalogue) as catalogue:
            assert catalogue.roles.all() == [], "what ended in good order is not silent"
    finally:
        role.close()
    told = ["listening", "association accepted", "instance stored", "instance stored", "stopped"]
    assert [line["event"] for line in role.events] == told
    assert not role.noise


def test_an_address_that_is_taken_is_said_in_one_line(site: Path) -> None:
    first = Role("receive", "--config", str(site))
    try:
        port = first.event("listening")["port"]
        site.write_text(site.read_text("utf-8").replace("port = 0", f"port = {port}", 1), "utf-8")
        second = Role("receive", "--config", str(site))
        assert second.wait(30) == 2
        assert any("cannot listen" in line for line in second.noise)
        assert not any("Traceback" in line for line in second.noise)
    finally:
        first.close()


def test_a_receiver_that_listens_no_more_ends_instead_of_looking_alive(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "configure", lambda **_role: None)
    ends = lambda self: setattr(self, "_BaseServer__shutdown_request", True)  # noqa: E731  its loop returns after one turn
    monkeypatch.setattr(association._Server, "service_actions", ends)
    with pytest.raises(RuntimeError, match="listener has ended"):
        receive.receive(site)
