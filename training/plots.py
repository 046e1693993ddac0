"""Charts of a run, drawn as SVG by hand.

In: lines of metrics.jsonl, figures with intervals, counts. Out: SVG bytes of some kilobytes that stand alone as a file and, set
into a page, follow its light and dark. Each function is pure. Text is escaped on its way in; two lines are never told apart by
their colour alone; what was not measured is left out, never drawn as 0; a figure is never shown without its number of cases.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.card import Metric

Line = Mapping[str, Any]
Point = tuple[float, float]

WIDTH = 460.0
"""Narrow enough that the words are readable on a phone, where the chart is scaled to the screen."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 14.0, 34.0, 42.0
_LETTER = 6.7
"""About the width of a letter, to break legends into rows."""
_SMALL = 5.8
"""That of a small one."""
_FEW = 25
"""Up to so many points each is marked, so that a line of one is seen."""

_LIGHT = (
    "--ink:#17202b;--soft:#55616f;--grid:#e2e7ed;--paper:#fff;--c1:#0065a3;--c2:#b84a00;--c3:#00735a;--c4:#8d3f86;--c5:#6b7683"
)
_DARK = (
    "--ink:#e8edf3;--soft:#a3afbd;--grid:#2b343f;--paper:#161c23;--c1:#62b6f2;--c2:#ff9c5b;--c3:#4dd0a8;--c4:#e09adb;--c5:#8b97a5"
)
_STYLE = (
    f".plot{{{_LIGHT};font:12px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-variant-numeric:tabular-nums}}"
    f"@media (prefers-color-scheme:dark){{.plot{{{_DARK}}}}}@media print{{.plot{{{_LIGHT}}}}}"
    ".plot text{fill:var(--soft)}.plot .ink{fill:var(--ink)}.plot .title{fill:var(--ink);font-weight:600;font-size:13.5px}"
    ".plot .small{font-size:10.5px}.plot .count{fill:var(--ink);font-size:20px;font-weight:600}"
    ".plot .grid{stroke:var(--grid)}.plot .axis{stroke:var(--soft)}"
    + "".join(f".plot .c{one}{{color:var(--c{one})}}" for one in range(1, 6))
    + ".plot .line{fill:none;stroke:currentColor;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}"
    ".plot .thin{stroke-width:1;opacity:.4}.plot .dash{stroke-dasharray:6 4}.plot .dots{stroke-dasharray:1 5}"
    ".plot .fill{fill:currentColor}.plot .ring{fill:var(--paper);stroke:currentColor;stroke-width:2}"
    ".plot .band{fill:currentColor;opacity:.14}.plot .deep{opacity:.34}"
)


@dataclass(frozen=True, slots=True)
class Curve:
    """An ROC curve with the band of its resampled patients."""

    name: str
    """With its number of cases."""
    false: NDArray[np.float64]
    true: NDArray[np.float64]
    grid: NDArray[np.float64]
    """False positive rates of the band."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where values lie on the paper."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Give the place of a value; what lies outside stands at the edge."""
        bounded = min(max(value, self.low), self.high)
        low, high, at = (math.log10(one) if self.log else one for one in (self.low, self.high, bounded))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, *, whole: bool = False) -> list[float]:
        """Give some four to six round values within the scale."""
        if self.log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if math.log10(self.high / self.low) < 2.5 else (1,)
            values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
            return [value for value in values if self.low <= value <= self.high]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
        step = max(1.0, round(step)) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


