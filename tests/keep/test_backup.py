"""A site is lost, and comes back from its last set on an empty machine: the same patients, the same answers, nothing twice."""

from __future__ import annotations

import base64
import gzip
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from machines import Machine, machine, osteon, other_modality
from roles import until
from studies import study
from tiny_model import promote_tiny

from models import durable
from node.commands import check
from node.demo.pacs import Pacs
from node.keep import backup, dump, turns
from node.keep.records import Hold, StudyState
from node.keep.vault import METADATA


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with Pacs(tmp_path / "pacs", callers=["OSTEON"]) as running:
        yield running


@pytest.fixture
def old(tmp_path: Path, pacs: Pacs) -> Machine:
    return machine(tmp_path / "old", pacs)


def empty_machine(folder: Path, old: Machine, **sections: Mapping[str, Any]) -> Machine:
    """Make an empty machine: nothing but settings, and the keys, which a person brought."""
    empty = machine(folder, old.pacs, **sections)
    shutil.copytree(old.folder / "keys", empty.folder / "keys", dirs_exist_ok=True)
    return empty


@pytest.fixture
def new(tmp_path: Path, old: Machine) -> Machine:
    return empty_machine(tmp_path / "new", old)


def bring_archive(old: Machine, new: Machine) -> None:
    """Copy the images, as the backup of the file system does."""
    shutil.copytree(old.root / "archive", new.root / "archive", dirs_exist_ok=True)


def test_a_restored_site_knows_what_the_lost_one_knew_is_reconciled_and_answers(
    old: Machine, database_url: str, tmp_path: Path
) -> None:
    """Also from SQLite onto PostgreSQL."""
    version = promote_tiny(old.root / "models")
    answered, open_, fresh = study(patient=1), study(patient=2), study(patient=4)
    old.send(*answered)
    old.work()
    (first,) = old.reports()
    old.send(*open_)
    old.send(other_modality(3))
    made = old.backup(tmp_path / "sets")

    new = empty_machine(tmp_path / "new", old, storage={"catalogue": database_url})
    assert "Answers are paused" in new.restore(made)
    assert str(made.folder) in new.osteon("status"), "the newest set is the one it was restored from"
    with new.catalogue() as catalogue:
        (held,) = [held for held, _at in catalogue.instances.held()]
    assert held.reason is Hold.MODALITY
    assert version in new.osteon("models", "list")
    assert new.state(answered[0]) is StudyState.DELIVERED

    bring_archive(old, new)
    lost = min((new.root / "archive").rglob("*.dcm"))
    lost.unlink()
    told = new.osteon("archive", "verify", "--against", str(made.folder), code=1)
    assert "image without its file: 1" in told
    assert lost.name in told
    new.osteon("archive", "repair", "--yes", code=1)
    new.send(*answered, *open_)  # the PACS sends again what is missing, and more
    new.osteon("archive", "verify", "--against", str(made.folder))

    new.send(*fresh)
    new.work()
    assert set(new.reports()) == {first}, "nothing leaves before a person says so"
    new.osteon("reply", "resume", "--reason", "restored")
    new.work()
    assert new.answers(fresh[0]) == [fresh[0].PatientName]
    assert new.answers(answered[0]) == [answered[0].PatientName], "the answer of before, and no other"
    assert new.state(open_[0]) is StudyState.EXPIRED
    new.osteon("reply", "study", open_[0].AccessionNumber, "--reason", "it was open")
    new.work()
    assert new.answers(open_[0]) == [open_[0].PatientName]


