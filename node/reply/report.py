"""(findings, identity) -> DICOM SR: the one place where a result and a patient's identity meet.

In: findings under pseudonyms, the stored result, the identity as the vault keeps it. Out: one Part 10 document, complete in
memory, and what identifies it. Pure: no clock, no disk, no network; the same input gives the same bytes.

The identity elements never pass through a decoder: highdicom builds the tree over an empty patient header, and VR, bytes and
character set of the original are put beside it when the data set is encoded. Everything the node itself says is ASCII, which
is the same bytes in every character set of DICOM.

What must never happen here: a pseudonymous UID or a de-identification marker in the document; other bytes under a UID that
was used before; a class without the notice before it.

Private codes
-------------
Coding scheme designator 99OSTEON ("Osteon private codes"), declared in the Coding Scheme Identification Sequence:

============== ==================================== =======================================================
code           meaning                              used as
============== ==================================== =======================================================
AI-CLASS       AI classification (research)         name of the CODE item that says the class
AI-REASON      Reason for no classification         name of the CODE item that says why there is no class
NOT-APPLICABLE Not applicable                       value of AI-CLASS: the model was not applied
R-ADULT        Patient is 18 years or older         value of AI-REASON
R-AGE-UNKNOWN  Age of the patient is unknown        value of AI-REASON
R-MODALITY     Not a plain radiograph (CR or DX)    value of AI-REASON
R-BODY-PART    Body part the model was not made for value of AI-REASON
R-UNREADABLE   Image cannot be read                 value of AI-REASON
R-OUT-OF-DIST  Image unlike the training images     value of AI-REASON
R-FEW-VIEWS    Too few views                        value of AI-REASON
R-AMBIGUOUS    No class is clearly more probable    value of AI-REASON
============== ==================================== =======================================================

A class that the model weighed but could not say (the last three) is (82334004, SCT, "Indeterminate"). The codes of the classes
and the names of their probabilities are the model's: they stand in its card.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo

import highdicom.sr as hd
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element, write_file_meta_info
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from models.errors import Final
from node import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from node.keep.records import (
    Abstention,
    CodedConcept,
    Document,
    Findings,
    Identity,
    ImageFinding,
    RawElement,
    Result,
    StudyIdentity,
)
from node.pseudonym import SiteKeys
from node.settings import Inference, Report

SOP_CLASSES = (Comprehensive3DSRStorage, ComprehensiveSRStorage, EnhancedSRStorage)
"""What one tree is legal as; the first that the destination accepts is sent."""
_NO_UID = "2.25.0"
"""Stands in a document's own places until its UIDs are known."""

_BUILDERS = {
    Comprehensive3DSRStorage: hd.Comprehensive3DSR,
    ComprehensiveSRStorage: hd.ComprehensiveSR,
    EnhancedSRStorage: hd.EnhancedSR,
}


def _dcm(value: str, meaning: str) -> CodedConcept:
    return CodedConcept(value, "DCM", meaning)


def _sct(value: str, meaning: str) -> CodedConcept:
    return CodedConcept(value, "SCT", meaning)


PRIVATE_SCHEME = "99OSTEON"
AI_CLASSIFICATION = CodedConcept("AI-CLASS", PRIVATE_SCHEME, "AI classification (research)")
NO_CLASS_REASON = CodedConcept("AI-REASON", PRIVATE_SCHEME, "Reason for no classification")
NOT_APPLICABLE = CodedConcept("NOT-APPLICABLE", PRIVATE_SCHEME, "Not applicable")
INDETERMINATE = _sct("82334004", "Indeterminate")


@dataclass(frozen=True, slots=True)
class _Reason:
    """How one kind of abstention is said."""

    code: CodedConcept
    classification: CodedConcept
    sentence: str


def _reason(value: str, meaning: str, classification: CodedConcept, sentence: str) -> _Reason:
    return _Reason(CodedConcept(value, PRIVATE_SCHEME, meaning), classification, sentence)


