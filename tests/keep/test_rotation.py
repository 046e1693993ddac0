"""The vault key is changed while anything may kill it: every row and file opens with one of the two keys, and it goes on."""

from __future__ import annotations

import base64
import itertools
import multiprocessing
import os
import signal
import stat
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from roles import hand_in
from sqlalchemy import delete, select
from studies import image
from test_custody import everything
from test_vault import KEY, NOW, OTHER, identity
from typer.testing import CliRunner

from models.errors import Tampered
from node import settings
from node.__main__ import build
from node.errors import BadKey, LostStore, RotationUnfinished, StillRunning
from node.keep import turns
from node.keep import vault as vault_module
from node.keep.custody import Custody
from node.keep.database import Database
from node.keep.quarantine import Quarantine
from node.keep.records import Held, Hold, Purpose, Role
from node.keep.rotation import Rotation
from node.keep.seal import Seal
from node.keep.vault import INSTANCES, META, METADATA, STUDIES, Vault, instance_row, study_row
from node.receive.intake import Intake, Taken

THIRD = bytes(range(2, 34))
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["node.keep.rotation", "node.receive.intake", "node.__main__", "studies", "roles", "pytest"])


def held(number: int) -> Held:
    return Held(
        id=f"{number:032x}",
        reason=Hold.MALFORMED,
        detail="",
        modality="",
        sop_class_uid="",
        study_uid="",
        sop_uid="",
        pid="",
        calling_ae="SENDER",
        purpose=Purpose.LEARN,
    )


def fill(url: str, folder: Path, key: bytes = KEY) -> Quarantine:
    """Seal three studies of one image each and two files."""
    with Database.open(url, METADATA) as database:
        for table in (META, STUDIES, INSTANCES):
            database.write(lambda connection, table=table: connection.execute(delete(table)))  # type: ignore[misc]
    with Vault.open(url, key) as vault:
        vault.check_site("fingerprint")
        for study in (1, 2, 3):
            vault.remember(identity(study=study), now=NOW)
    quarantine = Quarantine(folder, key)
    for number in (1, 2):
        quarantine.put(b"SECRET %d" % number, held(number))
    return quarantine


def rotate(url: str, folder: Path, old: bytes = KEY, new: bytes = OTHER) -> None:
    with Rotation(url, Quarantine(folder, old), old=old, new=new) as rotation:
        if not rotation.is_begun():
            rotation.require_all(lambda _done: None)
            rotation.begin()
        rotation.reseal(lambda _done: None)
        rotation.finish()


def opens_with(url: str, folder: Path, *keys: bytes) -> bool:
    """Say whether every row and every file opens with one of these keys."""
    seals = [Seal(key) for key in keys]

    def opens(sealed: bytes, place: str) -> bool:
        for seal in seals:
            try:
                seal.open(sealed, place)
            except BadKey:
                continue
            return True
        return False

    with Database.open(url, METADATA) as database, database.read() as connection:
        rows = [(bytes(row.sealed), study_row(row.study_uid)) for row in connection.execute(select(STUDIES))]
        rows += [(bytes(row.sealed), instance_row(row.study_uid, row.sop_uid)) for row in connection.execute(select(INSTANCES))]
    rows += [((folder / f"{held_id}.sealed").read_bytes(), f"quarantine:{held_id}") for held_id in Quarantine(folder, KEY).ids()]
    assert len(rows) == 3 + 3 + 2
    return all(opens(*row) for row in rows)


def test_afterwards_the_new_key_alone_opens_everything(database_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "quarantine"
    fill(database_url, folder)
    before = [one.sop_uid for one in _instances(database_url, KEY)]
    rotate(database_url, folder)
    assert opens_with(database_url, folder, OTHER)
    assert [one.sop_uid for one in _instances(database_url, OTHER)] == before
    assert Quarantine(folder, OTHER).read(held(1).id) == b"SECRET 1"
    with pytest.raises(BadKey):
        Vault.open(database_url, KEY)
    with Vault.open(database_url, OTHER) as vault:
        vault.check_site("fingerprint")
        vault.remember(identity(study=4), now=NOW)
    rotate(database_url, folder, OTHER, THIRD)
    with Vault.open(database_url, THIRD) as vault:
        assert vault.study("2.25.4").patient == identity().patient


def _instances(url: str, key: bytes) -> list[Any]:
    with Vault.open(url, key) as vault:
        return vault.instances("2.25.1")


# --- killed ----------------------------------------------------------------------------------------------------------------


class Cut(BaseException):
    """The process ends here."""


def _cut() -> None:
    raise Cut


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _rotate_until(at: int, url: str, folder: Path, end: Callable[[], None]) -> None:
    """Rotate, and end before or after one of the writes and renames: the `at`-th such moment."""
    steps = itertools.count()

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(steps) == at:
                end()
            value = real(*arguments, **named)
            if next(steps) == at:
                end()
            return value

        return call

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vault_module, "PAGE", 2)
        patched.setattr(Database, "write", counted(Database.write))
        patched.setattr(Path, "replace", counted(Path.replace))
        rotate(url, folder)


