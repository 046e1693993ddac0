"""Fine-tuning: the same twice, able to learn, stopped when it diverges; augmentation; calibration; export."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from labelled import texture

from models.networks import Ensemble, Network, build
from training import augment, export, finetune
from training.finetune import Diverged, Epoch, Pictures
from training.recipe import Augmentation, named

SMALL = replace(named("phantom"), size_px=32, folds=3, epochs=3, batch=8)
NETWORK: Callable[[], Network] = partial(build, "efficientnet_lite0", 2)


def pictures(n: int, *, seed: int = 0) -> Pictures:
    rows = np.stack([(texture(row % 2, seed + row, 32) >> 4).astype(np.uint8) for row in range(n)])
    return Pictures(torch.from_numpy(rows), torch.arange(n) % 2, tuple(f"2.25.{seed}{row}" for row in range(n)))


def weights_hash(network: Network) -> str:
    parts = [value.numpy().tobytes() for value in network.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_two_fits_give_the_same_bytes_and_learn() -> None:
    lines: list[Epoch] = []
    train, validation = pictures(32), pictures(16, seed=500)
    fits = []
    for _ in range(2):
        torch.manual_seed(len(lines))  # what the process drew before must not matter
        fits.append(finetune.fit(NETWORK, train, validation, SMALL, purpose="fold 0", epochs=3, on_epoch=lines.append))
    assert weights_hash(fits[0].network) == weights_hash(fits[1].network)
    timeless = [replace(line, seconds=0) for line in lines]
    assert timeless[:3] == timeless[3:]
    assert lines[2].train_loss < lines[0].train_loss
    other = finetune.fit(NETWORK, train, validation, SMALL, purpose="fold 1", epochs=1)
    assert weights_hash(other.network) != weights_hash(fits[0].network)


def test_frozen_stages_and_batch_statistics_stay_what_they_were() -> None:
    started = NETWORK().state_dict()
    fitted = finetune.fit(NETWORK, pictures(16), None, SMALL, purpose="refit", epochs=1).network
    ended = fitted.state_dict()
    frozen = [name for name in ended if name.startswith("backbone.") and int(name.split(".")[1]) < SMALL.frozen]
    statistics = [name for name in ended if "running_" in name]
    assert frozen
    assert statistics
    assert all(torch.equal(started[name], ended[name]) for name in [*frozen, *statistics])
    assert not torch.equal(started["backbone.12.layers.0.weight"], ended["backbone.12.layers.0.weight"])


def test_a_class_weighs_as_much_as_another_one_of_three_times_the_pictures() -> None:
    """Nothing is learned, moved or dropped here: both losses of the epoch are those of the network as it was built."""

    def built() -> Network:
        network = build("efficientnet_lite0", 2)
        with torch.no_grad():
            network.head.bias.copy_(torch.tensor([1.0, -1.0]))  # so that the classes differ in their loss
        network.dropout.p = 0.0
        return network

    still = Augmentation(flip=False, shift=0, rotate_deg=0, brightness=0, contrast=0)
    recipe = replace(SMALL, lr=0.0, head_lr=0.0, weight_decay=0.0, augmentation=still)
    train, validation = pictures(8).only([0, 2, 4, 1]), pictures(8).only([3, 5, 6])
    assert finetune._class_weights(train.targets, 2).tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])
    lines: list[Epoch] = []
    network = finetune.fit(built, train, validation, recipe, purpose="fold 0", epochs=1, on_epoch=lines.append).network

    def loss(of: Pictures) -> float:
        logits = finetune.predict(network, of.rows)[0].astype(np.float64)
        truth = of.targets.numpy()
        each = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(truth)), truth]
        return float(np.average(each, weights=np.where(truth == 1, 3, 1)))

    assert (lines[0].train_loss, lines[0].validation_loss) == pytest.approx((loss(train), loss(validation)), rel=1e-3)


def test_a_fit_stops_early_and_keeps_its_best_epoch() -> None:
    lines: list[Epoch] = []
    wrong = pictures(8, seed=500)
    wrong = Pictures(wrong.rows, 1 - wrong.targets, wrong.ids)  # the better it learns, the worse this gets
    recipe = replace(SMALL, patience=1, epochs=8, lr=1e-3)
    fitted = finetune.fit(NETWORK, pictures(32), wrong, recipe, purpose="fold 0", epochs=8, on_epoch=lines.append)
    losses = [line.validation_loss for line in lines]
    assert len(lines) < 8
    assert lines[fitted.best_epoch - 1].validation_loss == min(loss for loss in losses if loss is not None)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_reason() -> None:
    with pytest.raises(Diverged, match="learning rate"):
        finetune.fit(NETWORK, pictures(16), None, replace(SMALL, lr=1e30, head_lr=1e30), purpose="refit", epochs=3)


def test_augmentation_is_a_function_of_its_draws() -> None:
    rows = pictures(4).rows
    still = Augmentation(flip=True, shift=0, rotate_deg=0, brightness=0, contrast=0)
    draws = np.full((4, augment.DRAWS), 0.5)
    assert torch.allclose(augment.augment(rows, draws, still), augment.plain(rows), atol=1e-6)
    draws[:, 0] = 0.1
    assert torch.allclose(augment.augment(rows, draws, still), augment.plain(rows).flip(-1), atol=1e-6)
    draws[:, 1] = 1.0
    moved = augment.augment(rows, draws, replace(still, flip=False, shift=4 / 32))
    assert torch.allclose(moved[..., :-4], augment.plain(rows)[..., 4:], atol=1e-5)
    assert not moved[..., -4:].any()
    drawn = np.random.default_rng(0).random((4, augment.DRAWS))
    mild = augment.augment(rows, drawn, Augmentation())
    assert (mild.shape, mild.dtype) == ((4, 1, 32, 32), torch.float32)
    assert 0 <= float(mild.min()) <= float(mild.max()) <= 1
    assert torch.equal(mild[2:], augment.augment(rows[2:], drawn[2:], Augmentation()))


def test_the_temperature_undoes_what_made_logits_too_sure() -> None:
    generator = np.random.default_rng(0)
    honest = generator.normal(size=4000) * 2
    truth = (generator.random(4000) > 1 / (1 + np.exp(-honest))).astype(np.int64)
    logits = np.stack([honest, np.zeros(4000)], axis=1)
    assert finetune.temperature(logits * 3, truth) == pytest.approx(3, rel=0.1)
    few = np.array([[4.0, 0], [3, 0], [0, 4], [0, 5]])
    sure = 1 / (1 + math.exp(-4 / finetune.temperature(few, np.array([0, 0, 1, 1]))))
    assert sure < 0.9  # four cases without an error prove little


def test_the_file_says_what_the_network_says_or_is_none() -> None:
    network = finetune.fit(NETWORK, pictures(8), None, SMALL, purpose="refit", epochs=1).network
    onnx = export.export(network, 32)
    rows = pictures(9, seed=7).rows
    proof = export.parity(onnx, network, rows)
    assert proof.images == 9
    assert max(proof.logits, proof.features) <= export.TOLERANCE
    with torch.no_grad():
        network.head.bias += 0.01
    with pytest.raises(export.NotTheSame, match="no version"):
        export.parity(onnx, network, rows)


def test_an_ensembles_file_says_what_the_ensemble_says_or_is_none() -> None:
    torch.manual_seed(0)
    ensemble = Ensemble([build("efficientnet_lite0", 2, "random"), build("efficientnet_lite0", 2, "random")])
    onnx = export.export(ensemble, 32)
    rows = pictures(9, seed=7).rows
    proof = export.parity(onnx, ensemble, rows)
    assert proof.images == 9
    assert max(proof.logits, proof.features) <= export.TOLERANCE
    logits, features = finetune.predict(ensemble, rows)
    assert (logits.shape, features.shape) == ((9, 2), (9, 1280))
    with torch.no_grad():
        ensemble.members[1].head.bias += 0.01
    with pytest.raises(export.NotTheSame, match="no version"):
        export.parity(onnx, ensemble, rows)
