"""The verbs `osteon train …`.

In: options. Out: progress and the gate's words on the terminal. Torch is not imported before a run begins, so that
`osteon --help` stays quick; what a verb shows of a run is read from the run's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from node.errors import NotFound
from node.settings import load

app = typer.Typer(help="Train a model on the labelled images of the archive.", no_args_is_help=True)

Config = Annotated[Path, typer.Option("--config", help="The site's settings.", envvar="OSTEON_CONFIG", show_default=True)]
DEFAULT_CONFIG = Path("ae_config.toml")


@app.command("run")
def run(
    config: Config = DEFAULT_CONFIG,
    recipe: Annotated[str, typer.Option(help="Name of the recipe; default: [training] recipe.")] = "",
    continued: Annotated[str, typer.Option("--run", help="Continue this run, which was stopped or killed.")] = "",
) -> None:
    """Fine-tune, export, evaluate and let the gate decide; the model goes into service only if the gate says so."""
    from training.__main__ import train

    train(config, recipe, continued)


@app.command("list")
def list_runs(config: Config = DEFAULT_CONFIG) -> None:
    """List the runs, newest first."""
    from node.keep.catalogue import Catalogue

    with Catalogue.open(load(config).storage.catalogue) as catalogue:
        runs = catalogue.runs.list()
    if not runs:
        typer.echo("no run yet; `osteon train run` starts one")
    for one in runs:
        outcome = one.outcome or "running, or killed: `osteon train run --run` continues it"
        typer.echo("  ".join(part for part in (one.folder, outcome, one.decision, one.model_id) if part))


@app.command("show")
def show(run: Annotated[str, typer.Argument(help="Name of the run.")], config: Config = DEFAULT_CONFIG) -> None:
    """Say what a run came to: figures with intervals, the gate's words, where the files are."""
    folder = load(config).storage.root / "runs" / run
    if Path(run).name != run or not (folder / "run.json").is_file():
        raise NotFound(f"there is no run {run!r}; `osteon train list` shows what there is")
    if not (folder / "decision.json").is_file():
        typer.echo(f"{run} has not come to a decision; `osteon train run --run {run}` continues it")
        return
    decision = json.loads((folder / "decision.json").read_bytes())
    for metric in decision["metrics"]:
        interval = f"{metric['low']:.3f} to {metric['high']:.3f}"
        typer.echo(f"{metric['name']:60} {metric['value']:.3f}  ({interval}, {metric['n']} patients)")
    typer.echo(f"version  {decision['version']}")
    typer.echo(f"gate     {decision['decision']}: {decision['words']}")
    if decision["by_hand"]:
        typer.echo(f"by hand  {decision['by_hand']}")
    typer.echo(f"files    {folder}")
