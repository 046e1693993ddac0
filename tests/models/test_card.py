"""A card reads back as it was written, and nothing odd is taken for a card."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import tiny_model
from hypothesis import example, given
from hypothesis import strategies as st

from models.card import IMAGENET, RANDOM, Card, Code, Metric, StartWeights, corpus_file, corpus_patients
from models.errors import Tampered
from models.preprocess import Preprocessing


def test_a_card_reads_back_equal_and_writes_the_same_text_again() -> None:
    card = tiny_model.card()
    assert Card.from_json(card.to_json()) == card
    assert Card.from_json(card.to_json()).to_json() == card.to_json()


@example(1.0, 0.0, 0, "", datetime(2020, 3, 8, 0, 0, tzinfo=ZoneInfo("America/Havana")))
@given(
    temperature=st.floats(0.01, 100),
    value=st.floats(allow_nan=False, allow_infinity=False),
    n=st.integers(0, 10**6),
    text=st.text(max_size=40),
    at=st.datetimes(min_value=datetime(2020, 1, 1), timezones=st.timezones()),  # noqa: DTZ001 - the zone is drawn beside it
)
def test_any_values_survive(temperature: float, value: float, n: int, text: str, at: datetime) -> None:
    metric = Metric(text, value, value, value, n)
    card = tiny_model.card(temperature=temperature, metrics=(metric,), decision_reason=text, created_at=at)
    back = Card.from_json(card.to_json())
    assert back.metrics == (metric,)
    assert (back.temperature, back.decision_reason) == (temperature, text)
    assert back.created_at.timestamp() == at.timestamp()  # in a night of daylight saving no two zones' times are ever equal


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(unknown=1),
        lambda raw: raw["preprocessing"].update(unknown=1),
        lambda raw: raw["preprocessing"].update(version=2),
        lambda raw: raw["labels"][0].update(unknown=1),
        lambda raw: raw["labels"][0]["code"].update(value=""),
        lambda raw: raw.pop("temperature"),
        lambda raw: raw.update(temperature="1.0"),
        lambda raw: raw.update(temperature=0),
        lambda raw: raw.update(labels=raw["labels"][:1]),
        lambda raw: raw.update(training_mix=[1]),
        lambda raw: raw.update(decision="yes"),
        lambda raw: raw.update(onnx_sha256="abc"),
        lambda raw: raw.update(created_at="2026-03-01T14:05:00"),
        lambda raw: raw["metrics"][0].update(low=0.9, high=0.1),
        lambda raw: raw["metrics"][0].update(value=float("nan")),
    ],
)
def test_unknown_missing_and_odd_fields_are_refused(change: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads(tiny_model.card().to_json())
    change(raw)
    with pytest.raises(Tampered, match="not a valid model card"):
        Card.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"card"', "\x00"])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(Tampered):
        Card.from_json(text)


def test_a_code_is_one_that_dicom_can_carry() -> None:
    with pytest.raises(ValueError, match="1 to 16"):
        Code("12345678901234567", "SCT", "too long a value")


def test_preprocessing_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version"):
        Preprocessing(64, version=2)


def test_the_frozen_corpus_is_a_sorted_set_of_pseudonyms() -> None:
    assert corpus_file(["OST-B", "OST-A", "OST-B"]) == corpus_file({"OST-A", "OST-B"})
    assert corpus_patients(corpus_file(["OST-B", "OST-A"])) == {"OST-A", "OST-B"}
    with pytest.raises(Tampered):
        corpus_patients(b'{"patients": [1]}')


def test_every_start_that_can_be_fetched_has_a_hash_that_its_name_begins_with() -> None:
    """The full one, but for DenseNet-201: of that file only the 8 digits in its name are known."""
    for arch, weights in IMAGENET.items():
        assert len(weights.sha256) == (8 if arch == "densenet201" else 64)
        assert weights.licence
        if weights.url:
            assert weights.url.startswith("https://")
            assert weights.filename.split("-")[1].startswith(weights.sha256[:8])


@pytest.mark.parametrize(
    ("sha256", "filename"),
    [("c1103571", ""), ("c1103571", "densenet201-c1103572.pth"), ("c11035", "d-c11035.pth"), ("C1103571", "d-C1103571.pth")],
)
def test_start_weights_of_half_a_hash_are_no_start_weights(sha256: str, filename: str) -> None:
    with pytest.raises(ValueError, match="64 lower-case hex digits"):
        StartWeights("test", sha256, "none", filename)


def test_a_full_hash_is_compared_in_full_and_no_hash_fits_nothing() -> None:
    full = IMAGENET["resnet18"].sha256
    assert IMAGENET["resnet18"].is_hash(full)
    assert not IMAGENET["resnet18"].is_hash(full[:8] + "0" * 56)
    assert IMAGENET["densenet201"].is_hash("c1103571" + "0" * 56)
    assert not IMAGENET["densenet201"].is_hash("c1103570" + "0" * 56)
    assert not RANDOM.is_hash(full)
