"""`osteon archive`: hold archive, catalogue, vault and quarantine against each other, and mend what can be mended.

In: the settings, and a backup set where one is at hand. Out: lines that name no patient. Nothing changes without `repair --yes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.commands.progress import progress
from node.options import DEFAULT_CONFIG, Config, login

if TYPE_CHECKING:
    from pydicom import Dataset

    from node.keep.backup import Set
    from node.keep.reconcile import Finding, Known, Means, Stores
    from node.keep.records import RawElement
    from node.keep.vault import Vault
    from node.settings import Settings

app = typer.Typer(help="Archive, catalogue, vault and quarantine held against each other: verify, repair.", no_args_is_help=True)

Against = Annotated[
    str, typer.Option("--against", help="Backup set whose hashes the files must have; the newest in \\[backup] folder by itself.")
]
SHOWN = 20
"""Findings of a kind that are listed; the rest are counted."""


@app.command()
def verify(
    quick: Annotated[bool, typer.Option("--quick", help="Only look whether each file is there, not into it.")] = False,
    every: Annotated[bool, typer.Option("--all", help="List every finding, not the first of each kind.")] = False,
    against: Against = "",
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Look whether each image has its file, row and identity; exit code 1 when anything is not as it should be."""
    from node import settings
    from node.keep import reconcile

    site = settings.load(config)
    with _opened(site) as (stores, _vault):
        found = _findings(stores, _known(_set(site, against)), quick=quick)
        for line in _told(found, {finding: reconcile.advice(finding) for finding in found}, shown=len(found) if every else SHOWN):
            typer.echo(line)
        if found:
            raise typer.Exit(1)
        typer.echo(f"{stores.catalogue.instances.count()} images: each has its file, its row and its identity.")


@app.command()
def repair(
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this word it is only said what would be done.")] = False,
    against: Against = "",
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Mend what can be mended without guessing, and say what a person has to do; exit code 1 while that is something."""
    from node import settings
    from node.keep import reconcile, turns

    site = settings.load(config)
    saved = _set(site, against)
    with _opened(site) as (stores, vault), turns.looking(site.storage.root):
        known = _known(saved)
        found = _findings(stores, known, quick=False)
        means = _means(site, stores, vault, saved, known)
        remedies = {finding: reconcile.remedy(finding, means) for finding in found}
        told = {finding: remedies[finding] or reconcile.advice(finding) for finding in found}
        for line in _told(found, told, shown=len(found)):
            typer.echo(line)
        if yes:
            reconcile.repair(found, means)
        elif any(remedies.values()):
            typer.echo("Nothing was changed; `osteon archive repair --yes` does it.")
    left = sum(1 for finding in found if not remedies[finding] or reconcile.asks_for_more(finding, remedies[finding]))
    if left or (found and not yes):
        typer.echo(f"{left} of {len(found)} need a person: send the studies again from the PACS, or as the lines say.")
        raise typer.Exit(1)
    typer.echo("All is as it should be.")


def _findings(stores: Stores, known: Mapping[str, Known], *, quick: bool) -> list[Finding]:
    from node.keep import reconcile, turns

    with turns.looking(stores.root), progress() as told:
        return list(reconcile.verify(stores, known=known, quick=quick, told=told))


def _told(found: Sequence[Finding], told: Mapping[Finding, str], *, shown: int) -> Iterator[str]:
    """Lay the findings out by kind, with what is to be done."""
    counts = Counter(finding.kind for finding in found)
    for kind, count in counts.items():
        yield f"{kind}: {count}"
        of_kind = [finding for finding in found if finding.kind is kind]
        for finding in of_kind[:shown]:
            yield f"  {finding.path}" + (f": {told[finding]}" if told[finding] else "")
        if count > shown:
            yield f"  … and {count - shown} more; --all lists them"


@contextmanager
def _opened(site: Settings) -> Iterator[tuple[Stores, Vault]]:
    from node.keep.archive import Archive
    from node.keep.catalogue import Catalogue
    from node.keep.reconcile import Stores
    from node.keep.vault import Vault
    from node.settings import load_key

    root = site.storage.root
    vault_key = load_key(site.storage.vault_key)
    with Vault.open(site.storage.vault, vault_key) as vault, Catalogue.open(site.storage.catalogue) as catalogue:
        yield Stores(root, Archive(root / "archive"), catalogue, vault.known), vault


def _set(site: Settings, named: str) -> Set | None:
    """Give the set whose hashes count, None when there is none at hand."""
    from node.keep import backup

    if named:
        return backup.read(Path(named))
    return next(reversed(backup.sets(Path(site.backup.folder))), None) if site.backup.folder else None


def _known(saved: Set | None) -> dict[str, Known]:
    from node.keep import backup
    from node.keep.reconcile import Known

    if saved is None:
        return {}
    return {one["path"]: Known(one["size"], one["sha256"], one["mtime_ns"], saved.made_at) for one in backup.images(saved.folder)}


def _means(site: Settings, stores: Stores, vault: Vault, saved: Set | None, known: Mapping[str, Known]) -> Means:
    from datetime import UTC, datetime

    from node.errors import NotFound
    from node.keep.reconcile import Means
    from node.pseudonym import SiteKeys
    from node.receive.profile import Vocabulary
    from node.settings import load_key

    keys = SiteKeys.derive(load_key(site.storage.site_key))
    vocabulary = Vocabulary.load(Path(site.node.vocabulary) if site.node.vocabulary else None)
    issuer = site.node.default_issuer

    def keys_of(study_uid: str) -> tuple[str, str]:
        try:
            elements = vault.study(study_uid).study
        except NotFound:
            return "", ""
        return keys.accession(issuer, _text(elements, "AccessionNumber")), keys.study_id(issuer, _text(elements, "StudyID"))

    return Means(
        stores=stores,
        mirror=saved.folder.parent / "archive" if saved else Path(site.storage.root, "no mirror"),
        known=known,
        is_locked=lambda pid: keys.is_locked(pid, site.training.locked),
        keys_of=keys_of,
        body_part=lambda clean: _body_part(clean, vocabulary.codes["anatomic_region"]),
        by=login(),
        now=datetime.now(UTC),
    )


def _body_part(clean: Dataset, regions: Mapping[tuple[str, str], object]) -> str:
    """Read the term as the intake did: Body Part Examined, else the first anatomic region that has one."""
    stated = str(clean.get("BodyPartExamined") or "")
    coded = (regions.get((item.CodingSchemeDesignator, item.CodeValue)) for item in clean.get("AnatomicRegionSequence") or ())
    return stated or next((str(term) for term in (getattr(code, "body_part", "") for code in coded) if term), "")


def _text(elements: Sequence[RawElement], keyword: str) -> str:
    """Read a number of the hospital's; one in other letters than ASCII is not looked up, and stays empty."""
    from pydicom.datadict import tag_for_keyword

    value = next((element.value for element in elements if element.tag == tag_for_keyword(keyword)), b"")
    return value.decode("ascii") if value.isascii() else ""
