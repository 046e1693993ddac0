"""One run from archive to shelf: what it leaves, what a kill costs, who may be promoted."""

from __future__ import annotations

import errno
import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from labelled import NOW, Heard, labelled_site, pid, settings_of
from labelled import SMALLEST as RECIPE
from roles import until
from typer.testing import CliRunner

from models import durable
from models.errors import Final
from models.networks import build
from models.registry import Registry
from node.errors import NoSpace, NotFound, Occupied, WrongState
from node.keep import frozen
from node.keep.cache import Cache
from node.keep.catalogue import Catalogue
from node.keep.records import Purpose, RunState
from node.reply import completion
from training import checkpoint, corpus, cycle, evaluate, finetune, machine, promote, upstream
from training.augment import plain
from training.corpus import CorpusChanged, NotEnough
from training.engine import Engine
from training.folder import Busy, OtherRun, Stopped, _alone
from training.recipe import Recipe
from training.verbs import app

FINETUNE = ("--orders", '{"kind": "finetune"}')
"""A dozen patients are too few for clusters."""
IS_LOCKED = frozenset(range(0, 24, 3))


def run(site: Path, recipe: Recipe = RECIPE, *, heard: Heard | None = None, run_id: str = "") -> cycle.Outcome:
    return cycle.run(settings_of(site), recipe, now=lambda: NOW, progress=heard or Heard(), run_id=run_id)


@pytest.fixture(scope="module", autouse=True)
def float32() -> Iterator[None]:
    """Let every run compute in one format: runs are held against each other, and the quicker one may change between two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "chosen", lambda *_args, **_options: Engine())
        yield


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_site(tmp_path_factory.mktemp("training"), patients=24, is_locked=lambda patient: patient in IS_LOCKED)


@pytest.fixture(scope="module")
def first(site: Path) -> cycle.Outcome:
    return run(site)


def test_what_the_node_removed_is_blanked_in_the_cache_of_a_host_that_only_trains(tmp_path: Path) -> None:
    site = labelled_site(tmp_path, patients=2)
    with pytest.raises(NotEnough):
        run(site)
    root = settings_of(site).storage.root
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        first, *others = catalogue.instances.for_training()
        completion.advance(catalogue, settings_of(site).completion, now=NOW + timedelta(days=1))
        (uid, *_) = catalogue.studies.take_for_removal({Purpose.LEARN: timedelta(0)}, now=NOW + timedelta(days=2), limit=1)
        gone = {image.sop_uid for image in (first, *others) if image.study_uid == uid}
        catalogue.studies.removed(uid, now=NOW)
    with pytest.raises(NotEnough):
        run(site)
    (cache,) = Cache.all(root / "cache")
    left = {image.sop_uid for image in (first, *others) if cache.get(image.sop_uid)}
    assert gone
    assert left == {image.sop_uid for image in (first, *others)} - gone


@pytest.fixture
def promoting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gate say `promote` whatever it sees."""
    monkeypatch.setattr(promote, "decide", lambda *_: promote.Decision(promote.Verdict.PROMOTE, "It is better."))


def read(outcome: cycle.Outcome, name: str) -> Any:
    return json.loads((outcome.folder / name).read_bytes())


def test_eight_locked_patients_are_too_few_and_nothing_goes_into_service(site: Path, first: cycle.Outcome) -> None:
    registry = Registry(settings_of(site).storage.root / "models")
    assert first.decision == "insufficient evidence"
    assert "4 locked patients in the smaller class" in first.words
    assert first.by_hand == f"osteon models promote {first.version} --reason TEXT"
    assert registry.champion() is None
    card = registry.verify(first.version)
    assert (card.decision, card.locked_looks, card.training_mix) == ("insufficient evidence", 1, (8, 8))
    assert {"AUC, out of fold", "AUC, locked patients"} <= {metric.name for metric in card.metrics}
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        last = catalogue.runs.list()[-1]
    assert (last.folder, last.state, last.model_id) == (first.run, RunState.DONE, first.version)


