"""The words of the storeroom: what crosses from room to room, and the states things are in.

Frozen records whose constructors refuse what is invalid. `uid`, `pid` are pseudonymous; `original_…` is the hospital's own.
Times are aware datetimes in UTC unless a name says otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class Purpose(StrEnum):
    """Why a study was sent here."""

    ANSWER = "answer"
    """To be classified and answered with an SR."""
    LEARN = "learn"
    """To be learned from; never answered."""


class StudyState(StrEnum):
    """Where a study stands (docs/design.md, section 6)."""

    RECEIVING = "receiving"
    """Images may still come."""
    COMPLETE = "complete"
    """Quiet for long enough; to be classified."""
    INFERRING = "inferring"
    """A replier holds it, until a deadline."""
    INFERRED = "inferred"
    """Classified; answers are switched off or not yet written to the delivery queue."""
    DELIVERING = "delivering"
    """The result is on its way to at least one destination."""
    DELIVERED = "delivered"
    """Every destination has the result (or none is to have one)."""
    LEARNED = "learned"
    """Complete, with purpose learn."""
    WAITING = "waiting"
    """Complete, but no model is in service."""
    EXPIRED = "expired"
    """Unanswered for longer than `answer_within_h`; answered only by hand."""
    FAILED = "failed"
    """A step failed; the reason and the next attempt stand beside it."""
    QUARANTINED = "quarantined"
    """Every instance is in the quarantine."""
    REMOVED = "removed"
    """Kept for as long as `[storage.keep_days]` says; images and identity are gone, results and labels stay."""


class DeliveryState(StrEnum):
    """Where one result stands with one destination."""

    PENDING = "pending"
    """To be sent when its next attempt is due."""
    SENT = "sent"
    """The destination answered success or a warning."""
    HELD = "held"
    """The destination names another patient for this study; a person decides."""
    DEAD = "dead"
    """Given up; `osteon delivery retry` starts again."""


class Hold(StrEnum):
    """Why an instance is in the quarantine."""

    MODALITY = "modality"
    """Not CR or DX."""
    BURNED_IN = "burned-in annotation"
    """BurnedInAnnotation is YES."""
    SECONDARY = "secondary image"
    """ImageType says SECONDARY, or a screen capture."""
    DIGITISED = "digitised film"
    """The image comes from a film digitiser."""
    PATIENT_ID = "no usable PatientID"
    """Empty, a placeholder, or over-long: hashing it would melt patients together."""
    PATIENT_CONFLICT = "another patient in this study"
    """Disagrees with the study's earlier instances in PatientID and issuer, or in birth date and sex."""
    PIXEL_CONFLICT = "other pixels under a known UID"
    """Same SOP Instance UID and syntax, other pixels."""
    MALFORMED = "malformed"
    """The data set cannot be parsed or lacks its UIDs."""


class Abstention(StrEnum):
    """Why a study has no class (docs/conformance.md gives the codes)."""

    ADULT = "adult"
    AGE_UNKNOWN = "age unknown"
    MODALITY = "modality"
    BODY_PART = "body part"
    UNREADABLE = "unreadable"
    OUT_OF_DISTRIBUTION = "out of distribution"
    TOO_FEW_VIEWS = "too few views"
    AMBIGUOUS = "ambiguous"


@dataclass(frozen=True, slots=True)
class RawElement:
    """One element as it came: tag, VR and the bytes of its value, padding included."""

    tag: int
    vr: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Identity:
    """Who an instance is, in the hospital's own words. Never leaves the vault, the intake and the report."""

    pid: str
    study_uid: str
    series_uid: str
    sop_uid: str
    sop_class_uid: str
    original_study_uid: str
    original_series_uid: str
    original_sop_uid: str
    character_set: RawElement | None
    """SpecificCharacterSet as it came, None when absent."""
    patient: tuple[RawElement, ...]
    """PatientName, PatientID, IssuerOfPatientID, PatientBirthDate, PatientSex: those present, as they came."""
    study: tuple[RawElement, ...]
    """StudyID, StudyDate, StudyTime, AccessionNumber, StudyDescription, ReferringPhysicianName: those present."""
    birth_date: str
    """Decoded and trimmed, empty when absent: for the comparison of instances only."""
    sex: str
    """Decoded and trimmed, empty when absent: for the comparison of instances only."""


