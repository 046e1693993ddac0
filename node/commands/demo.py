"""`osteon demo`: the whole way on one machine, in some minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave PACS and node running at the end, until Ctrl-C.")] = False,
    folder: Annotated[Path, typer.Option(help="Where everything is put; emptied first when it is an earlier demo.")] = Path(
        "build/demo"
    ),
) -> None:
    """Show the whole way: a PACS, a node, invented patients, a scheduled training cycle, a real radiograph and its report.

    Ends with 0 only when all that it shows is true.
    """
    import logging
    import sys

    from node import logs
    from node.commands.init import init_site
    from node.demo import guided

    logs.configure(stream=sys.stderr, level=logging.WARNING)
    try:
        true = guided.run(folder.resolve(), make_site=init_site, keep=keep)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(0 if true else 1)