class _Chart:
    """One chart that is being drawn: axes first, then marks in the order they lie on each other, then the legend."""

    def __init__(
        self,
        title: str,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        labels: tuple[str, str],
        log: str = "",
        whole: bool = True,
        counts: bool = False,
        height: float = 200.0,
        at: Sequence[float] = (),
    ) -> None:
        self._title, self._labels = title, labels
        self._foot = _TOP + height
        self.x = _Scale(*x, _LEFT, WIDTH - _RIGHT, log="x" in log)
        self.y = _Scale(*y, self._foot, _TOP, log="y" in log)
        self._marks: list[str] = []
        self._legend: list[tuple[str, str]] = []
        self._axes(at or self.x.ticks(whole=whole), counts)

    def _axes(self, across_at: Sequence[float], counts: bool) -> None:
        for value in self.y.ticks(whole=counts):
            at = self.y(value)
            self._marks.append(f'<path class="grid" d="M{_LEFT:g} {at:.1f}H{WIDTH - _RIGHT:g}"/>')
            self.text((_LEFT - 7, at + 4), _number(value), anchor="end")
        for value in across_at:
            inside = self.x(value) + len(_number(value)) * _LETTER / 2 < WIDTH
            self.text((self.x(value) if inside else WIDTH, self._foot + 16), _number(value), anchor="middle" if inside else "end")
            self._marks.append(f'<path class="axis" d="M{self.x(value):.1f} {self._foot:g}v4"/>')
        self._marks.append(f'<path class="axis" d="M{_LEFT:g} {self._foot:g}H{WIDTH - _RIGHT:g}"/>')
        across, up = self._labels
        self.text(((_LEFT + WIDTH - _RIGHT) / 2, self._foot + 34), across, anchor="middle")
        middle = (_TOP + self._foot) / 2
        self._marks.append(f'<text transform="translate(13 {middle:g}) rotate(-90)" text-anchor="middle">{_text(up)}</text>')

    def at(self, point: Point) -> Point:
        """Give the place of a point of the data on the paper."""
        return self.x(point[0]), self.y(point[1])

    def text(self, place: Point, words: str, *, look: str = "", anchor: str = "start") -> None:
        """Write at a place of the paper."""
        self._marks.append(_words(*place, words, look, anchor))

    def note(self, point: Point, words: str, *, below: bool = False, lift: float = 6.0) -> None:
        """Write beside a point of the data, on the side where there is room; `lift` is how far above it."""
        x, y = self.at(point)
        right = x < WIDTH - _RIGHT - 9 - len(words) * _LETTER
        y = y + 15 if below and y + 15 < self._foot else max(y - lift, _TOP + 9)
        self.text((x + 9 if right else x - 9, y), words, look="ink small", anchor="start" if right else "end")

    def line(self, points: Sequence[Point], look: str, name: str = "", *, tip: str = "", mark: str = "") -> None:
        """Join points; `look` is a colour and perhaps a dash; `mark` is a circle or a square on each of few points."""
        path = _path([self.at(point) for point in points])
        self._marks.append(f'<path class="line {look}" d="{path}">' + (f"<title>{_text(tip)}</title>" if tip else "") + "</path>")
        marked = points if len(points) <= _FEW else points[-1:]
        self._marks.extend(_mark(mark, *self.at(point), look.split()[0]) for point in marked if mark)
        if name:
            sample = f'<path class="line {look.replace("thin", "")}" d="M0 0h24"/>' + _mark(mark, 12, 0, look.split()[0]) * bool(
                mark
            )
            self._legend.append((name, sample))

    def level(self, value: float, look: str, name: str) -> None:
        """Draw a level that holds everywhere."""
        self.line([(self.x.low, value), (self.x.high, value)], look, name)

    def band(self, xs: Iterable[float], low: Iterable[float], high: Iterable[float], look: str, name: str = "") -> None:
        """Shade what lies between two lines."""
        across = list(xs)
        outline = [*zip(across, high, strict=True), *reversed(list(zip(across, low, strict=True)))]
        self._marks.append(f'<path class="band {look}" d="{_path([self.at(point) for point in outline])}Z"/>')
        if name:
            self._legend.append((name, f'<rect class="band {look}" y="-6" width="24" height="12"/>'))

    def bar(self, edges: tuple[float, float], value: float, look: str, tip: str) -> None:
        """Draw a column from the foot."""
        left, right, top = self.x(edges[0]), self.x(edges[1]), self.y(value)
        size = f'width="{max(right - left - 1, 0.5):.1f}" height="{self._foot - top:.1f}"'
        self._marks.append(
            f'<rect class="fill {look}" x="{left:.1f}" y="{top:.1f}" {size} opacity=".75"><title>{_text(tip)}</title></rect>'
        )

    def dot(self, point: Point, look: str, *, mark: str = "circle", size: float = 4.0) -> None:
        """Mark a point."""
        self._marks.append(_mark(mark, *self.at(point), look, size))

    def svg(self) -> bytes:
        """Give the chart."""
        x, y = _LEFT, self._foot + _BOTTOM + 12
        entries = []
        for name, sample in self._legend:
            wide = 32 + len(name) * _LETTER
            if x + wide > WIDTH and x > _LEFT:
                x, y = _LEFT, y + 18
            entries.append(
                f'<g transform="translate({x:.0f} {y:.0f})">{sample}<text class="ink" x="30" y="4">{_text(name)}</text></g>'
            )
            x += wide + 14
        return _svg(self._title, "".join([*self._marks, *entries]), y + 10 if entries else self._foot + _BOTTOM)


