"""The verbs `osteon train …` and `osteon schedule …`.

In: options. Out: progress and the gate's words on the terminal. Torch is not imported before a run begins, so that
`osteon --help` stays quick; what a verb shows of a run is read from the catalogue and the run's folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.errors import BadSettings, NotFound
from node.options import DEFAULT_CONFIG, Config, login
from node.settings import Settings, load
from training import journal

if TYPE_CHECKING:
    from node.keep.catalogue import Catalogue
    from node.keep.records import Run, Timing
    from node.metrics.serve import Ready

app = typer.Typer(help="Train a model on the labelled images of the archive.", no_args_is_help=True)
schedule_app = typer.Typer(help="Train by the schedules of the settings; without a further word, run the role.")

Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the history.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="Name of the recipe; default: [training] recipe.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Number or folder of the run, as `osteon train list` shows them.")]
ScheduleName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the schedule in the settings.")]
EXITS = {"done": 0, "failed": 2, "cancelled": 143, "interrupted": 143}
"""Exit codes of `osteon train watch`, by how the run ended."""
LOOK_S = 0.5
BEAT_S = 5.0
SILENT_S = 30.0
"""A scheduler whose sign of life was not taken for so long is not ready."""


# --- runs ----------------------------------------------------------------------------------------------------------------------


@app.command("run")
def run(
    config: Config = DEFAULT_CONFIG,
    recipe: RecipeName = "",
    only: Annotated[str, typer.Option(help="pretrain or finetune: that part alone.")] = "",
) -> None:
    """Pretrain, fine-tune, export, evaluate and let the gate decide; the model goes into service only if the gate says so.

    With `--only finetune` the newest pretraining is used that was offered for this recipe. Ctrl-C ends the run after its epoch, a
    second one at once; `osteon train resume` takes it up again.
    """
    if only not in ("", "pretrain", "finetune"):
        raise typer.BadParameter("pretrain or finetune", param_hint="--only")
    _train(config, recipe, {"kind": only or "cycle"})


@app.command("sweep")
def sweep(
    clusters: Annotated[str, typer.Option("--clusters", help="Numbers of clusters to try, such as 50,100,200.")],
    epochs: Annotated[int, typer.Option(min=0, help="Of each pretraining; default: the recipe's.")] = 0,
    recipe: RecipeName = "",
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Pretrain for several numbers of clusters, and lay the study's rule and the probes side by side."""
    try:
        numbers = sorted({int(each) for each in clusters.split(",")})
    except ValueError:
        raise typer.BadParameter("numbers with commas between them, such as 50,100,200", param_hint="--clusters") from None
    if min(numbers) < 2:
        raise typer.BadParameter("two clusters or more", param_hint="--clusters")
    _train(config, recipe, {"kind": "sweep", "clusters": numbers, "epochs": epochs})


