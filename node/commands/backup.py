"""`osteon backup`, `osteon restore`: one consistent set of what a site knows, and the way back onto an empty machine.

In: the settings and a folder outside the storage. Out: a set, a list, a restored site. The keys are read to tell whose a set is
and must never be copied: a person states where their copies lie (`osteon backup keys-kept`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.commands.progress import progress
from node.errors import BadSettings
from node.options import DEFAULT_CONFIG, Config, login

if TYPE_CHECKING:
    from node.keep.backup import Set, Stores, Whose
    from node.keep.catalogue import Catalogue
    from node.settings import Settings

app = typer.Typer(
    help="Save catalogue, vault, quarantine, models and the list of the archive; without a further word, make a set."
)

Folder = Annotated[str, typer.Argument(metavar="[DIR]", help="Folder of the sets; \\[backup] folder when it is left out.")]

KEPT = "keys_kept"


@dataclass(frozen=True, slots=True)
class Last:
    """The newest set that was finished."""

    at: datetime
    size: int
    where: str


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    to: Annotated[str, typer.Option("--to", help="Folder of the sets; \\[backup] folder when it is left out.")] = "",
    copy_archive: Annotated[
        bool, typer.Option("--copy-archive", help="Also copy the images that DIR/archive does not have yet.")
    ] = False,
    keep: Annotated[int, typer.Option("--keep", min=0, help="Afterwards remove all but this many sets; 0 removes none.")] = 0,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Make one set while the node runs."""
    if context.invoked_subcommand is not None:
        source = context.get_parameter_source("config")
        if source is not None and source.name == "COMMANDLINE":  # the verb reads its own: it would act on another site
            raise typer.BadParameter(f"give it after the verb: osteon backup {context.invoked_subcommand} --config {config}",
                                     param_hint="--config")  # fmt: skip
        return
    from node import settings
    from node.keep import backup

    site = settings.load(config)
    folder = _folder(site, to)
    require_apart(folder, site)
    with _stores(site) as stores, progress() as told:
        made = backup.make(stores, folder, copy_archive=copy_archive, now=datetime.now(UTC), told=told)
    _record(site, made)
    typer.echo(
        f"{made.folder}: {spelt(made.size)}, {made.counts['archive']} images listed, {made.counts['quarantine']} held objects"
    )
    for name in backup.prune(folder, keep):
        typer.echo(f"{name}: removed")
    if made.missing:
        typer.echo(f"{made.missing} catalogued images have no file: `osteon archive verify` names them", err=True)
        raise typer.Exit(1)


@app.command("list")
def list_sets(folder: Folder = "", config: Config = DEFAULT_CONFIG) -> None:
    """List the sets of a folder: name, version that made it, size, studies, images."""
    from node import settings
    from node.keep import backup

    found = backup.sets(Path(folder) if folder else _folder(settings.load(config), ""))
    for one in found:
        studies, listed = one.counts["catalogue.study"], one.counts["archive"]
        typer.echo(f"{one.folder}  Osteon {one.osteon}  {spelt(one.size):>9}  {studies} studies  {listed} images")
    if not found:
        typer.echo("There is no set here; `osteon backup` makes one.")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="SET", help="Folder of one set, as `osteon backup list` shows it.")],
) -> None:
    """Hold every file of a set against its manifest; exit code 1 when one differs."""
    from node.keep import backup

    one = backup.read(folder)
    with progress() as told:
        wrong = backup.verify(one, told)
    for line in wrong:
        typer.echo(line)
    if wrong:
        raise typer.Exit(1)
    typer.echo(f"{one.folder.name}: {len(one.files)} files are as the manifest says")


@app.command("keys-kept")
def keys_kept(
    where: Annotated[
        str, typer.Option("--where", help="Where the copies of both keys lie; kept in the history.", prompt="Where")
    ],
    config: Config = DEFAULT_CONFIG,
) -> None:
    """State that copies of both keys are kept elsewhere; another key needs another statement."""
    from node import settings
    from node.keep.catalogue import Catalogue

    site = settings.load(config)
    if not where.strip():
        raise typer.BadParameter("say where the copies lie", param_hint="--where")
    with Catalogue.open(site.storage.catalogue) as catalogue:
        catalogue.roles.set_flag(KEPT, whose(site).keys, by=login(), reason=where.strip(), now=datetime.now(UTC))
    typer.echo("Noted. A new key (site_key or vault_key) asks for a new statement.")


