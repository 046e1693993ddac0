"""Journals of runs as the stages write them, made up; each value follows from its epoch."""

from __future__ import annotations

import math
from typing import Any


def pretraining(epochs: int = 12, *, probe_every: int = 3) -> list[dict[str, Any]]:
    """Lines of a pretraining that goes well."""
    return [
        {
            "epoch": epoch,
            "loss": 6 * math.exp(-epoch / 8) + 1,
            "nmi": None if epoch == 1 else 1 - 0.5 * math.exp(-epoch / 5),
            "empty": max(0, 4 - epoch),
            "relocated": max(0, 9 - epoch),
            "sizes": [min(epoch, 3), 20, 46, 55, 200 - 5 * epoch],
            "lr": 0.05,
            "seconds": 12.3,
            "knn": 0.6 + 0.01 * epoch if epoch % probe_every == 0 else None,
            "linear": 0.7 + 0.01 * epoch if epoch % probe_every == 0 else None,
        }
        for epoch in range(1, epochs + 1)
    ]


def classifier(epochs: int = 12) -> list[dict[str, Any]]:
    """Lines of step two."""
    return [
        {
            "epoch": epoch,
            "loss": 4 * math.exp(-epoch / 6),
            "validation_loss": 4 * math.exp(-epoch / 6) + 0.4,
            "validation_accuracy": 0.8 * (1 - math.exp(-epoch / 4)),
            "lr": 0.05,
            "seconds": 9.0,
        }
        for epoch in range(1, epochs + 1)
    ]


def folds(stops: tuple[int, ...] = (8, 5, 11), refit: int = 6) -> list[dict[str, Any]]:
    """Lines of the folds of a fine-tuning, each stopped at its own epoch, and of the refit."""
    lines: list[dict[str, Any]] = [
        {
            "fit": f"fold {number}",
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "validation_loss": 1 / epoch + 0.01 * epoch + 0.02 * number,
        }
        for number, stop in enumerate(stops)
        for epoch in range(1, stop + 1)
    ]
    return lines + [
        {"fit": "refit", "epoch": epoch, "train_loss": 1 / epoch, "validation_loss": None} for epoch in range(1, refit + 1)
    ]