@app.command("extend")
def extend(
    run: RunName,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Epochs of the pretraining in all.")],
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Let the pretraining of a run go on for more epochs, in a new run with all that follows; the old run stays as it is."""
    with _catalogue(load(config)) as catalogue:
        row = catalogue.runs.named(run)
    if row.kind not in ("cycle", "pretrain"):
        raise NotFound(f"run {row.id} is of kind {row.kind}: it has no pretraining to go on with")
    _train(config, row.recipe, {"kind": row.kind, "extends": _folder(row), "epochs": epochs})


@app.command("list")
def list_runs(config: Config = DEFAULT_CONFIG) -> None:
    """List the runs, newest first."""
    with _catalogue(load(config)) as catalogue:
        runs = catalogue.runs.list()
    if not runs:
        typer.echo("no run yet; `osteon train run` starts one")
    for one in runs:
        parts = (str(one.id), one.folder or "not started", one.state, one.decision, one.model_id, one.reason)
        typer.echo("  ".join(part for part in parts if part))


@app.command("show")
def show(run: RunName, config: Config = DEFAULT_CONFIG) -> None:
    """Say what a run came to: figures with intervals, the words of the gate or of the probes, where the files are."""
    site = load(config)
    with _catalogue(site) as catalogue:
        row = catalogue.runs.named(run)
    folder = site.storage.root / "runs" / row.folder
    if row.folder and (folder / "decision.json").is_file():
        decision = json.loads((folder / "decision.json").read_bytes())
        for metric in decision["metrics"]:
            typer.echo(_figure(metric))
        typer.echo(f"version  {decision['version']}")
        typer.echo(f"gate     {decision['decision']}: {decision['words']}")
        if decision["by_hand"]:
            typer.echo(f"by hand  {decision['by_hand']}")
    elif row.folder and (folder / "outcome.json").is_file():  # of a pretraining or a sweep, which no gate judges
        for line in _summary(folder):
            typer.echo(line)
        outcome = json.loads((folder / "outcome.json").read_bytes())
        typer.echo(f"result   {outcome['decision']}: {outcome['words']}")
    else:
        typer.echo(f"run {row.id} has not come to a decision; it is {_state(row)}")
        return
    if row.state != "done":  # what was decided may not have come about
        typer.echo(f"state    {_state(row)}")
    typer.echo(f"files    {folder}")


@app.command("report")
def report(
    run: Annotated[str, typer.Argument(help="Number or folder of the run; default: the newest that has a report.")] = "",
    on_terminal: Annotated[bool, typer.Option("--print", help="Print a summary here instead of opening the page.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Open the report of a run in the browser, or say where it is; with --print, tell its figures here.

    The page opens on a terminal with a display only; it holds results and images of patients.
    """
    site = load(config)
    with _catalogue(site) as catalogue:
        found = _reported(site, catalogue, run)
    page = found / "report.html"
    if on_terminal:
        for line in _summary(found):
            typer.echo(line)
        typer.echo(f"page     {page if page.is_file() else 'not drawn yet'}")
    elif not page.is_file():
        raise NotFound(f"run {found.name} has no report yet; `osteon train report {found.name} --print` tells what there is")
    else:
        typer.echo(f"opened {page}" if _opened(page) else str(page))


@app.command("status")
def status(config: Config = DEFAULT_CONFIG) -> None:
    """Show in one table what runs and how far it is, what waits and for what, and the last outcomes."""
    from rich.console import Console
    from rich.table import Table

    site = load(config)
    with _catalogue(site) as catalogue:
        runs = catalogue.runs.list()
        rows = [one for one in runs[::-1] if one.state in ("queued", "running", "cancelling")]
        rows += [one for one in runs if one.finished_at][:5]
        told = [(str(one.id), one.schedule or "by hand", one.recipe, one.state, _situation(site, catalogue, one)) for one in rows]
        alive = _scheduler_lives(catalogue)
    if not told:
        typer.echo("no run yet; `osteon train run` starts one, or a [[schedule]] in the settings")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "schedule", "recipe", "state", "how it stands"):
        table.add_column(heading, no_wrap=heading != "how it stands", overflow="fold")
    for row in told:
        table.add_row(*row)
    Console(markup=False, highlight=False, width=None if os.isatty(1) else 200).print(table)
    if not alive and any(one.state == "queued" for one in rows):
        typer.echo("No scheduler runs: what waits is not started. `osteon schedule` runs one, also as a part of `osteon serve`.")


@app.command("watch")
def watch(run: Annotated[str, typer.Argument(help="Number or folder of the run; default: the one that runs.")] = "",
          config: Config = DEFAULT_CONFIG) -> None:  # fmt: skip
    """Show the progress of a run until it ends; exit code 0 when it is done, 2 when it failed, 143 when it was stopped."""
    from time import sleep

    from rich.console import Console

    site = load(config)
    console = Console()
    with _catalogue(site) as catalogue:
        row = catalogue.runs.named(run) if run else next(iter(catalogue.runs.busy() or catalogue.runs.open()), None)
        if row is None:
            raise NotFound("no run is under way; `osteon train list` shows those that were")
        with _Watching(console) as shown:
            while row.state not in EXITS:
                shown.see(row, _progress(site, row))
                sleep(LOOK_S)
                row = catalogue.runs.get(row.id)
    typer.echo(f"run {row.id} is {_state(row)}" + (f"; {_judge(row)}: {row.decision}" if row.decision else ""))
    raise typer.Exit(EXITS[row.state])


