"""WIRES the page of one run from what its steps left.

In: the run's folder, the frozen list of labelled images, the cache for their pictures. Out: `report.html` in that folder, written
once and for its owner alone; a run of any kind gets the sections that its files allow. Nothing is decided here, and no picture of
a patient who is in the locked set by now comes on a sheet, whatever the frozen lists say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.card import Metric
from node.keep.cache import NO_ROW, Cache
from training import evaluate, journal, pages, plots, probe, sheets
from training.corpus import Corpus, Pool
from training.evaluate import LOCKED, OUT_OF_FOLD, Predictions
from training.folder import RunFolder
from training.pages import Figure, Grid, Headline, Page, Section, Sign
from training.recipe import seed_for
from training.sheets import MOST_POINTS, PER_STRIP, Neighbours, Strip
from training.upstream import PLACE, POOL

Plain = Mapping[str, Any]

PAGE = "report.html"
WEIGHTS = {"imagenet": "ImageNet weights", "random": "random weights"}
QUERIES = 6
FEWEST_POINTS = 5
"""Of a map."""
BAND_DRAWS = 200


class Report:
    """The page of one run."""

    def __init__(self, desk: RunFolder, cache: Cache, frozen: Corpus) -> None:
        self.desk, self.cache, self.frozen = desk, cache, frozen

    def of_cycle(self, figures: Plain, tables: Mapping[str, Sequence[Plain]], decision: Plain) -> None:
        """Write the page of a run that came to a model: `figures` of evaluation.json, `tables` of figures by their headings."""
        if self._drawn():
            return
        recipe, words = self.desk.recipe, decision["words"]
        if decision["by_hand"]:
            words += f" A person may decide: `{decision['by_hand']}`"
        aucs = [Metric(**figures[of]["auc"]) for of in (LOCKED, OUT_OF_FOLD) if figures[of].get("auc")]
        learned = self._learned(PLACE) if (self.desk.path / PLACE / "probe.json").is_file() else None
        page = Page(
            title=f"Training run {self.desk.path.name}",
            decision=decision["decision"],
            words=words,
            headlines=[*map(Headline.of, aucs), *([_offer(learned)] if learned else [])],
            sections=[
                self._quality(figures, tables),
                self._groups(figures["groups"]),
                self._finetuning(decision),
                self._begun(learned),
                *(self._pretraining(learned) if learned else ()),
            ],
            facts=self._facts_of_model(decision) | self._machine(),
            left_out=self.frozen.left_out,
            limits=(*recipe.limits, *self.desk.remarks),
        )
        self._write(page)

    def of_pretraining(self, outcome: Plain) -> None:
        """Write the page of a run that pretrained and did no more: `outcome` says whether the result is offered."""
        if self._drawn():
            return
        learned = self._learned(PLACE)
        measured = bool(learned.metrics)
        sign = Sign.GOOD if learned.probed["offered"] else Sign.BAD if measured else Sign.OPEN
        page = Page(
            title=f"Pretraining run {self.desk.path.name}",
            judge="The probes say",
            decision=outcome["decision"],
            sign=sign,
            words=f"{outcome['words']} More epochs: `osteon train extend {self.desk.path.name} --epochs N`",
            headlines=[*_leads(learned), *_told_apart(learned), _agreement(learned)],
            sections=[_probed(learned, []), *self._pretraining(learned)],
            facts=self._facts_of_pretraining() | self._machine(),
            limits=(*self.desk.recipe.limits, *self.desk.remarks),
        )
        self._write(page)

    def of_sweep(self, outcome: Plain) -> None:
        """Write the page of a sweep: the numbers of clusters side by side, then each of them."""
        if self._drawn():
            return
        found = self.desk.read("sweep.json")
        chosen = found["by_study_rule"]
        best = next(row for row in found["rows"] if row["k"] == chosen)
        over = Headline("over chance", f"{best['over_chance']:.2f}".replace("-", "−"), f"test accuracy at {chosen:,} clusters")
        headlines = [Headline("by the study's rule", f"{chosen:,}", "clusters: the accuracy furthest above chance"), over]
        if found["by_probes"]:
            headlines.append(Headline("by the probes", f"{found['by_probes']:,}", "clusters: the best AUC of both probes"))
        learned = self._learned(f"k-{chosen}")
        sections = [
            self._sweep(found),
            _probed(learned, [learned.probed["words"]], of=chosen),
            *self._pretraining(learned, of=chosen),
        ]
        others = [row["k"] for row in found["rows"] if row["k"] != chosen]
        page = Page(
            title=f"Sweep {self.desk.path.name}",
            judge="The sweep says",
            decision=f"{chosen:,} clusters by the study's rule",
            sign=Sign.PLAIN,
            words=outcome["words"],
            headlines=headlines,
            sections=[*sections, *(self._in_short(self._learned(f"k-{k}"), k) for k in others)],
            facts=self._facts_of_pretraining() | self._machine(),
            limits=(*self.desk.recipe.limits, *self.desk.remarks),
        )
        self._write(page)

    def _drawn(self) -> bool:
        if (self.desk.path / PAGE).is_file():
            return True
        self.desk.progress.stage("drawing the report")
        return False

    def _write(self, page: Page) -> None:
        self.desk.write(PAGE, pages.render(page).encode())

    # --- a model --------------------------------------------------------------------------------------------------------------

    def _quality(self, figures: Plain, tables: Mapping[str, Sequence[Plain]]) -> Section:
        """Show what was said of patients that the network had never seen."""
        urgent, classes = self.desk.recipe.urgent, [label.name for label in self.desk.recipe.classes]
        said = {name: Predictions.from_plain(plain, urgent) for name, plain in self.desk.read("predictions.json").items()}
        curves = [self._curve(name, predictions) for name, predictions in said.items() if predictions.smaller_class()]
        seen = said[OUT_OF_FOLD]
        cases = f"{OUT_OF_FOLD}, {len(seen.studies)} studies"
        confusion = plots.confusion_plot(evaluate.confusion(seen), classes, f"Confusion, {cases}")
        calibration = plots.calibration_plot(evaluate.reliability(seen), f"Calibration, {cases}")
        charts = [
            Figure("Rows are the truth; a share is of its row.", confusion),
            Figure("The band is what resampled patients give.", plots.roc_plot(curves)),
            Figure("A dot is a tenth of the scores; above it, its studies.", calibration),
        ]
        if figures[OUT_OF_FOLD].get("auc"):
            auc = Metric(**figures[OUT_OF_FOLD]["auc"])
            others = [Metric(**plain) for plain in figures[f"{OUT_OF_FOLD}, trivial baselines"].values()]
            trivial = plots.comparison_plot(auc, others, "AUC out of fold against trivial baselines")
            charts.insert(0, Figure("What needs no picture reaches as much as its whiskers.", trivial))
        measured = {heading: [Metric(**plain) for plain in table] for heading, table in tables.items() if table}
        return Section("How good it is", "figures", tables=measured, figures=charts)

    def _curve(self, name: str, predictions: Predictions) -> plots.Curve:
        """Give the ROC curve with the band of its resampled patients."""
        false, true = evaluate.roc(predictions.positive, predictions.score)
        grid = np.linspace(0, 1, 51)
        drawn = []
        for weights in evaluate.resample(predictions, seed=seed_for(self.desk.recipe.seed, "bootstrap"), draws=BAND_DRAWS):
            x, y = evaluate.roc(predictions.positive, predictions.score, weights)
            drawn.append(np.interp(grid, x, y))
        alpha = self.desk.recipe.gate.alpha
        low, high = np.quantile(drawn, [alpha / 2, 1 - alpha / 2], axis=0)
        return plots.Curve(f"{name} ({len(predictions.studies)} studies)", false, true, grid, low, high)

    def _groups(self, groups: Mapping[str, Sequence[Plain]]) -> Section:
        """Show whether some patients are served worse than others."""
        shown = {"auc": "AUC", "accuracy": "accuracy", "recall_urgent": "recall, urgent"}
        grids = []
        for of, found in groups.items():
            rows = [
                (f"{one['kind']} {one['value']}", *map(str, one["patients"]), *(_told(one["figures"].get(key)) for key in shown))
                for one in found
            ]
            grids.append(Grid(of.capitalize(), ("", *self._names, *shown.values()), rows))
        words = (
            f"Patients of each class; figures with their 95 % intervals, from {evaluate.FEW} patients on. "
            "`evaluation.json` has the other figures by group, too."
        )
        return Section("By group", "groups", words=[words], grids=[grid for grid in grids if grid.rows])

    def _finetuning(self, decision: Plain) -> Section:
        words = [
            self.desk.read("final.json")["words"],
            f"The final model was fitted for {decision['epochs']} epochs, the median of the folds.",
        ]
        loss = plots.loss_plot(journal.read(self.desk.path / "metrics.jsonl"))
        charts = [Figure("A thin line is a fit, a dot the epoch it was kept at.", loss)]
        return Section("Fine-tuning", "finetuning", words=words, figures=charts)

    @property
    def _started_from(self) -> str:
        """Name the run whose pretraining fine-tuning started from; empty where it started from plain weights."""
        has_said = (self.desk.path / "start.json").is_file()  # a recipe without a pretraining says nothing
        return self.desk.orders.start_from or (self.desk.read("start.json")["run"] if has_said else "")

    def _begun(self, learned: _Learned | None) -> Section:
        """Say what fine-tuning starts from, and why."""
        heading, recipe, orders = "What fine-tuning starts from", self.desk.recipe, self.desk.orders
        weights, run = WEIGHTS[recipe.start], self._started_from
        if not run:
            if learned:
                why = "this run pretrained, and the result is not offered"
            elif recipe.pretraining:
                why = "no run offers a pretraining of this recipe"
            else:
                why = "the recipe has no pretraining"
            said = f"The {weights}: {why}."
            return (
                _probed(learned, [said, learned.probed["words"]], heading)
                if learned
                else Section(heading, "probes", words=[said])
            )
        if learned and run == self.desk.path.name:
            return _probed(learned, ["What this run pretrained.", learned.probed["words"]], heading)
        because = "named by a person, whatever its probes said" if orders.start_from else "the newest one that is offered"
        probed = json.loads((self.desk.root / "runs" / run / PLACE / "probe.json").read_bytes())
        words = [f"The pretraining of run {run}: {because}. `osteon train report {run}` shows it.", probed["words"]]
        return Section(heading, "probes", words=words, tables=_probe_table([Metric(**plain) for plain in probed["metrics"]]))

    # --- a pretraining --------------------------------------------------------------------------------------------------------

    def _learned(self, place: str) -> _Learned:
        folder = self.desk.path / place
        with np.load(folder / "clusters.npz") as kept:
            found = {name: kept[name] for name in ("labels", "distances", "rows")} | {"k": len(kept["centroids"])}
        return _Learned(
            lines=journal.read(folder / "metrics.jsonl"),
            classifier_lines=journal.read(folder / "classifier.jsonl"),
            classified=self.desk.read(f"{place}/classifier.json"),
            probed=self.desk.read(f"{place}/probe.json"),
            **found,
        )

    def _pretraining(self, learned: _Learned, of: int = 0) -> list[Section]:
        """Show one pretraining; `of` is its number of clusters where there are several."""
        which, suffix = _which(of)
        shown = self._shown(learned)
        sections = [
            Section(
                f"Pretraining{which}",
                f"pretraining{suffix}",
                facts=self._facts_of_learning(learned),
                grids=[] if of else self._pool_left_out(),
                figures=_epoch_charts(learned),
            ),
            Section(
                f"Classifier of the clusters{which}",
                f"classifier{suffix}",
                words=["Step two: a network from the same start learns to name the cluster of a picture. It is what is offered."],
                grids=[_accuracies(learned.classified)],
                figures=_classifier_charts(learned),
            ),
        ]
        figures = [*_size_charts(learned), *self._sheets(shown)]
        sections.append(Section(f"Clusters{which}", f"clusters{suffix}", figures=figures))
        if len(shown.uids) >= FEWEST_POINTS:
            sections.append(Section(f"Map of the pictures{which}", f"map{suffix}", figures=[self._map(shown)]))
        return sections

    def _in_short(self, learned: _Learned, k: int) -> Section:
        """Show one of several pretrainings that was not chosen."""
        loss, nmi, *_ = _epoch_charts(learned)
        _, accuracy = _classifier_charts(learned)
        return Section(
            f"k = {k:,}",
            f"k-{k}",
            words=[learned.probed["words"]],
            grids=[_accuracies(learned.classified)],
            figures=[
                loss,
                nmi,
                *_probe_charts(learned),
                accuracy,
                *_size_charts(learned),
                *self._sheets(self._shown(learned))[:1],
            ],
        )

    def _sweep(self, found: Plain) -> Section:
        """Lay the numbers of clusters side by side."""
        rows = found["rows"]
        cases = int(rows[0]["accuracy"]["n"])
        points = [row | {"accuracy": row["accuracy"]["value"]} for row in rows]
        chosen = plots.sweep_accuracy_plot(points, cases, found["by_study_rule"])
        charts = [Figure("Shaded: what the classifier adds to naming the largest cluster each time. Ringed: chosen.", chosen)]
        if found["by_probes"]:
            probed = plots.sweep_probe_plot(rows, self._learned(f"k-{rows[0]['k']}").witnesses)
            charts.append(Figure("Dashed: the weights each pretraining began with, which it has to beat.", probed))
        header = ("clusters", "test accuracy", "95 % interval", "chance", "over chance", "k-NN", "linear probe", "offered")
        cells = [
            (
                f"{row['k']:,}",
                _number(row["accuracy"]["value"]),
                f"{_number(row['accuracy']['low'])} to {_number(row['accuracy']['high'])}",
                _number(row["chance"]),
                _number(row["over_chance"]),
                *(_number(row[key]) for key in probe.KINDS),
                "yes" if row["offered"] else "no",
            )
            for row in rows
        ]
        words = (
            "The study takes the number of clusters that step two tells apart best. More clusters are harder to tell, so the "
            "accuracy is held against what naming the largest cluster reaches on the same pictures. The AUC of the probes on "
            "labelled patients stands beside it: the two need not agree."
        )
        caption = f"Accuracy on {cases:,} pictures of patients it never saw; AUC of the probes after pretraining"
        return Section("The sweep", "sweep", words=[words], grids=[Grid(caption, header, cells)], figures=charts)

    # --- pictures -------------------------------------------------------------------------------------------------------------

    def _shown(self, learned: _Learned) -> _Shown:
        """Give the clustered pictures that may be looked at: those the site still has, of nobody who is locked by now."""
        instances = self.desk.catalogue.instances
        free = {image.sop_uid for image in instances.for_training() if not image.locked}
        persons = instances.locked_patients()
        images = self._pool.images
        rows = [
            row
            for row, one in enumerate(images)
            if one.sop_uid in free and one.pid not in persons and (kept := self.cache.get(one.sop_uid)) and kept.row != NO_ROW
        ]
        target = {sample.sop_uid: sample.target for sample in self.frozen.training}
        return _Shown(
            uids=tuple(images[row].sop_uid for row in rows),
            patients=tuple(images[row].pid for row in rows),
            classes=np.array([target.get(images[row].sop_uid, -1) for row in rows], np.int64),
            clusters=learned.labels[rows],
            distances=learned.distances[rows],
            rows=learned.rows[rows].astype(np.float32),
        )

    def _pictures(self, shown: _Shown, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.cache.pixels([shown.uids[row] for row in rows])

    def _sheets(self, shown: _Shown) -> list[Figure]:
        """Draw the clusters that are worth a look, and the neighbours of some pictures."""
        if not shown.uids:
            return []
        chosen = sheets.chosen_clusters(shown.rows, shown.clusters)
        strips = [
            Strip(self._name_of(shown, words, cluster), self._pictures(shown, shown.outwards(cluster)))
            for words, clusters in chosen.items()
            for cluster in clusters
        ]
        kinds = {"largest": "the largest", "smallest": "the smallest", "oddest": "the oddest (widest spread)"}
        named = ", ".join(words for kind, words in kinds.items() if chosen[kind])
        seen = f"Clusters: {named}; of each, pictures from its middle outwards."
        figures = [Figure(seen, sheets.contact_sheet(strips), wide=True)]
        queries = self._queries(shown)
        near, cosines = sheets.nearest(shown.rows, queries, shown.patients)
        if near.size:
            found = [
                Neighbours(self._neighbourly(shown, query, rows), self._pictures(shown, [query, *rows]), cosine)
                for query, rows, cosine in zip(queries, near, cosines, strict=True)
            ]
            seen = "Framed: a picture; beside it, the nearest ones of other patients, with the cosine of their features."
            figures.append(Figure(seen, sheets.neighbours_sheet(found), wide=True))
        return figures

    def _queries(self, shown: _Shown) -> list[int]:
        """Choose pictures to ask the neighbours of: labelled ones of each class in turn, then any."""
        random = np.random.default_rng(seed_for(self.desk.recipe.seed, "queries"))
        drawn = random.permutation(len(shown.uids))
        classes = range(len(self.desk.recipe.classes))
        of_class = [[int(row) for row in drawn if shown.classes[row] == one] for one in classes]
        rounds = [rows[turn] for turn in range(QUERIES) for rows in of_class if turn < len(rows)]
        return list(dict.fromkeys([*rounds, *map(int, drawn)]))[:QUERIES]

    def _name_of(self, shown: _Shown, words: str, cluster: int) -> str:
        members = np.flatnonzero(shown.clusters == cluster)
        patients = {shown.patients[row] for row in members}
        told = f"{words}: cluster {cluster}, {_counted(len(members), 'image')} of {_counted(len(patients), 'patient')}"
        counts = [int((shown.classes[members] == index).sum()) for index in range(len(self.desk.recipe.classes))]
        labelled = [f"{count} {name}" for count, name in zip(counts, self._names, strict=True) if count]
        return f"{told}; {', '.join(labelled)}" if labelled else told

    def _neighbourly(self, shown: _Shown, query: int, rows: NDArray[np.int64]) -> str:
        target, cluster = int(shown.classes[query]), int(shown.clusters[query])
        name = self._names[target] if target >= 0 else "without a label"
        same = int((shown.clusters[rows] == cluster).sum())
        return f"{name}, cluster {cluster}: {same} of {len(rows)} neighbours are in the same cluster"

    def _map(self, shown: _Shown) -> Figure:
        """Lay pictures out by their features; labelled ones are marked, up to half of what is shown."""
        labelled = np.flatnonzero(shown.classes >= 0)
        seed = seed_for(self.desk.recipe.seed, "map") % 2**32
        keep = np.random.default_rng(seed).permutation(labelled)[: MOST_POINTS // 2]
        rows, places = sheets.embedding(shown.rows, seed=seed, keep=keep.tolist())
        drawn = sheets.embedding_map(
            places,
            shown.clusters[rows],
            labels=shown.classes[rows] if len(labelled) else None,
            names=self._names,
            thumbnails=self._pictures(shown, rows),
        )
        marked = int((shown.classes[rows] >= 0).sum())
        caption = (
            f"{len(rows):,} of {len(shown.uids):,} pictures, {marked:,} of them labelled. Shapes are labels, colours clusters. "
            "What lies together is alike to the network; distances between groups mean little (t-SNE)."
        )
        return Figure(caption, drawn, wide=True)

    @property
    def _names(self) -> list[str]:
        return [label.name.replace("_", " ") for label in self.desk.recipe.classes]

    # --- what it was made of --------------------------------------------------------------------------------------------------

    @cached_property
    def _pool(self) -> Pool:
        return Pool.from_plain(self.desk.read(POOL))

    def _pool_left_out(self) -> list[Grid]:
        left_out = self._pool.left_out
        rows = [(reason, f"{count:,}") for reason, count in left_out.items()]
        return [Grid("Left out", ("reason", "images"), rows)] if rows else []

    def _facts_of_learning(self, learned: _Learned) -> dict[str, str]:
        how, last = self.desk.recipe.pretraining, learned.lines[-1]
        method = {"deepcluster": "DeepCluster", "deepcluster2": "DeepCluster-v2"}[how.method] if how else "DeepCluster"
        sizes = np.bincount(learned.labels, minlength=learned.k)
        smallest, lower, median, upper, largest = np.percentile(sizes, [0, 25, 50, 75, 100])
        return {
            "learned from": f"{len(self._pool.images):,} images of {len(self._pool.patients):,} patients without their labels",
            "method": f"{method}, {learned.k:,} clusters, {last['epoch']} epochs, from {WEIGHTS[self.desk.recipe.start]}",
            "agreement of the last two epochs' assignments": "not measured" if last["nmi"] is None else f"NMI {last['nmi']:.3f}",
            "images in a cluster": f"{smallest:,.0f} to {largest:,.0f}, quartiles {lower:,g} / {median:,g} / {upper:,g}",
            "empty clusters in the last epoch": f"{last['empty']} ({last['relocated']} relocated)",
            "time": _minutes([*learned.lines, *learned.classifier_lines]),
        }

    def _facts_of_model(self, decision: Plain) -> dict[str, str]:
        recipe, frozen, parity = self.desk.recipe, self.frozen, self.desk.read("parity.json")
        start = f"the pretraining of run {self._started_from}" if self._started_from else WEIGHTS[recipe.start]
        return {
            "version": decision["version"],
            "recipe": f"{recipe.name} ({recipe.digest[:12]})",
            "expected": recipe.expects,
            "network": f"{recipe.network}, {recipe.size_px} px, start: {start}",
            "training list": f"{len(frozen.training)} images of {len(frozen.patients)} patients, digest {frozen.digest[:12]}",
            "locked list": f"{len(frozen.locked)} images of {len({sample.pid for sample in frozen.locked})} patients",
            "looks at the locked patients": str(decision["looks"]),
            "epochs of the final model": str(decision["epochs"]),
            "temperature": f"{decision['temperature']:.3f}",
            "ONNX against torch": f"{parity['images']} images, logits {parity['logits']:.1e}, features {parity['features']:.1e}",
        }

    def _facts_of_pretraining(self) -> dict[str, str]:
        recipe, extended = self.desk.recipe, self.desk.orders.extends
        return {
            "recipe": f"{recipe.name} ({recipe.digest[:12]})",
            "expected": recipe.expects,
            "network": f"{recipe.network}, {recipe.size_px} px, start: {WEIGHTS[recipe.start]}",
            "pretraining list": (
                f"{len(self._pool.images):,} images of {len(self._pool.patients):,} patients, digest {self._pool.digest[:12]}"
            ),
            **({"goes on from": f"run {extended}"} if extended else {}),
        }

    def _machine(self) -> dict[str, str]:
        bound, engine = self.desk.bound, self.desk.read("engine.json")
        layout = "channels last" if engine["channels_last"] else "channels first"
        return {
            "machine": f"{bound['device']}, {bound['threads']} threads, {_counted(bound['processes'], 'process', 'es')}",
            "computed in": f"{engine['format']}, {layout}",
            "versions": f"Osteon {bound['code_version']}, torch {bound['torch']}, numpy {bound['numpy']}",
            "started": f"{bound['started_at'][:16].replace('T', ' ')} UTC",
        }


@dataclass(frozen=True, slots=True)
class _Learned:
    """One pretraining, as its files tell it."""

    lines: Sequence[Plain]
    """One an epoch."""
    classifier_lines: Sequence[Plain]
    classified: Plain
    probed: Plain
    labels: NDArray[np.int64]
    """(N,) cluster of each picture of the pool."""
    distances: NDArray[np.float32]
    """(N,) squared distance to the centroid."""
    rows: NDArray[np.float16]
    """(N, d) what was clustered."""
    k: int

    @property
    def metrics(self) -> list[Metric]:
        return [Metric(**plain) for plain in self.probed["metrics"]]

    def metric(self, name: str) -> Metric | None:
        """Give a figure of the probes by its name; None when there were too few labels."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    @property
    def start(self) -> dict[str, float]:
        """What each probe reached on the start weights."""
        found = {key: self.metric(f"AUC, {title}, start") for key, title in probe.KINDS.items()}
        return {key: metric.value for key, metric in found.items() if metric}

    @property
    def witnesses(self) -> int:
        """Labelled patients that the probes were measured on."""
        return max((metric.n for metric in self.metrics), default=0)


