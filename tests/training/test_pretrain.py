"""Learning without labels: to the bit as if never stopped, as the papers say, and stopped with the reason where it fails."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pretraining import SIZE_PX, WIDTH, gallery, part, require_same, timeless
from pretraining import network as build
from torch import Tensor
from torch.nn import functional

from models.networks import Network
from training import cluster, pretrain
from training.cluster import NotFinite
from training.pretrain import Collapsed, Diverged, Gallery, Part, State, TooLarge
from training.recipe import Classifier, Pretraining, Views, seed_for, uniforms
from training.views import DRAWS, view

PICTURES = gallery()
CLASSIC = Pretraining(clusters=6, epochs=3, batch=16, lr=0.02, dims=8, largest_max=1.0)
BANK = replace(CLASSIC, method="deepcluster2", views=Views(small=2, small_px=16))
LABELS = np.arange(60) % 5
TRAIN, HELD = np.arange(0, 48), np.arange(48, 60)

Train = Callable[[Part, State | None], State]
HOW: dict[str, Train] = {
    "deepcluster": lambda part, state: pretrain.deepcluster(build, PICTURES, CLASSIC, part, state),
    "deepcluster2": lambda part, state: pretrain.deepcluster(build, PICTURES, BANK, part, state),
    "classify": lambda part, state: pretrain.classify(
        build, PICTURES, LABELS, TRAIN, HELD, Classifier(epochs=3, batch=16, lr=0.02), part, state
    ),
}


def stored(state: State) -> bytes:
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def read(data: bytes) -> State:
    state: State = torch.load(io.BytesIO(data), weights_only=True)
    return state


class Trained:
    """One training that nobody stopped, with its state after each epoch as a file would hold it."""

    def __init__(self, train: Train) -> None:
        self.train = train
        self.states: list[State] = []
        self.told: list[dict[str, Any]] = []
        self.last = read(stored(train(part(keep=self.keep, on_epoch=self.told.append), None)))

    def keep(self, state: State) -> None:
        self.states.append(read(stored(state)))


@pytest.fixture(scope="module")
def trained() -> dict[str, Trained]:
    return {name: Trained(train) for name, train in HOW.items()}


# --- never stopped --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("name", HOW)
def test_a_training_that_goes_on_after_any_epoch_is_to_the_bit_the_one_that_was_never_stopped(
    trained: dict[str, Trained], name: str, epoch: int
) -> None:
    whole = trained[name]
    torch.manual_seed(epoch)  # what the process drew before must not matter
    told: list[dict[str, Any]] = []
    ended = read(stored(HOW[name](part(on_epoch=told.append), whole.states[epoch - 1])))
    require_same(ended, whole.last)
    assert [line["epoch"] for line in told] == list(range(epoch + 1, 4))
    assert timeless(told) == timeless(whole.told[epoch:])


@pytest.mark.parametrize("name", HOW)
def test_pictures_that_lie_on_the_device_for_good_give_the_same_bits(
    trained: dict[str, Trained], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor stands for a GPU whose memory holds them all; they go there in pieces."""
    asked: list[int] = []
    monkeypatch.setattr(pretrain, "fits", lambda size, _device: asked.append(size) is None)
    monkeypatch.setattr(pretrain, "PIECE", 25)
    settled = gallery()
    monkeypatch.setitem(globals(), "PICTURES", settled)
    require_same(read(stored(HOW[name](part(), None))), trained[name].last)
    assert [tuple(one.shape) for one in settled.resident] == [(60, SIZE_PX, SIZE_PX)]
    assert asked[0] == 60 * SIZE_PX * SIZE_PX


@pytest.mark.parametrize("name", HOW)
def test_every_epoch_has_its_line_and_its_state(trained: dict[str, Trained], name: str) -> None:
    whole = trained[name]
    assert [state["epoch"] for state in whole.states] == [1, 2, 3]
    for state in whole.states:
        assert state["lines"] == whole.told[: state["epoch"]]
    assert all(math.isfinite(line["loss"]) and line["seconds"] > 0 for line in whole.told)
    if name != "classify":
        assert [line["nmi"] is None for line in whole.told] == [True, False, False]
        for line in whole.told:
            assert line["sizes"] == sorted(line["sizes"])
            assert 2 <= line["sizes"][0] <= 60 / 6 <= line["sizes"][-1]