@app.command("cancel")
def cancel(run: RunName, reason: Reason, config: Config = DEFAULT_CONFIG) -> None:
    """End a run: one that waits at once, one that runs after its epoch (or by force after [training] stop_grace_s)."""
    with _catalogue(load(config)) as catalogue:
        row = catalogue.runs.cancel(catalogue.runs.named(run).id, by=login(), reason=reason, now=datetime.now(UTC))
    waits = "; its trainer finishes the epoch" if row.state == "cancelling" else ""
    typer.echo(f"run {row.id} is {row.state}{waits}. `osteon train resume {row.id} --reason TEXT` takes it up again.")


@app.command("resume")
def resume(
    run: RunName,
    reason: Reason,
    other_processes: Annotated[
        bool, typer.Option("--other-processes", help="Go on with another number of processes, here in the foreground.")
    ] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Queue a run again that failed, was cancelled or interrupted; it goes on from its last finished step.

    With another number of processes than it began with it comes to another model: --other-processes lets it go on all the same,
    here in the foreground, with as many as the settings say now; its run.json and its report say so.
    """
    from training.machine import settle

    with _catalogue(load(config)) as catalogue:
        settle(catalogue, datetime.now(UTC))
        row = catalogue.runs.named(run)
        if other_processes:
            if not row.folder:
                raise NotFound(f"run {row.id} has left nothing yet; `osteon train resume {row.id} --reason TEXT` queues it again")
            told, subject = "run resumed with another number of processes", f"run {row.id}"
            catalogue.history.note(by=login(), what=told, subject=subject, reason=reason, now=datetime.now(UTC))
        else:
            row = catalogue.runs.resume(row.id, by=login(), reason=reason, now=datetime.now(UTC))
        alive = _scheduler_lives(catalogue)
    if other_processes:
        _train(config, "", {"other_processes": True}, row.folder)
        return
    typer.echo(f"run {row.id} waits for its device set; `osteon train watch {row.id}` follows it")
    if not alive:
        typer.echo("No scheduler runs: `osteon schedule` runs one, also without a [[schedule]] in the settings.")


def _train(config: Path, recipe: str, ordered: dict[str, Any], run: str = "") -> None:
    """Start a run, or go on with `run`, in the foreground: here, or under torchrun where it has several processes."""
    from training import machine

    asked = load(config).training
    count = machine.processes(asked.processes, asked.device)
    if count > 1:
        which = ("--run", run) if run else ("--recipe", recipe) if recipe else ()
        words = ("--config", str(config), *which, "--orders", json.dumps(ordered))
        os.execv(sys.executable, (*machine.launcher(count), *words))  # noqa: S606 - no shell is meant
    from training.__main__ import train

    train(config, recipe, run, ordered=ordered)


def _reported(site: Settings, catalogue: Catalogue, run: str) -> Path:
    """Give the folder of a run; without a name, that of the newest run with a report."""
    runs = site.storage.root / "runs"
    if run:
        row = catalogue.runs.named(run)
        return runs / _folder(row)
    for row in catalogue.runs.list():
        if row.folder and (runs / row.folder / "report.html").is_file():
            return runs / row.folder
    raise NotFound("no run has a report yet; `osteon train list` shows the runs")


def _opened(page: Path) -> bool:
    """Show a page in the browser where a person sits before one; say whether that was so."""
    import webbrowser

    has_display = sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return has_display and os.isatty(1) and webbrowser.open(page.as_uri())


def _summary(folder: Path) -> Iterator[str]:
    """Tell from its files what a run has come to: decision, figures, probes, sizes of the clusters, the table of a sweep."""
    yield f"run      {folder.name}"
    if (folder / "decision.json").is_file():
        decision = json.loads((folder / "decision.json").read_bytes())
        yield f"gate     {decision['decision']}: {decision['words']}"
        yield from map(_figure, decision["metrics"])
    elif not (folder / "outcome.json").is_file():
        yield "result   not there yet"
    if (folder / "sweep.json").is_file():
        yield from _swept(json.loads((folder / "sweep.json").read_bytes()))
    else:
        yield from _pretrained(folder / "pretrain")


def _swept(found: dict[str, Any]) -> Iterator[str]:
    """Lay the numbers of clusters of a sweep side by side."""
    probes = f", by the probes {found['by_probes']}" if found["by_probes"] else ""
    yield f"sweep    by the study's rule {found['by_study_rule']} clusters{probes}"
    yield f"{'clusters':>8}  {'test accuracy':>25}  {'chance':>6}  {'over chance':>11}  {'k-NN':>5}  {'linear':>6}  offered"
    for row in found["rows"]:
        accuracy = row["accuracy"]
        told = f"{accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f})"
        knn, linear = ("–" if row[key] is None else f"{row[key]:.3f}" for key in ("knn", "linear"))
        offered = "yes" if row["offered"] else "no"
        yield f"{row['k']:>8}  {told:>25}  {row['chance']:>6.3f}  {row['over_chance']:>+11.3f}  {knn:>5}  {linear:>6}  {offered}"


def _pretrained(folder: Path) -> Iterator[str]:
    """Tell of a pretraining what the probes said, against the start weights and by epoch, and how large the clusters are."""
    if (folder / "probe.json").is_file():
        probed = json.loads((folder / "probe.json").read_bytes())
        yield f"probes   {probed['words']}"
        yield from map(_figure, probed["metrics"])
    lines = journal.read(folder / "metrics.jsonl")
    for name, key in (("k-NN", "knn"), ("linear", "linear")):
        if measured := [line for line in lines if line.get(key) is not None]:
            best = max(measured, key=lambda line: float(line[key]))
            told = f"{measured[-1][key]:.3f} in epoch {measured[-1]['epoch']}, best {best[key]:.3f} in epoch {best['epoch']}"
            yield f"probe    {name}: {told}"
    if clustered := [line for line in lines if line.get("sizes")]:
        smallest, lower, median, upper, largest = clustered[-1]["sizes"]
        told = f"smallest {smallest:g}, quartiles {lower:g} / {median:g} / {upper:g}, largest {largest:g}"
        yield f"clusters {told} images in epoch {clustered[-1]['epoch']}"


def _figure(metric: dict[str, Any]) -> str:
    interval = f"{metric['low']:.3f} to {metric['high']:.3f}"
    return f"{metric['name']:60} {metric['value']:.3f}  ({interval}, {metric['n']} patients)"


# --- schedules -----------------------------------------------------------------------------------------------------------------


@schedule_app.callback(invoke_without_command=True)
def run_role(context: typer.Context, config: Config = DEFAULT_CONFIG) -> None:
    """Run the role until SIGTERM or Ctrl-C: queue what is due, and supervise the runs. A trainer goes on when this ends."""
    if context.invoked_subcommand is not None:
        source = context.get_parameter_source("config")
        if source is not None and source.name == "COMMANDLINE":  # the verb reads its own: it would act on another site
            told = f"give it after the verb: osteon schedule {context.invoked_subcommand} --config {config}"
            raise typer.BadParameter(told, param_hint="--config")
        return
    from node import daemon, logs
    from node.metrics import figures
    from node.metrics.meters import new_registry
    from node.metrics.serve import Health, serving

    site = load(config)
    if missing := _missing():
        raise BadSettings(
            f"this machine cannot train: {', '.join(missing)} is not installed. Install the extra `cpu` or `gpu`, or run "
            "`osteon schedule` on another machine"
        )
    logs.configure(role="schedule")
    registry, health = new_registry(site.storage), Health()
    with daemon.stop_on_signals() as stop, _catalogue(site) as catalogue, _Role(site, config, catalogue) as role:
        registry.register(figures.of_training(catalogue))
        step = health.loop("supervise", role.step)
        with serving(site.metrics, "schedule", registry=registry, health=health, ready=role.ready):
            daemon.run(step, stop, heartbeat=role.beat, heartbeat_s=BEAT_S)


@schedule_app.command("list")
def list_schedules(config: Config = DEFAULT_CONFIG) -> None:
    """List the schedules: when each is due next, and what became of its last due time and its last run."""
    site = load(config)
    for _is_error, complaint in unfit(site):
        typer.echo(complaint, err=True)
    if not site.schedule:
        typer.echo("no [[schedule]] in the settings; ae_config.toml shows how to write one")
    with _catalogue(site) as catalogue:
        timings, alive = catalogue.timings.all(), _scheduler_lives(catalogue)
        for one in site.schedule:
            timing, last = timings.get(one.name), catalogue.runs.last_of(one.name)
            rhythm = f"cron {one.cron}" if one.cron else f"every {one.every}"
            paused = catalogue.roles.flag(f"schedule {one.name}") == "paused"
            typer.echo(f"{one.name}  {rhythm}  {one.kind} {site.recipe_of(one)}" + ("  PAUSED" if paused else ""))
            typer.echo(f"  next      {_next(timing, alive=alive)}")
            if timing is not None and timing.said and timing.said_at is not None:
                typer.echo(f"  last due  {_at(timing.considered_at, timing.zone)}: {timing.said}")
            if last is not None:
                typer.echo(f"  last run  {last.id}  {_state(last)}" + (f", {last.decision}" if last.decision else ""))


@schedule_app.command("run-now")
def run_now(name: ScheduleName, reason: Reason = "by hand", config: Config = DEFAULT_CONFIG) -> None:
    """Queue a run of a schedule now, whatever its conditions, its quiet hours and a pause say."""
    site = load(config)
    one = site.schedule_named(name)
    with _catalogue(site) as catalogue:
        recipe = site.recipe_of(one)
        row = catalogue.runs.ask(kind=one.kind, recipe=recipe, schedule=name, by=login(), reason=reason, now=datetime.now(UTC))
        alive = _scheduler_lives(catalogue)
    typer.echo(f"run {row.id} of {name} waits for its device set; `osteon train watch {row.id}` follows it")
    if not alive:
        typer.echo("No scheduler runs: `osteon schedule` runs one, also as a part of `osteon serve`.")


@schedule_app.command("pause")
def pause(name: ScheduleName, reason: Reason, config: Config = DEFAULT_CONFIG) -> None:
    """Let no run of a schedule start: due times are passed over. A run under way goes on."""
    _switch(config, name, "paused", reason)
    typer.echo(f"{name} is paused; `osteon schedule resume {name} --reason TEXT` lets it go on")


@schedule_app.command("resume")
def resume_schedule(name: ScheduleName, reason: Reason, config: Config = DEFAULT_CONFIG) -> None:
    """Let a paused schedule go on with its next due time; what was passed over is not made up for."""
    _switch(config, name, "on", reason)
    typer.echo(f"{name} goes on; `osteon schedule list` shows when it is due")


class _Role:
    """What `osteon schedule` holds open: the timekeeper and the supervisor, and the sign of life of both."""

    def __init__(self, site: Settings, config: Path, catalogue: Catalogue) -> None:
        from training.machine import processes, this_process
        from training.schedule import Timekeeper
        from training.supervise import Supervisor, torchrun

        self._site, self._catalogue, self._me = site, catalogue, this_process()
        self._timekeeper = Timekeeper(site, catalogue, now=_now)
        self._supervisor = Supervisor(
            site, catalogue, torchrun(config, processes(site.training.processes, site.training.device)), now=_now
        )
        self.step = self._supervisor.step
        self._beaten_at = monotonic()

    def __enter__(self) -> _Role:
        self._timekeeper.begin()
        return self

    def __exit__(self, *_error: object) -> None:
        self._timekeeper.end()
        self._catalogue.roles.leave("schedule", self._me.host, self._me.pid)

    def ready(self) -> Ready:
        """Say whether runs can be queued and begun now."""
        from node.metrics.disk import troubles
        from node.metrics.serve import Ready

        silent_s = monotonic() - self._beaten_at
        found = [f"the database has taken nothing for {silent_s:.0f} s"] if silent_s > SILENT_S else []
        found += [f"schedule {name}: {why}" for name, why in self._timekeeper.troubles.items()]
        found += troubles(self._site.storage, written=("runs", "models", "cache"))
        return Ready(found, {"schedules": len(self._site.schedule)})

    def beat(self) -> None:
        """Plan what comes next and leave a sign of life."""
        from node.keep.records import Role

        self._timekeeper.plan()
        open_runs = self._catalogue.runs.open()
        told = {
            "schedules": len(self._site.schedule),
            "runs waiting": sum(one.state == "queued" for one in open_runs),
            "left out": "; ".join(f"{name}: {why}" for name, why in self._timekeeper.troubles.items()),
            "running": ", ".join(str(one.id) for one in open_runs if one.state != "queued"),
        }
        self._catalogue.roles.beat(Role("schedule", self._me.host, self._me.pid, _now(), told))
        self._beaten_at = monotonic()


class _Watching:
    """Shows one run: a bar on a terminal, on a pipe one plain line for each stage and epoch."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bars = None
        self._said = ""
        if console.is_terminal:
            self._bars = Progress(TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), console=console)
            self._task = self._bars.add_task("", total=None)

    def __enter__(self) -> _Watching:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bars:
            self._bars.stop()

    def see(self, row: Run, progress: dict[str, Any]) -> None:
        """Show how a run stands now."""
        if self._bars:
            done, total = progress.get("done", 0), progress.get("total") or None
            self._bars.update(self._task, description=_words(row, progress), completed=done, total=total)
            return
        if "done" in progress:
            progress = progress | {"done": int(progress["done"])}  # a line an epoch, not one for each part of it
        said = _words(row, progress)
        step = said.partition(", about")[0]
        if step != self._said:
            self._said = step
            typer.echo(said)


