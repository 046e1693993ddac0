"""What the documents claim, compared with what is so. Run by `make check`; each claim is a test of test_docs.py too.

A claim is a function that gives its complaints, a line each; none means that the documents tell the truth.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).resolve().parents[2]
Claim = Callable[[], Iterator[str]]


def pages() -> list[Path]:
    """Give every page of documentation."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "deploy").rglob("*.md"))]


def make_targets_exist() -> Iterator[str]:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8")))
    for page in pages():
        for target in re.findall(r"(?m)(?:`|^)make ([a-z-]+)", page.read_text("utf-8")):
            if target not in targets:
                yield f"{page.name}: `make {target}` is no target of the Makefile"


def every_setting_is_in_the_shipped_file() -> Iterator[str]:
    from node.settings import Settings, load

    load(ROOT / "ae_config.toml")
    text = (ROOT / "ae_config.toml").read_text("utf-8")
    shipped = tomllib.loads(re.sub(r"(?m)^# (\[.*\]|[a-z_]+ = .*)$", r"\1", text))
    yield from _missing(Settings, shipped, "")


def _missing(model: Any, shipped: dict[str, Any], where: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name not in shipped:
            yield f"ae_config.toml: {where}{name} is not there"
            continue
        inner = get_args(field.annotation)[0] if get_origin(field.annotation) is list else field.annotation
        if hasattr(inner, "model_fields"):
            values = shipped[name]
            yield from _missing(inner, values[0] if isinstance(values, list) else values, f"{where}{name}.")


def every_verb_has_help() -> Iterator[str]:
    for words, command in verbs():
        if not (command.help or "").strip():
            yield f"osteon {' '.join(words)}: has no help"
        for option in command.params:
            if option.name not in ("help", "config") and not (getattr(option, "help", None) or "").strip():
                yield f"osteon {' '.join(words)}: {option.name} has no help"


def every_command_that_is_named_exists() -> Iterator[str]:
    known = {words for words, _ in verbs()}
    groups = {words[:1] for words in known if len(words) > 1}
    for page in pages():
        for named in re.findall(r"`osteon ([a-z]+(?: [a-z][a-z-]*)?)", page.read_text("utf-8")):
            words = tuple(named.split())
            if words not in known and words[:1] not in known - groups and words not in groups:
                yield f"{page.name}: `osteon {named}` does not exist"


def verbs() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Walk the command line: words and command of each verb."""
    import typer

    from node.__main__ import build

    yield from _walk((), typer.main.get_command(build()))


def _walk(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if words:
        yield words, command
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _walk((*words, name), inner)


def the_version_is_the_newest_heading() -> Iterator[str]:
    import node

    newest = re.search(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"))
    if newest is None or newest[1] != node.__version__:
        yield f"CHANGELOG.md: the newest heading is not {node.__version__}"


def links_lead_somewhere() -> Iterator[str]:
    for page in pages():
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                yield f"{page.relative_to(ROOT)}: the link {link} leads nowhere"


def files_that_are_named_exist() -> Iterator[str]:
    for page in pages():
        for path in re.findall(
            r"`((?:node|models|training|tests|deploy|docs)/[\w./-]+\.(?:py|sh|csv|toml|md))`", page.read_text("utf-8")
        ):
            if not (ROOT / path).exists():
                yield f"{page.relative_to(ROOT)}: there is no {path}"


def tests_that_are_named_exist() -> Iterator[str]:
    for page in pages():
        for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", page.read_text("utf-8")):
            path = ROOT / file
            if not path.exists():
                yield f"{page.relative_to(ROOT)}: there is no {file}"
            elif name and f"def {name}(" not in path.read_text("utf-8"):
                yield f"{page.relative_to(ROOT)}: {file} has no {name}"


def settings_that_are_named_exist() -> Iterator[str]:
    from node.settings import Settings

    for page in pages():
        for section, key in re.findall(r"`\[\[?([a-z_.]+)\]\]? ([a-z_]+)", page.read_text("utf-8")):
            fields: Any = Settings
            for part in (*section.split("."), key):
                field = getattr(fields, "model_fields", {}).get(part)
                if field is None:
                    yield f"{page.relative_to(ROOT)}: there is no setting [{section}] {key}"
                    break
                annotation = field.annotation
                models = [inner for inner in (*get_args(annotation), annotation) if hasattr(inner, "model_fields")]
                fields = models[0] if models else None


HANDBOOK = ROOT / "docs" / "operations.md"


def every_error_has_its_remedy() -> Iterator[str]:
    """Each class of the error tree stands in the handbook's table of errors."""
    text = HANDBOOK.read_text("utf-8")
    for name in sorted(_errors()):
        if f"`{name}`" not in text:
            yield f"operations.md: the error {name} has no row"


def _errors() -> set[str]:
    """Name the public classes of the error tree, without its three roots."""
    bases = {
        found.name: {base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in found.bases}
        for tree in _sources()
        for found in ast.walk(tree)
        if isinstance(found, ast.ClassDef)
    }
    roots = {"OsteonError", "Retriable", "Final"}
    errors, before = set(roots), 0
    while len(errors) != before:
        before = len(errors)
        errors |= {name for name, of in bases.items() if of & errors}
    return {name for name in errors - roots if not name.startswith("_")}


def every_verb_is_in_the_handbook() -> Iterator[str]:
    text = HANDBOOK.read_text("utf-8")
    for words, command in verbs():
        told = f"osteon {' '.join(words)}"
        if not getattr(command, "commands", None) and told not in text:
            yield f"operations.md: `{told}` is not there"


def every_log_line_is_in_the_handbook() -> Iterator[str]:
    text = HANDBOOK.read_text("utf-8")
    for what in sorted(events()):
        if f"`{what}`" not in text:
            yield f"operations.md: the log event `{what}` is not there"


def events() -> set[str]:
    """Name every event that is logged, wherever in the code: the texts in the second argument of `event` (or `say`)."""
    told = [call.args[1] for tree in _sources() for call in _calls(tree, "event", "say") if len(call.args) > 1]
    words = [one.value for text in told for one in ast.walk(text) if isinstance(one, ast.Constant)]
    return {word for word in words if isinstance(word, str)}


def _calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    """Give the calls of these functions, whatever they hang on."""
    yield from (call for call in ast.walk(tree) if isinstance(call, ast.Call) and _called(call) in names)


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def every_metric_is_in_the_handbook() -> Iterator[str]:
    documented = set(re.findall(r"(?m)^\| `(osteon_\w+)`", HANDBOOK.read_text("utf-8")))
    made = {name for tree in _sources() for name in _metrics(tree)}
    yield from (f"operations.md: the metric {name} is not there" for name in sorted(made - documented))
    yield from (f"operations.md: nothing makes the metric {name}" for name in sorted(documented - made))


def _metrics(tree: ast.AST) -> Iterator[str]:
    """Name the metrics of `Counter("osteon_…")` and its like, as they are shown."""
    endings = {"Counter": "_total", "CounterMetricFamily": "_total", "Info": "_info"}
    for call in _calls(tree, *endings, "Gauge", "GaugeMetricFamily", "Histogram"):
        named = call.args[0] if call.args else None
        if isinstance(named, ast.Constant) and str(named.value).startswith("osteon_"):
            yield str(named.value) + endings.get(_called(call), "")


def every_alert_is_in_the_handbook() -> Iterator[str]:
    documented = set(re.findall(r"(?m)^\| `(Osteon\w+)` \|", HANDBOOK.read_text("utf-8")))
    made = set(re.findall(r"(?m)^ +- alert: (\w+)$", (ROOT / "deploy/prometheus/alerts.yml").read_text("utf-8")))
    yield from (f"operations.md: the alert {name} is not there" for name in sorted(made - documented))
    yield from (f"operations.md: there is no alert {name}" for name in sorted(documented - made))


def _sources() -> Iterator[ast.Module]:
    for package in ("node", "models", "training"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ast.parse(path.read_text("utf-8"))


def nothing_names_a_machine() -> Iterator[str]:
    """No path of somebody's machine, no host of a package registry: what is cloned elsewhere works there."""
    forbidden = re.compile(
        r"(?<![\w.~<])/(?:work|root|home|Users)/\w|/opt/(?:pypi|wheels)|\bpypi\.(?:org|python)|files\.pythonhosted|index-url"
    )
    for path in tracked():
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if path != Path(__file__) and forbidden.search(line):
                yield f"{path.relative_to(ROOT)}:{number}: names a machine or a registry: {line.strip()[:80]}"


def tracked() -> list[Path]:
    """Give the files of the project; none outside a clone."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name]


CLAIMS: tuple[Claim, ...] = (
    make_targets_exist,
    every_setting_is_in_the_shipped_file,
    every_verb_has_help,
    every_command_that_is_named_exists,
    the_version_is_the_newest_heading,
    links_lead_somewhere,
    files_that_are_named_exist,
    tests_that_are_named_exist,
    settings_that_are_named_exist,
    every_error_has_its_remedy,
    every_verb_is_in_the_handbook,
    every_log_line_is_in_the_handbook,
    every_metric_is_in_the_handbook,
    every_alert_is_in_the_handbook,
    nothing_names_a_machine,
)


def main() -> int:
    """Print every complaint; 1 when there is one."""
    complaints = [complaint for claim in CLAIMS for complaint in claim()]
    for complaint in complaints:
        print(complaint)
    print(f"docs: {len(CLAIMS)} claims compared, {len(complaints)} complaints")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