@pytest.mark.parametrize("name", ["deepcluster", "deepcluster2"])
def test_the_last_look_at_the_clusters_is_the_same_whenever_it_is_taken(trained: dict[str, Trained], name: str) -> None:
    how = CLASSIC if name == "deepcluster" else BANK
    one, two = (pretrain.clusters(build, PICTURES, how, part(), read(stored(trained[name].last))) for _ in range(2))
    assert np.array_equal(one.assignment.labels, two.assignment.labels)
    assert np.array_equal(one.rows, two.rows)
    assert one.rows.shape == (60, 8)
    assert np.allclose(np.linalg.norm(one.rows, axis=1), 1, atol=1e-4)
    assert one.assignment.sizes.sum() == 60


def test_another_seed_learns_something_else(trained: dict[str, Trained]) -> None:
    other = pretrain.deepcluster(build, PICTURES, replace(CLASSIC, epochs=1), replace(part(), seed=8), None)
    assert not torch.equal(other["labels"], trained["deepcluster"].states[0]["labels"])


def test_features_are_of_each_picture_alone_and_leave_the_network_as_it_was() -> None:
    torch.manual_seed(0)
    network = build(3).train()
    before = stored(network.state_dict())
    found = pretrain.features(network, gallery(70), part())
    assert (found.shape, network.training) == ((70, WIDTH), True)
    assert stored(network.state_dict()) == before
    network.eval()
    with torch.inference_mode():
        logits, pooled = network(gallery(70).take(np.array([66, 2])).unsqueeze(1) / 255)
    assert torch.allclose(found[[66, 2]], pooled, atol=1e-5)
    assert torch.allclose(pretrain.features(network, gallery(70), part(), embed=True)[[66, 2]], logits, atol=1e-5)


# --- as the papers say ------------------------------------------------------------------------------------------------------


def started(how: Pretraining, purpose: str = "start") -> Network:
    """Build the network that a training starts with."""
    torch.manual_seed(seed_for(7, purpose))
    network = build(how.clusters if how.method == "deepcluster" else 2)
    if how.method == "deepcluster2":
        network.project(how.dims)
    return network


def shown(how: Pretraining, epoch: int, positions: NDArray[np.int64], turns: NDArray[np.int64], small: int = -1) -> Tensor:
    """Draw the views of a batch."""
    names = [f"{PICTURES.ids[at]}/{turn}" if turn else PICTURES.ids[at] for at, turn in zip(positions, turns, strict=True)]
    spec = how.views
    scale = (spec.scale_min, spec.scale_max) if small < 0 else (spec.small_scale_min, spec.small_scale_max)
    drawn = uniforms(7, "view" if small < 0 else f"small {small}", epoch, names, DRAWS)
    size_px = SIZE_PX if small < 0 else spec.small_px
    options = {"flip": spec.flip, "brightness": spec.brightness, "contrast": spec.contrast}
    return view(PICTURES.take(positions), drawn, size_px, scale=scale, **options)


def looked(network: Network, embed: bool) -> Tensor:
    network.eval()
    with torch.no_grad():
        logits, pooled = network(PICTURES.take(np.arange(60)).unsqueeze(1) / 255)
    network.train()
    return logits if embed else pooled


