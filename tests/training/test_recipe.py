"""The recipe of the first task has the study's values, and goes the whole way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from labelled import CLASSES, NOW, Heard, labelled_site, settings_of

from models.registry import Registry
from training import corpus, cycle, upstream
from training.corpus import Sample
from training.engine import Engine
from training.recipe import Classifier, Gate, named


def test_ewing_is_what_the_study_states() -> None:
    """docs/training.md tells what is the study's and what is ours."""
    ewing = named("ewing")
    assert ewing.pretraining is not None
    assert (ewing.pretraining.method, ewing.pretraining.clusters) == ("deepcluster", 1000)
    assert ewing.pretraining.classifier == Classifier(epochs=500, batch=512, lr=0.05)
    assert (ewing.batch, ewing.lr, ewing.head_lr, ewing.epochs) == (4, 1e-4, 1e-4, 100)
    assert ewing.patience >= ewing.epochs, "all 100 epochs are gone through"
    assert (ewing.network, ewing.start, ewing.frozen) == ("resnet50", "imagenet", 0)
    assert tuple(label.name for label in ewing.classes) == CLASSES
    assert [label.name for label in ewing.classes if label.urgent] == ["ewing_sarcoma"]
    assert (ewing.max_age, ewing.takes_unknown_age) == (18, False)

    patients = [f"OST-{number}" for number in range(100)]
    dealt = corpus.split(patients, ewing.seed)
    assert [len(side) for side in (dealt.train, dealt.validation, dealt.test)] == [80, 10, 10]
    samples = [Sample(f"1.2.{one}", f"1.{one}", pid, one % 2, 9, "F", "", 100, 20) for one, pid in enumerate(patients)]
    sizes = [(len(fold.validation), len(fold.test)) for fold in corpus.make_folds(samples, ewing)]
    assert sizes == [(10, 10)] * 10, "80/10/10 ten times"


def test_ewing_in_miniature_goes_from_the_archive_to_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "chosen", lambda *_args, **_options: Engine())
    site, ewing = labelled_site(tmp_path, patients=12, is_locked=lambda patient: patient < 2), named("ewing")
    assert ewing.pretraining is not None
    few = replace(
        ewing.pretraining,
        clusters=3,
        epochs=1,
        batch=8,
        dims=4,
        largest_max=1.0,
        alike_max=1.0,
        classifier=Classifier(epochs=1, batch=8, lr=0.05),
    )
    recipe = replace(
        ewing, network="resnet18", start="random", size_px=32, folds=3, epochs=1, repeats=2, gate=Gate(draws=200), pretraining=few
    )
    ended = cycle.run(settings_of(site), recipe, now=lambda: NOW, progress=Heard())
    card = Registry(settings_of(site).storage.root / "models").verify(ended.version)
    assert card.recipe == f"ewing {recipe.digest[:12]}"
    assert tuple(label.name for label in card.labels) == CLASSES
    assert card.composition.startswith("Final model: ")
    assert "the mean of 2" in card.composition
    assert (card.training_mix, card.max_age_years, card.decision) == ((5, 5), 18, "insufficient evidence")
    assert set(ewing.limits) <= set(card.limits)
