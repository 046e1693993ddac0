"""A fitted network, or an ensemble of them, as one ONNX file that says the same.

In: a network and pictures of the corpus. Out: the bytes of the file, proven against torch on those pictures. A file that says
anything else, or that needs another file beside it, must never become a version.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.errors import Final
from models.networks import Ensemble, Network
from models.runtime import onnx_runtime
from training.augment import plain

TOLERANCE = 1e-4
BATCH = 16


class NotTheSame(Final):
    """The exported file does not say what the network says; no version is made of it."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How far the file is from the network."""

    images: int
    logits: float
    """Largest difference of a logit."""
    features: float
    """Largest difference of a feature."""
    opset: int


def export(network: Network | Ensemble, size_px: int) -> bytes:
    """Write the network as ONNX with a batch of any size: `image` (n, 1, s, s) -> `logits` (n, c), `features` (n, d)."""
    network = network.cpu().eval()
    example = torch.zeros(2, 1, size_px, size_px)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            network,
            (example,),
            file,
            dynamo=True,
            external_data=False,
            input_names=["image"],
            output_names=["logits", "features"],
            dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},),
            verbose=False,
        )
        others = [other.name for other in Path(folder).iterdir() if other != file]
        if others:
            raise NotTheSame("the exporter wrote weights beside the file; no version is made of it")
        return file.read_bytes()


def parity(onnx: bytes, network: Network | Ensemble, rows: Tensor) -> Parity:
    """Hold file and network against each other on pictures (n, s, s) uint8 of the corpus, in batches of several sizes.

    Raises
    ------
    NotTheSame
        A logit or a feature differs by more than 1e-4, or is not finite.
    """
    import onnx as library

    session = onnx_runtime().InferenceSession(onnx, providers=["CPUExecutionProvider"])
    worst = {"logits": 0.0, "features": 0.0}
    network = network.cpu().eval()
    for part in (rows[:1], *torch.split(rows[1:], BATCH)):
        if not len(part):
            continue
        images = plain(part)
        with torch.inference_mode():
            expected = dict(zip(("logits", "features"), network(images), strict=True))
        found = dict(zip(("logits", "features"), session.run(["logits", "features"], {"image": images.numpy()}), strict=True))
        for name, values in found.items():
            worst[name] = max(worst[name], _largest(values, expected[name].numpy()))
    if not all(value <= TOLERANCE for value in worst.values()):
        told = ", ".join(f"{name} {value:.2g}" for name, value in worst.items())
        raise NotTheSame(
            f"the exported file differs from the network by {told}; {TOLERANCE:g} is allowed: no version is made of it"
        )
    opset = max(one.version for one in library.load_from_string(onnx).opset_import if one.domain in ("", "ai.onnx"))
    return Parity(len(rows), worst["logits"], worst["features"], int(opset))


def _largest(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    apart = np.abs(found - expected)
    return float(apart.max()) if np.isfinite(found).all() and np.isfinite(expected).all() else float("inf")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress, advice and deprecation warnings off the terminal; its errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
