"""`osteon patients`: say that two patients are one person, because the hospital merged them.

In: pseudonyms as arguments, hospital identifiers from a prompt or a file: a command line stays in the shell's history. Out: lines
under pseudonyms. Nothing here may print or keep an identifier, or open the vault before a merge is certain to be made.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.options import DEFAULT_CONFIG, Config, login

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from node.keep.catalogue import Catalogue
    from node.keep.catalogue.patients import Merge
    from node.keep.custody import Custody
    from node.pseudonym import SiteKeys
    from node.settings import Settings

app = typer.Typer(help="Patients whom the hospital merged: let two be one person.", no_args_is_help=True)

COLUMNS = ("gone", "kept", "gone_issuer", "kept_issuer")
PSEUDONYM = re.compile(r"OST-[A-Z2-7]{16}")


@dataclass(frozen=True)
class Pair:
    """One line of what was typed, already under pseudonyms."""

    line: int
    gone: str
    kept: str


@app.callback()
def patients() -> None:
    """Keep `merge` a word of its own."""


@app.command()
def merge(
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the history.")],
    gone: Annotated[str, typer.Argument(metavar="[GONE]", help="Pseudonym (OST-…) of the patient who was merged away.")] = "",
    kept: Annotated[str, typer.Argument(metavar="[KEPT]", help="Pseudonym (OST-…) of the patient who remains.")] = "",
    source: Annotated[
        str,
        typer.Option(
            "--from",
            help="CSV of hospital identifiers, - for standard input: gone, kept and, if wanted, gone_issuer, kept_issuer. "
            "Without it and without pseudonyms they are asked for: a command line would stay in the shell's history.",
            metavar="FILE",
        ),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would happen, and change nothing.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Let two patients be one person from now on: on one side of every division, and answered under the one who remains.

    A merge cannot be undone. Running the same one again is harmless, and finishes one that was cut short.
    """
    from node import settings
    from node.keep.catalogue import Catalogue
    from node.keep.custody import Custody, site_keys

    if bool(gone) != bool(kept) or (gone and source):
        raise typer.BadParameter("give two pseudonyms, or none and --from FILE, or none and type the identifiers when asked")
    if not all(PSEUDONYM.fullmatch(pid) for pid in (gone, kept) if pid):
        raise typer.BadParameter(
            "an argument must be a pseudonym (OST- and 16 letters or digits). A hospital's identifier does not belong on a "
            "command line: leave it out and type it when asked, or use --from FILE"
        )
    site = settings.load(config)
    with Catalogue.open(site.storage.catalogue) as catalogue:
        keys = site_keys(site.storage, catalogue)
        pairs = [Pair(1, gone, kept)] if gone else list(_read(site, keys, source))
        plans = _plans(site, catalogue, pairs)
    if dry_run:
        for plan, named_by in plans:
            typer.echo("\n".join(_told(plan, named_by)))
        typer.echo("dry run: nothing was changed" + ("; each line was looked at as if it were the only one" * (len(plans) > 1)))
        return
    with Custody.open(site.storage) as stores:  # before the first merge: with a wrong key there is none
        for pair in pairs:
            _merge(site, stores, pair, reason)


def _plans(site: Settings, catalogue: Catalogue, pairs: Sequence[Pair]) -> list[tuple[Merge, str]]:
    """Plan every merge before the first is made, and say of each which frozen corpora name the person.

    Raises
    ------
    NotMergeable
        With the lines that are not possible; nothing was changed.
    """
    from node.errors import NotMergeable

    plans, problems = [], []
    for pair in pairs:
        try:
            plans.append(_plan(site, catalogue, pair))
        except NotMergeable as error:
            problems.append(f"{pair.line}: {error}" if len(pairs) > 1 else str(error))
    if problems:
        told = "\n".join(f"line {problem}" for problem in problems) if len(pairs) > 1 else problems[0]
        raise NotMergeable(f"{told}; nothing was changed")
    return plans


def _plan(site: Settings, catalogue: Catalogue, pair: Pair) -> tuple[Merge, str]:
    from node.keep import frozen

    plan = catalogue.patients.plan(pair.gone, pair.kept)
    return plan, frozen.naming(catalogue, site.storage.root, plan.person.pseudonyms)


def _merge(site: Settings, stores: Custody, pair: Pair, reason: str) -> None:
    """Make one merge, planned anew: a line before it may have made another person of these two."""
    from node.keep import frozen

    plan, named_by = _plan(site, stores.catalogue, pair)
    typer.echo("\n".join(_told(plan, named_by)))
    patients, now = stores.catalogue.patients, datetime.now(UTC)
    done = patients.merge(plan, named_by=named_by, by=login(), reason=reason, now=now)
    # a run that froze its lists between the look and the merge did not see the lock, nor the look the lists
    named_after = frozen.naming(stores.catalogue, site.storage.root, done.person.pseudonyms)
    patients.free(done.person.survivor, named_by=named_after, by=login(), now=now)
    typer.echo(_correct_identities(stores, done))


