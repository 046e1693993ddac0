"""One training run: corpus -> pretraining -> folds -> fine-tuning -> final model -> export -> evaluation -> gate -> shelf.

In: the site's settings, a recipe, orders. Out: a run folder, a new version on the shelf, and a written decision; the version goes
into service only when the gate says `promote`. Every step leaves its result in the run folder and is skipped when it is there, so
a killed run continues in its folder and ends as if it had never stopped. Below `<root>/runs/<id>/`::

    run.json          what the run is bound to: recipe, orders, device, threads, versions; obeyed when it goes on
    corpus.json       the frozen lists of labelled images with their digest; folds.json: who is tested and validated where
    start.json        what fine-tuning starts from, and why; pretrain/: see `upstream`
    metrics.jsonl     one line an epoch; fits/: logits of each fold, weights of the final model
    final.json        one network or several, by which evidence
    model.onnx, reference.npz, parity.json
    evaluation.json   figures with intervals; predictions.json: what was said of each study
    decision.json     what the gate says, in words, and what a person may do
    progress.json     how far it is, rewritten about once a second; lock: who works on it
    report.html

All files have mode 0600. Locked patients are read in `_evaluate` alone, and every look is counted in `<root>/models/looks.jsonl`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models import durable
from models.card import Card, Metric, StartWeights, corpus_file, sha256
from models.errors import NoSuchVersion, Tampered
from models.networks import Ensemble, Network, build, start_weights, with_backbone
from models.preprocess import Preprocessing
from models.reference import Reference
from models.registry import Registry
from models.runtime import Model
from node.errors import disk_full_said
from node.keep.archive import Archive
from node.keep.cache import Cache
from node.keep.catalogue import Catalogue
from node.keep.records import TrainingImage
from node.logs import event
from node.settings import Settings
from training import checkpoint, corpus, evaluate, export, finetune, journal, promote
from training.corpus import Chosen, Corpus, CorpusChanged, Fold, Sample
from training.engine import Engine, is_out_of_memory
from training.evaluate import LOCKED, OUT_OF_FOLD, Predictions
from training.finetune import Epoch, Fitted, Pictures
from training.folder import Orders, OtherRun, Progress, RunFolder, Ticket
from training.ranks import Ranks
from training.recipe import Recipe, seed_for
from training.report import Report
from training.upstream import Pretrained, Upstream

log = logging.getLogger("osteon.training")

FLOAT = Engine()
"""What goes into service computes in float32 on a processor: so do the figures that speak for it."""

PROVEN_ON = 64
"""Pictures on which file and network are held against each other, or somewhat more."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    run: str
    folder: Path
    version: str
    decision: str
    words: str
    by_hand: str


