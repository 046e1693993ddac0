"""Fit a network to a few labelled pictures, again and again the same.

In: uint8 pictures held in memory, targets, a recipe. Out: weights, logits, the temperature that calibrates them. Every random
draw comes from a hash of seed, purpose, epoch and image, so the same input gives the same weights on the same number of CPU
threads. Test and locked pictures must never come near here: `fit` sees the rows it is given for training and, for early
stopping alone, those for validation.

Batch norm keeps the running statistics of its start weights (batches of a small set would only add noise to them) and learns
its scale and shift; a network that starts at random gathers statistics of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from models.networks import Ensemble, Network
from training.augment import DRAWS, augment, plain
from training.engine import Diverged, Engine
from training.recipe import Recipe, seed_for, uniforms

EVAL_BATCH = 32
PLAIN = Engine()


@dataclass(frozen=True, slots=True)
class Pictures:
    """What there is to learn from, in one order."""

    rows: Tensor
    """(n, s, s) uint8."""
    targets: Tensor
    """(n,) int64."""
    ids: tuple[str, ...]
    """SOP Instance UIDs: what the random draws hang on."""

    def only(self, index: Sequence[int]) -> Pictures:
        """Give the pictures at these positions."""
        at = torch.tensor(list(index), dtype=torch.int64)
        return Pictures(self.rows[at], self.targets[at], tuple(self.ids[one] for one in index))


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of metrics.jsonl."""

    epoch: int
    train_loss: float
    validation_loss: float | None
    lr: float
    seconds: float
    best: bool


@dataclass(frozen=True, slots=True)
class Fitted:
    """A network as it was at its best epoch."""

    network: Network
    best_epoch: int


def fit(
    build: Callable[[], Network],
    train: Pictures,
    validation: Pictures | None,
    recipe: Recipe,
    *,
    purpose: str,
    epochs: int,
    engine: Engine = PLAIN,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Fitted:
    """Train for `epochs`, or until the validation loss has not improved for `recipe.patience` of them.

    `purpose` names the fit (`fold 3`, `refit`) and enters every random draw. Without `validation` the last epoch is the best.

    Raises
    ------
    Diverged
        The loss is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(recipe.seed, f"{purpose}/start"))
        network = engine.place(_prepared(build(), recipe))
        weights = _class_weights(train.targets, len(recipe.classes)).to(engine.device)
        steps = math.ceil(len(train.ids) / recipe.batch)
        optimiser = torch.optim.AdamW(
            [
                {"params": [one for one in network.backbone.parameters() if one.requires_grad], "lr": recipe.lr},
                {"params": network.head.parameters(), "lr": recipe.head_lr},
            ],
            weight_decay=recipe.weight_decay,
            fused=True,  # one pass over the weights: with batches of four images the step is a good part of the time
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share_of_lr(step, steps, recipe.epochs))
        best_loss, best_epoch, best_state = math.inf, 0, network.state_dict()
        for epoch in range(1, epochs + 1):
            started = time.perf_counter()
            torch.manual_seed(seed_for(recipe.seed, f"{purpose}/dropout", epoch))
            lr = float(optimiser.param_groups[0]["lr"])
            train_loss = _one_epoch(network, train, recipe, optimiser, schedule, weights, purpose, epoch, engine)
            validation_loss = None
            if validation is not None:
                logits, _ = predict(network, validation.rows, engine=engine)
                validation_loss = float(functional.cross_entropy(torch.from_numpy(logits), validation.targets, weights.cpu()))
            for loss in (train_loss, validation_loss):
                if loss is not None and not math.isfinite(loss):
                    raise Diverged(f"{purpose}: the loss is {loss} in epoch {epoch}; the run stops (learning rate {lr:g})")
            better = validation_loss is None or validation_loss < best_loss
            if better:
                best_loss = math.inf if validation_loss is None else validation_loss
                best_epoch = epoch
                best_state = {name: value.detach().clone() for name, value in network.state_dict().items()}
            on_epoch(Epoch(epoch, train_loss, validation_loss, lr, round(time.perf_counter() - started, 3), better))
            if epoch - best_epoch >= recipe.patience:
                break
        network.load_state_dict(best_state)
    return Fitted(network.eval(), best_epoch)


def predict(
    network: Network | Ensemble, rows: Tensor, *, engine: Engine = PLAIN
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Give logits (n, classes) and features (n, d) of pictures (n, s, s) uint8, unchanged and without gradients."""
    was_training = network.training
    network.eval()
    logits, features = [], []
    with torch.inference_mode():
        for part in torch.split(rows, EVAL_BATCH):
            with engine.autocast():
                one = network(engine.lay(plain(part.to(engine.device))))
            logits.append(one[0].float().cpu())
            features.append(one[1].float().cpu())
    if was_training and isinstance(network, Network):  # an ensemble never trains
        _train_mode(network)
    return torch.cat(logits).numpy(), torch.cat(features).numpy()


def temperature(logits: NDArray[np.floating], targets: NDArray[np.integer], *, low: float = 0.05, high: float = 20.0) -> float:
    """Find the temperature between `low` and `high` whose division of `logits` gives the least cross-entropy.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017; with Platt's softened targets (1999), so that a few cases
    which happen to be told apart without an error do not make the model certain of everything. The loss is convex in 1/T: a
    golden-section search finds it.
    """
    said, truth = torch.from_numpy(np.asarray(logits, np.float64)), torch.from_numpy(np.asarray(targets, np.int64))
    classes = said.shape[1]
    counts = torch.bincount(truth, minlength=classes)[truth].double().unsqueeze(1)
    soft = (functional.one_hot(truth, classes) * counts + 1) / (counts + classes)

    def loss(inverse: float) -> float:
        return float(functional.cross_entropy(said * inverse, soft))

    golden = (math.sqrt(5) - 1) / 2
    left, right = 1 / high, 1 / low
    while right - left > 1e-6:
        a, b = right - golden * (right - left), left + golden * (right - left)
        if loss(a) <= loss(b):
            right = b
        else:
            left = a
    return 2 / (left + right)


def _share_of_lr(step: int, steps: int, epochs: int) -> float:
    """Rise over the first epoch of `steps`, so that a fresh head does not tear up the weights below it; then fall as a cosine."""
    return min(1.0, (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / (steps * epochs))))


