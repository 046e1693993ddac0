"""`osteon init`: a new site in a directory: settings, fresh keys, empty folders.

In: a directory. Out: files that only their owner can read. Nothing here may overwrite a file, least of all a key.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from models import durable
from node.errors import BadSettings
from node.settings import KEY_BYTES, Settings, parse

SETTINGS = "ae_config.toml"
FOLDERS = ("archive", "quarantine", "models", "runs", "cache")

Value = str | int | float | bool | Sequence[str] | Mapping[str, "Value"] | Sequence[Mapping[str, "Value"]]


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the site is to be; made when it is not there.")],
    ae_title: Annotated[str, typer.Option(help="AE title by which peers call this node.")] = "OSTEON",
    port: Annotated[int, typer.Option(help="TCP port to listen on.")] = 11112,
    default_issuer: Annotated[str, typer.Option(help="Who issues your PatientIDs, where an image does not say so.")] = "HOSPITAL",
) -> None:
    """Write the settings, fresh keys and empty folders of a new site into DIR."""
    config = init_site(
        folder,
        node={
            "ae_title": ae_title,
            "learn_ae_title": f"{ae_title.strip()[:10]}_LEARN",
            "port": port,
            "default_issuer": default_issuer,
        },
    )
    typer.echo(f"""\
A new site is in {folder}:
  {SETTINGS}  the settings, with a comment for each
  keys/           the site's key and the vault's key, readable by you alone
  data/           archive, catalogue, vault, quarantine, models, runs, cache
Next:
  1. Back up keys/, apart from data/. Without them no result finds its patient any more. Then say where the copies lie:
     osteon backup keys-kept --config {config}
  2. In {config} name who may call ([[node.callers]]) and where results go ([[pacs]]).
  3. osteon check --config {config}
  4. osteon serve --config {config}
Research use only.""")


def init_site(folder: Path, **sections: Mapping[str, Value] | Sequence[Mapping[str, Value]]) -> Path:
    """Make a new site in `folder` and give the path of its settings.

    Parameters
    ----------
    sections
        What differs from the shipped settings, by section: `node={"port": 0, "callers": [{…}]}, pacs=[{…}], completion={…}`.

    Raises
    ------
    BadSettings
        A value is not valid, or a file that would be written is there already; nothing was written.
    """
    file = folder / SETTINGS
    text = render(template(), sections)
    settings = parse(text, file)
    places = (settings.storage.site_key, settings.storage.vault_key)
    keys = [Path(place) for place in places if not place.startswith("env:")]
    if file.exists():
        raise BadSettings(f"{file} is there already, and init overwrites nothing: choose another directory, or remove it")
    for key in keys:
        if key.exists():
            raise BadSettings(
                f"{key} is there already, and nothing opens what it sealed but this key: keep it, and put the settings back that "
                "name it; for a new site choose another directory"
            )
    if keys and (there := _occupied(settings)):
        raise BadSettings(
            f"{there} of {folder} is not empty, and new keys would open nothing in it: put the site's own keys back, or choose "
            "another directory"
        )
    for made in (*(key.parent for key in keys), *_folders(settings)):
        durable.make_folder(made, mode=0o700)
    for key in keys:
        durable.write(key, base64.b64encode(secrets.token_bytes(KEY_BYTES)) + b"\n", mode=0o600)
    durable.write(file, text.encode(), mode=0o600)
    return file


def _occupied(settings: Settings) -> str:
    """Name a store that is not empty, "" when there is none."""
    from node.keep.custody import occupied

    return occupied(settings.storage)


def template() -> str:
    """Give the shipped settings; a test holds them equal to the file at the top level of the project."""
    return resources.files("node.commands").joinpath(SETTINGS).read_text("utf-8")


def render(text: str, sections: Mapping[str, Mapping[str, Value] | Sequence[Mapping[str, Value]]]) -> str:
    """Put other values into settings; comments and order stay. Tables of an array come after their commented example."""
    for section, values in sections.items():
        if not isinstance(values, Mapping):
            text = _with_tables(text, section, values)
            continue
        for key, value in values.items():
            name = f"{section}.{key}"
            text = _with_tables(text, name, value) if f"# [[{name}]]" in text else _with_value(text, section, key, value)
    return text


def _with_value(text: str, section: str, key: str, value: object) -> str:
    before, header, rest = text.partition(f"\n[{section}]\n")
    rest, changes = re.subn(
        rf"(?m)\A((?:(?!\[).*\n)*?){re.escape(key)} = .*$", lambda found: f"{found[1]}{key} = {_toml(value)}", rest
    )
    if changes != 1:
        raise BadSettings(f"the shipped settings have no {section}.{key}")
    return before + header + rest


def _with_tables(text: str, name: str, tables: Any) -> str:
    lines = [
        line for table in tables for line in ("", f"[[{name}]]", *(f"{key} = {_toml(value)}" for key, value in table.items()))
    ]
    blocks = "".join(f"{line}\n" for line in lines)
    text, changes = re.subn(rf"(?m)^# \[\[{re.escape(name)}\]\]\n(?:#.*\n)*", lambda found: found[0] + blocks, text)
    if changes != 1:
        raise BadSettings(f"the shipped settings have no [[{name}]]")
    return text


def _toml(value: object) -> str:
    """Spell a value in TOML: JSON's spelling of text, numbers, truth and lists is TOML's too."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)


def _folders(settings: Settings) -> list[Path]:
    storage = settings.storage
    databases = [url.removeprefix("sqlite:///") for url in (storage.catalogue, storage.vault) if url.startswith("sqlite:///")]
    return [storage.root / name for name in FOLDERS] + [Path(database).parent for database in databases]
