from __future__ import annotations

import base64
import os
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from node.commands.init import template
from node.errors import BadKey, BadSettings
from node.settings import Caller, Settings, load, load_key, load_url

SHIPPED = Path(__file__).parents[1] / "ae_config.toml"


def write(folder: Path, text: str) -> Path:
    file = folder / "ae_config.toml"
    file.write_text(text, "utf-8")
    return file


def line_with(text: str, part: str) -> int:
    (found,) = [number for number, line in enumerate(text.splitlines(), 1) if line.startswith(part)]
    return found


def changed(old: str, new: str) -> str:
    text = SHIPPED.read_text("utf-8")
    assert text.count(f"\n{old}") == 1, old
    return text.replace(f"\n{old}", f"\n{new}")


# --- the shipped file ------------------------------------------------------------------------------------------------------


def test_the_shipped_settings_are_valid_and_deny_everybody() -> None:
    settings = load(SHIPPED)
    assert settings.node.callers == []
    assert settings.pacs == []
    assert settings.node.host == "127.0.0.1"


def test_the_shipped_settings_are_what_init_writes() -> None:
    assert SHIPPED.read_text("utf-8") == template(), "ae_config.toml and node/commands/ae_config.toml must be the same"


def _keys(model: type[BaseModel], table: str = "") -> dict[str, tuple[str, object]]:
    """List every key of the settings with its table and its default (... when it has none)."""
    found: dict[str, tuple[str, object]] = {}
    for name, info in model.model_fields.items():
        inner = next(
            (
                a
                for a in (info.annotation, *getattr(info.annotation, "__args__", ()))
                if isinstance(a, type) and issubclass(a, BaseModel)
            ),
            None,
        )
        path = f"{table}.{name}".lstrip(".")
        if inner is None:
            found[path] = (table, ... if info.is_required() else info.default)
        else:
            found |= _keys(inner, path)
    return found


@pytest.mark.parametrize("key", _keys(Settings))
def test_every_key_is_in_the_shipped_file_with_a_comment_and_its_default(key: str) -> None:
    import tomllib

    table, default = _keys(Settings)[key]
    name = key.removeprefix(f"{table}.")
    lines = SHIPPED.read_text("utf-8").splitlines()
    (start,) = [at for at, line in enumerate(lines) if re.fullmatch(rf"(# )?\[\[?{re.escape(table)}\]\]?", line)]
    at = next(at for at in range(start + 1, len(lines)) if re.match(rf"(# )?{name} = ", lines[at]))
    assert not any(re.match(r"(# )?\[", line) for line in lines[start + 1 : at]), f"{key} stands in another table"
    before = lines[at - 1]
    is_example = lines[at].startswith("# ")
    assert (
        before.startswith("# ")
        or (is_example and table in ("pacs", "node.callers", "schedule", "schedule.when"))
        or name in _EXPLAINED_ABOVE
    ), f"{key} has no comment"
    if default is not ... and key != "schedule.cron":  # an example needs a rhythm, and none is the default
        assert tomllib.loads(lines[at].removeprefix("# "))[name] == default


_EXPLAINED_ABOVE = {"host", "port"}


def test_the_examples_in_comments_are_valid(tmp_path: Path) -> None:
    text = re.sub(
        r"(?m)^# (\[\[?[a-z.]+\]\]?|[a-z_]+ = )",
        r"\1",
        SHIPPED.read_text("utf-8"),
    )
    settings = load(write(tmp_path, text))
    assert [caller.ae_title for caller in settings.node.callers] == ["PACS"]
    assert [pacs.name for pacs in settings.pacs] == ["main"]
    assert [(one.name, one.cron, one.when.new_studies) for one in settings.schedule] == [("nightly", "30 2 * * sat", 0)]