def _missing() -> list[str]:
    """Name the libraries without which nothing is trained here; they are looked for, not loaded."""
    from importlib.util import find_spec

    return [name for name in ("apscheduler", "torch", "torchvision") if find_spec(name) is None]


def unfit(site: Settings) -> Iterator[tuple[bool, str]]:
    """Say what keeps a schedule of these settings from running here, and whether that is an error, for `osteon check`."""
    from models.errors import OsteonError
    from training import machine
    from training.recipe import named

    if not site.schedule:
        return
    if missing := _missing():
        told = "let another machine of this catalogue run them, or install the extra `cpu` or `gpu`"
        yield False, f"schedules are not run on this machine: {', '.join(missing)} is not installed; {told}"
        return
    if site.training.device == "cuda" and not machine.device_set("auto").endswith("gpu"):
        yield True, '[training] device is "cuda", and this machine shows no NVIDIA GPU: set it to "auto" or "cpu"'
    for one in site.schedule:
        try:
            named(site.recipe_of(one))
        except OsteonError as error:
            yield True, f"{one.name}: {error}"


def _now() -> datetime:
    return datetime.now(UTC)


def _catalogue(site: Settings) -> Catalogue:
    from node.keep.catalogue import Catalogue

    return Catalogue.open(site.storage.catalogue)


