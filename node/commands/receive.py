"""`osteon receive`: the role that receives."""

from __future__ import annotations

from node.commands.options import DEFAULT_CONFIG, Config


def receive(config: Config = DEFAULT_CONFIG) -> None:
    """Receive studies (C-STORE, C-ECHO), pseudonymise and archive them, until SIGTERM or Ctrl-C."""
    import logging
    import os
    import socket
    from datetime import UTC, datetime

    from node import daemon, logs, settings
    from node.keep.records import Role
    from node.receive.association import Listener
    from node.receive.intake import Intake

    site = settings.load(config)
    logs.configure()
    log = logging.getLogger("osteon.receive")
    with daemon.stop_on_signals() as stop:
        intake = Intake.open(site)
        listener = Listener(site.node, intake.take_in)
        try:
            listener.start()
            logs.event(log, "listening", ae_title=site.node.ae_title, **listener.where())

            def beat() -> None:
                listener.renew()
                role = Role(
                    name="receive", host=socket.gethostname(), pid=os.getpid(), seen_at=datetime.now(UTC), told=listener.where()
                )
                intake.catalogue.roles.beat(role)

            def step() -> bool:
                listener.check()
                return False

            daemon.run(step, stop, heartbeat=beat)
        finally:
            listener.stop()
            intake.catalogue.roles.leave("receive", socket.gethostname(), os.getpid())
            intake.close()
            logs.event(log, "stopped")