# --- loss, and what an epoch tells -------------------------------------------------------------------------------------------


def loss_plot(lines: Sequence[Line]) -> bytes:
    """Draw the loss of each fit of the folds and of the final fits by epoch, from their lines of metrics.jsonl.

    A thin line is a fit, a thick one the median of the folds' fits for as long as none has stopped; a dot is the epoch a fit was
    kept at.
    """
    fits = {name: [line for line in lines if line["fit"] == name] for name in dict.fromkeys(str(line["fit"]) for line in lines)}
    final = {name: fits.pop(name) for name in list(fits) if name.startswith("refit")}
    folds = len({name.partition(" repeat ")[0] for name in fits})
    values = [line[key] for line in lines for key in ("train_loss", "validation_loss")]
    count = f"{len(fits)} fits of " * (folds != len(fits)) + f"{folds} fold" + "s" * (folds != 1)
    count += " and the final fit" * (len(final) == 1) + f" and {len(final)} final fits" * (len(final) > 1)
    chart = _by_epoch(f"Loss of fine-tuning, {count}", lines, _span(values), "cross-entropy")
    for key, words, look in (("train_loss", "training", "c1"), ("validation_loss", "validation", "c2 dash")):
        series = {name: _series(mine, key) for name, mine in fits.items()}
        for name, points in series.items():
            if points:
                chart.line(points, f"{look} thin", tip=f"{name}, {words}")
        together = min((len(points) for points in series.values() if points), default=0)
        if len(fits) > 1 and together:
            stacked = np.median([[value for _, value in points[:together]] for points in series.values() if points], axis=0)
            first = next(points for points in series.values() if points)
            chart.line([(x, float(y)) for (x, _), y in zip(first, stacked, strict=False)], look, f"{words}, median of the folds")
        elif together:
            chart.line(next(points for points in series.values() if points), look, words)
        if key == "validation_loss":
            for points in filter(None, series.values()):
                chart.dot(min(points, key=lambda point: point[1]), "c2", size=2.6)
    told = "training, final fit" + "s" * (len(final) > 1)
    for name, mine in final.items():
        if points := _series(mine, "train_loss"):
            chart.line(points, "c3 dots", told, tip=f"{name}, on everybody")
            told = ""
    return chart.svg()


def pretraining_loss_plot(lines: Sequence[Line]) -> bytes:
    """Draw the loss of pretraining by epoch: cross-entropy of the cluster numbers."""
    chart = _by_epoch("Loss of pretraining", lines, _span(line.get("loss") for line in lines), "loss")
    _draw(chart, lines, "loss", "c1", "")
    return chart.svg()


def nmi_plot(lines: Sequence[Line]) -> bytes:
    """Draw the normalised mutual information of each assignment with the one before it."""
    chart = _by_epoch("Agreement of consecutive assignments", lines, (0, 1), "NMI")
    _draw(chart, lines, "nmi", "c1", "")
    return chart.svg()


def empties_plot(lines: Sequence[Line]) -> bytes:
    """Draw how many clusters were empty, and how many were moved to another place, by epoch."""
    top = max((line[key] for line in lines for key in ("empty", "relocated")), default=0)
    chart = _by_epoch("Empty and relocated clusters", lines, (0, max(4, top * 1.08)), "clusters")
    _draw(chart, lines, "relocated", "c1", "relocated", mark="circle")
    _draw(chart, lines, "empty", "c2 dash", "empty", mark="square")
    return chart.svg()


def sizes_plot(lines: Sequence[Line]) -> bytes:
    """Draw how large the clusters were by epoch: smallest, quartiles, largest. An empty one stands at the lower edge."""
    told = [line for line in lines if line.get("sizes")]
    top = max((line["sizes"][4] for line in told), default=10)
    chart = _by_epoch("Sizes of the clusters by epoch", lines, (0.8, max(10, top * 1.2)), "images in a cluster", log="y")
    if told:
        epochs = [line["epoch"] for line in told]
        low, first, median, third, high = ([line["sizes"][which] for line in told] for which in range(5))
        chart.band(epochs, low, high, "c1", "smallest to largest")
        chart.band(epochs, first, third, "c1 deep", "middle half")
        chart.line(list(zip(epochs, median, strict=True)), "c1", "median")
    return chart.svg()


