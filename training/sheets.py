"""Sheets of radiographs: strips of clusters, nearest neighbours, and a map of the features.

In: pictures (n, s, s) uint8, features (n, d), assignments. Out: PNG bytes, dark as a light box in a dark room. Each function is
pure, works without a display and keeps no global state. What comes out is images of patients: whoever writes it gives the file
mode 0600, and no identity may stand in a caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import ImageFont

TILE_PX = 104
PER_STRIP = 8
MOST_POINTS = 600
"""Of a map: t-SNE takes about two seconds for so many points."""
_GAP, _EDGE, _CAPTION_PX = 5, 12, 15
_GROUND, _SOFT, _BRIGHT = 15, 170, 235
"""Grey levels of the sheet, of its captions, and of the frame around a query."""
_FEW = 80
"""Up to so many labelled points are drawn large."""
_SIGNS = "os^Dv*PX"
"""A shape for each label, so that they are told apart without colours."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Pictures that belong together."""

    caption: str
    rows: NDArray[np.uint8]
    """(m, s, s); the first eight are shown."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """A picture and those whose features are nearest to its own."""

    caption: str
    rows: NDArray[np.uint8]
    """(1 + m, s, s), the query first; seven neighbours are shown."""
    similarity: NDArray[np.floating]
    """(m,) cosine of each neighbour with the query."""

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.similarity) + 1:
            raise ValueError("a query and as many neighbours as similarities")


# --- which ones are shown ----------------------------------------------------------------------------------------------------


def chosen_clusters(
    features: NDArray[np.floating], assignment: NDArray[np.integer], *, each: int = 3
) -> dict[str, tuple[int, ...]]:
    """Choose the clusters to look at: the largest, the smallest, and the oddest (farthest from their centroid in the mean).

    An empty cluster is never chosen, and none twice.
    """
    clusters, inverse, counts = np.unique(assignment, return_inverse=True, return_counts=True)
    centroids = np.zeros((len(clusters), features.shape[1]))
    np.add.at(centroids, inverse, features)
    centroids /= counts[:, None]
    apart = np.linalg.norm(features - centroids[inverse], axis=1)
    spread = np.bincount(inverse, weights=apart) / counts
    found: dict[str, tuple[int, ...]] = {}
    taken: set[int] = set()
    for words, order in (("largest", -counts), ("smallest", counts), ("oddest", -spread)):
        free = [int(clusters[one]) for one in np.argsort(order, kind="stable") if int(clusters[one]) not in taken]
        found[words] = tuple(free[:each])
        taken.update(free[:each])
    return found


def nearest(
    features: NDArray[np.floating], queries: Sequence[int], patients: Sequence[str], *, count: int = PER_STRIP - 1
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Give for each query the nearest rows of other patients by cosine, the nearest first: rows (q, count), cosines (q, count).

    There are fewer for all where one query has fewer of them.
    """
    unit = np.asarray(features, np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    cosine = unit[list(queries)] @ unit.T
    whose = np.asarray(list(patients))
    own = whose[list(queries)][:, None] == whose
    cosine[own] = -np.inf
    there = int((~own).sum(axis=1).min(initial=len(unit)))
    order = np.argsort(-cosine, axis=1, kind="stable")[:, : min(count, there)]
    return order, np.take_along_axis(cosine, order, axis=1)


def embedding(
    features: NDArray[np.floating], *, seed: int, keep: Sequence[int] = (), limit: int = MOST_POINTS
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Lay features (n, d) out in two dimensions: PCA to 50, then t-SNE (van der Maaten and Hinton, 2008).

    Returns
    -------
    rows, places
        (m,) the rows that are shown: `keep` and a seeded sample of the others, at most `limit`; (m, 2) where they lie.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    kept = np.unique(np.asarray(keep, np.int64))[:limit]
    others = np.setdiff1d(np.arange(len(features)), kept)
    drawn = np.random.default_rng(seed).permutation(others)[: limit - len(kept)]
    rows = np.sort(np.concatenate([kept, drawn]))
    if len(rows) < 5:
        raise ValueError("a map needs five images or more")
    shown = np.asarray(features[rows], np.float64)
    parts = min(50, *shown.shape)
    reduced = PCA(parts, svd_solver="full", random_state=seed).fit_transform(shown)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    with threadpool_limits(1):  # its threads wait for each other longer than so few points take, above all on a busy machine
        places = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed).fit_transform(reduced)
    return rows, np.asarray(places, np.float64)


# --- pictures ----------------------------------------------------------------------------------------------------------------


def contact_sheet(strips: Sequence[Strip]) -> bytes:
    """Draw strips of up to eight pictures, each below its caption."""
    return _sheet([(strip.caption, strip.rows, ()) for strip in strips])


def neighbours_sheet(queries: Sequence[Neighbours]) -> bytes:
    """Draw each query, framed, beside its seven nearest with the cosine similarity below each."""
    return _sheet([(one.caption, one.rows, ("query", *(f"{cosine:.3f}" for cosine in one.similarity))) for one in queries])


def embedding_map(
    places: NDArray[np.floating],
    clusters: NDArray[np.integer],
    *,
    labels: NDArray[np.integer] | None = None,
    names: Sequence[str] = (),
    thumbnails: NDArray[np.uint8] | None = None,
) -> bytes:
    """Draw a map of pictures: a point each, coloured by its cluster, labelled ones on top in the shape of their class.

    Parameters
    ----------
    places
        (n, 2), as `embedding` gives them.
    clusters
        (n,) cluster numbers. Colours repeat where there are many: neighbours of one colour are what there is to see.
    labels, names
        (n,) index into `names`, negative where unknown.
    thumbnails
        (n, s, s) the pictures themselves; some that lie well apart are shown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(9.6, 7.2), facecolor=f"#{_GROUND:02x}{_GROUND:02x}{_GROUND:02x}")
    FigureCanvasAgg(figure)  # no window, no global state
    axes = figure.add_axes((0.01, 0.06, 0.98, 0.93))
    axes.set_axis_off()
    low, high = places.min(axis=0), places.max(axis=0)
    room = 0.05 * np.maximum(high - low, 1e-9)
    axes.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))
    axes.scatter(places[:, 0], places[:, 1], s=13, c=_hues(clusters), alpha=0.75, linewidths=0)
    if thumbnails is not None:
        _pin(axes, places, clusters, thumbnails)
    told = f"{len(places):,} images, {len(np.unique(clusters)):,} clusters"
    if labels is not None:
        size = 62 if (np.asarray(labels) >= 0).sum() <= _FEW else 32
        for index, name in enumerate(names):
            mine = np.asarray(labels) == index
            sign, colour = _SIGNS[index % len(_SIGNS)], _LABELS[index % len(_LABELS)]
            words = f"{name.replace('_', ' ')} ({int(mine.sum())})"
            at = places[mine]
            look: dict[str, Any] = {"s": size, "marker": sign, "edgecolors": "white", "linewidths": 1}
            axes.scatter(at[:, 0], at[:, 1], c=colour, label=words, zorder=5, **look)
        where: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (0.99, 0.004), "ncols": len(names)}
        figure.legend(**where, fontsize=9, frameon=False, labelcolor="#e0e0e0", handletextpad=0.2)
    figure.text(0.02, 0.02, told, color="#aaaaaa", fontsize=9)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=100, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return out.getvalue()


_LABELS = ("#ffb000", "#33c3ff", "#ff5fa2", "#7dff8a", "#c9a0ff", "#ffffff", "#ff7043", "#00e5c3")


def _hues(clusters: NDArray[np.integer]) -> NDArray[np.float64]:
    """Give each cluster a colour (n, 3) far from that of the next number, by the golden ratio."""
    from matplotlib.colors import hsv_to_rgb

    number = np.asarray(clusters, np.float64)
    hue, saturation = number * 0.618034 % 1, 0.45 + 0.3 * (number * 0.381966 % 1)
    return np.asarray(hsv_to_rgb(np.stack([hue, saturation, np.full(len(number), 0.92)], axis=1)))


def _pin(axes: Any, places: NDArray[np.floating], clusters: NDArray[np.integer], thumbnails: NDArray[np.uint8]) -> None:
    """Lay some pictures over their points, as many as lie apart from each other, each framed in its cluster's colour."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    low, high = places.min(axis=0), places.max(axis=0)
    unit = (places - low) / np.maximum(high - low, 1e-9)
    colours = _hues(clusters)
    for row in _apart(unit, least=0.13, most=30):
        picture = OffsetImage(_resized(thumbnails[row], 54), zoom=0.72, cmap="gray", norm=_eight_bits())
        frame = {"edgecolor": colours[row], "facecolor": "black", "linewidth": 1.4}
        axes.add_artist(AnnotationBbox(picture, places[row], pad=0.1, bboxprops=frame, zorder=4))


def _eight_bits() -> Any:
    from matplotlib.colors import Normalize

    return Normalize(0, 255)


def _apart(unit: NDArray[np.floating], *, least: float, most: int) -> list[int]:
    """Choose points that lie at least so far from each other, each time the one farthest from those chosen."""
    chosen = [int(np.argmin(np.linalg.norm(unit - np.median(unit, axis=0), axis=1)))]
    distance = np.linalg.norm(unit - unit[chosen[0]], axis=1)
    while len(chosen) < most and distance.max() >= least:
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(unit - unit[chosen[-1]], axis=1))
    return chosen