def _prepared(network: Network, recipe: Recipe) -> Network:
    """Freeze the leading stages and say how batch norm behaves."""
    for stage in list(network.backbone.children())[: recipe.frozen]:
        stage.requires_grad_(False)
    if recipe.start == "random":
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
    network.__dict__["gathers_statistics"] = recipe.start == "random"
    return network


def _train_mode(network: Network) -> None:
    """Switch to training: batch norm with running statistics to keep stays as in serving."""
    network.train()
    if not network.__dict__["gathers_statistics"]:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def _class_weights(targets: Tensor, classes: int) -> Tensor:
    """Weigh each class by the inverse of its share, so that all weigh the same."""
    counts = torch.bincount(targets, minlength=classes).clamp_(min=1).float()
    return counts.sum() / (classes * counts)


def _one_epoch(
    network: Network,
    train: Pictures,
    recipe: Recipe,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    weights: Tensor,
    purpose: str,
    epoch: int,
    engine: Engine,
) -> float:
    """Go once through the training pictures; give the mean loss."""
    _train_mode(network)
    drawn = uniforms(recipe.seed, f"{purpose}/augment", epoch, train.ids, DRAWS)
    order = np.argsort(uniforms(recipe.seed, f"{purpose}/order", epoch, train.ids)[:, 0], kind="stable")
    total = 0.0
    for part in np.array_split(order, math.ceil(len(order) / recipe.batch)):  # even batches: none of a single image
        at = torch.from_numpy(part)
        images = augment(train.rows[at].to(engine.device), drawn[part], recipe.augmentation)  # (b, 1, s, s)
        with engine.autocast():
            logits, _ = network(engine.lay(images))
        loss = functional.cross_entropy(logits.float(), train.targets[at].to(engine.device), weights)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        total += float(loss.detach()) * len(part)
    return total / len(order)