def test_locked_patients_train_calibrate_and_validate_nothing(site: Path, first: cycle.Outcome) -> None:
    locked = {pid(patient) for patient in IS_LOCKED}
    assert not Registry(settings_of(site).storage.root / "models").corpus(first.version) & locked
    lists = read(first, "corpus.json")
    assert {sample["pid"] for sample in lists["locked"]} == locked
    assert not {sample["pid"] for sample in lists["training"]} & locked
    folds = read(first, "folds.json")["folds"]
    assert not {one for fold in folds for one in (*fold["validation"], *fold["test"])} & locked
    predictions = read(first, "predictions.json")
    assert set(predictions["locked patients"]["patients"]) == locked
    assert not set(predictions["out of fold"]["patients"]) & locked
    assert len(predictions["out of fold"]["studies"]) == 16


def test_temperatures_are_found_on_validation_patients_alone(site: Path, first: cycle.Outcome) -> None:
    """Each fold's is that of its own; the final model's is that of all of them together."""
    samples = corpus.Corpus.from_plain(read(first, "corpus.json")).training
    out_of_fold = np.zeros((len(samples), 2))
    logits, truth = [], []
    for number, fold in enumerate(read(first, "folds.json")["folds"]):
        said = read(first, f"fits/fold-{number}.json")
        logits.append(np.array(said["validation"]))
        truth.append(np.array([sample.target for sample in samples if sample.pid in fold["validation"]]))
        tested = [row for row, sample in enumerate(samples) if sample.pid in fold["test"]]
        out_of_fold[tested] = np.array(said["test"]) / finetune.temperature(logits[-1], truth[-1])
    expected = evaluate.by_study(samples, out_of_fold, RECIPE.urgent).to_plain()
    assert read(first, "predictions.json")["out of fold"] == expected
    card = Registry(settings_of(site).storage.root / "models").card(first.version)
    assert card.temperature == finetune.temperature(np.concatenate(logits), np.concatenate(truth))


