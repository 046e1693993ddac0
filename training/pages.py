"""What a run looks like: plots, and one page of HTML that needs nothing else.

In: figures, predictions and the journal of a finished run. Out: PNG bytes and HTML text. The page asks no server for anything;
files made of it are patient data and get mode 0600 (`cycle` writes them). Nothing here may be shown without its number of cases.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.card import Metric


@dataclass(frozen=True, slots=True)
class Curve:
    """An ROC curve with the band of its resampled patients."""

    name: str
    false: NDArray[np.float64]
    true: NDArray[np.float64]
    grid: NDArray[np.float64]
    """False positive rates of the band."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Page:
    """Everything the page of one run says."""

    title: str
    decision: str
    words: str
    facts: Mapping[str, str]
    """What the run was made of, in the order shown."""
    tables: Mapping[str, Sequence[Metric]]
    """Figures by heading."""
    left_out: Mapping[str, int]
    plots: Mapping[str, bytes]
    """PNG bytes by caption."""
    limits: Sequence[str]


def loss_plot(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw training and validation loss of each fit against the epoch, from the lines of metrics.jsonl."""
    figure, axes = _figure(7.0)
    for fit in dict.fromkeys(str(line["fit"]) for line in lines):
        mine = [line for line in lines if line["fit"] == fit]
        epochs = [line["epoch"] for line in mine]
        (drawn,) = axes.plot(epochs, [line["train_loss"] for line in mine], linewidth=1, label=fit)
        validated = [(line["epoch"], line["validation_loss"]) for line in mine if line["validation_loss"] is not None]
        if validated:
            axes.plot(*zip(*validated, strict=True), linestyle="--", linewidth=1, color=drawn.get_color())
    axes.set(xlabel="epoch", ylabel="cross-entropy", title="Loss (solid: training, dashed: validation)")
    axes.legend(fontsize=7, ncols=2)
    return _png(figure)


def roc_plot(curves: Sequence[Curve]) -> bytes:
    """Draw ROC curves with their bands."""
    figure, axes = _figure(5.0)
    for curve in curves:
        (drawn,) = axes.plot(curve.false, curve.true, linewidth=1.5, label=curve.name)
        axes.fill_between(curve.grid, curve.low, curve.high, alpha=0.15, color=drawn.get_color(), linewidth=0)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="false positive rate", ylabel="recall of the urgent class", title="ROC with 95 % band", xlim=(0, 1), ylim=(0, 1.01)
    )
    axes.set_aspect("equal")
    axes.legend(fontsize=7, loc="lower right")
    return _png(figure)


def confusion_plot(table: NDArray[np.int64], names: Sequence[str], title: str) -> bytes:
    """Draw a confusion table with its counts."""
    figure, axes = _figure(4.5)
    axes.imshow(table, cmap="Blues", vmin=0)
    for row, column in np.ndindex(*table.shape):
        shade = "white" if table[row, column] > table.max() / 2 else "black"
        axes.text(column, row, str(table[row, column]), ha="center", va="center", color=shade)
    axes.set(xlabel="said", ylabel="truth", title=title)
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7, rotation=90, va="center")
    return _png(figure)


def calibration_plot(points: Sequence[tuple[float, float, int]], title: str) -> bytes:
    """Draw the share of urgent cases against the mean score of each tenth, with the cases in it."""
    figure, axes = _figure(4.5)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axes.plot([point[0] for point in points], [point[1] for point in points], marker="o", linewidth=1)
    for score, share, cases in points:
        axes.annotate(str(cases), (score, share), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xlabel="mean score", ylabel="share that is urgent", title=title, xlim=(-0.02, 1.02), ylim=(-0.02, 1.05))
    return _png(figure)


def render(page: Page) -> str:
    """Write the page: one file, no script, no request."""
    body = [
        f"<h1>{_text(page.title)}</h1>",
        "<p class=notice>Research use only. This page shows results on patients: keep it as you keep patient data.</p>",
        f"<p class=decision>Gate: <b>{_text(page.decision)}</b>. {_text(page.words)}</p>",
        _table("Run", [("", "")], page.facts.items()),
    ]
    for heading, metrics in page.tables.items():
        rows = [(m.name, f"{m.value:.3f}", f"{m.low:.3f} to {m.high:.3f}", str(m.n), m.method) for m in metrics]
        body.append(_table(heading, [("figure", "value", "95 % interval", "patients", "interval by")], rows))
    left_out = [(reason, str(n)) for reason, n in page.left_out.items()] or [("none", "0")]
    body.append(_table("Images left out", [("reason", "images")], left_out))
    for caption, png in page.plots.items():
        picture = base64.b64encode(png).decode("ascii")
        body.append(f'<h2>{_text(caption)}</h2><img alt="{_text(caption)}" src="data:image/png;base64,{picture}">')
    body.append("<h2>Limits</h2><ul>" + "".join(f"<li>{_text(limit)}</li>" for limit in page.limits) + "</ul>")
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{_text(page.title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b}"
    "table{border-collapse:collapse;margin:.5rem 0}"
    "td,th{border-bottom:1px solid #ddd;padding:.2rem .8rem .2rem 0;text-align:left}"
    "img{max-width:100%}.notice{color:#8a4b00}.decision{background:#f2f5f9;padding:.8rem;border-left:4px solid #35618e}"
)


def _table(heading: str, header: Sequence[Sequence[str]], rows: Any) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row) + "</tr>"

    top = "".join(cells(row, "th") for row in header if any(row))
    return f"<h2>{_text(heading)}</h2><table>{top}{''.join(cells(row, 'td') for row in rows)}</table>"


def _text(value: object) -> str:
    return html.escape(str(value))


def _figure(width: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), layout="tight")
    FigureCanvasAgg(figure)  # no window, no global state
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    out = BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()
