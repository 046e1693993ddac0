"""The page of a run of each kind: it has what the run left, and nobody on it who is set aside."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from labelled import NOW, SMALLEST, Heard, labelled_site, pid, settings_of
from numpy.typing import NDArray

from node.keep.cache import Cache
from node.keep.catalogue import Catalogue
from node.keep.records import RunState
from training import cycle, pages
from training.corpus import Corpus
from training.folder import Kind, Orders, RunFolder
from training.ranks import Ranks
from training.recipe import Classifier, Pretraining
from training.report import Report

PATIENTS = 18
IS_LOCKED = frozenset({0, 3, 8, 11})
HOW = Pretraining(
    clusters=3,
    epochs=2,
    batch=8,
    lr=0.02,
    dims=8,
    nmi_min=0,
    largest_max=1,
    alike_max=1,
    classifier=Classifier(2, 8, 0.02),
    probe_every=1,
)
RECIPE = replace(SMALLEST, network="resnet18", start="random", frozen=0, pretraining=HOW)
PLACE = "pretrain"


def run(site: Path, kind: Kind, *, clusters: Sequence[int] = (), run_id: str = "") -> cycle.Outcome:
    orders = Orders(kind=kind, clusters=tuple(clusters))
    return cycle.run(settings_of(site), RECIPE, now=lambda: NOW, progress=Heard(), orders=orders, run_id=run_id)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_site(tmp_path_factory.mktemp("report"), patients=PATIENTS, is_locked=lambda patient: patient in IS_LOCKED)


@pytest.fixture(scope="module")
def whole(site: Path) -> cycle.Outcome:
    return run(site, "cycle")


@pytest.fixture(scope="module")
def pretrained(site: Path) -> cycle.Outcome:
    return run(site, "pretrain")


@pytest.fixture(scope="module")
def swept(site: Path) -> cycle.Outcome:
    return run(site, "sweep", clusters=(2, 3))


@dataclass
class Copied:
    """The folder of a finished run to write another page from."""

    desk: RunFolder
    report: Report

    @property
    def page(self) -> str:
        return (self.desk.path / "report.html").read_text()

    def change(self, name: str, **values: object) -> None:
        (self.desk.path / name).write_text(json.dumps(self.desk.read(name) | values))

    def draw(self) -> str:
        """Write the page of this folder anew."""
        (self.desk.path / "report.html").unlink(missing_ok=True)
        if (self.desk.path / "decision.json").is_file():
            figures = self.desk.read("evaluation.json")
            self.report.of_cycle(figures, cycle._tables(figures), self.desk.read("decision.json"))
        else:
            draw = self.report.of_sweep if (self.desk.path / "sweep.json").is_file() else self.report.of_pretraining
            draw(self.desk.read("outcome.json"))
        return self.page


@contextmanager
def copied(site: Path, outcome: cycle.Outcome, name: str, orders: Orders | None = None) -> Iterator[Copied]:
    settings = settings_of(site)
    with Catalogue.open(settings.storage.catalogue) as catalogue:
        desk = RunFolder(settings, RECIPE, catalogue, lambda: NOW, Heard(), lambda: False, orders or Orders(), Ranks())
        desk.progress = Heard()  # no row of the catalogue is the copy's
        desk.path = shutil.copytree(outcome.folder, outcome.folder.with_name(name))
        desk.bound = desk.read("run.json")
        (cache,) = Cache.all(settings.storage.root / "cache")
        yield Copied(desk, Report(desk, cache, Corpus.from_plain(desk.read("corpus.json"))))


def page_of(outcome: cycle.Outcome) -> str:
    return (outcome.folder / "report.html").read_text()


def anchors(page: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)">', page)


def charts(page: str) -> list[str]:
    return re.findall(r'class="plot"[^>]*aria-label="([^"]+)"', page)


def sheets(page: str) -> list[str]:
    return re.findall(r'<img alt="([^"]+)" src="data:image/png', page)


LEARNED = ["pretraining", "classifier", "clusters", "map"]


def test_the_page_of_a_run_has_everything_from_the_gates_words_to_the_map(whole: cycle.Outcome) -> None:
    page = page_of(whole)
    assert anchors(page) == ["figures", "groups", "finetuning", "probes", *LEARNED, "limits", "made"]
    drawn = " | ".join(charts(page))
    for title in (
        "AUC out of fold against trivial baselines",
        "Confusion, out of fold, 14 studies",
        "ROC with 95 % band",
        "Calibration, out of fold, 14 studies",
        "Loss of fine-tuning, 3 folds and the final fit",
        "Probes of the features, 14 patients",
        "Loss of pretraining",
        "Agreement of consecutive assignments",
        "Empty and relocated clusters",
        "Sizes of the clusters by epoch",
        "Loss of step two",
        "Accuracy of step two, 3 clusters",
        "Sizes of 3 clusters of 20 images",
        "How many clusters have how many images, k = 3",
    ):
        assert title in drawn
    of_clusters, of_neighbours, of_map = sheets(page)
    assert of_clusters.startswith("Clusters: the largest; of each"), (
        "of three clusters none is left to be the smallest or the oddest"
    )
    assert "the nearest ones of other patients" in of_neighbours
    assert of_map.startswith("20 of 20 pictures, 20 of them labelled.")
    one_sex = r'<td>sex F</td><td class="number">7</td><td class="number">0</td><td>–</td><td>\d\.\d\d \(\d\.\d\d–\d\.\d\d\)</td>'
    assert re.search(one_sex, page), "it has one class only, and no AUC"
    assert whole.decision == "insufficient evidence"
    assert pages._prose(whole.words) in page
    assert stat.S_IMODE((whole.folder / "report.html").stat().st_mode) == 0o600


@pytest.mark.parametrize("offered", [True, False])
def test_the_page_says_whether_the_pretraining_was_offered_and_why_not(site: Path, whole: cycle.Outcome, offered: bool) -> None:
    with copied(site, whole, f"offered-{offered}") as copy:
        words = "Offered for fine-tuning: no probe." if offered else "Not offered: below the start weights."
        copy.change("pretrain/probe.json", offered=offered, words=words)
        copy.change("start.json", run=copy.desk.path.name if offered else "")
        page = copy.draw()
        said = (
            "What this run pretrained." if offered else "The random weights: this run pretrained, and the result is not offered."
        )
        assert said in page
        assert words in page
        assert f"<b>{'offered' if offered else 'not offered'}</b>" in page
        start = copy.desk.read("pretrain/probe.json")["metrics"][0]
        assert start["name"] == "AUC, k-NN, start"
        assert f"<b>{start['value']:.3f}</b>" in page


def test_fine_tuning_from_the_pretraining_of_another_run_names_it(site: Path, whole: cycle.Outcome) -> None:
    with copied(site, whole, "another", Orders(kind="finetune")) as copy:
        shutil.rmtree(copy.desk.path / PLACE)
        copy.change("start.json", run=whole.run)
        page = copy.draw()
        assert f"The pretraining of run {whole.run}: the newest one that is offered." in page
        assert f"<code>osteon train report {whole.run}</code>" in page
        assert "AUC, k-NN, start" in page
        assert not set(LEARNED) & set(anchors(page))
        copy.change("start.json", run="")
        assert "The random weights: no run offers a pretraining of this recipe." in copy.draw()
        copy.desk.orders = Orders(start_from=whole.run)
        assert "named by a person, whatever its probes said" in copy.draw()
        copy.desk.orders, copy.desk.recipe = Orders(), replace(RECIPE, pretraining=None)
        assert "The random weights: the recipe has no pretraining." in copy.draw()


def test_a_run_that_only_pretrains_has_a_page_too(pretrained: cycle.Outcome) -> None:
    page = page_of(pretrained)
    assert anchors(page) == ["probes", *LEARNED, "limits", "made"]
    assert f'<p class="decision">{pretrained.decision}</p>' in page
    assert pages._prose(pretrained.words) in page
    assert f"<code>osteon train extend {pretrained.run} --epochs N</code>" in page
    assert len(sheets(page)) == 3
    assert "AUC of the k-NN, pretrained minus start" in page
    lines = [json.loads(line) for line in (pretrained.folder / PLACE / "metrics.jsonl").read_text().splitlines()]
    assert f"NMI {lines[-1]['nmi']:.3f}" in page


def test_a_run_is_done_only_when_its_page_is_there(
    site: Path, pretrained: cycle.Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_page: pages.Page) -> str:
        raise KeyboardInterrupt

    folder = shutil.copytree(pretrained.folder, pretrained.folder.with_name("killed"))
    for name in ("report.html", "outcome.json"):
        (folder / name).unlink()
    with monkeypatch.context() as until_then:
        until_then.setattr(pages, "render", killed)
        with pytest.raises(KeyboardInterrupt):
            run(site, "pretrain", run_id=folder.name)
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        (row,) = (row for row in catalogue.runs.list() if row.state is RunState.INTERRUPTED)
    assert not (folder / "outcome.json").exists()
    assert page_of(run(site, "pretrain", run_id=folder.name)) == page_of(pretrained).replace(pretrained.run, folder.name)
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        assert catalogue.runs.get(row.id).state is RunState.DONE


def test_without_labels_a_pretraining_is_left_to_a_person(site: Path, pretrained: cycle.Outcome) -> None:
    with copied(site, pretrained, "unprobed") as copy:
        words = "Not offered: too few labelled patients outside the locked set to probe it."
        copy.change("pretrain/probe.json", offered=False, metrics=[], words=words)
        lines = [json.loads(line) for line in (copy.desk.path / PLACE / "metrics.jsonl").read_text().splitlines()]
        bare = [{key: value for key, value in line.items() if key not in ("knn", "linear")} for line in lines]
        (copy.desk.path / PLACE / "metrics.jsonl").write_text(
            "".join(f"{json.dumps(line)}\n" for line in bare) + '{"epoch": 3, "l'
        )
        copy.change("outcome.json", decision="not offered", words=words)
        page = copy.draw()
        assert 'class="verdict open"' in page
        assert words in page
        assert not [title for title in charts(page) if title.startswith("Probes")]


def test_a_sweep_lays_the_numbers_of_clusters_side_by_side_and_rings_the_one_of_the_rule(swept: cycle.Outcome) -> None:
    page, found = page_of(swept), json.loads((swept.folder / "sweep.json").read_bytes())
    chosen = found["by_study_rule"]
    (other,) = {2, 3} - {chosen}
    of_chosen = [f"{anchor}-{chosen}" for anchor in ("probes", *LEARNED)]
    assert anchors(page) == ["sweep", *of_chosen, f"k-{other}", "limits", "made"]
    best = next(row for row in found["rows"] if row["k"] == chosen)
    assert best["over_chance"] == max(row["over_chance"] for row in found["rows"])
    assert f"k = {chosen}: {best['over_chance']:.2f} over chance".replace("-", "−") in page
    assert f"{chosen} clusters by the study&#x27;s rule" in page
    assert [title for title in charts(page) if " over k, " in title] == [
        f"Step two over k, {best['accuracy']['n']} test images",
        "Probes over k, 14 patients",
    ]
    for row in found["rows"]:
        assert f'<td class="number">{row["k"]}</td>' in page
        assert f"{row['accuracy']['low']:.3f} to {row['accuracy']['high']:.3f}" in page


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Collect the images whose pictures are read."""
    seen: set[str] = set()
    read = Cache.pixels

    def pixels(self: Cache, sop_uids: Sequence[str]) -> NDArray[np.uint8]:
        seen.update(sop_uids)
        return read(self, sop_uids)

    monkeypatch.setattr(Cache, "pixels", pixels)
    return seen


