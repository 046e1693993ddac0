"""`osteon serve`: all roles of this machine as supervised child processes."""

from __future__ import annotations

import sys

import typer

from node.commands.options import DEFAULT_CONFIG, Config


def serve(config: Config = DEFAULT_CONFIG) -> None:
    """Run every role of this machine (receive and reply) until SIGTERM or Ctrl-C; a role that ends is started again."""
    from node import logs, settings
    from node.daemon import stop_on_signals
    from node.supervise import Child, supervise

    settings.load(config)
    logs.configure()
    roles = [
        Child(role, (sys.executable, "-m", "node", role, "--config", str(config.resolve()))) for role in ("receive", "reply")
    ]
    with stop_on_signals() as stop:
        raise typer.Exit(supervise(roles, stop))