def test_what_was_answered_after_the_set_was_made_is_not_answered_with_another_document(
    old: Machine, new: Machine, tmp_path: Path
) -> None:
    promote_tiny(old.root / "models")
    images, stored = study(patient=1), study(patient=2)
    old.osteon("reply", "pause", "--reason", "test")
    old.send(*stored)
    old.work()  # its result stands in the set, and leaves after it was made
    old.send(*images)
    made = old.backup(tmp_path / "sets")
    old.osteon("reply", "resume", "--reason", "test")
    old.work()
    before = old.reports()
    assert len(before) == 2

    new.restore(made)
    bring_archive(old, new)
    promote_tiny(new.root / "models", slope=3.0)  # another model would say it otherwise
    new.osteon("reply", "resume", "--reason", "restored")
    new.work()
    assert new.state(images[0]) is StudyState.EXPIRED
    assert new.state(stored[0]) is StudyState.DELIVERED
    assert new.reports() == before, "neither a second document nor other bytes under the UID of the first"


def test_what_a_person_has_answered_again_has_a_uid_of_its_own(old: Machine, new: Machine, tmp_path: Path) -> None:
    """The lost site's answer of the same model to the same images has another time in it: never other bytes under its UID."""
    promote_tiny(old.root / "models")
    images = study(patient=1)
    old.send(*images)
    made = old.backup(tmp_path / "sets")
    old.work()
    ((first, before),) = old.reports().items()

    new.restore(made)
    bring_archive(old, new)
    new.osteon("reply", "resume", "--reason", "restored")
    until(lambda: datetime.now().astimezone().strftime("%H%M%S") != before.ContentTime)
    new.osteon("reply", "study", images[0].AccessionNumber, "--reason", "nobody saw the first")
    new.work()
    after = new.reports()
    assert after[first] == before
    assert len(after) == 2
    assert {one.ContentTime for one in after.values()} != {before.ContentTime}


def test_a_late_image_that_was_answered_after_the_set_was_made_is_left_to_a_person(
    old: Machine, new: Machine, tmp_path: Path
) -> None:
    promote_tiny(old.root / "models")
    images = study(patient=1)
    old.osteon("reply", "pause", "--reason", "test")
    old.send(images[0])
    old.work()
    old.send(images[1])  # late: the result of the first one stands in the set
    made = old.backup(tmp_path / "sets")
    old.osteon("reply", "resume", "--reason", "test")
    old.work()
    before = old.reports()
    assert len(before) == 2

    new.restore(made)
    bring_archive(old, new)
    promote_tiny(new.root / "models", slope=3.0)  # another model would say it otherwise
    new.osteon("reply", "resume", "--reason", "restored")
    new.work()
    assert new.reports() == before
    assert new.state(images[0]) is StudyState.EXPIRED
    assert "maybe answered since" in new.osteon("status", "--study", images[0].AccessionNumber)
    new.osteon("reply", "study", images[0].AccessionNumber, "--reason", "by hand")
    new.work()
    assert new.state(images[0]) is StudyState.DELIVERED
    assert len(new.reports()) == 3


# --- what is in a set --------------------------------------------------------------------------------------------------------


def test_a_set_holds_neither_a_key_nor_a_name_and_nobody_else_may_read_it(old: Machine, tmp_path: Path) -> None:
    old.send(*study(patient=1, PatientName="SECRET^NAME"), other_modality(2, PatientName="SECRET^NAME"))
    made = old.backup(tmp_path / "sets", "--copy-archive")
    keys = [(old.folder / "keys" / f"{name}.key").read_bytes().strip() for name in ("site", "vault")]
    needles = [b"SECRET", *keys, *(base64.b64decode(key) for key in keys)]
    found = [path for path in (tmp_path / "sets").rglob("*") if path.is_file()]
    assert {"manifest.json", "catalogue.jsonl.gz", "vault.jsonl.gz", "archive.jsonl.gz"} < {path.name for path in found}
    assert any(path.suffix == ".sealed" for path in found)
    for path in found:
        data = path.read_bytes()
        data += gzip.decompress(data) if path.suffix == ".gz" else b""
        assert not any(needle in data for needle in needles), path
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 in (0, 0o040), path
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700