def test_deepcluster_is_what_its_paper_says_in_plain_torch() -> None:
    """Two epochs of one step each: whitened features, k-means, even draws, a fresh head with an SGD of its own [0]."""
    how = replace(CLASSIC, epochs=2, batch=60, momentum=0.9, weight_decay=0.01)
    states = Trained(lambda part, state: pretrain.deepcluster(build, PICTURES, how, replace(part, batch=60), state)).states
    network = started(how)
    backbone = list(network.backbone.parameters())
    speed = [torch.zeros_like(one) for one in backbone]
    for epoch, state in enumerate(states, start=1):
        rows = cluster.whiten(looked(network, embed=False), how.dims)
        found = cluster.kmeans(rows.numpy(), how.clusters, seed=seed_for(7, "k-means", epoch), iterations=20)
        positions, turns = cluster.draw_evenly(found.labels, 60, seed=7, epoch=epoch, ids=PICTURES.ids)
        assert np.array_equal(state["labels"].numpy(), found.labels)
        torch.manual_seed(seed_for(7, f"head {epoch}"))
        head = torch.empty(6, WIDTH).normal_(std=0.01).requires_grad_()
        bias = torch.zeros(6, requires_grad=True)
        features = network.backbone((shown(how, epoch, positions, turns) - network.mean) / network.spread)
        loss = functional.cross_entropy(features @ head.T + bias, torch.from_numpy(found.labels)[positions])
        assert state["lines"][-1]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        slopes = torch.autograd.grad(loss, [*backbone, head, bias])
        with torch.no_grad():
            for one, v, slope in zip(backbone, speed, slopes, strict=False):
                v.mul_(0.9).add_(slope + 0.01 * one)  # momentum goes on from epoch to epoch
                one.sub_(0.02 * v)
            for one, slope in ((head, slopes[-2]), (bias, slopes[-1])):
                one.sub_(0.02 * (slope + 0.01 * one))  # none for the head
        after = {f"backbone.{name}": value for name, value in network.backbone.state_dict().items()}
        after |= {"head.weight": head.detach(), "head.bias": bias.detach()}
        for name, value in state["network"].items():
            assert torch.allclose(value.float(), after[name].float(), atol=2e-5, rtol=1e-3), (epoch, name)
    assert states[1]["lines"][1]["nmi"] == pytest.approx(cluster.nmi(states[0]["labels"].numpy(), states[1]["labels"].numpy()))


def test_the_head_of_deepcluster_is_a_fresh_one_in_every_epoch() -> None:
    """Numbers of clusters change their meaning. With a learning rate of zero the head stays as it was drawn."""
    states = Trained(lambda part, state: pretrain.deepcluster(build, PICTURES, replace(CLASSIC, lr=0.0), part, state)).states
    heads = [state["network"]["head.weight"] for state in states]
    for head, state in zip(heads, states, strict=True):
        assert head.std() == pytest.approx(0.01, rel=0.1)
        assert not state["network"]["head.bias"].any()
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    kept = [state["network"]["backbone.0.weight"] for state in states]
    assert torch.equal(kept[0], kept[2])