def probe_plot(lines: Sequence[Line], start: Mapping[str, float], cases: int) -> bytes:
    """Draw the AUC of a k-NN and of a linear probe on the features by epoch, measured on `cases` labelled patients.

    `start` holds what `knn` and `linear` reach on the weights the run began with: the dashed lines to end above.
    """
    known = [*start.values(), *(value for key in ("knn", "linear") for _, value in _series(lines, key))]
    chart = _by_epoch(f"Probes of the features, {cases:,} patients", lines, _of_auc(known), "AUC")
    for key, words, look, mark in (("knn", "k-NN", "c1", "circle"), ("linear", "linear", "c2", "square")):
        _draw(chart, lines, key, look, words, mark=mark)
        if key in start:
            chart.level(start[key], f"{look} dash", f"{words}, at the start")
    return chart.svg()


def classifier_loss_plot(lines: Sequence[Line]) -> bytes:
    """Draw training and validation loss of the classifier of the cluster numbers by epoch."""
    values = [line.get(key) for line in lines for key in ("loss", "validation_loss")]
    chart = _by_epoch("Loss of step two", lines, _span(values), "cross-entropy")
    _draw(chart, lines, "loss", "c1", "training")
    _draw(chart, lines, "validation_loss", "c2 dash", "validation")
    return chart.svg()


def classifier_accuracy_plot(lines: Sequence[Line], clusters: int, chance: float) -> bytes:
    """Draw how often step two names the cluster of a validation image; `chance` is what always naming the largest reaches."""
    chart = _by_epoch(f"Accuracy of step two, {clusters:,} clusters", lines, (0, 1), "validation accuracy")
    _draw(chart, lines, "validation_accuracy", "c1", "classifier")
    chart.level(chance, "c5 dash", f"always the largest cluster: {chance:.2g}")
    return chart.svg()


# --- clusters ----------------------------------------------------------------------------------------------------------------


def size_curve_plot(counts: NDArray[np.integer]) -> bytes:
    """Draw the images of each cluster (k,), largest first, and name smallest, quartiles and largest."""
    falling = np.sort(np.asarray(counts))[::-1]
    k = len(falling)
    title = f"Sizes of {k:,} clusters of {int(falling.sum()):,} images"
    top = max(10.0, float(falling[0]) * 1.5)
    chart = _Chart(title, (1, max(k, 2)), (0.8, top), labels=("clusters, largest first", "images in a cluster"), log="y")
    drawn = np.unique(np.linspace(0, k - 1, min(k, 300)).astype(int))
    ranks = [int(rank) + 1 for rank in drawn]
    sizes = [float(size) for size in falling[drawn]]
    chart.band(ranks, [0.8] * len(ranks), sizes, "c1")
    chart.line(list(zip(ranks, sizes, strict=True)), "c1")
    quartiles = np.quantile(falling, [1, 0.75, 0.5, 0.25, 0])
    names = ("largest", "upper quartile", "median", "lower quartile", "smallest")
    for name, share, size in zip(names, (0, 0.25, 0.5, 0.75, 1), quartiles, strict=True):
        point = (1 + share * (k - 1), float(size))
        chart.dot(point, "c1", mark="ring")
        chart.note(
            point, f"{name} {size:,.{0 if size == int(size) else 1}f}", below=share >= 0.75, lift=18 if share == 0.25 else 6
        )
    return chart.svg()


