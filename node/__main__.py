"""The command `osteon`: hangs the verbs together and turns errors into exit codes.

Nothing heavy is imported here: `osteon --help` answers at once, and each verb imports what it needs when it runs.
"""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points

import typer

from models.errors import OsteonError, Retriable
from node import logs

EXIT_FAULT = 1
EXIT_FINAL = 2
EXIT_RETRIABLE = 75  # EX_TEMPFAIL of sysexits.h


def build() -> typer.Typer:
    """Put the verbs of the node and those that installed packages add (entry-point group `osteon.verbs`) into one app."""
    from node.commands import (
        archive,
        backup,
        check,
        delivery,
        demo,
        history,
        init,
        labels,
        models,
        patients,
        quarantine,
        receive,
        reply,
        serve,
        status,
        vault,
    )

    app = typer.Typer(
        name="osteon",
        help="A PACS-integrated DICOM node that learns from its own archive. Research use only.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for verb in (init.init, check.check, serve.serve, receive.receive, status.status, history.history, backup.restore, demo.demo):
        app.command()(verb)
    for name, group in (
        ("reply", reply.app),
        ("labels", labels.app),
        ("models", models.app),
        ("quarantine", quarantine.app),
        ("delivery", delivery.app),
        ("patients", patients.app),
        ("vault", vault.app),
        ("backup", backup.app),
        ("archive", archive.app),
    ):
        app.add_typer(group, name=name)
    for entry in entry_points(group="osteon.verbs"):
        app.add_typer(entry.load(), name=entry.name)
    return app


def main() -> None:
    """Run the command line; an error of Osteon is one line and an exit code (2 final, 75 try again).

    Any other error is a fault of ours: where it happened is told, not what it said, for that may name a patient.
    """
    logs.configure(stream=sys.stderr, level=logging.WARNING)
    try:
        build()()
    except OsteonError as error:
        typer.echo(f"osteon: {error}", err=True)
        sys.exit(EXIT_RETRIABLE if isinstance(error, Retriable) else EXIT_FINAL)
    except Exception as error:
        typer.echo(f"osteon: {logs.where(error)}", err=True)
        sys.exit(EXIT_FAULT)


if __name__ == "__main__":
    main()