def _switch(config: Path, name: str, value: str, reason: str) -> None:
    from node.keep.catalogue.timings import switch

    site = load(config)
    site.schedule_named(name)
    with _catalogue(site) as catalogue:
        catalogue.roles.set_flag(switch(name), value, by=login(), reason=reason, now=_now())


def _scheduler_lives(catalogue: Catalogue) -> bool:
    """Say whether a scheduler has shown a sign of life lately."""
    return any(role.name == "schedule" and (_now() - role.seen_at).total_seconds() < 60 for role in catalogue.roles.all())


def _progress(site: Settings, row: Run) -> dict[str, Any]:
    """Read how far a run is; empty when it has not told."""
    try:
        found: dict[str, Any] = json.loads((site.storage.root / "runs" / (row.folder or "none") / "progress.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def _folder(row: Run) -> str:
    """Name the folder of a run that has begun."""
    if not row.folder:
        raise NotFound(f"run {row.id} has left nothing yet; it is {_state(row)}")
    return row.folder


def _judge(row: Run) -> str:
    """Name who decided: a pretraining or a sweep makes no version, and no gate judges it."""
    return "the gate says" if row.model_id else "result"


def _state(row: Run) -> str:
    return row.state + (f" ({row.reason})" if row.reason else "")


def _words(row: Run, progress: dict[str, Any]) -> str:
    """Say in words how far a run is."""
    if row.state == "queued" or not progress or not row.folder:
        return _state(row) if row.state != "running" else "starting"
    told = [progress["stage"] + (f" {progress['done']:g} of {progress['total']}" if progress.get("total") else "")]
    if "fit" in progress:
        told.append(f"{progress['fit']}, epoch {progress['epoch']}, loss {progress['loss']:.3f}")
    if row.state == "cancelling":
        told.append("being cancelled")
    if "left_s" in progress:
        told.append(f"about {_length(progress['left_s'])} left in this stage")
    return ", ".join(told)


def _situation(site: Settings, catalogue: Catalogue, row: Run) -> str:
    """Say how one run stands, for the table."""
    if row.state in ("running", "cancelling"):
        return f"{row.folder or 'new'}: {_words(row, _progress(site, row))} (try {row.tries} on {row.host})"
    if row.state == "queued":
        return f"due {_at(row.due_at)}; " * (row.due_at is not None) + _waits_for(site, catalogue, row)
    ended = f"{_at(row.finished_at)}: " if row.finished_at else ""
    return ended + ", ".join(part for part in (row.decision, row.model_id, row.reason, row.folder) if part)


def _waits_for(site: Settings, catalogue: Catalogue, row: Run) -> str:
    """Say what keeps a queued run."""
    from training.supervise import quiet

    if row.next_attempt_at and row.next_attempt_at > _now():
        return f"{row.reason}; next attempt {_at(row.next_attempt_at)}"
    if row.origin == "schedule":
        one = next((one for one in site.schedule if one.name == row.schedule), None)
        if one is None:
            return "its schedule is not in these settings: `osteon train cancel` strikes it out"
        if catalogue.roles.flag(f"schedule {row.schedule}") == "paused":
            return "its schedule is paused"
        if quiet(one, _now()):
            return f"quiet hours {one.when.quiet_hours}"
    return "waits for its device set"


def _next(timing: Timing | None, *, alive: bool) -> str:
    if timing is None or timing.next_at is None or not alive:
        return "not planned: no scheduler runs"
    return _at(timing.next_at, timing.zone)


def _at(at: datetime | None, zone: str = "") -> str:
    """Spell a moment in local time, or in a schedule's zone, with the zone's name."""
    from zoneinfo import ZoneInfo

    if at is None:
        return "now"
    local = at.astimezone(ZoneInfo(zone) if zone else None)
    return f"{local:%Y-%m-%d %H:%M %Z}"


def _length(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
