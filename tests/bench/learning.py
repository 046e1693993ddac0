"""The parts of `make bench-train`: each times one promise of the trainer.

In: a `Bench`. Out: `Result`s, a line of the table each. What is measured is the product's own code with its own choices: recipe,
engine by the self-test, draws; nothing of it is rebuilt here. Never imported before `training.__main__` has prepared the process.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import drawn
import numpy as np
import quiet
import torch
from classic import Classic
from drawn import Shown
from numpy.typing import NDArray
from scipy import stats
from torch import nn
from torchvision.models import get_model

from models.networks import Network, build, with_backbone
from training import cluster, corpus, finetune, pretrain, probe
from training.augment import plain
from training.corpus import Sample
from training.engine import Engine, chosen
from training.finetune import Pictures
from training.pretrain import Gallery, Part
from training.ranks import Ranks
from training.recipe import Pretraining, Recipe, Views, named, uniforms
from training.views import DRAWS, view

SEED = 20260117
TRY_BATCH = 16
"""Of the self-test that picks the engine, as a run has it."""
STUDY_IMAGES, STUDY_WIDTH, STUDY_CLUSTERS, STUDY_DIMS = 42_608, 2048, 1000, 256
FINE_URGENT, FINE_OTHER = 41, 22
"""Labelled images of the study."""


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    what: str
    ours: str
    """What Osteon takes."""
    beside: str
    """What it is held against takes."""
    figure: float
    """What is judged."""
    unit: str
    target: float
    at_least: bool
    """Whether more is better."""
    foreign: float | None
    """Share of the processors that others used in the samples that count; None where no time is judged."""
    said: str = ""
    """What a reader must know of the figure."""
    samples: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the figure reaches its target."""
        return self.figure >= self.target if self.at_least else self.figure <= self.target

    @property
    def disturbed(self) -> bool:
        """Whether others used so much of the machine that the time says little."""
        return self.foreign is not None and self.foreign > quiet.FOREIGN_MAX


@dataclass(frozen=True)
class Bench:
    """What every part gets."""

    folder: Path
    """For pictures; gone afterwards."""
    quick: bool
    """Only whether each part works."""
    whole: bool
    """Fine-tune all folds over all epochs."""
    data: Path | None
    """Folder with real sets."""
    say: Callable[[str], None]

    def pictures(self, count: int, size_px: int) -> Shown:
        """Give so many invented pictures."""
        return drawn.invented(self.folder, count, size_px, self.say)


class Pretrainer:
    """The product's pretraining, an epoch at a time: each call goes on from the last state."""

    def __init__(
        self, backbone: Callable[[int], Network], gallery: Gallery, how: Pretraining, size_px: int, engine: Engine, seed: int
    ) -> None:
        self._build, self._gallery, self._how = backbone, gallery, how
        threads = torch.get_num_threads()
        self._part = Part(engine, Ranks(), threads, seed, size_px, how.batch)
        self._state: pretrain.State | None = None
        self._done = 0

    def epoch(self) -> float:
        """Train an epoch; give its seconds as they stand in metrics.jsonl: cluster phase, training, no probe."""
        self._done += 1
        how = replace(self._how, epochs=self._done)
        self._state = pretrain.deepcluster(self._build, self._gallery, how, self._part, self._state)
        return float(self._state["lines"][-1]["seconds"])

    def features(self, gallery: Gallery) -> NDArray[np.float32]:
        """Give the features of these pictures after the last epoch."""
        network = self._part.engine.place(self._build(self._how.clusters))
        if self._state is not None:
            network.load_state_dict(self._state["network"])
        return pretrain.features(network, gallery, self._part).numpy()


# --- pretraining ----------------------------------------------------------------------------------------------------------------


