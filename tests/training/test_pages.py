"""The report's page as a browser, a phone and an attacker see it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import journals
import numpy as np
import pytest

from models.card import Metric
from training import pages, plots, sheets
from training.pages import Figure, Grid, Headline, Page, Section, Sign

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
VOID = {"meta", "img", "path", "rect", "circle"}
HOSTILE = "<script>alert(1)</script>\"'><img src=https://example.org/x onerror=x>"
METRIC = Metric("AUC, locked patients", 0.8123, 0.7, 0.9, 41, "bootstrap by patient, 44 studies")
APART = Metric("AUC minus that of age and sex", -0.1, -0.3, 0.1, 41, "paired")


class Browser(HTMLParser):
    """Reads a page as strictly as a parser can: every element closed where it stands, every attribute kept."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.seen.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data

    def all(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.seen if name in attributes]


def whole(words: str = "words") -> Page:
    picture = sheets.contact_sheet([sheets.Strip("cluster 1", np.zeros((2, 8, 8), np.uint8))])
    return Page(
        title=f"Training run {words}",
        decision="insufficient evidence",
        words=f"{words} A person may decide: `osteon models promote v1 --reason TEXT`",
        headlines=[Headline.of(METRIC), Headline(words, "0.80", words)],
        sections=[
            Section(
                f"Figures {words}",
                "figures",
                words=[words],
                facts={words: words},
                tables={f"Locked patients {words}": [METRIC, Metric(words, 0.5, 0.4, 0.6, 3, words)], "Differences": [APART]},
                grids=[Grid(words, ("k", words), [("1,000", words), ("20", words)])],
                points=[words],
            ),
            Section(
                "Pictures",
                "pictures",
                figures=[
                    Figure(words, plots.loss_plot(journals.folds())),
                    Figure("calibration", plots.calibration_plot([(0.5, 0.5, 3)], words)),
                    Figure("confusion", plots.confusion_plot(np.eye(2, dtype=np.int64), [words, "b"], words)),
                    Figure("baselines", plots.comparison_plot(METRIC, [Metric(words, 0.5, 0.4, 0.6, 3)], words)),
                    Figure(words, picture, wide=True),
                ],
            ),
        ],
        facts={"version": words},
        left_out={words: 3},
        limits=[words],
    )


@pytest.mark.parametrize("words", ["words", HOSTILE])
def test_a_page_parses_asks_nobody_for_anything_and_runs_nothing(words: str) -> None:
    page = pages.render(whole(words))
    read = Browser(page)
    tags = {tag for tag, _ in read.seen}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base", "use", "foreignobject"}
    assert {content for tag, one in read.seen if one.get("http-equiv") for content in [one["content"]]} == {CSP}
    assert all(source.startswith("data:image/png;base64,") for source in read.all("src"))
    assert read.all("src")
    assert all(link.startswith("#") for link in read.all("href"))
    assert not {name for _, one in read.seen for name in one if name.startswith("on") or "xlink" in name or name == "srcset"}
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.S)) + "".join(read.all("style"))
    assert not re.search(r"url\(|@import|image-set|src\(", styles)
    assert ("://" in page) == (words is HOSTILE), "and then only as text"


def test_hostile_words_are_read_as_words() -> None:
    assert Browser(pages.render(whole(HOSTILE))).words.count(HOSTILE) > 15


def test_the_contents_lead_to_every_section_and_no_anchor_is_there_twice() -> None:
    read = Browser(pages.render(whole()))
    anchors = read.all("id")
    assert len(set(anchors)) == len(anchors)
    assert set(read.all("href")) == {f"#{name}" for name in ("figures", "pictures", "left-out", "limits", "made")}
    assert {link[1:] for link in read.all("href")} <= set(anchors)
    twice = Page("a", "b", "c", sections=[Section("A", "limits")], limits=["x"])
    with pytest.raises(ValueError, match="same anchor"):
        pages.render(twice)
    with pytest.raises(ValueError, match="letters, digits and hyphens"):
        Section("A", 'x" onclick="y')


def test_a_figure_stands_with_its_value_interval_cases_method_and_a_bar_at_the_right_place() -> None:
    page = pages.render(whole())
    read = Browser(page)
    for told in ("AUC, locked patients", "0.812", "0.700 to 0.900", "41", "bootstrap by patient, 44 studies", "−0.300 to 0.100"):
        assert told in read.words
    dots = [float(one["cx"]) for tag, one in read.seen if tag == "circle" and one.get("r") == "4" and "class" not in one]
    assert dots == pytest.approx([4 + 132 * 0.8123, 70, 4 + 132 * (0.3 - 0.1) / 0.6], abs=0.06)


@pytest.mark.parametrize(
    ("decision", "sign"),
    [("promote", Sign.GOOD), ("refuse", Sign.BAD), ("insufficient evidence", Sign.OPEN), ("k = 100", Sign.PLAIN)],
)
def test_a_decision_is_told_in_words_by_a_colour_and_by_a_shape_of_its_own(decision: str, sign: Sign) -> None:
    page = pages.render(Page("run", decision, "because"))
    assert f'class="verdict {sign.value}"' in page
    assert page.index(decision) < page.index("<main>")
    shapes = {
        one: re.findall(r'<svg class="sign".*?</svg>', pages.render(Page("run", "x", "", sign=one)), re.S)[0] for one in Sign
    }
    assert len(set(shapes.values())) == len(Sign)
    assert shapes[sign] in page


def test_no_difference_is_in_the_middle_also_where_every_difference_is_above_it() -> None:
    above = Metric("AUC of the k-NN, pretrained minus start", 0.05, 0.02, 0.1, 41, "paired")
    page = Page("t", "promote", "w", sections=[Section("a", "a", tables={"Against the start": [above]})])
    (at,) = re.findall(r'<circle cx="([\d.]+)" cy="8" r="4"/>', pages.render(page))
    assert float(at) == pytest.approx(4 + 132 * 0.75, abs=0.1), "70 is no difference, 136 is 0.1"


def test_a_run_of_any_kind_shows_only_what_it_has() -> None:
    read = Browser(
        pages.render(Page("Pretraining 7", "offered", "It is above its start.", judge="The probe says", sign=Sign.GOOD))
    )
    assert "The probe says" in read.words
    assert {"table", "figure", "h2", "img"} & {tag for tag, _ in read.seen} == set()


def test_a_chart_follows_light_and_dark_and_a_page_is_readable_on_a_phone_and_on_paper() -> None:
    page = pages.render(whole())
    assert page.count("prefers-color-scheme:dark") > 1
    assert "@media print" in page
    assert 'name="viewport"' in page
    assert '<svg class="plot"' in page, "charts are part of the page, not pictures with a ground of their own"


def test_every_picture_has_words_for_who_cannot_see_it() -> None:
    read = Browser(pages.render(whole()))
    pictures = [one for tag, one in read.seen if tag in ("img", "svg") and one.get("aria-hidden") != "true"]
    assert all(one.get("alt") or one.get("aria-label") for one in pictures)
