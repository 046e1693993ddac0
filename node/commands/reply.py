"""`osteon reply`: run the role, switch answers off and on, answer one study by hand."""

from __future__ import annotations

from typing import Annotated

import typer

from node.options import DEFAULT_CONFIG, Config, login

app = typer.Typer(help="Classify complete studies and return SRs; without a further word, run the role.")

Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the history.")]


@app.callback(invoke_without_command=True)
def run(context: typer.Context, config: Config = DEFAULT_CONFIG) -> None:
    """Run the role until SIGTERM or Ctrl-C."""
    if context.invoked_subcommand is not None:
        source = context.get_parameter_source("config")
        if source is not None and source.name == "COMMANDLINE":  # the verb reads its own: it would act on another site
            raise typer.BadParameter(f"give it after the verb: osteon reply {context.invoked_subcommand} --config {config}",
                                     param_hint="--config")  # fmt: skip
        return
    from node import logs, settings
    from node.daemon import stop_on_signals
    from node.reply import respond

    site = settings.load(config)
    logs.configure(role="reply")
    with stop_on_signals() as stop:
        respond.run(site, stop)


def _switch(config: Config, value: str, reason: str, said: str) -> None:
    from datetime import UTC, datetime

    from node import settings
    from node.keep.catalogue import Catalogue

    with Catalogue.open(settings.load(config).storage.catalogue) as catalogue:
        catalogue.roles.set_flag("answers", value, by=login(), reason=reason, now=datetime.now(UTC))
    typer.echo(said)


@app.command()
def pause(reason: Reason, config: Config = DEFAULT_CONFIG) -> None:
    """Let no result leave: studies are scored and stay `inferred`."""
    _switch(
        config, "paused", reason, "Answers are off. Studies are still received and scored; `osteon reply resume` switches on."
    )


@app.command()
def resume(reason: Reason, config: Config = DEFAULT_CONFIG) -> None:
    """Let results leave again; what is older than `answer_within_h` expires instead."""
    _switch(config, "on", reason, "Answers are on, where `[inference] answers` says so too.")


@app.command()
def study(
    which: Annotated[str, typer.Argument(help="Accession number, or any UID of the study, original or pseudonymous.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the history.", prompt="Why")],
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Answer one study by hand: an expired one, or an answered one again. A study sent to be learned from is not answered."""
    from datetime import UTC, datetime

    from node import settings
    from node.commands.find import find_studies
    from node.errors import NotFound, NotToBeAnswered
    from node.keep.catalogue import Catalogue
    from node.keep.records import Purpose

    site = settings.load(config)
    with Catalogue.open(site.storage.catalogue) as catalogue:
        hits = find_studies(catalogue, site, which)
        if len(hits) > 1:
            listed = "\n".join(f"  {hit.uid}  {hit.state}  received {hit.first_at.astimezone():%Y-%m-%d %H:%M}" for hit in hits)
            raise NotFound(f"{len(hits)} studies have this number; name one by its UID:\n{listed}")
        if hits[0].purpose is Purpose.LEARN:
            raise NotToBeAnswered(
                f"study {hits[0].uid} was sent to be learned from; send it to {site.node.ae_title} to have it answered"
            )
        catalogue.studies.reopen(hits[0].uid, by=login(), reason=reason, now=datetime.now(UTC))
    typer.echo(f"Study {hits[0].uid} is queued for an answer; `osteon status --study {which}` follows it.")
