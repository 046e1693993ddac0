"""`osteon delivery`: what is on its way to which PACS, and starting again what was held or given up."""

from __future__ import annotations

from typing import Annotated

import typer

from node.options import DEFAULT_CONFIG, Config, login

app = typer.Typer(help="See what is on its way to which PACS; start again what was held or given up.", no_args_is_help=True)


@app.command("list")
def show(
    state: Annotated[str, typer.Option("--state", help="Only these: pending, sent, held or dead; several with commas.")] = "",
    config: Config = DEFAULT_CONFIG,
) -> None:
    """List deliveries, one line each: its number, state, destination, study (pseudonymous UID), attempts and what is next."""
    from node import settings
    from node.keep.catalogue import Catalogue
    from node.keep.records import DeliveryState

    known = [known.value for known in DeliveryState]
    wanted = [name.strip() for name in state.split(",") if name.strip()]
    if unknown := sorted(set(wanted) - set(known)):
        raise typer.BadParameter(f"{', '.join(unknown)}: no such state; there are {', '.join(known)}", param_hint="--state")
    with Catalogue.open(settings.load(config).storage.catalogue) as catalogue:
        rows = catalogue.deliveries.list([DeliveryState(name) for name in wanted] or None)
    if not rows:
        typer.echo("No deliveries" + (f" that are {' or '.join(wanted)}." if wanted else "."))
        return
    typer.echo(f"{'ID':>6}  {'STATE':8} {'DESTINATION':16} {'ATTEMPTS':>8}  {'NEXT OR SENT':16}  STUDY")
    for row in rows:
        at = row.sent_at or (row.next_attempt_at if row.state is DeliveryState.PENDING else None)
        when = "" if at is None else f"{at.astimezone():%Y-%m-%d %H:%M}"
        typer.echo(f"{row.id:>6}  {row.state:8} {row.destination:16} {row.attempts:>8}  {when:16}  {row.study_uid}")
        if row.reason and row.state is not DeliveryState.SENT:
            typer.echo(f"{'':8}{row.reason}")


@app.command()
def retry(
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the history.")],
    which: Annotated[int | None, typer.Argument(metavar="[ID]", help="Number of the delivery, as `list` shows it.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that are held, dead or put off.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Offer a held or dead delivery to its PACS again, with its full time for retries; what was put off is due now."""
    from datetime import UTC, datetime

    from node import settings
    from node.errors import NotFound
    from node.keep.catalogue import Catalogue

    if (which is None) != everything:
        raise typer.BadParameter("give either the number of a delivery or --all")
    with Catalogue.open(settings.load(config).storage.catalogue) as catalogue:
        revived = catalogue.deliveries.revive(which, datetime.now(UTC), by=login(), reason=reason)
    if which is not None and not revived:
        raise NotFound(f"delivery {which} is sent, or about to be; `osteon delivery list --state held,dead` shows what is not")
    typer.echo(f"{revived} to be sent again.")