def size_histogram_plot(counts: NDArray[np.integer]) -> bytes:
    """Draw how many clusters (k,) have how many images, with the median."""
    sizes = np.asarray(counts)
    top = int(sizes.max())
    step = max(1, math.ceil((top + 1) / 28))
    edges = np.arange(0, top + step + 1, step)
    found, _ = np.histogram(sizes, edges)
    title = f"How many clusters have how many images, k = {len(sizes):,}"
    chart = _Chart(
        title, (0, float(edges[-1])), (0, float(found.max()) * 1.12), labels=("images in a cluster", "clusters"), counts=True
    )
    for left, right, clusters in zip(edges[:-1], edges[1:], found, strict=True):
        span = f"{left}" if step == 1 else f"{left} to {right - 1}"
        chart.bar((float(left), float(right)), float(clusters), "c1", f"{span} images: {clusters} clusters")
    middle = float(np.median(sizes)) + step / 2 * (step == 1)
    chart.line([(middle, 0), (middle, float(found.max()) * 1.12)], "c2 dash", f"median {np.median(sizes):g}")
    return chart.svg()


def sweep_accuracy_plot(points: Sequence[Line], cases: int, ringed: int) -> bytes:
    """Draw for each k how often step two names the right cluster, with chance; the shaded height is the accuracy over chance.

    Measured on `cases` images of patients it never saw. A point is `{"k": 100, "accuracy": 0.71, "chance": 0.03}`, where
    chance is what always naming the largest cluster reaches; the k that was chosen is `ringed`.
    """
    ordered = sorted(points, key=lambda point: point["k"])
    chart = _by_k(f"Step two over k, {cases:,} test images", ordered, (0, 1), "accuracy")
    known = [point for point in ordered if _is_number(point.get("accuracy"))]
    if known:
        chance = [(point["k"], point["chance"]) for point in known]
        chart.band(
            [k for k, _ in chance], [share for _, share in chance], [one["accuracy"] for one in known], "c1", "over chance"
        )
        chart.line([(point["k"], point["accuracy"]) for point in known], "c1", "accuracy", mark="circle")
        chart.line(chance, "c5 dash", "always the largest cluster", mark="circle")
    for point in known:
        if point["k"] == ringed:
            over = f"k = {ringed:,}: {point['accuracy'] - point['chance']:.2f} over chance".replace("-", "−")
            chart.dot((ringed, point["accuracy"]), "c1", mark="ring", size=6)
            chart.note((ringed, point["accuracy"] + 0.03), over)
    return chart.svg()


def sweep_probe_plot(points: Sequence[Line], cases: int) -> bytes:
    """Draw for each k the AUC of the probes, and what they reached at its start, dashed.

    Measured on `cases` labelled patients. A point is `{"k": 100, "knn": 0.71, "knn_start": 0.7, "linear": 0.8, …}`.
    """
    ordered = sorted(points, key=lambda point: point["k"])
    keys = [f"{key}{end}" for key in ("knn", "linear") for end in ("", "_start")]
    known = [point[key] for point in ordered for key in keys if _is_number(point.get(key))]
    chart = _by_k(f"Probes over k, {cases:,} patients", ordered, _of_auc(known), "AUC")
    for key, words, look, mark in (("knn", "k-NN", "c1", "circle"), ("linear", "linear", "c2", "square")):
        for end, told, line in (("", words, look), ("_start", f"{words}, at the start", f"{look} dash")):
            if measured := [(point["k"], point[key + end]) for point in ordered if _is_number(point.get(key + end))]:
                chart.line(measured, line, told, mark=mark if not end or len(measured) == 1 else "")
    return chart.svg()


# --- how good predictions are ------------------------------------------------------------------------------------------------


def roc_plot(curves: Sequence[Curve]) -> bytes:
    """Draw ROC curves with their bands."""
    labels = ("false positive rate", "recall of the urgent class")
    chart = _Chart("ROC with 95 % band", (0, 1), (0, 1), labels=labels, whole=False, height=340)
    chart.line([(0, 0), (1, 1)], "c5 dots", "chance")
    for curve, look in zip(curves, _looks(len(curves)), strict=True):
        chart.band(curve.grid.tolist(), curve.low.tolist(), curve.high.tolist(), look.split()[0])
        chart.line(list(zip(curve.false.tolist(), curve.true.tolist(), strict=True)), look, curve.name)
    return chart.svg()


