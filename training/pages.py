"""The report of a run: one page of HTML that needs nothing else.

In: what a run has to say, as a `Page` of `Section`s; pictures come from `plots` and `sheets`. Out: HTML text. The page asks no
server for anything, runs no script, and can be read on a phone, on a workstation, on paper and without telling colours apart.
Files made of it are patient data and get mode 0600 (`report` writes them). Nothing here may be shown without its number of cases,
and no text may reach the page unescaped.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from models.card import Metric

PNG = b"\x89PNG"


class Sign(Enum):
    """How a decision is to be read at a glance; each has a shape and a word beside its colour."""

    GOOD = "good"
    """A tick in a circle."""
    BAD = "bad"
    """A cross in an octagon."""
    OPEN = "open"
    """A question mark in a diamond: a person has to decide."""
    PLAIN = "plain"
    """An i in a square: nothing was decided."""


SIGNS: Mapping[str, Sign] = {"promote": Sign.GOOD, "refuse": Sign.BAD, "insufficient evidence": Sign.OPEN}
"""What the gate's decisions look like."""


@dataclass(frozen=True, slots=True)
class Headline:
    """One number that is read first."""

    label: str
    value: str
    below: str
    """What it has to be read with: interval and number of cases, or the level it has to beat."""

    @classmethod
    def of(cls, metric: Metric) -> Headline:
        """Make a headline of a figure with its interval."""
        return cls(metric.name, f"{metric.value:.2f}", f"{_interval(metric, 2)}, {metric.n} patients")


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture and what is to be seen on it."""

    caption: str
    picture: bytes
    """SVG of `plots` or PNG of `sheets`."""
    wide: bool = False
    """Whether it takes the whole width; charts stand side by side where there is room."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of plain cells."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Section:
    """One heading of the page and what stands below it, in this order; what is empty is not shown."""

    heading: str
    anchor: str
    """Letters, digits and hyphens; once a page."""
    words: Sequence[str] = ()
    """Paragraphs; `what stands between backticks` is shown as something to type."""
    facts: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Metric]] = field(default_factory=dict)
    """Figures with their intervals by heading."""
    grids: Sequence[Grid] = ()
    figures: Sequence[Figure] = ()
    points: Sequence[str] = ()
    """A list of sentences."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", self.anchor):
            raise ValueError(f"an anchor has letters, digits and hyphens: {self.anchor}")


@dataclass(frozen=True, slots=True)
class Page:
    """Everything the page of one run says; a run of any kind gives the sections it has."""

    title: str
    decision: str
    """What was decided, in a few words; said first."""
    words: str
    """Why, and what a person may do."""
    sections: Sequence[Section] = ()
    judge: str = "The gate says"
    """Who decided."""
    sign: Sign | None = None
    """How the decision is to be read; by default as the gate's three decisions are."""
    headlines: Sequence[Headline] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    """What the run was made of, in the order shown."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Images that did not train, by reason."""
    limits: Sequence[str] = ()
    """What a reader must know before believing any of it."""

    def all_sections(self) -> tuple[Section, ...]:
        """Give the sections in the order shown: the run's own, then what every page ends with."""
        made = [*self.sections]
        if self.left_out:
            rows = [(reason, f"{count:,}") for reason, count in self.left_out.items()]
            made.append(Section("Images left out", "left-out", grids=[Grid("", ("reason", "images"), rows)]))
        if self.limits:
            made.append(Section("Limits", "limits", points=self.limits))
        if self.facts:
            made.append(Section("How it was made", "made", facts=self.facts))
        if len({section.anchor for section in made}) < len(made):
            raise ValueError("two sections of one page have the same anchor")
        return tuple(made)


