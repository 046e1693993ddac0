"""The images: what they are built from, as whom they run, and how they say that they are well."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "deploy" / "containers"
FILES = sorted(CONTAINERS.glob("Containerfile.*"))
USERS = {"Containerfile.node": "10001:10001", "Containerfile.trainer": "10002:10001"}


def instructions(file: Path) -> list[tuple[str, str]]:
    """Give the instructions of a Containerfile with their arguments; comments and broken lines are put right."""
    text = re.sub(r"(?m)^\s*#.*\n", "", file.read_text())
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(None, 1)[0], " ".join(line.split(None, 1)[1].split())) for line in lines]


def of(file: Path, name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions(file) if instruction == name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_image_runs_as_a_user_that_is_not_root_and_is_no_shell(file: Path) -> None:
    assert of(file, "USER") == [USERS[file.name]]
    after = instructions(file)[[name for name, _ in instructions(file)].index("USER") :]
    assert not [name for name, _ in after if name in ("RUN", "COPY", "ADD")]
    assert of(file, "ENTRYPOINT") == ['["osteon"]']


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_image_is_made_of_named_versions_and_holds_no_secret(file: Path) -> None:
    (base,) = [value for value in of(file, "ARG") if value.startswith("BASE=")]
    assert re.search(r":\d+\.\d+-slim-\w+$", base)
    assert all("-c /src/constraints.txt" in command for command in of(file, "RUN") if "pip install" in command)
    assert not of(file, "ADD")
    assert not re.search(r"(?i)password|secret|token|site\.key|vault\.key", " ".join(of(file, "ENV") + of(file, "ARG")))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_an_image_copies_is_there_and_is_let_into_the_context(file: Path) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for arguments in of(file, "COPY"):
        *sources, _target = [word for word in arguments.split() if not word.startswith("--")]
        if arguments.startswith("--from"):
            continue
        for source in sources:
            assert (ROOT / source).exists()
            assert source == "." or any(fnmatch(source, pattern) for pattern in allowed)
    assert all((ROOT / name).exists() for name in allowed)


def test_the_context_holds_what_a_wheel_is_built_from_and_no_data() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {"!node", "!models", "!training", "!pyproject.toml", "!LICENSE", "!NOTICE", "!README.md", "!constraints.txt"} <= set(
        lines
    )


def test_the_folders_of_the_images_have_the_modes_of_the_units() -> None:
    tmpfiles = (ROOT / "deploy" / "systemd" / "osteon.tmpfiles.conf").read_text()
    wanted = dict(re.findall(r"(?m)^d (/srv/osteon/\S+) +(\d+)", tmpfiles))
    for file in FILES:
        made = {}
        for mode, paths in re.findall(r"install -d -m (\d+) -o \d+ -g \d+ ((?:/\S+ ?)+)", " ".join(of(file, "RUN"))):
            made |= dict.fromkeys(paths.split(), mode)
        assert made
        assert made == {path: mode for path, mode in wanted.items() if path in made}


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_a_role_is_well_when_its_healthz_says_so(status: int | None, code: int, free_port: Callable[[], int]) -> None:
    class Healthz(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response((status or 0) if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    port = free_port()
    command = [sys.executable, str(CONTAINERS / "healthy.py"), str(port)]
    if status is None:
        assert subprocess.run(command).returncode == code
        return
    with HTTPServer(("127.0.0.1", port), Healthz) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert subprocess.run(command).returncode == code
        server.shutdown()