def epochs(bench: Bench) -> Iterator[Result]:
    """Time an epoch of both methods beside the straightforward loop, on the same pictures and the same architecture."""
    arch, count, size_px, clusters, rounds = ("resnet18", 128, 64, 8, 1) if bench.quick else ("resnet50", 512, 224, 50, 3)
    shown = bench.pictures(count, size_px)
    engine = _engine(bench, arch, size_px)
    ours = {
        method: Pretrainer(partial(_fresh, arch), _gallery(shown), _how(method, clusters), size_px, engine, SEED).epoch
        for method in ("deepcluster", "deepcluster2")
    }
    straightforward = _classic(_colour(arch, SEED), shown.files, size_px, _how("deepcluster", clusters), SEED)
    ways = {"straightforward": quiet.wall(straightforward.epoch), **ours}
    for name, way in ways.items():
        bench.say(f"first epoch, not counted: {name}")
        way()
    done = quiet.rounds(ways, rounds, bench.say)
    for method, target in (("deepcluster", 3.0), ("deepcluster2", 4.0)):
        pair = [{name: one[name] for name in ("straightforward", method)} for one in done]
        yield Result(
            f"epoch of `{method}`, {_title(arch)}, {size_px} px, {count} images, k {clusters}",
            f"{quiet.median_s(pair, method):.1f} s",
            f"{quiet.median_s(pair, 'straightforward'):.1f} s, straightforward",
            quiet.ratio(pair, "straightforward", method),
            "x",
            target,
            at_least=True,
            foreign=quiet.foreign(quiet.undisturbed(pair)),
            said=f"{engine.format}; {_kept(pair)}",
            samples=_plain(pair),
        )


def accuracy(bench: Bench) -> Iterator[Result]:
    """Compare what a linear probe gets out of the features of both loops, from the same start weights, over several seeds.

    More pictures are probed than are trained on: with as few as the training has time for, chance would move each accuracy
    by more than the two points that are to be told apart.
    """
    arch, probed, trained, size_px, clusters, seeds, each = (
        ("resnet18", 96, 64, 64, 8, 2, 1) if bench.quick else ("resnet18", 4800, 800, 112, 40, 5, 3)
    )
    if bench.data is None:
        shown, of = bench.pictures(probed, size_px), "invented"
    else:
        shown, of = drawn.knees(bench.folder, bench.data, probed, size_px), "knees"
    every, engine = _gallery(shown), _engine(bench, arch, size_px)
    some = np.random.default_rng(SEED).permutation(len(every))[:trained]
    views = Views(brightness=0, contrast=0)  # the straightforward loop has neither
    how = replace(_how("deepcluster", clusters), views=views, lr=0.01)
    told: list[dict[str, float]] = []
    for seed in range(seeds):
        colour = _colour(arch, seed)
        ours = Pretrainer(partial(_same, arch, copy.deepcopy(colour)), every.only(some), how, size_px, engine, seed)
        straightforward = _classic(colour, [shown.files[at] for at in some], size_px, how, seed)
        bench.say(f"seed {seed + 1} of {seeds}: start weights")
        scores = {"start": _probed(ours.features(every), shown, seed)}
        ways = {
            "straightforward": (straightforward.epoch, partial(straightforward.features, shown.files)),
            "osteon": (ours.epoch, partial(ours.features, every)),
        }
        for name, (epoch, features) in ways.items():
            bench.say(f"seed {seed + 1} of {seeds}: {name}")
            for _ in range(each):
                epoch()
            scores[name] = _probed(features(), shown, seed)
        told.append(scores)
    middle, low, high = _interval(np.array([100 * (one["osteon"] - one["straightforward"]) for one in told]))
    mean = {name: statistics.mean(one[name] for one in told) for name in told[0]}
    yield Result(
        f"linear probe on {len(every)} {of} images, {each} epochs on {len(some)}, {_title(arch)}, {size_px} px, k {clusters}",
        f"{mean['osteon']:.1%}",
        f"{mean['straightforward']:.1%}, straightforward",
        low,
        "points",
        -2.0,
        at_least=True,
        foreign=None,
        said=f"lower end of the paired difference, {middle:+.1f} ({low:+.1f} to {high:+.1f}, 95 %) over {seeds} seeds; "
        f"{engine.format}; the start weights get {mean['start']:.1%}",
        samples={"scores": told},
    )


