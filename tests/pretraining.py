"""What tests of the pretraining share: small galleries, a small site and recipe, results held against each other to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from labelled import SMALLEST, labelled_site, put, texture
from torch import nn

from models.card import Metric
from models.networks import Network
from training import checkpoint, evaluate, upstream
from training.engine import Engine
from training.pretrain import Gallery, Line, Part
from training.ranks import Ranks
from training.recipe import Classifier, Pretraining, Recipe

SIZE_PX = 32
WIDTH = 32
CLOCKS = {"seconds", "clustering_s"}


def network(classes: int) -> Network:
    """Build a small network of random weights from torch's generator."""
    widths = (1, 8, 16, WIDTH)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return Network(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), WIDTH, classes, mean=0.449, spread=0.226)


def gallery(count: int = 60, *, seed: int = 0) -> Gallery:
    """Draw pictures of two textures; their rows lie in another order than the pictures."""
    rows = np.stack([(texture(one % 2, seed + one, SIZE_PX) >> 4).astype(np.uint8) for one in range(count)])
    return Gallery(rows[::-1].copy(), np.arange(count)[::-1].copy(), tuple(f"2.25.{seed}.{one}" for one in range(count)))


def part(*, batch: int = 16, **options: Any) -> Part:
    """Give one process on the CPU in float32."""
    return Part(Engine(), Ranks(), threads=1, seed=7, size_px=SIZE_PX, batch=batch, **options)


def timeless(lines: Sequence[Line]) -> list[Line]:
    """Give the lines of epochs without what a clock says in them."""
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def journal(file: Path) -> list[Line]:
    """Read the lines of epochs without what a clock says in them."""
    return timeless([json.loads(line) for line in file.read_text().splitlines()])


def require_same(one: Any, other: Any, at: str = "state") -> None:
    """Hold two states against each other, all that is in them, to the bit; but what a clock says."""
    assert type(one) is type(other), at
    if isinstance(one, Mapping):
        names = one.keys() - CLOCKS
        assert names == other.keys() - CLOCKS, at
        for name in names:
            require_same(one[name], other[name], f"{at}/{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), at
        for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            require_same(mine, theirs, f"{at}/{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), at
    else:
        assert one == other, at


TINY: Recipe = replace(
    SMALLEST,
    network="resnet18",
    start="random",
    frozen=0,
    pretraining=Pretraining(
        clusters=4,
        epochs=3,
        batch=8,
        lr=0.02,
        dims=8,
        probe_every=1,
        nmi_min=0.0,
        largest_max=1.0,
        alike_max=1.0,
        classifier=Classifier(epochs=2, batch=8, lr=0.02),
    ),
)
"""A recipe that pretrains in a second or two, from random weights."""
EIGHT_EPOCHS: Recipe = replace(
    TINY, pretraining=replace(TINY.pretraining or Pretraining(), epochs=8, classifier=Classifier(epochs=6, batch=8, lr=0.02))
)
"""One that can be stopped more often."""
SAID: dict[str, float | None] = {"apart": 0.05}
"""By how much the probes find what was learned better than its start, once `make_steady` was asked; None: as they really do."""
UNLABELLED = (30, 31, 32, 33, 34)
LOCKED_UNLABELLED = 35


def make_steady(put: Callable[[Any, str, Any], None]) -> None:
    """Let runs be held against each other: small networks, in float32, whose probes say what `SAID` says."""
    from models import networks
    from training import cycle

    really = evaluate.difference

    def told(candidate: Any, other: Any, of: str, **options: Any) -> Metric | None:
        found, apart = really(candidate, other, of, **options), SAID["apart"]
        return found if found is None or apart is None or "pretrained minus start" not in of else replace(found, value=apart)

    def small(_arch: str, classes: int, *_start: str, **_options: object) -> Network:
        return network(classes)

    for owner in (networks, cycle, upstream):
        put(owner, "build", small)
    put(upstream, "REPEATS", 2)
    put(upstream, "chosen", lambda *_args, **_options: Engine())
    put(evaluate, "difference", told)


def is_locked(patient: int) -> bool:
    """Say which of the labelled patients are locked."""
    return patient % 3 == 0


def site_to_pretrain(folder: Path, **sections: Any) -> Path:
    """Make a site with 24 labelled patients, 8 of them locked, and some without a label."""
    site = labelled_site(folder, patients=24, is_locked=is_locked, **sections)
    for patient in (*UNLABELLED, LOCKED_UNLABELLED):
        put(site, patient, kind=patient % 2, locked=patient == LOCKED_UNLABELLED)
    return site


def require_same_pretraining(one: Path, other: Path) -> None:
    """Hold two `pretrain` folders against each other: states, clusters, figures, and the very bytes of the backbone."""
    for name in ("state.pt", "classifier.pt"):
        require_same(checkpoint.load(one / name), checkpoint.load(other / name), name)
    for name in ("metrics.jsonl", "classifier.jsonl"):
        assert journal(one / name) == journal(other / name), name
    for name in ("classifier.json", "probe.json"):
        assert json.loads((one / name).read_bytes()) == json.loads((other / name).read_bytes()), name
    with np.load(one / "clusters.npz") as mine, np.load(other / "clusters.npz") as theirs:
        assert set(mine.files) == set(theirs.files)
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine.files)
    assert (one / "backbone.pt").read_bytes() == (other / "backbone.pt").read_bytes()
