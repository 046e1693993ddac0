"""Learn from pictures without labels: DeepCluster, DeepCluster-v2, and the classifier of the cluster numbers.

In: a gallery of uint8 pictures, a network, how to learn. Out: states, one after each epoch, from the last of which it goes on as
if it had never stopped. Every random draw comes from a hash of seed, purpose, epoch and image. Nothing here knows a label, a disk
or a catalogue; a state is handed to `keep`, and whoever keeps it decides where.

`deepcluster` [0]: each epoch starts with a forward pass over everything in eval mode; the whitened features are clustered; images
are drawn evenly over the clusters; a fresh head is trained on the cluster numbers with an SGD of its own. `deepcluster2` [1]: the
embeddings of the last epoch are clustered, and the centroids are the head, frozen for the epoch. `classify` is the study's second
step: cluster numbers are the classes.

[0] Caron et al., ECCV 2018; [1] Caron et al., NeurIPS 2020.

Shapes: N images, B batch, D features, K clusters, S pixels.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from models.errors import Final, Retriable
from models.networks import Network
from training import cluster
from training.augment import plain
from training.cluster import Assignment, Labels
from training.engine import Diverged, Engine, fits, is_out_of_memory
from training.ranks import Ranks, met
from training.recipe import Classifier, Pretraining, seed_for, uniforms
from training.views import DRAWS, view

EVAL_BATCH = 64
"""Pictures of one forward pass without gradients; the same whatever the number of processes, so that its bits are."""
PIECE = 1024
"""Pictures that go to the GPU together."""
SETTLED = 5
"""From this epoch on consecutive assignments must agree."""
SPREAD_MIN = 1e-3
WARM_UP = 0.1

State = dict[str, Any]
"""Everything that goes on: epoch, weights, optimiser, assignment, prototypes, bank, and the lines of all epochs."""
Line = dict[str, Any]
"""One epoch in figures, as it stands in metrics.jsonl."""


class Collapsed(Final):
    """What is learned tells the images apart no more."""


class TooLarge(Retriable):
    """A batch does not fit into the memory."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pictures in one order."""

    rows: NDArray[np.uint8]
    """(M, S, S), in memory or mapped; M >= N."""
    at: Labels
    """(N,) row of each picture."""
    ids: tuple[str, ...]
    """SOP Instance UIDs: what the random draws hang on."""
    resident: list[Tensor] = field(default_factory=list, compare=False)
    """All pictures on the GPU, when they fit."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: Labels) -> Tensor:
        """Give the pictures (n, S, S) at these positions."""
        if self.resident:
            return self.resident[0][torch.from_numpy(positions).to(self.resident[0].device)]
        return torch.from_numpy(self.rows[self.at[positions]])

    def only(self, positions: Labels) -> Gallery:
        """Give a gallery of the pictures at these positions."""
        return Gallery(self.rows, self.at[positions], tuple(self.ids[one] for one in positions))

    def settle(self, device: str) -> None:
        """Bring all pictures to the GPU when half of its free memory holds them: 42,608 of 256 pixels are 2.8 GB."""
        size = len(self) * self.rows[0].nbytes
        if self.resident or not fits(size, device):
            return
        held = torch.empty((len(self), *self.rows.shape[1:]), dtype=torch.uint8, device=device)
        for start in range(0, len(self), PIECE):  # each process of a machine does this: whole copies of all would fill its memory
            held[start : start + PIECE] = torch.from_numpy(self.rows[self.at[start : start + PIECE]])
        self.resident.append(held)


@dataclass(frozen=True, slots=True)
class Clusters:
    """What the last look of a pretraining found."""

    assignment: Assignment
    rows: NDArray[np.float32]
    """(N, d) of unit length: what was clustered."""


@dataclass(frozen=True, slots=True)
class Part:
    """The surroundings of one training: where it computes, and who is told."""

    engine: Engine
    ranks: Ranks
    threads: int
    """CPU threads of all processes of a machine together; the cluster phase, which is rank 0's alone, uses them all."""
    seed: int
    size_px: int
    batch: int
    """Over all processes: the recipe's, or less where the memory said so."""
    keep: Callable[[State], None] = lambda state: None
    """Is offered each epoch's state."""
    on_epoch: Callable[[Line], None] = lambda line: None
    on_batch: Callable[[float], None] = lambda done: None
    """Is told how many epochs are done, with what is done of this one."""
    probe: Callable[[int, Network], Mapping[str, float]] | None = None
    """Looks at the network after an epoch."""