def _sheet(strips: Sequence[tuple[str, NDArray[np.uint8], Sequence[str]]]) -> bytes:
    """Draw strips below each other; words below its pictures make the first one a query."""
    from PIL import Image, ImageDraw

    heights = [_CAPTION_PX + 11 + TILE_PX + (22 if below else 6) for _, _, below in strips]
    size = (2 * _EDGE + PER_STRIP * TILE_PX + (PER_STRIP - 1) * _GAP, 2 * _EDGE + sum(heights) + 6 * max(0, len(strips) - 1))
    sheet = Image.new("L", size, _GROUND)
    pen, font, small = ImageDraw.Draw(sheet), _font(_CAPTION_PX), _font(12)
    top = _EDGE
    for (caption, rows, below), height in zip(strips, heights, strict=True):
        pen.text((_EDGE, top), _fitting(caption, font, size[0] - 2 * _EDGE), fill=_SOFT, font=font)
        y = top + _CAPTION_PX + 8
        for column, picture in enumerate(rows[:PER_STRIP]):
            x = _EDGE + column * (TILE_PX + _GAP)
            sheet.paste(Image.fromarray(_resized(picture, TILE_PX)), (x, y))
            if below:
                pen.text((x + TILE_PX / 2, y + TILE_PX + 4), below[column], fill=_SOFT, font=small, anchor="ma")
        if below and len(rows):
            pen.rectangle((_EDGE - 3, y - 3, _EDGE + TILE_PX + 2, y + TILE_PX + 2), outline=_BRIGHT, width=2)
        top += height + 6
    out = BytesIO()
    sheet.save(out, format="PNG", optimize=True)
    return out.getvalue()


def _resized(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS), np.uint8)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Give the typeface that comes with matplotlib: a machine without any typeface of its own draws the same."""
    from pathlib import Path

    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fitting(words: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """Cut words to the room there is."""
    if font.getlength(words) <= room:
        return words
    while words and font.getlength(words + "…") > room:
        words = words[:-1]
    return words + "…"
