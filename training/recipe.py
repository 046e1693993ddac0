"""Frozen recipes: everything about a run that is science and not site.

In: a name. Out: a `Recipe` that never changes afterwards; its digest is in the card of each model it made. A recipe's
docstring states the result it is expected to reach, before any run. No clock, no disk, no randomness but `uniforms`,
which is a hash.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.card import Code, Label
from models.errors import Final


class NoSuchRecipe(Final):
    """There is no recipe of this name."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How far an image may be changed during training."""

    flip: bool = True
    """Mirror left and right, half of the time."""
    shift: float = 0.06
    """Largest shift along each axis, as a share of the side."""
    rotate_deg: float = 10.0
    brightness: float = 0.08
    """Largest offset of the grey values, of a range of 1."""
    contrast: float = 0.15
    """Largest relative change of the grey values."""


@dataclass(frozen=True, slots=True)
class Views:
    """How a radiograph is seen during pretraining: a part of it, mirrored, a little brighter or darker."""

    scale_min: float = 0.4
    """Smallest share of the area that a view shows; for photographs 0.08 is usual, a radiograph would lose its bone."""
    scale_max: float = 1.0
    flip: bool = True
    brightness: float = 0.08
    contrast: float = 0.15
    small: int = 0
    """Further small views of each image (multi-crop, `deepcluster2` only)."""
    small_px: int = 96
    small_scale_min: float = 0.15
    small_scale_max: float = 0.4


@dataclass(frozen=True, slots=True)
class Classifier:
    """Step two: a network is trained to tell the clusters apart."""

    epochs: int = 500
    batch: int = 512
    lr: float = 0.05


