"""What a run learns from: who is in, who is out and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from labelled import CLASSES, labelled_site, pid, put, say, settings_of, texture

from models.preprocess import Preprocessing
from node.commands.init import init_site
from node.keep.archive import Archive
from node.keep.cache import Cache
from node.keep.catalogue import Catalogue
from node.receive.profile import Vocabulary
from training import corpus
from training.recipe import LIMBS, NoSuchRecipe, Recipe, named, uniforms

SMALL = replace(named("phantom"), size_px=32, folds=3)


def frozen(site: Path, recipe: Recipe = SMALL) -> corpus.Corpus:
    storage = settings_of(site).storage
    cache = Cache(storage.root / "cache", Preprocessing(recipe.size_px))
    with Catalogue.open(storage.catalogue) as catalogue:
        chosen, left_out = corpus.choose(catalogue.instances.for_training(), catalogue.labels.all(), recipe)
    cache.build([one.image for one in chosen], Archive(storage.root / "archive").read)
    return corpus.freeze(chosen, left_out, cache, recipe)


def test_locked_patients_are_in_a_list_of_their_own(tmp_path: Path) -> None:
    found = frozen(labelled_site(tmp_path, patients=8, is_locked=lambda patient: patient in (2, 5)))
    assert {sample.pid for sample in found.locked} == {pid(2), pid(5)}
    assert set(found.patients) == {pid(patient) for patient in (0, 1, 3, 4, 6, 7)}
    assert found.left_out == {}


def test_what_does_not_train_is_counted_with_its_reason(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    cases: dict[str, dict[str, object]] = {
        "adult": {"age_years": 18},
        "age unknown": {"age_years": None},
        "other body part": {"body_part": "CHEST"},
        "other modality": {"modality": "MG"},
        "no label": {},
        "blank or nearly so": {"array": np.full((48, 48), 7, np.uint16) + (np.arange(48) == 3).astype(np.uint16)},
        "unreadable": {"array": np.full((48, 48), 7, np.uint16)},
    }
    for patient, (reason, options) in enumerate(cases.items(), start=1):
        image = put(site, patient, **options)  # type: ignore[arg-type]
        if reason != "no label":
            say(site, image, CLASSES[0])
    said_both = put(site, 20)
    say(site, said_both, CLASSES[0])
    say(site, said_both, CLASSES[1], reader="another reader")
    say(site, put(site, 21), "normal")
    say(site, put(site, 22, body_part=""), CLASSES[0])  # a body part that is not stated is no reason
    found = frozen(site)
    expected = dict.fromkeys((*cases, "labels that contradict each other", "label 'normal' is no class of the recipe"), 1)
    assert found.left_out == expected
    assert found.patients == (pid(22),)


def test_a_label_of_an_image_goes_before_that_of_its_study(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    first, second = put(site, 1, instance=1), put(site, 1, instance=2)
    say(site, first, CLASSES[0])
    say(site, second, CLASSES[1], of_image=True)
    assert {sample.sop_uid: sample.target for sample in frozen(site).training} == {first.sop_uid: 0, second.sop_uid: 1}


@pytest.mark.parametrize(("taken", "trains"), [("20240309", True), ("20240310", False), ("20240311", False)])
def test_images_from_first_treatment_on_do_not_train(tmp_path: Path, taken: str, trains: bool) -> None:
    """The day counts for the patient: it also takes out a later study whose own label states no treatment."""
    site = init_site(tmp_path)
    say(site, put(site, 1, study=1, study_date="20240101"), CLASSES[0], treated="2024-03-10")
    say(site, put(site, 1, study=2, study_date=taken, instance=2), CLASSES[0])
    found = frozen(site)
    assert len(found.training) == 1 + trains
    assert found.left_out == ({} if trains else {"on or after the day of first treatment": 1})


def test_the_same_picture_is_taken_once_and_never_across_the_lock(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    for patient, locked in ((1, False), (2, True)):
        say(site, put(site, patient, array=texture(0, 1), locked=locked), CLASSES[0])
    for patient in (3, 4):
        say(site, put(site, patient, array=texture(1, 2)), CLASSES[patient % 2])
    found = frozen(site)
    assert [sample.pid for sample in found.locked] == [pid(2)]
    assert found.training == ()
    assert found.left_out == {"the same picture again": 1, "the same picture under different labels": 2}


def test_too_few_patients_are_named_by_class_with_what_to_do(tmp_path: Path) -> None:
    site = labelled_site(tmp_path, patients=5, is_locked=lambda patient: patient == 4)
    say(site, put(site, 30), "normal")
    with pytest.raises(corpus.NotEnough) as told:
        corpus.require_enough(frozen(site), SMALL)
    for word in ("ewing_sarcoma 2 (and 1 locked)", "acute_osteomyelitis 2 (and 0 locked)", "osteon labels import", "'normal'"):
        assert word in str(told.value)


def test_an_edited_list_is_refused(tmp_path: Path) -> None:
    found = frozen(labelled_site(tmp_path, patients=4))
    plain = found.to_plain()
    assert corpus.Corpus.from_plain(plain) == found
    plain["training"] = [dict(sample) | {"target": 0} for sample in plain["training"]]
    with pytest.raises(corpus.CorpusChanged):
        corpus.Corpus.from_plain(plain)


def test_other_pixels_than_the_frozen_ones_are_refused(tmp_path: Path) -> None:
    site = labelled_site(tmp_path, patients=4)
    found = frozen(site)
    cache = Cache(settings_of(site).storage.root / "cache", Preprocessing(32))
    assert corpus.pictures(found.training, cache).shape == (len(found.training), 32, 32)
    file = cache.folder / "pixels.u8"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(corpus.CorpusChanged):
        corpus.pictures(found.training, cache)


def samples(patients: int, *, images: int = 2) -> list[corpus.Sample]:
    return [
        corpus.Sample(f"2.25.{n}{i}", f"2.25.{n}", pid(n), int(n % 3 == 0), 9, "F", "", 100, 20)
        for n in range(1, patients + 1)
        for i in range(images)
    ]


def test_folds_split_by_patient_and_keep_the_classes_apart_evenly() -> None:
    recipe = replace(SMALL, folds=10)
    found = samples(63)
    folds = corpus.make_folds(found, recipe)
    everybody = {sample.pid for sample in found}
    assert [pid for fold in folds for pid in fold.test].__len__() == len(everybody)
    assert {pid for fold in folds for pid in fold.test} == everybody == {pid for fold in folds for pid in fold.validation}
    minority = {sample.pid for sample in found if sample.target}
    for fold in folds:
        assert not set(fold.validation) & set(fold.test)
        assert 5 <= len(fold.test) <= 8  # 80/10/10
        assert 2 <= len(minority & set(fold.test)) <= 3
    assert folds == corpus.make_folds(list(reversed(found)), recipe)
    assert folds != corpus.make_folds(found, replace(recipe, seed=1))


def test_draws_hang_on_seed_purpose_epoch_and_image_alone() -> None:
    ids = ["2.25.1", "2.25.2", "2.25.3"]
    drawn = uniforms(1, "augment", 2, ids, 6)
    assert np.array_equal(drawn[::-1], uniforms(1, "augment", 2, ids[::-1], 6))
    others = [uniforms(2, "augment", 2, ids, 6), uniforms(1, "order", 2, ids, 6), uniforms(1, "augment", 3, ids, 6)]
    assert all(not np.array_equal(drawn, other) for other in others)
    many = uniforms(1, "augment", 0, [str(number) for number in range(4000)], 2)
    assert abs(many.mean() - 0.5) < 0.02
    assert 0 <= many.min() < many.max() < 1


def test_recipes_name_terms_the_vocabulary_knows() -> None:
    known = Vocabulary.load().terms["body_part"]
    assert [part for part in LIMBS if known.find(part) != part] == []
    assert named("ewing_small").expects
    with pytest.raises(NoSuchRecipe, match="ewing_small"):
        named("nothing")