def render(page: Page) -> str:
    """Write the page: one file, no script, no request."""
    sections = page.all_sections()
    links = "".join(f'<li><a href="#{section.anchor}">{_text(section.heading)}</a></li>' for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{_text(page.title)}</title><style>{_STYLE}</style></head><body>"
        f'<header id="top"><p class="brand">Osteon</p><h1>{_text(page.title)}</h1>'
        '<p class="notice">Research use only. This page shows results on patients: keep it as you keep patient data.</p>'
        f"{_verdict(page)}{_headlines(page.headlines)}</header>"
        f'<div class="body"><nav aria-label="Contents"><p>Contents</p><ol>{links}</ol></nav>'
        f"<main>{''.join(map(_section, sections))}</main></div>"
        "<footer>Figures are shown with their 95 % interval and the patients they rest on. Charts tell more under the pointer."
        "</footer></body></html>\n"
    )


# --- parts of the page ---------------------------------------------------------------------------------------------------------


_SHAPES: Mapping[Sign, str] = {
    Sign.GOOD: '<circle cx="24" cy="24" r="21"/><path d="M14 25l7 7 13-15"/>',
    Sign.BAD: '<path d="M15 3h18l12 12v18L33 45H15L3 33V15z"/><path d="M16 16l16 16M32 16L16 32"/>',
    Sign.OPEN: '<path d="M24 2l22 22-22 22L2 24z"/><path d="M18.5 20a5.5 5.5 0 1 1 8.6 4.5c-2 1.4-3.1 2.5-3.1 4.5M24 34.5v.1"/>',
    Sign.PLAIN: '<rect x="4" y="4" width="40" height="40" rx="9"/><path d="M24 22v12M24 14v.1"/>',
}


def _verdict(page: Page) -> str:
    """Say first what was decided: in words, a colour and a shape."""
    sign = page.sign or SIGNS.get(page.decision, Sign.PLAIN)
    return (
        f'<section class="verdict {sign.value}" aria-label="Decision"><svg class="sign" viewBox="0 0 48 48" aria-hidden="true">'
        f'{_SHAPES[sign]}</svg><div><p class="judge">{_text(page.judge)}</p><p class="decision">{_text(page.decision)}</p>'
        f"<p>{_prose(page.words)}</p></div></section>"
    )


def _headlines(headlines: Sequence[Headline]) -> str:
    if not headlines:
        return ""
    cards = [
        f"<div><dt>{_text(one.label)}</dt><dd><b>{_text(one.value)}</b><span>{_text(one.below)}</span></dd></div>"
        for one in headlines
    ]
    return f'<dl class="headlines">{"".join(cards)}</dl>'


def _section(section: Section) -> str:
    parts = [
        f'<h2>{_text(section.heading)} <a class="here" href="#{section.anchor}" aria-label="Link to this section">#</a></h2>'
    ]
    parts += [f"<p>{_prose(words)}</p>" for words in section.words]
    if section.facts:
        facts = "".join(f"<div><dt>{_text(name)}</dt><dd>{_prose(said)}</dd></div>" for name, said in section.facts.items())
        parts.append(f'<dl class="facts">{facts}</dl>')
    parts += [_metrics(heading, metrics) for heading, metrics in section.tables.items()]
    parts += map(_grid, section.grids)
    if section.figures:
        parts.append(f'<div class="figures">{"".join(map(_figure, section.figures))}</div>')
    if section.points:
        parts.append(f"<ul>{''.join(f'<li>{_prose(point)}</li>' for point in section.points)}</ul>")
    return f'<section id="{section.anchor}">{"".join(parts)}</section>'


