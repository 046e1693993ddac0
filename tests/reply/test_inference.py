"""What may be answered is answered, what may not gets the right reason, and several images make one value."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import studies
import tiny_model
from pydicom.dataset import Dataset

from models.errors import Unreadable
from models.reference import Reference
from models.registry import Registry
from models.runtime import Model
from node.keep.records import Abstention, Findings, Held, Hold, Instance, Purpose
from node.reply.inference import Image, infer

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

STUDY = "2.25.1"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shelf")


def load(shelf: Path, **card: Any) -> Model:
    registry = Registry(shelf / "models")
    return Model.load(registry, tiny_model.shelve(registry, shelf, **card), threads=1)


@pytest.fixture(scope="module")
def model(shelf: Path) -> Model:
    return load(shelf)


def instance(number: int = 1, **other: Any) -> Instance:
    values: dict[str, Any] = {
        "sop_uid": f"2.25.{100 + number}",
        "series_uid": "2.25.2",
        "study_uid": STUDY,
        "pid": "OST-A",
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.1",
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "path": "a/b",
        "header_digest": "0",
        "pixel_digest": "0",
        "modality": "CR",
        "body_part": "KNEE",
        "age_years": 12,
        "sex": "F",
        "device": "",
        "accession_key": "",
        "study_id_key": "",
    }
    return Instance(**(values | other))


def held(number: int, reason: Hold = Hold.MODALITY) -> Held:
    return Held(f"h{number}", reason, "", "MG", "1.2", STUDY, f"2.25.{100 + number}", "OST-A", "PACS", Purpose.ANSWER)


def pixels(grey: float) -> Dataset:
    """An image of one grey but for a white and a black line, so that its window spans everything."""
    array = np.full((64, 64), round(grey * 4095), np.uint16)
    array[0], array[1] = 0, 4095
    return studies.image(modality="CR", array=array, WindowCenter="2048", WindowWidth="4096")


BRIGHT, DARK, BROKEN = pixels(0.9), pixels(0.1), Unreadable("no")


def say(model: Model, *images: tuple[Instance, Image], holds: list[Held] | None = None, in_corpus: bool = False) -> Findings:
    return infer(images, holds or [], study_uid=STUDY, model=model, in_corpus=in_corpus)


def test_one_image_gives_a_class_with_probabilities_that_sum_to_1(model: Model) -> None:
    bright, dark = say(model, (instance(), BRIGHT)), say(model, (instance(), DARK))
    assert (bright.chosen, dark.chosen) == (0, 1)
    for findings in (bright, dark):
        assert findings.abstention is None
        assert findings.probabilities is not None
        assert sum(findings.probabilities) == pytest.approx(1, abs=1e-5)
    assert bright.classes[0].meaning == "Ewing's sarcoma of bone"
    assert bright.probability_names[1].value == "P-OSTEOMYELITIS"
    assert bright.training_mix == "40/38"
    assert bright.model_id == model.version
    assert (bright.body_part, bright.in_corpus, bright.degraded) == ("KNEE", False, "")


def test_several_images_count_by_the_mean_of_their_calibrated_logits(shelf: Path) -> None:
    model = load(shelf, temperature=2.0)
    findings = say(model, (instance(2), DARK), (instance(1), BRIGHT), (instance(3), BRIGHT))
    assert [image.sop_uid for image in findings.images] == ["2.25.101", "2.25.102", "2.25.103"]
    logits = [image.logits for image in findings.images]
    assert all(each is not None for each in logits)
    mean = np.mean([each for each in logits if each], axis=0)
    assert findings.probabilities is not None
    assert findings.probabilities[0] == pytest.approx(1 / (1 + math.exp(mean[1] - mean[0])), abs=1e-5)
    alone = say(load(shelf), (instance(1), BRIGHT)).images[0].logits
    assert alone is not None
    assert findings.images[0].logits == pytest.approx([each / 2 for each in alone], abs=1e-5)
    assert "mean of the calibrated logits of 3 of 3 images" in findings.rule


def test_the_same_study_gives_the_same_findings_in_any_order(model: Model) -> None:
    images = [(instance(number), image) for number, image in enumerate((BRIGHT, DARK, BROKEN, BRIGHT), start=1)]
    assert say(model, *images).digest == say(model, *reversed(images)).digest


def test_findings_read_back(model: Model) -> None:
    findings = say(model, (instance(1), BRIGHT), (instance(2), BROKEN))
    assert Findings.from_json(findings.to_json()) == findings


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"modality": "MG"}, Abstention.MODALITY),
        ({"body_part": "CHEST"}, Abstention.BODY_PART),
        ({"age_years": 18}, Abstention.ADULT),
        ({"age_years": 90}, Abstention.ADULT),
        ({"age_years": None}, Abstention.AGE_UNKNOWN),
        ({"modality": "MG", "body_part": "CHEST", "age_years": 40}, Abstention.MODALITY),
        ({"body_part": "CHEST", "age_years": 40}, Abstention.BODY_PART),
    ],
)
def test_what_the_model_does_not_apply_to_gets_a_reason_and_no_score(
    model: Model, header: dict[str, Any], reason: Abstention
) -> None:
    findings = say(model, (instance(**header), BRIGHT))
    assert (findings.abstention, findings.probabilities, findings.chosen) == (reason, None, None)
    assert [(image.logits, image.abstention) for image in findings.images] == [(None, reason)]


@pytest.mark.parametrize("age", [0, 17])
def test_patients_under_18_are_answered(model: Model, age: int) -> None:
    assert say(model, (instance(age_years=age), BRIGHT)).abstention is None


def test_an_empty_body_part_is_answered_and_said(model: Model) -> None:
    findings = say(model, (instance(body_part=""), BRIGHT))
    assert findings.abstention is None
    assert findings.body_part == ""
    assert "Body part: not stated in the images" in findings.parameters


def test_body_parts_are_compared_without_separators(model: Model) -> None:
    assert say(model, (instance(body_part="LOWER_LEG"), BRIGHT)).abstention is None


def test_a_card_that_names_no_body_part_takes_any(shelf: Path) -> None:
    assert say(load(shelf, body_parts=()), (instance(body_part="CHEST"), BRIGHT)).abstention is None


@pytest.mark.parametrize("image", [BROKEN, Dataset()])
def test_unreadable_images_alone_abstain(model: Model, image: Image) -> None:
    assert say(model, (instance(), image)).abstention is Abstention.UNREADABLE


def test_the_rest_is_answered_from_the_images_that_pass_and_the_others_are_listed(model: Model) -> None:
    findings = say(
        model,
        (instance(1), BRIGHT),
        (instance(2), BROKEN),
        (instance(3, body_part="CHEST"), DARK),
        holds=[held(4), held(5, Hold.BURNED_IN)],
    )
    assert findings.chosen == 0
    assert [(image.sop_uid, image.abstention) for image in findings.images] == [
        ("2.25.101", None),
        ("2.25.102", Abstention.UNREADABLE),
        ("2.25.103", Abstention.BODY_PART),
        ("2.25.104", Abstention.MODALITY),
    ]
    assert findings.body_part == "KNEE"
    assert findings.rule.startswith("mean of the calibrated logits of 1 of 4 images")


def test_the_image_that_came_furthest_says_why_there_is_no_answer(model: Model) -> None:
    assert say(model, (instance(1, body_part="CHEST"), BRIGHT), (instance(2), BROKEN)).abstention is Abstention.UNREADABLE
    assert say(model, (instance(1, body_part="CHEST"), BRIGHT), holds=[held(2)]).abstention is Abstention.BODY_PART


def test_one_adult_age_makes_the_study_an_adults(model: Model) -> None:
    """Images of one study are of one patient; where their ages disagree nothing is said."""
    findings = say(model, (instance(1, age_years=17), BRIGHT), (instance(2, age_years=18), BRIGHT))
    assert findings.abstention is Abstention.ADULT


def test_a_study_whose_images_were_all_held_for_their_modality_is_not_applicable(model: Model) -> None:
    findings = say(model, holds=[held(1), held(2)])
    assert findings.abstention is Abstention.MODALITY
    assert len(findings.images) == 2


def test_a_value_too_near_the_middle_is_ambiguous(shelf: Path) -> None:
    model = load(shelf, ambiguous_below=0.7)
    assert say(model, (instance(), BRIGHT)).abstention is None
    findings = say(model, (instance(1), BRIGHT), (instance(2), DARK))
    assert findings.abstention is Abstention.AMBIGUOUS
    assert all(image.logits is not None for image in findings.images)


def test_the_threshold_is_that_of_the_card(shelf: Path) -> None:
    middle = ((instance(1), BRIGHT), (instance(2), DARK))
    assert say(load(shelf, threshold=0.3), *middle).chosen == 0
    assert say(load(shelf, threshold=0.7), *middle).chosen == 1


def test_an_image_far_from_the_training_images_is_out_of_distribution(shelf: Path) -> None:
    greys = np.linspace(0.0, 0.3, 60)
    reference = Reference.fit(np.stack([greys, greys**2], axis=1), [f"OST-{at}" for at in range(60)])
    model = load(shelf, reference=reference)
    assert say(model, (instance(), BRIGHT)).abstention is Abstention.OUT_OF_DISTRIBUTION
    both = say(model, (instance(1), DARK), (instance(2), BRIGHT))
    assert both.chosen == 1
    assert both.images[1].abstention is Abstention.OUT_OF_DISTRIBUTION


def test_the_parameters_say_what_it_ran_with_and_fit_an_sr(model: Model) -> None:
    findings = say(model, (instance(), BRIGHT), in_corpus=True)
    told = "\n".join(findings.parameters)
    for what in (model.card.onnx_sha256, "Threshold", "Calibration", "Provider: CPU", "Body part: KNEE"):
        assert what in told
    assert all(0 < len(parameter) <= 1024 and parameter.isascii() for parameter in findings.parameters)
    assert findings.in_corpus


def test_degraded_is_said_in_the_findings(shelf: Path) -> None:
    from models import runtime

    if "cuda" in runtime.providers():
        pytest.skip("this machine has CUDA")
    registry = Registry(shelf / "models")
    model = Model.load(registry, tiny_model.shelve(registry, shelf), provider="cuda", allow_degraded=True, threads=1)
    findings = say(model, (instance(), BRIGHT))
    assert findings.degraded == "runs on CPU: CUDA is not available"
    assert "Provider: CPU" in findings.parameters


def test_many_images_are_scored_in_batches(model: Model) -> None:
    findings = say(model, *[(instance(number), BRIGHT if number % 2 else DARK) for number in range(1, 41)])
    assert len(findings.images) == 40
    one = say(model, (instance(1), BRIGHT)).images[0].logits
    assert findings.images[0].logits == pytest.approx(one, abs=1e-5)