REASONS = {
    Abstention.ADULT: _reason(
        "R-ADULT",
        "Patient is 18 years or older",
        NOT_APPLICABLE,
        "The model was not applied: the patient was 18 years or older at the time of the study.",
    ),
    Abstention.AGE_UNKNOWN: _reason(
        "R-AGE-UNKNOWN",
        "Age of the patient is unknown",
        NOT_APPLICABLE,
        "The model was not applied: the age of the patient at the time of the study cannot be told from the images.",
    ),
    Abstention.MODALITY: _reason(
        "R-MODALITY",
        "Not a plain radiograph (CR or DX)",
        NOT_APPLICABLE,
        "The model was not applied: the study holds no plain radiograph (CR or DX).",
    ),
    Abstention.BODY_PART: _reason(
        "R-BODY-PART",
        "Body part the model was not made for",
        NOT_APPLICABLE,
        "The model was not applied: the stated body part is not one it was made for.",
    ),
    Abstention.UNREADABLE: _reason(
        "R-UNREADABLE",
        "Image cannot be read",
        NOT_APPLICABLE,
        "The model was not applied: no image of the study can be read.",
    ),
    Abstention.OUT_OF_DISTRIBUTION: _reason(
        "R-OUT-OF-DIST",
        "Image unlike the training images",
        INDETERMINATE,
        "The model gives no class: the images are too unlike those it was trained on.",
    ),
    Abstention.TOO_FEW_VIEWS: _reason(
        "R-FEW-VIEWS",
        "Too few views",
        INDETERMINATE,
        "The model gives no class: the study has fewer views than it needs.",
    ),
    Abstention.AMBIGUOUS: _reason(
        "R-AMBIGUOUS",
        "No class is clearly more probable",
        INDETERMINATE,
        "The model gives no class: neither is clearly more probable than the other.",
    ),
}

PRIVATE_CODES = (AI_CLASSIFICATION, NO_CLASS_REASON, NOT_APPLICABLE, *(reason.code for reason in REASONS.values()))

TITLES = {
    "126000": _dcm("126000", "Imaging Measurement Report"),
    "126001": _dcm("126001", "Oncology Measurement Report"),
}

MODALITIES = {
    "CR": _dcm("CR", "Computed Radiography"),
    "DX": _dcm("DX", "Digital Radiography"),
    "MG": _dcm("MG", "Mammography"),
    "OT": _dcm("OT", "Other Modality"),
    "RF": _dcm("RF", "Radiofluoroscopy"),
    "XA": _dcm("XA", "X-Ray Angiography"),
}

_RESEARCH_ONLY = "FOR RESEARCH USE ONLY. NOT FOR DIAGNOSIS."
_VALUES_HOLD = (
    "Values hold only if the study shows a bone lesion and Ewing sarcoma or acute osteomyelitis is the question; they are "
    "relative to these two, at the class mix of the training data ({mix}). A normal or other finding is not recognised."
)

FINDING_SITES = {
    "ANKLE": _sct("70258002", "Ankle joint"),
    "ARM": _sct("40983000", "Upper arm"),
    "CALCANEUS": _sct("80144004", "Calcaneus"),
    "CLAVICLE": _sct("51299004", "Clavicle"),
    "ELBOW": _sct("16953009", "Elbow joint"),
    "EXTREMITY": _sct("66019005", "Extremity"),
    "FEMUR": _sct("71341001", "Femur"),
    "FIBULA": _sct("87342007", "Fibula"),
    "FINGER": _sct("7569003", "Finger"),
    "FOOT": _sct("56459004", "Foot"),
    "FOREARM": _sct("14975008", "Forearm"),
    "HAND": _sct("85562004", "Hand"),
    "HIP": _sct("29836001", "Hip"),
    "HIPJOINT": _sct("24136001", "Hip joint"),
    "HUMERUS": _sct("85050009", "Humerus"),
    "ILIUM": _sct("22356005", "Ilium"),
    "ISCHIUM": _sct("85710004", "Ischium"),
    "KNEE": _sct("72696002", "Knee"),
    "LEG": _sct("30021000", "Lower leg"),
    "LOWERLEG": _sct("30021000", "Lower leg"),
    "LOWERLIMB": _sct("61685007", "Lower limb"),
    "METACARPUS": _sct("36455000", "Metacarpal"),
    "PATELLA": _sct("64234005", "Patella"),
    "PELVIS": _sct("816092008", "Pelvis"),
    "RADIUS": _sct("62413002", "Radius"),  # the bone; 131190003 is the geometric length
    "RIB": _sct("113197003", "Rib"),
    "SACRUM": _sct("54735007", "Sacrum"),
    "SCAPULA": _sct("79601000", "Scapula"),
    "SSPINE": _sct("54735007", "Sacrum"),
    "SHOULDER": _sct("16982005", "Shoulder"),
    "SPINE": _sct("421060004", "Spine"),
    "TALUS": _sct("67453005", "Talus"),
    "THIGH": _sct("68367000", "Thigh"),
    "TIBIA": _sct("12611008", "Tibia"),
    "TIBIAFIBULA": _sct("110536004", "Tibia and fibula"),
    "TOE": _sct("29707007", "Toe"),
    "ULNA": _sct("23416004", "Ulna"),
    "UPPERARM": _sct("40983000", "Upper arm"),
    "UPPERLIMB": _sct("53120007", "Upper limb"),
    "WRIST": _sct("74670003", "Wrist joint"),
}
"""Body part term of the vocabulary (without separators) -> anatomic code of the Finding Site."""