def _metrics(heading: str, metrics: Sequence[Metric]) -> str:
    """Draw a table of figures; the bars of one table share one scale, with no difference in the middle where they are some."""
    ends = [end for metric in metrics for end in (metric.low, metric.high, metric.value)]
    reach = max((abs(end) for end in ends), default=1.0) or 1.0
    apart = min(ends, default=0.0) < 0 or reach > 1 or all(" minus " in metric.name for metric in metrics)
    low, high = (-reach, reach) if apart else (0.0, 1.0)
    head = "".join(
        f'<th scope="col"{look}>{_text(name)}</th>'
        for name, look in (("figure", ""), ("value", " class=number"), ("95 % interval", ""), ("patients", " class=number"))
    )
    rows = "".join(
        f'<tr><th scope="row">{_text(metric.name)}<small>{_text(metric.method)}</small></th>'
        f'<td class="number"><b>{_number(metric.value)}</b></td>'
        f'<td class="interval">{_bar(metric, low, high)}<span>{_interval(metric, 3)}</span></td>'
        f'<td class="number n">{metric.n:,}</td></tr>'
        for metric in metrics
    )
    return (
        f'<table class="metrics"><caption>{_text(heading)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    )


def _bar(metric: Metric, low: float, high: float) -> str:
    """Draw the interval as a bar with the value as a dot, and a tick at the middle of the scale (chance, or no difference)."""
    left, right, at = (4 + 132 * (end - low) / (high - low) for end in (metric.low, metric.high, metric.value))
    return (
        f'<svg class="bar" viewBox="0 0 140 16" role="img" aria-label="{_interval(metric, 3)}">'
        '<path class="rail" d="M4 8H136M70 3v10"/>'
        f'<path class="reach" d="M{left:.1f} 8H{max(right, left + 0.5):.1f}"/><circle cx="{at:.1f}" cy="8" r="4"/></svg>'
    )


def _grid(grid: Grid) -> str:
    """Draw a plain table; a column of numbers stands on the right."""
    columns = [*zip(*grid.rows, strict=True)] or [()] * len(grid.header)
    looks = [' class="number"' * bool(column and all(map(_NUMBER.fullmatch, column))) for column in columns]
    head = "".join(f'<th scope="col"{look}>{_text(name)}</th>' for name, look in zip(grid.header, looks, strict=True))
    rows = (zip(row, looks, strict=True) for row in grid.rows)
    body = "".join(f"<tr>{''.join(f'<td{look}>{_text(cell)}</td>' for cell, look in row)}</tr>" for row in rows)
    caption = f"<caption>{_text(grid.caption)}</caption>" if grid.caption else ""
    return f'<div class="scroll"><table class="grid">{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_NUMBER = re.compile(r"[-−+]?[\d,.]+ ?%?")


def _figure(figure: Figure) -> str:
    return (
        f'<figure class="{"wide" if figure.wide else "chart"}"><div class="scroll">{_picture(figure)}</div>'
        f"<figcaption>{_prose(figure.caption)}</figcaption></figure>"
    )


def _picture(figure: Figure) -> str:
    """Set a picture into the page: SVG as it is, so that it follows light and dark; PNG as data."""
    if figure.picture.startswith(PNG):
        data = base64.b64encode(figure.picture).decode("ascii")
        return f'<img alt="{_text(figure.caption)}" src="data:image/png;base64,{data}">'
    return figure.picture.decode().strip().replace(' xmlns="http://www.w3.org/2000/svg"', "")


def _interval(metric: Metric, digits: int) -> str:
    return f"{_number(metric.low, digits)} to {_number(metric.high, digits)}"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _prose(words: str) -> str:
    """Escape words; what stands between backticks is something to type."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _text(words))


def _text(value: object) -> str:
    return html.escape(str(value))


_LIGHT = (
    "--paper:#f5f7f9;--card:#fff;--ink:#17202b;--soft:#55616f;--line:#dde3e9;--link:#005a94;--rail:#cfd7df;--reach:#8fb8d8;--dot:#0065a3;"
    "--good:#0a6b4f;--good-soft:#e3f4ed;--bad:#a3261f;--bad-soft:#fbe9e7;--open:#8a5a00;--open-soft:#fdf2dc;"
    "--plain:#3d5368;--plain-soft:#e9eef3;--code:#eef1f4"
)
_DARK = (
    "--paper:#0e1318;--card:#161c23;--ink:#e8edf3;--soft:#a3afbd;--line:#2b343f;--link:#7cc4f5;--rail:#4a5663;--reach:#3b7199;--dot:#7cc4f5;"
    "--good:#56d6ab;--good-soft:#11291f;--bad:#ff8a80;--bad-soft:#331816;--open:#ffc861;--open-soft:#2e2410;"
    "--plain:#a9bccf;--plain-soft:#1c252f;--code:#212a34"
)
_STYLE = (
    f":root{{{_LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}@media print{{:root{{{_LIGHT};--paper:#fff}}}}"
    """
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
 font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
header,.body,footer{max-width:76rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:1.75rem}
.brand{margin:0;font-size:.8rem;font-weight:700;letter-spacing:.16em;text-transform:uppercase;color:var(--soft)}
h1{margin:.1rem 0 .3rem;font-size:clamp(1.4rem,1rem + 2vw,2.1rem);line-height:1.2;letter-spacing:-.015em}
.notice{margin:0 0 1.2rem;color:var(--soft);font-size:.92rem}
a{color:var(--link)}
a:focus-visible{outline:3px solid var(--link);outline-offset:2px;border-radius:3px}
code{font:.88em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--code);padding:.12em .4em;border-radius:4px}
.verdict{display:flex;gap:1.2rem;align-items:flex-start;padding:1.25rem 1.4rem;border-radius:14px;background:var(--tone-soft);
 border:1px solid var(--tone);border-left-width:8px}
