"""The units under a real systemd, booted in a container of its own: what deploy/README.md says of them is so."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import shared
import studies
from docs.claims import tracked
from roles import send, until

from node.demo import phantoms
from node.demo.hospital import send as send_files
from node.demo.orthanc import free_port
from node.settings import Pacs

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
SYSTEMD = ROOT / "deploy" / "systemd"
DEBIAN = "bookworm"
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,procps"
LIBRARIES = Path(sysconfig.get_path("purelib"))
"""Of this environment: torch and its like are lent to the machine, for they are as large as the rest of it together."""
VERB = "/usr/local/bin/osteon"
DATA = "/srv/osteon/data"
SCHEDULE = """
[[schedule]]
name = "weekly"
cron = "30 2 * * sat"
timezone = "Europe/Berlin"
recipe = "phantom"
"""


class Machine:
    """A Debian with Osteon installed by hand, as deploy/README.md says, and booted."""

    def __init__(self, root: Path, ports: dict[str, int]) -> None:
        self.root, self.ports = root, ports
        command = [shared.tool("systemd-nspawn"), "--quiet", "--register=no", "--keep-unit", "--console=pipe", "--boot"]
        command += [f"--bind-ro={LIBRARIES}:/opt/lent", "-D"]
        self._boot = subprocess.Popen(
            [*command, str(root)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def booted(self) -> bool:
        return self.run("systemctl", "is-system-running", fails=True).strip() in ("running", "degraded")

    def run(self, *command: str, fails: bool = False, user: str = "root") -> str:
        """Run a command inside and give what it says."""
        children = Path(f"/proc/{self._boot.pid}/task/{self._boot.pid}/children").read_text().split()
        if not children and fails:
            return ""
        inside = ["nsenter", "--all", "--target", children[0], "/usr/sbin/runuser", "-u", user, "--", *command]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=240)
        assert fails or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout + (done.stderr if fails else "")

    def shown(self, unit: str, name: str) -> str:
        """Give a property of a unit."""
        return self.run("systemctl", "show", unit, "--value", "-p", name).strip()

    def ready(self, role: str) -> bool:
        """Say whether a role answers at its metrics port that it can do its job."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[f'{role}_port']}/readyz", timeout=5) as page:
                return page.status == 200 and json.load(page)["role"] == role
        except OSError:  # nobody listens yet, or it says 503
            return False

    def off(self) -> None:
        self._boot.terminate()
        try:
            self._boot.wait(60)
        except subprocess.TimeoutExpired:
            self._boot.kill()
            self._boot.wait()