# --- what is wrong is named with file, key and line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "key", "says"),
    [
        ('ae_title = "OSTEON"', 'ae_titel = "OSTEON"', "node.ae_titel", "unknown key"),
        ("quiet_s = 120.0", 'quiet_s = "soon"', "completion.quiet_s", "number"),
        ("quiet_s = 120.0", "quiet_s = -1.0", "completion.quiet_s", "greater than or equal to 0"),
        ("port = 11112", "port = 70000", "node.port", "less than or equal to 65535"),
        ("port = 11112", "port = true", "node.port", "integer"),
        ('ae_title = "OSTEON"', 'ae_title = "SEVENTEEN_LETTERS"', "node.ae_title", "at most 16"),
        ('ae_title = "OSTEON"', 'ae_title = "A\\\\B"', "node.ae_title", "pattern"),
        (
            'series_description = "Osteon AI RESEARCH ONLY"',
            'series_description = "Diagnosis"',
            "report.series_description",
            "RESEARCH ONLY",
        ),
        ('provider = "cpu"', 'provider = "tpu"', "inference.provider", "'cpu' or 'cuda'"),
        # a wait without an end would stop the loops with an overflow
        ("max_wait_s = 1800.0", "max_wait_s = inf", "completion.max_wait_s", "finite"),
        ("answer_within_h = 72.0", "answer_within_h = 1e300", "completion.answer_within_h", "less than or equal to"),
        ("claim_s = 300.0", "claim_s = 1e18", "inference.claim_s", "less than or equal to"),
        ('ae_title = "OSTEON"', 'ae_title = "  "', "node.ae_title", "pattern"),
        ('catalogue = "sqlite:///data/catalogue/catalogue.db"', 'catalogue = "sqlite://"', "storage.catalogue", "pattern"),
        (
            'catalogue = "sqlite:///data/catalogue/catalogue.db"',
            'catalogue = "postgresql://osteon:secret-1@db/osteon"',
            "storage.catalogue",
            "a password has no place here",
        ),
        (
            'vault = "sqlite:///data/vault/vault.db"',
            'vault = "postgresql://osteon@db/vault?password=secret-1"',
            "storage.vault",
            "a password has no place here",
        ),
        ('vault = "sqlite:///data/vault/vault.db"', 'vault = "mysql://vault"', "storage.vault", "pattern"),
        (
            'vault = "sqlite:///data/vault/vault.db"',
            'vault = "sqlite:///./data/catalogue/catalogue.db"',
            "storage.vault",
            "another place than storage.catalogue",
        ),
        ('vault_key = "keys/vault.key"', 'vault_key = "./keys/site.key"', "storage.vault_key", "another place"),
        ("locked = 0.2", "locked = 0.0", "training.locked", "greater than 0"),
    ],
)
def test_a_wrong_value_names_file_key_and_line(tmp_path: Path, old: str, new: str, key: str, says: str) -> None:
    text = changed(old, new)
    file = write(tmp_path, text)
    with pytest.raises(BadSettings) as told:
        load(file)
    complaint = next(line for line in str(told.value).splitlines() if f" {key}: " in line)
    assert complaint.startswith(f"{file}: line {line_with(text, new)}: ")
    assert says in complaint
    assert "secret-1" not in str(told.value)


def test_a_database_url_may_lie_in_the_environment_and_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTEON_CATALOGUE", "postgresql://osteon:secret-1@db/osteon?sslmode=verify-full")
    text = changed('catalogue = "sqlite:///data/catalogue/catalogue.db"', 'catalogue = "env:OSTEON_CATALOGUE"')
    settings = load(write(tmp_path, text))
    assert "secret-1" not in repr(settings)
    assert load_url(settings.storage.catalogue) == "postgresql://osteon:secret-1@db/osteon?sslmode=verify-full"
    assert load_url("postgresql://osteon@db/osteon") == "postgresql://osteon@db/osteon"
    monkeypatch.setenv("OSTEON_CATALOGUE", "sqlite:///somewhere.db")
    with pytest.raises(BadSettings, match="must read postgresql"):
        load_url(settings.storage.catalogue)


def test_a_file_that_is_no_utf_8_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "ae_config.toml"
    file.write_bytes("# settings\n# für uns\n".encode("latin-1"))
    with pytest.raises(BadSettings, match="line 2: not UTF-8"):
        load(file)


def test_a_missing_key_names_the_table_that_lacks_it(tmp_path: Path) -> None:
    text = changed('default_issuer = "HOSPITAL"\n', "")
    with pytest.raises(BadSettings, match=rf"line {line_with(text, '[node]')}: node.default_issuer: this key is missing"):
        load(write(tmp_path, text))


def test_an_unknown_table_is_an_error(tmp_path: Path) -> None:
    text = SHIPPED.read_text("utf-8") + "\n[meters]\nport = 1\n"
    with pytest.raises(BadSettings, match=rf"line {line_with(text, '[meters]')}: meters: unknown key"):
        load(write(tmp_path, text))


def test_a_wrong_key_in_the_second_of_two_tables_names_its_line(tmp_path: Path) -> None:
    block = '[[pacs]]\nname = "{}"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = {}\n'
    text = SHIPPED.read_text("utf-8") + block.format("one", 104) + block.format("two", 0)
    with pytest.raises(BadSettings, match=rf"line {len(text.splitlines())}: pacs.1.port: "):
        load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('learn_ae_title = "OSTEON_LEARN"', 'learn_ae_title = "OSTEON "', "must differ from ae_title"),
        ('vault = "sqlite:///data/vault/vault.db"', 'vault = "sqlite:///data/catalogue/catalogue.db"', "another database"),
        ('vault_key = "keys/vault.key"', 'vault_key = "keys/site.key"', "two keys"),
        ("reply_port = 9712", "reply_port = 9711", "two roles have the same port"),
    ],
)
def test_settings_that_are_unsafe_together_are_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(BadSettings, match=rf"line \d+: .*{says}"):
        load(write(tmp_path, changed(old, new)))


def test_a_network_must_be_one(tmp_path: Path) -> None:
    text = SHIPPED.read_text("utf-8") + '[[node.callers]]\nae_title = "A"\nnetworks = ["hospital"]\n'
    with pytest.raises(BadSettings, match=rf"line {len(text.splitlines())}: node.callers.0.networks: "):
        load(write(tmp_path, text))