def test_a_set_made_while_images_come_in_is_consistent(old: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image that it names has its identity and its file in it, although one comes between any two of its parts."""
    numbers, write = count(1), dump.write

    def write_while_images_come(*args: Any) -> dict[str, int]:
        old.send(*study(patient=next(numbers), images=1))
        counts = write(*args)
        old.send(*study(patient=next(numbers), images=1))
        return counts

    with monkeypatch.context() as patch:
        patch.setattr(dump, "write", write_while_images_come)
        made = old.backup(tmp_path / "sets", "--copy-archive")
    rows = list(dump.rows(made.folder / backup.CATALOGUE, "instance"))
    identities = {(row["study_uid"], row["sop_uid"]) for row in dump.rows(made.folder / backup.VAULT, "vault_instances")}
    assert len(rows) == 1
    assert {(row["study_uid"], row["sop_uid"]) for row in rows} <= identities
    assert {row["path"] for row in rows} == {image["path"] for image in backup.images(made.folder)}
    assert made.missing == 0
    new = empty_machine(tmp_path / "new", old)
    new.restore(made)
    new.osteon("archive", "verify")  # also without any other copy of the archive: the mirror beside the set has it


def test_the_next_set_copies_only_what_is_new_and_old_sets_go(old: Machine, tmp_path: Path) -> None:
    promote_tiny(old.root / "models")
    old.send(other_modality(1))
    first = old.backup(tmp_path / "sets")
    until(lambda: datetime.now(UTC).replace(microsecond=0) > first.made_at.replace(microsecond=0))
    second = old.backup(tmp_path / "sets", "--keep", "2")
    for name in first.files:
        shared = (first.folder / name).samefile(second.folder / name)
        assert shared is name.startswith(("models/versions/", "models/aliases/", "models/history", "quarantine/")), name
    until(lambda: datetime.now(UTC).replace(microsecond=0) > second.made_at.replace(microsecond=0))
    third = old.backup(tmp_path / "sets", "--keep", "2")
    assert [one.folder for one in backup.sets(tmp_path / "sets")] == [second.folder, third.folder]
    assert "are as the manifest says" in osteon("backup", "verify", str(third.folder))
    told = old.osteon("backup", "list", str(tmp_path / "sets"))
    assert str(second.folder) in told
    assert str(third.folder) in told


def test_a_mirror_follows_an_image_that_came_again_as_other_bytes_and_brings_back_what_is_listed_alone(
    old: Machine, new: Machine, tmp_path: Path
) -> None:
    old.send(*study(patient=1))
    old.backup(tmp_path / "sets", "--copy-archive")
    changed, rotten = sorted((old.root / "archive").rglob("*.dcm"))
    content = changed.read_bytes()
    changed.chmod(0o640)
    changed.write_bytes(b"\1" + content[1:])  # of the same size, as after an upgrade of what writes it
    until(lambda: datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ") != backup.sets(tmp_path / "sets")[-1].folder.name)
    made = old.backup(tmp_path / "sets", "--copy-archive")
    mirror = tmp_path / "sets" / "archive"
    copies = [mirror / file.relative_to(old.root / "archive") for file in (changed, rotten)]
    assert copies[0].read_bytes() == changed.read_bytes()
    copies[1].chmod(0o640)
    copies[1].write_bytes(b"\2" + copies[1].read_bytes()[1:])
    assert "copied back from the set's folder: 1 of 2" in new.restore(made)
    (back,) = (new.root / "archive").rglob("*.dcm")
    assert back.read_bytes() == changed.read_bytes()
    assert stat.S_IMODE(back.stat().st_mode) == 0o440


def test_a_changed_set_is_found_out_and_not_restored(old: Machine, new: Machine, tmp_path: Path) -> None:
    old.send(*study(patient=1))
    made = old.backup(tmp_path / "sets")
    vault = made.folder / backup.VAULT
    vault.write_bytes(vault.read_bytes()[:-1] + b"x")
    assert "vault.jsonl.gz is not what the manifest says" in osteon("backup", "verify", str(made.folder), code=1)
    assert "take another set" in new.restore(made, code=2)
    assert not (new.root / backup.RESTORING).exists()


class Killed(Exception):
    """The process ends here."""


def test_a_backup_cut_short_leaves_no_set_and_the_next_one_clears_up(
    old: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old.send(*study(patient=1))
    write = durable.write

    def killed_at_the_manifest(path: Path, data: bytes, **how: Any) -> None:
        if path.name == backup.MANIFEST:
            raise Killed
        write(path, data, **how)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write", killed_at_the_manifest)
        with pytest.raises(Killed):
            old.backup(tmp_path / "sets")
    assert backup.sets(tmp_path / "sets") == []
    assert list((tmp_path / "sets").glob(".*.partial"))
    made = old.backup(tmp_path / "sets")
    assert not list((tmp_path / "sets").glob(".*.partial"))
    assert backup.verify(made) == []


def test_a_backup_that_waits_for_a_rotation_of_the_key_does_not_name_the_old_one(
    old: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It found the old key in force, for a rotation first opens everything with it; then it would copy rows of the new one."""
    old.send(*study(patient=1))
    new_key, rotated, looking = old.folder / "keys" / "new.key", [], turns.looking

    @contextmanager
    def looking_after_a_rotation(root: Path) -> Iterator[None]:
        if not rotated:
            rotated.append(old.osteon("vault", "rotate", "--new-key", str(new_key), "--reason", "test"))
        with looking(root):
            yield

    monkeypatch.setattr(turns, "looking", looking_after_a_rotation)
    assert "not the key that sealed this vault" in old.osteon("backup", "--to", str(tmp_path / "sets"), code=2)
    assert rotated
    assert backup.sets(tmp_path / "sets") == []

    old.config.write_text(old.config.read_text().replace("keys/vault.key", "keys/new.key"))
    made = old.backup(tmp_path / "sets")
    new = empty_machine(tmp_path / "new", old)
    new.config.write_text(new.config.read_text().replace("keys/vault.key", "keys/new.key"))
    new.restore(made)


# --- where a set may lie, and whether there is room --------------------------------------------------------------------------


def test_a_folder_that_would_be_lost_with_the_site_or_holds_its_keys_is_refused(old: Machine) -> None:
    assert "lies in the storage" in old.osteon("backup", "--to", str(old.root / "backups"), code=2)
    assert "must not be saved together" in old.osteon("backup", "--to", str(old.folder), code=2)
    assert "no folder for the backup" in old.osteon("backup", code=2)


def test_a_full_disk_is_seen_before_the_first_byte(old: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old.send(*study(patient=1))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1 << 20))
    assert "nothing was written" in old.osteon("backup", "--to", str(tmp_path / "sets"), code=2)
    assert backup.sets(tmp_path / "sets") == []


