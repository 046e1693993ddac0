"""Promise 1: success means safe. A process kill cannot show it, because the page cache survives one; these tests forget more."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from disk import CALLS, Call, Disk, calls
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset
from roles import Role, hand_in, send
from shared import tool
from studies import image, study

from models import durable
from models.errors import OsteonError
from node import settings
from node.commands.init import init_site
from node.keep.archive import Archive
from node.keep.catalogue import Catalogue
from node.keep.quarantine import Quarantine
from node.keep.vault import Vault
from node.pseudonym import SiteKeys
from node.receive.intake import Intake, Taken

WORLDS = [(names, data) for names in (False, True) for data in (False, True)]
"""What a disk may have kept of what was not synced: names, data, both, nothing."""


# --- in the process: the order ---------------------------------------------------------------------------------------------


def test_identity_file_and_row_are_safe_in_this_order_before_success(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def spied(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            value = real(*arguments, **named)
            seen.append(name if name != "fsync" else f"fsync {_kind(arguments[0])}")
            return value

        return call

    intake = Intake.open(settings.load(site))
    hand_in(intake, image(patient=1, instance=1))  # the folders of the study are there now
    monkeypatch.setattr(os, "fsync", spied("fsync", os.fsync))
    monkeypatch.setattr(durable, "_publish", spied("named", durable._publish))

    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "commit")
    def on_commit(connection: sqlalchemy.Connection) -> None:
        seen.append(f"commit {Path(connection.engine.url.database or '').stem}")

    try:
        seen.append(hand_in(intake, image(patient=1, instance=2)))
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "commit", on_commit)
        intake.close()
    assert seen == ["commit vault", "fsync file", "named", "fsync folder", "commit catalogue", Taken.NEW]


def _kind(descriptor: int) -> str:
    return "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"  # noqa: PTH112


# --- in the kernel's words: every prefix, on a disk that forgets -----------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """What a receiver did, and the disk it did it on."""

    calls: list[Call]
    disk: Disk
    config: Path
    sent: Sequence[Dataset]


@pytest.fixture(scope="module")
def strace() -> list[str]:
    """Give a command that records every call that changes a disk, and what is sent to a peer."""
    command = [tool("strace"), "-f", "--seccomp-bpf", "-y", "-xx", "-s", "100000000", "-e", f"trace={CALLS}"]
    if subprocess.run([*command, "-o", "/dev/null", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("strace may not trace here")
    return command


@pytest.fixture(scope="module")
def recorded(strace: list[str], tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Let a real receiver take in images of two patients and one that is held."""
    folder = tmp_path_factory.mktemp("recorded").resolve()
    callers = [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"]}]
    config = init_site(folder / "site", node={"port": 0, "callers": callers})
    disk = Disk(folder / "site")
    sent = [*study(patient=1, images=2), image(patient=2), image(patient=3, BurnedInAnnotation="YES")]
    receiver = Role(
        "receive", "--config", str(config), command=[*strace, "-o", str(folder / "trace"), sys.executable, "-m", "node"]
    )
    try:
        assert send(sent, port=receiver.event("listening")["port"]) == [0] * len(sent)
        os.killpg(receiver.process.pid, signal.SIGTERM)  # strace itself ignores it
        receiver.event("stopped")
    finally:
        os.killpg(receiver.process.pid, signal.SIGKILL)
        receiver.close()
    return Recorded(list(calls(folder / "trace")), disk, config, sent)


def test_after_a_power_cut_everything_that_was_answered_success_is_there(recorded: Recorded, tmp_path: Path) -> None:
    disk, succeeded, cuts = deepcopy(recorded.disk), set[str](), 0
    for call in recorded.calls:
        changed = disk.apply(call)
        if answered := _answered(call):
            succeeded.add(answered)
        if succeeded and (answered or (changed and call.name in ("fsync", "fdatasync", "rename", "unlink"))):
            cuts += 1
            for all_names, all_data in WORLDS:
                _cut(disk, tmp_path / "after", all_names=all_names, all_data=all_data)
                _look(recorded, succeeded, tmp_path / "after")
    assert succeeded == {one.SOPInstanceUID for one in recorded.sent}
    assert cuts > 3 * len(recorded.sent)


@pytest.mark.parametrize(
    ("forgotten", "all_names"),
    [(r"\.dcm\..*\.tmp$", True), (r"/archive(/[^/.]+)*$", False), (r"catalogue\.db-wal$", True), (r"vault\.db-wal$", True)],
    ids=["files", "folders", "catalogue", "vault"],
)
def test_a_forgotten_fsync_would_be_found(recorded: Recorded, tmp_path: Path, forgotten: str, all_names: bool) -> None:
    """The test above is worth something: with any one kind of fsync taken out of the record, it fails."""
    disk = deepcopy(recorded.disk)
    for call in recorded.calls:
        if not (call.name in ("fsync", "fdatasync") and re.search(forgotten, call.file)):
            disk.apply(call)
        if _answered(call) == recorded.sent[-2].SOPInstanceUID:
            break
    _cut(disk, tmp_path / "after", all_names=all_names, all_data=False)
    with pytest.raises((AssertionError, OSError, OsteonError, InvalidDicomError)):
        _look(recorded, {one.SOPInstanceUID for one in recorded.sent[:-1]}, tmp_path / "after")


def _answered(call: Call) -> str:
    """Give the SOP Instance UID of a C-STORE-RSP with status 0000 (PS3.7 9.3.1.2) that begins to leave, or nothing."""
    pdu = call.strings[0] if call.name == "sendto" and not call.returned else b""
    if pdu[:1] != b"\x04":
        return ""
    command = read_dataset(BytesIO(pdu[12:]), is_implicit_VR=True, is_little_endian=True)
    stored = command.CommandField == 0x8001 and command.Status == 0x0000
    return str(command.AffectedSOPInstanceUID) if stored else ""


def _cut(disk: Disk, root: Path, *, all_names: bool, all_data: bool) -> None:
    shutil.rmtree(root, ignore_errors=True)
    disk.rebuild(root, all_names=all_names, all_data=all_data)


def _look(recorded: Recorded, succeeded: set[str], root: Path) -> None:
    """Open the stores that a power cut left and look for what was promised."""
    storage = settings.load(recorded.config).storage
    vault_key, keys = settings.load_key(storage.vault_key), SiteKeys.derive(settings.load_key(storage.site_key))
    archive, quarantine = Archive(root / "data/archive"), Quarantine(root / "data/quarantine", vault_key)
    with (
        Catalogue.open(f"sqlite:///{root}/data/catalogue/catalogue.db") as catalogue,
        Vault.open(f"sqlite:///{root}/data/vault/vault.db", vault_key) as vault,
    ):
        held = {one.sop_uid: one for one, _at in catalogue.instances.held()}
        for original in (one.SOPInstanceUID for one in recorded.sent):
            sop_uid = keys.uid(original)
            row = catalogue.instances.find(sop_uid)
            assert row or sop_uid in held or original not in succeeded, "success was answered and nothing is known of it"
            if row:  # a row promises file and identity, whether success was answered or not
                assert archive.digests(archive.read(row)) == (row.header_digest, row.pixel_digest)
                assert original in {one.original_sop_uid for one in vault.instances(row.study_uid)}
            if sop_uid in held:
                assert quarantine.read(held[sop_uid].id)
        for file in archive.folder.rglob("*.dcm"):  # a file under its name is whole, and somebody can answer for it
            whole = dcmread(file)
            assert whole.pixel_array.size == whole.Rows * whole.Columns
            assert vault.study(file.parent.parent.name)