def install(root: Path, folder: Path, ports: dict[str, int]) -> None:
    """Make a Debian in `root` and install Osteon into it; `folder` is for what is built on the way."""
    made = subprocess.run(
        [shared.tool("debootstrap"), "--variant=minbase", f"--include={PACKAGES}", DEBIAN, str(root)],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip("no Debian mirror is here")
    sources = folder / "sources"
    for file in tracked():
        (sources / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, sources / file.relative_to(ROOT))
    subprocess.run([sys.executable, "-m", "build", "--wheel", "-o", str(folder), str(sources)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(["chroot", str(root), "python3", "-m", "venv", "--without-pip", "/opt/osteon"], check=True)
    (packages,) = root.glob("opt/osteon/lib/python3.*/site-packages")
    version = packages.parent.name.removeprefix("python")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--python-version", version]
    target = ["--target", str(packages), "-c", str(ROOT / "constraints.txt"), f"{wheel}[node]"]
    subprocess.run([*pip, *target], check=True, capture_output=True)
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")  # the machine's own name is not known, even here
    (packages / "lent.pth").write_text("/opt/lent\n")
    program = root / "opt/osteon/bin/osteon"
    program.write_text("#!/opt/osteon/bin/python3\nfrom node.__main__ import main\nmain()\n")
    program.chmod(0o755)
    for name in ("sysusers", "tmpfiles"):
        (root / f"etc/{name}.d").mkdir(exist_ok=True)
        shutil.copy(SYSTEMD / f"osteon.{name}.conf", root / f"etc/{name}.d/osteon.conf")
    for file in (*SYSTEMD.glob("*.service"), *SYSTEMD.glob("*.target"), *SYSTEMD.glob("*.timer")):
        shutil.copy(file, root / "etc/systemd/system")
    shutil.copy(SYSTEMD / "osteon-verb.sh", root / "usr/local/bin/osteon")
    subprocess.run(
        ["chroot", str(root), "/opt/osteon/bin/osteon", "init", "/etc/osteon", "--port", str(ports["port"])], check=True
    )
    settings = root / "etc/osteon/ae_config.toml"
    text = settings.read_text("utf-8").replace("# [[node.callers]]\n", "[[node.callers]]\n", 1)
    for line in ('# ae_title = "PACS"', '# networks = ["127.0.0.1/32"]'):
        text = text.replace(line, line.removeprefix("# ").replace("PACS", "SENDER"), 1)
    text = text.replace('"data"', '"/srv/osteon/data"').replace("sqlite:///data/", "sqlite:////srv/osteon/data/")
    text = text.replace("quiet_s = 120.0", "quiet_s = 1.0").replace('"keys/', '"credential:')
    for name, number in ports.items():
        text = re.sub(rf"(?m)^{name} = \d+", f"{name} = {number}", text, count=1)
    settings.write_text(text + SCHEDULE, "utf-8")
    shutil.rmtree(root / "etc/osteon/data")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, int]]:
    """Give a machine whose receiver and replier run, and the receiver's port."""
    if os.geteuid() != 0:
        pytest.skip("booting a machine needs root")
    ports = {name: free_port() for name in ("port", "receive_port", "reply_port", "schedule_port")}
    root = tmp_path_factory.mktemp("machine")
    root.chmod(0o755)
    install(root, tmp_path_factory.mktemp("build"), ports)
    machine = Machine(root, ports)
    try:
        try:
            until(machine.booted, seconds=90)
        except AssertionError:
            pytest.skip("systemd cannot boot in a container here")
        machine.run("systemctl", "start", "osteon-receive", "osteon-reply")
        until(lambda: "replying" in journal(machine, "osteon-reply"), seconds=90)
        until(lambda: "listening" in journal(machine, "osteon-receive"), seconds=90)
        yield machine, ports["port"]
    finally:
        machine.off()


def journal(machine: Machine, unit: str) -> str:
    return machine.run("journalctl", "--no-pager", "-o", "cat", "-u", unit)


def test_an_image_is_received_and_its_study_waits_for_a_model(machine: tuple[Machine, int]) -> None:
    inside, port = machine
    assert send([studies.image(PatientName="SECRET^NAME")], port=port) == [0x0000]
    assert len(list((inside.root / "srv/osteon/data/archive").rglob("*.dcm"))) == 1
    until(lambda: re.search(r"waiting +1", inside.run(VERB, "status")), seconds=180)
    checked = inside.run(VERB, "check", fails=True)
    assert [line.split()[1] for line in checked.splitlines() if line.startswith("FAIL")] == ["pacs"], checked  # none is named
    until(lambda: inside.ready("receive") and inside.ready("reply"))
    assert "SECRET" not in inside.run("journalctl", "--no-pager", "-o", "cat")


def test_the_trainers_user_reads_the_archive_and_reaches_no_identity(machine: tuple[Machine, int]) -> None:
    inside, port = machine
    send([studies.image(PatientName="SECRET^NAME")], port=port)
    (image,) = (inside.root / "srv/osteon/data/archive").rglob("*.dcm")
    there = "/" + str(image.relative_to(inside.root))
    assert int(inside.run("wc", "-c", there, user="osteon-train").split()[0]) == image.stat().st_size
    receiver = inside.shown("osteon-receive", "MainPID")
    closed = (
        "ls /srv/osteon/data/vault",
        "ls /srv/osteon/data/quarantine",
        "ls /etc/osteon/keys",
        "ls /run/credentials/osteon-receive.service",
        f"ls /proc/{receiver}/root/",
        f"cat /proc/{receiver}/environ",
        "touch /srv/osteon/data/archive/x",
        "mv /srv/osteon/data/vault /srv/osteon/data/other",
    )
    for command in closed:
        told = inside.run("sh", "-c", f"{command} && echo IT WORKED", fails=True, user="osteon-train")
        assert "IT WORKED" not in told, command
    database = "import sqlite3; sqlite3.connect('/srv/osteon/data/catalogue/catalogue.db').execute('BEGIN IMMEDIATE')"
    inside.run("python3", "-c", database, user="osteon-train")


def test_a_role_is_confined(machine: tuple[Machine, int]) -> None:
    inside, _port = machine
    receiver = inside.shown("osteon-receive", "MainPID")
    told = inside.run("cat", f"/proc/{receiver}/status")
    assert re.search(r"(?m)^CapEff:\s+0+$", told)
    assert re.search(r"(?m)^NoNewPrivs:\s+1$", told)
    assert re.search(r"(?m)^Seccomp:\s+2$", told)
    assert re.search(r"(?m)^Max core file size +0 +0 ", inside.run("cat", f"/proc/{receiver}/limits"))


def test_a_killed_role_comes_back_and_one_with_wrong_settings_stays_down(machine: tuple[Machine, int]) -> None:
    inside, _port = machine
    before = inside.shown("osteon-receive", "MainPID")
    inside.run("kill", "-9", before)
    until(lambda: inside.shown("osteon-receive", "MainPID") not in ("0", before), seconds=60)
    settings = inside.root / "etc/osteon/ae_config.toml"
    right = settings.read_text("utf-8")
    settings.write_text(right.replace("[completion]", "[completions]"), "utf-8")
    try:
        inside.run("systemctl", "restart", "osteon-receive")
        until(lambda: inside.shown("osteon-receive", "ActiveState") == "failed", seconds=60)
        assert inside.shown("osteon-receive", "ExecMainStatus") == "2"
        assert "completions" in journal(inside, "osteon-receive")
    finally:
        settings.write_text(right, "utf-8")
        inside.run("systemctl", "start", "osteon-receive")


def test_the_keys_may_lie_encrypted(machine: tuple[Machine, int]) -> None:
    inside, _port = machine
    keys, drop_in = (
        inside.root / "etc/osteon/keys",
        inside.root / "etc/systemd/system/osteon-receive.service.d/encrypted-keys.conf",
    )
    inside.run("systemd-creds", "setup")
    for name in ("site.key", "vault.key"):
        command = ("systemd-creds", "encrypt", "--with-key=host", f"--name={name}")
        inside.run(*command, f"/etc/osteon/keys/{name}", f"/etc/osteon/keys/{name}.cred")
        (keys / name).rename(keys / f"{name}.away")
    drop_in.parent.mkdir()
    shutil.copy(SYSTEMD / "drop-ins" / "encrypted-keys.conf", drop_in)
    try:
        inside.run("systemctl", "daemon-reload")
        assert listens_again(inside)
        checked = inside.run(VERB, "check", fails=True)
        assert re.search(r"ok +vault +opens with this key", checked)
    finally:
        drop_in.unlink()
        for name in ("site.key", "vault.key"):
            (keys / f"{name}.away").rename(keys / name)
            (keys / f"{name}.cred").unlink()
        inside.run("systemctl", "daemon-reload")


def test_port_104_needs_its_drop_in(machine: tuple[Machine, int]) -> None:
    inside, port = machine
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", 104))
        except OSError:
            pytest.skip("port 104 is taken")
    settings = inside.root / "etc/osteon/ae_config.toml"
    folder = inside.root / "etc/systemd/system/osteon-receive.service.d"
    folder.mkdir(exist_ok=True)
    settings.write_text(settings.read_text("utf-8").replace(f"port = {port}\n", "port = 104\n"), "utf-8")
    shutil.copy(SYSTEMD / "drop-ins" / "port-104.conf", folder)
    try:
        inside.run("systemctl", "daemon-reload")
        assert listens_again(inside)
        assert send([studies.image()], port=104) == [0x0000]
    finally:
        (folder / "port-104.conf").unlink()
        settings.write_text(settings.read_text("utf-8").replace("port = 104\n", f"port = {port}\n"), "utf-8")
        inside.run("systemctl", "daemon-reload")


def listens_again(inside: Machine) -> bool:
    """Start the receiver again and wait until it listens."""
    before = journal(inside, "osteon-receive").count('"listening"')
    inside.run("systemctl", "restart", "osteon-receive")
    until(lambda: journal(inside, "osteon-receive").count('"listening"') > before, seconds=60)
    return True


def test_the_backup_makes_a_set_that_opens_while_the_roles_run(machine: tuple[Machine, int]) -> None:
    inside, port = machine
    assert listens_again(inside)
    image, held = studies.image(), studies.image(patient=2, Modality="OT")
    assert send([image, held], port=port) == [0x0000, 0x0000]
    inside.run("systemctl", "start", "osteon-backup")
    assert inside.shown("osteon-backup", "Result") == "success"
    (made,) = [one for one in (inside.root / "srv/osteon/backup").iterdir() if one.is_dir()]
    assert list((made / "quarantine").rglob("*.*")) or list((made / "quarantine").iterdir())
    inside.run(VERB, "backup", "verify", f"/srv/osteon/backup/{made.name}")
    checked = inside.run(VERB, "check", fails=True)
    assert re.search(r"ok +backup +the last one is 0\.0 days old", checked)


def test_a_verb_by_hand_finds_relative_paths_and_is_handed_the_password_file(machine: tuple[Machine, int]) -> None:
    inside, _port = machine
    passwords, program = inside.root / "etc/osteon/keys/pgpass", inside.root / "opt/osteon/bin/osteon"
    passwords.write_text("db:5432:*:osteon:word\n")
    passwords.chmod(0o600)
    kept = program.read_text()
    program.write_text('#!/bin/sh\npwd\nid -un\ncat "${PGPASSFILE:-/dev/null}"\n')
    try:
        told = [inside.run("sh", "-c", f"cd {folder} && {VERB} status").split() for folder in ("/etc/osteon", "/root")]
        told.append(inside.run("sh", "-c", f"cd /etc && {VERB} train status").split())
    finally:
        program.write_text(kept)
        passwords.unlink()
    assert told[0] == ["/etc/osteon", "osteon", "db:5432:*:osteon:word"]
    assert told[1] == ["/", "osteon", "db:5432:*:osteon:word"], "root's own folder is closed to osteon"
    assert told[2] == ["/etc", "osteon-train"], "the node's password is not the trainer's"


def test_the_vaults_key_can_be_changed(machine: tuple[Machine, int]) -> None:
    inside, _port = machine
    keys = inside.root / "etc/osteon/keys"
    inside.run("sh", "-c", "umask 077; head -c 32 /dev/urandom | base64 >/etc/osteon/keys/vault-new.key")
    inside.run("systemctl", "stop", "osteon.target", "osteon-receive", "osteon-reply")
    rotate = (VERB, "vault", "rotate", "--new-key", "credential:vault-new.key", "--reason", "once a year")
    until(lambda: "sealed with the new key" in inside.run(*rotate, fails=True), seconds=60)
    (keys / "vault.key").rename(keys / "vault.key.old")
    (keys / "vault-new.key").rename(keys / "vault.key")
    assert "osteon" not in inside.run("find", f"{DATA}/vault", f"{DATA}/quarantine", "!", "-user", "osteon")
    inside.run(VERB, "vault", "verify")
    inside.run("systemctl", "start", "osteon-receive", "osteon-reply")
    until(lambda: inside.ready("receive") and inside.ready("reply"), seconds=90)


def test_the_trainer_works_without_keys_outlives_its_scheduler_and_gives_a_model_that_answers(
    machine: tuple[Machine, int], tmp_path: Path
) -> None:
    """From the cohort over DICOM to the model at work; in between the scheduler is stopped, started again and killed."""
    inside, port = machine
    if not inside.run("/opt/osteon/bin/python3", "-c", "import torch, numpy; print(torch.ones(1))", fails=True).startswith(
        "tensor"
    ):
        pytest.skip("the libraries of this environment do not run on the Debian of the test")
    learn(inside, port, phantoms.cohort(tmp_path, seed=2026, patients=80))
    inside.run("systemctl", "start", "osteon-schedule")
    until(lambda: inside.ready("schedule"), seconds=60)
    assert inside.run("ps", "-o", "user:20=", "-p", inside.shown("osteon-schedule", "MainPID")).strip() == "osteon-train"
    inside.run(VERB, "schedule", "run-now", "weekly", "--reason", "to see it work")
    trainer = until(lambda: trainers(inside), seconds=60)
    until(lambda: "running" in inside.run(VERB, "train", "status"), seconds=60)
    asked = f"from pathlib import Path; from node.keep.retention import is_training; print(is_training(Path('{DATA}/runs')))"
    until(lambda: "True" in inside.run("/opt/osteon/bin/python3", "-c", asked, user="osteon"), seconds=60)
    inside.run("kill", "-STOP", *trainer)  # so that the run does not end before its scheduler has

    inside.run("systemctl", "stop", "osteon-schedule")
    assert inside.shown("osteon-schedule", "ActiveState") == "inactive"
    assert trainers(inside) == trainer
    inside.run("systemctl", "start", "osteon-schedule")
    until(lambda: inside.ready("schedule"), seconds=60)
    scheduler = inside.shown("osteon-schedule", "MainPID")
    inside.run("kill", "-9", scheduler)
    until(lambda: inside.shown("osteon-schedule", "MainPID") not in ("0", scheduler), seconds=60)
    assert trainers(inside) == trainer
    inside.run("kill", "-CONT", *trainer)
    inside.run(VERB, "train", "watch", "1")
    assert journal(inside, "osteon-schedule").count("trainer started") == 1
    (version,) = (one.name for one in (inside.root / "srv/osteon/data/models/versions").iterdir())
    inside.run(VERB, "models", "promote", version, "--reason", "to see it work")
    until(lambda: "model in service" in journal(inside, "osteon-reply"), seconds=60)


def learn(inside: Machine, port: int, cohort: phantoms.Cohort) -> None:
    """Send a cohort to be learned from, and import its labels."""
    send_files(cohort.files, Pacs(name="node", ae_title="OSTEON_LEARN", host="127.0.0.1", port=port), calling="SENDER")
    shutil.copy(cohort.labels, inside.root / "srv/osteon/labels.csv")
    (inside.root / "srv/osteon/labels.csv").chmod(0o644)
    inside.run(VERB, "labels", "import", "/srv/osteon/labels.csv")


def trainers(inside: Machine) -> list[str]:
    """Give the process numbers of torchrun and its trainer, once both are there."""
    found = inside.run("pgrep", "-u", "osteon-train", "-f", "--", "-m (-- )?training ", fails=True).split()
    return found if len(found) == 2 else []


def test_what_was_kept_for_long_enough_leaves_the_archive_the_vault_and_the_trainers_cache(machine: tuple[Machine, int]) -> None:
    inside, _port = machine
    data, settings = inside.root / "srv/osteon/data", inside.root / "etc/osteon/ae_config.toml"
    if not (before := pictures(data)):
        pytest.skip("no run was made on this machine")
    settings.write_text(settings.read_text("utf-8").replace("learn = 0.0\n", "learn = 0.00001\n"), "utf-8")
    inside.run("systemctl", "restart", "osteon-reply")
    until(lambda: re.search(r"removed +80", inside.run(VERB, "status")), seconds=60)
    stays = len(list((data / "archive").rglob("*.dcm")))
    assert stays < before, "what was sent to be answered has no limit, and the trainer decodes it, too"
    until(lambda: pictures(data) <= stays, seconds=60)
    assert "Permission denied" not in journal(inside, "osteon-reply")


def pictures(data: Path) -> int:
    """Count the pictures in the trainer's caches that are not blanked."""
    found = 0
    for file in (data / "cache").glob("*px-*/pixels.u8"):
        side = int(file.parent.name.partition("px-")[0])
        found += int(np.fromfile(file, np.uint8).reshape(-1, side * side).any(axis=1).sum())
    return found


def test_the_target_starts_and_stops_every_role(machine: tuple[Machine, int]) -> None:
    inside, _port = machine
    inside.run("systemctl", "stop", "osteon-receive", "osteon-reply")
    before = journal(inside, "osteon-receive").count('"stopped"')
    inside.run("systemctl", "start", "osteon.target")
    assert listens_again(inside)
    inside.run("systemctl", "stop", "osteon.target")
    for unit in ("osteon-receive", "osteon-reply"):
        until(lambda unit=unit: inside.shown(unit, "ActiveState") == "inactive", seconds=60)
        assert inside.shown(unit, "Result") == "success"
    assert journal(inside, "osteon-receive").count('"stopped"') > before
