"""WIRES what a run learns before it looks at a label: pool -> DeepCluster -> classifier of the clusters -> probes -> offer.

In: the run's folder, archive and cache, the labelled images the probes may look at. Out: a backbone, offered for fine-tuning
only when neither probe ends below the start weights; for a sweep, the same for several numbers of clusters. In the run's folder::

    pretraining-corpus.json   the frozen list of pictures and patients; split.json: who is held out from the classifier
    engine.json               number format and layout, as tried on this machine
    pretrain/metrics.jsonl    one line an epoch; state.pt: everything that goes on; clusters.npz: what the last look found
    pretrain/classifier.jsonl, classifier.pt, classifier.json
    pretrain/probe.json       the probes and the offer in words; backbone.pt: what is offered
    pretrain/batch-*.json     the batch that fits, where the recipe's does not
    k-N/…                     the same for each number of clusters of a sweep; sweep.json

Locked patients are in none of it. The processes other than rank 0 do what `assist` is told.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models import durable
from models.card import Metric, StartWeights, sha256
from models.errors import Final, OsteonError, Tampered
from models.networks import Network, build, start_weights
from models.preprocess import Preprocessing
from node.keep.archive import Archive
from node.keep.cache import NO_ROW, Cache
from node.keep.records import TrainingImage
from node.logs import event
from training import checkpoint, corpus, evaluate, journal, pretrain, probe
from training.corpus import Corpus, CorpusChanged, NotEnough, Pool, Pooled, Sample, Split
from training.engine import Engine, chosen
from training.folder import OtherRun, RunFolder
from training.pretrain import Clusters, Gallery, Line, Part, State, TooLarge
from training.ranks import Ranks
from training.recipe import Pretraining, Recipe, seed_for

log = logging.getLogger("osteon.training")

POOL = "pretraining-corpus.json"
PLACE = "pretrain"
KEEP_S = 20.0
"""A state is written when the last one is so old, and when the run ends: what comes after it is done again, to the same bits."""
REPEATS = 5
"""Divisions into folds over which a probe is averaged."""
TRY_BATCH = 16


class NothingToLearn(Final):
    """There is no pretraining to do, or to go on with."""


@dataclass(frozen=True, slots=True)
class Pretrained:
    """What a pretraining came to."""

    offered: bool
    """Whether fine-tuning may start from it."""
    words: str
    run: str
    file: Path
    """The backbone's weights."""
    sha256: str
    patients: tuple[str, ...]
    """Who was learned from."""
    metrics: tuple[Metric, ...]
    """What the probes say."""

    def start(self, recipe: Recipe) -> StartWeights:
        """Say for the card where the weights come from."""
        begun = start_weights(recipe.network, recipe.start)
        return StartWeights(f"pretrained by run {self.run}, from: {begun.name}", self.sha256, begun.licence)


@dataclass(frozen=True, slots=True)
class Job:
    """What every process of the run does together."""

    what: str
    """`deepcluster`, `clusters` or `classify`."""
    recipe: Recipe
    how: Pretraining
    engine: Engine
    batch: int
    threads: int
    images: tuple[Pooled, ...]
    state: Path
    """Where it goes on from, when the file is there."""
    labels: NDArray[np.int64] | None = None
    train: NDArray[np.int64] | None = None
    validation: NDArray[np.int64] | None = None


