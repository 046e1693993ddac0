"""The rules of the archive as data: Table E.1-1 of PS3.15, the allow-list for CR and DX, and the vocabulary.

In: three files beside this one, and the site's additions to the vocabulary. Out: `action_of` (what the confidentiality profile
with our options does to an attribute), `ALLOWED` (what reaches the archive at all, and how), `Vocabulary` (what a text may say).
`python -m node.receive.profile` writes the generated part of docs/pseudonymisation.md. Never here: a patient's data set.

The profile makes the archive conformant, the allow-list makes a leak improbable: the table has no row for hundreds of attributes
that a person can type a name into, so what the allow-list does not name is dropped, at every nesting level.
"""

from __future__ import annotations

import csv
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from pydicom.datadict import dictionary_description, dictionary_VR, tag_for_keyword

from node.errors import BadSettings

HERE = Path(__file__).parent
PROFILE_EDITION = "PS3.15 2026c E.1"

METHOD_CODES: Mapping[str, str] = {
    "113100": "Basic Application Confidentiality Profile",
    "113105": "Clean Descriptors Option",
    "113107": "Retain Longitudinal Temporal Information Modified Dates Option",
    "113108": "Retain Patient Characteristics Option",
}
"""CID 7050, DCM: what is really applied. 113101 (Clean Pixel Data) is not: the pixels are not searched for text yet."""
CLEANED_OPTIONS = ("RtnLongModifDates", "CleanDesc")
CHARACTERISTICS = frozenset({"(0010,0040)", "(0010,1010)"})
"""Retain Patient Characteristics is used for sex and age alone; for size, weight and the rest the basic action stands."""


# --- Table E.1-1 ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One row of Table E.1-1."""

    tag: str
    """`(gggg,eeee)`, or one of the four group rows."""
    name: str
    basic: str
    """The action of the basic profile (Table E.1-1a)."""
    action: str
    """The action with our options: X, Z, D, U, U*, K or C."""


_WITHOUT_TYPES = {"X/Z": "Z", "X/D": "D", "Z/D": "D", "X/Z/D": "D", "X/Z/U*": "U*"}
"""Compound actions resolved so that no required element goes and nothing leaks, whatever the IOD."""


@cache
def table() -> tuple[Row, ...]:
    """Give Table E.1-1, each row with the action that our options leave."""
    with (HERE / "ps3.15-e1.csv").open(encoding="utf-8", newline="") as file:
        return tuple(Row(row["tag"], row["name"], row["basic"], _resolved(row)) for row in csv.DictReader(file))


def _resolved(row: Mapping[str, str]) -> str:
    """Let the options override the basic action; where both keep and clean apply, clean wins."""
    chosen = {row[option] for option in CLEANED_OPTIONS}
    if row["tag"] in CHARACTERISTICS:
        chosen.add(row["RtnPatChars"])
    for action in ("C", "K"):
        if action in chosen:
            return action
    return _WITHOUT_TYPES.get(row["basic"], row["basic"])


@cache
def _actions() -> Mapping[str, str]:
    return {row.tag: row.action for row in table()}


def action_of(tag: int) -> str:
    """Give what the profile does to an attribute; empty when the table has no row for it."""
    group, element = tag >> 16, tag & 0xFFFF
    if group % 2:
        return _actions()["(gggg,eeee) odd group"]
    if group & 0xFF00 == 0x5000:
        return _actions()["(50xx,xxxx)"]
    if group & 0xFF00 == 0x6000 and element in (0x3000, 0x4000):
        return _actions()[f"(60xx,{element:04X})"]
    return _actions().get(told(tag), "")


def told(tag: int) -> str:
    """Write a tag as the standard does."""
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


# --- the allow-list ------------------------------------------------------------------------------------------------------------


class Rule(StrEnum):
    """How an attribute of the allow-list gets into the archive; an invalid value is written with zero length, never passed on."""

    CLASS = "class"
    UID = "uid"
    DATE = "date"
    TIME = "time"
    DATETIME = "datetime"
    NUMBER = "number"
    COUNT = "count"
    BYTES = "bytes"
    TABLE = "table"
    TERM = "term"
    CODES = "codes"
    ITEMS = "items"
    EMPTY = "empty"
    PSEUDONYM = "pseudonym"
    AGE = "age"


SENTENCES: Mapping[Rule, str] = {
    Rule.CLASS: "a UID of the standard's own registry stays, any other is replaced",
    Rule.UID: "replaced by a keyed derivation, the same wherever the UID stands",
    Rule.DATE: "shifted by the patient's number of weeks",
    Rule.TIME: "the hour stays, minutes and seconds become zero",
    Rule.DATETIME: "date shifted, hour kept, offset dropped",
    Rule.NUMBER: "kept when it is a number of its VR",
    Rule.COUNT: "kept when it has one to four digits: a longer one may be a date or an accession number",
    Rule.BYTES: "kept as it is",
    Rule.TABLE: "the entries that the descriptor speaks of are kept",
    Rule.TERM: "kept when the vocabulary knows it, in the vocabulary's spelling; else emptied and counted by a keyed hash",
    Rule.CODES: "codes that the vocabulary knows stay, with the vocabulary's meaning; the others go",
    Rule.ITEMS: "items are cleaned by the rows below",
    Rule.EMPTY: "zero length",
    Rule.PSEUDONYM: "the patient's pseudonym",
    Rule.AGE: "computed from the original birth date and study date",
}

