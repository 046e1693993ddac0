"""The units under a real systemd, booted in a container of its own: what deploy/README.md says of them is so."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import shared
import studies
from docs.claims import tracked
from roles import send, until

import node.settings

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
SYSTEMD = ROOT / "deploy" / "systemd"
DEBIAN = "bookworm"
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,procps"


class Machine:
    """A Debian with Osteon installed by hand, as deploy/README.md says, and booted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        command = [shared.tool("systemd-nspawn"), "--quiet", "--register=no", "--keep-unit", "--console=pipe", "--boot", "-D"]
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
        done = subprocess.run(inside, capture_output=True, text=True, timeout=120)
        assert fails or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout + (done.stderr if fails else "")

    def shown(self, unit: str, name: str) -> str:
        """Give a property of a unit."""
        return self.run("systemctl", "show", unit, "--value", "-p", name).strip()

    def off(self) -> None:
        self._boot.terminate()
        try:
            self._boot.wait(60)
        except subprocess.TimeoutExpired:
            self._boot.kill()
            self._boot.wait()


def install(root: Path, folder: Path, port: int) -> None:
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
    program = root / "opt/osteon/bin/osteon"
    program.write_text("#!/opt/osteon/bin/python3\nfrom node.__main__ import main\nmain()\n")
    program.chmod(0o755)
    for name in ("sysusers", "tmpfiles"):
        (root / f"etc/{name}.d").mkdir(exist_ok=True)
        shutil.copy(SYSTEMD / f"osteon.{name}.conf", root / f"etc/{name}.d/osteon.conf")
    for file in (*SYSTEMD.glob("*.service"), *SYSTEMD.glob("*.target"), *SYSTEMD.glob("*.timer")):
        shutil.copy(file, root / "etc/systemd/system")
    shutil.copy(SYSTEMD / "osteon-verb.sh", root / "usr/local/bin/osteon")
    subprocess.run(["chroot", str(root), "/opt/osteon/bin/osteon", "init", "/etc/osteon", "--port", str(port)], check=True)
    settings = root / "etc/osteon/ae_config.toml"
    text = settings.read_text("utf-8").replace("# [[node.callers]]\n", "[[node.callers]]\n", 1)
    for line in ('# ae_title = "PACS"', '# networks = ["127.0.0.1/32"]'):
        text = text.replace(line, line.removeprefix("# ").replace("PACS", "SENDER"), 1)
    text = text.replace('"data"', '"/srv/osteon/data"').replace("sqlite:///data/", "sqlite:////srv/osteon/data/")
    text = text.replace("quiet_s = 120.0", "quiet_s = 1.0")
    settings.write_text(text.replace('"keys/', '"credential:'), "utf-8")
    shutil.rmtree(root / "etc/osteon/data")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, int]]:
    """Give a machine whose receiver and replier run, and the receiver's port."""
    if os.geteuid() != 0:
        pytest.skip("booting a machine needs root")
    if not hasattr(node.settings, "CREDENTIAL"):
        pytest.skip("these settings know no credential: yet")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    root = tmp_path_factory.mktemp("machine")
    root.chmod(0o755)
    install(root, tmp_path_factory.mktemp("build"), port)
    machine = Machine(root)
    try:
        try:
            until(machine.booted, seconds=90)
        except AssertionError:
            pytest.skip("systemd cannot boot in a container here")
        machine.run("systemctl", "start", "osteon-receive", "osteon-reply")
        until(lambda: "replying" in journal(machine, "osteon-reply"), seconds=90)
        until(lambda: "listening" in journal(machine, "osteon-receive"), seconds=90)
        yield machine, port
    finally:
        machine.off()


def journal(machine: Machine, unit: str) -> str:
    return machine.run("journalctl", "--no-pager", "-o", "cat", "-u", unit)


def test_an_image_is_received_and_its_study_waits_for_a_model(machine: tuple[Machine, int]) -> None:
    inside, port = machine
    assert send([studies.image(PatientName="SECRET^NAME")], port=port) == [0x0000]
    assert len(list((inside.root / "srv/osteon/data/archive").rglob("*.dcm"))) == 1
    by_hand = "/usr/local/bin/osteon"
    until(lambda: re.search(r"waiting +1", inside.run(by_hand, "status")), seconds=180)
    assert "storage" in inside.run(by_hand, "check", fails=True)  # no PACS is named
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
        checked = inside.run("/usr/local/bin/osteon", "check", fails=True)
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