class Unreportable(Final):
    """The findings hold something that an SR cannot say."""


@dataclass(frozen=True, slots=True)
class NodeName:
    """The node as the author of a document."""

    ae_title: str
    device_uid: str
    """One fixed UID per installation; by it the node recognises its own documents."""
    manufacturer: str
    model_name: str
    software_version: str
    serial: str

    @classmethod
    def of(cls, ae_title: str, *, keys: SiteKeys, version: str) -> NodeName:
        """Name the installation that holds `keys`."""
        uid = keys.report_uid("device")
        return cls(
            ae_title=ae_title.strip(),
            device_uid=uid,
            manufacturer="Osteon",
            model_name="Osteon",
            software_version=version,
            serial=hashlib.sha256(uid.encode()).hexdigest()[:16],
        )


@dataclass(frozen=True, slots=True)
class Built:
    """One document, ready to be sent."""

    bytes: builtins.bytes
    """A Part 10 file in Explicit VR Little Endian."""
    implicit: builtins.bytes
    """The same data set as a Part 10 file in Implicit VR Little Endian, for a destination that takes no other."""
    document: Document
    """What identifies `bytes`."""


def settings_digest(report: Report, inference: Inference) -> str:
    """Digest the settings that decide what an answer says and whether one is given; another digest is another answer."""
    said = {"report": report.model_dump(), "answer_not_applicable": inference.answer_not_applicable}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def build(
    findings: Findings,
    *,
    result: Result,
    study: StudyIdentity,
    images: Sequence[Identity],
    node: NodeName,
    settings: Report,
    sop_class_uid: str,
    keys: SiteKeys,
    edition: int = 0,
    predecessors: Sequence[Document] = (),
    zone: tzinfo | None = None,
) -> Built:
    """Build the SR of one result in the original study, under the original identity.

    Parameters
    ----------
    result
        The findings as they were first written: its time is every time in the document.
    images
        The identities of the images that were looked at; each is referenced under its original UIDs.
    sop_class_uid
        One of `SOP_CLASSES`, as negotiated.
    edition
        Counts the rebuilds that came out different; a new edition has new UIDs.
    predecessors
        Documents of the same study that this one supersedes at the destination.
    zone
        Time zone of the document's times, default the machine's.

    Raises
    ------
    Unreportable
        No image can be referenced, or a text that the node says is not ASCII.
    """
    sources = sorted(images, key=lambda image: image.original_sop_uid)
    if not sources:
        raise Unreportable("no image of the study can be referenced; an SR needs at least one")
    created = result.created_at.astimezone(zone).replace(microsecond=0)
    scored = {image.sop_uid: image for image in findings.images}
    original = [*study.patient, *study.study, *([study.character_set] if study.character_set else [])]

    def document(series_uid: str, sop_uid: str, tracking_uid: str) -> Dataset:
        sr: Dataset = _BUILDERS[UID(sop_class_uid)](
            evidence=[_evidence(study, image) for image in sources],
            content=_tree(findings, sources, scored, node=node, settings=settings, tracking_uid=tracking_uid)[0],
            series_instance_uid=series_uid,
            series_number=settings.series_number + result.run - 1,
            sop_instance_uid=sop_uid,
            instance_number=1,
            manufacturer=node.manufacturer,
            manufacturer_model_name=node.model_name,
            device_serial_number=node.serial,
            software_versions=node.software_version,
            series_description=_series_description(findings, settings, created),
            content_date=created.date(),
            content_time=created.time(),
            content_qualification="RESEARCH",
            is_complete=True,
            is_final=False,
            is_verified=False,
            coding_schemes=_declared_schemes(findings),
            previous_versions=[_predecessor(study, old) for old in predecessors] or None,
        )
        _set_clocks(sr, created)
        for item in _items(sr):
            if item.ValueType == "CONTAINER":
                item.ContinuityOfContent = "SEPARATE"
        _refuse_non_ascii(sr)
        return sr

    # Built once without its UIDs: they are made of all its bytes, also of those that the node does not remember having sent
    # (its time, its demographics, the libraries' part): a site that was restored from a backup has forgotten what left since.
    nameless = _part10(document(*[_NO_UID] * 3), original, ExplicitVRLittleEndian)
    derived = hashlib.sha256(nameless).hexdigest(), findings.digest, result.settings_digest, f"edition {edition}"
    series_uid, sop_uid, tracking_uid = (keys.report_uid(kind, *derived) for kind in ("series", "instance", "tracking"))
    sr = document(series_uid, sop_uid, tracking_uid)
    explicit = _part10(sr, original, ExplicitVRLittleEndian)
    return Built(
        bytes=explicit,
        implicit=_part10(sr, original, ImplicitVRLittleEndian),
        document=Document(
            sop_class_uid=sop_class_uid, sop_uid=sop_uid, series_uid=series_uid, sha256=hashlib.sha256(explicit).hexdigest()
        ),
    )


