"""`osteon models`: what is on the shelf, which version is in service, and who put it there."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from node.options import DEFAULT_CONFIG, Config, login

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from models.card import Card, StartWeights
    from models.registry import Move, Registry
    from node.keep.catalogue import Catalogue
    from node.settings import Settings

app = typer.Typer(help="Model versions: what is on the shelf and which one is in service.", no_args_is_help=True)

Version = Annotated[str, typer.Argument(help="A version as `osteon models list` names it.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it stays in the history.")]
By = Annotated[str, typer.Option("--by", help="Who decides.  [default: the login name]", show_default=False)]

FETCH_TIMEOUT_S = 30.0


@app.command("list")
def list_models(config: Config = DEFAULT_CONFIG) -> None:
    """List all versions with the AUC of each, and which one is in service; `osteon models show` gives every figure."""
    from rich.table import Table

    registry = _registry(config)
    if not registry.versions():
        typer.echo("no version yet; `osteon train run` makes one")
        return
    named = {registry.alias(alias): alias for alias in ("challenger", "champion")}
    table = Table("alias", "version", "made on", "recipe", "metrics (95 % interval; patients)", "gate")
    cards = {version: _card(registry, version) for version in registry.versions()}
    for version in (damaged for damaged, card in cards.items() if card is None):
        table.add_row(named.get(version, ""), version, "", "", "DAMAGED: its card is not the one that was shelved", "")
    for card, version in sorted(((card, each) for each, card in cards.items() if card), key=lambda row: row[0].created_at):
        # its own AUC, out of fold and on the locked patients; not those of the baselines
        metrics = "\n".join(line for line in _metrics(card) if re.match(r"AUC, [^,]+ \d", line)) or "none"
        table.add_row(named.get(version, ""), version, _local(card.created_at), card.recipe, metrics, card.decision)
    _console().print(table)


@app.command()
def show(
    version: Annotated[str, typer.Argument(help="A version; the one in service when none is given.")] = "",
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Show the card of a version, after checking its files against it."""
    from models.errors import NoModel

    registry = _registry(config)
    version = version or registry.champion() or ""
    if not version:
        raise NoModel
    card = registry.verify(version)
    typer.echo(f"version   {version}{'  (in service)' if version == registry.champion() else ''}")
    typer.echo(f"folder    {registry.folder(version)}")
    typer.echo(f"files     as the card states; trained on {len(registry.corpus(version))} patients")
    typer.echo(card.to_json(), nl=False)


@app.command()
def promote(version: Version, reason: Reason, by: By = "", config: Config = DEFAULT_CONFIG) -> None:
    """Put a version into service: a decision of a named person, for a stated reason.

    A version that was trained on a locked patient is refused. Studies that were answered before are not answered again.
    """
    from node.keep.catalogue import Catalogue

    site = _settings(config)
    registry = _shelf(site)
    before = registry.champion()
    card = registry.card(version)
    with Catalogue.open(site.storage.catalogue) as catalogue:
        locked = catalogue.instances.locked_patients()
        move = registry.promote(
            version, by=by or login(), reason=reason, decision=card.decision, now=datetime.now(UTC), locked=locked
        )
        if before == version:
            typer.echo(f"{version} is in service already, since {_local(move.at)}, by {move.by}: {move.reason}")
            return
        _note(catalogue, "model promoted", move)
    _say(registry, move)
    typer.echo(f"the gate had said: {card.decision}" + (f" ({card.decision_reason})" if card.decision_reason else ""))


@app.command()
def rollback(reason: Reason, by: By = "", config: Config = DEFAULT_CONFIG) -> None:
    """Put the version that was in service before back into service."""
    from node.keep.catalogue import Catalogue

    site = _settings(config)
    registry = _shelf(site)
    with Catalogue.open(site.storage.catalogue) as catalogue:
        registry.rollback(by=by or login(), reason=reason, now=datetime.now(UTC))
        _note(catalogue, "model rolled back to", registry.history()[-1])
    _say(registry, registry.history()[-1])