def deepcluster(
    build: Callable[[int], Network], gallery: Gallery, how: Pretraining, part: Part, state: State | None = None
) -> State:
    """Train by either method until the epochs of `how` are over, from `state` on; give the last state.

    `build` gives the start network with a head of so many classes.

    Raises
    ------
    Diverged, NotFinite
        The loss or a feature is no number.
    Collapsed
        Most images are in one cluster, most clusters are empty, assignments do not agree, or all features are the same.
    TooLarge
        The batch does not fit into the memory.
    """
    with _seeded(part, "start"):
        method = (_Classic if how.method == "deepcluster" else _Bank)(build, gallery, how, part)
    return _train(method, how.epochs, part, state)


def clusters(build: Callable[[int], Network], gallery: Gallery, how: Pretraining, part: Part, state: State) -> Clusters:
    """Assign every image once more, with the weights of the last epoch."""
    method = (_Classic if how.method == "deepcluster" else _Bank)(build, gallery, how, part)
    method.load(state)
    return method.look(how.epochs + 1)


def classify(
    build: Callable[[int], Network],
    gallery: Gallery,
    labels: Labels,
    train: Labels,
    validation: Labels,
    how: Classifier,
    part: Part,
    state: State | None = None,
) -> State:
    """Train the classifier of the cluster numbers `labels` (N,) on the positions `train`; `validation` picks the best epoch."""
    with _seeded(part, "start"):
        method = _Supervised(build, gallery, labels, train, validation, how, part)
    return _train(method, how.epochs, part, state)


def features(network: Network, gallery: Gallery, part: Part, *, embed: bool = False) -> Tensor:
    """Give the pooled features (N, D) of every picture, unchanged and in eval mode; `embed` gives the head's output instead.

    Rank 0 gets all of them; another process what it computed by itself, at its places. Batches are the same for any number of
    processes, which take turns.
    """
    ranks, was_training = part.ranks, network.training
    network.eval()
    starts = range(0, len(gallery), EVAL_BATCH)
    own: list[Tensor] = []
    with torch.inference_mode():
        for number, start in enumerate(starts):
            if number % ranks.size != ranks.rank:
                continue
            positions = np.arange(start, min(start + EVAL_BATCH, len(gallery)))
            with part.engine.autocast():
                logits, pooled = network(part.engine.lay(plain(part.engine.bring(gallery.take(positions)))))
            out = (logits if embed else pooled).float()
            own.append(functional.pad(out, (0, 0, 0, EVAL_BATCH - len(out))))
        rounds = math.ceil(len(starts) / ranks.size)
        width = network.head_width if embed else network.width
        own += [torch.zeros(EVAL_BATCH, width, device=part.engine.device)] * (rounds - len(own))
        parts = ranks.together(torch.stack(own))  # of each rank (rounds, EVAL_BATCH, D)
    network.train(was_training)
    if not parts:
        return torch.empty(0, width)
    return torch.stack(parts, dim=1).flatten(0, 2)[: len(gallery)]


# --- the loop -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one epoch shows, and what is known before it."""

    positions: Labels
    """(n,) in the order shown."""
    turns: Labels
    """(n,) how often each was shown before in this epoch."""
    line: Line


class _Method(Protocol):
    """One way to learn."""

    network: Network
    gallery: Gallery
    lr: float

    def groups(self) -> list[dict[str, Any]]:
        """Give the parameters as the optimiser wants them."""

    def plan(self, epoch: int) -> _Plan:
        """Begin an epoch."""

    def share_of_lr(self, done: float) -> float:
        """Give the share of the learning rate after so many of the steps (0…1)."""

    def views(self, epoch: int, positions: Labels, turns: Labels) -> list[Tensor]:
        """Give the views of a batch: (b, 1, s, s) float32 in 0…1."""

    def loss(self, logits: Tensor, positions: Labels) -> Tensor:
        """Give the mean loss of a batch; logits are those of each view in turn, (views * b, K)."""

    def close(self, epoch: int) -> Line:
        """End an epoch."""

    def state(self) -> State:
        """Give what it has to remember beside weights and optimiser."""

    def load(self, state: State) -> None:
        """Take back weights and what `state` gave."""


