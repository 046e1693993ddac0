"""A host that only trains: no keys, no identities."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shared
from labelled import labelled_site, settings_of

from models.registry import Registry
from node.settings import load

TRAINER = Path(__file__).parents[2] / "deploy" / "trainer"
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1")


def torchrun(config: Path) -> subprocess.CompletedProcess[str]:
    """Start the trainer as deploy/trainer/osteon-train.sbatch does."""
    command = [*LAUNCH, "--nproc-per-node=1", "-m", "training", "--config", str(config), "--recipe", "phantom"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


@pytest.mark.long
def test_torchrun_trains_where_there_are_neither_keys_nor_vault_nor_quarantine(tmp_path: Path) -> None:
    site = labelled_site(tmp_path / "site", patients=24)
    for secret in ("keys", "data/vault", "data/quarantine"):
        shutil.rmtree(site.parent / secret)
    done = torchrun(site)
    assert done.returncode == 0, done.stderr
    assert "gate     " in done.stdout
    assert len(Registry(settings_of(site).storage.root / "models").versions()) == 1
    assert not [name for name in ("keys", "data/vault", "data/quarantine") if (site.parent / name).exists()]


def test_the_settings_of_a_trainer_load_and_name_no_key_and_no_peer() -> None:
    settings = load(TRAINER / "ae_config.toml")
    assert settings.storage.catalogue.startswith("postgresql")
    assert not Path(settings.storage.site_key).exists()
    assert (settings.node.callers, settings.pacs) == ([], [])


def test_readme_unit_and_scripts_name_the_same_settings_and_password_file() -> None:
    systemd = TRAINER.parent / "systemd"
    readme, drop_in = (TRAINER / "README.md").read_text("utf-8"), (systemd / "drop-ins" / "database.conf").read_text("utf-8")
    settings, passwords = "/etc/osteon/trainer.toml", "/etc/osteon/keys/trainer.pgpass"
    assert f"--config {settings}" in drop_in
    assert f"LoadCredential=pgpass:{passwords}" in drop_in
    assert f"deploy/trainer/ae_config.toml {settings}" in readme
    assert passwords in readme
    assert settings in (TRAINER / "osteon-train.sbatch").read_text("utf-8")
    unit = (systemd / "osteon-schedule.service").read_text("utf-8")
    folders = [place for line in unit.splitlines() if line.startswith("ReadWritePaths=") for place in line[15:].split()]
    assert folders
    assert all(place in readme for place in folders), "the unit does not start without them"
    assert {f"deploy/systemd/{name}" for name in ("osteon-schedule.service", "drop-ins/database.conf", "osteon-verb.sh")} <= set(
        readme.split()
    )


def test_the_batch_script_starts_one_process_and_is_clean() -> None:
    script = TRAINER / "osteon-train.sbatch"
    text = script.read_text()
    assert all(line in text for line in ("#SBATCH --nodes=1", "#SBATCH --ntasks=1", "--nproc-per-node=1"))
    subprocess.run([shared.tool("shellcheck"), str(script)], check=True, capture_output=True)