.verdict.good{--tone:var(--good);--tone-soft:var(--good-soft)}.verdict.bad{--tone:var(--bad);--tone-soft:var(--bad-soft)}
.verdict.open{--tone:var(--open);--tone-soft:var(--open-soft)}.verdict.plain{--tone:var(--plain);--tone-soft:var(--plain-soft)}
.sign{flex:none;width:3.6rem;height:3.6rem;fill:var(--tone);stroke:var(--card);stroke-width:4.5;stroke-linecap:round;
 stroke-linejoin:round}
.sign>:first-child{stroke:none}.sign>:last-child{fill:none}
.verdict p{margin:.25rem 0 0;max-width:62rem}
.verdict .judge{margin:0;font-size:.85rem;color:var(--soft)}
.verdict .decision{margin:0;font-size:1.65rem;font-weight:700;line-height:1.2;color:var(--tone)}
.headlines{display:grid;grid-template-columns:repeat(auto-fit,minmax(12rem,1fr));gap:.9rem;margin:1.1rem 0 0}
.headlines div{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:.8rem 1rem}
.headlines dt{font-size:.85rem;color:var(--soft)}
.headlines dd{margin:0}
.headlines b{display:block;font-size:1.8rem;line-height:1.25;letter-spacing:-.02em}
.headlines span{font-size:.85rem;color:var(--soft)}
.body{display:grid;grid-template-columns:minmax(0,1fr);gap:0 2.2rem;padding-top:1.2rem}
nav p{display:none}
nav ol{display:flex;flex-wrap:wrap;gap:.45rem;list-style:none;margin:0;padding:0}
nav a{display:block;padding:.3rem .8rem;border:1px solid var(--line);border-radius:99px;background:var(--card);font-size:.9rem;
 text-decoration:none}
