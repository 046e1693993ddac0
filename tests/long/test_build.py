"""Wheel and source archive: what is in them, and that they work where nothing else is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import studies
from docs.claims import tracked
from roles import Role, send, until

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
EXTRAS = {
    "node": {"onnxruntime"},
    "cpu": {"onnxruntime", "torch", "apscheduler"},
    "gpu": {"onnxruntime-gpu", "torch", "apscheduler"},
    "postgres": {"psycopg"},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what a clone holds."""
    folder = tmp_path_factory.mktemp("sources")
    for file in tracked():
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return folder


@pytest.fixture(scope="module")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build as `make build` does: the source archive, and the wheel from that."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(sources)], check=True, capture_output=True)
    (wheel,), (archive,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, archive


@pytest.fixture(scope="module")
def python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel with the extra `node` into an empty environment."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{built[0]}[node]"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True, env=plain(), timeout=600)
    return python


@pytest.fixture(scope="module")
def node(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Role]]:
    """Make a site and run its receiver and replier from the empty environment."""
    osteon = str(python.parent / "osteon")
    folder = tmp_path_factory.mktemp("site") / "site"
    subprocess.run([osteon, "init", str(folder), "--port", "0"], check=True, capture_output=True, env=plain())
    config = folder / "ae_config.toml"
    caller = '[[node.callers]]\nae_title = "SENDER"\nnetworks = ["127.0.0.0/8"]\n'
    text = config.read_text("utf-8").replace("quiet_s = 120.0", "quiet_s = 0.2")
    config.write_text(text.replace("# [[node.callers]]\n", f"{caller}\n# [[node.callers]]\n"), "utf-8")
    role = Role("serve", "--config", str(config), command=[osteon])
    try:
        yield config, role
    finally:
        role.close()


def plain() -> dict[str, str]:
    """Give an environment in which nothing of this one is found."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "OSTEON"))}


def packed(sources: Path) -> set[str]:
    """Name the files of the three packages in a clone."""
    return {
        str(file.relative_to(sources)) for package in ("node", "models", "training") for file in (sources / package).rglob("*.*")
    }


def test_the_wheel_holds_the_packages_with_their_data_and_the_licences_and_nothing_else(
    sources: Path, built: tuple[Path, Path]
) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == packed(sources)
    assert {Path(name).suffix for name in inside} >= {".py", ".csv", ".toml", ".mako"}
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


def test_the_wheel_names_what_each_kind_of_machine_needs(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        told = wheel.read(name).decode()
    extras = {extra: set(re.findall(rf'(?m)^Requires-Dist: ([\w-]+).*extra == "{extra}"', told)) for extra in EXTRAS}
    assert set(re.findall(r"(?m)^Provides-Extra: (.+)$", told)) >= set(EXTRAS)
    assert all(extras[extra] >= wanted for extra, wanted in EXTRAS.items()), extras
    assert {"prometheus-client", "cryptography"} <= set(re.findall(r"(?m)^Requires-Dist: ([\w-]+)[^;\n]*$", told))


def test_the_source_archive_holds_what_it_takes_to_deploy_and_no_tests(sources: Path, built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert packed(sources) <= names
    deployed = {str(file.relative_to(sources)) for folder in ("deploy", "docs") for file in (sources / folder).rglob("*.*")}
    assert deployed | {"LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "constraints.txt", "ae_config.toml"} <= names
    assert not [name for name in names if name.startswith(("tests", ".", "build"))]


def test_the_source_archive_and_the_clone_build_the_same_wheel(sources: Path, built: tuple[Path, Path], tmp_path: Path) -> None:
    """`built` holds the wheel of the source archive."""
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(sources)]
    subprocess.run(command, check=True, capture_output=True)
    (other,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built[0]) as one, zipfile.ZipFile(other) as two:
        assert {name: one.read(name) for name in one.namelist()} == {name: two.read(name) for name in two.namelist()}


def test_an_empty_environment_for_the_node_has_no_training_libraries(python: Path) -> None:
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True, env=plain()
    )
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert {"osteon", "onnxruntime", "pynetdicom"} <= names
    assert not [name for name in names if re.match(r"torch|faiss|psycopg|nvidia|cuda|triton|apscheduler|scikit|scipy", name)]


def test_what_is_installed_receives_archives_and_gives_its_status(python: Path, node: tuple[Path, Role]) -> None:
    config, role = node
    port = role.event("listening")["port"]
    role.event("replying")
    assert send([studies.image()], port=port) == [0x0000]
    archive = config.parent / "data" / "archive"
    (file,) = archive.rglob("*.dcm")
    assert file.stat().st_mode & 0o777 == 0o440
    osteon = [str(python.parent / "osteon"), "status", "--config", str(config)]

    def waits_for_a_model() -> bool:
        told = subprocess.run(osteon, check=True, capture_output=True, text=True, env=plain()).stdout
        return bool(re.search(r"waiting +1", told))

    until(waits_for_a_model)


def test_what_is_installed_checks_itself(python: Path, node: tuple[Path, Role]) -> None:
    config, role = node
    role.event("listening")
    checked = subprocess.run(
        [str(python.parent / "osteon"), "check", "--config", str(config)], capture_output=True, text=True, env=plain()
    )
    wrong = [line for line in checked.stdout.splitlines() if line.startswith("FAIL")]
    assert [line.split()[1] for line in wrong] == ["pacs"], checked.stdout + checked.stderr  # no PACS is named yet
