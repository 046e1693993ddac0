"""`osteon quarantine`: see what could not be taken in safely, and decide.

In: an id and a reason. Out: lines that name no patient. Nothing here opens what is sealed but a release.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from node.commands.options import DEFAULT_CONFIG, Config, login
from node.errors import NotFound

if TYPE_CHECKING:
    from node.keep.quarantine import Quarantine
    from node.settings import Settings

app = typer.Typer(help="What could not be taken in safely: list, show, release, discard.", no_args_is_help=True)

HeldId = Annotated[str, typer.Argument(metavar="ID", help="As `osteon quarantine list` gives it.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the history.", prompt="Why")]

LOST = "not in the catalogue"
"""A sealed file whose writing was cut short before its row: its sender was told no success and sends it again."""


@app.command("list")
def list_held(config: Config = DEFAULT_CONFIG) -> None:
    """List what is held: id, when it came, reason, modality, pseudonym of the study."""
    from node.keep.catalogue import Catalogue

    site = _settings(config)
    with Catalogue.open(site.storage.catalogue) as catalogue:
        held = catalogue.instances.held()
    for one, at in held:
        typer.echo(
            f"{one.id}  {at.astimezone():%Y-%m-%d %H:%M}  {one.reason:<28}  {one.modality or '-':<4}  {one.study_uid or '-'}"
        )
    lost = sorted(set(_quarantine(site).ids()) - {one.id for one, _at in held})
    for held_id in lost:
        typer.echo(f"{held_id}  {'-':<16}  {LOST}")
    if not held and not lost:
        typer.echo("The quarantine is empty.")


@app.command()
def show(held_id: HeldId, config: Config = DEFAULT_CONFIG) -> None:
    """Show what may be said of one held object without opening it, and what can be done."""
    from node.keep.catalogue import Catalogue
    from node.receive.intake import RELEASABLE

    with Catalogue.open(_settings(config).storage.catalogue) as catalogue:
        found = catalogue.instances.held_one(held_id)
    if found is None:
        raise _unknown(held_id)
    held, at = found
    facts = {
        "id": held.id,
        "held since": f"{at.astimezone():%Y-%m-%d %H:%M}",
        "reason": held.reason,
        "detail": held.detail,
        "modality": held.modality,
        "SOP class": held.sop_class_uid,
        "patient": held.pid,
        "study": held.study_uid,
        "instance": held.sop_uid,
        "sent by": held.calling_ae,
        "purpose": held.purpose,
    }
    for name, value in facts.items():
        typer.echo(f"{name:<11}{value or '-'}")
    if held.reason in RELEASABLE:
        typer.echo("release    puts it into the archive, pseudonymised; the pixels stay as they are, so look at the image first")
    else:
        typer.echo("release    is refused while the reason stands: mend it at its source and send it again")
    typer.echo("discard    removes it for good")


@app.command()
def release(held_id: HeldId, reason: Reason, config: Config = DEFAULT_CONFIG) -> None:
    """Take a held image in after all; only for a reason that a person who has seen the image may overrule."""
    from node.receive.intake import Intake

    intake = Intake.open(_settings(config))
    try:
        taken = intake.release(held_id, by=login(), reason=reason)
    finally:
        intake.close()
    typer.echo(f"{held_id} is released: {taken}")


@app.command()
def discard(
    held_id: HeldId,
    reason: Reason,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Remove a held object for good."""
    from node.keep.catalogue import Catalogue

    site = _settings(config)
    quarantine = _quarantine(site)
    with Catalogue.open(site.storage.catalogue) as catalogue:
        found = catalogue.instances.held_one(held_id)
        if found is None and held_id not in quarantine.ids():
            raise _unknown(held_id)
        if not yes:
            typer.confirm(f"Remove {held_id} ({found[0].reason if found else LOST}) for good?", abort=True)
        # The file first: should the rest be cut short, the row is still listed and the patient's data are gone.
        quarantine.discard(held_id)
        if found is not None:
            catalogue.instances.unhold(held_id, by=login(), reason=reason, decision="discarded", now=datetime.now(UTC))
    typer.echo(f"{held_id} is removed.")


def _unknown(held_id: str) -> NotFound:
    return NotFound(f"the quarantine holds nothing under {held_id}; `osteon quarantine list` shows what it holds")


def _settings(config: Config) -> Settings:
    from node import settings

    return settings.load(config)


def _quarantine(site: Settings) -> Quarantine:
    from node.keep.quarantine import Quarantine
    from node.settings import load_key

    return Quarantine(site.storage.root / "quarantine", load_key(site.storage.vault_key))
