"""`osteon check`: everything that can be wrong at a site before the first patient, each with its remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from node.options import DEFAULT_CONFIG, Config

if TYPE_CHECKING:
    from node.keep.database import Server
    from node.settings import Settings

CLOCK_STEP_S = 5.0
CERTIFICATE_DAYS_MIN = 30
CRL_DAYS_MIN = 2
PAIRS = (("faiss-cpu", "faiss-gpu-cu12"), ("onnxruntime", "onnxruntime-gpu"))
"""Wheels that overwrite each other's files."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
OURS = ("node", "models", "training")


class Verdict(StrEnum):
    """What a check found."""

    OK = "ok"
    """As it should be."""
    WARN = "warn"
    """It works, but a person should know."""
    FAIL = "FAIL"
    """It will not work, or not safely."""


@dataclass(frozen=True)
class Finding:
    """One line of `osteon check`."""

    verdict: Verdict
    what: str
    told: str


def check(config: Config = DEFAULT_CONFIG) -> None:
    """Verify directories, keys, certificates, disk, peers, model, codecs, packages and clock; exit code 1 when anything fails."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from node import settings

    site = settings.load(config)
    table = Table(box=None, pad_edge=False, show_header=False)
    worst = Verdict.OK
    for finding in findings(site):
        style = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}[finding.verdict]
        table.add_row(f"[{style}]{finding.verdict}[/]", finding.what, escape(finding.told))
        worst = finding.verdict if finding.verdict is Verdict.FAIL else worst
    Console().print(table)
    if worst is Verdict.FAIL:
        raise typer.Exit(1)


def findings(site: Settings) -> Iterator[Finding]:
    """Run every check; one that breaks is itself a finding."""
    from node.logs import safe_message

    checks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _keys,
        _directories,
        _stores,
        _backup,
        _callers,
        _metrics,
        _tls,
        _peers,
        _model,
        _provider,
        _codecs,
        _wheels,
        _names,
        _clock,
        _schedules,
    )
    for one in checks:
        try:
            yield from one(site)
        except Exception as error:  # whatever is broken here is what a check is for; the others still tell
            yield Finding(Verdict.FAIL, one.__name__.strip("_"), safe_message(error))


def _keys(site: Settings) -> Iterator[Finding]:
    from node.errors import BadKey
    from node.settings import load_key, load_passcode

    found = {}
    for name in ("site_key", "vault_key"):
        place = getattr(site.storage, name)
        try:
            found[name] = load_key(place)
            yield Finding(Verdict.OK, name, place)
        except BadKey as error:
            yield Finding(Verdict.FAIL, name, str(error))
    for place in (*(caller.passcode for caller in site.node.callers), *(pacs.passcode for pacs in site.pacs)):
        try:
            if place:
                load_passcode(place)
                yield Finding(Verdict.OK, "passcode", place)
        except BadKey as error:
            yield Finding(Verdict.FAIL, "passcode", str(error))
    if len(found) == 2 and found["site_key"] == found["vault_key"]:
        yield Finding(Verdict.FAIL, "keys", "site key and vault key are the same; the vault needs a key of its own")


def _directories(site: Settings) -> Iterator[Finding]:
    import os
    import shutil
    import stat

    root = site.storage.root
    if not root.is_dir():
        yield Finding(Verdict.FAIL, "storage", f"{root} is not a directory; create it with mode 0700")
        return
    mode = stat.S_IMODE(root.stat().st_mode)
    if mode & 0o007:
        yield Finding(Verdict.FAIL, "storage", f"{root} is open to every user of this machine (mode {mode:04o}); `chmod 700` it")
    elif not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        yield Finding(Verdict.FAIL, "storage", f"{root} cannot be written by this user")
    elif (told := _cannot_publish(root)) is not None:
        yield Finding(Verdict.FAIL, "storage", f"{root}: {told}")
    else:
        yield Finding(Verdict.OK, "storage", str(root))
    free_gb = shutil.disk_usage(root).free / 1e9
    told = f"{free_gb:.0f} GB free below {root}"
    yield Finding(Verdict.OK if free_gb >= site.storage.free_min_gb else Verdict.FAIL, "disk", told)


def _cannot_publish(root: Path) -> str | None:
    """Say what the file system cannot do that two receivers on one archive need; None when it can."""
    import secrets

    from models import durable

    probe = root / f".check-{secrets.token_hex(6)}"
    try:
        durable.write_with(probe, lambda _file: None, replaces=False)
    except OSError as error:
        return f"its file system cannot name a file without replacing another ({error.strerror}): use one with hard links"
    finally:
        probe.unlink(missing_ok=True)
    return None


def _stores(site: Settings) -> Iterator[Finding]:
    from node.keep.custody import Custody

    with Custody.open(site.storage) as stores:
        yield Finding(Verdict.OK, "vault", "opens with this key, and was written under this site key")
        yield Finding(Verdict.OK, "catalogue", f"{stores.catalogue.instances.count()} images, under this site key")
        servers = {"catalogue": (stores.catalogue.database.server(), datetime.now(UTC))}
        servers["vault"] = (stores.vault.server(), datetime.now(UTC))
        newest = max((role.seen_at for role in stores.catalogue.roles.all()), default=None)
    if newest is not None and (newest - datetime.now(UTC)).total_seconds() > CLOCK_STEP_S:
        yield Finding(Verdict.FAIL, "clock", f"the catalogue holds times later than now ({newest:%Y-%m-%d %H:%M:%S} UTC)")
    for what, (server, asked_at) in servers.items():
        yield from _server(what, server, asked_at)
    one, other = (server for server, _asked_at in servers.values())
    if one is not None and other is not None and one.database == other.database:
        told = "lies in the same database as the catalogue: give it one of its own (deploy/postgresql/roles.sql makes both)"
        yield Finding(Verdict.FAIL, "vault", told)


def _server(what: str, server: Server | None, asked_at: datetime) -> Iterator[Finding]:
    """Judge a PostgreSQL server: whether what it calls written is written, and whether its clock and this one agree."""
    if server is None:
        return
    told = [
        f"its server runs with {name} = off, so a power cut loses what was answered success: switch it on"
        for name in ("fsync", "full_page_writes")
        if server.settings[name] != "on"
    ]
    if server.settings["server_encoding"] != "UTF8":
        told.append(f"its database is in {server.settings['server_encoding']}: make it anew with ENCODING 'UTF8'")
    if server.is_standby:
        told.append("its server is a standby and takes no writes: name the primary, or promote it")
    ahead_s = (server.now - asked_at).total_seconds()
    if abs(ahead_s) > CLOCK_STEP_S:
        off = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'}"
        told.append(f"the clock of its server is {off} this machine's: hosts share deadlines, so synchronise all of them (NTP)")
    yield from (Finding(Verdict.FAIL, what, each) for each in told)
    if not told:
        yield Finding(Verdict.OK, what, "its PostgreSQL server keeps what it calls written, and its clock agrees with this one")
    if server.is_in_clear:
        yield Finding(Verdict.WARN, what, "goes over the network in clear: add ?sslmode=verify-full to its URL")


def _backup(site: Settings) -> Iterator[Finding]:
    from node.commands import backup
    from node.keep.backup import RESTORING
    from node.keep.catalogue import Catalogue

    if (site.storage.root / RESTORING).is_file():
        told = "a restore was begun and not finished: give `osteon restore` the same set again"
        yield Finding(Verdict.FAIL, "backup", told)
    with Catalogue.open(site.storage.catalogue) as catalogue:
        last, kept = backup.last(catalogue), backup.are_keys_kept(catalogue, site)
    if last is None:
        yield Finding(Verdict.WARN, "backup", "none was ever made: `osteon backup --to DIR`, every night")
    else:
        age_days = (datetime.now(UTC) - last.at).total_seconds() / 86400
        old = age_days > site.backup.max_age_days
        told = f"the last one is {age_days:.1f} days old ({last.where})"
        yield Finding(
            Verdict.WARN if old else Verdict.OK, "backup", told + (": make one now, and see why none was made" if old else "")
        )
    if kept:
        yield Finding(Verdict.OK, "keys", "a person stated that copies are kept elsewhere")
    else:
        told = "nobody stated that copies of these two keys are kept elsewhere; no backup holds them: `osteon backup keys-kept`"
        yield Finding(Verdict.WARN, "keys", told)


def _callers(site: Settings) -> Iterator[Finding]:
    if not site.node.callers:
        yield Finding(Verdict.FAIL, "callers", "no [[node.callers]]: every association is rejected")
    for caller in site.node.callers:
        wide = [network for network in caller.networks if network.endswith("/0")]
        if wide:
            yield Finding(Verdict.WARN, "callers", f"{caller.ae_title} may call from anywhere ({wide[0]})")
        if len(site.node.callers) > 1 and caller.max_associations >= site.node.max_associations:
            told = f"{caller.ae_title} can take all {site.node.max_associations} associations; lower its max_associations"
            yield Finding(Verdict.WARN, "callers", told)
        if site.pacs and caller.purpose == "answer" and not any(pacs.answers(caller.ae_title) for pacs in site.pacs):
            told = f"{caller.ae_title}: no [[pacs]] answers_for it; its studies count as delivered and nobody sees the results"
            yield Finding(Verdict.FAIL, "callers", told)
    if site.node.host in LOOPBACK:
        yield Finding(Verdict.WARN, "network", f"listens on {site.node.host} only; set [node] host to be reached from the PACS")
    named = {caller.ae_title.strip() for caller in site.node.callers}
    for pacs in site.pacs:
        for title in pacs.answers_for:
            if title.strip() not in named:
                yield Finding(Verdict.FAIL, "pacs", f"{pacs.name}: answers_for names {title}, which is no [[node.callers]]")


def _metrics(site: Settings) -> Iterator[Finding]:
    if site.metrics.host in LOOPBACK:
        yield Finding(Verdict.OK, "metrics", f"shown on {site.metrics.host} only")
    else:
        told = f"[metrics] host = {site.metrics.host}: whoever reaches it reads the figures; let only the monitoring host through"
        yield Finding(Verdict.WARN, "metrics", told)


def _tls(site: Settings) -> Iterator[Finding]:
    """Look at our own certificate as the peers that call will, and at what their certificates are judged by."""
    from node import tls

    settings = site.node.tls
    if settings.on:
        tls.server_context(settings)
        ports = f"TLS {settings.min_version} or newer on port {settings.port}"
        yield _until(tls.ends(settings.certificate), "tls", f"{settings.certificate}: fits its key, {ports}")
        if settings.ca and (why := tls.signed_by(settings.certificate, settings.key, settings.ca)):
            told = (
                f"{settings.certificate}: whoever trusts {settings.ca} alone refuses it ({why}); callers need its own authority"
            )
            yield Finding(Verdict.WARN, "tls", told)
        if not settings.require_client_certificate:
            yield Finding(Verdict.WARN, "tls", "callers need no certificate: require_client_certificate = false")
        for caller in site.node.callers:
            if settings.ca and not caller.certificate_names:
                told = f"{caller.ae_title}: any certificate of {settings.ca} may call under this title; set certificate_names"
                yield Finding(Verdict.WARN, "tls", told)
        if settings.keep_plain_port:
            yield Finding(Verdict.WARN, "tls", f"plain DICOM is still taken on port {site.node.port}: keep_plain_port = true")
    elif site.node.callers and site.node.host not in LOOPBACK:
        yield Finding(Verdict.WARN, "tls", "off: whoever is on the network reads along; set [node.tls]")
    yield from _ends(site)


def _ends(site: Settings) -> Iterator[Finding]:
    """Look at when authorities, revocation lists and what we present to each PACS end."""
    from node import tls

    settings = site.node.tls
    for pacs in site.pacs:
        if pacs.tls and pacs.tls_certificate not in ("", settings.certificate):
            yield _until(tls.ends(pacs.tls_certificate), "tls", f"{pacs.tls_certificate}: presented to {pacs.name}")
    for file in sorted({settings.ca, *(pacs.tls_ca for pacs in site.pacs if pacs.tls)} - {""}):
        for authority in tls.certificates(file):
            yield _until(authority.not_valid_after_utc, "tls", f"{file}: an authority")
    for file in sorted({settings.crl, *(pacs.tls_crl for pacs in site.pacs if pacs.tls)} - {""}):
        if (end := tls.crl_ends(file)) is not None:
            yield _until(end, "tls", f"{file}: the revocation list", days=CRL_DAYS_MIN)


def _until(end: datetime, what: str, told: str, *, days: int = CERTIFICATE_DAYS_MIN) -> Finding:
    """Judge when something stops being valid."""
    left = (end - datetime.now(UTC)).total_seconds() / 86400
    if left <= 0:
        return Finding(Verdict.FAIL, what, f"{told}: EXPIRED on {end:%Y-%m-%d %H:%M} UTC; nobody will accept it")
    verdict = Verdict.OK if left >= days else Verdict.WARN
    return Finding(verdict, what, f"{told}; valid until {end:%Y-%m-%d} ({left:.0f} days)")


def _peers(site: Settings) -> Iterator[Finding]:
    from models.errors import Final
    from node import peer
    from node.errors import PeerAway

    if not site.pacs:
        yield Finding(Verdict.FAIL, "pacs", "no [[pacs]]: results have nowhere to go")
    for pacs in site.pacs:
        where = f"{pacs.name}: {pacs.ae_title}@{pacs.host}:{pacs.port}"
        try:
            if pacs.tls:
                yield _until(peer.certificate_ends(pacs), "pacs", f"{where}: its certificate")
            elif pacs.host not in LOOPBACK:
                yield Finding(Verdict.WARN, "pacs", f"{where}: results, with the patient's name, leave without TLS")
            peer.echo(pacs, site.node.ae_title)
            yield Finding(Verdict.OK, "pacs", f"{where} answers C-ECHO{' over TLS' if pacs.tls else ''}")
        except (PeerAway, Final) as error:
            yield Finding(Verdict.FAIL, "pacs", f"{where}: {error}")


def _model(site: Settings) -> Iterator[Finding]:
    from models.registry import Registry
    from models.runtime import Model

    registry = Registry(site.storage.root / "models")
    version = registry.champion()
    if version is None:
        yield Finding(Verdict.WARN, "model", "none in service: studies to be answered wait until one is promoted")
        return
    registry.verify(version)
    Model.load(registry, version)
    yield Finding(Verdict.OK, "model", f"{version}, files as its card states; it runs")


def _provider(site: Settings) -> Iterator[Finding]:
    from models.runtime import onnx_runtime

    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[site.inference.provider]
    if wanted in onnx_runtime().get_available_providers():
        yield Finding(Verdict.OK, "provider", wanted)
    elif site.inference.allow_degraded:
        yield Finding(Verdict.WARN, "provider", f"{wanted} is not available; results will say that the CPU was used")
    else:
        yield Finding(Verdict.FAIL, "provider", f'{wanted} is not available: install the extra `gpu`, or set provider = "cpu"')


def _codecs(site: Settings) -> Iterator[Finding]:
    from models.preprocess import missing_codecs

    missing = missing_codecs()
    if missing:
        yield Finding(Verdict.FAIL, "codecs", f"no decoder for {', '.join(missing)}; reinstall imagecodecs and pylibjpeg-rle")
    else:
        yield Finding(Verdict.OK, "codecs", "every accepted transfer syntax can be decoded")


def _wheels(site: Settings) -> Iterator[Finding]:
    from importlib.metadata import distributions

    installed = {(dist.metadata["Name"] or "").lower() for dist in distributions()}
    clean = True
    for pair in PAIRS:
        if installed.issuperset(pair):
            clean = False
            yield Finding(Verdict.FAIL, "packages", f"{pair[0]} and {pair[1]} overwrite each other: uninstall both, install one")
    if clean:
        yield Finding(Verdict.OK, "packages", "no wheels that overwrite each other")


def _names(site: Settings) -> Iterator[Finding]:
    from importlib.util import find_spec

    here = Path(__file__).resolve().parents[2]
    for name in OURS:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            yield Finding(Verdict.FAIL, "packages", f"the package {name} is missing: install Osteon again")
        elif not Path(spec.origin).resolve().is_relative_to(here):
            yield Finding(Verdict.FAIL, "packages", f"a foreign package named {name} hides ours; use an environment of its own")


def _clock(site: Settings) -> Iterator[Finding]:
    import shutil
    import subprocess

    if shutil.which("timedatectl") is None:
        yield Finding(Verdict.WARN, "clock", "cannot be judged here (no timedatectl): make sure it is synchronised")
        return
    shown = subprocess.run(
        ["timedatectl", "show", "-p", "NTPSynchronized", "--value"], capture_output=True, text=True, timeout=10
    )
    if shown.stdout.strip() == "yes":
        yield Finding(Verdict.OK, "clock", "synchronised")
    else:
        yield Finding(Verdict.WARN, "clock", "not synchronised: expiry, deadlines and the SR's times follow this clock")


def _schedules(site: Settings) -> Iterator[Finding]:
    """Ask the installed packages (entry-point group `osteon.checks`) what keeps a schedule from running here."""
    from importlib.metadata import entry_points

    complaints = [told for entry in entry_points(group="osteon.checks") for told in entry.load()(site)]
    for is_error, told in complaints:
        yield Finding(Verdict.FAIL if is_error else Verdict.WARN, "schedule", told)
    if site.schedule and not complaints:
        yield Finding(Verdict.OK, "schedule", ", ".join(one.name for one in site.schedule))