_PERMITTED: Mapping[str, frozenset[Rule]] = {
    "X": frozenset(),
    "Z": frozenset({Rule.EMPTY, Rule.PSEUDONYM}),
    "D": frozenset({Rule.EMPTY, Rule.PSEUDONYM}),
    "U": frozenset({Rule.UID}),
    "U*": frozenset({Rule.ITEMS}),
    "K": frozenset({Rule.TERM, Rule.AGE}),
    "C": frozenset({Rule.DATE, Rule.TIME, Rule.DATETIME, Rule.TERM, Rule.CODES}),
    "": frozenset(
        {Rule.CLASS, Rule.UID, Rule.NUMBER, Rule.COUNT, Rule.BYTES, Rule.TABLE, Rule.TERM, Rule.CODES, Rule.ITEMS, Rule.EMPTY}
    ),
}
"""Which rules of the allow-list are as strict as an action of the profile."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """One attribute of the allow-list."""

    tag: int
    keyword: str
    vr: str
    """As in PS3.6; `US or SS` where the pixel representation decides."""
    rule: Rule
    vocabulary: str
    """The list of terms or codes, for the rules that have one."""
    items: Mapping[int, Allowed]
    """What its items may hold, for sequences."""


def _read_allow_list() -> Mapping[int, Allowed]:
    with (HERE / "allowlist.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["attribute"]: row for row in csv.DictReader(file)}
    return _level(rows, "")


def _level(rows: Mapping[str, Mapping[str, str]], parent: str) -> Mapping[int, Allowed]:
    """Gather the rows directly below `parent`, a path of keywords that ends in a dot."""
    level: dict[int, Allowed] = {}
    for path, row in rows.items():
        keyword = path.removeprefix(parent)
        if not path.startswith(parent) or "." in keyword:
            continue
        tag = tag_for_keyword(keyword)
        if tag is None:
            raise ValueError(f"allowlist.csv: {path} is no attribute of PS3.6")
        rule = Rule(row["rule"])
        if rule not in _PERMITTED[action_of(tag)]:
            raise ValueError(f"allowlist.csv: {path}: `{rule}` is laxer than action {action_of(tag)} of the profile")
        level[int(tag)] = Allowed(int(tag), keyword, dictionary_VR(tag), rule, row["vocabulary"], _level(rows, f"{path}."))
    return level


ALLOWED: Mapping[int, Allowed] = _read_allow_list()
"""What reaches the archive, by tag, at the root; nested attributes below their sequence. Nothing else does."""


# --- the vocabulary ------------------------------------------------------------------------------------------------------------

_IGNORED = re.compile(r"[\s_\-.,/]+")


def _normal(text: str) -> str:
    return _IGNORED.sub("", text.upper())


@dataclass(frozen=True, slots=True)
class Terms:
    """What one kind of text may say."""

    known: Mapping[str, str]
    """Normalised text -> what is written for it."""
    pattern: re.Pattern[str] | None = None
    otherwise: str = ""
    """Written for an unknown text where an object needs some value."""

    def find(self, text: str) -> str | None:
        """Give the text that is written for `text`; None when it is not known."""
        if self.pattern and self.pattern.fullmatch(text):
            return text
        return self.known.get(_normal(text))


@dataclass(frozen=True, slots=True)
class Coded:
    """A known code."""

    meaning: str
    body_part: str = ""
    """The term of Body Part Examined for it, where there is one."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Everything that a text or a code in the archive may say."""

    terms: Mapping[str, Terms]
    codes: Mapping[str, Mapping[tuple[str, str], Coded]]
    """List -> (coding scheme designator, code value) -> code."""

    @classmethod
    def load(cls, site: Path | None = None) -> Vocabulary:
        """Read the shipped vocabulary and add the site's to it.

        Raises
        ------
        BadSettings
            The site's file is missing or not of the form of vocabulary.toml.
        """
        shipped = _shipped()
        if site is None:
            return shipped
        try:
            raw = tomllib.loads(site.read_text("utf-8"))
        except OSError as error:
            raise BadSettings(f"{site}: the vocabulary cannot be read ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadSettings(f"{site}: not valid TOML: {error}") from None
        try:
            return _vocabulary(raw, onto=shipped)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise BadSettings(f"{site}: not a vocabulary: {error}") from None


@cache
def _shipped() -> Vocabulary:
    nothing = Vocabulary({}, {})
    return _vocabulary(tomllib.loads((HERE / "vocabulary.toml").read_text("utf-8")), onto=nothing)


def _vocabulary(raw: Mapping[str, Any], *, onto: Vocabulary) -> Vocabulary:
    terms, codes = dict(onto.terms), {name: dict(listed) for name, listed in onto.codes.items()}
    is_site = bool(terms)
    if unknown := set(raw) - {"terms", "codes"}:
        raise ValueError(f"unknown table {sorted(unknown)[0]}")
    for name, listed in raw.get("terms", {}).items():
        if is_site and name not in terms:
            raise ValueError(f"there is no list of terms named {name}")
        terms[name] = _terms(name, listed, onto=terms.get(name, Terms({})), is_site=is_site)
    for name, listed in raw.get("codes", {}).items():
        if is_site and name not in codes:
            raise ValueError(f"there is no list of codes named {name}")
        codes.setdefault(name, {}).update(_codes(listed))
    return Vocabulary(terms, codes)


def _terms(name: str, listed: Mapping[str, Any], *, onto: Terms, is_site: bool) -> Terms:
    keys = {"values", "synonyms"} if is_site else {"values", "synonyms", "pattern", "otherwise"}
    if unknown := set(listed) - keys:
        raise ValueError(f"terms.{name}: unknown key {sorted(unknown)[0]}")
    known = {_normal(value): _writable(value) for value in listed.get("values", ())}
    known |= {_normal(typed): _writable(value) for typed, value in listed.get("synonyms", {}).items()}
    pattern = re.compile(listed["pattern"]) if "pattern" in listed else onto.pattern
    return Terms({**onto.known, **known}, pattern, listed.get("otherwise", onto.otherwise))


def _codes(listed: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], Coded]:
    """Read codes, each also under its older SNOMED RT code, in the three designators that were used for it."""
    codes: dict[tuple[str, str], Coded] = {}
    for spelt, (meaning, older, *body_part) in listed.items():
        scheme, _, value = spelt.partition(":")
        coded = Coded(_writable(meaning), _writable(body_part[0]) if body_part and body_part[0] else "")
        codes[(scheme, value)] = coded
        if older:
            codes |= {(designator, older): coded for designator in ("SRT", "SNM3", "99SDM")}
    return codes