def test_no_picture_of_a_locked_patient_is_on_a_sheet_whatever_was_frozen(
    site: Path, pretrained: cycle.Outcome, tmp_path: Path, looked_at: set[str]
) -> None:
    """One who was learned from is locked afterwards, another one's image is gone from the site."""
    shutil.copytree(site.parent, tmp_path / "site", ignore=shutil.ignore_patterns("*.pt", "*.onnx"))
    later = tmp_path / "site" / site.name
    root = settings_of(later).storage.root
    pool = json.loads((root / "runs" / pretrained.run / "pretraining-corpus.json").read_bytes())["images"]
    assert {one["pid"] for one in pool} == {pid(patient) for patient in range(PATIENTS)} - {pid(one) for one in IS_LOCKED}
    (cache,) = Cache.all(root / "cache")
    blanked = next(one["sop_uid"] for one in pool if one["pid"] == pid(5))
    cache.blank([blanked])
    with copied(later, replace(pretrained, folder=root / "runs" / pretrained.run), "later") as copy:
        patients = copy.desk.catalogue.patients
        patients.merge(patients.plan(pid(2), pid(3)), named_by="", by="someone", reason="HIS merge", now=NOW)
        looked_at.clear()
        page = copy.draw()
    shown = {one["sop_uid"] for one in pool if one["pid"] != pid(2)} - {blanked}
    assert looked_at <= shown
    assert len(shown) < len(pool) - 1
    assert f"{len(shown)} of {len(shown)} pictures" in page