@dataclass(frozen=True, slots=True)
class StudyIdentity:
    """Whose study it is and what the hospital calls it, as the SR states it. Never leaves the vault and the report."""

    pid: str
    study_uid: str
    original_study_uid: str
    character_set: RawElement | None
    """SpecificCharacterSet in which `patient` and `study` are to be read."""
    patient: tuple[RawElement, ...]
    """As in `Identity`, by the newest acknowledged instance."""
    study: tuple[RawElement, ...]
    """As in `Identity`, by the first acknowledged instance."""


@dataclass(frozen=True, slots=True)
class Person:
    """One person under several pseudonyms, because the hospital merged patients."""

    survivor: str
    """The pseudonym under which the person counts: that of the PatientID that remains."""
    pseudonyms: frozenset[str]
    """All of them, the surviving one among them."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One pseudonymised image of the archive, as the catalogue knows it."""

    sop_uid: str
    series_uid: str
    study_uid: str
    pid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: str
    """Relative to the archive's folder; made of pseudonymous UIDs only."""
    header_digest: str
    """SHA-256 of the pseudonymised data set without pixels, independent of the transfer syntax."""
    pixel_digest: str
    """SHA-256 of the pixel bytes as stored."""
    modality: str
    body_part: str
    """Coded term of the vocabulary, empty when absent or unknown."""
    age_years: int | None
    """Completed years at the study, from the original dates; None when unknown."""
    sex: str
    """M, F, O or empty."""
    device: str
    """Keyed pseudonym of the unit."""
    accession_key: str
    """Keyed hash of issuer and accession number, empty when there is none."""
    study_id_key: str
    pixels_checked: bool = False
    """Whether the pixels were searched for text. No version does so yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingImage(Instance):
    """An image of the archive as the trainer sees it."""

    locked: bool
    """Its patient is set aside for evaluation: it must not train, tune or calibrate anything."""
    purpose: Purpose
    """Of its study."""
    person: str
    """The pseudonym under which its patient counts: merged patients are one person, and stay on one side of every division."""

    @property
    def dated_as(self) -> str:
        """Name the pseudonym by whose offset its dates are shifted: that under which it was filed, whatever came later."""
        return self.path.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Held:
    """One instance of the quarantine: what may be said of it in clear."""

    id: str
    """A keyed hash of the object and the reason, so that the same object is held once; also the name of the sealed file."""
    reason: Hold
    detail: str
    """A sentence without an identity."""
    modality: str
    """CS value when it is one of the standard's, else empty."""
    sop_class_uid: str
    study_uid: str
    """Pseudonymous; empty when the study cannot be told."""
    sop_uid: str
    """Pseudonymous; empty when it cannot be told."""
    pid: str
    """Pseudonymous; empty when it cannot be told."""
    calling_ae: str
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class Study:
    """A study as the catalogue knows it."""

    uid: str
    pid: str
    state: StudyState
    purpose: Purpose
    calling_ae: str
    first_at: datetime
    last_at: datetime
    """When the newest instance came, or when a person asked for an answer."""
    instances: int
    late: bool
    """An image came after the study was classified; it leads to another result."""
    attempts: int
    next_attempt_at: datetime | None
    claimed_until: datetime | None
    reason: str
    """Why it failed, expired or is in the quarantine, in a sentence without an identity."""
    locked: bool
    """Its patient is in the locked set."""


@dataclass(frozen=True, slots=True)
class CodedConcept:
    """A code of the standard's triple: value, scheme designator, meaning (PS3.3 table 8.8-1)."""

    value: str
    scheme: str
    meaning: str

    def __post_init__(self) -> None:
        if not (0 < len(self.value) <= 16 and 0 < len(self.scheme) <= 16 and 0 < len(self.meaning) <= 64):
            raise ValueError("a code needs a value and a scheme of 1 to 16 characters and a meaning of 1 to 64")


@dataclass(frozen=True, slots=True)
class ImageFinding:
    """What the model said of one image, or why it said nothing."""

    sop_uid: str
    modality: str
    logits: tuple[float, ...] | None
    """Calibrated, one a class; None when the image was not scored."""
    abstention: Abstention | None = None