def _killed(at: int, url: str, folder: Path) -> bool:
    process = PROCESSES.Process(target=_rotate_until, args=(at, url, folder, _kill))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _cut_short(at: int, url: str, folder: Path) -> bool:
    try:
        _rotate_until(at, url, folder, _cut)
    except Cut:
        return True
    return False


@pytest.mark.parametrize("ends", [_cut_short, pytest.param(_killed, marks=pytest.mark.long)])
def test_ended_at_any_step_everything_opens_and_the_next_run_finishes(
    database_url: str, tmp_path: Path, ends: Callable[[int, str, Path], bool]
) -> None:
    unfinished = 0
    for at in itertools.count():
        folder = tmp_path / f"quarantine{at}"
        fill(database_url, folder)
        has_ended = ends(at, database_url, folder)
        assert opens_with(database_url, folder, KEY, OTHER), f"ended at step {at}"
        with Database.open(database_url, METADATA) as database, database.read() as connection:
            begun = connection.scalar(select(META.c.name).where(META.c.name == vault_module.ROTATION)) is not None
        if begun:
            unfinished += 1
            for key in (KEY, OTHER):
                with pytest.raises(RotationUnfinished, match="run `osteon vault rotate` again"):
                    Vault.open(database_url, key)
            with pytest.raises(RotationUnfinished, match="--new-key"):
                rotate(database_url, folder, KEY, THIRD)
            with pytest.raises(RotationUnfinished, match="--old-key"):
                rotate(database_url, folder, THIRD, OTHER)
        rotate(database_url, folder)
        assert opens_with(database_url, folder, OTHER)
        Vault.open(database_url, OTHER).close()
        if not has_ended:
            break
    assert unfinished > 8


# --- who holds the old key -------------------------------------------------------------------------------------------------