def clusters(bench: Bench) -> Iterator[Result]:
    """Time the cluster phase at the study's size, and hold its inertia against scikit-learn's."""
    from sklearn.cluster import KMeans

    images, k, repeats = (4000, 100, 1) if bench.quick else (STUDY_IMAGES, STUDY_CLUSTERS, 3)
    features = torch.from_numpy(_like_features(images, 3 * k // 2))
    found: list[tuple[NDArray[np.float32], cluster.Assignment]] = []

    def phase() -> None:
        rows = cluster.whiten(features, STUDY_DIMS).numpy()
        found.append((rows, cluster.kmeans(rows, k, seed=SEED + len(found), threads=torch.get_num_threads())))

    done = quiet.rounds({"osteon": quiet.wall(phase)}, repeats, bench.say)
    size = f"n {images}, {STUDY_WIDTH} to {STUDY_DIMS}, k {k}"
    yield Result(
        f"cluster phase, {size}",
        f"{quiet.median_s(done, 'osteon'):.1f} s",
        "",
        quiet.median_s(done, "osteon"),
        "s",
        6.0,
        at_least=False,
        foreign=quiet.foreign(quiet.undisturbed(done)),
        said=f"whitening and 20 iterations; {_kept(done)}",
        samples=_plain(done),
    )
    bench.say("k-means of scikit-learn")
    rows, ours = found[0]
    theirs = KMeans(k, init="random", n_init=1, max_iter=20, tol=0, algorithm="lloyd", random_state=SEED)
    sample = quiet.timed(quiet.wall(lambda: theirs.fit(rows)))
    yield Result(
        f"inertia of k-means, {size}",
        f"{ours.inertia:.1f}",
        f"{theirs.inertia_:.1f}, scikit-learn in {sample.seconds:.0f} s",
        ours.inertia / float(theirs.inertia_),
        "x",
        1.005,
        at_least=False,
        foreign=None,
        said="20 iterations of Lloyd from random rows, both",
        samples={"inertia": [one.inertia for _, one in found]},
    )


def pictures(bench: Bench) -> Iterator[Result]:
    """Time the way of a picture from the cache to what the network eats."""
    size_px, batch, calls, repeats = 224, 64, 20, 3 if bench.quick else 15
    shown = bench.pictures(128, size_px)
    gallery, engine, spec = _gallery(shown), Engine("cpu", "bfloat16"), Views()
    draws = uniforms(SEED, "view", 1, gallery.ids, DRAWS)
    scale = (spec.scale_min, spec.scale_max)
    starts = itertools.cycle(range(0, len(gallery) - batch + 1, 8))

    def once() -> None:
        for _ in range(calls):  # the kernel counts processor time in hundredths of a second
            start = next(starts)
            at = np.arange(start, start + batch)
            rows = gallery.take(at)
            engine.lay(
                view(rows, draws[at], size_px, scale=scale, flip=spec.flip, brightness=spec.brightness, contrast=spec.contrast)
            )

    once()
    done = quiet.rounds({"osteon": quiet.wall(once)}, repeats, bench.say)
    each_ms = quiet.median_s(done, "osteon") / (calls * batch) * 1000
    yield Result(
        f"input from the cache, {size_px} px, batch {batch}",
        f"{each_ms:.3f} ms an image",
        "",
        each_ms,
        "ms",
        0.15,
        at_least=False,
        foreign=quiet.foreign(quiet.undisturbed(done)),
        said=f"take, view, lay; {_kept(done)}",
        samples=_plain(done),
    )


def mapped(bench: Bench) -> Iterator[Result]:
    """Time an epoch on the memory-mapped cache beside the same epoch on rows in memory."""
    count, size_px, k, rounds = (128, 64, 8, 2) if bench.quick else (256, 224, 25, 5)
    shown = bench.pictures(count, size_px)
    engine = _engine(bench, "resnet18", size_px)
    loops = {
        name: Pretrainer(
            partial(_fresh, "resnet18"), _gallery(shown, resident=name == "memory"), _how("deepcluster", k), size_px, engine, SEED
        ).epoch
        for name in ("mapped", "memory")
    }
    for name, way in loops.items():
        bench.say(f"first epoch, not counted: {name}")
        way()
    done = quiet.rounds(loops, rounds, bench.say)
    yield Result(
        f"epoch on the memory-mapped cache, ResNet-18, {size_px} px, {count} images",
        f"{quiet.median_s(done, 'mapped'):.2f} s",
        f"{quiet.median_s(done, 'memory'):.2f} s, in memory",
        quiet.ratio(done, "mapped", "memory"),
        "x",
        1.05,
        at_least=False,
        foreign=quiet.foreign(quiet.undisturbed(done)),
        said=_kept(done),
        samples=_plain(done),
    )


# --- fine-tuning ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fold:
    """What one fold took."""

    epochs_s: tuple[float, ...]
    around_s: float
    """Copying the start weights, taking back the best ones."""
    answers_s: float
    """Its test images."""
    foreign: float


def finetuning(bench: Bench) -> Iterator[Result]:
    """Time the study's fine-tuning (63 images, ten folds, 100 epochs) with one seed: a part of it, or with `whole` all of it."""
    recipe = named("ewing")
    if bench.quick:
        recipe = replace(recipe, network="resnet18", size_px=64)
    shown = bench.pictures(FINE_URGENT + FINE_OTHER, recipe.size_px)
    targets = [0] * FINE_URGENT + [1] * FINE_OTHER
    samples = [Sample(one, one, one, target, None, "", "", 0, 0) for one, target in zip(shown.ids, targets, strict=True)]
    held = Pictures(torch.from_numpy(np.array(shown.mapped())), torch.tensor(targets), shown.ids)
    engine = _engine(bench, recipe.network, recipe.size_px)
    start = _settled(_fresh(recipe.network, len(recipe.classes)), held)
    folds = corpus.make_folds(samples, recipe)
    count, each = (len(folds), recipe.epochs) if bench.whole else (1, 1) if bench.quick else (3, 4)
    done = []
    for number, fold in enumerate(folds[:count]):
        bench.say(f"fold {number + 1} of {count}, {each} epochs")
        done.append(_fold(f"fold {number + 1}", fold, samples, held, replace(recipe, patience=each), each, start, engine))
    if not bench.whole:
        done = [fold for fold in done if fold.foreign <= quiet.FOREIGN_MAX] or done
    epoch_s = statistics.median(second for fold in done for second in fold.epochs_s)
    spent_s = sum(sum(fold.epochs_s) + fold.around_s for fold in done)
    whole_s = spent_s if bench.whole else len(folds) * (recipe.epochs * epoch_s + statistics.mean(fold.around_s for fold in done))
    answers_s = sum(fold.answers_s for fold in done) * len(folds) / len(done)
    how = "all of it" if bench.whole else f"extrapolated linearly from {each} epochs of {len(done)} of {len(folds)} folds"
    of = f"{_title(recipe.network)}, {recipe.size_px} px, {len(samples)} images, {len(folds)} folds"
    foreign = max(fold.foreign for fold in done)
    yield Result(
        f"fine-tuning, recipe `ewing`, {of}, {recipe.epochs} epochs, batch {recipe.batch}, one seed",
        f"{whole_s / 60:.1f} min",
        "",
        whole_s / 60,
        "min",
        60.0,
        at_least=False,
        foreign=foreign,
        said=f"{how}; {epoch_s:.2f} s an epoch, {engine.format}",
        samples={"folds": [asdict(fold) for fold in done]},
    )
    yield Result(
        f"test images of all folds, {of}",
        f"{answers_s:.1f} s",
        "",
        answers_s,
        "s",
        10.0,
        at_least=False,
        foreign=foreign,
        said=how,
    )


def _fold(
    name: str,
    fold: corpus.Fold,
    samples: Sequence[Sample],
    held: Pictures,
    recipe: Recipe,
    epochs: int,
    start: Network,
    engine: Engine,
) -> Fold:
    test, validation = ([at for at, one in enumerate(samples) if one.pid in part] for part in (fold.test, fold.validation))
    train = [at for at in range(len(samples)) if at not in {*test, *validation}]
    lines: list[finetune.Epoch] = []
    fitted: list[finetune.Fitted] = []

    def fit() -> None:
        seen, judged = held.only(train), held.only(validation)
        copied = partial(copy.deepcopy, start)
        fitted.append(
            finetune.fit(copied, seen, judged, recipe, purpose=name, epochs=epochs, engine=engine, on_epoch=lines.append)
        )

    fitting = quiet.timed(quiet.wall(fit))
    epochs_s = tuple(line.seconds for line in lines)
    answers = quiet.wall(lambda: finetune.predict(fitted[0].network, held.rows[test], engine=engine))()
    return Fold(epochs_s, fitting.seconds - sum(epochs_s), answers, fitting.foreign)


def _settled(network: Network, held: Pictures) -> Network:
    """Let batch norm gather statistics, as ImageNet weights have them: fine-tuning keeps those of its start."""
    norms = [one for one in network.modules() if isinstance(one, nn.BatchNorm2d)]
    for one in norms:
        one.momentum = None  # the mean over all batches
    network.train()
    with torch.no_grad():
        for rows in held.rows.split(TRY_BATCH):
            network(plain(rows))
    for one in norms:
        one.momentum = 0.1
    return network


# --- what the parts share -------------------------------------------------------------------------------------------------------


def _how(method: Literal["deepcluster", "deepcluster2"], clusters: int) -> Pretraining:
    """Give the recipe's values with all stops open: what is timed must not depend on how well it learns."""
    return Pretraining(method, clusters, batch=64, nmi_min=0.0, largest_max=1.0, alike_max=1.0, empty_max=1.0)


def _fresh(arch: str, classes: int) -> Network:
    return build(arch, classes, "random")


def _colour(arch: str, seed: int) -> nn.Module:
    """Give torchvision's network without its head."""
    torch.manual_seed(seed)
    backbone = get_model(arch, weights=None)
    backbone.fc = nn.Identity()
    return backbone


def _same(arch: str, colour: nn.Module, classes: int) -> Network:
    """Give Osteon's network with the weights of torchvision's: the kernels of the three colours summed."""
    state = colour.state_dict()
    return with_backbone(arch, classes, {**state, "conv1.weight": state["conv1.weight"].sum(dim=1, keepdim=True)})


def _classic(colour: nn.Module, files: Sequence[Path], size_px: int, how: Pretraining, seed: int) -> Classic:
    width = next(reversed([one.num_features for one in colour.modules() if isinstance(one, nn.BatchNorm2d)]))
    return Classic(colour, width, files, size_px, how, seed)


def _engine(bench: Bench, arch: str, size_px: int) -> Engine:
    bench.say("which number format is the quicker one")
    return chosen("cpu", partial(_fresh, arch, 2), size_px, batch=TRY_BATCH)


def _gallery(shown: Shown, *, resident: bool = False) -> Gallery:
    rows = shown.mapped()
    return Gallery(np.array(rows) if resident else rows, np.arange(len(rows)), shown.ids)


def _probed(features: NDArray[np.float32], shown: Shown, seed: int) -> float:
    """Give the share of the pictures whose class a linear probe tells without having seen their patient."""
    targets = np.array(shown.targets)
    classes = int(targets.max()) + 1
    said = probe.out_of_fold(features, shown.targets, shown.patients, classes, folds=5, repeats=3, seed=seed)
    return float((said["linear"].argmax(axis=1) == targets).mean())


def _interval(values: NDArray[np.floating]) -> tuple[float, float, float]:
    """Give the mean and its 95 % interval by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def _like_features(images: int, groups: int) -> NDArray[np.float32]:
    """Give rows (images, D) as a trained network gives them: in groups, of falling variance, none negative."""
    chance = np.random.default_rng(SEED)
    falling = np.linspace(1, 0.1, 128, dtype=np.float32)
    middles = chance.standard_normal((groups, len(falling)), dtype=np.float32) * falling
    hidden = middles[chance.integers(groups, size=images)]
    hidden += 0.7 * falling * chance.standard_normal(hidden.shape, dtype=np.float32)
    rows = hidden @ chance.standard_normal((len(falling), STUDY_WIDTH), dtype=np.float32) / 8
    rows += 0.2 * chance.standard_normal(rows.shape, dtype=np.float32)
    return np.maximum(rows, 0, out=rows)


def _title(arch: str) -> str:
    return arch.replace("resnet", "ResNet-")


def _kept(done: Sequence[quiet.Round]) -> str:
    kept = quiet.undisturbed(done)
    if quiet.foreign(kept) > quiet.FOREIGN_MAX:
        return f"median of {len(done)} rounds, none undisturbed"
    return f"median of {len(kept)} undisturbed of {len(done)} rounds"


def _plain(done: Sequence[quiet.Round]) -> dict[str, Any]:
    return {"rounds": [{name: asdict(sample) for name, sample in one.items()} for one in done]}
