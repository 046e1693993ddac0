"""Pixels to findings: what may be answered is, what may not gets a coded reason.

In: the images of one study, what of it lies in the quarantine, the model in service. Out: `Findings`, without an identity. Never
a label for what the model does not apply to, and never a score of an image that could not be read.

Guard rails in their order: modality, body part, age, pixels, distribution. Each image is stopped by the first that it fails. The
study is answered from the images that pass all of them; where none does, the reason is that of the image that came furthest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from models.card import Card, Code
from models.errors import Unreadable
from models.preprocess import preprocess
from models.reference import Reference
from models.runtime import Model
from node.keep.records import Abstention, CodedConcept, Findings, Held, Hold, ImageFinding, Instance

Image = Dataset | Unreadable
"""An archived image, or why it could not be read."""

GUARD_RAILS = (
    Abstention.MODALITY,
    Abstention.BODY_PART,
    Abstention.ADULT,
    Abstention.AGE_UNKNOWN,
    Abstention.UNREADABLE,
    Abstention.OUT_OF_DISTRIBUTION,
)
_BATCH = 16
_DIGITS = 6

Floats = NDArray[np.float64]


def infer(
    instances: Sequence[tuple[Instance, Image]], held: Sequence[Held], *, study_uid: str, model: Model, in_corpus: bool
) -> Findings:
    """Say what the model says of one study, or why it says nothing.

    Parameters
    ----------
    instances
        The study's images in the archive.
    held
        Its instances in the quarantine; those of a foreign modality are named as such.
    in_corpus
        The patient is in the frozen corpus of the model.
    """
    card = model.card
    adult = any((instance.age_years or 0) >= card.max_age_years for instance, _ in instances)  # one study is of one patient
    judged = {instance.sop_uid: _by_header(instance, card, adult=adult) for instance, _ in instances}
    logits, unfit = _score([(i.sop_uid, image) for i, image in instances if judged[i.sop_uid] is None], model)
    judged |= unfit
    images = [ImageFinding(each.sop_uid, each.modality, logits.get(each.sop_uid), judged[each.sop_uid]) for each, _ in instances]
    foreign = [each for each in held if each.reason is Hold.MODALITY and each.sop_uid and each.sop_uid not in judged]
    images += [ImageFinding(each.sop_uid, each.modality, None, Abstention.MODALITY) for each in foreign]
    said = _combine([finding.logits for finding in images if finding.logits is not None], images, card)
    used = [instance for instance, _ in instances if instance.sop_uid in logits]
    parts = sorted({instance.body_part for instance in used or [instance for instance, _ in instances] if instance.body_part})
    return Findings(
        study_uid=study_uid,
        model_id=model.version,
        model_name=card.name,
        weights_sha256=card.onnx_sha256,
        classes=tuple(_coded(label.code) for label in card.labels),
        probability_names=tuple(_coded(label.probability) for label in card.labels),
        probabilities=said.probabilities,
        chosen=said.chosen,
        abstention=said.abstention,
        images=tuple(sorted(images, key=lambda finding: finding.sop_uid)),
        rule=f"mean of the calibrated logits of {len(logits)} of {len(images)} images, then softmax",
        parameters=_parameters(model, parts),
        training_mix="/".join(str(count) for count in card.training_mix),
        in_corpus=in_corpus,
        body_part=parts[0] if len(parts) == 1 else "",
        degraded=model.degraded,
    )


def _by_header(instance: Instance, card: Card, *, adult: bool) -> Abstention | None:
    """Stop an image that the model does not apply to by what its header says; None lets it pass."""
    if instance.modality not in card.modalities:
        return Abstention.MODALITY
    if instance.body_part and card.body_parts and _plain(instance.body_part) not in {_plain(part) for part in card.body_parts}:
        return Abstention.BODY_PART
    if adult:
        return Abstention.ADULT
    return Abstention.AGE_UNKNOWN if instance.age_years is None else None


def _score(images: Sequence[tuple[str, Image]], model: Model) -> tuple[dict[str, tuple[float, ...]], dict[str, Abstention]]:
    """Give the calibrated logits of each image by UID; and of those that give none, why."""
    logits: dict[str, tuple[float, ...]] = {}
    unfit: dict[str, Abstention] = {}
    readable: list[tuple[str, NDArray[np.float32]]] = []
    for uid, image in images:
        try:
            if isinstance(image, Unreadable):
                raise image
            readable.append((uid, preprocess(image, model.card.preprocessing)))
        except Unreadable:
            unfit[uid] = Abstention.UNREADABLE
    reference = None if model.reference is None else Reference.from_bytes(model.reference)
    for start in range(0, len(readable), _BATCH):
        batch = readable[start : start + _BATCH]
        raw, features = model.predict(np.stack([pixels for _, pixels in batch]))
        outliers = np.zeros(len(batch), bool) if reference is None else reference.is_outlier(features)
        for (uid, _), row, outlier in zip(batch, raw, outliers, strict=True):
            if outlier:
                unfit[uid] = Abstention.OUT_OF_DISTRIBUTION
            elif not np.isfinite(row).all():
                unfit[uid] = Abstention.UNREADABLE
            else:
                logits[uid] = tuple(round(float(value) / model.card.temperature, _DIGITS) for value in row)
    return logits, unfit


@dataclass(frozen=True, slots=True)
class _Said:
    probabilities: tuple[float, ...] | None
    chosen: int | None
    abstention: Abstention | None


def _combine(logits: Sequence[tuple[float, ...]], images: Sequence[ImageFinding], card: Card) -> _Said:
    """Make one value of the study's images: softmax of the mean logits; or find the reason why there is none."""
    if not logits:
        reasons = [finding.abstention for finding in images if finding.abstention is not None]
        return _Said(None, None, max(reasons, key=GUARD_RAILS.index, default=Abstention.UNREADABLE))
    mean: Floats = np.asarray(logits, dtype=np.float64).mean(axis=0)
    shares = np.exp(mean - mean.max())
    probabilities = tuple(round(float(share), _DIGITS) for share in shares / shares.sum())
    if card.ambiguous_below is not None and max(probabilities) < card.ambiguous_below:
        return _Said(None, None, Abstention.AMBIGUOUS)
    if len(probabilities) == 2:
        return _Said(probabilities, 0 if probabilities[0] >= card.threshold else 1, None)
    return _Said(probabilities, int(np.argmax(probabilities)), None)


def _parameters(model: Model, parts: Sequence[str]) -> tuple[str, ...]:
    """List what the algorithm ran with, for the SR's Algorithm Parameters."""
    card = model.card
    spec = card.preprocessing
    parameters = [
        f"Weights SHA-256: {card.onnx_sha256}",
        f"Calibration: logits divided by {card.temperature:.4g}",
        f"Preprocessing: version {spec.version}, {spec.size_px} x {spec.size_px} pixels",
        f"Provider: {model.provider.upper()}",
        f"Body part: {', '.join(parts) if parts else 'not stated in the images'}",
    ]
    if len(card.labels) == 2:
        parameters.append(f"Threshold: {card.labels[0].name} from a probability of {card.threshold:.4g}")
    if card.ambiguous_below is not None:
        parameters.append(f"Ambiguous: largest probability below {card.ambiguous_below:.4g}")
    return tuple(parameters)


def _plain(term: str) -> str:
    """Compare body part terms without case and separators: LOWER_LEG and LOWERLEG are one."""
    return "".join(filter(str.isalnum, term)).upper()


def _coded(code: Code) -> CodedConcept:
    return CodedConcept(code.value, code.scheme, code.meaning)