# --- onto which machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["site", "vault"])
def test_without_the_right_keys_nothing_is_restored(old: Machine, tmp_path: Path, key: str) -> None:
    old.send(*study(patient=1))
    made = old.backup(tmp_path / "sets")
    new = machine(tmp_path / "new", old.pacs)
    other = {"site": "vault", "vault": "site"}[key]
    shutil.copy(old.folder / "keys" / f"{other}.key", new.folder / "keys" / f"{other}.key")
    before = sorted(new.root.rglob("*"))
    assert f"{key} key" in new.restore(made, code=2)
    assert sorted(new.root.rglob("*")) == before, "not a byte"


def test_another_default_issuer_is_refused(old: Machine, tmp_path: Path) -> None:
    """It would give every patient another pseudonym, silently."""
    old.send(*study(patient=1))
    made = old.backup(tmp_path / "sets")
    new = empty_machine(tmp_path / "new", old, node={"port": 0, "default_issuer": "ELSEWHERE"})
    assert "default_issuer" in new.restore(made, code=2)


def test_a_machine_that_has_something_is_not_restored_over(old: Machine, new: Machine, tmp_path: Path) -> None:
    old.send(*study(patient=1))
    made = old.backup(tmp_path / "sets")
    new.send(*study(patient=2))
    told = new.restore(made, code=2)
    assert "a study in the catalogue and an identity in the vault" in told
    assert new.state(study(patient=2)[0]) is StudyState.RECEIVING
    checked = empty_machine(tmp_path / "third", old)
    checked.osteon("check")  # it makes empty databases: that is not something
    checked.restore(made)