@dataclass(frozen=True, slots=True)
class _Shown:
    """Clustered pictures that may be looked at, in one order."""

    uids: tuple[str, ...]
    patients: tuple[str, ...]
    classes: NDArray[np.int64]
    """(n,) class of the recipe, -1 without a label."""
    clusters: NDArray[np.int64]
    distances: NDArray[np.float32]
    rows: NDArray[np.float32]
    """(n, d) what was clustered."""

    def outwards(self, cluster: int) -> NDArray[np.int64]:
        """Choose pictures of a cluster at even steps from its middle to its edge."""
        members = np.flatnonzero(self.clusters == cluster)
        ordered = members[np.argsort(self.distances[members], kind="stable")]
        steps = np.linspace(0, len(ordered) - 1, min(PER_STRIP, len(ordered)))
        return np.asarray(ordered[np.rint(steps).astype(int)], np.int64)


# --- parts of a page ----------------------------------------------------------------------------------------------------------


def _offer(learned: _Learned) -> Headline:
    """Say of a run that came to a model what became of its pretraining."""
    apart = [f"{title} {_signed(one.value)}" for title in probe.KINDS.values() if (one := _lead(learned, title))]
    said = "offered" if learned.probed["offered"] else "not offered"
    return Headline("pretraining", said, f"AUC against the start: {', '.join(apart)}" if apart else "too few labels to probe it")


