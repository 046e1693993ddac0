"""`osteon status`: what waits, what runs, what went wrong, and where one study is."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from node.options import DEFAULT_CONFIG, Config

if TYPE_CHECKING:
    from node.keep.catalogue import Catalogue
    from node.keep.records import Study
    from node.settings import Settings

SILENT_S = 30.0
"""A role that showed no sign of life for this long is shown as silent."""


def status(
    study: Annotated[str, typer.Option("--study", help="Accession number or any UID: say where this study is.")] = "",
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Show roles, queues, model, disk and last errors; or where one study is, in one line, without opening the vault."""
    from node import settings
    from node.keep.catalogue import Catalogue

    site = settings.load(config)
    with Catalogue.open(site.storage.catalogue) as catalogue:
        for line in _where(catalogue, site, study) if study else _overview(catalogue, site):
            typer.echo(line)


def _overview(catalogue: Catalogue, site: Settings) -> list[str]:
    """Lay out the whole node in a screen."""
    import shutil

    from models.errors import OsteonError
    from models.registry import Registry
    from node.commands import backup

    now = datetime.now(UTC)
    ports = [f"{site.node.host}:{site.node.port}"] if site.node.listens_in_clear else []
    ports += [f"{site.node.host}:{site.node.tls.port} (TLS)"] if site.node.tls.on else []
    lines = [f"Osteon {site.node.ae_title} on {' and '.join(ports)}  (research use only)", "", "Roles"]
    roles = catalogue.roles.all()
    several = len({role.host for role in roles}) > 1
    for role in roles:
        age_s = (now - role.seen_at).total_seconds()
        alive = f"seen {max(age_s, 0):.0f} s ago" if abs(age_s) < SILENT_S else f"SILENT since {_local(role.seen_at)}"
        told = ", ".join(f"{name}: {value}" for name, value in role.told.items() if value)
        lines.append(f"  {role.name:<9}{f'on {role.host}  ' if several else ''}{alive}  {told}".rstrip())
    if not roles:
        lines.append("  none is running; `osteon serve` starts them")
    answers = "on" if site.inference.answers == "on" and catalogue.roles.flag("answers") != "paused" else "OFF: nothing leaves"
    try:
        champion = Registry(site.storage.root / "models").champion() or "none in service; studies to be answered wait"
    except OsteonError as error:
        champion = str(error)
    trouble = next((role.told.get("model_trouble") for role in roles if role.name == "reply"), "")
    lines += [
        "",
        f"Model     {champion}" + (f"  NOT WORKING, studies wait: {trouble}" if trouble else ""),
        f"Answers   {answers}",
        "",
        "Studies",
    ]
    states = catalogue.studies.by_state()
    lines += [f"  {state:<12}{count:>7}" for state, count in states.items() if count] or ["  none yet"]
    if oldest := catalogue.studies.oldest_open():
        lines.append(f"  oldest unanswered: {oldest.uid} ({oldest.state}, {_ago(now, oldest.last_at)})")
    lines += ["", "Results"]
    lines += [f"  {state:<12}{count:>7}" for state, count in catalogue.deliveries.by_state().items() if count] or ["  none yet"]
    lines += _training(catalogue, site)
    held = len(catalogue.instances.held())
    lines += ["", f"Archive    {catalogue.instances.count()} images; quarantine {held}"]
    disk = shutil.disk_usage(site.storage.root if site.storage.root.exists() else site.storage.root.parent)
    lines.append(
        f"Disk       {disk.free / 2**30:.1f} GiB free of {disk.total / 2**30:.1f} ({100 * disk.used / disk.total:.0f} % used)"
    )
    made = backup.last(catalogue)
    lines.append(f"Backup     {_ago(now, made.at)}, {backup.spelt(made.size)}, {made.where}" if made else "Backup     none yet")
    errors = catalogue.studies.recent_errors(limit=5)
    if errors:
        lines += ["", "Last errors"] + [f"  {_local(at)}  {uid}  {reason}" for at, uid, reason in errors]
    return lines


def _training(catalogue: Catalogue, site: Settings) -> list[str]:
    """Say what trains, when each schedule is due next, and what came of its last run; nothing where nothing ever trained."""
    from zoneinfo import ZoneInfo

    lines, timings, now = [], catalogue.timings.all(), datetime.now(UTC)
    is_scheduled = any(
        role.name == "schedule" and (now - role.seen_at).total_seconds() < SILENT_S for role in catalogue.roles.all()
    )
    for one in site.schedule:
        timing = timings.get(one.name)
        following = "next run not planned: no scheduler runs"
        if timing is not None and timing.next_at is not None and is_scheduled:
            following = f"next run {timing.next_at.astimezone(ZoneInfo(timing.zone)):%Y-%m-%d %H:%M %Z}"
            here = f"{timing.next_at.astimezone():%Y-%m-%d %H:%M %Z}"
            following += "" if here in following else f" ({here} here)"
        if catalogue.roles.flag(f"schedule {one.name}") == "paused":
            following = f"PAUSED, {following}"
        lines.append(f"  {one.name:<12}{following}")
        if timing is not None and timing.said and timing.said_at is not None:
            lines.append(f"  {'':<12}due {_local(timing.considered_at)}: {timing.said}")
    runs = catalogue.runs.open()
    last = next((run for run in catalogue.runs.list() if run.finished_at is not None), None)
    lines += [f"  run {run.id:<8}{run.state}" + (f"  {run.folder}" if run.folder else "") for run in runs]
    if last is not None and last.finished_at is not None:
        told = ", ".join(part for part in (last.decision, last.model_id, last.reason) if part)
        lines.append(f"  last run    {last.state} {_local(last.finished_at)}" + (f": {told}" if told else ""))
    return ["", "Training", *lines] if lines else []


def _where(catalogue: Catalogue, site: Settings, typed: str) -> list[str]:
    """Say in one line where each study is that `typed` may mean."""
    from node.commands.find import find_studies

    now = datetime.now(UTC)
    return [_line(catalogue, study, now) for study in find_studies(catalogue, site, typed)]


def _line(catalogue: Catalogue, study: Study, now: datetime) -> str:
    held = len(catalogue.instances.held_of_study(study.uid))
    told = [f"{study.uid}: {study.state}", f"purpose {study.purpose}", f"{study.instances} image(s)"]
    if held:
        told.append(f"{held} in quarantine")
    told.append(f"last received {_ago(now, study.last_at)} from {study.calling_ae}")
    if (result := catalogue.results.latest(study.uid)) is not None:
        findings = result.findings
        said = f"not answered with a class ({findings.abstention})" if findings.abstention else "answered with a class"
        told.append(f"model {result.model_id}: {said}")
    told += [
        f"{row.destination}: {row.state}" + (f" ({row.reason})" if row.reason else "")
        for row in catalogue.deliveries.of_study(study.uid)
    ]
    if study.reason:
        told.append(study.reason)
    if study.next_attempt_at and study.next_attempt_at > now:
        told.append(f"next attempt {_local(study.next_attempt_at)}")
    return "; ".join(told)


def _local(at: datetime) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}"


def _ago(now: datetime, at: datetime) -> str:
    seconds = (now - at).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
