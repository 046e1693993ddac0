"""How long the node's inference takes beside ONNX Runtime alone. Run by `make bench-serve`; docs/performance.md has the figures.

In: networks, exported and put on a shelf as a training run does it. Out: a table of p50 and p99 of both ways, and their ratios.
Both ways run the same file on the same image in one process, in rounds that take turns: what else the machine does meets both.
The options of the session alone are written out here once more, so that a change of the runtime's own shows in the ratio.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the tests share
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # torch, which exports here, must not spin beside what is measured

import numpy as np
import studies
import tiny_model
import torch
from machine import machine
from numpy.typing import NDArray

from models.networks import build, start_weights
from models.preprocess import Preprocessing, preprocess
from models.registry import Registry
from models.runtime import Model, onnx_runtime, physical_cores
from training.export import export

SIZE_PX = 224
NETWORKS: tuple[tuple[str, Literal["imagenet", "random"]], ...] = (("efficientnet_lite0", "imagenet"), ("resnet50", "random"))
ROUNDS, CALLS, WARM_UP = 40, 25, 25
P50, P99 = 1.15, 1.5
"""Targets: what the node may take, as a multiple of ONNX Runtime alone."""

Score = Callable[[], tuple[NDArray[np.float32], NDArray[np.float32]]]


@dataclass(frozen=True)
class Timed:
    """Milliseconds of one image."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timed:
        """Sum up the calls of all rounds."""
        p50, p99 = np.percentile(seconds, (50, 99)) * 1000
        return cls(float(p50), float(p99))


def main() -> None:
    """Print the machine, then a line for each network."""
    print(machine(("onnxruntime", "numpy", "torch")))
    print(f"one image of {SIZE_PX} px at a time, {ROUNDS * CALLS} calls each way, milliseconds\n")
    print(f"{'':20} {'p50':>27} {'p99':>30}")
    print(f"{'network':20} {'node':>8} {'alone':>8} {'ratio':>9} {'node':>11} {'alone':>8} {'ratio':>9}")
    missed = False
    for arch, start in NETWORKS:
        node, alone = measure(arch, start)
        p50, p99 = node.p50 / alone.p50, node.p99 / alone.p99
        missed |= p50 > P50 or p99 > P99
        print(f"{arch:20} {node.p50:8.2f} {alone.p50:8.2f} {p50:9.3f} {node.p99:11.2f} {alone.p99:8.2f} {p99:9.3f}", flush=True)
    print(f"\ntargets: p50 {P50:g}, p99 {P99:g}: {'MISSED' if missed else 'met'}")


def measure(arch: str, start: Literal["imagenet", "random"]) -> tuple[Timed, Timed]:
    """Time `Model.predict`, and `session.run` of ONNX Runtime alone, on the same file and image."""
    torch.manual_seed(0)
    onnx = export(build(arch, 2, start), SIZE_PX)
    spec = Preprocessing(SIZE_PX)
    batch = preprocess(studies.image(rows=2560, columns=2048), spec)[np.newaxis]  # (1, 1, s, s)
    with TemporaryDirectory() as folder:
        registry = Registry(Path(folder) / "models")
        file = Path(folder) / "model.onnx"
        file.write_bytes(onnx)
        card = tiny_model.card(onnx, arch=arch, preprocessing=spec, start=start_weights(arch, start))
        model = Model.load(registry, registry.add(file, card, corpus=("OST-A", "OST-B")))
    session = _session(onnx)
    ways: tuple[Score, Score] = (
        lambda: model.predict(batch),
        lambda: session.run(["logits", "features"], {"image": batch}),
    )
    for node, alone in zip(ways[0](), ways[1](), strict=True):
        if not np.array_equal(node, alone):
            raise SystemExit(f"{arch}: the node and ONNX Runtime alone do not say the same; their times cannot be compared")
    return _take_turns(ways)


def _session(onnx: bytes) -> Any:
    """Make a session as a reader of ONNX Runtime's documentation would for a daemon on these cores."""
    onnxruntime = onnx_runtime()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = physical_cores()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


def _take_turns(ways: tuple[Score, Score]) -> tuple[Timed, Timed]:
    seconds: tuple[list[float], list[float]] = ([], [])
    for way in ways:
        for _ in range(WARM_UP):
            way()
    for turn in range(ROUNDS):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):  # who comes second may find the caches or the clock otherwise
            for _ in range(CALLS):
                started = time.perf_counter()
                ways[which]()
                seconds[which].append(time.perf_counter() - started)
    return Timed.of(seconds[0]), Timed.of(seconds[1])


if __name__ == "__main__":
    main()