def _leads(learned: _Learned) -> list[Headline]:
    """Say how far each probe is above the start weights."""
    found = []
    for title in probe.KINDS.values():
        if one := _lead(learned, title):
            below = f"{_signed(one.low)} to {_signed(one.high)}, {one.n} patients"
            found.append(Headline(f"AUC against the start, {title}", _signed(one.value), below))
    return found


def _lead(learned: _Learned, title: str) -> Metric | None:
    return learned.metric(f"AUC of the {title}, pretrained minus start")


def _told_apart(learned: _Learned) -> list[Headline]:
    told = learned.classified
    return [Headline("clusters told apart", f"{told['accuracy']['value']:.2f}", f"test accuracy; chance {told['chance']:.2f}")]


def _agreement(learned: _Learned) -> Headline:
    nmi = learned.lines[-1]["nmi"]
    return Headline("agreement", "–" if nmi is None else f"{nmi:.2f}", "NMI of the last two epochs' assignments")


def _probe_table(metrics: Sequence[Metric]) -> dict[str, list[Metric]]:
    """Lay the probes' figures out; differences have a scale of their own."""
    apart = [metric for metric in metrics if metric.name.endswith("minus start")]
    tables = {"AUC of the probes": [one for one in metrics if one not in apart], "Against the start weights": apart}
    return {heading: table for heading, table in tables.items() if table}