def restore(
    folder: Annotated[Path, typer.Argument(metavar="SET", help="Folder of one set, as `osteon backup list` shows it.")],
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Put a set into the empty stores that the settings name; the keys must be in their places first."""
    from node import settings
    from node.keep import backup
    from node.keep.vault import METADATA, Vault

    site = settings.load(config)
    one = backup.read(folder)
    backup.require_keys(one, whose(site))
    storage = site.storage
    with progress() as told:
        copied = backup.restore(
            one,
            storage.root,
            catalogue_url=storage.catalogue,
            vault_url=storage.vault,
            vault_tables=METADATA,
            by=login(),
            now=datetime.now(UTC),
            told=told,
        )
    Vault.open(storage.vault, _keys(site)[1]).close()  # the rows are sealed with this key indeed
    _record(site, one)
    made, given = f"{one.made_at.astimezone():%Y-%m-%d %H:%M}", f" --config {config}"
    typer.echo(f"""\
{one.folder.name} is restored: the site as it was on {made}. Answers are paused.
Images copied back from the set's folder: {copied} of {one.counts["archive"]}.
Next:
  1. Bring the other files of the archive back below {storage.root / "archive"}, from the backup of your file system.
  2. osteon archive verify{given}
  3. osteon archive repair{given}
  4. osteon serve{given}
  5. Send again what the PACS sent since {made}: to {site.node.learn_ae_title} what has its result in the PACS already, the rest
     to {site.node.ae_title}. Then let results leave:
     osteon reply resume --reason "restored"{given}""")


# --- what check and status say --------------------------------------------------------------------------------------------------


def last(catalogue: Catalogue) -> Last | None:
    """Give the newest set that was finished, None when there was none."""
    from node.keep.records import LAST_BACKUP

    told = catalogue.roles.flag(LAST_BACKUP)
    if told is None:
        return None
    at, size = told.split()
    acts = catalogue.history.acts(subject=LAST_BACKUP, limit=1)
    return Last(datetime.fromisoformat(at), int(size), acts[0].reason if acts else "")


def are_keys_kept(catalogue: Catalogue, site: Settings) -> bool:
    """Say whether a person stated that copies of the keys of today are kept elsewhere."""
    return catalogue.roles.flag(KEPT) == whose(site).keys


def _record(site: Settings, made: Set) -> None:
    """Note the set when it is whole: it is not in itself, so a restored site is told of it once more."""
    from node.keep.catalogue import Catalogue
    from node.keep.records import LAST_BACKUP

    value = f"{made.made_at:%Y-%m-%dT%H:%M:%S%z} {made.size}"
    with Catalogue.open(site.storage.catalogue) as catalogue:
        catalogue.roles.set_flag(LAST_BACKUP, value, by=login(), reason=str(made.folder), now=datetime.now(UTC))


# --- whose, and where -----------------------------------------------------------------------------------------------------------


def whose(site: Settings) -> Whose:
    """Tell whose a set is by what is derived from the keys one way."""
    from node.keep.backup import Whose
    from node.keep.seal import Seal
    from node.pseudonym import SiteKeys

    site_key, vault_key = _keys(site)
    return Whose(SiteKeys.derive(site_key).report_uid("site"), Seal(vault_key).key_id.hex(), site.node.default_issuer)


def require_apart(folder: Path, site: Settings) -> None:
    """Refuse a folder that would be lost with what it saves, or that has the keys in it.

    Raises
    ------
    BadSettings
        It lies in the storage, or a key lies in it.
    """
    root = site.storage.root.resolve()
    if folder == root or folder.is_relative_to(root):
        raise BadSettings(f"{folder} lies in the storage that it is to save ({root}): name a folder on another disk")
    for place in (site.storage.site_key, site.storage.vault_key):
        if not place.startswith("env:") and Path(place).resolve().is_relative_to(folder):
            raise BadSettings(
                f"{place} lies in {folder}: what is sealed and its key must not be saved together; name another folder"
            )


def _folder(site: Settings, named: str) -> Path:
    folder = named or site.backup.folder
    if not folder:
        raise BadSettings("no folder for the backup: name one with --to, or in [backup] folder")
    return Path(folder).resolve()


def _keys(site: Settings) -> tuple[bytes, bytes]:
    from node.settings import load_key

    return load_key(site.storage.site_key), load_key(site.storage.vault_key)


@contextmanager
def _stores(site: Settings) -> Iterator[Stores]:
    """Open what is saved."""
    from node.keep.backup import Stores
    from node.keep.catalogue import Catalogue
    from node.keep.database import Database
    from node.keep.vault import METADATA

    _whose_stores(site)  # wrong keys are told before anything is opened or waited for
    rows = Database.open(site.storage.vault, METADATA)
    try:
        with Catalogue.open(site.storage.catalogue) as catalogue:
            yield Stores(site.storage.root, catalogue.database, rows, METADATA, partial(_whose_stores, site))
    finally:
        rows.close()


def _whose_stores(site: Settings) -> Whose:
    """Tell whose the stores are, after a look whether the keys are the ones of these stores."""
    from node.keep.vault import Vault

    mine = whose(site)
    with Vault.open(site.storage.vault, _keys(site)[1]) as vault:
        vault.check_site(mine.site)
    return mine


def spelt(size: int) -> str:
    """Spell a number of bytes for a reader."""
    for unit, length in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size / 1024:.0f} KiB"
