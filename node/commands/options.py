"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Option("--config", help="The site's settings.", envvar="OSTEON_CONFIG", show_default=True)]
DEFAULT_CONFIG = Path("ae_config.toml")
