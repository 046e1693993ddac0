"""The compose file: valid, closed by default, with settings that load and scripts that do what they say."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import shared
import yaml
from roles import running, send, until
from studies import image

from node.settings import load, load_key

DEPLOY = Path(__file__).parents[2] / "deploy"
OSTEON = ("receive", "reply", "schedule")


def compose(
    *arguments: str, env: Path | None = None, files: tuple[str, ...] = ("compose.yaml",)
) -> subprocess.CompletedProcess[str]:
    """Ask compose, which needs no engine for what is asked here."""
    engine = [shared.tool("docker-compose")]
    chosen = [word for name in files for word in ("-f", str(DEPLOY / name))]
    given = ["--env-file", str(env)] if env else []
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OSTEON", "ORTHANC"))}
    return subprocess.run([*engine, *given, *chosen, *arguments], capture_output=True, text=True, env=plain, timeout=60)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Give a folder of fresh keys and passwords."""
    folder = tmp_path / "secrets"
    subprocess.run([str(DEPLOY / "compose" / "prepare.sh"), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture
def services(prepared: Path) -> dict[str, dict[str, Any]]:
    """Give the services as compose understands them."""
    told = compose("--profile", "training", "config", env=prepared / "env")
    assert told.returncode == 0, told.stderr
    found: dict[str, dict[str, Any]] = yaml.safe_load(told.stdout)["services"]
    return found


def test_compose_understands_the_file_and_lists_every_service(prepared: Path) -> None:
    listed = compose("--profile", "training", "config", "--services", env=prepared / "env")
    assert listed.returncode == 0, listed.stderr
    assert sorted(listed.stdout.split()) == ["orthanc", "postgres", "receive", "reply", "schedule"]
    with_gpu = compose("--profile", "training", "config", env=prepared / "env", files=("compose.yaml", "compose.gpu.yaml"))
    assert with_gpu.returncode == 0, with_gpu.stderr
    assert "driver: nvidia" in with_gpu.stdout


def test_nothing_starts_without_passwords_of_its_own() -> None:
    refused = compose("config")
    assert refused.returncode != 0
    assert "prepare.sh" in refused.stderr


def test_ports_are_published_on_loopback_alone(services: dict[str, dict[str, Any]]) -> None:
    published = [str(port) for service in services.values() for port in service.get("ports", [])]
    assert published
    assert all("127.0.0.1" in port for port in published)


def test_the_services_of_osteon_have_no_more_rights_than_they_need(services: dict[str, dict[str, Any]]) -> None:
    for name in OSTEON:
        service = services[name]
        assert service["read_only"] is True
        assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
        assert service["ulimits"] == {"core": 0}
        assert service["memswap_limit"] == service["mem_limit"]


def test_the_trainer_has_neither_keys_nor_identities_nor_a_way_out(services: dict[str, dict[str, Any]]) -> None:
    trainer = json.dumps(services["schedule"])
    assert not [word for word in ("site_key", "vault_key", "node_pgpass", "quarantine") if word in trainer]
    assert list(services["schedule"]["networks"]) == ["database"]
    assert "archive:/srv/osteon/data/archive:ro" in services["schedule"]["volumes"]


def test_the_health_checks_ask_where_the_roles_show_their_metrics(services: dict[str, dict[str, Any]]) -> None:
    for name, config in (("receive", "ae_config.toml"), ("reply", "ae_config.toml"), ("schedule", "trainer.toml")):
        metrics = load(DEPLOY / "compose" / config).metrics
        assert services[name]["healthcheck"]["test"][-1] == str(getattr(metrics, f"{name}_port"))
        assert metrics.host == "127.0.0.1", "the check asks loopback, inside the container"


def test_the_replier_can_write_wherever_verbs_and_retention_do(services: dict[str, dict[str, Any]]) -> None:
    mounted = {volume.split(":")[1]: volume.split(":")[2] for volume in services["reply"]["volumes"]}
    data = ("", "/archive", "/quarantine", "/models", "/cache")
    assert all(mounted[f"/srv/osteon/data{place}"] == "rw" for place in data)
    assert mounted[load(DEPLOY / "compose" / "ae_config.toml").backup.folder] == "rw"
    assert "hostname" in services["schedule"], "its runs are known by it after a start anew"


def test_every_role_sees_who_was_learned_from_and_what_is_at_work(services: dict[str, dict[str, Any]]) -> None:
    """A merge looks through the frozen corpora of versions and runs, retention for a run at work; no folder would mean none."""
    for role, models in (("receive", "ro"), ("reply", "rw")):
        mounted = {volume.split(":")[1]: volume for volume in services[role]["volumes"]}
        assert mounted["/srv/osteon/data/models"] == f"models:/srv/osteon/data/models:{models}"
        assert mounted["/srv/osteon/data/runs"] == "runs:/srv/osteon/data/runs:ro"
        assert mounted["/srv/osteon/data/archive"] == "archive:/srv/osteon/data/archive:rw"


def test_the_receiver_has_the_memory_that_its_settings_can_ask_for(services: dict[str, dict[str, Any]]) -> None:
    """About three times what can be on its way at once (docs/operations.md, section 11), and something for the process itself."""
    node = load(DEPLOY / "compose" / "ae_config.toml").node
    given = str(services["receive"]["mem_limit"]).lower()
    limit_mb = int(given.removesuffix("g")) * 1024 if given.endswith("g") else int(given) >> 20
    assert 3 * node.max_associations * node.max_object_mb + 512 <= limit_mb
    assert all(caller.max_associations < node.max_associations for caller in node.callers)


def test_the_settings_of_the_compose_file_load_and_the_trainer_has_no_place_for_keys() -> None:
    node, trainer = load(DEPLOY / "compose" / "ae_config.toml"), load(DEPLOY / "compose" / "trainer.toml")
    assert node.storage.root == trainer.storage.root
    assert node.storage.catalogue.rpartition("/")[2] == trainer.storage.catalogue.rpartition("/")[2]
    assert (trainer.node.callers, trainer.pacs) == ([], [])
    for place in (trainer.storage.site_key, trainer.storage.vault_key):
        assert place.startswith("/nonexistent/")


def test_the_callers_of_the_settings_are_those_of_the_network(prepared: Path) -> None:
    networks = yaml.safe_load(compose("config", env=prepared / "env").stdout)["networks"]
    (caller,) = load(DEPLOY / "compose" / "ae_config.toml").node.callers
    assert caller.networks == [entry["subnet"] for entry in networks["dicom"]["ipam"]["config"]]
    assert networks["database"]["internal"] is True


def test_fresh_keys_and_passwords_are_private_and_the_keys_load(prepared: Path) -> None:
    assert load_key(str(prepared / "site.key")) != load_key(str(prepared / "vault.key"))
    words = [(prepared / f"{name}.password").read_text() for name in ("postgres", "node", "trainer")]
    assert len(set(words)) == 3
    assert all(len(word) >= 32 for word in words)
    assert words[1] in (prepared / "node.pgpass").read_text()
    assert words[2] in (prepared / "trainer.pgpass").read_text()
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in prepared.iterdir())
    again = subprocess.run([str(DEPLOY / "compose" / "prepare.sh"), str(prepared)], capture_output=True, text=True)
    assert again.returncode == 2
    assert "nothing is overwritten" in again.stderr


def test_every_secret_of_the_compose_file_is_prepared(prepared: Path) -> None:
    secrets = yaml.safe_load(compose("--profile", "training", "config", env=prepared / "env").stdout)["secrets"]
    assert {Path(secret["file"]) for secret in secrets.values()} <= set(prepared.iterdir())


@pytest.mark.parametrize("script", ["prepare.sh", "databases.sh"])
def test_the_scripts_are_clean(script: str) -> None:
    subprocess.run([shared.tool("shellcheck"), str(DEPLOY / "compose" / script)], check=True, capture_output=True)
    assert os.access(DEPLOY / "compose" / script, os.X_OK)


def test_orthanc_routes_radiographs_to_osteon_and_nothing_else(tmp_path: Path, site: Path) -> None:
    """The compose file's script, in a real Orthanc, to a real receiver."""
    from node.demo.orthanc import Orthanc

    class Routing(Orthanc):
        def _settings(self) -> dict[str, Any]:
            modalities = {"osteon": ["OSTEON", "127.0.0.1", listening], "sender": ["SENDER", "127.0.0.1", 1]}
            script = str(DEPLOY / "compose" / "route.lua")
            return super()._settings() | {"LuaScripts": [script], "DicomModalities": modalities}

    shared.tool("Orthanc")
    radiograph, other = image(patient=1), image(patient=2, Modality="OT")
    with running("receive", config=site) as receiver:
        listening = receiver.event("listening")["port"]
        with Routing(tmp_path / "orthanc", callers={}, ae_title="SENDER") as orthanc:
            assert send([other, radiograph], port=orthanc.port, called="SENDER") == [0x0000, 0x0000]
            until(lambda: len(orthanc.get("/instances")) == 2)
            receiver.event("instance stored")
            until(lambda: not [job for job in orthanc.get("/jobs?expand") if job["State"] in ("Pending", "Running")])
    assert [line["event"] for line in receiver.events if line["event"].startswith("instance")] == ["instance stored"]