@dataclass(frozen=True, slots=True)
class Findings:
    """What is said of one study: class probabilities, or a coded abstention. Holds no identity."""

    study_uid: str
    model_id: str
    """Version of the registry."""
    model_name: str
    """Algorithm Name (111001, DCM) of the SR."""
    weights_sha256: str
    classes: tuple[CodedConcept, ...]
    """The class codes, in the order of `probabilities`."""
    probability_names: tuple[CodedConcept, ...]
    """The private codes "AI probability of …", in the same order."""
    probabilities: tuple[float, ...] | None
    """0…1, summing to 1; None for an abstention."""
    chosen: int | None
    """Index of the class said; None for an abstention."""
    abstention: Abstention | None
    images: tuple[ImageFinding, ...]
    """Every image looked at, sorted by UID."""
    rule: str
    """How several images make one value, in words."""
    parameters: tuple[str, ...]
    """Algorithm Parameters (111002, DCM): threshold, weights hash, calibration, provider, each up to 1024 characters."""
    training_mix: str
    """The class mix of the training data, as "n/n"."""
    in_corpus: bool
    """The patient is in the frozen corpus of the model."""
    body_part: str
    """Vocabulary term, empty when not stated."""
    degraded: str = ""
    """What differs from the settings (for example CPU instead of CUDA), empty when nothing does."""

    def __post_init__(self) -> None:
        said = self.probabilities is not None and self.chosen is not None
        if said == (self.abstention is not None):
            raise ValueError("findings are either probabilities with a class, or an abstention")
        if self.probabilities is not None and len(self.probabilities) != len(self.classes):
            raise ValueError("one probability a class")

    def to_json(self) -> str:
        """Write the findings as canonical JSON: the same findings give the same text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Findings:
        """Read back what `to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        raw["classes"] = tuple(CodedConcept(**code) for code in raw["classes"])
        raw["probability_names"] = tuple(CodedConcept(**code) for code in raw["probability_names"])
        raw["probabilities"] = None if raw["probabilities"] is None else tuple(raw["probabilities"])
        raw["abstention"] = None if raw["abstention"] is None else Abstention(raw["abstention"])
        raw["images"] = tuple(
            ImageFinding(
                sop_uid=image["sop_uid"],
                modality=image["modality"],
                logits=None if image["logits"] is None else tuple(image["logits"]),
                abstention=None if image["abstention"] is None else Abstention(image["abstention"]),
            )
            for image in raw["images"]
        )
        raw["parameters"] = tuple(raw["parameters"])
        return cls(**raw)


@dataclass(frozen=True, slots=True)
class Result:
    """Findings of one study as they were first written."""

    id: int
    study_uid: str
    model_id: str
    content_digest: str
    """SHA-256 over the sorted UIDs of the images and held instances that made the study when it was classified."""
    settings_digest: str
    findings: Findings
    created_at: datetime
    """When the findings were first written; the SR's content time, whatever is repeated."""
    run: int
    """1 for the first result of the study, 2 for the next, …"""
    predecessor: int | None
    """Id of the result this one supersedes."""


@dataclass(frozen=True, slots=True)
class Document:
    """An SR that was built for one destination."""

    sop_class_uid: str
    sop_uid: str
    series_uid: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """One result on its way to one destination."""

    id: int
    result_id: int
    study_uid: str
    destination: str
    """`[[pacs]] name`."""
    state: DeliveryState
    attempts: int
    created_at: datetime
    next_attempt_at: datetime | None
    claimed_until: datetime | None
    reason: str
    document: Document | None
    """What was (or is about to be) sent; written before the first byte leaves."""
    edition: int
    """Counts the times the rebuilt document differed from the one stored; enters the UIDs."""
    sent_at: datetime | None


@dataclass(frozen=True, slots=True)
class Label:
    """One label of a study or an image (docs/design.md, promise 14)."""

    pid: str
    study_uid: str
    sop_uid: str
    """Empty: the label is the study's."""
    label: str
    reader: str
    labelled_on: str
    """ISO date."""
    confirmed_by: str
    """histology, culture, follow-up or opinion."""
    first_treatment_on: str = ""
    """ISO date shifted by the patient's offset, as the archive's dates are; empty when unknown."""


@dataclass(frozen=True, slots=True)
class Role:
    """The last sign of life of a process."""

    name: str
    host: str
    pid: int
    seen_at: datetime
    told: Mapping[str, object] = field(default_factory=dict)
    """What it says of itself: model, provider, degraded, last error."""


class RunState(StrEnum):
    """Where a training run stands (docs/design.md, section 6)."""

    QUEUED = "queued"
    """To be started when its device set is free and nothing forbids it."""
    RUNNING = "running"
    """A trainer works on it, or is just being started."""
    CANCELLING = "cancelling"
    """A person has cancelled it; its trainer finishes an epoch and ends."""
    DONE = "done"
    """It came to a decision of the gate."""
    FAILED = "failed"
    """It would fail the same way again, or failed too often; the reason stands beside it."""
    CANCELLED = "cancelled"
    """A person wanted it no more; `osteon train resume` queues it again."""
    INTERRUPTED = "interrupted"
    """Started by hand and stopped or killed; `osteon train resume` queues it."""


class Origin(StrEnum):
    """Who wants a run, and hence what it waits for."""

    SCHEDULE = "schedule"
    """A due time: it waits for quiet hours and a paused schedule."""
    PERSON = "person"
    """A person queued it: it waits for its device set alone."""
    TERMINAL = "terminal"
    """A person started it in the foreground: nobody else goes on with it."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A process that works on a run; it is named so that another process with the same number is not taken for it."""

    host: str
    pid: int
    born: str
    """The boot of the machine, and the moment of the process's start within it."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training run, as the index knows it."""

    id: int
    kind: str
    recipe: str
    schedule: str
    """Name in the settings; empty when a person started it."""
    origin: Origin
    state: RunState
    state_at: datetime
    due_at: datetime | None
    """When its schedule wanted it, once for schedule and kind; None when a person started it."""
    folder: str
    """Empty before its first start."""
    started_at: datetime | None
    """First start."""
    finished_at: datetime | None
    tries: int
    """Counts the starts; a trainer whose number is another has lost the run."""
    losses: int
    """Counts the starts that did not end in good order since a person last asked for it."""
    next_attempt_at: datetime | None
    devices: str | None
    """The device set it occupies, None when it occupies none."""
    leased_until: datetime | None
    host: str
    worker: Worker | None
    """None before the trainer has named itself, and when none works on it."""
    reason: str
    """Why it is in this state, in a sentence."""
    model_id: str
    """Version that it registered, empty when none."""
    decision: str
    """Of the gate, empty when it did not come so far."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What a schedule of the settings came to, as the catalogue keeps it."""

    name: str
    definition: str
    """Rhythm, zone, kind and recipe as JSON: a schedule with another name and the same definition was renamed."""
    since: datetime
    """When this definition was first seen; periods count from here."""
    considered_at: datetime
    """The newest due time that was dealt with: queued, passed over, or before its time."""
    next_at: datetime | None
    """The next due time, None while no scheduler runs it."""
    zone: str
    said: str
    """What became of the newest due time, in a sentence."""
    said_at: datetime | None


@dataclass(frozen=True, slots=True)
class Act:
    """Something a person did."""

    at: datetime
    by: str
    what: str
    subject: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReceptionFigures:
    """What reception has brought so far."""

    images: int
    """In the archive."""
    held: Mapping[Hold, int]
    """In the quarantine, by reason."""


@dataclass(frozen=True, slots=True)
class DeliveryFigures:
    """The results of one state with one destination."""

    destination: str
    state: DeliveryState
    count: int
    last_sent_at: datetime | None


@dataclass(frozen=True, slots=True)
class RunFigures:
    """A training run in words that can be counted."""

    kind: str
    state: RunState
    decision: str
    started_at: datetime
    finished_at: datetime | None


LAST_BACKUP = "last_backup"
"""The flag that tells when the newest whole backup was made, and its size: `<ISO time> <bytes>`."""


@dataclass(frozen=True, slots=True)
class TrainingFigures:
    """Where training stands."""

    runs: Mapping[tuple[str, RunState], int]
    """How many runs of each kind are in each state."""
    last_runs: tuple[RunFigures, ...]
    """The newest run of each kind that was begun."""
    next_at: Mapping[str, datetime]
    """When each schedule is due next; one that no scheduler runs is not in it."""


@dataclass(frozen=True, slots=True)
class AnswerFigures:
    """Where studies, deliveries and runs stand at one moment."""

    studies: Mapping[StudyState, int]
    oldest_age_s: float
    """Since the last image or request of the study that waits longest for its answer; 0 when none waits."""
    deliveries: tuple[DeliveryFigures, ...]
    paused: bool
    """A person has switched answers off."""
    backup_at: datetime | None
    """When the newest whole backup was made."""
    training: TrainingFigures
