"""A run with pretraining, from archive to offer: who is learned from, what goes on, what fine-tuning may start from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled import NOW, labelled_site, pid, put, settings_of, texture
from labelled import Heard as Listening
from pretraining import (
    LOCKED_UNLABELLED,
    SAID,
    TINY,
    UNLABELLED,
    is_locked,
    journal,
    make_steady,
    require_same_pretraining,
    site_to_pretrain,
)
from studies import image as radiograph
from torch import Tensor

from models import durable
from models.networks import Network
from models.preprocess import Preprocessing, preprocess
from models.registry import Registry
from node.keep.archive import Archive
from node.keep.cache import Cache
from node.keep.catalogue import Catalogue
from node.keep.records import Run, RunState
from training import checkpoint, cycle, promote, upstream
from training.corpus import CorpusChanged, NotEnough
from training.engine import Engine
from training.folder import Orders, OtherRun, Stopped
from training.pretrain import Collapsed, TooLarge
from training.recipe import Pretraining, Recipe

PRETRAINING = TINY.pretraining
assert PRETRAINING is not None
LOCKED = {pid(patient) for patient in range(24) if is_locked(patient)} | {pid(LOCKED_UNLABELLED)}
LABELLED = {pid(patient) for patient in range(24)} - LOCKED
TRUNCATED, SIXTEEN_BITS = 40, 41


class Heard(Listening):
    """Interrupts a run after an epoch of a fit, or as a stage begins."""

    def __init__(self, after: tuple[str, int] = ("", 0), before: str = "-") -> None:
        super().__init__()
        self._after, self._before = after, before

    def stage(self, what: str, total: int = 0) -> None:
        super().stage(what, total)
        if what.startswith(self._before):
            raise KeyboardInterrupt

    def epoch(self, fit: str, line: Mapping[str, Any]) -> None:
        super().epoch(fit, line)
        if self.epochs[-1] == self._after:
            raise KeyboardInterrupt


def run(
    site: Path,
    recipe: Recipe = TINY,
    *,
    heard: Heard | None = None,
    run_id: str = "",
    stop: Callable[[], bool] = lambda: False,
    **orders: Any,
) -> cycle.Outcome:
    told = heard or Heard()
    return cycle.run(settings_of(site), recipe, now=lambda: NOW, progress=told, orders=Orders(**orders), run_id=run_id, stop=stop)


def interrupted(site: Path, recipe: Recipe = TINY, *, heard: Heard, run_id: str = "", **orders: Any) -> Path:
    """Let a run be interrupted; give its folder."""
    with pytest.raises(KeyboardInterrupt):
        run(site, recipe, heard=heard, run_id=run_id, **orders)
    return settings_of(site).storage.root / "runs" / (run_id or last(site).folder)


def last(site: Path) -> Run:
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        found = catalogue.runs.last()
    assert found is not None
    return found


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_bytes())


def merge(site: Path, gone: int, kept: int) -> None:
    """Make two patients one, on a machine that does not see the runs."""
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        plan = catalogue.patients.plan(pid(gone), pid(kept))
        catalogue.patients.merge(plan, named_by="", by="someone", reason="HIS merge", now=NOW)


@pytest.fixture(scope="module", autouse=True)
def steady() -> Iterator[None]:
    """Let every pretraining be offered, unless a test wants it otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        make_steady(patch.setattr)
        yield


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = site_to_pretrain(tmp_path_factory.mktemp("pretraining"))
    broken = put(site, TRUNCATED)
    file = Archive(settings_of(site).storage.root / "archive").path(broken)
    data = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(data[: len(data) // 2])
    put(site, SIXTEEN_BITS, array=texture(0, 999) * 16, bits_stored=16)
    return site


@pytest.fixture(scope="module")
def whole(site: Path) -> cycle.Outcome:
    """Give a cycle that nobody stopped, whose pretraining is offered."""
    return run(site)


def registry(site: Path) -> Registry:
    return Registry(settings_of(site).storage.root / "models")


# --- who is learned from ----------------------------------------------------------------------------------------------


def test_everybody_but_the_locked_is_learned_from_labelled_or_not(whole: cycle.Outcome) -> None:
    pool = read(whole.folder, "pretraining-corpus.json")
    expected = LABELLED | {pid(patient) for patient in (*UNLABELLED, SIXTEEN_BITS)}
    assert {one["pid"] for one in pool["images"]} == expected
    dealt = read(whole.folder, "split.json")
    assert sorted(one for side in ("train", "validation", "test") for one in dealt[side]) == sorted(expected)
    for file in (whole.folder / "pretrain").iterdir():
        assert not [one for one in LOCKED if one.encode() in file.read_bytes()], file.name


def test_a_version_names_everybody_it_was_learned_from_and_its_start(site: Path, whole: cycle.Outcome) -> None:
    pool = {one["pid"] for one in read(whole.folder, "pretraining-corpus.json")["images"]}
    assert registry(site).corpus(whole.version) == pool > LABELLED
    card = registry(site).verify(whole.version)
    assert whole.run in card.start.name
    assert card.start.sha256 == read(whole.folder, "start.json")["sha256"]
    assert {"AUC, k-NN, pretrained", "AUC, linear probe, start"} <= {metric.name for metric in card.metrics}
    assert "Offered for fine-tuning" in read(whole.folder, "start.json")["words"]


def test_what_cannot_be_read_is_recorded_by_image_and_is_not_learned_from(site: Path, whole: cycle.Outcome) -> None:
    """Public DeepCluster code takes a truncated file for a picture that is grey at the bottom."""
    left_out = read(whole.folder, "pretraining-corpus.json")["left_out"]
    assert sum(count for reason, count in left_out.items() if "corrupt" in reason or "unreadable" in reason) == 1
    cache = Cache(settings_of(site).storage.root / "cache", Preprocessing(32))
    known = cache.get(str(radiograph(patient=TRUNCATED).SOPInstanceUID))
    assert known is not None
    assert known.problem


def test_sixteen_bits_of_grey_are_not_cut_off(site: Path, whole: cycle.Outcome) -> None:
    """Public DeepCluster code reads them as eight, and all but the darkest are white."""
    cache = Cache(settings_of(site).storage.root / "cache", Preprocessing(32))
    (row,) = cache.pixels([str(radiograph(patient=SIXTEEN_BITS).SOPInstanceUID)])
    twelve = preprocess(radiograph(patient=SIXTEEN_BITS, array=texture(0, 999)), Preprocessing(32))[0] * 255
    assert np.abs(row - twelve).max() <= 1.5
    assert (row == 255).mean() < 0.1


def test_more_clusters_than_a_quarter_of_the_images_are_refused_with_what_to_do(site: Path) -> None:
    wanting = replace(TINY, pretraining=replace(PRETRAINING, clusters=40))
    with pytest.raises(NotEnough, match=r"40 clusters need 160 images .* locked; there are 30 .*ewing_small"):
        run(site, wanting, kind="pretrain")
    assert last(site).state is RunState.FAILED


# --- stopped, killed, extended ----------------------------------------------------------------------------------------


def test_a_pretraining_told_to_stop_ends_at_the_epochs_end_and_goes_on_to_the_same_bits(site: Path, whole: cycle.Outcome) -> None:
    heard = Heard()
    with pytest.raises(Stopped):
        run(site, heard=heard, stop=lambda: bool(heard.epochs), kind="pretrain")
    assert heard.epochs == [("pretraining", 1)]
    stopped = last(site)
    folder = whole.folder.with_name(stopped.folder)
    assert (stopped.state, stopped.kind) == (RunState.INTERRUPTED, "pretrain")
    assert checkpoint.load(folder / "pretrain" / "state.pt")["epoch"] == 1
    again = Heard(after=("classifier of clusters", 1))
    assert interrupted(site, heard=again, run_id=stopped.folder) == folder
    assert again.epochs == [("pretraining", 2), ("pretraining", 3), ("classifier of clusters", 1)]
    ending = Heard()
    outcome = run(site, heard=ending, run_id=stopped.folder)
    assert ending.epochs == [("classifier of clusters", 2)]
    assert (outcome.decision, outcome.version) == ("offered", "")
    require_same_pretraining(outcome.folder / "pretrain", whole.folder / "pretrain")
    assert run(site, heard=ending, run_id=stopped.folder) == outcome  # and nothing is done again
    assert ending.epochs == [("classifier of clusters", 2)]


def test_deepcluster2_goes_the_whole_way_and_stopped_in_either_step_to_the_same_bits(site: Path) -> None:
    banked = replace(PRETRAINING, method="deepcluster2", views=replace(PRETRAINING.views, small=1, small_px=16))
    recipe = replace(TINY, pretraining=banked)
    undisturbed = run(site, recipe)
    learned = undisturbed.folder / "pretrain"
    state = checkpoint.load(learned / "state.pt")
    assert (state["epoch"], state["bank"].shape) == (3, (30, 8))
    assert [line["epoch"] for line in journal(learned / "metrics.jsonl")] == [1, 2, 3]
    assert [line["epoch"] for line in journal(learned / "classifier.jsonl")] == [1, 2]
    with np.load(learned / "clusters.npz") as found:
        assert (found["centroids"].shape, found["labels"].shape, int(found["epoch"])) == ((4, 8), (30,), 3)
    told = read(learned, "probe.json")
    figures = {f"AUC, {probe}, {of}" for probe in ("k-NN", "linear probe") for of in ("start", "DeepCluster", "pretrained")}
    assert figures <= {metric["name"] for metric in told["metrics"]}
    assert read(undisturbed.folder, "start.json")["sha256"] == told["sha256"] != ""
    assert undisturbed.run in registry(site).verify(undisturbed.version).start.name
    assert "DeepCluster-v2, 4 clusters, 3 epochs" in (undisturbed.folder / "report.html").read_text()

    folder = interrupted(site, recipe, heard=Heard(after=("pretraining", 1)), kind="pretrain")
    again, ending = Heard(after=("classifier of clusters", 1)), Heard()
    interrupted(site, recipe, heard=again, run_id=folder.name)
    assert again.epochs == [("pretraining", 2), ("pretraining", 3), ("classifier of clusters", 1)]
    ended = run(site, recipe, heard=ending, run_id=folder.name)
    assert ending.epochs == [("classifier of clusters", 2)]
    assert ended.decision == "offered"
    require_same_pretraining(folder / "pretrain", learned)


def test_an_epoch_is_done_again_to_the_same_bits_when_its_state_was_not_written(
    site: Path, whole: cycle.Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States are written now and then; lines of epochs that are done again stand in the journal once."""
    monkeypatch.setattr(upstream, "KEEP_S", -1.0)
    folder = interrupted(site, heard=Heard(after=("pretraining", 1)), kind="pretrain")
    kept = (folder / "pretrain" / "state.pt").read_bytes()
    interrupted(site, heard=Heard(after=("pretraining", 2)), run_id=folder.name)
    (folder / "pretrain" / "state.pt").write_bytes(kept)  # as a kill leaves it
    with (folder / "pretrain" / "metrics.jsonl").open("a") as torn:
        torn.write('{"epoch": 3, "lo')
    heard = Heard()
    ended = run(site, heard=heard, run_id=folder.name)
    assert heard.epochs[0] == ("pretraining", 2)
    require_same_pretraining(ended.folder / "pretrain", whole.folder / "pretrain")


def test_an_extended_pretraining_is_the_one_of_so_many_epochs(site: Path, whole: cycle.Outcome) -> None:
    short = run(site, kind="pretrain", epochs=1)
    before = {file.name: file.read_bytes() for file in (short.folder / "pretrain").iterdir()}
    heard = Heard()
    longer = run(site, heard=heard, kind="pretrain", extends=short.run, epochs=3)
    assert [epoch for fit, epoch in heard.epochs if fit == "pretraining"] == [2, 3]
    require_same_pretraining(longer.folder / "pretrain", whole.folder / "pretrain")
    assert {file.name: file.read_bytes() for file in (short.folder / "pretrain").iterdir()} == before
    with pytest.raises(OtherRun, match="another recipe"):
        run(site, replace(TINY, seed=1), kind="pretrain", extends=short.run, epochs=3)


def test_a_run_that_goes_on_computes_as_was_chosen_when_it_began(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another format would be the quicker one now; and one that goes on in bfloat16 ends in the bits of one never stopped."""

    def quickest(engine: Engine) -> None:
        monkeypatch.setattr(upstream, "chosen", lambda *_args, **_options: engine)

    quickest(Engine(format="bfloat16", channels_last=False))
    never_stopped = run(site, kind="pretrain", epochs=2)
    folder = interrupted(site, heard=Heard(after=("pretraining", 1)), kind="pretrain", epochs=2)
    quickest(Engine())
    ended = run(site, run_id=folder.name)
    assert read(folder, "engine.json") == {"device": "cpu", "format": "bfloat16", "channels_last": False}
    require_same_pretraining(ended.folder / "pretrain", never_stopped.folder / "pretrain")
    other = run(site, kind="pretrain", epochs=2)
    mine, theirs = (checkpoint.load(one.folder / "pretrain" / "backbone.pt") for one in (ended, other))
    assert any(not torch.equal(mine[name], theirs[name]) for name in mine), "the format makes no difference here"


def test_a_state_is_whole_whatever_ends_its_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = upstream._Keeper(tmp_path / "state.pt", tmp_path / "metrics.jsonl")
    network = torch.nn.Linear(2, 2)
    keeper.keep({"epoch": 1, "network": network.state_dict(), "lines": []})
    keeper.write()

    def torn(file: Any, data: bytes) -> None:
        file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(durable, "_write_all", torn)
        keeper.keep({"epoch": 2, "network": network.state_dict(), "lines": []})
        with pytest.raises(KeyboardInterrupt):
            keeper.write()
    assert checkpoint.load(tmp_path / "state.pt")["epoch"] == 1
    assert (tmp_path / "state.pt").stat().st_mode & 0o777 == 0o600
    then = network.weight.detach().clone()
    keeper.keep({"epoch": 3, "network": network.state_dict(), "lines": []})
    with torch.no_grad():
        network.weight.add_(1)  # the next epoch goes on in the same tensors
    keeper.write()
    kept = checkpoint.load(tmp_path / "state.pt")
    assert kept["epoch"] == 3
    assert torch.equal(kept["network"]["weight"], then)


def test_a_pretraining_that_fails_leaves_its_reason_and_its_last_good_state(site: Path) -> None:
    restless = replace(TINY, pretraining=replace(PRETRAINING, epochs=6, nmi_min=1.1))
    with pytest.raises(Collapsed, match="NMI"):
        run(site, restless, kind="pretrain")
    failed = last(site)
    assert failed.state is RunState.FAILED
    assert "the assignments of epochs 4 and 5 agree by" in failed.reason
    folder = settings_of(site).storage.root / "runs" / failed.folder / "pretrain"
    assert checkpoint.load(folder / "state.pt")["epoch"] == 4
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


# --- too little memory ------------------------------------------------------------------------------------------------


def remembering(patch: pytest.MonkeyPatch, memory: int) -> list[int]:
    """Let a training batch of more than so many pictures be too large for the memory; give the sizes that were tried."""
    tried: list[int] = []
    really = upstream.build

    def built(*args: Any, **options: Any) -> Network:
        network = really(*args, **options)

        def allocate(module: torch.nn.Module, images: tuple[Tensor, ...]) -> None:
            if module.training:
                tried.append(len(images[0]))
                if len(images[0]) > memory:
                    raise MemoryError

        network.register_forward_pre_hook(allocate)
        return network

    patch.setattr(upstream, "build", built)
    return tried


def test_a_batch_too_large_for_the_memory_is_halved_said_and_obeyed_when_the_run_goes_on(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard(after=("pretraining", 1))
    with monkeypatch.context() as patch:
        tried = remembering(patch, 4)
        folder = interrupted(site, heard=heard, kind="pretrain", epochs=2)
    assert max(tried[1:]) <= 4 < tried[0]
    assert "pretraining, batch halved to 4: the memory is too small" in heard.stages
    told = read(folder / "pretrain", "batch-state.json")
    assert told["batch"] == 4
    assert "did not fit into the memory" in told["because"]
    with monkeypatch.context() as patch:
        tried = remembering(patch, 64)  # another machine has more
        run(site, heard=Heard(), run_id=folder.name)
    of_epoch = -(-30 // 4)
    assert max(tried[:of_epoch]) <= 4
    assert max(tried[of_epoch:]) > 4  # the classifier's batch was no problem


def test_a_memory_too_small_for_any_batch_ends_the_run_and_not_in_a_loop(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = remembering(monkeypatch, 1)
    with pytest.raises(TooLarge):
        run(site, kind="pretrain", epochs=1)
    assert len(tried) == 3  # 8, 4, 2
    assert last(site).state is RunState.INTERRUPTED


# --- what fine-tuning starts from -------------------------------------------------------------------------------------


def test_fine_tuning_takes_the_newest_pretraining_that_is_offered_and_stays_with_it(
    site: Path, whole: cycle.Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = run(site, kind="pretrain", epochs=1)
    with monkeypatch.context() as patch:
        patch.setitem(SAID, "apart", -0.1)
        assert run(site, kind="pretrain", epochs=1).decision == "not offered"
    folder = interrupted(site, heard=Heard(after=("fold 0", 1)), kind="finetune")
    start = read(folder, "start.json")
    assert start == {
        "run": offered.run,
        "sha256": read(offered.folder, "pretrain/probe.json")["sha256"],
        "words": offered.words,
    }
    assert not (folder / "pretrain").exists()
    newer = run(site, kind="pretrain", epochs=1)
    interrupted(site, heard=Heard(after=("fold 1", 1)), run_id=folder.name)
    assert read(folder, "start.json") == start
    other = interrupted(site, heard=Heard(after=("fold 0", 1)), kind="finetune")
    assert read(other, "start.json")["run"] == newer.run
    (newer.folder / "pretrain" / "backbone.pt").unlink()  # a damaged one is not taken
    again = interrupted(site, heard=Heard(after=("fold 0", 1)), kind="finetune")
    assert read(again, "start.json")["run"] == offered.run


def test_fine_tuning_takes_none_when_none_is_offered_and_says_so(site: Path, whole: cycle.Outcome) -> None:
    """What was learned with other values is none for this recipe."""
    other = replace(TINY, pretraining=replace(PRETRAINING, dims=7))
    folder = interrupted(site, other, heard=Heard(after=("fold 0", 1)), kind="finetune")
    start = read(folder, "start.json")
    assert (start["run"], start["sha256"]) == ("", "")
    assert "No other run offers a pretraining" in start["words"]
    interrupted(site, other, heard=Heard(after=("fold 1", 1)), run_id=folder.name)
    assert read(folder, "start.json") == start


def test_a_pretraining_below_its_start_weights_is_not_offered(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes are really asked; what was learned is lost on its way to the file."""
    saved = checkpoint.save

    def forgetful(state: Mapping[str, Any], file: Path) -> None:
        lost = {name: torch.zeros_like(value) for name, value in state.items()} if file.name == "backbone.pt" else state
        saved(lost, file)

    monkeypatch.setattr(checkpoint, "save", forgetful)
    monkeypatch.setitem(SAID, "apart", None)
    ended = run(site, kind="pretrain", epochs=1)
    assert ended.decision == "not offered"
    assert "below the start weights" in ended.words
    told = read(ended.folder, "pretrain/probe.json")
    assert told["offered"] is False
    values = {metric["name"]: metric["value"] for metric in told["metrics"]}
    assert values["AUC, linear probe, pretrained"] == pytest.approx(0.5, abs=0.2)
    assert values["AUC, linear probe, start"] > values["AUC, linear probe, pretrained"]


def test_a_pretraining_that_nothing_can_probe_is_not_offered(tmp_path: Path) -> None:
    bare = labelled_site(tmp_path, patients=2)
    for patient in range(50, 70):
        put(bare, patient, kind=patient % 2)
    ended = run(bare, kind="pretrain", epochs=1)
    assert ended.decision == "not offered"
    assert "too few labelled patients" in ended.words


def test_the_start_that_probes_compare_with_is_the_one_it_started_from(site: Path, whole: cycle.Outcome) -> None:
    """Drawn anew it would say something else each time, and of another network."""
    copy = whole.folder.with_name("probed-again")
    copy.mkdir()
    for name in ("run.json", "corpus.json", "pretraining-corpus.json", "split.json", "engine.json"):
        (copy / name).write_bytes((whole.folder / name).read_bytes())
    (copy / "pretrain").mkdir()
    for file in (whole.folder / "pretrain").iterdir():
        if file.name != "probe.json":
            (copy / "pretrain" / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(5)
    interrupted(site, heard=Heard(after=("fold 0", 1)), run_id=copy.name)
    assert read(copy, "pretrain/probe.json") == read(whole.folder, "pretrain/probe.json")


def test_what_a_person_starts_from_an_unoffered_pretraining_no_gate_promotes(
    site: Path, whole: cycle.Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(SAID, "apart", -0.1)
        refused = run(site, kind="pretrain", epochs=1)
    monkeypatch.setattr(promote, "decide", lambda *_: promote.Decision(promote.Verdict.PROMOTE, "It is better."))
    before = registry(site).champion()
    ended = run(site, kind="finetune", start_from=refused.run)
    assert ended.decision == "insufficient evidence"
    assert "a person decides" in ended.words
    assert registry(site).champion() == before
    assert refused.run in registry(site).verify(ended.version).start.name
    assert registry(site).corpus(ended.version) == registry(site).corpus(whole.version)
    with pytest.raises(Exception, match="resnet34"):
        run(site, replace(TINY, network="resnet34"), kind="finetune", start_from=refused.run)


# --- a sweep ----------------------------------------------------------------------------------------------------------


def test_a_sweep_lays_the_numbers_of_clusters_side_by_side_and_offers_nothing(site: Path) -> None:
    heard = Heard(after=("classifier of clusters", 1))
    folder = interrupted(site, heard=heard, kind="sweep", clusters=(3, 5), epochs=1)
    ended = run(site, run_id=folder.name)
    rows = read(folder, "sweep.json")["rows"]
    assert [row["k"] for row in rows] == [3, 5]
    assert ended.decision == "swept"
    assert ended.version == ""
    best = max(rows, key=lambda row: row["accuracy"]["value"] - row["chance"])
    assert f"by the study's rule: {best['k']}" in ended.words
    for row in rows:
        assert row["over_chance"] == pytest.approx(row["accuracy"]["value"] - row["chance"])
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
        assert row["accuracy"]["n"] >= row["accuracy_by_patient"]["n"] >= 1
        with np.load(folder / f"k-{row['k']}" / "clusters.npz") as found:
            assert found["centroids"].shape[0] == row["k"]
            labels = found["labels"]
        assert len(labels) == 30
        split, images = read(folder, "split.json"), read(folder, "pretraining-corpus.json")["images"]
        train, test = ([at for at, one in enumerate(images) if one["pid"] in split[part]] for part in ("train", "test"))
        assert row["chance"] == pytest.approx((labels[test] == np.bincount(labels[train]).argmax()).mean())
    assert not (folder / "pretrain").exists()


def test_a_sweep_asks_for_the_images_of_its_own_numbers_before_it_learns_anything(site: Path) -> None:
    too_many = replace(TINY, pretraining=replace(TINY.pretraining or Pretraining(), clusters=1000))
    assert run(site, too_many, kind="sweep", clusters=(3,), epochs=1).decision == "swept"
    with pytest.raises(NotEnough, match=r"12 clusters need 48 images.* Take smaller numbers"):
        run(site, kind="sweep", clusters=(3, 12), epochs=1)
    assert not list((settings_of(site).storage.root / "runs" / last(site).folder).glob("k-*"))


# --- locked later -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked_later(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give a site whose patient 4 was merged with a locked one after three pretrainings had begun: done, in it, before it."""
    site = labelled_site(tmp_path_factory.mktemp("locked"), patients=24, is_locked=lambda patient: patient == 1)
    done = run(site, kind="pretrain", epochs=1)
    begun = interrupted(site, heard=Heard(after=("pretraining", 1)), kind="pretrain")
    listed = interrupted(site, heard=Heard(before="pretraining (deepcluster, 4 clusters)"), kind="pretrain")
    assert pid(4) in json.dumps(read(listed, "split.json"))
    merge(site, 4, 1)
    return {"site": site, "done": done.folder, "begun": begun, "listed": listed}


def test_a_pretraining_does_not_go_on_with_a_patient_who_is_locked_now(locked_later: dict[str, Path]) -> None:
    site = locked_later["site"]
    with pytest.raises(CorpusChanged, match="in the locked set now"):
        run(site, run_id=locked_later["begun"].name)
    with pytest.raises(CorpusChanged, match="in the locked set now"):
        run(site, kind="pretrain", extends=locked_later["done"].name, epochs=2)


def test_nothing_starts_from_a_pretraining_on_a_patient_who_is_locked_now(locked_later: dict[str, Path]) -> None:
    site, done = locked_later["site"], locked_later["done"]
    with pytest.raises(CorpusChanged, match="in the locked set now"):
        run(site, kind="finetune", start_from=done.name)
    folder = interrupted(site, heard=Heard(after=("fold 0", 1)), kind="finetune")
    assert read(done, "pretrain/probe.json")["offered"]
    assert read(folder, "start.json")["run"] == ""


def test_who_is_locked_before_anything_was_learned_leaves_every_list(locked_later: dict[str, Path]) -> None:
    site, listed = locked_later["site"], locked_later["listed"]
    interrupted(site, heard=Heard(after=("pretraining", 1)), run_id=listed.name)
    pool, dealt = read(listed, "pretraining-corpus.json"), read(listed, "split.json")
    assert pid(4) not in json.dumps([pool, dealt])
    assert {one["pid"] for one in pool["images"]} == {one for side in dealt.values() for one in side}
