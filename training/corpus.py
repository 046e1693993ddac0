"""What a run learns from and is judged by: a frozen, digested list of images.

In: the catalogue's images and labels, the cache. Out: the training list and the locked list, apart, or the pool that is learned
from without labels; and for every image that is left out the reason. Locked patients must never be in the training list nor in
the pool; nothing of a patient but pseudonym, age and sex is read here.

Images that do not train (docs/design.md, promise 14): without a label, with labels that contradict each other, on or after the
day of the patient's first treatment, blank, unreadable, the same picture twice, or outside what the node answers. The pool takes
any readable radiograph, but blank ones and copies.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import Final
from node.keep.cache import NO_ROW, Cache
from node.keep.records import Label, TrainingImage
from training.recipe import Recipe, uniforms

RADIOGRAPHS = ("CR", "DX")
_OTHER_PICTURES = "the cache does not hold the pictures of the frozen list; delete the cache and start again"


class NotEnough(Final):
    """There are too few labelled patients for a run."""


class CorpusChanged(Final):
    """An image of the frozen corpus is not what it was; start a new run."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """An image that may be used as far as header and labels tell; its pixels were not looked at yet."""

    image: TrainingImage
    target: int
    """Index of the class."""
    treated_on: str
    """First treatment of the patient (YYYYMMDD, shifted as the archive's dates are), empty when none is known."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of the frozen list."""

    sop_uid: str
    study_uid: str
    pid: str
    """Of the person: merged patients have one."""
    target: int
    age_years: int | None
    sex: str
    digest: str
    """SHA-256 of the decoded picture."""
    mean: float
    spread: float
    manufacturer: str = ""
    """Of the equipment, as the header states it; empty when it does not."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The frozen lists of one run, each sorted by UID."""

    training: tuple[Sample, ...]
    locked: tuple[Sample, ...]
    left_out: Mapping[str, int]
    """Images by the reason they are in neither list."""

    @property
    def digest(self) -> str:
        """SHA-256 of the training list."""
        return _digest([_told(sample) for sample in self.training])

    @property
    def locked_digest(self) -> str:
        """SHA-256 of the locked list."""
        return _digest([_told(sample) for sample in self.locked])

    @property
    def label_digest(self) -> str:
        """SHA-256 of the labels of the training list."""
        return _digest([[sample.sop_uid, sample.target] for sample in self.training])

    @property
    def patients(self) -> tuple[str, ...]:
        """Pseudonyms in the training list, sorted."""
        return tuple(sorted({sample.pid for sample in self.training}))

    def to_plain(self) -> dict[str, Any]:
        """Give everything as plain values, with the digests beside it."""
        return asdict(self) | {"digest": self.digest, "locked_digest": self.locked_digest, "label_digest": self.label_digest}

    @classmethod
    def from_plain(cls, raw: Mapping[str, Any]) -> Corpus:
        """Read back what `to_plain` gave; a list that was edited is refused."""
        training, locked = (tuple(Sample(**sample) for sample in raw[name]) for name in ("training", "locked"))
        corpus = cls(training, locked, raw["left_out"])
        if (corpus.digest, corpus.locked_digest) != (raw.get("digest"), raw.get("locked_digest")):
            raise CorpusChanged("the frozen corpus list of this run was changed; start a new run")
        return corpus


@dataclass(frozen=True, slots=True)
class Fold:
    """Which patients one fold is validated and tested on; it trains on the others."""

    validation: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pooled:
    """One image to learn from without a label."""

    sop_uid: str
    pid: str
    """Of the person: merged patients have one."""
    digest: str
    """SHA-256 of the decoded picture."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The frozen list of a pretraining, sorted by UID."""

    images: tuple[Pooled, ...]
    left_out: Mapping[str, int]
    """Images by the reason they are not in the list."""

    @property
    def digest(self) -> str:
        """SHA-256 of the list."""
        return _digest([asdict(image) for image in self.images])

    @property
    def patients(self) -> tuple[str, ...]:
        """Pseudonyms in the list, sorted."""
        return tuple(sorted({image.pid for image in self.images}))

    def to_plain(self) -> dict[str, Any]:
        """Give everything as plain values, with the digest beside it."""
        return asdict(self) | {"digest": self.digest}

    @classmethod
    def from_plain(cls, raw: Mapping[str, Any]) -> Pool:
        """Read back what `to_plain` gave; a list that was edited is refused."""
        found = cls(tuple(Pooled(**image) for image in raw["images"]), raw["left_out"])
        if found.digest != raw.get("digest"):
            raise CorpusChanged("the frozen list of images of this pretraining was changed; start a new run")
        return found


@dataclass(frozen=True, slots=True)
class Split:
    """Whose images train, whose stop the training, and whose tell how good it became; nobody is on two sides."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        everybody = [*self.train, *self.validation, *self.test]
        if len(set(everybody)) != len(everybody):
            raise CorpusChanged("a patient is on two sides of the frozen split; start a new run")

    def to_plain(self) -> dict[str, Any]:
        """Give the three sides as plain values."""
        return asdict(self)

    @classmethod
    def from_plain(cls, raw: Mapping[str, Any]) -> Split:
        """Read back what `to_plain` gave."""
        return cls(tuple(raw["train"]), tuple(raw["validation"]), tuple(raw["test"]))


def choose(images: Iterable[TrainingImage], labels: Iterable[Label], recipe: Recipe) -> tuple[list[Chosen], Counter[str]]:
    """Pick the images that header and labels allow; count the others by reason."""
    classes = {label.name: index for index, label in enumerate(recipe.classes)}
    images = list(images)
    told, treated = _labels(labels, {image.study_uid: image.person for image in images})
    chosen, left_out = [], Counter[str]()
    for image in images:
        said = told.get(image.sop_uid) or told.get(image.study_uid) or set()
        days = treated.get(image.person, {})
        if reason := _unfit(image, said, classes, recipe):
            left_out[reason] += 1
        elif days.keys() - {image.dated_as}:  # merged patients: each one's dates are shifted by another offset
            left_out["first treatment known under another number of the patient"] += 1
        else:
            chosen.append(Chosen(image, classes[next(iter(said))], days.get(image.dated_as, "")))
    return chosen, left_out


def freeze(chosen: Iterable[Chosen], left_out: Mapping[str, int], cache: Cache, recipe: Recipe) -> Corpus:
    """Look at the pictures of the chosen images and write the lists that the run is bound to."""
    counted = Counter(left_out)
    kept: list[tuple[Chosen, Sample]] = []
    for one in chosen:
        row = cache.get(one.image.sop_uid)
        if row is None or row.row == NO_ROW:
            counted["unreadable"] += 1
        elif row.spread < recipe.blank_below:
            counted["blank or nearly so"] += 1
        elif one.treated_on and not row.taken_on:
            counted["first treatment known, date of the image not"] += 1
        elif one.treated_on and row.taken_on >= one.treated_on:
            counted["on or after the day of first treatment"] += 1
        else:
            image = one.image
            sample = Sample(
                sop_uid=image.sop_uid,
                study_uid=image.study_uid,
                pid=image.person,
                target=one.target,
                age_years=image.age_years,
                sex=image.sex,
                digest=row.digest,
                mean=row.mean,
                spread=row.spread,
                manufacturer=row.manufacturer,
            )
            kept.append((one, sample))
    unique = _without_duplicates(kept, counted)
    return Corpus(
        training=tuple(sample for one, sample in unique if not one.image.locked),
        locked=tuple(sample for one, sample in unique if one.image.locked),
        left_out=dict(sorted(counted.items())),
    )


def require_enough(corpus: Corpus, recipe: Recipe) -> None:
    """Refuse a run whose classes cannot fill the folds.

    Raises
    ------
    NotEnough
        With the patients of each class, what was left out, and what to do.
    """
    counts = _patients_by_class(corpus.training, recipe)
    if min(counts.values()) >= recipe.folds:
        return
    locked = _patients_by_class(corpus.locked, recipe)
    have = ", ".join(f"{name} {count} (and {locked[name]} locked)" for name, count in counts.items())
    out = "; ".join(f"{reason}: {count}" for reason, count in corpus.left_out.items()) or "none"
    raise NotEnough(
        f"recipe {recipe.name} needs {recipe.folds} labelled patients outside the locked set in each class; there are: {have}. "
        f"Images left out: {out}. Import labels with `osteon labels import FILE` (classes: {', '.join(counts)})"
    )


def make_folds(samples: Sequence[Sample], recipe: Recipe) -> list[Fold]:
    """Deal the patients of each class over the folds; fold i is tested on part i and validated on part i + 1."""
    class_of = {sample.pid: sample.target for sample in sorted(samples, key=lambda sample: sample.target in recipe.urgent)}
    parts: list[list[str]] = [[] for _ in range(recipe.folds)]
    dealt = 0
    for index in range(len(recipe.classes)):
        patients = sorted(pid for pid, target in class_of.items() if target == index)
        for _, pid in sorted(zip(uniforms(recipe.seed, "fold", 0, patients)[:, 0], patients, strict=True)):
            parts[dealt % recipe.folds].append(pid)
            dealt += 1
    whole = [tuple(sorted(part)) for part in parts]
    return [Fold(validation=whole[(index + 1) % recipe.folds], test=whole[index]) for index in range(recipe.folds)]


def pool(images: Iterable[TrainingImage], cache: Cache, *, blank_below: float) -> Pool:
    """Pick what can be learned from without labels: every readable radiograph, of any age and body part, but of locked patients.

    Of one picture under several UIDs the first UID is kept; none, when a copy belongs to a locked patient. A locked patient's
    picture is known by its stored bytes, and also by its decoded ones where the cache has them (for the evaluation).
    """
    images = sorted(images, key=lambda image: image.sop_uid)
    locked = {image.pixel_digest for image in images if image.locked}
    locked |= {row.digest for image in images if image.locked and (row := cache.get(image.sop_uid)) and row.row != NO_ROW}
    kept: dict[str, Pooled] = {}
    left_out = Counter[str]()
    for image in images:
        row = cache.get(image.sop_uid)
        if image.locked:
            left_out["locked patient"] += 1
        elif image.modality not in RADIOGRAPHS:
            left_out["other modality"] += 1
        elif image.pixel_digest in locked:
            left_out["the same picture as a locked patient's"] += 1
        elif row is None:
            left_out["not decoded"] += 1
        elif row.row == NO_ROW:
            left_out[f"corrupt: {_in_short(row.problem)}"] += 1
        elif row.digest in locked:
            left_out["the same picture as a locked patient's"] += 1
        elif row.spread < blank_below:
            left_out["blank or nearly so"] += 1
        elif row.digest in kept:
            left_out["the same picture again"] += 1
        else:
            kept[row.digest] = Pooled(image.sop_uid, image.person, row.digest)
    return Pool(tuple(kept.values()), dict(sorted(left_out.items())))


def split(patients: Iterable[str], seed: int, shares: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> Split:
    """Deal patients over training, validation and test by their shares; validation and test have one at least.

    Raises
    ------
    NotEnough
        One of the three would be empty.
    """
    pids = sorted(set(patients))
    dealt = [pid for _, pid in sorted(zip(uniforms(seed, "split", 0, pids)[:, 0], pids, strict=True))]
    validation, test = (max(1, round(share / sum(shares) * len(dealt))) for share in shares[1:])
    train = len(dealt) - validation - test
    if train < 1:
        raise NotEnough(f"{len(dealt)} patients are too few for training, validation and test")
    sides = dealt[:train], dealt[train : train + validation], dealt[train + validation :]
    return Split(*(tuple(sorted(side)) for side in sides))


def mapped(images: Sequence[Pooled | Sample], cache: Cache) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Map the decoded pictures and hold each against the frozen list, one after the other and never all in memory.

    Returns
    -------
    tuple[NDArray[np.uint8], NDArray[np.int64]]
        All pictures of the cache (rows, size, size), read-only; and which row each of `images` is, in their order. Only these
        rows may be looked at: locked patients have theirs in the same file.

    Raises
    ------
    CorpusChanged
        A picture is gone or another one.
    """
    _require_known(images, cache)
    whole, rows = cache.mapped([image.sop_uid for image in images])
    for at in np.argsort(rows):  # as they lie on the disk
        if hashlib.sha256(whole[rows[at]]).hexdigest() != images[at].digest:
            raise CorpusChanged(_OTHER_PICTURES)
    return whole, rows


def pictures(samples: Sequence[Sample], cache: Cache) -> NDArray[np.uint8]:
    """Read the decoded pictures (n, size, size) and hold each against the frozen list.

    Raises
    ------
    CorpusChanged
        A picture is gone or another one.
    """
    _require_known(samples, cache)
    rows = cache.pixels([sample.sop_uid for sample in samples])
    if any(hashlib.sha256(row.tobytes()).hexdigest() != sample.digest for row, sample in zip(rows, samples, strict=True)):
        raise CorpusChanged(_OTHER_PICTURES)
    return rows


def _require_known(images: Sequence[Pooled | Sample], cache: Cache) -> None:
    known = [cache.get(image.sop_uid) for image in images]
    if any(row is None or row.digest != image.digest for row, image in zip(known, images, strict=True)):
        raise CorpusChanged


def _labels(labels: Iterable[Label], person_of: Mapping[str, str]) -> tuple[dict[str, set[str]], dict[str, dict[str, str]]]:
    """Give the labels by image or study UID, and each person's first treatment by the pseudonym whose offset shifts the day."""
    told: dict[str, set[str]] = {}
    treated: dict[str, dict[str, str]] = {}
    for label in labels:
        told.setdefault(label.sop_uid or label.study_uid, set()).add(label.label)
        if label.first_treatment_on:
            day = label.first_treatment_on.replace("-", "")
            days = treated.setdefault(person_of.get(label.study_uid, label.pid), {})
            days[label.pid] = min(day, days.get(label.pid, day))
    return told, treated


def _unfit(image: TrainingImage, said: set[str], classes: Mapping[str, int], recipe: Recipe) -> str:
    """Say why header or labels rule an image out, empty when they do not."""
    if not said:
        return "no label"
    if len(said) > 1:
        return "labels that contradict each other"
    if not said <= classes.keys():
        return f"label {next(iter(said))!r} is no class of the recipe"
    if image.modality not in recipe.modalities:
        return "other modality"
    if image.age_years is None and not recipe.takes_unknown_age:
        return "age unknown"
    if image.age_years is not None and image.age_years >= recipe.max_age:
        return "adult"
    if image.body_part and image.body_part not in recipe.body_parts:
        return "other body part"
    return ""


def _without_duplicates(kept: Sequence[tuple[Chosen, Sample]], counted: Counter[str]) -> list[tuple[Chosen, Sample]]:
    """Keep each picture once: that of a locked patient first; none when the copies carry different labels."""
    copies: dict[str, list[tuple[Chosen, Sample]]] = {}
    for pair in sorted(kept, key=lambda pair: (not pair[0].image.locked, pair[1].sop_uid)):
        copies.setdefault(pair[1].digest, []).append(pair)
    unique = []
    for same in copies.values():
        if len({sample.target for _, sample in same}) > 1:
            counted["the same picture under different labels"] += len(same)
            continue
        unique.append(same[0])
        if len(same) > 1:
            counted["the same picture again"] += len(same) - 1
    return sorted(unique, key=lambda pair: pair[1].sop_uid)


def _patients_by_class(samples: Sequence[Sample], recipe: Recipe) -> dict[str, int]:
    return {
        label.name: len({sample.pid for sample in samples if sample.target == index})
        for index, label in enumerate(recipe.classes)
    }


def _told(sample: Sample) -> dict[str, Any]:
    """Give the fields of a sample for its digest; lists that are older than `manufacturer` keep theirs."""
    plain = asdict(sample)
    if not plain["manufacturer"]:
        del plain["manufacturer"]
    return plain


def _in_short(problem: str) -> str:
    """Give the class of a reason: what stands before the particulars."""
    return re.split(r"[;(]", problem)[0].strip()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