def test_the_run_folder_tells_everything_and_is_private(first: cycle.Outcome) -> None:
    files = [file for file in first.folder.rglob("*") if file.is_file()]
    names = {str(file.relative_to(first.folder)) for file in files}
    assert {"metrics.jsonl", "report.html", "decision.json", "evaluation.json", "model.onnx", "reference.npz"} <= names
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    page = (first.folder / "report.html").read_text()
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", page)
    assert "<script" not in page
    for word in ("insufficient evidence", "Research use only", "age and sex", "95 % interval", "Brier"):
        assert word in page
    lines = [json.loads(line) for line in (first.folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["fit"] for line in lines} == {"fold 0", "fold 1", "fold 2", "refit"}


def test_the_file_on_the_shelf_says_what_the_run_wrote_of_the_locked(site: Path, first: cycle.Outcome) -> None:
    registry = Registry(settings_of(site).storage.root / "models")
    session = onnxruntime.InferenceSession(registry.model(first.version), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits", "features"]
    parity = read(first, "parity.json")
    assert parity["images"] > 1
    assert max(parity["logits"], parity["features"]) <= 1e-4


def test_a_killed_run_continues_to_the_same_model_and_the_gate_alone_moves_the_champion(
    site: Path, first: cycle.Outcome, promoting: None
) -> None:
    """The second run is stopped in a fold and in the refit; it ends with the bytes of the run that was never stopped."""
    with pytest.raises(KeyboardInterrupt):
        run(site, heard=Heard(stop_in="fold 1"))
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        row = catalogue.runs.last()
    assert row is not None
    assert row.state is RunState.INTERRUPTED
    second = Heard(stop_in="refit")
    with pytest.raises(KeyboardInterrupt):
        run(site, heard=second, run_id=row.folder)
    assert {fit for fit, _ in second.epochs} == {"fold 1", "fold 2", "refit"}
    with (settings_of(site).storage.root / "runs" / row.folder / "metrics.jsonl").open("a") as torn:
        torn.write('{"fit": "refit", "ep')
    third = Heard()
    ended = run(site, heard=third, run_id=row.folder)
    assert {fit for fit, _ in third.epochs} == {"refit"}
    for name in ("fits/fold-0.json", "fits/fold-1.json", "fits/fold-2.json", "corpus.json", "folds.json", "model.onnx"):
        assert (ended.folder / name).read_bytes() == (first.folder / name).read_bytes(), name
    mine, theirs = (checkpoint.load(one.folder / "fits" / "refit.pt") for one in (first, ended))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    lines = [json.loads(line) for line in (ended.folder / "metrics.jsonl").read_text().splitlines()]
    assert len({(line["fit"], line["epoch"]) for line in lines}) == len(lines)
    registry = Registry(settings_of(site).storage.root / "models")
    move = registry.history()[-1]
    assert (registry.champion(), move.by, move.decision, move.reason) == (ended.version, "gate", "promote", "It is better.")
    registry.promote(first.version, by="a person", reason="a test", decision="", now=NOW, locked=())
    assert run(site, run_id=ended.run).version == ended.version  # a finished run does nothing again
    assert registry.champion() == first.version
    (ended.folder / "outcome.json").unlink()  # killed after the gate had moved the champion
    assert run(site, run_id=ended.run).version == ended.version
    assert registry.champion() == first.version  # what a person decided since then stands


def test_a_candidate_is_compared_with_the_model_in_service_and_the_look_is_counted(site: Path, first: cycle.Outcome) -> None:
    root = settings_of(site).storage.root
    registry = Registry(root / "models")
    registry.promote(first.version, by="a person", reason="a test", decision="", now=NOW, locked=())
    with (root / "models" / "looks.jsonl").open("a") as torn:
        torn.write('{"at": "2026')  # a look that a full disk or a power cut did not let be written down whole was one
    looks = len((root / "models" / "looks.jsonl").read_text().splitlines())
    for name in ("evaluation", "gate", "decision", "outcome"):
        (first.folder / f"{name}.json").unlink()
    again = run(site, run_id=first.run)
    found = read(again, "evaluation.json")
    assert found["looks"] == looks + 1
    assert stat.S_IMODE((root / "models" / "looks.jsonl").stat().st_mode) == 0o600
    assert (found["champion"], found["incomparable"]) == (first.version, "")
    apart = found["against_champion"]
    assert np.allclose([apart["value"], apart["low"], apart["high"]], 0)  # it is the same network
    assert "against the model in service" in again.words
    shown = CliRunner().invoke(app, ["show", first.run, "--config", str(site)])
    assert "insufficient evidence" in shown.stdout
    assert "AUC, locked patients" in shown.stdout
    listed = CliRunner().invoke(app, ["list", "--config", str(site)])
    assert first.run in listed.stdout


def test_a_run_is_continued_by_its_own_recipe_only(site: Path, first: cycle.Outcome) -> None:
    with pytest.raises(OtherRun):
        run(site, replace(RECIPE, lr=1e-5), run_id=first.run)
    for name in ("nothing", "../runs/" + first.run):
        with pytest.raises(NotFound):
            run(site, run_id=name)


def copied(first: cycle.Outcome, name: str) -> Path:
    """Copy a finished run, as it was when its last step was not done yet."""
    folder = first.folder.with_name(name)
    shutil.copytree(first.folder, folder)
    (folder / "outcome.json").unlink()
    return folder


def test_a_run_goes_on_when_the_cache_was_thrown_away(site: Path, first: cycle.Outcome) -> None:
    cache = settings_of(site).storage.root / "cache"
    shutil.rmtree(cache)
    assert run(site, run_id=first.run).version == read(first, "outcome.json")["version"]  # a finished run needs no picture
    assert not list(cache.rglob("pixels.u8"))
    assert run(site, run_id=copied(first, "without-cache").name).version == read(first, "outcome.json")["version"]


def test_a_run_that_goes_on_tells_no_time_left_before_its_first_epoch(site: Path, first: cycle.Outcome) -> None:
    """Its folds are read in no time: reckoned from that, hours would be none."""
    folder = copied(first, "folds-done")
    (folder / "fits" / "refit.pt").unlink()
    with pytest.raises(KeyboardInterrupt):
        run(site, heard=Heard(stop_in="refit"), run_id=folder.name)
    told = json.loads((folder / "progress.json").read_bytes())
    assert (told["stage"], told["done"], told["total"], told.get("left_s")) == ("training", 6, 8, None)


def test_a_damaged_model_in_service_is_no_reason_to_lose_a_run(site: Path, first: cycle.Outcome) -> None:
    registry = Registry(settings_of(site).storage.root / "models")
    registry.promote(first.version, by="a person", reason="a test", decision="", now=NOW, locked=())
    file = registry.folder(first.version) / "model.onnx"
    whole = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(whole[:-1])
    folder = copied(first, "damaged-champion")
    for name in ("evaluation", "gate", "decision"):
        (folder / f"{name}.json").unlink()
    try:
        judged = run(site, run_id=folder.name)
    finally:
        file.write_bytes(whole)
    assert judged.decision == "insufficient evidence"
    found = read(judged, "evaluation.json")
    assert (found["incomparable"], found["against_champion"]) == ("its files are damaged", None)


@pytest.mark.parametrize("name", ["run.json", "corpus.json", "fits/fold-0.json", "fits/refit.pt", "evaluation.json"])
def test_a_damaged_run_folder_is_told_in_clear_words(site: Path, first: cycle.Outcome, name: str) -> None:
    folder = copied(first, f"damaged-{Path(name).stem}")
    (folder / name).chmod(0o600)
    (folder / name).write_bytes(b'{"torn')
    with pytest.raises(Final, match=re.escape(name)):
        run(site, run_id=folder.name)


def test_a_journal_torn_by_a_power_cut_costs_a_line_and_not_the_run(site: Path, first: cycle.Outcome) -> None:
    folder = copied(first, "torn-journal")
    (folder / "report.html").unlink()
    with (folder / "metrics.jsonl").open("a") as journal:
        journal.write('{"fit": "refit", "ep')
    assert run(site, run_id=folder.name).version == read(first, "outcome.json")["version"]
    assert (folder / "report.html").is_file()


def test_a_run_goes_on_with_its_own_versions_only(site: Path, first: cycle.Outcome) -> None:
    folder = copied(first, "other-torch")
    bound = json.loads((folder / "run.json").read_bytes())
    (folder / "run.json").write_text(json.dumps(bound | {"torch": "1.0"}))
    with pytest.raises(OtherRun, match=r"torch 1\.0"):
        run(site, run_id=folder.name)


def test_an_edited_list_of_locked_images_is_refused(site: Path, first: cycle.Outcome) -> None:
    folder = copied(first, "edited")
    lists = json.loads((folder / "corpus.json").read_bytes())
    lists["locked"] = lists["locked"][1:]
    (folder / "corpus.json").write_text(json.dumps(lists))
    with pytest.raises(CorpusChanged):
        run(site, run_id=folder.name)


def test_a_full_disk_is_told_as_such(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable, "write", full)
    with pytest.raises(NoSpace):
        run(site)


def test_too_few_labels_end_in_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    small = labelled_site(tmp_path, patients=4)
    command = [sys.executable, "-m", "training", "--config", str(small), "--recipe", "phantom", *FINETUNE]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert told.returncode == 2
    last = told.stderr.strip().splitlines()[-1]
    assert last.startswith("osteon: recipe phantom needs 5 labelled patients")
    assert "osteon labels import" in last
    with Catalogue.open(settings_of(small).storage.catalogue) as catalogue:
        row = catalogue.runs.last()
    assert row is not None
    assert row.state is RunState.FAILED
    assert row.reason.startswith("recipe phantom needs")


def test_a_run_that_is_told_to_stop_ends_after_the_epoch_and_tells_how_far_it_was(site: Path) -> None:
    heard = Heard()
    with pytest.raises(Stopped):
        cycle.run(settings_of(site), RECIPE, now=lambda: NOW, progress=heard, stop=lambda: bool(heard.epochs))
    assert heard.epochs == [("fold 0", 1)]
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        row = catalogue.runs.last()
    assert row is not None
    assert (row.state, row.devices, row.worker) == (RunState.INTERRUPTED, None, None)
    told = json.loads((settings_of(site).storage.root / "runs" / row.folder / "progress.json").read_bytes())
    assert (told["stage"], told["total"], told["at"]) == ("training", 8, NOW.isoformat())


@pytest.mark.parametrize(
    ("word", "state", "says"),
    [("cancel", RunState.CANCELLED, "cancelled"), ("lose", RunState.INTERRUPTED, "another trainer")],
)
def test_a_trainer_asks_the_catalogue_whether_the_run_is_still_its_own_and_wanted(
    site: Path, monkeypatch: pytest.MonkeyPatch, word: str, state: RunState, says: str
) -> None:
    """No signal reaches it: a person on another machine cancels, or a supervisor took it for dead."""
    monkeypatch.setattr("training.folder.RENEW_S", 0.0)

    class Elsewhere(Heard):
        def epoch(self, fit: str, line: Mapping[str, Any]) -> None:
            super().epoch(fit, line)
            with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
                (busy,) = catalogue.runs.busy()
                if word == "cancel":
                    catalogue.runs.cancel(busy.id, by="dr", reason="not now", now=NOW)
                else:
                    catalogue.runs.lose(busy.id, busy.tries, "nothing was heard of it", now=NOW)

    heard = Elsewhere()
    with pytest.raises(Stopped, match=says):
        run(site, heard=heard)
    assert len(heard.epochs) == 1
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        row = catalogue.runs.last()
    assert row is not None
    assert row.state is state


def test_no_run_begins_on_a_device_set_that_has_one(site: Path) -> None:
    settings = settings_of(site)
    folders = sorted((settings.storage.root / "runs").iterdir())
    with Catalogue.open(settings.storage.catalogue) as catalogue:
        row = catalogue.runs.start(
            kind="finetune",
            recipe="phantom",
            devices=machine.device_set(settings.training.device),
            worker=machine.this_process(),
            now=NOW,
            until=NOW,
        )
        with pytest.raises(Occupied, match=f"run {row.id}"):
            run(site)
        assert sorted((settings.storage.root / "runs").iterdir()) == folders
        catalogue.runs.fail(row.id, row.tries, "a test", now=NOW)


def test_a_leased_run_is_worked_on_by_the_trainer_it_was_leased_for(site: Path, first: cycle.Outcome) -> None:
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        asked = catalogue.runs.ask(kind="finetune", recipe="phantom", schedule="s", by="me", reason="", now=NOW)
        leased = catalogue.runs.lease(devices="d", host="h", ready=lambda one: one.id == asked.id, now=NOW, until=NOW)
        assert leased is not None
        with pytest.raises(WrongState, match="try 7"):
            cycle.run(settings_of(site), RECIPE, now=lambda: NOW, progress=Heard(), ticket=cycle.Ticket(asked.id, 7))
        heard = Heard()
        ticket = cycle.Ticket(asked.id, leased.tries)
        with pytest.raises(Stopped):
            cycle.run(settings_of(site), RECIPE, now=lambda: NOW, progress=heard, ticket=ticket, stop=lambda: bool(heard.epochs))
        stopped = catalogue.runs.get(asked.id)
        assert (stopped.state, bool(stopped.folder)) == (RunState.QUEUED, True), "a supervised run is queued again"
        again = catalogue.runs.lease(devices="d", host="h", ready=lambda one: one.id == asked.id, now=NOW, until=NOW)
        assert again is not None
        ticket = cycle.Ticket(asked.id, again.tries)
        with _alone(settings_of(site).storage.root / "runs" / stopped.folder), pytest.raises(Busy):
            cycle.run(settings_of(site), RECIPE, now=lambda: NOW, progress=Heard(), ticket=ticket)
        busy = catalogue.runs.get(asked.id)
        assert (busy.state, busy.losses) == (RunState.QUEUED, 1), "somebody the catalogue does not know works in its folder"
        catalogue.runs.cancel(asked.id, by="me", reason="", now=NOW)


@pytest.mark.long
def test_sigterm_ends_a_trainer_in_good_order_with_a_code_of_its_own(tmp_path: Path) -> None:
    small = labelled_site(tmp_path, patients=12)
    root = settings_of(small).storage.root
    command = [sys.executable, "-m", "training", "--config", str(small), "--recipe", "phantom", *FINETUNE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as trainer:
        until(lambda: any("epoch" in file.read_text() for file in root.glob("runs/*/metrics.jsonl")), seconds=120)
        trainer.terminate()
        told = trainer.communicate(timeout=120)[1].decode()
    assert trainer.returncode == 143
    assert "it goes on from its last finished step" in told
    with Catalogue.open(settings_of(small).storage.catalogue) as catalogue:
        row = catalogue.runs.last()
    assert row is not None
    assert row.state is RunState.INTERRUPTED


def test_the_verbs_do_not_load_torch_before_a_run() -> None:
    code = "import sys, training.verbs; sys.exit(bool({'torch', 'sklearn', 'matplotlib', 'sqlalchemy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("moment", ["while images are decoded", "before the lists are on the disk"])
def test_who_is_locked_while_a_run_freezes_its_lists_is_not_trained_on(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One who was about to be trained on is merged with a locked patient; no list names the person yet."""
    site = labelled_site(tmp_path, patients=12, is_locked=lambda patient: patient == 1)
    root = settings_of(site).storage.root
    gone, kept = pid(3), pid(1)

    def merge() -> None:
        with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
            if not catalogue.patients.plan(gone, kept).is_known:
                assert frozen.naming(catalogue, root, {gone, kept}) == ""
                plan = catalogue.patients.plan(gone, kept)
                catalogue.patients.merge(plan, named_by="", by="someone", reason="HIS merge", now=NOW)

    class Merging(Heard):
        def stage(self, what: str, total: int = 0) -> None:
            super().stage(what, total)
            if what == "decoding images" and moment == "while images are decoded":
                merge()

    if moment == "before the lists are on the disk":
        enough = corpus.require_enough
        monkeypatch.setattr(corpus, "require_enough", lambda *told: (enough(*told), merge()))
    with pytest.raises(KeyboardInterrupt):
        run(site, heard=Merging(stop_in="fold 0"))
    (folder,) = (one.parent for one in root.glob("runs/*/corpus.json"))
    lists = json.loads((folder / "corpus.json").read_bytes())
    assert {sample["pid"] for sample in lists["training"]} == {pid(patient) for patient in range(12)} - {gone, kept}
    assert {sample["pid"] for sample in lists["locked"]} == {kept}
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        assert catalogue.instances.locked_patients() == {gone, kept}
        # and where a machine that does not see the runs had merged another one meanwhile, the run does not go on
        plan = catalogue.patients.plan(pid(5), kept)
        catalogue.patients.merge(plan, named_by="", by="someone", reason="HIS merge", now=NOW)
    with pytest.raises(CorpusChanged, match="start a new run"):
        run(site, run_id=folder.name)


def test_a_candidate_that_learned_from_a_patient_who_is_locked_now_is_not_promoted_by_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate would promote it; a machine that does not see the runs locks the patient while it decides."""
    site = labelled_site(tmp_path, patients=12, is_locked=lambda patient: patient == 1)
    registry = Registry(settings_of(site).storage.root / "models")

    def merging(*_: object) -> promote.Decision:
        with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
            plan = catalogue.patients.plan(pid(3), pid(1))
            catalogue.patients.merge(plan, named_by="", by="someone", reason="HIS merge", now=NOW)
        return promote.Decision(promote.Verdict.PROMOTE, "It is better.")

    monkeypatch.setattr(promote, "decide", merging)
    with pytest.raises(Final, match="was trained on 1 of the locked patients; it can never be put into service"):
        run(site, replace(RECIPE, epochs=1))
    (version,) = registry.versions()
    assert pid(3) in registry.corpus(version)
    assert (registry.champion(), registry.history()) == (None, [])
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        row = catalogue.runs.last()
    assert row is not None
    assert row.state is RunState.FAILED
    assert f"{version} was trained on 1 of the locked patients" in row.reason
    shown = CliRunner().invoke(app, ["show", row.folder, "--config", str(site)]).stdout
    assert f"state    failed ({row.reason})" in shown, "the decision stands there, and what came of it"
    with pytest.raises(CorpusChanged, match="start a new run"):
        run(site, replace(RECIPE, epochs=1), run_id=row.folder)
    assert registry.champion() is None


@pytest.mark.long
def test_a_witness_who_was_merged_with_somebody_learned_from_is_none_any_more(tmp_path: Path) -> None:
    """The run had frozen its lists with the one in the training part, the other in the locked one."""
    site = labelled_site(tmp_path, patients=24, is_locked=lambda patient: patient in IS_LOCKED)
    with pytest.raises(KeyboardInterrupt):
        run(site, heard=Heard(stop_in="refit"))
    root = settings_of(site).storage.root
    gone, kept = pid(3), pid(1)
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        row = catalogue.runs.last()
        assert row is not None
        named_by = frozen.naming(catalogue, root, {gone, kept})
        assert named_by == f"the corpus of run {row.folder}"
        catalogue.patients.merge(
            catalogue.patients.plan(gone, kept), named_by=named_by, by="someone", reason="HIS merge", now=NOW
        )
    ended = run(site, run_id=row.folder)
    witnesses = set(read(ended, "predictions.json")[cycle.LOCKED]["patients"])
    assert witnesses == {pid(patient) for patient in IS_LOCKED} - {gone}
    learned_from = {sample["pid"] for sample in read(ended, "corpus.json")["training"]}
    assert kept in learned_from
    assert not learned_from & witnesses


def test_a_batch_that_does_not_fit_is_halved_said_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = labelled_site(tmp_path, patients=12)
    fits, largest = finetune.fit, []

    def small_memory(*given: Any, **named: Any) -> finetune.Fitted:
        largest.append(given[3].batch)
        if given[3].batch > 4:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to …")
        return fits(*given, **named)

    monkeypatch.setattr(finetune, "fit", small_memory)
    ended = run(site)
    assert largest == [8, 4, 4, 4, 4], "tried once; the other fits begin with what fitted"
    assert read(ended, "fits/batch.json")["batch"] == 4
    assert "batch halved" in caplog.text


def test_the_final_model_is_the_mean_of_the_repeats_where_the_validation_patients_speak_for_it() -> None:
    """Two seeds that are wrong of different images are worth averaging; two that say the same are not."""
    truth = [np.zeros(20, np.int64), np.ones(20, np.int64)]

    def fold(target: int, wrong: slice) -> dict[str, list[list[float]]]:
        logits = np.full((20, 2), -2.0)
        logits[:, target] = 2.0
        logits[wrong] *= -0.9
        return {"validation": logits.tolist()}

    differ = [[fold(target, slice(0, 4)), fold(target, slice(4, 8))] for target in (0, 1)]
    said = cycle._one_or_all(differ, truth)
    assert said["members"] == 2
    assert said["gain"] > said["standard_error"] > 0
    assert "the mean of 2 networks" in said["words"]
    same = [[fold(target, slice(0, 4)), fold(target, slice(0, 4))] for target in (0, 1)]
    said = cycle._one_or_all(same, truth)
    assert said["members"] == 1
    assert "one network and not the mean of 2" in said["words"]


def test_a_mean_of_repeats_is_fitted_resumed_shelved_and_said_in_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the folds of a dozen invented patients speak for, the mean is taken here."""
    site, judged = labelled_site(tmp_path, patients=12), cycle._one_or_all
    monkeypatch.setattr(cycle, "_one_or_all", lambda found, truth: judged(found, truth) | {"members": 2, "words": "Two of them."})
    recipe = replace(RECIPE, repeats=2)
    with pytest.raises(KeyboardInterrupt):
        run(site, recipe, heard=Heard(stop_in="refit repeat 1"))
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        row = catalogue.runs.last()
    assert row is not None
    heard = Heard()
    ended = run(site, recipe, heard=heard, run_id=row.folder)
    assert {fit for fit, _ in heard.epochs} == {"refit repeat 1"}, "what was fitted before the interruption stays"
    fits = {line["fit"] for line in map(json.loads, (ended.folder / "metrics.jsonl").read_text().splitlines())}
    assert fits == {f"{one}{more}" for one in ("fold 0", "fold 1", "fold 2", "refit") for more in ("", " repeat 1")}

    members = []
    for name in ("refit", "refit-repeat-1"):
        members.append(build(recipe.network, 2, "random").eval())
        members[-1].load_state_dict(checkpoint.load(ended.folder / "fits" / f"{name}.pt"))
    rows = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (4, recipe.size_px, recipe.size_px), np.uint8))
    apart, mean = finetune.predict(members[0], rows)[0], np.mean([finetune.predict(one, rows)[0] for one in members], axis=0)
    registry = Registry(settings_of(site).storage.root / "models")
    session = onnxruntime.InferenceSession(registry.model(ended.version), providers=["CPUExecutionProvider"])
    said = session.run(["logits"], {session.get_inputs()[0].name: plain(rows).numpy()})[0]
    assert np.abs(said - mean).max() < 1e-4 < np.abs(said - apart).max()
    assert registry.card(ended.version).composition == "Two of them."
    assert "Two of them." in (ended.folder / "report.html").read_text()