def _train(method: _Method, epochs: int, part: Part, state: State | None) -> State:
    """Go through the epochs that are left."""
    lines: list[Line] = []
    done = 0
    optimiser = torch.optim.SGD(method.groups(), lr=method.lr)
    if state is not None:
        method.load(state)
        optimiser.load_state_dict(state["optimiser"])
        lines, done = list(state["lines"]), int(state["epoch"])
    method.gallery.settle(part.engine.device)
    with met():
        module = _parallel(method.network, part)
    for epoch in range(done + 1, epochs + 1):
        started = time.perf_counter()
        try:
            plan = method.plan(epoch)
            looked = time.perf_counter() - started
            loss = _one_epoch(method, module, optimiser, plan, epoch, epochs, part)
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} in epoch {epoch}; the run stops (learning rate {method.lr:g})")
            _same_buffers(method.network, part.ranks)
            line = {"epoch": epoch, "loss": loss} | plan.line | method.close(epoch)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise TooLarge(f"a batch of {part.batch} does not fit into the memory") from error
            raise
        if part.probe is not None and part.ranks.first:
            line |= part.probe(epoch, method.network)
        line |= {"lr": optimiser.param_groups[0]["lr"], "seconds": round(time.perf_counter() - started, 3)}
        line["clustering_s"] = round(looked, 3)
        lines.append(line)
        state = {"epoch": epoch, "network": method.network.state_dict(), "optimiser": optimiser.state_dict(), "lines": lines}
        state |= method.state()
        if part.ranks.first:
            part.keep(state)
            part.on_epoch(line)
        part.ranks.follow()
    if state is None:
        raise ValueError("a training of no epochs has no state")
    return state


def _one_epoch(
    method: _Method, module: nn.Module, optimiser: torch.optim.Optimizer, plan: _Plan, epoch: int, epochs: int, part: Part
) -> float:
    """Show each picture of the plan once; give the mean loss."""
    method.network.train()
    torch.manual_seed(seed_for(part.seed, f"dropout {part.ranks.rank}", epoch))
    batches = list(_batches(len(plan.positions), part.batch, part.ranks.size))
    total = torch.zeros((), device=part.engine.device)
    for number, batch in enumerate(batches):
        share = method.share_of_lr((epoch - 1 + number / len(batches)) / epochs)
        for group in optimiser.param_groups:
            group["lr"] = method.lr * share
        mine = part.ranks.mine(batch)
        positions = plan.positions[mine]
        images = [part.engine.lay(one) for one in method.views(epoch, positions, plan.turns[mine])]
        with part.engine.autocast():
            logits = module(*images)
        loss = method.loss(logits.float(), positions)
        optimiser.zero_grad(set_to_none=True)
        with met():  # the gradients of all
            loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        total += loss.detach()
        if part.ranks.first:
            part.on_batch(epoch - 1 + (number + 1) / len(batches))
    return part.ranks.mean(float(total) / len(batches))


def _batches(count: int, batch: int, ranks: int) -> Iterator[Labels]:
    """Cut an epoch into batches of one size, a multiple of the processes; a few pictures at its end wait for the next epoch."""
    steps = math.ceil(count / batch)
    size = max(count // steps // ranks, 2) * ranks
    if size > count:
        raise ValueError(f"{count} pictures are too few for {ranks} processes")
    return (np.arange(start, start + size) for start in range(0, count - size + 1, size))


def _parallel(network: Network, part: Part) -> nn.Module:
    """Let the processes share their gradients."""
    module = _Views(network)
    if part.ranks.size == 1:
        return module
    on = [torch.device(part.engine.device)] if torch.device(part.engine.device).type == "cuda" else None
    with (
        warnings.catch_warnings()
    ):  # newer releases of torch have another name for `broadcast_buffers`, which older ones do not know
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module, device_ids=on, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
        )


class _Views(nn.Module):
    """A network that sees several views of a batch at once: the head's output for each in turn."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, *views: Tensor) -> Tensor:
        return torch.cat([self.network(one)[0] for one in views])


def _same_buffers(network: nn.Module, ranks: Ranks) -> None:
    """Give every process the running statistics of rank 0: each gathered those of its own half of the batches."""
    for buffer in network.buffers():
        ranks.same(buffer)


@contextmanager
def _seeded(part: Part, purpose: str) -> Iterator[None]:
    """Draw start weights from a seed of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(part.seed, purpose))
        yield


