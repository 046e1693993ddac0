"""`osteon vault`: look through what is sealed, and change the key that seals it.

In: the site's keys. Out: counts and pseudonyms; an identity is never printed. Nothing here changes a key file that exists.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.options import DEFAULT_CONFIG, Config, login

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.keep.catalogue import Catalogue
    from node.keep.custody import Custody
    from node.keep.rotation import Rotation
    from node.settings import Storage

app = typer.Typer(help="The sealed store of identities: verify it, change its key.", no_args_is_help=True)

NewKey = Annotated[
    str,
    typer.Option(
        "--new-key",
        help="Where the new key is: a file (made when it is not there), env:NAME or credential:NAME.",
        metavar="PLACE",
    ),
]
OldKey = Annotated[
    str,
    typer.Option(
        "--old-key",
        help="Where the key is that sealed it so far.  [default: \\[storage] vault_key]",
        metavar="PLACE",
        show_default=False,
    ),
]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the history.")]

BEGUN, DONE = "vault rotation begun", "vault rotated"
SUBJECT = "vault"
PAGE = 500


@app.command()
def verify(config: Config = DEFAULT_CONFIG) -> None:
    """Open every sealed row and file, and hold them against the catalogue; exit code 1 when something is wrong."""
    from node import settings
    from node.keep.custody import Custody

    with Custody.open(settings.load(config).storage) as stores:
        held = stores.quarantine.ids()
        rows, images = stores.vault.count(), stores.catalogue.instances.count()
        with _bar("looking through the vault", rows + images + len(held)) as advance:
            troubles = [*_rows(stores, advance), *_catalogued(stores, advance), *_held(stores, held, advance)]
    for trouble in troubles:
        typer.echo(trouble)
    typer.echo(f"{rows} rows of the vault, {images} images of the catalogue, {len(held)} files of the quarantine: "
               + (f"{len(troubles)} wrong" if troubles else "all as they should be"))  # fmt: skip
    if troubles:
        raise typer.Exit(1)


def _rows(stores: Custody, advance: Callable[[int], None]) -> Iterator[str]:
    """Say which rows of the vault do not open, or stand under pseudonyms that are not theirs."""
    keys, studies = stores.keys, set()
    for row in stores.vault.rows():
        advance(1)
        told = f"vault: study {row.study_uid}" + (f", image {row.sop_uid}" if row.sop_uid else "")
        if not row.sop_uid:
            studies.add(row.study_uid)
        if row.identity is None:
            yield f"{told}: does not open: sealed with another key, or damaged; restore the vault from its backup"
            continue
        original, pseudonym = (
            (row.identity.original_sop_uid, row.sop_uid) if row.sop_uid else (row.identity.original_study_uid, row.study_uid)
        )
        if keys.uid(original) != pseudonym:
            yield f"{told}: what is in it belongs to another pseudonym; restore the vault from its backup"
        elif row.sop_uid and row.study_uid not in studies and not stores.vault.knows(row.study_uid):  # it may have come since
            yield f"{told}: its study has no identity; send the study again"
        elif not row.sop_uid:
            yield from _whose(stores.catalogue, row.study_uid, row.identity.pid, told)


def _whose(catalogue: Catalogue, study_uid: str, pid: str, told: str) -> Iterator[str]:
    study = catalogue.studies.get(study_uid)
    if study is not None and study.pid and pid not in catalogue.patients.person(study.pid).pseudonyms:
        yield f"{told}: is {pid}'s here and {study.pid}'s in the catalogue; `osteon patients merge` if the two are one person"


def _catalogued(stores: Custody, advance: Callable[[int], None]) -> Iterator[str]:
    """Say which images of the catalogue have no identity: no result could be returned for them."""
    for page in stores.catalogue.instances.pages(PAGE):
        for study_uid, sop_uid in stores.vault.unknown(page):
            yield f"catalogue: study {study_uid}, image {sop_uid}: the vault has no identity for it; send the study again"
        advance(len(page))


def _held(stores: Custody, held: Iterable[str], advance: Callable[[int], None]) -> Iterator[str]:
    """Say which files of the quarantine do not open or are gone."""
    for held_id in held:
        if not stores.quarantine.opens(held_id):
            yield f"quarantine: {held_id}: does not open: sealed with another key, or damaged; restore it, or discard it"
        advance(1)
    listed = {one.id for one, _at in stores.catalogue.instances.held()}
    for gone in sorted(listed - set(stores.quarantine.ids())):
        if stores.catalogue.instances.held_one(gone) is None:  # a person decided meanwhile
            continue
        yield f"quarantine: {gone}: its file is gone; restore it from its backup, or discard it and have it sent again"


@app.command()
def rotate(new_key: NewKey, reason: Reason, old_key: OldKey = "", config: Config = DEFAULT_CONFIG) -> None:
    """Seal vault and quarantine with a new key. Stop every role first; when it is cut short, run it again with the same keys.

    The site key cannot be rotated: every pseudonym is made with it.
    """
    from node import settings
    from node.errors import BadKey
    from node.keep.catalogue import Catalogue
    from node.keep.custody import require_old_key
    from node.keep.quarantine import Quarantine
    from node.keep.rotation import Rotation

    storage = settings.load(config).storage
    old_place = settings.key_place(old_key, Path.cwd()) if old_key else storage.vault_key
    new_place = settings.key_place(new_key, Path.cwd())
    old = settings.load_key(old_place)
    require_old_key(storage, old)
    with Catalogue.open(storage.catalogue) as catalogue:
        _require_stopped(catalogue)
        new = _new_key(new_place)
        if new == settings.load_key(storage.site_key):
            raise BadKey("the new key is the site key: the vault needs a key of its own")
        with Rotation(storage.vault, Quarantine(storage.root / "quarantine", old), old=old, new=new) as rotation:
            is_begun = rotation.is_begun()
            with _alone(storage.root):
                _seal_anew(rotation, catalogue, reason, is_begun=is_begun)
        if catalogue.history.acts(subject=SUBJECT, limit=1)[0].what != DONE:
            catalogue.history.note(by=login(), what=DONE, subject=SUBJECT, reason=reason, now=datetime.now(UTC))
    typer.echo(_next(storage, old_place, new_place))


def _next(storage: Storage, old_place: str, new_place: str) -> str:
    return f"""\
