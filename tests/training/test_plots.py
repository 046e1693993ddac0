"""Charts: each is a drawing that stands alone, shows what it was given, and says on how much it rests."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import journals
import numpy as np
import pytest

from models.card import Metric
from training import plots

START = {"knn": 0.61, "linear": 0.7}
SWEEP = [
    {"k": 1000, "accuracy": 0.7, "chance": 0.01, "knn": 0.7, "linear": 0.8},
    {"k": 10, "accuracy": 0.75, "chance": 0.2, "knn": 0.6, "linear": None},
]
AUC = Metric("AUC, out of fold", 0.9, 0.8, 0.95, 63)
BASELINE = Metric("AUC, age & sex, out of fold", 0.65, 0.5, 0.78, 63)
DIAGONAL = np.linspace(0, 1, 5)


def roc(power: float) -> bytes:
    return plots.roc_plot([plots.Curve("a (9 studies)", DIAGONAL, DIAGONAL**power, DIAGONAL, DIAGONAL * 0.5, DIAGONAL)])


def confusion(table: list[list[int]]) -> bytes:
    return plots.confusion_plot(np.array(table), ["a_b", "c<d"], "Confusion, 9 studies")


def calibration(points: list[tuple[float, float, int]]) -> bytes:
    return plots.calibration_plot(points, "Calibration, 9 studies")


PRETRAINING, SHORTER = journals.pretraining(12), journals.pretraining(9)
CLASSIFIER = journals.classifier()
SIZES, OTHERS = np.arange(1, 41), np.arange(1, 50)
CHARTS: dict[str, tuple[Callable[[Any], bytes], Any, Any]] = {
    "loss": (plots.loss_plot, journals.folds(), journals.folds((4, 7, 9))),
    "pretraining loss": (plots.pretraining_loss_plot, PRETRAINING, SHORTER),
    "nmi": (plots.nmi_plot, PRETRAINING, SHORTER),
    "empties": (plots.empties_plot, PRETRAINING, SHORTER),
    "sizes": (plots.sizes_plot, PRETRAINING, SHORTER),
    "probe": (lambda lines: plots.probe_plot(lines, START, 99), PRETRAINING, SHORTER),
    "step two, loss": (plots.classifier_loss_plot, CLASSIFIER, CLASSIFIER[:9]),
    "step two, accuracy": (lambda lines: plots.classifier_accuracy_plot(lines, 40, 0.1), CLASSIFIER, CLASSIFIER[:9]),
    "size curve": (plots.size_curve_plot, SIZES, OTHERS),
    "size histogram": (plots.size_histogram_plot, SIZES, OTHERS),
    "sweep, accuracy": (lambda points: plots.sweep_accuracy_plot(points, 99, 1000), SWEEP, SWEEP[:1]),
    "sweep, probe": (lambda points: plots.sweep_probe_plot(points, 99), SWEEP, SWEEP[:1]),
    "roc": (roc, 0.5, 0.2),
    "confusion": (confusion, [[3, 1], [0, 5]], [[3, 1], [1, 4]]),
    "calibration": (calibration, [(0.1, 0.0, 4), (0.9, 1.0, 7)], [(0.1, 0.2, 5)]),
    "comparison": (lambda others: plots.comparison_plot(AUC, others, "AUC"), [BASELINE], []),
}
NEVER_EMPTY = ("size curve", "size histogram", "confusion", "roc", "comparison")


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_a_drawing_of_finite_numbers_that_changes_with_what_it_shows(name: str) -> None:
    draw, given, other = CHARTS[name]
    drawn = draw(given)
    root = ElementTree.fromstring(drawn)  # noqa: S314 - our own
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib["aria-label"]
    assert not re.search(rb"\bnan\b|\binf\b", drawn)
    assert drawn == draw(given)
    assert drawn != draw(other)
    assert len(drawn) < 60_000


@pytest.mark.parametrize("name", [name for name in CHARTS if name not in NEVER_EMPTY])
def test_nothing_measured_yet_is_an_empty_chart_and_no_error(name: str) -> None:
    ElementTree.fromstring(CHARTS[name][0]([]))  # noqa: S314


def words(svg: bytes) -> str:
    return " | ".join(text.text or "" for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"))  # noqa: S314


def lines(svg: bytes, look: str) -> list[str]:
    """Give the paths of the lines of this look."""
    return re.findall(rf'<path class="line {look}" d="([^"]+)"', svg.decode())


def test_what_was_not_measured_in_an_epoch_is_left_out_and_never_drawn_as_zero() -> None:
    (drawn,) = lines(plots.nmi_plot(journals.pretraining(12)), "c1")
    assert drawn.count("L") + 1 == 11, "the first epoch has no assignment before it"
    torn = journals.pretraining(12)
    torn[5]["nmi"] = math.nan
    (drawn,) = lines(plots.nmi_plot(torn), "c1")
    assert drawn.count("L") + 1 == 10


def test_the_start_of_the_probe_is_a_dashed_level_and_the_cases_are_told() -> None:
    drawn = plots.probe_plot(journals.pretraining(), START, 412)
    level = lines(drawn, "c1 dash")[0]
    assert len(set(re.findall(r"\d+\.\d+ (\d+\.\d+)", level))) == 1
    assert "412 patients" in words(drawn)
    assert "k-NN, at the start" in words(drawn)
    assert lines(plots.probe_plot(journals.pretraining(), {}, 412), "c1 dash") == []


def test_the_folds_are_thin_lines_with_a_median_only_for_as_long_as_none_has_stopped() -> None:
    drawn = plots.loss_plot(journals.folds((8, 5, 11)))
    assert len(lines(drawn, "c1 thin")) == 3
    median = lines(drawn, "c1")[0]
    assert median.count("L") + 1 == 5
    assert "3 folds and the final fit" in words(drawn)


def test_repeats_are_fits_of_their_fold_and_final_fits_are_none() -> None:
    folds, refit = [line for line in journals.folds((8, 5)) if line["fit"] != "refit"], journals.folds(())
    again = [line | {"fit": f"{line['fit']} repeat 1"} for line in (*folds, *refit)]
    drawn = plots.loss_plot([*folds, *refit, *again])
    assert "4 fits of 2 folds and 2 final fits" in words(drawn)
    assert len(lines(drawn, "c1 thin")) == 4
    assert len(lines(drawn, "c3 dots")) == 2 + 1, "the legend names them once"
    assert lines(drawn, "c1")[0].count("L") + 1 == 5, "the median goes on until a fold stops, whatever the final fits do"


def test_the_size_curve_names_smallest_quartiles_and_largest() -> None:
    told = words(plots.size_curve_plot(np.array([135, 55, 46, 20, 2])))
    for part in ("5 clusters of 258 images", "largest 135", "upper quartile 55", "median 46", "lower quartile 20", "smallest 2"):
        assert part in told
    assert "largest 16,400" in words(plots.size_curve_plot(np.array([16400, 3, 2])))


def test_the_name_of_an_empty_cluster_stands_above_the_axis_and_its_numbers() -> None:
    drawn = plots.size_curve_plot(np.array([40, 3, 0])).decode()
    (height,) = re.findall(r'y="([\d.]+)" text-anchor="end">smallest 0<', drawn)
    (axis,) = re.findall(r'<path class="axis" d="M54 ([\d.]+)H', drawn)
    assert float(height) < float(axis)


def test_an_empty_cluster_does_not_break_a_logarithmic_axis() -> None:
    ElementTree.fromstring(plots.size_curve_plot(np.array([40, 3, 0])))  # noqa: S314
    ElementTree.fromstring(plots.sizes_plot([{"epoch": 1, "sizes": [0, 0, 0, 1, 900]}]))  # noqa: S314


def test_the_sweep_rings_the_k_that_was_chosen_and_says_how_far_above_the_largest_cluster_it_is() -> None:
    points = [{"k": 2, "accuracy": 0.9, "chance": 0.5}, {"k": 100, "accuracy": 0.8, "chance": 0.3}]
    drawn = plots.sweep_accuracy_plot(points, 50, 100)
    assert "k = 100: 0.50 over chance" in words(drawn)
    assert "50 test images" in words(drawn)
    assert drawn.count(b'class="ring') == 1
    assert "k = 100: −0.10 over chance" in words(plots.sweep_accuracy_plot([points[1] | {"accuracy": 0.2}], 50, 100))


def test_the_axis_of_a_sweep_names_the_numbers_that_were_tried() -> None:
    points = [{"k": k, "accuracy": 0.9, "chance": 0.5} for k in (300, 350)]
    assert {"300", "350"} <= set(words(plots.sweep_accuracy_plot(points, 50, 300)).split(" | "))


def test_each_number_of_clusters_has_a_start_of_its_own() -> None:
    points = [{"k": 2, "knn": 0.7, "knn_start": 0.6}, {"k": 50, "knn": 0.8, "knn_start": 0.65}]
    start, _legend = lines(plots.sweep_probe_plot(points, 40), "c1 dash")
    assert len(set(re.findall(r"\d+\.\d+ (\d+\.\d+)", start))) == 2


def test_an_auc_below_chance_is_still_on_its_axis_and_a_trifle_is_not_blown_up() -> None:
    probed = plots.probe_plot([{"epoch": 1, "knn": 0.33}], {"knn": 0.3}, 9).decode()
    (height,) = re.findall(r'<circle class="fill c1" cx="[\d.]+" cy="([\d.]+)"', probed.partition("<g transform")[0])
    foot = lines(probed.encode(), "c1 dash")[0]
    assert float(height) < float(re.findall(r" ([\d.]+)", foot)[0]), "0.33 stands above 0.3"
    flat = words(plots.pretraining_loss_plot([{"epoch": 1, "loss": 2.488}, {"epoch": 2, "loss": 2.489}]))
    assert max(len(text) for text in flat.split(" | ") if text.startswith("2")) <= 4


def test_a_comparison_tells_value_interval_and_cases_of_each() -> None:
    told = words(plots.comparison_plot(AUC, [BASELINE], "AUC"))
    assert "0.90 (0.80 to 0.95), n 63" in told
    assert "AUC, age & sex" in told
    assert "0.65 (0.50 to 0.78), n 63" in told


def test_a_confusion_table_tells_counts_and_shares_of_the_truth() -> None:
    told = words(plots.confusion_plot(np.array([[3, 1], [0, 0]]), ["a", "b"], "Confusion, 4 studies"))
    assert "| 3 | 75% | 1 | 25% | 0 | 0% | 0 | 0% |" in told
