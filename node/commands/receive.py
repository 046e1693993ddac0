"""`osteon receive`: the role that receives."""

from __future__ import annotations

from node.options import DEFAULT_CONFIG, Config


def receive(config: Config = DEFAULT_CONFIG) -> None:
    """Receive studies (C-STORE, C-ECHO), pseudonymise and archive them, until SIGTERM or Ctrl-C."""
    import logging
    import os
    import socket
    from contextlib import suppress

    from models.errors import Retriable
    from node import daemon, logs, settings
    from node.metrics import figures
    from node.metrics.certificates import Certificates
    from node.metrics.meters import ReceiveMeters, new_registry
    from node.metrics.serve import Health, Ready, serving
    from node.receive.association import Listener
    from node.receive.intake import Intake

    site = settings.load(config)
    logs.configure(role="receive")
    log = logging.getLogger("osteon.receive")
    registry, health = new_registry(site.storage), Health()
    meters = ReceiveMeters(registry, callers=[caller.ae_title for caller in site.node.callers])
    with daemon.stop_on_signals() as stop:
        intake = Intake.open(site, meters=meters)
        registry.register(figures.of_reception(intake.catalogue))
        registry.register(Certificates({"listener": site.node.tls.certificate}))
        listener = Listener(site.node, health.work("intake", intake.take_in), meters=meters)

        def ready() -> Ready:
            deaf = [] if listener.listens() else ["nobody listens on the DICOM port"]
            return Ready(deaf + intake.troubles(), {"ae_title": site.node.ae_title, **listener.where()})

        def beat() -> None:
            listener.renew()
            intake.beat(listener.where())

        def step() -> bool:
            listener.check()
            return False

        try:
            listener.start()
            logs.event(log, "listening", ae_title=site.node.ae_title, **listener.where())
            with serving(site.metrics, "receive", registry=registry, health=health, ready=ready):
                daemon.run(health.loop("listen", step), stop, heartbeat=beat)
        finally:
            listener.stop()
            with suppress(Retriable):  # without a catalogue it ends all the same, and shows as silent
                intake.catalogue.roles.leave("receive", socket.gethostname(), os.getpid())
            intake.close()
            logs.event(log, "stopped")