def test_a_process_that_opened_the_vault_before_writes_nothing_more(database_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "quarantine"
    quarantine = fill(database_url, folder)
    with Vault.open(database_url, KEY) as late, Rotation(database_url, quarantine, old=KEY, new=OTHER) as rotation:
        rotation.begin()
        with pytest.raises(RotationUnfinished):
            late.remember(identity(study=9), now=NOW)
        rotation.reseal(lambda _done: None)
        rotation.finish()
        for write in (lambda: late.remember(identity(study=9), now=NOW), late.require_key):
            with pytest.raises(BadKey, match="changed while this ran"):
                write()
    assert opens_with(database_url, folder, OTHER)


def test_nothing_is_begun_while_something_does_not_open(database_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "quarantine"
    quarantine = fill(database_url, folder)
    file = folder / f"{held(2).id}.sealed"
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(Tampered, match="1 sealed rows or files"):
        rotate(database_url, folder)
    quarantine.discard(held(2).id)
    Vault.open(database_url, KEY).close()


def test_the_vault_needs_its_canary(database_url: str, tmp_path: Path) -> None:
    """Without it any key would do: a new canary would be made beside rows that it does not open."""
    fill(database_url, tmp_path / "quarantine")
    with Database.open(database_url, METADATA) as database:
        database.write(lambda connection: connection.execute(delete(META)))
    with pytest.raises(Tampered, match="restore it from a backup"):
        Vault.open(database_url, OTHER)


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def used(site: Path) -> Path:
    """Give a site with an image in the archive and one in the quarantine."""
    intake = Intake.open(settings.load(site))
    assert hand_in(intake, image(PatientName="SECRET^NAME")) is Taken.NEW
    assert hand_in(intake, image(instance=2, BurnedInAnnotation="YES")) is Taken.HELD
    intake.close()
    return site


def osteon(*words: str, site: Path) -> str:
    result = CliRunner().invoke(build(), [*words, "--config", str(site)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_rotate_makes_the_key_seals_anew_and_says_what_comes_next(used: Path) -> None:
    new = used.parent / "keys" / "vault-2.key"
    old = used.parent / "keys" / "vault.key"
    told = osteon("vault", "rotate", "--new-key", str(new), "--reason", "a colleague left", site=used)
    assert stat.S_IMODE(new.stat().st_mode) == 0o600
    assert len(base64.b64decode(new.read_bytes())) == 32
    assert all(word in told for word in (f'vault_key = "{new}"', str(old), "safe", "backup", "osteon vault verify"))
    with pytest.raises(BadKey, match="not the key that sealed this vault"):
        Custody.open(settings.load(used).storage)
    used.write_text(used.read_text("utf-8").replace("keys/vault.key", "keys/vault-2.key"), "utf-8")
    assert "all as they should be" in osteon("vault", "verify", site=used)
    history = osteon("history", "--subject", "vault", site=used)
    assert ["rotation begun" in history, "vault rotated" in history, history.count("a colleague left")] == [True, True, 2]
    intake = Intake.open(settings.load(used))
    assert hand_in(intake, image(instance=3)) is Taken.NEW
    intake.close()


def test_rotate_waits_for_no_role(used: Path) -> None:
    with Custody.open(settings.load(used).storage) as stores:
        stores.catalogue.roles.beat(Role(name="receive", host="here", pid=1, seen_at=datetime.now(UTC)))
    before = everything(used.parent)
    with pytest.raises(StillRunning, match="receive on here"):
        osteon("vault", "rotate", "--new-key", str(used.parent / "new.key"), "--reason", "x", site=used)
    assert everything(used.parent) == before


def test_no_backup_holds_rows_of_two_keys(used: Path) -> None:
    root = settings.load(used).storage.root
    with turns.looking(root):  # as a backup does
        before = everything(used.parent)
        with pytest.raises(StillRunning, match="a backup"):
            osteon("vault", "rotate", "--new-key", str(used.parent / "new.key"), "--reason", "x", site=used)
        (used.parent / "new.key").unlink()  # made, and nothing is sealed with it
        assert everything(used.parent) == before


def test_a_role_that_starts_midway_is_told_that_the_rotation_is_unfinished(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("vault", "rotate", "--new-key", str(used.parent / "new.key"), "--reason", "x")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Quarantine, "reseal", killed)
        CliRunner().invoke(build(), [*words, "--config", str(used)])
    before = everything(used.parent)
    for _ in range(2):
        with pytest.raises(RotationUnfinished, match="run `osteon vault rotate` again"):
            Intake.open(settings.load(used))
        used.write_text(used.read_text("utf-8").replace("keys/vault.key", "new.key"), "utf-8")  # also with the new key
    used.write_text(used.read_text("utf-8").replace('"new.key"', '"keys/vault.key"'), "utf-8")
    assert everything(used.parent) == before
    osteon(*words, site=used)
    used.write_text(used.read_text("utf-8").replace("keys/vault.key", "new.key"), "utf-8")
    assert "all as they should be" in osteon("vault", "verify", site=used)


def test_rotate_refuses_keys_that_make_no_sense(used: Path) -> None:
    keys = used.parent / "keys"
    (keys / "other.key").write_bytes(base64.b64encode(THIRD))
    (keys / "other.key").chmod(0o600)
    before = everything(used.parent)
    for new, old, told in (
        ("vault.key", "vault.key", "the new key is the old one"),
        ("site.key", "vault.key", "the new key is the site key"),
        ("other.key", "site.key", "the old key is the site key"),
    ):
        with pytest.raises(BadKey, match=told):
            osteon("vault", "rotate", "--new-key", str(keys / new), "--old-key", str(keys / old), "--reason", "x", site=used)
    assert everything(used.parent) == before
    (keys / "vault.key").write_bytes(base64.b64encode(bytes(range(3, 35))))
    with pytest.raises(BadKey, match="neither key opens this vault"):
        osteon("vault", "rotate", "--new-key", str(keys / "other.key"), "--reason", "x", site=used)


def test_there_must_be_a_vault_to_rotate(site: Path) -> None:
    with pytest.raises(LostStore, match="no vault"):
        osteon("vault", "rotate", "--new-key", str(site.parent / "new.key"), "--reason", "x", site=site)
    assert not (site.parent / "new.key").exists()


# --- verify ----------------------------------------------------------------------------------------------------------------


def verify(site: Path) -> tuple[int, str]:
    result = CliRunner().invoke(build(), ["vault", "verify", "--config", str(site)], catch_exceptions=False)
    assert "SECRET" not in result.output
    return result.exit_code, result.output


def test_verify_finds_what_a_result_would_miss(used: Path) -> None:
    assert verify(used) == (
        0,
        "3 rows of the vault, 1 images of the catalogue, 1 files of the quarantine: all as they should be\n",
    )
    with Custody.open(settings.load(used).storage) as stores:
        (study_uid,) = {row.study_uid for row in stores.vault.rows()}
        (held_id,) = stores.quarantine.ids()
        database = stores.vault._database
        row = next(iter(vault_module.pages(database, INSTANCES)))[0]
        database.write(lambda connection: connection.execute(delete(INSTANCES).where(INSTANCES.c.sop_uid == row.sop_uid)))
        moved = INSTANCES.insert().values(study_uid=study_uid, sop_uid="2.25.1", sealed=row.sealed, first_at=NOW)
        database.write(lambda connection: connection.execute(moved))
        stores.vault.remember(replace(identity(study=7), original_sop_uid="1.2.3"), now=NOW)
    file = used.parent / "data" / "quarantine" / f"{held_id}.sealed"
    file.write_bytes(file.read_bytes()[:-1])
    code, told = verify(used)
    assert code == 1
    assert f"study {study_uid}, image 2.25.1: does not open" in told
    assert "study 2.25.7: what is in it belongs to another pseudonym" in told
    assert f"quarantine: {held_id}: does not open" in told
    assert ("the vault has no identity for it" in told) is (row.sop_uid in told)
    file.unlink()
    assert f"quarantine: {held_id}: its file is gone" in verify(used)[1]


def test_verify_finds_a_study_that_is_another_patients_here_and_there(used: Path) -> None:
    with Custody.open(settings.load(used).storage) as stores:
        (row, *_) = stores.vault.rows()
        assert row.identity is not None
        stores.vault.hand_over([row.study_uid], replace(row.identity, pid="OST-" + "B" * 16), now=NOW)
    code, told = verify(used)
    assert (code, "osteon patients merge" in told) == (1, True)