@app.command()
def history(
    at: Annotated[str, typer.Option("--at", help="Say only what was in service then: 2026-03-01T14:05, local time.")] = "",
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Show which version was in service when, put there by whom and why."""
    from rich.table import Table

    registry = _registry(config)
    if at:
        moment = _moment(at)
        move = registry.champion_at(moment)
        if move is None:
            typer.echo(f"no model was in service on {_local(moment)}")
        else:
            typer.echo(f"{move.version} was in service on {_local(moment)}: {_told(move)}")
        return
    table = Table("when", "what", "alias", "version", "instead of", "by", "reason", "the gate had said")
    for move in registry.history():
        table.add_row(
            _local(move.at), move.action, move.alias, move.version, move.previous or "-", move.by, move.reason, move.decision
        )
    _console().print(table)


@app.command()
def fetch(
    arch: Annotated[list[str] | None, typer.Argument(help="resnet18, resnet50, densenet201; all when none is given.")] = None,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Bring start weights (ImageNet) from the network to this machine. No training run ever does."""
    from models.card import IMAGENET
    from models.errors import NoSuchWeights

    folder = _settings(config).storage.root / "models" / "weights"
    offered = {name: weights for name, weights in IMAGENET.items() if weights.url}
    for name in arch or offered:
        if name not in offered:
            raise NoSuchWeights(f"there is nothing to fetch for {name!r}; to be fetched: {', '.join(offered)}")
        typer.echo(_fetch(offered[name], folder))


def _fetch(weights: StartWeights, folder: Path) -> str:
    import urllib.error
    import urllib.request

    from models import durable
    from models.card import sha256
    from models.errors import Tampered
    from node.errors import PeerAway

    file = folder / weights.filename
    if file.is_file() and weights.is_hash(sha256(file.read_bytes())):
        return f"{file} is there already"
    try:
        with urllib.request.urlopen(weights.url, timeout=FETCH_TIMEOUT_S) as answer:  # noqa: S310 - https, from a constant
            data = answer.read()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise PeerAway(
            f"{weights.url} cannot be reached ({reason}): fetch it on a machine with a network and put it to {file}"
        ) from None
    if not weights.is_hash(sha256(data)):
        raise Tampered(f"what {weights.url} gave does not have the hash {weights.sha256}; it is not kept")
    durable.write(file, data)
    known = "hash" if len(weights.sha256) == 64 else f"first {len(weights.sha256)} digits of the hash"
    return f"{file}: {len(data) / 1e6:.0f} MB, {known} as expected ({weights.licence})"


# --- what the verbs share -----------------------------------------------------------------------------------------------------


def _settings(config: Path) -> Settings:
    from node import settings

    return settings.load(config)


def _shelf(site: Settings) -> Registry:
    from models.registry import Registry

    return Registry(site.storage.root / "models")


def _registry(config: Path) -> Registry:
    return _shelf(_settings(config))


def _note(catalogue: Catalogue, what: str, move: Move) -> None:
    """Let `osteon history` tell it beside everything else; the shelf's own history is the one that counts."""
    catalogue.history.note(by=move.by, what=what, subject=move.version, reason=move.reason, now=move.at)


def _say(registry: Registry, move: Move) -> None:
    """Print what a move changed."""
    typer.echo(f"in service now: {move.version}, by {move.by}: {move.reason}")
    typer.echo(f"instead of:     {move.previous or 'nothing'}")
    for name, version in (("now", move.version), ("before", move.previous)):
        card = _card(registry, version) if version else None  # one goes back because of a damaged version, too
        for line in _metrics(card) if card else []:
            typer.echo(f"  {name:<7} {line}")


def _card(registry: Registry, version: str) -> Card | None:
    """Read a card; None when it, or its whole version, is damaged or gone."""
    from models.errors import NoSuchVersion, Tampered

    try:
        return registry.card(version)
    except (NoSuchVersion, Tampered):
        return None


def _metrics(card: Card) -> list[str]:
    return [f"{each.name} {each.value:.3f} ({each.low:.3f} to {each.high:.3f}; n = {each.n})" for each in card.metrics]


def _told(move: Move) -> str:
    return f"{move.action} by {move.by} on {_local(move.at)}, reason: {move.reason}; the gate had said: {move.decision}"


def _local(at: datetime) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}"


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise typer.BadParameter("a time like 2026-03-01T14:05 is needed", param_hint="--at") from None


def _console() -> Console:
    from rich.console import Console

    console = Console(markup=False)  # a reason may hold brackets
    return console if console.is_terminal else Console(markup=False, width=200)  # a pipe has no width: do not break at 80
