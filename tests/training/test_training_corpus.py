"""What a run learns from: who is in, who is out and why."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from labelled import CLASSES, labelled_site, pid, put, say, settings_of, texture
from pydicom.uid import RLELossless

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


def test_a_list_from_before_the_manufacturer_keeps_its_digest() -> None:
    """Else every older run would be refused as edited."""
    found = corpus.Corpus(tuple(samples(3)), (), {})
    plain = found.to_plain()
    plain["training"] = [
        {name: value for name, value in sample.items() if name != "manufacturer"} for sample in plain["training"]
    ]
    assert corpus.Corpus.from_plain(plain) == found
    older = hashlib.sha256(json.dumps(plain["training"], sort_keys=True).encode()).hexdigest()
    assert found.digest == older
    told = replace(found, training=tuple(replace(sample, manufacturer="Canon") for sample in found.training))
    assert told.digest != older


def test_a_frozen_sample_names_the_manufacturer_of_the_unit(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    say(site, put(site, 1), CLASSES[0])
    assert [sample.manufacturer for sample in frozen(site).training] == ["Canon Inc."]


def pooled(site: Path, *, decode_locked: bool = False) -> tuple[corpus.Pool, Cache]:
    storage = settings_of(site).storage
    cache = Cache(storage.root / "cache", Preprocessing(32))
    with Catalogue.open(storage.catalogue) as catalogue:
        images = list(catalogue.instances.for_training())
    cache.build([one for one in images if decode_locked or not one.locked], Archive(storage.root / "archive").read)
    return corpus.pool(images, cache, blank_below=3.0), cache


def test_the_pool_takes_labelled_and_unlabelled_images_of_any_age_and_body_part(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    images = [
        put(site, 1),
        put(site, 2, age_years=70, body_part="CHEST"),
        put(site, 3, age_years=None, body_part="", modality="CR"),
        put(site, 3, instance=2),
    ]
    say(site, images[0], CLASSES[0])
    found, _ = pooled(site)
    assert [image.sop_uid for image in found.images] == sorted(image.sop_uid for image in images)
    assert found.patients == tuple(sorted({pid(1), pid(2), pid(3)}))
    assert found.left_out == {}


def test_what_is_not_in_the_pool_is_counted_with_its_reason(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    put(site, 1, locked=True)
    put(site, 2, modality="MG")
    put(site, 3, array=np.full((48, 48), 7, np.uint16) + (np.arange(48) == 3).astype(np.uint16))
    put(site, 4, array=np.full((48, 48), 7, np.uint16))
    for patient in (5, 6):
        put(site, patient, array=texture(0, 1))
    put(site, 7, SamplesPerPixel=3)
    found, _ = pooled(site)
    assert found.left_out == {
        "locked patient": 1,
        "other modality": 1,
        "blank or nearly so": 1,
        "corrupt: the image shows a single grey value": 1,
        "corrupt: the image is not a grey image": 1,
        "the same picture again": 1,
    }
    assert len(found.images) == 1


def test_an_image_that_was_never_decoded_is_counted(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    put(site, 1)
    with Catalogue.open(settings_of(site).storage.catalogue) as catalogue:
        found = corpus.pool(catalogue.instances.for_training(), Cache(tmp_path / "empty", Preprocessing(32)), blank_below=3.0)
    assert (found.images, found.left_out) == ((), {"not decoded": 1})


@pytest.mark.parametrize("decode_locked", [False, True])
def test_a_copy_of_a_locked_patients_picture_is_not_in_the_pool(tmp_path: Path, *, decode_locked: bool) -> None:
    site = init_site(tmp_path)
    put(site, 1, locked=True, array=texture(0, 1))
    put(site, 2, array=texture(0, 1))
    put(site, 3)
    found, _ = pooled(site, decode_locked=decode_locked)
    assert found.patients == (pid(3),)
    assert found.left_out == {"locked patient": 1, "the same picture as a locked patient's": 1}


def test_a_copy_in_another_syntax_is_known_where_the_locked_picture_is_decoded(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    put(site, 1, locked=True, array=texture(0, 1))
    put(site, 2, array=texture(0, 1), transfer_syntax=RLELossless)
    found, _ = pooled(site, decode_locked=True)
    assert found.images == ()
    assert found.left_out == {"locked patient": 1, "the same picture as a locked patient's": 1}


def test_an_edited_pool_is_refused(tmp_path: Path) -> None:
    found, _ = pooled(labelled_site(tmp_path, patients=4))
    plain = json.loads(json.dumps(found.to_plain()))
    assert corpus.Pool.from_plain(plain) == found
    plain["images"] = plain["images"][1:]
    with pytest.raises(corpus.CorpusChanged):
        corpus.Pool.from_plain(plain)


def test_mapped_pictures_are_those_of_the_list_and_cannot_be_changed(tmp_path: Path) -> None:
    found, cache = pooled(labelled_site(tmp_path, patients=4))
    backwards = found.images[::-1]
    whole, rows = corpus.mapped(backwards, cache)
    assert np.array_equal(whole[rows], cache.pixels([image.sop_uid for image in backwards]))
    assert not whole.flags.writeable
    assert isinstance(whole.base, np.memmap)  # nothing was copied


@pytest.mark.parametrize("what", ["other pixels", "blanked"])
def test_mapped_pictures_that_are_not_the_frozen_ones_are_refused(tmp_path: Path, what: str) -> None:
    found, cache = pooled(labelled_site(tmp_path, patients=4))
    if what == "blanked":
        cache.blank([found.images[1].sop_uid])
    else:
        file = cache.folder / "pixels.u8"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(corpus.CorpusChanged):
        corpus.mapped(found.images, cache)


def test_a_split_deals_every_patient_to_one_side_by_the_shares() -> None:
    pids = [pid(n) for n in range(200)]
    found = corpus.split(pids, 7)
    assert [len(side) for side in (found.train, found.validation, found.test)] == [160, 20, 20]
    assert sorted([*found.train, *found.validation, *found.test]) == sorted(pids)
    assert found == corpus.split([*reversed(pids), *pids], 7)
    assert found != corpus.split(pids, 8)
    assert corpus.Split.from_plain(json.loads(json.dumps(found.to_plain()))) == found
    assert [len(side) for side in asdict(corpus.split(pids, 7, (0.5, 0.25, 0.25))).values()] == [100, 50, 50]


def test_a_split_has_somebody_on_every_side_or_is_none() -> None:
    assert [len(side) for side in asdict(corpus.split(["a", "b", "c"], 0)).values()] == [1, 1, 1]
    with pytest.raises(corpus.NotEnough):
        corpus.split(["a", "b"], 0)
    with pytest.raises(corpus.CorpusChanged):
        corpus.Split(("a",), ("b",), ("a",))


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