def test_two_callers_or_two_pacs_of_one_name_are_refused(tmp_path: Path) -> None:
    caller = '[[node.callers]]\nae_title = "A"\nnetworks = ["127.0.0.1"]\n'
    with pytest.raises(BadSettings, match=r"two .*callers.* the same ae_title"):
        load(write(tmp_path, SHIPPED.read_text("utf-8") + 2 * caller))
    pacs = '[[pacs]]\nname = "one"\nae_title = "P"\nhost = "h"\nport = 104\n'
    with pytest.raises(BadSettings, match=r"two .*pacs.* the same name"):
        load(write(tmp_path, SHIPPED.read_text("utf-8") + 2 * pacs))


def test_no_toml_and_no_file_are_said(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match=r"not valid TOML.*line 1"):
        load(write(tmp_path, "[node\n"))
    with pytest.raises(BadSettings, match="osteon init"):
        load(tmp_path / "nowhere.toml")


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, changed('vocabulary = ""', 'vocabulary = "words.toml"'))
    monkeypatch.chdir("/")
    settings = load(file)
    assert settings.storage.root == tmp_path / "data"
    assert settings.storage.vault == f"sqlite:///{tmp_path}/data/vault/vault.db"
    assert settings.storage.site_key == str(tmp_path / "keys/site.key")
    assert settings.node.vocabulary == str(tmp_path / "words.toml")


@pytest.mark.parametrize(
    ("address", "may"),
    [("10.1.2.3", True), ("10.2.0.1", False), ("::ffff:10.1.2.3", True), ("fe80::1%eth0", True), ("2001:db8::1", False)],
)
def test_a_caller_calls_from_its_networks_only(address: str, may: bool) -> None:
    caller = Caller(ae_title="A", networks=["10.1.0.0/16", "fe80::/10"], purpose="answer")
    assert caller.calls_from(address) is may


# --- keys ------------------------------------------------------------------------------------------------------------------

KEY = bytes(range(32))


def key_file(folder: Path, content: bytes, mode: int = 0o600) -> str:
    file = folder / "some.key"
    file.write_bytes(content)
    file.chmod(mode)
    return str(file)


def test_a_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_key(key_file(tmp_path, base64.b64encode(KEY) + b"\n")) == KEY
    assert load_key(key_file(tmp_path, base64.b64encode(KEY), 0o400)) == KEY
    monkeypatch.setenv("OSTEON_TEST_KEY", base64.b64encode(KEY).decode())
    assert load_key("env:OSTEON_TEST_KEY") == KEY


def test_a_key_comes_as_a_credential_of_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    file = Path(key_file(tmp_path, base64.b64encode(KEY), 0o400))
    assert load_key(f"credential:{file.name}") == KEY
    file.chmod(0o444)
    with pytest.raises(BadKey, match="readable by others"):
        load_key(f"credential:{file.name}")
    with pytest.raises(BadKey, match=r"credential:other.*put it back"):
        load_key("credential:other")
    with pytest.raises(BadKey, match="without a folder"):
        load_key(f"credential:../{tmp_path.name}/{file.name}")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(BadKey, match=rf"CREDENTIALS_DIRECTORY is not set.*LoadCredential={file.name}"):
        load_key(f"credential:{file.name}")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a file of root's")
def test_the_access_list_by_which_systemd_lets_a_service_read_is_no_open_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows as "r" for the group of a file of root's; a file of somebody else's with it is open."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    file = Path(key_file(tmp_path, base64.b64encode(KEY), 0o440))
    assert load_key(f"credential:{file.name}") == KEY
    os.chown(file, 65534, -1)
    with pytest.raises(BadKey, match="readable by others"):
        load_key(f"credential:{file.name}")


def test_a_key_that_is_no_file_is_not_taken_for_a_path(tmp_path: Path) -> None:
    text = changed('site_key = "keys/site.key"', 'site_key = "credential:site"').replace("keys/vault.key", "env:VAULT")
    storage = load(write(tmp_path, text)).storage
    assert (storage.site_key, storage.vault_key) == ("credential:site", "env:VAULT")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o620])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(BadKey, match=f"mode {mode:04o}.*chmod 600"):
        load_key(key_file(tmp_path, base64.b64encode(KEY), mode))


@pytest.mark.parametrize("content", [b"", b"not base64!", base64.b64encode(KEY[:31]), base64.b64encode(KEY * 2), b"\xff\xfe"])
def test_a_malformed_key_is_refused_and_not_repeated(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BadKey) as told:
        load_key(key_file(tmp_path, content))
    assert len(content) < 9 or content.decode("latin-1") not in str(told.value)


def test_a_missing_key_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadKey, match="put it back from its copy"):
        load_key(str(tmp_path / "none.key"))
    monkeypatch.delenv("OSTEON_TEST_KEY", raising=False)
    with pytest.raises(BadKey, match="OSTEON_TEST_KEY"):
        load_key("env:OSTEON_TEST_KEY")