nav a:hover{border-color:var(--link)}
main>section{scroll-margin-top:1rem;padding:1.4rem 0 .6rem;border-bottom:1px solid var(--line)}
main>section:last-child{border:0}
h2{margin:0 0 .5rem;font-size:1.35rem;line-height:1.3;letter-spacing:-.01em}
.here{font-weight:400;color:var(--soft);text-decoration:none;opacity:.45}
.here:hover,.here:focus{opacity:1}
main p,main li{max-width:46rem}
main p{margin:.4rem 0 .9rem}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:.2rem 1.8rem;margin:.4rem 0 1rem}
.facts div{padding:.4rem 0;border-bottom:1px solid var(--line)}
.facts dt{font-size:.82rem;color:var(--soft)}
.facts dd{margin:0}
table{border-collapse:collapse;width:100%;margin:.5rem 0 1.4rem;background:var(--card);border:1px solid var(--line)}
caption{text-align:left;font-weight:600;padding:.2rem 0 .5rem}
th,td{padding:.5rem .8rem;text-align:left;vertical-align:middle;border-top:1px solid var(--line)}
thead th{font-size:.82rem;font-weight:600;color:var(--soft)}
tbody th{font-weight:400}
table.grid{width:auto;max-width:100%}
small{display:block;font-size:.78rem;color:var(--soft);line-height:1.35}
.number{text-align:right;white-space:nowrap}
.metrics .interval{width:13rem}
.interval span{display:block;font-size:.82rem;color:var(--soft);white-space:nowrap}
.bar{display:block;width:100%;max-width:12rem;height:auto}
.rail{stroke:var(--rail);stroke-width:2;fill:none}.reach{stroke:var(--reach);stroke-width:7;stroke-linecap:butt}
.bar circle{fill:var(--dot)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,25rem),1fr));gap:1rem;
 margin:.6rem 0 1.2rem;align-items:start}
figure{margin:0;padding:.9rem;background:var(--card);border:1px solid var(--line);border-radius:12px;min-width:0}
figure.wide{grid-column:1/-1}
figure.chart:only-child{grid-column:1/-1;max-width:35rem}
figcaption{margin-top:.5rem;font-size:.88rem;line-height:1.45;color:var(--soft);max-width:46rem}
.scroll{overflow-x:auto}
.plot{display:block;width:100%;height:auto}
img{display:block;width:100%;max-width:60rem;height:auto;border-radius:6px}
.wide img{min-width:36rem}
footer{margin-top:1rem;padding-top:1rem;padding-bottom:2.5rem;font-size:.85rem;color:var(--soft)}
@media (min-width:64rem){
.body{grid-template-columns:11.5rem minmax(0,1fr)}
nav{position:sticky;top:1.4rem;align-self:start;padding-top:1.5rem}
nav p{display:block;margin:0 0 .4rem;font-size:.78rem;letter-spacing:.09em;text-transform:uppercase;color:var(--soft)}
nav ol{display:block;border-left:2px solid var(--line)}
nav a{border:0;border-radius:0;background:none;padding:.22rem .9rem}
nav a:hover{text-decoration:underline}
}
@media (max-width:40rem){
header,.body,footer{padding-left:.9rem;padding-right:.9rem}
.verdict{padding:1rem;gap:.9rem}.sign{width:2.6rem;height:2.6rem}.verdict .decision{font-size:1.35rem}
th,td{padding:.45rem .5rem}
.metrics{display:block}.metrics thead{display:none}.metrics caption,.metrics tbody{display:block}
.metrics caption{padding:.5rem .7rem}
.metrics tr{display:grid;grid-template-columns:4.2rem 1fr auto;gap:.15rem .6rem;align-items:center;padding:.55rem .7rem;
 border-top:1px solid var(--line)}
.metrics th,.metrics td{border:0;padding:0}.metrics th{grid-column:1/-1}.metrics .interval{width:auto}
.metrics td:first-of-type{text-align:left;font-size:1.1rem}
.metrics .n{font-size:.85rem}.metrics .n::after{content:" patients"}.interval span::after{content:" (95 %)"}
.headlines{grid-template-columns:repeat(2,minmax(0,1fr));gap:.6rem}.headlines b{font-size:1.45rem}
figure{padding:.6rem}
}
@media print{
body{font-size:10.5pt}nav,.here{display:none}.body{display:block}
figure,tr,.verdict,.headlines div{break-inside:avoid}h2,caption{break-after:avoid}
.verdict,.reach,.sign,.plot,.bar{-webkit-print-color-adjust:exact;print-color-adjust:exact}
.wide img{min-width:0}
}
"""
)
