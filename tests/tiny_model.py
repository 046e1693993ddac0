"""A real ONNX model of a few bytes, its card, and a shelf that holds it.

Its features are the mean grey of the image and its square; its logits are (2 * mean - 1) * 4 for the first class and 0 for
the second: bright images are of the first class, dark ones of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from models.card import RANDOM, Card, Code, Label, Metric, corpus_file, sha256
from models.preprocess import Preprocessing
from models.reference import Reference
from models.registry import Registry

SIZE = 32
NOW = datetime(2026, 3, 1, 14, 5, tzinfo=UTC)
EWING = Label(
    "ewing",
    Code("307608006", "SCT", "Ewing's sarcoma of bone"),
    Code("P-EWING", "99OSTEON", "AI probability of Ewing's sarcoma"),
    urgent=True,
)
OSTEOMYELITIS = Label(
    "osteomyelitis",
    Code("409780002", "SCT", "Acute osteomyelitis"),
    Code("P-OSTEOMYELITIS", "99OSTEON", "AI probability of acute osteomyelitis"),
)


def onnx_bytes(*, slope: float = 4.0, classes: int = 2) -> bytes:
    """Give the model; `slope` makes another one."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    helper = onnx.helper
    weights = np.zeros((2, classes), np.float32)
    weights[0, 0] = 2 * slope
    bias = np.zeros(classes, np.float32)
    bias[0] = -slope
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["mean"]),
        helper.make_node("Mul", ["mean", "mean"], ["square"]),
        helper.make_node("Concat", ["mean", "square"], ["features"], axis=1),
        helper.make_node("Gemm", ["features", "weights", "bias"], ["logits"]),
    ]
    real = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", real, ["n", 1, SIZE, SIZE])],
        [
            helper.make_tensor_value_info("logits", real, ["n", classes]),
            helper.make_tensor_value_info("features", real, ["n", 2]),
        ],
        [onnx.numpy_helper.from_array(weights, "weights"), onnx.numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def card(onnx: bytes = b"", *, corpus: Sequence[str] = ("OST-A", "OST-B"), **other: Any) -> Card:
    """Give a card of the model `onnx`."""
    values: dict[str, Any] = {
        "name": "Osteon tiny",
        "arch": "efficientnet_lite0",
        "labels": (EWING, OSTEOMYELITIS),
        "preprocessing": Preprocessing(SIZE),
        "temperature": 1.0,
        "body_parts": ("KNEE", "TIBIA", "LOWERLEG"),
        "metrics": (Metric("AUC, locked patients", 0.81, 0.62, 0.97, 16, "bootstrap by patient"),),
        "training_mix": (40, 38),
        "corpus_sha256": sha256(corpus_file(corpus)),
        "labels_sha256": "0" * 64,
        "recipe": "phantom",
        "seeds": {"recipe": 20260117},
        "code_version": "0.1.0",
        "start": RANDOM,
        "locked_looks": 1,
        "decision": "insufficient evidence",
        "decision_reason": "8 locked patients in the smaller class, 30 are needed",
        "limits": ("Knows two classes only.",),
        "onnx_sha256": sha256(onnx),
        "created_at": NOW,
    }
    return Card(**(values | other))


def shelve(
    registry: Registry,
    folder: Path,
    *,
    slope: float = 4.0,
    corpus: Sequence[str] = ("OST-A", "OST-B"),
    reference: Reference | None = None,
    **other: Any,
) -> str:
    """Put the model on a shelf and give its version."""
    data = onnx_bytes(slope=slope)
    file = folder / "tiny.onnx"
    file.write_bytes(data)
    statistics = None
    if reference is not None:
        statistics = folder / "reference.npz"
        statistics.write_bytes(reference.to_bytes())
        other["reference_sha256"] = sha256(statistics.read_bytes())
    return registry.add(file, card(data, corpus=corpus, **other), corpus=corpus, reference=statistics)


def promote_tiny(models: Path, *, slope: float = 4.0, corpus: Sequence[str] = ("OST-A", "OST-B")) -> str:
    """Put a tiny model into service on the shelf `models` of a site, and give its version."""
    models.mkdir(parents=True, exist_ok=True)
    registry = Registry(models)
    with TemporaryDirectory() as folder:
        version = shelve(registry, Path(folder), slope=slope, corpus=corpus, body_parts=("LEG", "KNEE", "TIBIA"))
    registry.promote(
        version, by="test", reason="a model for the tests", decision="by hand", locked=frozenset(), now=datetime.now(UTC)
    )
    return version