# --- what the document says ------------------------------------------------------------------------------------------------


def _tree(
    findings: Findings,
    sources: Sequence[Identity],
    scored: dict[str, ImageFinding],
    *,
    node: NodeName,
    settings: Report,
    tracking_uid: str,
) -> hd.MeasurementReport:
    """Write the content tree: TID 1500 with an image library and one measurement group (TID 1501)."""
    device = hd.DeviceObserverIdentifyingAttributes(
        uid=node.device_uid,
        name=node.ae_title,
        manufacturer_name=node.manufacturer,
        model_name=node.model_name,
        serial_number=node.serial,
    )
    observer = hd.ObserverContext(observer_type=_code(_dcm("121007", "Device")), observer_identifying_attributes=device)
    report = hd.MeasurementReport(
        observation_context=hd.ObservationContext(observer_device_context=observer),
        procedure_reported=_code(_sct("363679005", "Imaging procedure")),  # plain radiography is not in CID 100
        imaging_measurements=[_measurement_group(findings, sources, scored, tracking_uid)],
        title=_code(TITLES[settings.document_title]),
    )
    content = report[0].ContentSequence
    content.insert(len(content) - 1, _image_library(sources, scored))
    return report


def _image_library(sources: Sequence[Identity], scored: dict[str, ImageFinding]) -> hd.ContainerContentItem:
    """List every image looked at; by hand, because highdicom's own wants what a CR may lack."""
    library = hd.ContainerContentItem(name=_code(_dcm("111028", "Image Library")), relationship_type="CONTAINS")
    group = hd.ContainerContentItem(name=_code(_dcm("126200", "Image Library Group")), relationship_type="CONTAINS")
    group.ContentSequence = hd.ContentSequence()
    for source in sources:
        image = hd.ImageContentItem(
            name=_code(_sct("260753009", "Source")),
            referenced_sop_class_uid=source.sop_class_uid,
            referenced_sop_instance_uid=source.original_sop_uid,
            relationship_type="CONTAINS",
        )
        said = scored.get(source.sop_uid)
        if said is not None and said.modality in MODALITIES:
            modality = hd.CodeContentItem(
                name=_code(_dcm("121139", "Modality")),
                value=_code(MODALITIES[said.modality]),
                relationship_type="HAS ACQ CONTEXT",
            )
            image.ContentSequence = hd.ContentSequence([modality])
        group.ContentSequence.append(image)
    library.ContentSequence = hd.ContentSequence([group])
    return library