def _told(plan: Merge, named_by: str) -> Iterator[str]:
    """Say what a merge does, in lines."""
    yield f"{plan.gone} into {plan.kept}"
    if plan.is_known:
        yield "  they are one person already"
        return
    if plan.person.survivor != plan.kept:
        yield f"  {plan.kept} was merged earlier: the person counts as {plan.person.survivor}"
    if others := sorted(plan.person.pseudonyms - {plan.gone, plan.kept, plan.person.survivor}):
        yield f"  with them: {', '.join(others)}"
    for pid in plan.unseen:
        yield f"  no image of {pid} came so far: check that it is the right one; its images will follow the merge"
    if plan.locked_before and named_by:
        yield f"  leaves the locked set: {named_by} names the person"
    elif plan.locked_before:
        yield "  the person is in the locked set: nothing trains on any of these images"


def _correct_identities(stores: Custody, merge: Merge) -> str:
    """Let the studies of those merged away be answered under the patient who remains, where the vault knows that patient."""
    survivor = merge.person.survivor
    theirs = stores.catalogue.patients.studies(merge.person.pseudonyms - {survivor})
    everything = stores.catalogue.patients.studies(merge.person.pseudonyms)
    if not theirs:
        return "  merged; no study stands under a number that is gone"
    identity = stores.vault.newest(everything, pid=survivor)
    if identity is None:
        return (
            f"  merged; {len(theirs)} studies keep the identity that is gone until an image comes under the other: "
            "send one image of each again from the PACS, or their results are held"
        )
    changed = stores.vault.hand_over(theirs, identity, now=datetime.now(UTC))
    told = f"  merged; {len(changed)} of {len(theirs)} studies now leave under the identity that remains"
    return told + ("; `osteon delivery retry` sends those that were held" if changed else "")


# --- what the hospital calls them ------------------------------------------------------------------------------------------


def _read(site: Settings, keys: SiteKeys, source: str) -> Iterator[Pair]:
    """Turn hospital identifiers into pseudonyms, from a table or from a prompt."""
    if source:
        yield from _table(site, keys, source)
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("there is no terminal to ask at: give two pseudonyms, or --from FILE (- for standard input)")
    gone, kept = (ask(site, keys, what) for what in ("PatientID that was merged away", "PatientID that remains"))
    yield Pair(1, gone, kept)


def ask(site: Settings, keys: SiteKeys, what: str) -> str:
    """Ask for a hospital's PatientID and its issuer, and give the pseudonym."""
    patient_id = typer.prompt(what, err=True)
    issuer = typer.prompt("  issued by", default=site.node.default_issuer, err=True)
    return pseudonym(site, keys, patient_id, issuer)


def pseudonym(site: Settings, keys: SiteKeys, patient_id: str, issuer: str) -> str:
    """Give the pseudonym of a patient as the intake does.

    Raises
    ------
    UnusablePatientID
        The identifier names nobody; it is not repeated.
    """
    from node.receive.pseudonymise import Rules, require_usable

    issuer = issuer.strip() or site.node.default_issuer
    rules = Rules.load(default_issuer=issuer, placeholder_patient_ids=site.node.placeholder_patient_ids)
    require_usable(patient_id.strip(), issuer, rules)
    return keys.pid(issuer, patient_id)


def _table(site: Settings, keys: SiteKeys, source: str) -> Iterator[Pair]:
    import csv
    from io import StringIO

    from node.errors import NotMergeable
    from node.receive.pseudonymise import UnusablePatientID

    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text("utf-8-sig")
    except OSError as error:
        raise NotMergeable(f"{source}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise NotMergeable(f"{source}: not UTF-8; save the file as UTF-8 text") from None
    text = text.lstrip("\ufeff")
    table = csv.DictReader(StringIO(text), delimiter="," if "," in text.split("\n", 1)[0] else ";", strict=True)
    names = [(name or "").strip() for name in table.fieldnames or ()]
    if not set(COLUMNS[:2]) <= set(names) <= set(COLUMNS) or len(set(names)) != len(names):
        raise NotMergeable(
            f"the columns are {', '.join(COLUMNS[:2])} and, if wanted, {', '.join(COLUMNS[2:])}; nothing was changed"
        )
    table.fieldnames = names
    try:
        for cells in table:
            line = table.line_num
            if None in cells or None in cells.values():
                raise NotMergeable(f"line {line}: the row has not {len(names)} cells as the header has; nothing was changed")
            try:
                gone, kept = (pseudonym(site, keys, cells[name], cells.get(f"{name}_issuer", "")) for name in COLUMNS[:2])
            except UnusablePatientID as error:
                raise NotMergeable(f"line {line}: {error}; nothing was changed") from None
            yield Pair(line, gone, kept)
    except csv.Error:
        raise NotMergeable(f"line {table.line_num} is no CSV: is a quotation mark missing? Nothing was changed") from None
