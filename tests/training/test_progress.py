"""How far a run is and how long it still takes: on a terminal, in a log, and for whoever looks from outside."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from labelled import Heard
from rich.console import Console

from training import folder
from training.__main__ import Bar, Lines
from training.folder import _Pulse


def test_a_bar_shows_the_stage_what_is_done_of_it_and_the_time_left() -> None:
    clock, screen = [0.0], io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None, width=120, get_time=lambda: clock[0])
    with Bar(console) as bar:
        bar.stage("training", 8)
        for at_s, done in ((10.0, 2), (30.0, 4)):
            clock[0] = at_s
            bar.advance(done)
    (shown,) = [line for line in screen.getvalue().splitlines()[-2:] if "training" in line]
    assert "4/8" in shown
    assert shown.rstrip().endswith("0:00:30 0:00:40")  # spent; left at ten seconds each
    with Bar(console) as bar:
        bar.stage("training", 8)
        bar.epoch("fold 0", {"train_loss": 0.25, "validation_loss": 0.5})
    assert "fold 0, loss 0.500" in screen.getvalue()


def test_a_plain_line_tells_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    lines.stage("training", 8)
    told = {"epoch": 3, "train_loss": 0.51234, "validation_loss": 0.48, "lr": 0.001, "seconds": 12.34}
    lines.epoch("fold 1", told | {"best": True})
    lines.epoch("refit", told | {"best": True, "validation_loss": None})  # it has no other epoch to be better than
    assert capsys.readouterr().err.splitlines() == [
        "training (8)",
        "fold 1, epoch 3: training loss 0.5123, validation loss 0.4800, best so far, 12.3 s",
        "refit, epoch 3: training loss 0.5123, 12.3 s",
    ]


class Told:
    """What a pulse leaves for others; the clock is ours."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.at_s = 1000.0
        self.last: dict[str, Any] = {}
        patch.setattr(folder, "monotonic", lambda: self.at_s)
        self.pulse = _Pulse(Heard(), lambda: None, self.tell)

    def tell(self, pulse: dict[str, Any]) -> None:
        self.last = dict(pulse)

    def after(self, seconds: float, say: Callable[[float], None], done: float) -> tuple[float, int | None]:
        """Say after so many seconds how much is done; give what is told then of it and of the time left."""
        self.at_s += seconds
        say(done)
        return self.last["done"], self.last.get("left_s")

    def epoch(self, seconds: float, done: int) -> tuple[float, int | None]:
        self.at_s += seconds
        self.pulse.epoch("a fit", {"epoch": done, "loss": 0.5})
        return self.after(0, self.pulse.advance, done)  # type: ignore[arg-type]


def test_the_time_left_is_reckoned_from_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch)
    told.pulse.stage("decoding images", 100)
    assert told.last == {"stage": "decoding images", "done": 0, "total": 100}
    assert told.after(50, told.pulse.advance, 20) == (20, 200)
    told.pulse.stage("pretraining", 6)
    assert told.after(5, told.pulse.within, 0.25) == (0.25, 115)
    assert told.epoch(15, 1) == (1, 100)
    assert told.epoch(40, 2) == (2, 120)


def test_what_an_earlier_start_has_done_took_no_time_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch)
    told.pulse.stage("training", 8)
    assert told.after(2, told.pulse.skip, 4) == (4, None)  # its folds are read: nobody knows yet what an epoch takes
    assert told.epoch(28, 5) == (5, 90)
    told.pulse.stage("pretraining", 6)
    assert told.after(10, told.pulse.within, 3.5) == (3.5, 50)