def _measurement_group(
    findings: Findings, sources: Sequence[Identity], scored: dict[str, ImageFinding], tracking_uid: str
) -> hd.MeasurementsAndQualitativeEvaluations:
    """Say the findings: the notice first, then the values or the reason why there are none."""
    site = FINDING_SITES.get("".join(filter(str.isalnum, findings.body_part.upper())))
    used = [source for source in sources if _contributed(scored.get(source.sop_uid))] if findings.abstention is None else sources
    group = hd.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.TrackingIdentifier(uid=tracking_uid, identifier=f"Osteon {findings.model_id}"),
        algorithm_id=hd.AlgorithmIdentification(
            name=findings.model_name,
            version=findings.model_id,
            parameters=_parameters(findings),
            family=_code(_dcm("123110", "Artificial Intelligence")),
        ),
        finding_sites=[hd.FindingSite(anatomic_location=_code(site))] if site else None,
        measurements=[
            hd.Measurement(name=_code(name), value=percent, unit=_code(CodedConcept("%", "UCUM", "Percent")))
            for name, percent in zip(findings.probability_names, percentages(findings.probabilities or ()), strict=False)
        ],
        qualitative_evaluations=[
            hd.QualitativeEvaluation(_code(name), _code(value)) for name, value in _classification(findings)
        ],
        source_images=[hd.SourceImageForMeasurementGroup(source.sop_class_uid, source.original_sop_uid) for source in used],
    )
    notice = hd.TextContentItem(name=_code(_dcm("121106", "Comment")), value=comment(findings), relationship_type="CONTAINS")
    group[0].ContentSequence.insert(0, notice)  # highdicom has no argument for it; a viewer must show it before any value
    return group


def _contributed(image: ImageFinding | None) -> bool:
    return image is not None and image.logits is not None


def _classification(findings: Findings) -> list[tuple[CodedConcept, CodedConcept]]:
    """Give the coded statements: the class, or that there is none and why."""
    if findings.abstention is not None:
        reason = REASONS[findings.abstention]
        return [(AI_CLASSIFICATION, reason.classification), (NO_CLASS_REASON, reason.code)]
    assert findings.chosen is not None  # noqa: S101 - Findings refuses anything else
    return [(AI_CLASSIFICATION, findings.classes[findings.chosen])]


def comment(findings: Findings) -> str:
    """Write the notice that stands before every value."""
    sentences = [_RESEARCH_ONLY]
    if findings.abstention is not None:
        sentences += [REASONS[findings.abstention].sentence, "This is not a negative finding."]
    else:
        sentences.append(_VALUES_HOLD.format(mix=findings.training_mix or "not stated"))
        unused = [image.abstention or Abstention.UNREADABLE for image in findings.images if not _contributed(image)]
        if unused:
            why = ", ".join(sorted({str(reason) for reason in unused}))
            sentences.append(f"{len(unused)} of {len(findings.images)} images did not enter the values ({why}).")
    if findings.in_corpus:
        sentences.append(
            "Images of this patient were among the training data of this model: the values are not independent of it."
        )
    if findings.degraded:
        sentences.append(f"The model ran otherwise than this site's settings ask for: {findings.degraded}.")
    return " ".join(sentences)


def _parameters(findings: Findings) -> list[str]:
    """List what the algorithm ran with; the hash of the weights is always among it."""
    parameters = list(findings.parameters)
    if not any(findings.weights_sha256 in parameter for parameter in parameters):
        parameters.append(f"Weights SHA-256: {findings.weights_sha256}")
    if findings.rule and findings.abstention is None:
        parameters.append(f"Combination of images: {findings.rule}")
    return parameters


def percentages(probabilities: Sequence[float]) -> list[float]:
    """Round probabilities to 0.1 % so that those that sum to 1 are shown as summing to 100.0 (largest remainder)."""
    if not probabilities:
        return []
    tenths = [1000 * probability / math.fsum(probabilities) for probability in probabilities]
    shown = [math.floor(value) for value in tenths]
    by_remainder = sorted(range(len(tenths)), key=lambda at: (shown[at] - tenths[at], at))
    for at in by_remainder[: 1000 - sum(shown)]:
        shown[at] += 1
    return [value / 10 for value in shown]


def _series_description(findings: Findings, settings: Report, created: datetime) -> str:
    """Say research, version and date in the 64 characters of an LO, so that a viewer's list tells results apart."""
    head = settings.series_description + (" NOT APPLICABLE" if findings.abstention is not None else "")
    date = f"{created:%Y%m%d}"
    room = 64 - len(head) - len(date) - 2
    return " ".join([head, findings.model_id[:room], date]) if room > 0 else f"{head} {date}"


