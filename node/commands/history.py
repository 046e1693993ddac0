"""`osteon history`: who did what to which study, patient, held object, delivery or switch, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from node.options import DEFAULT_CONFIG, Config


def history(
    subject: Annotated[
        str,
        typer.Option(
            "--subject",
            help="Only what was done to this: a pseudonym, a held object's id, a delivery, a version, vault, answers.",
        ),
    ] = "",
    limit: Annotated[int, typer.Option("--limit", help="So many lines at most, the newest.", min=1)] = 100,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Show what people did on this node, each with its reason, the newest last."""
    from node import settings
    from node.keep.catalogue import Catalogue

    with Catalogue.open(settings.load(config).storage.catalogue) as catalogue:
        acts = catalogue.history.acts(subject=subject, limit=limit)
    for act in reversed(acts):
        typer.echo(f"{act.at.astimezone():%Y-%m-%d %H:%M:%S}  {act.by:<12}  {act.what:<28}  {act.subject}  {act.reason}".rstrip())
    if not acts:
        typer.echo("Nobody did anything" + (f" to {subject}." if subject else " yet."))
