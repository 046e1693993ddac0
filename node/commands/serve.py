"""`osteon serve`: all roles of this machine as supervised child processes."""

from __future__ import annotations

import sys

import typer

from node.options import DEFAULT_CONFIG, Config


def serve(config: Config = DEFAULT_CONFIG) -> None:
    """Run every role of this machine until SIGTERM or Ctrl-C: receive, reply and, where it can train, the schedule.

    A role that ends is started again.
    """
    import logging

    from node import logs, settings
    from node.daemon import stop_on_signals
    from node.supervise import Child, supervise

    site = settings.load(config)
    logs.configure(role="serve")
    names = ["receive", "reply"]
    if site.schedule and missing_to_train():
        told = f"{', '.join(missing_to_train())} is not installed"
        logs.event(logging.getLogger("osteon.serve"), "schedules are not run here", level=logging.WARNING, why=told)
    elif site.schedule:
        names.append("schedule")
    roles = [Child(role, (sys.executable, "-m", "node", role, "--config", str(config.resolve()))) for role in names]
    with stop_on_signals() as stop:
        raise typer.Exit(supervise(roles, stop))


def missing_to_train() -> list[str]:
    """Name the libraries without which this machine can train nothing; they are looked for, not loaded."""
    from importlib.util import find_spec

    return [name for name in ("apscheduler", "torch", "torchvision") if find_spec(name) is None]