def _declared_schemes(findings: Findings) -> list[CodingSchemeIdentificationItem]:
    """Declare every private coding scheme in use (PS3.3 C.12.1.1.7: designators that begin with 99)."""
    used = {code.scheme for code in (*findings.classes, *findings.probability_names) if code.scheme.startswith("99")}
    names = {PRIVATE_SCHEME: "Osteon private codes"}
    return [
        CodingSchemeIdentificationItem(
            designator=scheme,
            name=names.get(scheme, f"Codes of model {findings.model_name}"),
            responsible_organization="Osteon",
        )
        for scheme in sorted(used | {PRIVATE_SCHEME})
    ]


def _code(code: CodedConcept) -> hd.CodedConcept:
    return hd.CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)


# --- the header -------------------------------------------------------------------------------------------------------------


def _evidence(study: StudyIdentity, image: Identity) -> Dataset:
    """Make the little of an image's header that a reference needs, with an empty patient: highdicom copies what it is given."""
    header = Dataset()
    header.SOPClassUID = image.sop_class_uid
    header.SOPInstanceUID = image.original_sop_uid
    header.SeriesInstanceUID = image.original_series_uid
    header.StudyInstanceUID = study.original_study_uid
    for type_2 in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex"):
        setattr(header, type_2, "")
    for type_2 in ("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"):
        setattr(header, type_2, "")
    return header


def _predecessor(study: StudyIdentity, document: Document) -> Dataset:
    old = Dataset()
    old.SOPClassUID = document.sop_class_uid
    old.SOPInstanceUID = document.sop_uid
    old.SeriesInstanceUID = document.series_uid
    old.StudyInstanceUID = study.original_study_uid
    return old


def _set_clocks(sr: Dataset, created: datetime) -> None:
    """Replace each time that highdicom took from the clock by the stored one."""
    sr.InstanceCreationDate = f"{created:%Y%m%d}"
    sr.InstanceCreationTime = f"{created:%H%M%S}"
    sr.TimezoneOffsetFromUTC = f"{created:%z}"[:5]
    for equipment in sr.ContributingEquipmentSequence:
        equipment.ContributionDateTime = f"{created:%Y%m%d%H%M%S}{f'{created:%z}'[:5]}"


def _items(item: Dataset) -> Iterator[Dataset]:
    """Walk the content tree, the root first."""
    yield item
    for child in item.get("ContentSequence", []):
        yield from _items(child)


def _refuse_non_ascii(sr: Dataset) -> None:
    """Refuse a text of the node that the original's character set might not hold; it would become a question mark."""
    for element in sr.iterall():
        if isinstance(element.value, str) and not element.value.isascii():
            raise Unreportable(f"{element.keyword} is not ASCII; model names, codes and parameters must be")


# --- the bytes --------------------------------------------------------------------------------------------------------------


def _part10(sr: Dataset, original: Sequence[RawElement], transfer_syntax: UID) -> bytes:
    """Encode the document, with the identity elements as the bytes that came."""
    implicit = transfer_syntax.is_implicit_VR
    elements: dict[int, bytes] = {}
    for element in sr:
        written = _buffer(implicit=implicit)
        write_data_element(written, element)
        elements[element.tag] = written.getvalue()
    elements |= {raw.tag: _as_it_came(raw, implicit=implicit) for raw in original}

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(sr.SOPClassUID)
    meta.MediaStorageSOPInstanceUID = UID(sr.SOPInstanceUID)
    meta.TransferSyntaxUID = transfer_syntax
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    head = _buffer(implicit=False)
    write_file_meta_info(head, meta, enforce_standard=True)
    return bytes(128) + b"DICM" + head.getvalue() + b"".join(elements[tag] for tag in sorted(elements))


def _buffer(*, implicit: bool) -> DicomBytesIO:
    buffer = DicomBytesIO()
    buffer.is_little_endian = True
    buffer.is_implicit_VR = implicit
    return buffer


def _as_it_came(raw: RawElement, *, implicit: bool) -> bytes:
    """Encode one original element: its bytes are not touched, but for the padding that an odd length lacks (PS3.5 7.1.1)."""
    tag = Tag(raw.tag)
    value = raw.value + b" " * (len(raw.value) % 2)
    head = struct.pack("<HH", tag.group, tag.element)
    if implicit:
        return head + struct.pack("<I", len(value)) + value
    vr = dictionary_VR(tag) if raw.vr in ("", "UN") else raw.vr
    if len(value) > 0xFFFE:
        raise Unreportable(f"the original {tag} is longer than its VR allows")
    return head + vr.encode("ascii") + struct.pack("<H", len(value)) + value