@contextmanager
def _all_threads(part: Part) -> Iterator[None]:
    """Use every CPU thread of the run: the other processes wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(part.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the methods ---------------------------------------------------------------------------------------------------------------


class _Clustering:
    """What the two methods share: the cluster phase, its figures and its stops."""

    def __init__(self, gallery: Gallery, how: Pretraining, part: Part) -> None:
        self.gallery, self._how, self._part = gallery, how, part
        self.lr = how.lr
        self._labels = torch.zeros(len(gallery), dtype=torch.int64)
        self._seen_before = False

    def _cluster(self, epoch: int, rows: Tensor, *, spherical: bool) -> Assignment:
        how, clustered = self._how, rows.cpu().numpy()
        if (alike := cluster.alike(clustered)) > how.alike_max:
            raise Collapsed(f"{alike:.0%} of the images have the same features in epoch {epoch}; {how.alike_max:.0%} are allowed")
        found = cluster.kmeans(
            clustered,
            how.clusters,
            seed=seed_for(self._part.seed, "k-means", epoch),
            iterations=how.iterations,
            spherical=spherical,
            smallest=how.smallest,
            threads=self._part.threads,
            gpu=self._part.engine.gpu,
        )
        largest = found.sizes.max() / len(self.gallery)
        if largest > how.largest_max:
            raise Collapsed(f"{largest:.0%} of the images are in one cluster in epoch {epoch}; {how.largest_max:.0%} are allowed")
        if found.empty > how.empty_max * how.clusters:
            raise Collapsed(f"{found.empty} of {how.clusters} clusters are empty in epoch {epoch}")
        return found

    def _told(self, epoch: int, found: Assignment | None) -> Line:
        """Hand rank 0's assignment to everybody, and give its figures."""
        before = self._labels.numpy().copy()
        self._labels = self._part.ranks.same(torch.from_numpy(found.labels) if found else self._labels)
        if found is None:
            return {}
        agree = cluster.nmi(before, found.labels) if self._seen_before else None
        self._seen_before = True
        if agree is not None and epoch >= SETTLED and agree < self._how.nmi_min:
            raise Collapsed(f"the assignments of epochs {epoch - 1} and {epoch} agree by {agree:.2f} only (NMI)")
        sizes = np.percentile(found.sizes, [0, 25, 50, 75, 100]).tolist()
        return {"nmi": agree, "empty": found.empty, "relocated": found.relocated, "sizes": sizes, "inertia": found.inertia}

    def _view(
        self, epoch: int, positions: Labels, turns: Labels, purpose: str, size_px: int, scale: tuple[float, float]
    ) -> Tensor:
        views = self._how.views
        drawn = uniforms(self._part.seed, purpose, epoch, _names(self.gallery.ids, positions, turns), DRAWS)
        rows = self._part.engine.bring(self.gallery.take(positions))
        return view(rows, drawn, size_px, scale=scale, flip=views.flip, brightness=views.brightness, contrast=views.contrast)

    def _large(self, epoch: int, positions: Labels, turns: Labels) -> Tensor:
        scale = (self._how.views.scale_min, self._how.views.scale_max)
        return self._view(epoch, positions, turns, "view", self._part.size_px, scale)