def assist(root: Path, ranks: Ranks) -> None:
    """Do what rank 0 says until it says no more."""
    while (job := ranks.told(None)) is not None:
        torch.set_num_threads(max(1, job.threads // ranks.here))
        _do(job, root, ranks)


class Upstream:
    """The steps of one run's pretraining; each reads its result when it is there."""

    def __init__(self, desk: RunFolder, archive: Archive, cache: Cache) -> None:
        self.desk, self.archive, self.cache = desk, archive, cache

    # --- what there is to learn from ----------------------------------------------------------------------------------------

    def pool(self) -> Pool:
        """Decode what the archive holds of unlocked patients, and freeze the list."""
        pool = Pool.from_plain(self.desk.step(POOL, self._freeze))
        while self.names_locked(pool.images):
            if self._begun or self.desk.orders.extends:
                raise CorpusChanged("a patient of this run's pretraining list is in the locked set now; start a new run")
            (self.desk.path / "split.json").unlink(missing_ok=True)  # it deals the patients of the list that goes
            self.desk.write_plain(POOL, self._freeze())
            pool = Pool.from_plain(self.desk.read(POOL))
        self.decode_again(pool.images, self.cache)
        self.desk.step("split.json", lambda: corpus.split(pool.patients, self.desk.recipe.seed).to_plain())
        return pool

    @property
    def _begun(self) -> bool:
        return any(self.desk.path.glob("*/state.pt"))

    def names_locked(self, frozen: Sequence[Pooled | Sample]) -> bool:
        """Say whether an image or a person of a frozen list is in the locked set by now."""
        locked = {image.sop_uid for image in self.desk.catalogue.instances.for_training() if image.locked}
        persons = self.desk.catalogue.instances.locked_patients()
        return any(one.sop_uid in locked or one.pid in persons for one in frozen)

    def _freeze(self) -> dict[str, Any]:
        how = self._how
        if self.desk.orders.extends:
            return self._read_of(self.desk.orders.extends, POOL)
        looked_at: set[str] = set()
        while True:  # decoding takes hours, in which images come and patients are locked: what is frozen was chosen after it
            images = self.desk.catalogue.instances.for_training()
            new = [image for image in images if not image.locked and image.sop_uid not in looked_at]
            if not new:
                break
            self.decode(new)
            looked_at |= {image.sop_uid for image in new}
        pool = corpus.pool(images, self.cache, blank_below=self.desk.recipe.blank_below)
        most = replace(how, clusters=max(self.desk.orders.clusters or (how.clusters,)))
        if len(pool.images) < most.images_min:
            out = "; ".join(f"{reason}: {count}" for reason, count in pool.left_out.items()) or "none"
            other = (
                "smaller numbers"
                if self.desk.orders.clusters
                else "a recipe with fewer clusters, or with no pretraining: ewing_small"
            )
            raise NotEnough(
                f"{most.clusters} clusters need {most.images_min} images or more of patients who are not locked; there are "
                f"{len(pool.images)} (left out: {out}). Take {other}"
            )
        event(
            log, "pretraining corpus frozen", images=len(pool.images), patients=len(pool.patients), left_out=dict(pool.left_out)
        )
        return pool.to_plain()

    def decode_again(self, frozen: Sequence[Pooled | Sample], cache: Cache) -> None:
        """Bring pictures of a frozen list back that the cache does not hold (any more); those it holds stay as they are."""
        missing = {one.sop_uid for one in frozen if (row := cache.get(one.sop_uid)) is None or row.row == NO_ROW}
        if missing:
            self.decode([image for image in self.desk.catalogue.instances.for_training() if image.sop_uid in missing], cache)

    def decode(self, images: Sequence[TrainingImage], cache: Cache | None = None) -> None:
        """Decode into the run's cache, or another one, and tell how far it is."""
        self.desk.progress.stage("decoding images", len(images))
        (self.cache if cache is None else cache).build(
            images,
            self.archive.read,
            threads=self.desk.bound["threads"],
            progress=lambda done, _total: self.desk.progress.advance(done),
        )

    @property
    def _how(self) -> Pretraining:
        if self.desk.recipe.pretraining is None:
            raise NothingToLearn(f"recipe {self.desk.recipe.name} has no pretraining")
        return self.desk.recipe.pretraining

    # --- one pretraining ----------------------------------------------------------------------------------------------------

    def learn(self, pool: Pool, labelled: Corpus, place: str = PLACE, how: Pretraining | None = None) -> Pretrained:
        """Pretrain, classify the clusters, probe, and say whether the result is offered."""
        how = how or self._how
        (self.desk.path / place).mkdir(mode=0o700, exist_ok=True)
        self._take_over(place)
        found = self._clusters(pool, place, how, labelled.training)
        told = self._classified(pool, found, place, how)
        probed = self.desk.step(f"{place}/probe.json", lambda: self._remarked(self._probed(place, how, labelled.training)))
        file = self.desk.path / place / "backbone.pt"
        event(log, "pretraining judged", run=self.desk.path.name, offered=probed["offered"], accuracy=told["accuracy"]["value"])
        return self._pretrained(self.desk.path.name, file, probed, pool.patients)

    def taken_from(self, run: str) -> Pretrained:
        """Give the pretraining of a run that a person names, whether it is offered or not.

        Raises
        ------
        Tampered
            It is not there or damaged, or was learned with another network, start or size.
        CorpusChanged
            It names a patient who is locked now.
        """
        probed, patients = self._offer_of(run)
        file = self.desk.root / "runs" / run / PLACE / "backbone.pt"
        if _hash(file) != probed["sha256"]:
            raise Tampered(f"the backbone of run {run} is not there, or damaged")
        network = f"{self.desk.recipe.network} {self.desk.recipe.size_px} px"
        if probed["network"] != network:
            raise Tampered(f"run {run} pretrained {probed['network']}, this recipe has {network}")
        if self.desk.catalogue.instances.locked_patients() & set(patients):
            raise CorpusChanged(f"a patient of the pretraining of run {run} is in the locked set now")
        return self._pretrained(run, file, probed, patients)

    def newest(self, labelled: Corpus) -> Pretrained | None:
        """Give the newest pretraining of the same recipe part that another run offers and that names nobody who is locked now."""
        locked = self.desk.catalogue.instances.locked_patients() | {sample.pid for sample in labelled.locked}
        for row in self.desk.catalogue.runs.list():
            folder = self.desk.root / "runs" / row.folder
            if not row.folder or not (folder / PLACE / "probe.json").is_file() or folder == self.desk.path:
                continue
            try:
                probed, patients = self._offer_of(row.folder)
            except (OsteonError, KeyError, OSError):
                continue
            file = folder / PLACE / "backbone.pt"
            same = probed.get("learned_as") == self._learned_as(self._how)
            if probed["offered"] and same and not locked & set(patients) and _hash(file) == probed["sha256"]:
                return self._pretrained(row.folder, file, probed, patients)
        return None

    def _offer_of(self, run: str) -> tuple[dict[str, Any], tuple[str, ...]]:
        return self._read_of(run, f"{PLACE}/probe.json"), Pool.from_plain(self._read_of(run, POOL)).patients

    def _read_of(self, run: str, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.desk.root / "runs" / run / name).read_bytes())
        except (OSError, ValueError):
            raise Tampered(f"{name} of run {run} is not there, or damaged") from None
        return found

    def _pretrained(self, run: str, file: Path, probed: Mapping[str, Any], patients: Sequence[str]) -> Pretrained:
        metrics = tuple(Metric(**plain) for plain in probed["metrics"])
        return Pretrained(probed["offered"], probed["words"], run, file, probed["sha256"], tuple(patients), metrics)

    def _learned_as(self, how: Pretraining) -> str:
        """Name what a backbone must have been learned as, to be the start of this recipe: epochs may have been added."""
        recipe = self.desk.recipe
        same = replace(how, epochs=1)
        return f"{recipe.network} {recipe.start} {recipe.size_px} px {same.digest[:16]}"

    def _take_over(self, place: str) -> None:
        """Start from the state of the run that this one extends."""
        extended, state = self.desk.orders.extends, self.desk.path / place / "state.pt"
        if not extended or state.is_file():
            return
        source = self.desk.root / "runs" / extended / place / "state.pt"
        if not source.is_file():
            raise NothingToLearn(f"run {extended} has no state of a pretraining to go on from")
        if self._read_of(extended, "run.json")["recipe_digest"] != self.desk.bound["recipe_digest"]:
            raise OtherRun(f"run {extended} was started with another recipe than this one: it cannot go on in it")
        if (done := int(checkpoint.load(source)["epoch"])) >= self._how.epochs:
            raise NothingToLearn(f"the pretraining of run {extended} has {done} epochs already; ask for more than that in all")
        for file in (_batch_file(source), source):  # the state last: where it is, all is taken over
            if file.is_file():
                durable.write(state.with_name(file.name), file.read_bytes(), mode=0o600)

    # --- its steps ------------------------------------------------------------------------------------------------------------

    def _clusters(self, pool: Pool, place: str, how: Pretraining, labelled: Sequence[Sample]) -> NDArray[np.int64]:
        """Train by DeepCluster; give the cluster of each picture at the end."""
        file = self.desk.path / place / "clusters.npz"
        if not file.is_file():
            self.desk.progress.stage(f"pretraining ({how.method}, {how.clusters} clusters)", how.epochs)
            job = self._job("deepcluster", pool, place, how, how.batch)
            state = self._together(job, place, "metrics.jsonl", "pretraining", self._probe_of(labelled, how))
            found = self._all(replace(job, what="clusters"))
            durable.write(file, _packed(found, int(state["epoch"])), mode=0o600)
        with np.load(file) as kept:
            return np.asarray(kept["labels"], np.int64)

    def _classified(self, pool: Pool, labels: NDArray[np.int64], place: str, how: Pretraining) -> dict[str, Any]:
        """Train the classifier of the cluster numbers; give what it is worth on patients it never saw."""

        def made() -> dict[str, Any]:
            split = Split.from_plain(self.desk.read("split.json"))
            train, validation, test = (
                np.array([row for row, one in enumerate(pool.images) if one.pid in part], np.int64)
                for part in (set(split.train), set(split.validation), set(split.test))
            )
            self.desk.progress.stage(f"classifier of {how.clusters} clusters", how.classifier.epochs)
            job = self._job("classify", pool, place, how, how.classifier.batch)
            job = replace(job, labels=labels, train=train, validation=validation)
            state = self._together(job, place, "classifier.jsonl", "classifier of clusters", None)
            network = self._network(how.clusters if len(labels) == 0 else int(labels.max()) + 1)
            network.load_state_dict(state["best"]["network"])
            part, gallery = self._part(job.engine, Ranks()), _gallery(self.cache, pool.images)
            checkpoint.save(network.backbone.state_dict(), self.desk.path / place / "backbone.pt")
            network = part.engine.place(network)
            told = {"best_epoch": state["best"]["epoch"], "clusters": how.clusters}
            largest = np.bincount(labels[train]).argmax()
            for name, held in (("validation_accuracy", validation), ("accuracy", test)):
                said = pretrain.features(network, gallery.only(held), part, embed=True).argmax(dim=1).cpu().numpy()
                hits = said == labels[held]
                told |= _accuracies(name, hits, [pool.images[row].pid for row in held.tolist()], self.desk.recipe.seed)
            told["validation_chance"], told["chance"] = (float((labels[held] == largest).mean()) for held in (validation, test))
            return told

        return self.desk.step(f"{place}/classifier.json", made)

    def _probed(self, place: str, how: Pretraining, labelled: Sequence[Sample]) -> dict[str, Any]:
        """Hold the backbone against its own start weights."""
        file = self.desk.path / place / "backbone.pt"
        told: dict[str, Any] = {
            "sha256": _hash(file),
            "learned_as": self._learned_as(how),
            "network": f"{self.desk.recipe.network} {self.desk.recipe.size_px} px",
            "metrics": [],
            "offered": False,
        }
        if not self._probable(labelled):
            return told | {"words": "Not offered: too few labelled patients outside the locked set to probe it."}
        self.desk.progress.stage("probing what was learned")
        start = self._network(how.clusters if how.method == "deepcluster" else 2)  # a ResNet draws its stem after its head
        learned, clustered = self._network(2), self._network(2)
        learned.backbone.load_state_dict(checkpoint.load(file))
        state = checkpoint.load(self.desk.path / place / "state.pt")
        weights = {name.partition(".")[2]: value for name, value in state["network"].items() if name.startswith("backbone.")}
        clustered.backbone.load_state_dict(weights)
        seed, urgent = seed_for(self.desk.recipe.seed, "bootstrap"), self.desk.recipe.urgent
        said = {
            name: {kind: evaluate.by_study(labelled, logits, urgent) for kind, logits in self._said(network, labelled).items()}
            for name, network in (("start", start), ("DeepCluster", clustered), ("pretrained", learned))
        }
        above = {}
        for kind, title in probe.KINDS.items():
            for name, predictions in said.items():
                if metric := evaluate.auc_with_interval(predictions[kind], f"{title}, {name}", seed=seed):
                    told["metrics"].append(asdict(metric))
            apart = evaluate.difference(
                said["pretrained"][kind], said["start"][kind], f"AUC of the {title}, pretrained minus start", seed=seed
            )
            if apart:
                told["metrics"].append(asdict(apart))
                above[title] = apart
        below = [f"{title} {_told(apart)}" for title, apart in above.items() if apart.value < 0]
        told["offered"] = bool(above) and not below
        differences = "; ".join(f"{title} {_told(apart)}" for title, apart in above.items())
        told["words"] = (
            f"Offered for fine-tuning: no probe ends below the start weights (AUC minus start: {differences})."
            if told["offered"]
            else f"Not offered: below the start weights (AUC minus start: {'; '.join(below)})."
        )
        return told

    def _remarked(self, probed: dict[str, Any]) -> dict[str, Any]:
        return probed | {"words": " ".join([probed["words"], *self.desk.remarks])}

    def _probable(self, labelled: Sequence[Sample]) -> bool:
        targets, patients = [one.target for one in labelled], [one.pid for one in labelled]
        return probe.possible(targets, patients, len(self.desk.recipe.classes), self._folds)

    @property
    def _folds(self) -> int:
        return min(5, self.desk.recipe.folds)

    def _said(self, network: Network, labelled: Sequence[Sample]) -> dict[str, NDArray[np.float64]]:
        part = self._part(self.engine(), Ranks())
        gallery = _gallery(self.cache, labelled)
        pooled = pretrain.features(part.engine.place(network), gallery, part).cpu().numpy()
        return probe.out_of_fold(
            pooled,
            [one.target for one in labelled],
            [one.pid for one in labelled],
            len(self.desk.recipe.classes),
            folds=self._folds,
            repeats=REPEATS,
            seed=self.desk.recipe.seed,
        )

    def _probe_of(self, labelled: Sequence[Sample], how: Pretraining) -> Callable[[int, Network], Mapping[str, float]] | None:
        """Give what looks at a network between two epochs; None when there is too little to look with."""
        if not self._probable(labelled):
            return None

        def look(epoch: int, network: Network) -> Mapping[str, float]:
            if epoch % how.probe_every and epoch != how.epochs:
                return {}
            predictions = {
                kind: evaluate.by_study(labelled, logits, self.desk.recipe.urgent)
                for kind, logits in self._said(network, labelled).items()
            }
            return {kind: evaluate.auc(one.positive, one.score) for kind, one in predictions.items()}

        return look

    # --- all processes together -----------------------------------------------------------------------------------------------

    def engine(self) -> Engine:
        """Give what computes on this machine, tried once and then obeyed."""
        device = self.desk.bound["device"]
        size_px, extended = self.desk.recipe.size_px, self.desk.orders.extends

        def made() -> dict[str, Any]:
            if extended:
                return self._read_of(extended, "engine.json")
            return asdict(chosen(device, partial(self._network, 2), size_px, batch=TRY_BATCH))

        return Engine(**self.desk.step("engine.json", made))

    def _network(self, classes: int) -> Network:
        """Give the start network, a random one with the weights that the pretraining starts from."""
        recipe = self.desk.recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(recipe.seed, "start"))
            return build(recipe.network, classes, recipe.start, weights=self.desk.root / "models" / "weights")

    def _part(self, engine: Engine, ranks: Ranks) -> Part:
        recipe = self.desk.recipe
        return Part(engine, ranks, self.desk.bound["threads"], recipe.seed, recipe.size_px, TRY_BATCH)

    def _job(self, what: str, pool: Pool, place: str, how: Pretraining, batch: int) -> Job:
        name = "state.pt" if what == "deepcluster" else "classifier.pt"
        threads = self.desk.bound["threads"]
        state = self.desk.path / place / name
        return Job(
            what, self.desk.recipe, how, self.engine(), checkpoint.fitting(_batch_file(state), batch), threads, pool.images, state
        )

    def _all(self, job: Job, **hooks: Any) -> Any:
        """Let every process do the job, and do it here."""
        self.desk.ranks.told(job)
        return _do(job, self.desk.root, self.desk.ranks, **hooks)

    def _together(
        self, job: Job, place: str, told: str, fit: str, look: Callable[[int, Network], Mapping[str, float]] | None
    ) -> State:
        """Train to the end of the job, with half the batch whenever the memory is too small."""
        while True:
            keeper = _Keeper(job.state, self.desk.path / place / told)

            def on_epoch(line: Line, keeper: _Keeper = keeper) -> None:
                keeper.note(line)
                self.desk.progress.epoch(fit, {"fit": fit} | line)
                self.desk.progress.advance(int(line["epoch"]))

            try:
                state: State = self._all(job, keep=keeper.keep, on_epoch=on_epoch, on_batch=self.desk.progress.within, look=look)
            except TooLarge:
                fitting = checkpoint.fitting(_batch_file(job.state), job.batch)
                if self.desk.ranks.size > 1 or fitting == job.batch:
                    raise  # the others are in the middle of a step: all start anew, with the batch that was noted
                job = replace(job, batch=fitting)
                event(log, "batch halved", level=logging.WARNING, run=self.desk.path.name, fit=fit, batch=job.batch)
                epochs = job.how.classifier.epochs if job.what == "classify" else job.how.epochs
                self.desk.progress.stage(f"{fit}, batch halved to {job.batch}: the memory is too small", epochs)
                continue
            finally:
                keeper.write()  # told to stop, diverged or collapsed: the last good state is kept
            # lines are not written through, and a power cut may have taken some: the page needs them
            journal.write(self.desk.path / place / told, state["lines"])
            return state

    # --- a sweep --------------------------------------------------------------------------------------------------------------

    def sweep(self, pool: Pool, labelled: Corpus) -> dict[str, Any]:
        """Pretrain for each number of clusters; lay the study's rule and the probes side by side.

        The study takes the k whose clusters are told best by the classifier; more clusters are harder to tell, so the accuracy is
        held against what naming the largest cluster each time reaches on the same images.
        """
        rows = []
        for k in self.desk.orders.clusters:
            pretrained = self.learn(pool, labelled, f"k-{k}", replace(self._how, clusters=k))
            told = self.desk.read(f"k-{k}/classifier.json")
            values = {metric.name: metric.value for metric in pretrained.metrics}
            rows.append(
                {
                    "k": k,
                    "accuracy": told["accuracy"],
                    "accuracy_by_patient": told["accuracy_by_patient"],
                    "chance": told["chance"],
                    "over_chance": told["accuracy"]["value"] - told["chance"],
                    "offered": pretrained.offered,
                }
                | {kind: values.get(f"AUC, {title}, pretrained") for kind, title in probe.KINDS.items()}
                | {f"{kind}_start": values.get(f"AUC, {title}, start") for kind, title in probe.KINDS.items()}
            )
        by_rule = max(rows, key=lambda row: row["over_chance"])["k"]
        probed = [row for row in rows if row["linear"] is not None]
        by_probe = max(probed, key=lambda row: row["linear"] + row["knn"])["k"] if probed else None
        return self.desk.step("sweep.json", lambda: {"rows": rows, "by_study_rule": by_rule, "by_probes": by_probe})