def confusion_plot(table: NDArray[np.int64], names: Sequence[str], title: str) -> bytes:
    """Draw a confusion table (truth, said) with its counts and their shares of the truth's row."""
    left, top, size = 122.0, 62.0, (WIDTH - 122.0 - _RIGHT) / len(names)
    high = min(size, 92.0)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    parts = [_words(left + size * len(names) / 2, 38, "said", "", "middle")]
    for index, name in enumerate(names):
        rows = _broken(name.replace("_", " "), left - 28)
        parts.append(_words(left + size * (index + 0.5), 54, _short(name.replace("_", " "), size), "ink", "middle"))
        middle = top + high * (index + 0.5) + 4 - 7.5 * (len(rows) - 1)
        parts.extend(_words(left - 8, middle + 15 * row, one, "ink", "end") for row, one in enumerate(rows))
    for row, column in np.ndindex(*table.shape):
        x, y, share = left + size * column, top + high * row, float(shares[row, column])
        tip = f"{names[row]}, said to be {names[column]}: {table[row, column]} of {table[row].sum()}"
        parts.append(
            f'<rect class="fill {"c1" if row == column else "c2"}" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{size - 2:.1f}" '
            f'height="{high - 2:.1f}" rx="5" opacity="{0.06 + 0.4 * share:.2f}"><title>{_text(tip)}</title></rect>'
        )
        parts.append(_words(x + size / 2, y + high / 2 + 3, str(table[row, column]), "count", "middle"))
        parts.append(_words(x + size / 2, y + high / 2 + 21, f"{share:.0%}", "", "middle"))
    middle = top + high * len(names) / 2
    parts.append(f'<text transform="translate(13 {middle:.1f}) rotate(-90)" text-anchor="middle">truth</text>')
    return _svg(title, "".join(parts), top + high * len(names) + 8)


def calibration_plot(points: Sequence[tuple[float, float, int]], title: str) -> bytes:
    """Draw the share of urgent cases against the mean score of each tenth; the area of a dot is its number of cases."""
    labels = ("mean score", "share that is urgent")
    chart = _Chart(title, (-0.03, 1.03), (-0.05, 1.1), labels=labels, whole=False, height=340)
    chart.line([(0, 0), (1, 1)], "c5 dots", "as sure as right")
    chart.line([(score, share) for score, share, _ in points], "c1 thin")
    most = max((cases for *_, cases in points), default=1)
    for score, share, cases in points:
        radius = 3 + 8 * math.sqrt(cases / most)
        chart.dot((score, share), "c1", size=radius)
        x, y = chart.at((score, share))
        chart.text((x, y - radius - 4), str(cases), look="ink small", anchor="middle")
    return chart.svg()


def comparison_plot(candidate: Metric, others: Sequence[Metric], title: str, *, chance: float = 0.5) -> bytes:
    """Draw a figure of the candidate with its interval (dot and whisker) above those of what it has to beat.

    The candidate's interval is shaded all the way down; `chance` is the dotted line.
    """
    rows = (candidate, *others)
    ends = [chance, *(end for one in rows for end in (one.low, one.high))]
    low, high = (0.0, 1.0) if min(ends) >= 0 and max(ends) <= 1 else (min(ends), max(ends))
    scale = _Scale(low, high if high > low else low + 1, 14, WIDTH - 14)
    head, foot = _TOP + 4, _TOP + 8 + 46 * len(rows)
    left, right = scale(candidate.low), scale(candidate.high)
    parts = [
        f'<path class="line c5 dots" d="M{scale(chance):.1f} {head:g}V{foot:g}"/>'
        f'<path class="axis" d="M14 {foot:g}H{WIDTH - 14:g}"/>'
        f'<rect class="band c1" x="{left:.1f}" y="{head:g}" width="{right - left:.1f}" height="{foot - head:g}"/>'
    ]
    parts += [f'<path class="axis" d="M{scale(value):.1f} {foot:g}v4"/>' for value in scale.ticks()]
    parts += [_words(scale(value), foot + 17, _number(value), "", "middle") for value in scale.ticks()]
    for index, one in enumerate(rows):
        y, left, right = _TOP + 22 + 46 * index, scale(one.low), scale(one.high)
        look, mark = ("c1", "circle") if index == 0 else ("c2", "ring")
        told = f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f}), n {one.n}"
        parts.append(_words(14, y, _short(one.name, WIDTH - 36 - len(told) * _SMALL), "ink"))
        parts.append(_words(WIDTH - 14, y, told, "small", "end"))
        whisker = f"M{left:.1f} {y + 9:g}v8M{left:.1f} {y + 13:g}H{right:.1f}M{right:.1f} {y + 9:g}v8"
        parts.append(f'<path class="line {look}" d="{whisker}"/>' + _mark(mark, scale(one.value), y + 13, look, 5))
    parts.append(
        f'<g transform="translate(14 {foot + 34:g})"><path class="line c5 dots" d="M0 0h24"/>{_words(30, 4, "chance", "ink")}'
        f'<rect class="band c1" x="96" y="-6" width="24" height="12"/>{_words(126, 4, "interval of the candidate", "ink")}</g>'
    )
    return _svg(title, "".join(parts), foot + 46)