def _writable(text: str) -> str:
    """Give back a text that any VR of 64 characters can carry without a character set."""
    if not (0 < len(text) <= 64 and text.isascii() and text.isprintable() and "\\" not in text):
        raise ValueError(f"{text!r} is not 1 to 64 characters of ASCII without a backslash")
    return text


# --- the page ------------------------------------------------------------------------------------------------------------------

PAGE = HERE.parents[1] / "docs" / "pseudonymisation.md"
BEGIN, END = "<!-- generated by `python -m node.receive.profile`: begin -->", "<!-- generated: end -->"
_ACTION_WORDS = {
    "X": "removed",
    "Z": "emptied or replaced",
    "D": "replaced",
    "U": "UID replaced",
    "U*": "sequence kept, UIDs replaced",
    "K": "kept",
    "C": "cleaned",
    "": "no row",
}


def generated() -> str:
    """Write the part of the page that follows from the data: codes, allow-list, and the table row by row."""
    lines = ["### Codes in (0012,0064)", "", "| code (DCM) | meaning |", "| --- | --- |"]
    lines += [f"| {code} | {meaning} |" for code, meaning in METHOD_CODES.items()]
    lines += ["", "### What reaches the archive", ""]
    lines += ["| tag | attribute | VR | rule | vocabulary | profile |", "| --- | --- | --- | --- | --- | --- |"]
    lines += _allowed_lines(ALLOWED, "")
    lines += ["", "### The rules", "", "| rule | meaning |", "| --- | --- |"]
    lines += [f"| {rule} | {SENTENCES[rule]} |" for rule in Rule]
    lines += ["", "### Table E.1-1, row by row", ""]
    lines += ["| tag | attribute | basic action | with our options | in the archive |", "| --- | --- | --- | --- | --- |"]
    kept = _kept_rules(ALLOWED)
    for row in table():
        rules = " / ".join(sorted(kept.get(row.tag, {"-"})))
        lines.append(f"| {row.tag} | {row.name} | {row.basic} | {row.action} ({_ACTION_WORDS[row.action]}) | {rules} |")
    return "\n".join(lines)


def _allowed_lines(level: Mapping[int, Allowed], indent: str) -> list[str]:
    lines: list[str] = []
    for tag, allowed in sorted(level.items()):
        action = _ACTION_WORDS[action_of(tag)]
        name = f"{indent}{dictionary_description(tag)}"
        lines.append(f"| {told(tag)} | {name} | {allowed.vr} | {allowed.rule} | {allowed.vocabulary} | {action} |")
        lines += _allowed_lines(allowed.items, f"{indent}> ")
    return lines


def _kept_rules(level: Mapping[int, Allowed]) -> dict[str, set[str]]:
    """Gather the rules under which an attribute is in the allow-list, at any level."""
    kept: dict[str, set[str]] = {"(0002,0003)": {"uid"}}
    for tag, allowed in level.items():
        kept.setdefault(told(tag), set()).add(allowed.rule.value)
        for nested, rules in _kept_rules(allowed.items).items():
            kept.setdefault(nested, set()).update(rules)
    return kept


def with_generated(page: str) -> str:
    """Put the generated part into the page, between its two marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{generated()}\n\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(with_generated(PAGE.read_text("utf-8")), "utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