@pytest.mark.parametrize("at", ["files", "archive", "vault", "catalogue", "end"])
def test_a_restore_cut_short_anywhere_is_done_by_giving_it_again(
    old: Machine, new: Machine, tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = promote_tiny(old.root / "models")
    images = study(patient=1)
    old.send(*images, other_modality(2))
    made = old.backup(tmp_path / "sets", "--copy-archive")
    loads = iter(["vault", "catalogue"])
    load, copy, unlink = dump.load, backup.copy, Path.unlink

    def load_or_die(*args: Any) -> None:
        load(*args)
        if next(loads) == at:
            raise Killed  # before its COMMIT

    def copy_or_die(source: Path, target: Path, **how: Any) -> None:
        if at == ("archive" if "archive" in target.parts else "files"):
            raise Killed
        copy(source, target, **how)

    def unlink_or_die(path: Path, **how: Any) -> None:
        if path.name == backup.RESTORING and at == "end":
            raise Killed
        unlink(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(dump, "load", load_or_die)
        patch.setattr(backup, "copy", copy_or_die)
        patch.setattr(Path, "unlink", unlink_or_die)
        with pytest.raises(Killed):
            backup.restore(made, new.root, **urls(new), vault_tables=METADATA, by="it", now=datetime.now(UTC))
    assert "a restore was begun and not finished" in told_by_check(new)
    new.restore(made)
    assert not (new.root / backup.RESTORING).exists()
    assert new.state(images[0]) is StudyState.EXPIRED
    assert version in new.osteon("models", "list")
    new.osteon("archive", "verify", "--against", str(made.folder))


def urls(new: Machine) -> dict[str, str]:
    storage = new.settings.storage
    return {"catalogue_url": storage.catalogue, "vault_url": storage.vault}


# --- what check and status say -----------------------------------------------------------------------------------------------


def test_check_and_status_tell_the_age_of_the_last_backup(old: Machine, tmp_path: Path) -> None:
    assert "none was ever made" in told_by_check(old)
    assert "none yet" in old.osteon("status")
    made = old.backup(tmp_path / "sets")
    assert "the last one is 0.0 days old" in told_by_check(old)
    assert str(made.folder) in old.osteon("status")
    long_ago = f"{datetime.now(UTC) - timedelta(days=3):%Y-%m-%dT%H:%M:%S%z} 1000"
    with old.catalogue() as catalogue:
        catalogue.roles.set_flag("last_backup", long_ago, by="it", reason="/far", now=datetime.now(UTC))
    assert "the last one is 3.0 days old (/far): make one now" in told_by_check(old)


def test_check_tells_whether_the_keys_of_today_are_kept_elsewhere(old: Machine) -> None:
    assert "nobody stated" in told_by_check(old)
    old.osteon("backup", "keys-kept", "--where", "safe of the pharmacy, sealed envelope")
    assert "copies are kept elsewhere" in told_by_check(old)
    with old.catalogue() as catalogue:
        (act,) = catalogue.history.acts(subject="keys_kept")
    assert "safe of the pharmacy" in act.reason
    (old.folder / "keys" / "site.key").write_bytes(base64.b64encode(bytes(32)))
    assert "nobody stated" in told_by_check(old), "another key asks for another statement"


def told_by_check(old: Machine) -> str:
    """Give what `osteon check` says, before a table breaks its lines."""
    return "\n".join(finding.told for finding in check.findings(old.settings))
