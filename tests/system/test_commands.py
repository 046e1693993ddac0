"""The command line as an operator uses it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from roles import hand_in
from studies import study
from tiny_model import promote_tiny

from node import settings as site_settings
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.receive.intake import Intake
from node.settings import Settings

VERBS = ("init", "check", "serve", "receive", "reply", "status", "labels", "models", "train", "quarantine", "delivery", "demo")
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


def test_a_study_to_be_learned_from_is_not_answered_by_hand_either(site: Path) -> None:
    settings = site_settings.load(site)
    image = study(patient=1, images=1)[0]
    with opened(settings) as intake:
        hand_in(intake, image, called="OSTEON_LEARN")
    done = osteon("reply", "study", image.StudyInstanceUID, "--config", str(site), check=False)
    assert done.returncode == 2
    assert "learned from" in done.stderr