class _Classic(_Clustering):
    """DeepCluster [0]."""

    def __init__(self, build: Callable[[int], Network], gallery: Gallery, how: Pretraining, part: Part) -> None:
        super().__init__(gallery, how, part)
        self.network = part.engine.place(build(how.clusters))

    def groups(self) -> list[dict[str, Any]]:
        how = self._how
        return [
            {"params": list(self.network.backbone.parameters()), "momentum": how.momentum, "weight_decay": how.weight_decay},
            {"params": list(self.network.head.parameters()), "momentum": 0.0, "weight_decay": how.weight_decay},
        ]

    def look(self, epoch: int) -> Clusters:
        """Cluster the whitened features of all images; on rank 0."""
        pooled = features(self.network, self.gallery, self._part)
        if not self._part.ranks.first:
            return _ELSEWHERE
        cluster.require_finite(pooled, self.gallery.ids)
        if (apart := cluster.spread(pooled)) < SPREAD_MIN:
            raise Collapsed(f"all images have nearly the same features in epoch {epoch} (spread {apart:.1e})")
        with _all_threads(self._part):
            # where one process has the features: several bring them over the CPU, and the bits are to be the same
            rows = cluster.whiten(pooled.to(self._part.engine.device), self._how.dims)
        return Clusters(self._cluster(epoch, rows, spherical=False), rows.cpu().numpy())

    def plan(self, epoch: int) -> _Plan:
        found = self.look(epoch)
        line = self._told(epoch, found.assignment if self._part.ranks.first else None)
        with _seeded(self._part, f"head {epoch}"):
            head = torch.empty_like(self.network.last.weight, device="cpu").normal_(std=0.01)
        with torch.no_grad():
            self.network.last.weight.copy_(head)
            self.network.last.bias.zero_()
        count = len(self.gallery)
        seed = self._part.seed
        positions, turns = cluster.draw_evenly(self._labels.numpy(), count, seed=seed, epoch=epoch, ids=self.gallery.ids)
        return _Plan(positions, turns, line)

    def share_of_lr(self, done: float) -> float:
        return 1.0

    def views(self, epoch: int, positions: Labels, turns: Labels) -> list[Tensor]:
        return [self._large(epoch, positions, turns)]

    def loss(self, logits: Tensor, positions: Labels) -> Tensor:
        return functional.cross_entropy(logits, self._labels[torch.from_numpy(positions)].to(logits.device))

    def close(self, epoch: int) -> Line:
        return {}

    def state(self) -> State:
        return {"labels": self._labels}

    def load(self, state: State) -> None:
        self.network.load_state_dict(state["network"])
        self._labels = state["labels"]
        self._seen_before = True