class _Keeper:
    """Writes states now and then, and one line an epoch."""

    def __init__(self, file: Path, told: Path) -> None:
        self._file, self._told = file, told
        self._state: State | None = None
        self._at = monotonic()
        journal.write(told, checkpoint.load(file)["lines"] if file.is_file() else [])

    def keep(self, state: State) -> None:
        """Remember the newest state; write it when the last one is old."""
        self._state = deepcopy(state)  # the next epoch goes on in the same tensors
        if monotonic() - self._at > KEEP_S:
            self.write()

    def note(self, line: Line) -> None:
        """Write the line of an epoch."""
        journal.note(self._told, line)

    def write(self) -> None:
        """Write the newest state."""
        if self._state is not None:
            checkpoint.save(self._state, self._file)
            self._state, self._at = None, monotonic()


def _do(
    job: Job,
    root: Path,
    ranks: Ranks,
    *,
    keep: Callable[[State], None] = lambda state: None,
    on_epoch: Callable[[Line], None] = lambda line: None,
    on_batch: Callable[[float], None] = lambda done: None,
    look: Callable[[int, Network], Mapping[str, float]] | None = None,
) -> Any:
    """Do a job, in each process alike."""
    recipe = job.recipe
    cache = Cache(root / "cache", Preprocessing(recipe.size_px))
    gallery = _gallery(cache, job.images)
    # rank 0 reads it for all: on another machine a shared folder may show what stood there a minute ago
    state = ranks.told(checkpoint.load(job.state) if ranks.first and job.state.is_file() else None)
    part = Part(
        replace(job.engine, device=f"cuda:{ranks.local}") if job.engine.device == "cuda" else job.engine,
        ranks,
        job.threads,
        recipe.seed,
        recipe.size_px,
        job.batch,
        keep=keep,
        on_epoch=on_epoch,
        on_batch=on_batch,
        probe=look,
    )

    def fresh(classes: int) -> Network:
        return build(recipe.network, classes, recipe.start, weights=root / "models" / "weights")

    try:
        if job.what == "deepcluster":
            return pretrain.deepcluster(fresh, gallery, job.how, part, state)
        if job.what == "clusters" and state is not None:
            return pretrain.clusters(fresh, gallery, job.how, part, state)
        if job.labels is None or job.train is None or job.validation is None:
            raise ValueError(f"no job {job.what!r}")
        return pretrain.classify(fresh, gallery, job.labels, job.train, job.validation, job.how.classifier, part, state)
    except TooLarge:
        if job.batch < 2 * 2 * ranks.size:
            raise
        checkpoint.halve(_batch_file(job.state), job.batch)
        raise


