"""Several processes at one training, under torchrun; each says what it saw and computed.

    torchrun … several.py steps FOLDER METHOD      three steps of a pretraining method: FOLDER/METHOD-RANK.pt
    torchrun … several.py train FOLDER …           `python -m training …` with a recipe of RECIPES, and the fault in FOLDER/fault

Faults: `none`; of one process in one epoch, once, `killed RANK EPOCH` and `memory RANK EPOCH`; `slow`: each epoch takes a second
longer. A state is kept after every epoch. FOLDER/pid-RANK and FOLDER/epochs-RANK say who worked on what.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import torch
from labelled import SMALLEST, texture

from models.networks import Network, build
from training import pretrain, recipe, upstream
from training.__main__ import main
from training.engine import Engine
from training.pretrain import Gallery, Part
from training.ranks import Ranks, joined, world
from training.recipe import Classifier, Pretraining, Recipe, Views

SIZE_PX = 64
BATCH = 16
THREADS = 2
CLUSTERS = 5
TINY: Recipe = replace(
    SMALLEST,
    name="tiny",
    pretraining=Pretraining(
        clusters=CLUSTERS, epochs=4, batch=BATCH, lr=0.01, dims=16, probe_every=2, nmi_min=0.0, largest_max=1.0, alike_max=1.0,
        classifier=Classifier(epochs=3, batch=BATCH, lr=0.01),
    ),
)  # fmt: skip
assert TINY.pretraining is not None
BANKED: Recipe = replace(
    TINY, name="banked", pretraining=replace(TINY.pretraining, method="deepcluster2", views=Views(small=1, small_px=16))
)
"""The same by `deepcluster2`."""
RECIPES = {"tiny": TINY, "banked": BANKED}


def how(method: Any) -> Pretraining:
    """Give a pretraining of one epoch of three steps, too small for rounding to grow between them."""
    views = Views(small=1, small_px=SIZE_PX) if method == "deepcluster2" else Views()
    return Pretraining(method, CLUSTERS, epochs=1, batch=BATCH, lr=0.001, dims=8, largest_max=1.0, alike_max=1.0, views=views)


def network(classes: int) -> Network:
    """Give a network without dropout, whose steps can be computed again."""
    return build("resnet18", classes, "random")


def steps(method: str, ranks: Ranks) -> dict[str, Any]:
    """Take the three steps; give all that they hang on, and their losses in this process."""
    rows = np.stack([(texture(one % 3 % 2, one, SIZE_PX) >> 4).astype(np.uint8) for one in range(3 * BATCH)])
    gallery = Gallery(rows, np.arange(len(rows)), tuple(f"1.2.{one}" for one in range(len(rows))))
    seen: dict[str, Any] = {"views": [], "positions": [], "losses": []}
    train = pretrain._train

    def watched(method: Any, *rest: Any) -> Any:
        plan, views, loss = method.plan, method.views, method.loss

        def planned(epoch: int) -> Any:
            found = plan(epoch)
            seen["start"], seen["labels"] = copy.deepcopy(method.network.state_dict()), method._labels.clone()
            seen["prototypes"] = getattr(method, "_prototypes", None)
            return found

        def viewed(*given: Any) -> Any:
            seen["views"].append(views(*given))
            return seen["views"][-1]

        def lost(logits: Any, positions: Any) -> Any:
            found = loss(logits, positions)
            seen["positions"].append(positions)
            seen["losses"].append(float(found.detach()))
            return found

        method.plan, method.views, method.loss = planned, viewed, lost
        return train(method, *rest)

    torch.set_num_threads(THREADS // ranks.here)
    part = Part(Engine(), ranks, THREADS, seed=7, size_px=SIZE_PX, batch=BATCH)
    pretrain._train = watched
    try:
        state = pretrain.deepcluster(network, gallery, how(method), part)
    finally:
        pretrain._train = train
    return seen | {"line": state["lines"][0], "end": {name: value.clone() for name, value in state["network"].items()}}


def _train(folder: Path) -> None:
    """Run the trainer, with a fault."""
    recipe.RECIPES.update({name: partial(RECIPES.__getitem__, name) for name in RECIPES})
    upstream.KEEP_S = 0.0
    fault = (folder / "fault").read_text().split()
    rank = int(os.environ.get("RANK", "0"))
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    one_epoch = pretrain._one_epoch

    def with_fault(*given: Any) -> float:
        epoch, part = given[4], given[6]
        with (folder / f"epochs-{rank}").open("a") as out:
            out.write(f"{epoch} {part.batch}\n")
        if fault[0] == "slow":
            sleep(1)
        elif fault[1:] == [str(rank), str(epoch)]:
            (folder / "fault").write_text("none")
            if fault[0] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            given[0].loss = _no_memory
        return one_epoch(*given)

    pretrain._one_epoch = with_fault
    main()


def _no_memory(*_given: Any) -> Any:
    raise MemoryError


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "steps":
        with joined() as ranks:
            for method in sys.argv[3:]:
                torch.save(steps(method, ranks), folder / f"{method}-{world()}-{ranks.rank}.pt")
    else:
        sys.argv = ["python -m training", *sys.argv[3:]]
        _train(folder)
