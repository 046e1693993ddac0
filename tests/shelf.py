"""A catalogue with a clock, driven in words: `desk.image("study")`, `desk.later(minutes=5)`, `desk.answer("study")`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from node.keep.catalogue import Catalogue
from node.keep.records import (
    CodedConcept,
    Delivery,
    Document,
    Findings,
    Held,
    Hold,
    Instance,
    Purpose,
    Result,
    Study,
    StudyState,
)

QUIET_S, MAX_WAIT_S, WITHIN_H, CLAIM_S = 120.0, 1800.0, 72.0, 300.0
CLASSES = (CodedConcept("254643008", "SCT", "Ewing sarcoma"), CodedConcept("409780009", "SCT", "Osteomyelitis"))


def image(study: str = "1", number: int = 1, *, pid: str = "", **other: object) -> Instance:
    """Make an image of a study; a patient has one study unless `pid` says otherwise."""
    values: dict[str, object] = {
        "sop_uid": f"{study}.9.{number}",
        "series_uid": f"{study}.9",
        "study_uid": study,
        "pid": pid or f"OST-{study}",
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.1",
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "path": f"{study}/{number}.dcm",
        "header_digest": "a" * 64,
        "pixel_digest": "b" * 64,
        "modality": "CR",
        "body_part": "KNEE",
        "age_years": 12,
        "sex": "F",
        "device": "device",
        "accession_key": f"accession-{study}",
        "study_id_key": f"id-{study}",
    }
    return Instance(**(values | other))  # type: ignore[arg-type]


def held(study: str = "1", number: int = 1, reason: Hold = Hold.MODALITY, **other: object) -> Held:
    """Make a held instance of a study."""
    values: dict[str, object] = {
        "id": f"held-{study}-{number}-{reason.name}",
        "reason": reason,
        "detail": "",
        "modality": "MG",
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.1.2",
        "study_uid": study,
        "sop_uid": f"{study}.9.{number}",
        "pid": f"OST-{study}",
        "calling_ae": "PACS",
        "purpose": Purpose.ANSWER,
    }
    return Held(**(values | other))  # type: ignore[arg-type]


def findings(study: str = "1", model: str = "v1") -> Findings:
    """Make findings that name a class."""
    return Findings(
        study_uid=study,
        model_id=model,
        model_name="Osteon",
        weights_sha256="c" * 64,
        classes=CLASSES,
        probability_names=CLASSES,
        probabilities=(0.75, 0.25),
        chosen=0,
        abstention=None,
        images=(),
        rule="mean",
        parameters=(),
        training_mix="1/1",
        in_corpus=False,
        body_part="KNEE",
    )


def document(delivery: Delivery, *, tone: str = "") -> Document:
    """Build the document of a delivery: the same result, destination, edition and tone give the same one."""
    uid = f"{delivery.result_id}.{delivery.edition}"
    return Document("1.2.840.10008.5.1.4.1.1.88.33", f"2.25.{uid}", f"2.25.{uid}.1", f"{tone}{uid}".ljust(64, "0"))


@dataclass
class Desk:
    """The catalogue, the time, and the hands of the receiver and the replier."""

    catalogue: Catalogue
    now: datetime = field(default_factory=lambda: datetime(2026, 3, 1, 12, tzinfo=UTC))

    def later(self, **by: float) -> None:
        self.now += timedelta(**by)

    def image(
        self, study: str = "1", number: int = 1, *, purpose: Purpose = Purpose.ANSWER, ae: str = "PACS", locked: bool = False
    ) -> bool:
        """Receive an image as the intake does: a known one is only seen again."""
        if self.catalogue.instances.find(image(study, number).sop_uid):
            self.catalogue.instances.seen_again(image(study, number).sop_uid, purpose=purpose, calling_ae=ae, now=self.now)
            return False
        return self.catalogue.instances.note(image(study, number), purpose=purpose, calling_ae=ae, locked=locked, now=self.now)

    def hold(self, study: str = "1", number: int = 1, reason: Hold = Hold.MODALITY, **other: object) -> None:
        self.catalogue.instances.hold(held(study, number, reason, **other), now=self.now)

    def study(self, uid: str = "1") -> Study:
        found = self.catalogue.studies.get(uid)
        assert found is not None
        return found

    def state(self, uid: str = "1") -> StudyState:
        return self.study(uid).state

    def complete(self) -> int:
        return len(self.catalogue.studies.complete_due(quiet_s=QUIET_S, max_wait_s=MAX_WAIT_S, now=self.now))

    def expire(self) -> int:
        return len(self.catalogue.studies.expire_due(answer_within_h=WITHIN_H, now=self.now))

    def claim(self) -> Study | None:
        return self.catalogue.studies.claim(claim_s=CLAIM_S, now=self.now)

    def put(self, study: str = "1", *, model: str = "v1", to: Sequence[str] = ("main",), settings: str = "s") -> Result:
        content = self.catalogue.studies.content(study)
        return self.catalogue.results.put(
            study, findings(study, model), content_digest=content, settings_digest=settings, destinations=to, now=self.now
        )

    def open(self, *, answers_on: bool = True) -> int:
        return self.catalogue.deliveries.open_due(answers_on=answers_on, now=self.now)

    def take(self, *destinations: str) -> Delivery | None:
        return self.catalogue.deliveries.claim(claim_s=CLAIM_S, now=self.now, destinations=destinations or None)

    def send(self, delivery: Delivery, *, tone: str = "") -> Document:
        """Stamp and send as the replier does."""
        while True:
            built = document(delivery, tone=tone)
            delivery = self.catalogue.deliveries.stamp(delivery.id, built, now=self.now)
            if delivery.document == built:
                break
        self.catalogue.deliveries.sent(delivery.id, now=self.now)
        return built

    def answer(self, study: str = "1", *, model: str = "v1", to: Sequence[str] = ("main",)) -> Result:
        """Bring a study that has its images all the way to `delivered`."""
        self.later(seconds=QUIET_S)
        self.complete()
        claimed = self.claim()
        assert claimed is not None
        assert claimed.uid == study
        result = self.put(study, model=model, to=to)
        self.open()
        while delivery := self.take():
            self.send(delivery)
        return result