def run(
    settings: Settings,
    recipe: Recipe,
    *,
    now: Callable[[], datetime],
    progress: Progress,
    orders: Orders | None = None,
    ranks: Ranks | None = None,
    run_id: str = "",
    ticket: Ticket | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Make one model by `recipe`, or continue the run `run_id`, or work on the run that `ticket` names.

    `ranks` are the processes of the run; the others are in `upstream.assist`. `stop` is asked at each epoch and step whether the
    run is to stop.

    Raises
    ------
    NotEnough
        There are too few labelled patients; the message names them by class.
    NotFound, OtherRun, Busy, WrongState
        There is no such run, it was started with another recipe, or another process works on it.
    Occupied
        The device set has a run.
    Stopped
        It was told to, was cancelled, or another trainer was given the run.
    NoSpace
        The disk is full; the run goes on in its folder when there is room again.
    Diverged, NotTheSame, CorpusChanged, Tampered
        The run cannot come to a model; nothing is shelved.
    """
    with disk_full_said(), Catalogue.open(settings.storage.catalogue) as catalogue:
        desk = RunFolder(settings, recipe, catalogue, now, progress, stop, orders or Orders(), ranks or Ranks())
        with desk.begun(run_id, ticket):
            cycle = _Cycle(desk)
            if ended := cycle.ended():
                return ended
            frozen = cycle.corpus()
            if desk.orders.kind in ("pretrain", "sweep"):
                return cycle.upstream_only(frozen)
            start = cycle.start(frozen)
            folds = cycle.folds(frozen)
            fitted = cycle.cross_validate(frozen, folds, start)
            network = cycle.final(frozen, fitted, start)
            cycle.export(network, frozen)
            figures = cycle.evaluate(network, frozen, folds, fitted)
            decision = cycle.judge(frozen, figures, fitted, start)
            cycle.report(frozen, figures, decision)
            return cycle.done(decision)


@dataclass(frozen=True, slots=True)
class _Fitted:
    """What the folds showed."""

    out_of_fold: NDArray[np.float64]
    """(n, classes) calibrated logits of each image by networks that never saw its patient."""
    temperature: float
    """Of the final model."""
    epochs: int
    """Of the final model."""
    members: int
    """Networks of the final model."""


class _Cycle:
    """The steps of one run, in the order of `run`; each reads its result when it is there."""

    def __init__(self, desk: RunFolder) -> None:
        self.desk = desk
        self.registry = Registry(desk.root / "models")
        self.cache = Cache(desk.root / "cache", Preprocessing(desk.recipe.size_px))
        self.upstream = Upstream(desk, Archive(desk.root / "archive"), self.cache)

    # --- what to learn from -----------------------------------------------------------------------------------------------

    def corpus(self) -> Corpus:
        """Decode what is labelled, and freeze the lists."""
        frozen = Corpus.from_plain(self.desk.step("corpus.json", self._freeze))
        while self.upstream.names_locked(frozen.training):
            # Merged with a locked patient before anybody could see these lists; later the person leaves the locked set.
            if (self.desk.path / "folds.json").is_file():
                raise CorpusChanged("a patient of this run's frozen lists is in the locked set now; start a new run")
            self.desk.write_plain("corpus.json", self._freeze())
            frozen = Corpus.from_plain(self.desk.read("corpus.json"))
        self.upstream.decode_again((*frozen.training, *frozen.locked), self.cache)
        return frozen

    def _freeze(self) -> dict[str, Any]:
        images = self.desk.catalogue.instances.for_training()
        known = {image.sop_uid for image in images}
        for cache in Cache.all(self.desk.root / "cache"):  # [storage.keep_days] does not reach a cache of another host
            cache.blank_others(known)
        chosen, left_out = self._decoded(images)
        frozen = corpus.freeze(chosen, left_out, self.cache, self.desk.recipe)
        if self.desk.orders.kind in ("cycle", "finetune"):
            corpus.require_enough(frozen, self.desk.recipe)
        event(
            log,
            "corpus frozen",
            images=len(frozen.training),
            patients=len(frozen.patients),
            locked_images=len(frozen.locked),
            left_out=dict(frozen.left_out),
        )
        return frozen.to_plain()

    def _decoded(self, images: Sequence[TrainingImage]) -> tuple[list[Chosen], Counter[str]]:
        """Choose and decode until nothing is left to decode.

        That takes minutes to hours, in which patients are merged and locked: what is given was chosen after it.
        """
        looked_at: set[str] = set()
        while True:
            chosen, left_out = corpus.choose(images, self.desk.catalogue.labels.all(), self.desk.recipe)
            new = [one.image for one in chosen if one.image.sop_uid not in looked_at]
            if not new:
                return chosen, left_out
            self.upstream.decode(new)
            looked_at |= {image.sop_uid for image in new}
            images = self.desk.catalogue.instances.for_training()

    def folds(self, frozen: Corpus) -> list[Fold]:
        """Deal the patients over the folds, or read how they were dealt."""
        plain = self.desk.step(
            "folds.json", lambda: {"folds": [asdict(fold) for fold in corpus.make_folds(frozen.training, self.desk.recipe)]}
        )
        return list(_folds(plain))

    def _pictures(self, samples: Sequence[Sample]) -> Pictures:
        return Pictures(
            torch.from_numpy(corpus.pictures(samples, self.cache)),
            torch.tensor([sample.target for sample in samples], dtype=torch.int64),
            tuple(sample.sop_uid for sample in samples),
        )

    # --- what fine-tuning starts from ---------------------------------------------------------------------------------------

    def upstream_only(self, frozen: Corpus) -> Outcome:
        """Pretrain, or sweep over the numbers of clusters, and end there."""
        pool, page = self.upstream.pool(), Report(self.desk, self.cache, frozen)
        if self.desk.orders.kind == "sweep":
            found = self.upstream.sweep(pool, frozen)
            probes = f", by the probes {found['by_probes']}" if found["by_probes"] else ""
            words = f"Number of clusters by the study's rule: {found['by_study_rule']}{probes}."
            outcome = {"version": "", "decision": "swept", "words": words, "by_hand": ""}
            page.of_sweep(outcome)
        else:
            pretrained = self.upstream.learn(pool, frozen)
            said = "offered" if pretrained.offered else "not offered"
            outcome = {"version": "", "decision": said, "words": pretrained.words, "by_hand": ""}
            page.of_pretraining(outcome)
        return self.done(outcome)

    def start(self, frozen: Corpus) -> Pretrained | None:
        """Give the pretraining that fine-tuning starts from; None when the recipe has none, or none is offered."""
        found: Pretrained | None
        if self.desk.orders.start_from:
            found, words = self.upstream.taken_from(self.desk.orders.start_from), "A person named the run to start from."
        elif self.desk.recipe.pretraining is None:
            return None
        elif self.desk.orders.kind == "finetune":
            found, words = self._newest(frozen)
        else:
            learned = self.upstream.learn(self.upstream.pool(), frozen)
            found, words = learned if learned.offered else None, learned.words
        here = {"run": found.run if found else "", "sha256": found.sha256 if found else "", "words": words}
        there = self.desk.step("start.json", lambda: here)
        if there["sha256"] != here["sha256"]:
            raise OtherRun("the pretraining this run started from is not the one there is now; start a new run")
        event(log, "start chosen", run=self.desk.path.name, start=there["run"] or self.desk.recipe.start, words=there["words"])
        return found

    def _newest(self, frozen: Corpus) -> tuple[Pretrained | None, str]:
        """Give the newest pretraining that is offered; a run that goes on stays with the one it began with."""
        if (self.desk.path / "start.json").is_file():
            there = self.desk.read("start.json")
            return self.upstream.taken_from(there["run"]) if there["run"] else None, there["words"]
        found = self.upstream.newest(frozen)
        return found, found.words if found else "No other run offers a pretraining that this recipe may start from."

    # --- fine-tuning ------------------------------------------------------------------------------------------------------

    def cross_validate(self, frozen: Corpus, folds: Sequence[Fold], start: Pretrained | None) -> _Fitted:
        """Fit each fold, as often as the recipe repeats it with another seed.

        Each fold is calibrated on its own validation patients; the final model, which has none, on all of them together. Whether
        it is one network or the repeats' mean is decided by the loss on the validation patients, not on the tested ones.
        """
        recipe = self.desk.recipe
        self.desk.progress.stage("training", recipe.epochs * recipe.repeats * (len(folds) + 1))
        pictures = self._pictures(frozen.training)
        rows = range(len(frozen.training))
        validation = [[row for row in rows if frozen.training[row].pid in fold.validation] for fold in folds]
        test = [[row for row in rows if frozen.training[row].pid in fold.test] for fold in folds]
        found: list[list[dict[str, Any]]] = []
        for number in range(len(folds)):
            found.append([])
            for repeat in range(recipe.repeats):
                name = f"fold {number}" + (f" repeat {repeat}" if repeat else "")
                done = recipe.epochs * (number * recipe.repeats + repeat)
                make = partial(self._fold, name, pictures, validation[number], test[number], start, done)
                file = f"fits/{name.replace(' ', '-')}.json"
                say = self.desk.progress.skip if (self.desk.path / file).is_file() else self.desk.progress.advance
                found[-1].append(self.desk.step(file, make))
                say(done + recipe.epochs)
        truth = [pictures.targets[each].numpy() for each in validation]
        told = self.desk.step("final.json", lambda: _one_or_all(found, truth))
        said = {
            part: [np.mean([np.array(one[part]) for one in each[: told["members"]]], axis=0) for each in found]
            for part in ("validation", "test")
        }
        calibrated = np.zeros((len(frozen.training), len(recipe.classes)))
        for number, logits in enumerate(said["test"]):
            calibrated[test[number]] = logits / finetune.temperature(said["validation"][number], truth[number])
        temperature = finetune.temperature(np.concatenate(said["validation"]), np.concatenate(truth))
        epochs = median_low(int(one["best_epoch"]) for each in found for one in each)
        return _Fitted(calibrated, temperature, epochs, told["members"])

    def _fold(
        self, name: str, pictures: Pictures, validation: Sequence[int], test: Sequence[int], start: Pretrained | None, done: int
    ) -> dict[str, Any]:
        outside = set(validation) | set(test)
        train = [row for row in range(len(pictures.ids)) if row not in outside]
        fitted = self._fit(name, pictures.only(train), pictures.only(validation), self.desk.recipe.epochs, start, done)
        said = {
            part: finetune.predict(fitted.network, pictures.rows[rows], engine=self._engine)[0].tolist()
            for part, rows in (("validation", list(validation)), ("test", list(test)))
        }
        return {"best_epoch": fitted.best_epoch, **said}

    def final(self, frozen: Corpus, fitted: _Fitted, start: Pretrained | None) -> Network | Ensemble:
        """Fit the final model on everybody in the training list, for as many epochs as the folds found best."""
        members = [self._refit(frozen, fitted.epochs, repeat, start) for repeat in range(fitted.members)]
        return members[0] if len(members) == 1 else Ensemble(members)

    def _refit(self, frozen: Corpus, epochs: int, repeat: int, start: Pretrained | None) -> Network:
        recipe, name = self.desk.recipe, "refit" + (f" repeat {repeat}" if repeat else "")
        file = self.desk.path / "fits" / f"{name.replace(' ', '-')}.pt"
        if not file.is_file():
            done = recipe.epochs * (recipe.repeats * recipe.folds + repeat)
            fitted = self._fit(name, self._pictures(frozen.training), None, epochs, start, done)
            checkpoint.save(fitted.network.cpu().state_dict(), file)
        network = build(self.desk.recipe.network, len(self.desk.recipe.classes), "random")
        network.load_state_dict(checkpoint.load(file))
        return network.eval()

    def _fit(
        self, name: str, train: Pictures, validation: Pictures | None, epochs: int, start: Pretrained | None, done: int
    ) -> Fitted:
        """Fit one network, with half the batch whenever the memory is too small; what fits is remembered for all fits to come."""
        noted = self.desk.path / "fits" / "batch.json"
        while True:
            batch = checkpoint.fitting(noted, self.desk.recipe.batch)
            try:
                return finetune.fit(
                    partial(self._fresh, start),
                    train,
                    validation,
                    replace(self.desk.recipe, batch=batch),
                    purpose=name,
                    epochs=epochs,
                    engine=self._engine,
                    on_epoch=self._journal(name, done),
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or batch < 2:
                    raise
                smaller = checkpoint.halve(noted, batch)
                event(log, "batch halved", level=logging.WARNING, run=self.desk.path.name, fit=name, batch=smaller)

    def _fresh(self, start: Pretrained | None) -> Network:
        recipe = self.desk.recipe
        if start is not None:
            return with_backbone(recipe.network, len(recipe.classes), checkpoint.load(start.file))
        return build(recipe.network, len(recipe.classes), recipe.start, weights=self.desk.root / "models" / "weights")

    def _journal(self, fit: str, done: int) -> Callable[[Epoch], None]:
        """Give what writes one line an epoch to metrics.jsonl; lines of a fit that was killed are taken out first."""
        file = self.desk.path / "metrics.jsonl"
        journal.write(file, [line for line in journal.read(file) if line.get("fit") not in (None, fit)])

        def on_epoch(line: Epoch) -> None:
            told = {"fit": fit, **asdict(line)}
            journal.note(file, told)
            self.desk.progress.epoch(fit, told)
            self.desk.progress.advance(done + line.epoch)

        return on_epoch

    # --- the file, and how good it is -------------------------------------------------------------------------------------

    def export(self, network: Network | Ensemble, frozen: Corpus) -> None:
        """Write the ONNX file, proven against torch on pictures of the corpus, and the reference of its features."""
        self.desk.progress.stage("exporting to ONNX")

        def made() -> dict[str, Any]:
            rows = torch.from_numpy(corpus.pictures(frozen.training, self.cache))
            onnx = export.export(network, self.desk.recipe.size_px)
            proof = export.parity(onnx, network, rows[:: max(1, len(rows) // PROVEN_ON)])
            _, features = finetune.predict(network, rows, engine=FLOAT)
            reference = Reference.fit(features, [sample.pid for sample in frozen.training], seed=self.desk.recipe.seed)
            self.desk.write("model.onnx", onnx)
            if reference is not None:
                self.desk.write("reference.npz", reference.to_bytes())
            return asdict(proof) | {
                "onnx_sha256": sha256(onnx),
                "reference_sha256": sha256((self.desk.path / "reference.npz").read_bytes()) if reference is not None else "",
            }

        self.desk.step("parity.json", made)

    def evaluate(
        self,
        network: Network | Ensemble,
        frozen: Corpus,
        folds: Sequence[Fold],
        fitted: _Fitted,
    ) -> dict[str, Any]:
        """Measure out of fold and, counted as one look, on the locked patients, with the trivial baselines beside."""
        self.desk.progress.stage("evaluating")
        return self.desk.step("evaluation.json", lambda: self._evaluate(network, frozen, folds, fitted))

    def _evaluate(
        self,
        network: Network | Ensemble,
        frozen: Corpus,
        folds: Sequence[Fold],
        fitted: _Fitted,
    ) -> dict[str, Any]:
        # a person may have merged patients, or corrected whose a study is, since the lists were frozen: whoever was learned from
        # under another pseudonym is no witness any more
        locked = {image.sop_uid for image in self.desk.catalogue.instances.for_training() if image.locked}
        frozen = replace(frozen, locked=tuple(sample for sample in frozen.locked if sample.sop_uid in locked))
        seen = evaluate.by_study(frozen.training, fitted.out_of_fold, self.desk.recipe.urgent)
        baselines = {
            name: evaluate.by_study(
                frozen.training, self._trivial_out_of_fold(frozen.training, folds, name), self.desk.recipe.urgent
            )
            for name in evaluate.BASELINES
        }
        figures: dict[str, Any] = {
            OUT_OF_FOLD: self._measured(seen, OUT_OF_FOLD),
            f"{OUT_OF_FOLD}, trivial baselines": self._baseline_figures(baselines, OUT_OF_FOLD),
            "smaller_class": 0,
            "champion": self.registry.champion(),
            "incomparable": "",
            "looks": 0,
            LOCKED: {},
            f"{LOCKED}, trivial baselines": {},
            "against_baselines": {},
            "against_champion": None,
            "groups": {OUT_OF_FOLD: self._by_group(seen, frozen.training, OUT_OF_FOLD)},
        }
        apart, figures["out_of_fold_why"] = self._against_champion_out_of_fold(seen, frozen, folds)
        figures["against_champion_out_of_fold"] = asdict(apart) if apart else None
        predictions = {OUT_OF_FOLD: seen.to_plain()}
        if frozen.locked:
            figures["looks"] = self._count_look(len({sample.pid for sample in frozen.locked}))
            self._look(network, frozen, fitted.temperature, figures, predictions)
        self.desk.write("predictions.json", json.dumps(predictions, indent=1).encode())
        return figures

    def _look(
        self,
        network: Network | Ensemble,
        frozen: Corpus,
        temperature: float,
        figures: dict[str, Any],
        predictions: dict[str, Any],
    ) -> None:
        """Read the locked patients: candidate, trivial baselines and the model in service, on the same studies."""
        rows = torch.from_numpy(corpus.pictures(frozen.locked, self.cache))
        candidate = evaluate.by_study(
            frozen.locked, finetune.predict(network, rows, engine=FLOAT)[0] / temperature, self.desk.recipe.urgent
        )
        predictions[LOCKED] = candidate.to_plain()
        figures["smaller_class"] = candidate.smaller_class()
        figures[LOCKED] = self._measured(candidate, LOCKED)
        figures["groups"][LOCKED] = self._by_group(candidate, frozen.locked, LOCKED)
        classes = len(self.desk.recipe.classes)
        baselines = {
            name: evaluate.by_study(
                frozen.locked, evaluate.trivial(frozen.training, frozen.locked, features, classes), self.desk.recipe.urgent
            )
            for name, features in evaluate.BASELINES.items()
        }
        figures[f"{LOCKED}, trivial baselines"] = self._baseline_figures(baselines, LOCKED)
        for name, baseline in baselines.items():
            if apart := self._difference(candidate, baseline, f"AUC minus that of {name}, {LOCKED}"):
                figures["against_baselines"][name] = asdict(apart)
        if figures["champion"]:
            in_service, figures["incomparable"] = self._in_service(figures["champion"], frozen)
            if in_service is not None:
                predictions[f"{LOCKED}, model in service"] = in_service.to_plain()
                apart = self._difference(candidate, in_service, f"AUC minus that of the model in service, {LOCKED}")
                figures["against_champion"] = asdict(apart) if apart else None

    def _by_group(self, predictions: Predictions, samples: Sequence[Sample], of: str) -> list[dict[str, Any]]:
        """Give the figures of each age band, sex and manufacturer."""
        gate = self.desk.recipe.gate
        groups = evaluate.groups_of(samples)
        found = evaluate.by_group(predictions, groups, of, seed=self._bootstrap_seed, draws=gate.draws, alpha=gate.alpha)
        return [asdict(group) for group in found]

    def _against_champion_out_of_fold(
        self, seen: Predictions, frozen: Corpus, folds: Sequence[Fold]
    ) -> tuple[Metric | None, str]:
        """Compare with the recipe of the model in service on the folds, where both were tested on the same; or say why not."""
        version = self.registry.champion()
        if not version:
            return None, ""
        made = next((row for row in self.desk.catalogue.runs.list() if row.model_id == version and row.folder), None)
        if made is None:
            return None, "the run that made the model in service is not known here"
        try:
            predictions, bound, dealt, listed = (
                json.loads((self.desk.root / "runs" / made.folder / name).read_bytes())
                for name in ("predictions.json", "run.json", "folds.json", "corpus.json")
            )
            theirs = evaluate.CrossValidated(
                Predictions.from_plain(predictions[OUT_OF_FOLD], self.desk.recipe.urgent),
                tuple(label.name for label in self.registry.card(version).labels),
                _folds(dealt),
                bound["seed"],
                listed["label_digest"],
            )
        except (OSError, ValueError, KeyError, TypeError, Tampered, NoSuchVersion):
            return None, "the files of the run that made the model in service are gone or damaged"
        recipe, gate = self.desk.recipe, self.desk.recipe.gate
        classes = tuple(label.name for label in recipe.classes)
        ours = evaluate.CrossValidated(seen, classes, tuple(folds), recipe.seed, frozen.label_digest)
        of = f"AUC minus that of the model in service's recipe, {OUT_OF_FOLD}"
        return evaluate.out_of_fold_difference(ours, theirs, of, seed=self._bootstrap_seed, draws=gate.draws, alpha=gate.alpha)

    def _in_service(self, version: str, frozen: Corpus) -> tuple[Predictions | None, str]:
        """Let the model in service look at the locked patients; or say why it cannot be compared."""
        try:
            card, model = self.registry.card(version), Model.load(self.registry, version, threads=self.desk.bound["threads"])
            trained_on = self.registry.corpus(version)
        except (Tampered, NoSuchVersion):
            return None, "its files are damaged"
        if [label.name for label in card.labels] != [label.name for label in self.desk.recipe.classes]:
            return None, "it knows other classes"
        if trained_on & {sample.pid for sample in frozen.locked}:
            return None, "it was trained on a patient who is locked now"
        cache = Cache(self.desk.root / "cache", card.preprocessing)
        self.upstream.decode_again(frozen.locked, cache)
        try:
            rows = cache.pixels([sample.sop_uid for sample in frozen.locked])
        except KeyError:
            raise CorpusChanged from None
        parts = [model.predict(part[:, None].astype(np.float32) / np.float32(255))[0] for part in _parts(rows)]
        return evaluate.by_study(frozen.locked, np.concatenate(parts) / card.temperature, self.desk.recipe.urgent), ""

    def _count_look(self, patients: int) -> int:
        """Write down that the locked patients are looked at, before they are; give how often they were by now."""
        file = self.desk.root / "models" / "looks.jsonl"
        durable.make_folder(file.parent)
        durable.touch(file)
        with open(file, "a+", encoding="ascii") as looks:
            fcntl.flock(looks, fcntl.LOCK_EX)
            looks.seek(0)
            if (before := looks.read()) and not before.endswith("\n"):
                looks.write("\n")  # a torn line was a look, too
            look = {
                "at": self.desk.now().isoformat(),
                "run": self.desk.path.name,
                "recipe": self.desk.recipe.name,
                "patients": patients,
            }
            looks.write(json.dumps(look) + "\n")
            looks.flush()
            os.fsync(looks.fileno())
            looks.seek(0)
            return sum(1 for _ in looks)

    def _trivial_out_of_fold(self, samples: Sequence[Sample], folds: Sequence[Fold], name: str) -> NDArray[np.float64]:
        said = np.zeros((len(samples), len(self.desk.recipe.classes)))
        for fold in folds:
            train = [sample for sample in samples if sample.pid not in fold.test]
            test = [row for row, sample in enumerate(samples) if sample.pid in fold.test]
            if test:
                features = evaluate.BASELINES[name]
                said[test] = evaluate.trivial(train, [samples[row] for row in test], features, len(self.desk.recipe.classes))
        return said

    def _measured(self, predictions: Predictions, of: str) -> dict[str, Any]:
        gate = self.desk.recipe.gate
        found = evaluate.metrics(predictions, of, seed=self._bootstrap_seed, draws=gate.draws, alpha=gate.alpha)
        return {name: asdict(metric) for name, metric in found.items()}

    def _baseline_figures(self, baselines: dict[str, Predictions], of: str) -> dict[str, Any]:
        gate = self.desk.recipe.gate
        found = {
            name: evaluate.auc_with_interval(
                predictions, f"{name}, {of}", seed=self._bootstrap_seed, draws=gate.draws, alpha=gate.alpha
            )
            for name, predictions in baselines.items()
        }
        return {name: asdict(metric) for name, metric in found.items() if metric is not None}

    def _difference(self, candidate: Predictions, other: Predictions, of: str) -> Metric | None:
        gate = self.desk.recipe.gate
        return evaluate.difference(candidate, other, of, seed=self._bootstrap_seed, draws=gate.draws, alpha=gate.alpha)

    @property
    def _bootstrap_seed(self) -> int:
        return seed_for(self.desk.recipe.seed, "bootstrap")

    # --- the gate and the shelf -------------------------------------------------------------------------------------------

    def judge(self, frozen: Corpus, figures: dict[str, Any], fitted: _Fitted, start: Pretrained | None) -> dict[str, Any]:
        """Let the gate decide, shelve the version with its card, and move the champion when the decision is `promote`."""
        gate = self.desk.step("gate.json", lambda: self._decide(figures))
        if start is not None and not start.offered and gate["decision"] == promote.Verdict.PROMOTE.value:
            unoffered = "It starts from a pretraining that the probes do not offer: a person decides."
            gate = {"decision": promote.Verdict.INSUFFICIENT.value, "words": f"{gate['words']} {unoffered}"}
        patients = tuple(sorted({*frozen.patients, *(start.patients if start else ())}))
        card = self._card(frozen, patients, figures, fitted, gate, start)
        reference = self.desk.path / "reference.npz"
        version = self.registry.add(
            self.desk.path / "model.onnx", card, corpus=patients, reference=reference if card.reference_sha256 else None
        )
        promoted = gate["decision"] == promote.Verdict.PROMOTE.value
        decision = self.desk.step(
            "decision.json",
            lambda: (
                gate
                | {
                    "by_hand": "" if promoted else f"osteon models promote {version} --reason TEXT",
                    "version": version,
                    "recipe": self.desk.recipe.name,
                    "rules": asdict(self.desk.recipe.gate),
                    "champion_before": figures["champion"],
                    "smaller_class": figures["smaller_class"],
                    "looks": figures["looks"],
                    "epochs": fitted.epochs,
                    "temperature": fitted.temperature,
                    "metrics": [metric for table in _tables(figures).values() for metric in table],
                }
            ),
        )
        event(log, "model judged", run=self.desk.path.name, version=version, decision=gate["decision"])
        if promoted and not any((move.version, move.by) == (version, "gate") for move in self.registry.history()):
            self._promote(version, figures["champion"], gate)
        return decision

    def _decide(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Ask the gate, in words that stay as they are."""
        evidence = promote.Evidence(
            smaller_class=figures["smaller_class"],
            auc=_metric(figures[LOCKED].get("auc")),
            against_champion=_metric(figures["against_champion"]),
            champion=figures["champion"],
            incomparable=figures["incomparable"],
            against_baselines={name: Metric(**plain) for name, plain in figures["against_baselines"].items()},
            out_of_fold=_metric(figures["against_champion_out_of_fold"]),
            out_of_fold_why=figures["out_of_fold_why"],
        )
        decision = promote.decide(evidence, self.desk.recipe.gate)
        return {"decision": decision.verdict.value, "words": decision.words}

    def _promote(self, version: str, champion_before: str | None, gate: dict[str, Any]) -> None:
        """Put the version into service, unless the model it was compared with is no longer the one there.

        Asked once only: what a person decided since then stands when a run is continued that was killed after the move.
        """
        if self.registry.champion() not in (champion_before, version):
            raise OtherRun("another model went into service since this one was compared; nothing was promoted, start a new run")
        self.registry.promote(
            version,
            by="gate",
            reason=gate["words"],
            decision=gate["decision"],
            now=self.desk.now(),
            locked=self.desk.catalogue.instances.locked_patients(),
        )

    def _card(
        self,
        frozen: Corpus,
        patients: tuple[str, ...],
        figures: dict[str, Any],
        fitted: _Fitted,
        gate: dict[str, Any],
        start: Pretrained | None,
    ) -> Card:
        parity = self.desk.read("parity.json")
        return Card(
            name=f"Osteon {self.desk.recipe.name}",
            arch=self.desk.recipe.network,
            labels=self.desk.recipe.classes,
            preprocessing=self.cache.spec,
            temperature=fitted.temperature,
            modalities=self.desk.recipe.modalities,
            max_age_years=self.desk.recipe.max_age,
            body_parts=self.desk.recipe.body_parts,
            metrics=(
                *(Metric(**plain) for table in _tables(figures).values() for plain in table),
                *(start.metrics if start else ()),
            ),
            training_mix=tuple(
                len({sample.pid for sample in frozen.training if sample.target == index})
                for index in range(len(self.desk.recipe.classes))
            ),
            corpus_sha256=sha256(corpus_file(patients)),
            labels_sha256=frozen.label_digest,
            recipe=f"{self.desk.recipe.name} {self.desk.recipe.digest[:12]}",
            seeds={"recipe": self.desk.recipe.seed},
            code_version=self.desk.bound["code_version"],
            start=start.start(self.desk.recipe) if start else self._plain_start,
            composition=self.desk.read("final.json")["words"],
            locked_looks=figures["looks"],
            decision=gate["decision"],
            decision_reason=gate["words"],
            licence=self.desk.recipe.licence,
            limits=(*self.desk.recipe.limits, *self.desk.remarks),
            onnx_sha256=parity["onnx_sha256"],
            reference_sha256=parity["reference_sha256"],
            created_at=datetime.fromisoformat(self.desk.bound["started_at"]),
        )

    @property
    def _plain_start(self) -> StartWeights:
        return start_weights(self.desk.recipe.network, self.desk.recipe.start)

    @property
    def _engine(self) -> Engine:
        return self.upstream.engine()

    def report(self, frozen: Corpus, figures: dict[str, Any], decision: dict[str, Any]) -> None:
        """Write the page of the run."""
        Report(self.desk, self.cache, frozen).of_cycle(figures, _tables(figures), decision)

    def ended(self) -> Outcome | None:
        """Give what a finished run came to, None when there is something left to do."""
        if not self.desk.ended:
            return None
        return Outcome(self.desk.path.name, self.desk.path, **self.desk.read("outcome.json"))

    def done(self, decision: dict[str, Any]) -> Outcome:
        """Enter the outcome in the catalogue and give it back."""
        model, said = decision["version"], decision["decision"]
        self.desk.catalogue.runs.done(
            self.desk.ticket.run, self.desk.ticket.tries, model_id=model, decision=said, now=self.desk.now()
        )
        told = {name: decision[name] for name in ("version", "decision", "words", "by_hand")}
        self.desk.step("outcome.json", lambda: told)
        return Outcome(self.desk.path.name, self.desk.path, **told)


def _one_or_all(found: Sequence[Sequence[dict[str, Any]]], truth: Sequence[NDArray[np.int64]]) -> dict[str, Any]:
    """Decide whether the final model is one network or the mean of the repeats, by the loss on the folds' validation images.

    The mean costs as many networks in service: it is taken only when it lowers the loss by more than one standard error (Breiman
    et al., Classification and Regression Trees, 1984).
    """
    repeats = len(found[0])
    if repeats == 1:
        return {"members": 1, "words": "One network, fitted on all training patients; the recipe repeats no fit."}

    def losses(members: int) -> NDArray[np.float64]:
        each = []
        for folds, target in zip(found, truth, strict=True):
            logits = np.mean([np.array(one["validation"]) for one in folds[:members]], axis=0)
            said = evaluate.softmax(logits / finetune.temperature(logits, target))
            each.append(-np.log(np.maximum(said[np.arange(len(target)), target], 1e-12)))
        return np.concatenate(each)

    gain = losses(1) - losses(repeats)
    error = float(gain.std(ddof=1) / np.sqrt(len(gain)))
    members = repeats if gain.mean() > error else 1
    told = "the mean of {} networks" if members > 1 else "one network and not the mean of {}"
    words = (
        f"Final model: {told.format(repeats)}: the mean lowers the loss on {len(gain)} validation images by {gain.mean():.4f}, "
        f"one standard error is {error:.4f}."
    )
    return {"members": members, "words": words, "gain": float(gain.mean()), "standard_error": error}


def _parts(rows: NDArray[np.uint8], size: int = 16) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _folds(plain: dict[str, Any]) -> tuple[Fold, ...]:
    return tuple(Fold(tuple(fold["validation"]), tuple(fold["test"])) for fold in plain["folds"])


def _metric(plain: dict[str, Any] | None) -> Metric | None:
    return None if plain is None else Metric(**plain)


def _tables(figures: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Give the figures of evaluation.json by the heading of their table."""
    against = list(figures["against_baselines"].values())
    against += [figures["against_champion"]] if figures["against_champion"] else []
    headings = (OUT_OF_FOLD, f"{OUT_OF_FOLD}, trivial baselines", LOCKED, f"{LOCKED}, trivial baselines")
    tables = {heading.capitalize(): list(figures[heading].values()) for heading in headings}
    if figures["against_champion_out_of_fold"]:
        tables["Out of fold, difference"] = [figures["against_champion_out_of_fold"]]
    return tables | {"Locked patients, differences": against}