Vault and quarantine are sealed with the new key.
Next:
  1. In the settings: [storage] vault_key = "{new_place}"; then `osteon vault verify`, then start the roles.
  2. Copy the new key to the safe, apart from the data.
  3. Make a backup now. Earlier backups of vault and quarantine open with the old key ({old_place}) alone: keep it in the safe
     as long as you keep them, and destroy it with the last of them."""


def _seal_anew(rotation: Rotation, catalogue: Catalogue, reason: str, *, is_begun: bool) -> None:
    """Do what is left of a rotation."""
    steps = rotation.count()
    if not is_begun:
        with _bar("opening everything with the old key", steps) as advance:
            rotation.require_all(advance)
        catalogue.history.note(by=login(), what=BEGUN, subject=SUBJECT, reason=reason, now=datetime.now(UTC))
        rotation.begin()
    with _bar("sealing everything with the new key", steps) as advance:
        rotation.reseal(advance)
    rotation.finish()


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Refuse while a backup would copy rows of two keys."""
    from node.errors import StillRunning
    from node.keep import turns

    with turns.removing(root) as mine:
        if not mine:
            raise StillRunning("a backup, or a look through the archive, is at work: wait for its end. Nothing was changed")
        yield


def _require_stopped(catalogue: Catalogue) -> None:
    """Refuse while a role that may hold the vault shows signs of life."""
    from node.commands.status import SILENT_S
    from node.errors import StillRunning

    now = datetime.now(UTC)
    alive = [role for role in catalogue.roles.all() if abs((now - role.seen_at).total_seconds()) < SILENT_S]
    if alive:
        told = ", ".join(sorted({f"{role.name} on {role.host}" for role in alive}))
        raise StillRunning(
            f"still at work: {told}. Stop every role on every host (`systemctl stop`, or end `osteon serve`); one that was "
            f"killed is believed gone after {SILENT_S:.0f} s of silence. Nothing was changed"
        )


def _new_key(place: str) -> bytes:
    """Read the new key; a file that is not there is made, and is safe on the disk before anything is sealed with it."""
    from models import durable
    from node.settings import CREDENTIAL, ENVIRONMENT, KEY_BYTES, load_key

    if not place.startswith((ENVIRONMENT, CREDENTIAL)) and not Path(place).exists():
        durable.write(Path(place), base64.b64encode(secrets.token_bytes(KEY_BYTES)) + b"\n", mode=0o600)
        typer.echo(f"a new key is in {place}")
    return load_key(place)


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)
