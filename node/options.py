"""What verbs share, those of the node and those of the trainer: where the settings are, and who acts."""

from __future__ import annotations

import getpass
import os
from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Option("--config", help="The site's settings.", envvar="OSTEON_CONFIG", show_default=True)]
DEFAULT_CONFIG = Path("ae_config.toml")


def login() -> str:
    """Name who acts, for the history; a container's user may have a number alone."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
