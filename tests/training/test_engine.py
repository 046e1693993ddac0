"""What computes a step: the quickest of what the machine can do."""

from __future__ import annotations

import pytest
import torch
from pretraining import network
from torch import nn

from training import engine
from training.engine import Engine

FORMATS: tuple[engine.Format, ...] = ("float32", "bfloat16")
ENGINES = [Engine("cpu", each, channels_last=last) for each in FORMATS for last in (True, False)]


def tried(patch: pytest.MonkeyPatch, quickest: Engine | None = None) -> list[Engine]:
    """Let one engine be the quickest by a clock of ours; give all that are tried."""
    seen: list[Engine] = []

    def step_s(one: Engine, _network: nn.Module, _size_px: int, _batch: int) -> float:
        seen.append(one)
        return 0.1 if one == quickest else 0.2

    patch.setattr(engine, "_step_s", step_s)
    return seen


@pytest.mark.parametrize("quickest", ENGINES, ids=str)
def test_the_quickest_of_both_formats_and_layouts_is_chosen(quickest: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tried(monkeypatch, quickest)
    before = torch.get_rng_state()
    assert engine.chosen("cpu", lambda: network(2), 32) == quickest
    assert seen == ENGINES
    assert torch.equal(torch.get_rng_state(), before)  # the networks that were tried draw nothing from the run's generator


def test_a_gpu_without_bfloat16_is_not_tried_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tried(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: including_emulation)
    monkeypatch.setattr(Engine, "place", lambda _self, module: module)
    engine.chosen("cuda", lambda: network(2), 32)
    assert {one.format for one in seen} == {"float32"}