def _batch_file(state: Path) -> Path:
    return state.with_name(f"batch-{state.stem}.json")


def _gallery(cache: Cache, images: Sequence[Pooled | Sample]) -> Gallery:
    rows, at = corpus.mapped(images, cache)
    return Gallery(rows, at, tuple(one.sop_uid for one in images))


def _packed(found: Clusters, epoch: int) -> bytes:
    out = io.BytesIO()
    np.savez(
        out,
        labels=found.assignment.labels,
        distances=found.assignment.distances,
        centroids=found.assignment.centroids,
        rows=found.rows.astype(np.float16),
        epoch=np.array(epoch),
    )
    return out.getvalue()


def _accuracies(name: str, hits: NDArray[np.bool_], patients: Sequence[str], seed: int) -> dict[str, Any]:
    """Give the accuracy by image, and the mean over the patients of each one's own, with their intervals."""
    images = len(hits)
    low, high = evaluate.wilson(int(hits.sum()), images)
    share: dict[str, list[bool]] = {patient: [] for patient in patients}
    for patient, hit in zip(patients, hits.tolist(), strict=True):
        share[patient].append(hit)
    means = np.array([np.mean(each) for each in share.values()]) if share else np.zeros(1)
    drawn = np.random.default_rng(seed).choice(means, (2000, len(means))).mean(axis=1)
    edges = np.quantile(drawn, [0.025, 0.975])
    value = float(hits.mean()) if images else 0.0
    return {
        name: {"value": value, "low": low, "high": high, "n": images},
        f"{name}_by_patient": {"value": float(means.mean()), "low": float(edges[0]), "high": float(edges[1]), "n": len(share)},
    }


def _told(metric: Metric) -> str:
    return f"{metric.value:+.3f} ({metric.low:+.3f} to {metric.high:+.3f}, {metric.n} patients)"


def _hash(file: Path) -> str:
    return sha256(file.read_bytes()) if file.is_file() else ""