def _probed(learned: _Learned, words: Sequence[str], heading: str = "What the probes say", of: int = 0) -> Section:
    """Show what the probes say of a pretraining, after `words`."""
    which, suffix = _which(of)
    how = (
        "A k-NN and a linear classifier tell labelled patients apart by the features, each by one that had not seen the patient: "
        "with the start weights, after DeepCluster, and after step two (pretrained), which is what fine-tuning may start from."
    )
    return Section(
        f"{heading}{which}",
        f"probes{suffix}",
        words=[*words, *([how] if learned.metrics else [])],
        tables=_probe_table(learned.metrics),
        figures=_probe_charts(learned),
    )


def _which(k: int) -> tuple[str, str]:
    """Give what ends heading and anchor where there are several numbers of clusters."""
    return (f", k = {k:,}", f"-{k}") if k else ("", "")


def _probe_charts(learned: _Learned) -> list[Figure]:
    if not learned.start:
        return []
    drawn = plots.probe_plot(learned.lines, learned.start, learned.witnesses)
    return [Figure("While DeepCluster learns; dashed, the start weights it has to end above. Step two follows.", drawn)]


def _epoch_charts(learned: _Learned) -> list[Figure]:
    lines = learned.lines
    return [
        Figure(
            "Each epoch has new cluster numbers to learn: a falling loss is no proof of use.", plots.pretraining_loss_plot(lines)
        ),
        Figure("1: no picture changed its cluster since the epoch before.", plots.nmi_plot(lines)),
        Figure("Clusters that ran empty, and those given half of the largest one.", plots.empties_plot(lines)),
        Figure("Healthy: no cluster swallows the others, and few shrink to nothing.", plots.sizes_plot(lines)),
    ]