@dataclass(frozen=True, slots=True)
class Pretraining:
    """What is learned from all images without any label (Caron et al., ECCV 2018 and NeurIPS 2020)."""

    method: Literal["deepcluster", "deepcluster2"] = "deepcluster"
    clusters: int = 1000
    epochs: int = 100
    batch: int = 256
    """Over all processes."""
    lr: float = 0.05
    """`deepcluster2` lets it rise for a tenth of the epochs and fall as a cosine."""
    momentum: float = 0.9
    weight_decay: float = 1e-5
    iterations: int = 20
    """Of k-means."""
    dims: int = 256
    """Principal components that `deepcluster` clusters, and width of the embedding of `deepcluster2`."""
    temperature: float = 0.1
    """Of the softmax over the prototypes of `deepcluster2`."""
    smallest: int = 2
    """Clusters of fewer images are dissolved."""
    views: Views = field(default_factory=Views)
    classifier: Classifier = field(default_factory=Classifier)
    probe_every: int = 5
    """Epochs between two looks of the probes; they look at the start and at the end in any case."""
    nmi_min: float = 0.1
    """Below this agreement of consecutive assignments the run stops, from the fifth epoch on."""
    largest_max: float = 0.5
    """Above this share of the images in one cluster the run stops."""
    alike_max: float = 0.25
    """Above this share of images with one and the same features the run stops: k-means would deal them out at random."""
    empty_max: float = 0.5
    """Above this share of empty clusters the run stops."""

    def __post_init__(self) -> None:
        if self.clusters < 2 or self.epochs < 1 or self.batch < 2:
            raise ValueError("pretraining needs two clusters, one epoch and a batch of two or more")
        if self.views.small and self.method != "deepcluster2":
            raise ValueError("small views belong to deepcluster2")

    @property
    def digest(self) -> str:
        """SHA-256 of all values."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def images_min(self) -> int:
        """Images without which so many clusters mean nothing."""
        return 4 * self.clusters


@dataclass(frozen=True, slots=True)
class Gate:
    """What a candidate has to show on the locked patients, fixed before the run (docs/design.md, promise 11)."""

    margin: float = 0.05
    """By how much of the AUC a candidate may seem worse and still count as not worse."""
    alpha: float = 0.05
    """Intervals are of 1 - alpha, two-sided."""
    gate_min: int = 30
    """Locked patients in the smaller class below which the gate promotes nothing by itself."""
    draws: int = 2000
    """Resamplings of the patients for an interval."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to make a model."""

    name: str
    expects: str
    """The result it is expected to reach, in words."""
    classes: tuple[Label, ...]
    """In the order of the logits; exactly the names that a label table may use."""
    body_parts: tuple[str, ...]
    """Vocabulary terms of the body parts the model may see; an image that states none is taken."""
    max_age: int = 18
    """Patients of fewer completed years."""
    takes_unknown_age: bool = False
    """Whether images without an age train: for sets that state none. In service such a study is not answered all the same."""
    modalities: tuple[str, ...] = ("CR", "DX")
    network: str = "efficientnet_lite0"
    start: Literal["imagenet", "random"] = "imagenet"
    size_px: int = 160
    frozen: int = 0
    """Leading stages of the network that keep their start weights."""
    folds: int = 10
    """Each patient is in one test fold and one validation fold; 10 folds are 80/10/10."""
    epochs: int = 40
    patience: int = 8
    """Epochs without a better validation loss after which a fold stops."""
    repeats: int = 1
    """Fits of each fold with different seeds; the final model is one network or their mean, whichever the folds speak for."""
    batch: int = 16
    lr: float = 1e-4
    """Of the backbone; with batch norm held still, 3e-4 makes EfficientNet-Lite0 lose again what it had learned."""
    head_lr: float = 1e-3
    weight_decay: float = 1e-2
    seed: int = 20260117
    augmentation: Augmentation = field(default_factory=Augmentation)
    gate: Gate = field(default_factory=Gate)
    pretraining: Pretraining | None = None
    """What comes before fine-tuning; None: the start weights are fine-tuned as they are."""
    blank_below: float = 3.0
    """Standard deviation of the grey levels (0…255) below which an image counts as blank."""
    licence: str = "Research use only; weights inherit the licences of the site's own images."
    limits: tuple[str, ...] = ()
    """What a reader of the card must know."""

    def __post_init__(self) -> None:
        names = [label.name for label in self.classes]
        if len(names) < 2 or len(set(names)) != len(names):
            raise ValueError("a recipe needs two or more classes of different names")
        if not any(label.urgent for label in self.classes) or all(label.urgent for label in self.classes):
            raise ValueError("a recipe needs an urgent class and another one")
        if self.folds < 3:
            raise ValueError("three folds or more: one to train on, one to validate, one to test")

    @property
    def digest(self) -> str:
        """SHA-256 of all values."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def urgent(self) -> tuple[int, ...]:
        """Indices of the urgent classes."""
        return tuple(index for index, label in enumerate(self.classes) if label.urgent)


LIMBS = (
    "ACJOINT", "ANKLE", "ARM", "CALCANEUS", "CALF", "CLAVICLE", "ELBOW", "EXTREMITY", "FEMUR", "FIBULA", "FINGER", "FOOT",
    "FOREARM", "HAND", "HIP", "HUMERUS", "ILIUM", "ISCHIUM", "KNEE", "LEG", "LEGS", "LOWERLEG",
    "LOWERLIMB", "METACARPUS", "METATARSUS", "NAVICULAR", "PATELLA", "PELVIS", "PELVISLOWEXTREMT", "PUBIS", "RADIUS",
    "RADIUSULNA", "SACRUM", "SCAPULA", "SHOULDER", "SIJOINT", "TALUS", "THIGH", "THUMB", "TIBIA", "TIBIAFIBULA", "TOE", "ULNA",
    "UPPERARM", "UPPERLIMB", "WRIST",
)  # fmt: skip
"""Limbs, shoulder girdle and pelvis, where both diseases of the first task are seen."""

EWING = Label(
    name="ewing_sarcoma",
    code=Code("307608006", "SCT", "Ewing's sarcoma of bone"),
    probability=Code("P-EWING", "99OSTEON", "AI probability of Ewing's sarcoma"),
    urgent=True,
)
OSTEOMYELITIS = Label(
    name="acute_osteomyelitis",
    code=Code("409780002", "SCT", "Acute osteomyelitis"),
    probability=Code("P-OSTEOMYELITIS", "99OSTEON", "AI probability of acute osteomyelitis"),
)


_LIMITS = (
    "Knows two diagnoses only: an image that shows neither still gets one of them.",
    "Patients under 18, plain radiographs of limbs and pelvis.",
    "Research use only.",
)


def ewing_small() -> Recipe:
    """Ewing sarcoma against acute osteomyelitis from a small labelled set, ImageNet start.

    Expected: with some 40 + 20 labelled patients a test accuracy near 0.71 (the ImageNet arm of the study in
    docs/training.md reports 70.8 % with a ResNet50), with an interval of ±0.1 or more. Hours on a GPU are not needed:
    half an hour on two CPU cores.
    """
    return Recipe(
        name="ewing_small",
        expects=_expectation(ewing_small),
        classes=(EWING, OSTEOMYELITIS),
        body_parts=LIMBS,
        repeats=3,
        limits=_LIMITS,
    )


def ewing() -> Recipe:
    """Ewing sarcoma against acute osteomyelitis: the study's pipeline with the study's hyper-parameters.

    DeepCluster with 1000 clusters on everything in the archive; a ResNet-50 that starts from ImageNet learns the cluster numbers
    (80/10/10, batch 512, learning rate 0.05, 500 epochs); fine-tuning on the labelled images (80/10/10 by patient, batch 4,
    learning rate 1e-4, 100 epochs). What the study does not state (optimiser of the fine-tuning, number of folds, seeds of each,
    epochs of DeepCluster, image size) is ours: AdamW, ten folds, three seeds, 100, 224 pixels.

    Expected: with 42,608 images of the archive and 41 + 22 labelled patients a test accuracy near 0.88 (the study reports
    88.1 %, and 70.8 % for ImageNet weights alone), with an interval of ±0.1 or more; the study's 7.5 h on four A100 for
    pretraining and 2 h for fine-tuning are the upper ends of what it takes.
    """
    return Recipe(
        name="ewing",
        expects=_expectation(ewing),
        classes=(EWING, OSTEOMYELITIS),
        body_parts=LIMBS,
        network="resnet50",
        size_px=224,
        epochs=100,
        patience=100,
        repeats=3,
        batch=4,
        lr=1e-4,
        head_lr=1e-4,
        pretraining=Pretraining(),
        limits=_LIMITS,
    )


def phantom() -> Recipe:
    """Learn the phantoms of the demo: proof of plumbing, no medicine.

    Expected: an out-of-fold AUC clearly above chance (0.75 to 1.0) on 128 phantom patients, the whole cycle in less than 200 s on
    two cores. Whether its pretraining is of use is left to the probes.
    """
    return Recipe(
        name="phantom",
        expects=_expectation(phantom),
        classes=(EWING, OSTEOMYELITIS),
        body_parts=LIMBS,
        folds=5,
        epochs=5,
        patience=3,
        frozen=9,
        lr=5e-4,
        # of two hundred pictures more components would be noise, whitened; and a larger learning rate loses what ImageNet taught
        pretraining=Pretraining(
            clusters=8, epochs=4, batch=32, lr=0.001, dims=12, probe_every=4, classifier=Classifier(epochs=6, batch=32, lr=0.003)
        ),
        limits=("Trained on invented phantoms: its answers mean nothing for any patient.", "Research use only."),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"ewing": ewing, "ewing_small": ewing_small, "phantom": phantom}


def named(name: str) -> Recipe:
    """Give the recipe of this name.

    Raises
    ------
    NoSuchRecipe
        With the names there are.
    """
    if name not in RECIPES:
        raise NoSuchRecipe(f"there is no recipe {name!r}; there are: {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()


def _expectation(made_by: Callable[[], Recipe]) -> str:
    text = inspect.getdoc(made_by) or ""
    return " ".join(text.split("Expected:", 1)[1].split())


def uniforms(seed: int, purpose: str, epoch: int, ids: Sequence[str], count: int = 1) -> NDArray[np.float64]:
    """Draw `count` (1 to 8) uniform numbers in [0, 1) for each id: (n, count), the same for ever, in any order of ids."""
    drawn = [hashlib.blake2b(json.dumps([seed, purpose, epoch, one]).encode(), digest_size=8 * count).digest() for one in ids]
    whole = np.frombuffer(b"".join(drawn), ">u8").reshape(len(ids), count)
    return (whole >> np.uint64(11)).astype(np.float64) / 2**53


def seed_for(seed: int, purpose: str, epoch: int = 0) -> int:
    """Derive the seed of a library's generator."""
    return int(uniforms(seed, purpose, epoch, [""])[0, 0] * 2**53) % 2**63