class _Bank(_Clustering):
    """DeepCluster-v2 [1], with the assignment of the large view for all views of an image."""

    def __init__(self, build: Callable[[int], Network], gallery: Gallery, how: Pretraining, part: Part) -> None:
        super().__init__(gallery, how, part)
        network = build(2)
        network.project(how.dims)
        self.network = part.engine.place(network)
        self._bank = torch.zeros(len(gallery), how.dims)
        self._prototypes = torch.zeros(how.clusters, how.dims)
        self._filled = False

    def groups(self) -> list[dict[str, Any]]:
        how = self._how
        return [{"params": list(self.network.parameters()), "momentum": how.momentum, "weight_decay": how.weight_decay}]

    def look(self, epoch: int) -> Clusters:
        """Cluster the bank; on rank 0."""
        if not self._filled:
            first = functional.normalize(features(self.network, self.gallery, self._part, embed=True), dim=1).cpu()
            self._bank = first if self._part.ranks.first else self._bank
            self._filled = True
        if not self._part.ranks.first:
            return _ELSEWHERE
        cluster.require_finite(self._bank, self.gallery.ids)
        if (apart := cluster.spread(self._bank)) < SPREAD_MIN:
            raise Collapsed(f"all images have nearly the same embedding in epoch {epoch} (spread {apart:.1e})")
        return Clusters(self._cluster(epoch, self._bank, spherical=True), self._bank.numpy().copy())

    def plan(self, epoch: int) -> _Plan:
        found = self.look(epoch)
        first = self._part.ranks.first
        line = self._told(epoch, found.assignment if first else None)
        centroids = torch.from_numpy(found.assignment.centroids) if first else self._prototypes.cpu()
        self._prototypes = self._part.ranks.same(centroids).to(self._part.engine.device)
        order = np.argsort(uniforms(self._part.seed, "order", epoch, self.gallery.ids)[:, 0], kind="stable")
        self._fresh: list[tuple[Labels, Tensor]] = []
        return _Plan(order, np.zeros_like(order), line)

    def share_of_lr(self, done: float) -> float:
        if done < WARM_UP:
            return max(done / WARM_UP, 1e-3)
        return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))

    def views(self, epoch: int, positions: Labels, turns: Labels) -> list[Tensor]:
        spec = self._how.views
        scale = (spec.small_scale_min, spec.small_scale_max)
        small = [self._view(epoch, positions, turns, f"small {one}", spec.small_px, scale) for one in range(spec.small)]
        return [self._large(epoch, positions, turns), *small]

    def loss(self, logits: Tensor, positions: Labels) -> Tensor:
        embedded = functional.normalize(logits, dim=1)  # (views * b, d)
        self._fresh.append((positions, embedded[: len(positions)].detach()))
        targets = self._labels[torch.from_numpy(positions)].to(logits.device)
        similar = embedded @ self._prototypes.T / self._how.temperature  # (views * b, K)
        return functional.cross_entropy(similar, targets.repeat(len(embedded) // len(positions)))

    def close(self, epoch: int) -> Line:
        """Bring the embeddings of all processes into rank 0's bank."""
        positions = torch.from_numpy(np.concatenate([one for one, _ in self._fresh]))
        embedded = torch.cat([one for _, one in self._fresh]).cpu()
        ranks = self._part.ranks
        for at, rows in zip(ranks.together(positions), ranks.together(embedded), strict=True):
            self._bank[at] = rows
        return {}

    def state(self) -> State:
        return {"labels": self._labels, "bank": self._bank}

    def load(self, state: State) -> None:
        self.network.load_state_dict(state["network"])
        self._labels, self._bank = state["labels"], state["bank"].clone()
        self._filled = self._seen_before = True


class _Supervised:
    """Cluster numbers as classes."""

    def __init__(
        self,
        build: Callable[[int], Network],
        gallery: Gallery,
        labels: Labels,
        train: Labels,
        validation: Labels,
        how: Classifier,
        part: Part,
    ) -> None:
        self.gallery, self.lr, self._part, self._train = gallery, how.lr, part, train
        self._labels = torch.from_numpy(labels)
        self.network = part.engine.place(build(int(labels.max()) + 1))
        self._validation, self._held = gallery.only(validation), self._labels[torch.from_numpy(validation)]
        self._best: State = {"epoch": 0, "accuracy": -1.0, "loss": math.inf, "network": {}}

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.network.parameters()), "momentum": 0.9, "weight_decay": 1e-5}]

    def plan(self, epoch: int) -> _Plan:
        ids = [self.gallery.ids[one] for one in self._train]
        order = self._train[np.argsort(uniforms(self._part.seed, "classifier/order", epoch, ids)[:, 0], kind="stable")]
        return _Plan(order, np.zeros_like(order), {})

    def share_of_lr(self, done: float) -> float:
        return 1.0

    def views(self, epoch: int, positions: Labels, turns: Labels) -> list[Tensor]:
        drawn = uniforms(self._part.seed, "classifier/view", epoch, _names(self.gallery.ids, positions, turns), DRAWS)
        rows = self._part.engine.bring(self.gallery.take(positions))
        return [view(rows, drawn, self._part.size_px, scale=(0.6, 1.0), flip=True, brightness=0.08, contrast=0.15)]

    def loss(self, logits: Tensor, positions: Labels) -> Tensor:
        return functional.cross_entropy(logits, self._labels[torch.from_numpy(positions)].to(logits.device))

    def close(self, epoch: int) -> Line:
        """Look how well the held-out images are told, and remember the best epoch."""
        said = features(self.network, self._validation, self._part, embed=True).cpu()
        told = {}
        if self._part.ranks.first:
            loss = float(functional.cross_entropy(said, self._held))
            accuracy = float((said.argmax(dim=1) == self._held).float().mean())
            if (accuracy, -loss) > (self._best["accuracy"], -self._best["loss"]):  # a few dozen images often draw
                weights = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
                self._best = {"epoch": epoch, "accuracy": accuracy, "loss": loss, "network": weights}
            told = {"validation_loss": loss, "validation_accuracy": accuracy}
        return told

    def state(self) -> State:
        return {"best": self._best}

    def load(self, state: State) -> None:
        self.network.load_state_dict(state["network"])
        self._best = state["best"]


_ELSEWHERE = Clusters(
    Assignment(np.empty(0, np.int64), np.empty((0, 0), np.float32), np.empty(0, np.float32), 0.0, 0, 0),
    np.empty((0, 0), np.float32),
)
"""What a process other than rank 0 has of the cluster phase."""


def _names(ids: Sequence[str], positions: Labels, turns: Labels) -> list[str]:
    """Name each showing of an image: the second one in an epoch looks different."""
    return [f"{ids[at]}/{turn}" if turn else ids[at] for at, turn in zip(positions.tolist(), turns.tolist(), strict=True)]