def _classifier_charts(learned: _Learned) -> list[Figure]:
    lines, best = learned.classifier_lines, learned.classified["best_epoch"]
    accuracy = plots.classifier_accuracy_plot(lines, learned.k, learned.classified["validation_chance"])
    return [
        Figure(f"The network of epoch {best} was kept.", plots.classifier_loss_plot(lines)),
        Figure("Dashed: what naming the largest cluster each time reaches on the same pictures.", accuracy),
    ]


def _size_charts(learned: _Learned) -> list[Figure]:
    counts = np.bincount(learned.labels, minlength=learned.k)
    return [
        Figure("Each cluster after the last epoch, by its size.", plots.size_curve_plot(counts)),
        Figure("The same sizes, counted.", plots.size_histogram_plot(counts)),
    ]


def _accuracies(classified: Plain) -> Grid:
    """Lay out how often step two names the right cluster: by picture, and as the mean over patients."""
    rows = []
    for key, part in (("validation_accuracy", "validation"), ("accuracy", "test")):
        for name, words, cases in ((key, "by image", "images"), (f"{key}_by_patient", "mean of the patients", "patients")):
            one = classified[name]
            interval = f"{_number(one['low'])} to {_number(one['high'])}"
            rows.append((f"{part}, {words}", _number(one["value"]), interval, f"{one['n']:,} {cases}"))
    for key, part in (("validation_chance", "validation"), ("chance", "test")):
        rows.append((f"{part}, always the largest cluster", _number(classified[key]), "", ""))
    return Grid("How often it names the right cluster", ("accuracy", "value", "95 % interval", "rests on"), rows)


def _minutes(lines: Sequence[Plain]) -> str:
    """Tell the time of these epochs."""
    seconds = sum(float(line["seconds"]) for line in lines)
    return f"{seconds / 3600:.1f} hours" if seconds > 2 * 3600 else f"{seconds / 60:.1f} minutes"


def _told(plain: Plain | None) -> str:
    """Tell a figure with its interval; a dash when there is none."""
    return "–" if plain is None else f"{plain['value']:.2f} ({plain['low']:.2f}–{plain['high']:.2f})"


def _counted(count: int, noun: str, more: str = "s") -> str:
    return f"{count:,} {noun}" + more * (count != 1)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