# --- the pen -----------------------------------------------------------------------------------------------------------------


def _by_epoch(title: str, lines: Sequence[Line], y: tuple[float, float], label: str, *, log: str = "") -> _Chart:
    """Begin a chart over the epochs of these lines."""
    epochs = [line["epoch"] for line in lines] or [0]
    first, last = min(epochs), max(epochs)
    return _Chart(title, (first, last if last > first else first + 1), y, labels=("epoch", label), log=log)


def _by_k(title: str, ordered: Sequence[Line], y: tuple[float, float], label: str) -> _Chart:
    """Begin a chart over the numbers of clusters, which are its ticks."""
    ks = [point["k"] for point in ordered] or [10, 100]
    return _Chart(title, (ks[0] / 1.25, ks[-1] * 1.25), y, labels=("k (clusters)", label), log="x", at=ks)


def _of_auc(known: Iterable[float]) -> tuple[float, float]:
    """Give the range of an axis for these AUCs: from chance on, or from the lowest tenth below it."""
    return min(0.5, math.floor(10 * min(known, default=0.5)) / 10), 1.0


def _draw(chart: _Chart, lines: Sequence[Line], key: str, look: str, name: str, *, mark: str = "circle") -> None:
    """Draw what the lines say under a key, where they say it."""
    if points := _series(lines, key):
        chart.line(points, look, name, mark=mark)
    elif not name:
        chart.text((WIDTH / 2, 120), "not measured", anchor="middle")


def _series(lines: Sequence[Line], key: str) -> list[Point]:
    return [(float(line["epoch"]), float(line[key])) for line in lines if _is_number(line.get(key))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _span(values: Iterable[object]) -> tuple[float, float]:
    """Give the range of an axis for these values: from 0 where they come near it, and wide enough not to blow up a trifle."""
    known = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    room = max(0.06 * (high - low), 0.05 * abs(high)) or 0.1
    return (0.0 if 0 <= low < 0.6 * high else low - room), high + room


def _looks(count: int) -> list[str]:
    """Give a colour and a dash for each of several lines."""
    return [f"c{1 + index % 4}{('', ' dash', ' dots', '')[index % 4]}" for index in range(count)]


def _path(places: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


_MARKS: Mapping[str, Callable[[float, float, float, str], str]] = {
    "circle": lambda x, y, size, look: f'<circle class="fill {look}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>',
    "ring": lambda x, y, size, look: f'<circle class="ring {look}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>',
    "square": lambda x, y, size, look: (
        f'<rect class="fill {look}" x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size:.1f}" height="{2 * size:.1f}"/>'
    ),
}


def _mark(mark: str, x: float, y: float, look: str, size: float = 3.0) -> str:
    return _MARKS[mark](x, y, size, look) if mark else ""


def _words(x: float, y: float, words: str, look: str = "", anchor: str = "start") -> str:
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(words)}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}".replace("-", "−")


def _short(words: str, room: float) -> str:
    """Cut words to the room there is."""
    letters = max(4, int(room / _LETTER))
    return words if len(words) <= letters else words[: letters - 1] + "…"


def _broken(words: str, room: float) -> list[str]:
    """Break words into rows of the room there is."""
    rows = [""]
    for word in words.split():
        if rows[-1] and len(f"{rows[-1]} {word}") * _LETTER > room:
            rows.append("")
        rows[-1] = f"{rows[-1]} {word}".strip()
    return [_short(row, room) for row in rows]


def _svg(title: str, body: str, height: float) -> bytes:
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {WIDTH:g} {height:.0f}" role="img" '
        f'aria-label="{_text(title)}"><style>{_STYLE}</style><text class="title" x="2" y="16">{_text(title)}</text>{body}</svg>\n'
    )
    return text.encode()


def _text(value: object) -> str:
    return html.escape(str(value))
