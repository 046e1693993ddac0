"""The command line as an operator uses it."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from roles import hand_in
from studies import study
from tiny_model import promote_tiny

from models import durable
from node import __main__ as command
from node import logs
from node import settings as site_settings
from node.commands.check import Verdict, _directories
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.keep.catalogue import Catalogue
from node.keep.records import Role
from node.receive.intake import Intake
from node.settings import Settings

VERBS = (
    "init",
    "check",
    "serve",
    "receive",
    "reply",
    "status",
    "labels",
    "models",
    "train",
    "schedule",
    "quarantine",
    "delivery",
    "demo",
    "backup",
    "restore",
    "archive",
    "patients",
    "vault",
    "history",
)
HEAVY = (
    "torch",
    "torchvision",
    "faiss",
    "onnxruntime",
    "highdicom",
    "sqlalchemy",
    "alembic",
    "pynetdicom",
    "matplotlib",
    "sklearn",
)


def osteon(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "node", *arguments], capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@contextmanager
def opened(settings: Settings) -> Iterator[Intake]:
    intake = Intake.open(settings)
    try:
        yield intake
    finally:
        intake.close()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    told = osteon(verb, "--help").stdout
    assert len(told.split()) > 15


@pytest.mark.parametrize(
    ("work", "allowed"),
    [
        ("from node.__main__ import build; build()", ()),
        ("from node.commands.status import status; status('', Path(sys.argv[1]))", ("sqlalchemy",)),
    ],
    ids=["help", "status"],
)
def test_a_quick_answer_loads_nothing_heavy(work: str, allowed: tuple[str, ...], site: Path) -> None:
    osteon("status", "--config", str(site))  # the first opening makes the catalogue; the second only reads it
    code = f"import sys; from pathlib import Path\n{work}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, str(site)], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert loaded <= set(allowed)


def test_an_error_is_one_line_with_the_place_and_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "ae_config.toml").write_text("[node]\nae_title = 'X'\nwrong = 1\n")
    done = osteon("status", "--config", str(tmp_path / "ae_config.toml"), check=False)
    assert done.returncode == 2
    assert "line 3" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_finds_what_is_wrong_and_exits_with_one(tmp_path: Path, free_port: Callable[[], int]) -> None:
    with Pacs(tmp_path / "pacs", callers=["OSTEON"]) as pacs:
        config = init_site(
            tmp_path / "site",
            node={"callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"]}]},
            pacs=[
                {"name": "main", "ae_title": pacs.ae_title, "host": "127.0.0.1", "port": pacs.port},
                {"name": "gone", "ae_title": "GONE", "host": "127.0.0.1", "port": free_port(), "timeout_s": 2.0},
            ],
        )
        done = osteon("check", "--config", str(config), check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert any("ok" in line and "main" in line for line in lines)
    assert any("FAIL" in line and "gone" in line for line in lines)
    key = Path(site_settings.load(config).storage.site_key)
    key.chmod(0o644)
    assert "readable by others" in osteon("check", "--config", str(config), check=False).stdout


def test_check_fails_on_a_file_system_that_cannot_keep_two_receivers_apart(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def neither(_temporary: Path, path: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    settings = site_settings.load(site)
    assert [one.verdict for one in _directories(settings) if one.what == "storage"] == [Verdict.OK]
    monkeypatch.setattr(durable, "_publish", neither)
    (finding,) = [one for one in _directories(settings) if one.what == "storage"]
    assert finding.verdict is Verdict.FAIL
    assert "hard links" in finding.told
    assert not [path for path in settings.storage.root.iterdir() if path.name.startswith(".")]


def test_status_says_where_a_study_is_by_any_of_its_names(site: Path) -> None:
    settings = site_settings.load(site)
    image = study(patient=1, images=1, AccessionNumber="ACC-77")[0]
    with opened(settings) as intake:
        hand_in(intake, image)
        uid = intake.keys.uid(image.StudyInstanceUID)
    vault = Path(settings.storage.vault.removeprefix("sqlite:///"))
    vault.rename(vault.with_suffix(".away"))  # the vault is not opened
    for name in ("ACC-77", image.StudyInstanceUID, image.SOPInstanceUID, uid):
        told = osteon("status", "--study", name, "--config", str(site)).stdout
        assert len(told.splitlines()) == 1
        assert uid in told
        assert "receiving" in told
    unknown = osteon("status", "--study", "NOBODY", "--config", str(site), check=False)
    assert unknown.returncode == 2
    assert "no study is known" in unknown.stderr


def test_status_shows_queues_model_and_switch(site: Path) -> None:
    settings = site_settings.load(site)
    version = promote_tiny(settings.storage.root / "models")
    osteon("reply", "pause", "--reason", "first weeks", "--config", str(site))
    told = osteon("status", "--config", str(site)).stdout
    assert version in told
    assert "OFF" in told
    osteon("reply", "resume", "--reason", "trusted", "--config", str(site))
    assert "OFF" not in osteon("status", "--config", str(site)).stdout


def test_status_names_the_hosts_when_there_are_several(site: Path) -> None:
    settings, now = site_settings.load(site), datetime.now(UTC)
    with Catalogue.open(settings.storage.catalogue) as catalogue:
        catalogue.roles.beat(Role(name="reply", host="host-one", pid=1, seen_at=now))
        assert "host-one" not in osteon("status", "--config", str(site)).stdout
        catalogue.roles.beat(Role(name="reply", host="host-two", pid=1, seen_at=now))
    told = osteon("status", "--config", str(site)).stdout
    assert "on host-one" in told
    assert "on host-two" in told


def test_a_study_to_be_learned_from_is_not_answered_by_hand_either(site: Path) -> None:
    settings = site_settings.load(site)
    image = study(patient=1, images=1)[0]
    with opened(settings) as intake:
        hand_in(intake, image, called="OSTEON_LEARN")
    done = osteon("reply", "study", image.StudyInstanceUID, "--reason", "a test", "--config", str(site), check=False)
    assert done.returncode == 2
    assert "learned from" in done.stderr


def test_settings_named_before_the_verb_are_not_passed_over(tmp_path: Path, site: Path) -> None:
    """`osteon reply --config A pause` in the folder of site B must not pause B."""
    done = osteon("reply", "--config", str(site), "pause", "--reason", "which site?", check=False)
    assert done.returncode == 2
    assert "after the verb" in done.stderr


def test_a_fault_of_ours_tells_where_and_never_what(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of an unknown error may repeat what a header holds."""

    def fault() -> Callable[[], None]:
        def verb() -> None:
            raise ValueError("SECRET^NAME is no UID")

        return verb

    monkeypatch.setattr(command, "build", fault)
    monkeypatch.setattr(logs, "configure", lambda **_: None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    told = capsys.readouterr().err
    assert ended.value.code == 1
    assert "ValueError" in told
    assert "test_commands.py" in told
    assert "SECRET" not in told


def test_a_thread_that_dies_tells_where_and_never_what() -> None:
    code = """
import logging, sys, threading
from node import logs
logs.configure()
def work():
    raise ValueError("SECRET^NAME is no UID")
thread = threading.Thread(target=work, name="association"); thread.start(); thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "SECRET" not in done.stdout + done.stderr
    assert "ValueError" in done.stdout
    assert "association" in done.stdout


def test_check_names_every_trouble_it_meets(tmp_path: Path) -> None:
    """A host without an address, a caller whose results go nowhere, a catalogue that is none, a model that is damaged."""
    config = init_site(
        tmp_path / "site",
        node={"callers": [{"ae_title": name, "networks": ["127.0.0.0/8"]} for name in ("SENDER", "OTHER")]},
        pacs=[
            {"name": name, "ae_title": "PACS", "host": host, "port": 4, "timeout_s": 1.0, "answers_for": ["SENDER"]}
            for name, host in (("first", "no-such-host.invalid"), ("second", "127.0.0.1"))
        ],
    )
    settings = site_settings.load(config)
    Path(settings.storage.catalogue.removeprefix("sqlite:///")).write_bytes(b"no database at all" * 100)
    version = promote_tiny(settings.storage.root / "models")
    (settings.storage.root / "models" / "versions" / version / "model.onnx").unlink()
    done = osteon("check", "--config", str(config), check=False)
    told = " ".join(done.stdout.split())
    assert done.returncode == 1
    assert "first: the host no-such-host.invalid has no address here" in told
    assert "second: no association with 127.0.0.1:4" in told
    assert "OTHER: no [[pacs]] answers_for it" in told
    assert "model.onnx is missing" in told
    assert "FAIL stores" in told
    assert "Traceback" not in done.stdout + done.stderr


def test_status_says_that_the_model_in_service_is_damaged(site: Path) -> None:
    settings = site_settings.load(site)
    promote_tiny(settings.storage.root / "models")
    (settings.storage.root / "models" / "aliases" / "champion.json").unlink()
    (settings.storage.root / "models" / "aliases" / "champion.json").write_text("{")
    assert "restore it from a backup" in osteon("status", "--config", str(site)).stdout
    sign = Role(name="reply", host="here", pid=1, seen_at=datetime.now(UTC), told={"model_trouble": "hash differs"})
    with Catalogue.open(settings.storage.catalogue) as catalogue:
        catalogue.roles.beat(sign)
    assert "NOT WORKING, studies wait: hash differs" in osteon("status", "--config", str(site)).stdout


def test_a_role_that_died_before_the_clock_was_set_back_does_not_look_alive(site: Path) -> None:
    settings = site_settings.load(site)
    now = datetime.now(UTC)
    with Catalogue.open(settings.storage.catalogue) as catalogue:
        catalogue.roles.beat(Role(name="reply", host="here", pid=1, seen_at=now + timedelta(days=400)))
        assert "SILENT" in osteon("status", "--config", str(site)).stdout
        catalogue.roles.beat(Role(name="reply", host="here", pid=2, seen_at=now))
        assert [sign.pid for sign in catalogue.roles.all()] == [2]