def test_deepcluster2_is_what_its_paper_says_in_plain_torch() -> None:
    """One epoch of one step: spherical k-means of the bank, centroids as frozen prototypes, one loss over all views [1]."""
    how = replace(BANK, epochs=4, batch=60, temperature=0.2)
    training = Trained(lambda part, state: pretrain.deepcluster(build, PICTURES, how, replace(part, batch=60), state))
    state = training.states[0]
    network = started(how)
    bank = functional.normalize(looked(network, embed=True), dim=1)
    found = cluster.kmeans(bank.numpy(), 6, seed=seed_for(7, "k-means", 1), iterations=20, spherical=True)
    assert np.allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-5)
    prototypes = torch.from_numpy(found.centroids)  # (K, d), no parameter
    order = np.argsort(uniforms(7, "order", 1, PICTURES.ids)[:, 0], kind="stable")
    targets = torch.from_numpy(found.labels)[order]
    views = [shown(how, 1, order, np.zeros_like(order), small) for small in (-1, 0, 1)]
    assert [one.shape[-1] for one in views] == [SIZE_PX, 16, 16]
    embedded = [functional.normalize(network(one)[0], dim=1) for one in views]
    loss = torch.stack([functional.cross_entropy(one @ prototypes.T / 0.2, targets) for one in embedded]).mean()
    optimiser = torch.optim.SGD(network.parameters(), lr=how.lr * 1e-3, momentum=0.9, weight_decay=1e-5)  # it begins to rise
    loss.backward()
    optimiser.step()
    assert state["lines"][0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert state["lines"][0]["lr"] == pytest.approx(how.lr * 1e-3)
    for name, value in network.state_dict().items():
        assert torch.allclose(value.float(), state["network"][name].float(), atol=2e-5, rtol=1e-3), name
    assert torch.allclose(state["bank"][order], embedded[0].detach(), atol=1e-4)  # the large view's
    assert np.array_equal(state["labels"].numpy(), found.labels)
    # the next epoch clusters that bank, without another look at the pictures
    again = cluster.kmeans(state["bank"].numpy(), 6, seed=seed_for(7, "k-means", 2), iterations=20, spherical=True)
    assert np.array_equal(training.states[1]["labels"].numpy(), again.labels)


def test_an_image_that_an_epoch_does_not_show_keeps_its_row_of_the_bank() -> None:
    """61 pictures are four batches of 15, and one that waits."""
    one_more = gallery(61)
    how = replace(BANK, epochs=2, views=Views())
    states = Trained(lambda part, state: pretrain.deepcluster(build, one_more, how, part, state)).states
    same = [torch.equal(one, other) for one, other in zip(states[0]["bank"], states[1]["bank"], strict=True)]
    assert sum(same) == 1
    assert torch.allclose(torch.linalg.vector_norm(states[1]["bank"], dim=1), torch.ones(61), atol=1e-4)


def test_the_rate_of_deepcluster2_rises_for_a_tenth_and_falls_as_a_cosine(trained: dict[str, Trained]) -> None:
    done = [(epoch - 1 + 3 / 4) / 3 for epoch in (1, 2, 3)]  # the last of four batches
    expected = [0.02 * 0.5 * (1 + math.cos(math.pi * (one - 0.1) / 0.9)) for one in done]
    assert [line["lr"] for line in trained["deepcluster2"].told] == pytest.approx(expected)
    assert {line["lr"] for line in trained["deepcluster"].told} == {0.02}


def test_cluster_numbers_are_told_on_pictures_that_were_held_back_and_the_best_epoch_is_kept(
    trained: dict[str, Trained],
) -> None:
    whole = trained["classify"]
    said = [line["validation_accuracy"] for line in whole.told]
    best = whole.last["best"]
    assert best["accuracy"] == max(said)
    assert best["epoch"] == 1 + said.index(max(said))
    for name, value in whole.states[best["epoch"] - 1]["network"].items():
        assert torch.equal(best["network"][name], value), name
    other = pretrain.classify(
        build, PICTURES, np.where(np.arange(60) < 48, LABELS, 0), TRAIN, HELD, Classifier(3, 16, 0.02), part()
    )
    assert torch.equal(other["network"]["backbone.0.weight"], whole.last["network"]["backbone.0.weight"])  # not learned from


def test_the_best_epoch_before_a_stop_stays_the_best(trained: dict[str, Trained]) -> None:
    state = read(stored(trained["classify"].states[0]))
    state["best"]["accuracy"] = 1.1  # never reached again
    ended = HOW["classify"](part(), state)
    assert (ended["epoch"], ended["best"]["epoch"]) == (3, 1)


def test_two_textures_are_learned_by_the_classifier() -> None:
    kinds = np.arange(60) % 2
    state = pretrain.classify(build, PICTURES, kinds, TRAIN, HELD, Classifier(epochs=12, batch=8, lr=0.05), part())
    assert state["lines"][-1]["loss"] < state["lines"][0]["loss"]
    assert state["best"]["accuracy"] >= 0.75


# --- stops ----------------------------------------------------------------------------------------------------------------


def kept_until(how: Pretraining, pictures: Gallery, error: type[Exception], match: str, train: Part | None = None) -> list[State]:
    """Train until the error comes; give the states that were kept before it."""
    states: list[State] = []
    with pytest.raises(error, match=match):
        pretrain.deepcluster(
            build, pictures, how, replace(train or part(), keep=lambda state: states.append(read(stored(state))))
        )
    return states


@pytest.mark.parametrize("how", [CLASSIC, BANK], ids=["deepcluster", "deepcluster2"])
def test_a_loss_or_feature_that_is_no_number_stops_the_run(how: Pretraining) -> None:
    with pytest.raises((Diverged, NotFinite), match=r"not finite|learning rate"):
        pretrain.deepcluster(build, PICTURES, replace(how, lr=1e30), part())


def test_what_diverges_is_told_with_the_learning_rate() -> None:
    assert kept_until(replace(CLASSIC, lr=1e30), PICTURES, Diverged, r"loss is \S+ in epoch 1; .*learning rate 1e\+30") == []


def test_features_that_are_no_numbers_are_told_by_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pretrain.features

    def poisoned(*args: Any, **options: Any) -> Tensor:
        found = real(*args, **options).clone()
        found[13] = float("nan")
        return found

    monkeypatch.setattr(pretrain, "features", poisoned)
    for how in (CLASSIC, BANK):
        kept_until(how, PICTURES, NotFinite, r"2\.25\.0\.13$")


@pytest.mark.parametrize("how", [CLASSIC, BANK], ids=["deepcluster", "deepcluster2"])
def test_pictures_that_are_all_the_same_stop_the_run(how: Pretraining) -> None:
    same = Gallery(PICTURES.rows[:1], np.zeros(60, np.int64), PICTURES.ids)
    assert kept_until(how, same, Collapsed, "nearly the same .* in epoch 1") == []


@pytest.mark.parametrize("how", [CLASSIC, BANK], ids=["deepcluster", "deepcluster2"])
def test_one_cluster_of_most_images_stops_the_run(how: Pretraining) -> None:
    kept_until(replace(how, largest_max=0.1), PICTURES, Collapsed, r"\d+% of the images are in one cluster in epoch 1; 10% are")


def test_too_many_empty_clusters_stop_the_run() -> None:
    """Fifty copies of one picture cannot be told apart."""
    copies = Gallery(PICTURES.rows, np.concatenate([np.arange(10), np.full(50, 10)]), PICTURES.ids)
    how = replace(CLASSIC, clusters=30, smallest=1, empty_max=0.5)
    kept_until(replace(how, alike_max=1.0), copies, Collapsed, r"\d+ of 30 clusters are empty in epoch 1")
    kept_until(how, copies, Collapsed, "83% of the images have the same features in epoch 1; 25% are allowed")


def test_assignments_that_do_not_agree_stop_the_run_once_it_should_have_settled() -> None:
    states = kept_until(replace(CLASSIC, epochs=6, nmi_min=1.1), PICTURES, Collapsed, r"epochs 4 and 5 agree by 0\.\d\d only")
    assert [state["epoch"] for state in states] == [1, 2, 3, 4]
    ended = pretrain.deepcluster(build, PICTURES, replace(CLASSIC, epochs=5), part(), states[-1])
    assert ended["epoch"] == 5  # the last good state goes on where a person allows it


def needing(memory: int, error: Exception) -> Callable[[int], Network]:
    """Give what builds networks that a training batch of more than so many pictures is too large for."""

    def built(classes: int) -> Network:
        network = build(classes)

        def allocate(module: torch.nn.Module, images: tuple[Tensor, ...]) -> None:
            if module.training and len(images[0]) > memory:
                raise error

        network.register_forward_pre_hook(allocate)
        return network

    return built


ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(ALLOCATOR), torch.cuda.OutOfMemoryError("CUDA out of memory")])
def test_a_batch_that_does_not_fit_is_told_with_its_size(error: Exception) -> None:
    with pytest.raises(TooLarge, match="batch of 16 does not fit"):
        pretrain.deepcluster(needing(8, error), PICTURES, CLASSIC, part())
    with pytest.raises(TooLarge):
        pretrain.classify(needing(8, error), PICTURES, LABELS, TRAIN, HELD, Classifier(3, 16, 0.02), part())
    assert pretrain.deepcluster(needing(8, error), PICTURES, replace(CLASSIC, epochs=1), part(batch=8))["epoch"] == 1


def test_another_error_is_not_taken_for_a_full_memory() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        pretrain.deepcluster(needing(8, RuntimeError("mat1 and mat2 shapes")), PICTURES, CLASSIC, part())


@pytest.mark.parametrize(("count", "batch", "ranks"), [(60, 16, 1), (61, 16, 1), (7, 512, 1), (100, 32, 2), (3, 2, 1)])
def test_batches_are_of_one_size_even_over_the_processes_and_leave_few_pictures(count: int, batch: int, ranks: int) -> None:
    cut = list(pretrain._batches(count, batch, ranks))
    sizes = {len(one) for one in cut}
    assert len(sizes) == 1
    size = sizes.pop()
    assert 2 * ranks <= size <= max(batch, 2 * ranks)
    assert size % ranks == 0
    flat = np.concatenate(cut)
    assert np.array_equal(flat, np.arange(len(flat)))
    assert count - len(flat) < size
