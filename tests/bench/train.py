"""What the trainer promises of its speed, measured. Run by `make bench-train`; docs/performance.md says what each line means.

In: which parts, how thoroughly. Out: a table that can be pasted into the page, a JSON file with every sample, the machine. Each
figure is taken in one run beside what it is held against, or against a limit in seconds; rounds in which others used the machine
are dropped as long as another one is left, and the table says so. It never fails because of a figure: a miss is said in words.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING

from machine import machine

from training.__main__ import _prepare_process

if TYPE_CHECKING:
    from learning import Result

PARTS = ("epochs", "accuracy", "clusters", "pictures", "mapped", "finetuning")
PACKAGES = ("torch", "torchvision", "faiss-cpu", "scikit-learn", "numpy", "pillow")


def main() -> None:
    """Measure the parts that are asked for, a table at the end."""
    given = _arguments()
    _prepare_process()
    import learning

    about = machine(PACKAGES)
    print(f"{about}\n", flush=True)
    results: list[Result] = []
    try:
        with TemporaryDirectory(prefix="osteon-bench-") as folder:
            for part in given.only or PARTS:
                bench = learning.Bench(
                    Path(folder), given.quick, given.whole, given.data, lambda words, part=part: _progress(f"{part}: {words}")
                )
                results += getattr(learning, part)(bench)
    finally:  # what was measured before somebody lost patience is worth having
        _progress("")
        print("\n".join(rows(results, judged=not given.quick)))
        plain = [asdict(one) | {"met": None if given.quick else one.met, "disturbed": one.disturbed} for one in results]
        given.json.write_text(json.dumps({"machine": about, "quick": given.quick, "results": plain}, indent=1) + "\n", "utf-8")
        print(f"\nall samples: {given.json}")


def rows(results: Sequence[Result], *, judged: bool) -> list[str]:
    """Give the table as rows of Markdown, for the terminal and for docs/performance.md."""
    table = ["| what | Osteon | beside it | figure | target | verdict | used by others |", "|---|---|---|---|---|---|---|"]
    for one in results:
        verdict = (
            ("met" if one.met else "MISSED") + (", disturbed" if one.disturbed else "") if judged else "not judged (--quick)"
        )
        figure = f"{one.figure:.4g} {one.unit}" + (f" ({one.said})" if one.said else "")
        others = "" if one.foreign is None else f"{one.foreign:.0%}"
        target = f"{'at least' if one.at_least else 'at most'} {one.target:g} {one.unit}"
        table.append(f"| {one.what} | {one.ours} | {one.beside} | {figure} | {target} | {verdict} | {others} |")
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes, no verdict: shows that each part works")
    parser.add_argument("--whole", action="store_true", help="fine-tune all folds over all epochs, not a part of them")
    parser.add_argument("--data", type=Path, help="folder that holds the set knee_kl: probe real radiographs")
    default = Path(gettempdir()) / "osteon-bench-train.json"
    parser.add_argument("--json", type=Path, default=default, help="file for every sample (default: %(default)s)")
    given = parser.parse_args()
    if given.quick and given.whole:
        parser.error("--quick and --whole exclude each other")
    return given


def _progress(words: str) -> None:
    """Say on a terminal what is going on, in place of what was said before."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{words}")
        sys.stderr.flush()


if __name__ == "__main__":
    main()
