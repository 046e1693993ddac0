from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from node.commands.init import init_site, template
from node.errors import BadSettings
from node.settings import load, load_key


def test_a_new_site_is_valid_and_closed_to_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        config = init_site(tmp_path / "site")
    finally:
        os.umask(before)
    settings = load(config)
    site_key, vault_key = load_key(settings.storage.site_key), load_key(settings.storage.vault_key)
    assert site_key != vault_key
    for path in (tmp_path / "site", *(tmp_path / "site").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_two_sites_have_different_keys(tmp_path: Path) -> None:
    one, two = (load(init_site(tmp_path / name)).storage for name in "ab")
    assert load_key(one.site_key) != load_key(two.site_key)


def test_overrides_are_written_as_toml_and_the_rest_stays_commented(tmp_path: Path) -> None:
    config = init_site(
        tmp_path,
        node={
            "ae_title": 'A "B"',
            "port": 0,
            "placeholder_patient_ids": ["X", "é"],
            "callers": [{"ae_title": "S", "networks": ["127.0.0.1"], "purpose": "learn"}],
        },
        pacs=[
            {"name": name, "ae_title": "PACS", "host": "127.0.0.1", "port": 4242, "answers_for": ["S"]} for name in ("one", "two")
        ],
        completion={"quiet_s": 0.5, "max_wait_s": 3},
        inference={"answers": "off", "allow_degraded": True},
    )
    settings = load(config)
    assert (settings.node.ae_title, settings.node.port, settings.node.placeholder_patient_ids) == ('A "B"', 0, ["X", "é"])
    assert [(caller.ae_title, caller.purpose) for caller in settings.node.callers] == [("S", "learn")]
    assert [(pacs.name, pacs.answers_for) for pacs in settings.pacs] == [("one", ["S"]), ("two", ["S"])]
    assert (settings.completion.quiet_s, settings.completion.max_wait_s) == (0.5, 3)
    assert (settings.inference.answers, settings.inference.allow_degraded) == ("off", True)
    comments = [line for line in template().splitlines() if line.startswith("#")]
    assert [line for line in config.read_text("utf-8").splitlines() if line.startswith("#")] == comments


@pytest.mark.parametrize("wrong", [{"node": {"prot": 1}}, {"nodes": {"port": 1}}, {"node": {"port": -1}}, {"labs": [{"a": 1}]}])
def test_a_wrong_override_writes_nothing(tmp_path: Path, wrong: dict[str, dict[str, int]]) -> None:
    with pytest.raises(BadSettings):
        init_site(tmp_path / "site", **wrong)
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("there", ["ae_config.toml", "keys/site.key", "keys/vault.key"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    file = tmp_path / there
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    with pytest.raises(BadSettings, match=r"overwrites nothing|keep it"):
        init_site(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "precious"


def test_keys_may_come_from_the_environment(tmp_path: Path) -> None:
    init_site(tmp_path, storage={"site_key": "env:A", "vault_key": "env:B"})
    assert not (tmp_path / "keys").exists()


def test_the_command_says_what_it_made_and_what_comes_next(tmp_path: Path) -> None:
    import typer

    from node.commands.init import init

    app = typer.Typer()
    app.command()(init)
    result = CliRunner().invoke(app, [str(tmp_path / "site"), "--ae-title", "BONES", "--port", "104"], catch_exceptions=False)
    settings = load(tmp_path / "site" / "ae_config.toml")
    assert (settings.node.ae_title, settings.node.learn_ae_title, settings.node.port) == ("BONES", "BONES_LEARN", 104)
    assert all(word in result.output for word in ("osteon check", "osteon serve", "Back up keys/", "Research use only"))
