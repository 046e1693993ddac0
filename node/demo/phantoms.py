"""An invented cohort: phantom limb radiographs of children who do not exist, as valid CR and DX objects.

In: a folder and a seed. Out: Part 10 files as a hospital's units would make them (three scripts of names, six transfer
syntaxes, both polarities, 10 to 16 bits) and a label table under the hospital's identifiers; the same seed gives the same bytes.
The phantoms are plumbing, not medicine: the two classes differ in a texture that a small network can learn, while mean grey,
spread, age, sex, body part, unit and transfer syntax say nothing of the class, by construction. Nothing here may come from a
real patient.
"""

from __future__ import annotations

import csv
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from rle.utils import encode_pixel_data

Plane = NDArray[np.float32]

PATIENTS = 160
CLASSES = ("ewing_sarcoma", "acute_osteomyelitis")
"""Label names as the shipped recipes spell them."""
DEFAULT_ISSUER = "CHILDREN"
STRAY = 0.55
"""The largest share of the other class's pattern in a lesion: over a half, so that some images mislead."""


@dataclass(frozen=True, slots=True)
class PhantomPatient:
    """One invented child with one study."""

    patient_id: str
    issuer: str
    """Empty: the object states none, and the node's default issuer counts."""
    accession_number: str
    study_uid: str
    label: str
    age_years: int
    sex: str
    study_date: date
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Cohort:
    """What `cohort` made."""

    folder: Path
    patients: tuple[PhantomPatient, ...]
    labels: Path
    """CSV under hospital identifiers, for `osteon labels import`."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every image file, patient by patient."""
        return tuple(file for patient in self.patients for file in patient.files)


@dataclass(frozen=True, slots=True)
class _Part:
    """A body part as it is coded (PS3.16 annex L) and as it is drawn."""

    term: str
    code: str
    meaning: str
    bones: tuple[tuple[float, float, float], ...]
    """Offset from the axis, radius and end (1 at the joint, less before it) of each bone; the first has the lesion."""
    flesh: float
    """Half-width of the soft tissue."""


_PARTS = (
    _Part("LEG", "30021000", "Lower leg", ((-0.05, 0.105, 1.0), (0.17, 0.045, 0.97)), 0.36),
    _Part("THIGH", "68367000", "Thigh", ((0.0, 0.10, 1.0),), 0.50),
    _Part("FOREARM", "14975008", "Forearm", ((-0.08, 0.062, 1.0), (0.09, 0.055, 0.95)), 0.27),
    _Part("ARM", "40983000", "Upper arm", ((0.0, 0.085, 1.0),), 0.33),
)

_NAMES: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("ISO_IR 100",),
        ("Müller", "Núñez", "Søndergård", "Lefèvre", "Öztürk", "Straßer", "García", "Ó Briain"),
        ("Zoë", "Jürgen", "Inés", "Åse", "Hélène", "Noël", "Begüm", "Siân"),
    ),
    (
        ("", "ISO 2022 IR 87"),
        ("Yamada=山田=やまだ", "Suzuki=鈴木=すずき", "Tanaka=田中=たなか", "Kobayashi=小林=こばやし"),
        ("Tarou=太郎=たろう", "Hanako=花子=はなこ", "Makoto=誠=まこと", "Sakura=桜=さくら"),
    ),
    (
        ("ISO 2022 IR 13", "ISO 2022 IR 87"),
        ("ﾔﾏﾓﾄ=山本=やまもと", "ﾜﾀﾅﾍﾞ=渡辺=わたなべ", "ﾅｶﾑﾗ=中村=なかむら"),
        ("ｼﾞﾛｳ=次郎=じろう", "ﾐﾕｷ=美雪=みゆき", "ｱｵｲ=葵=あおい"),
    ),
    (
        ("GB18030",),
        ("Wang=王", "Zhang=张", "Ouyang=欧阳", "Chen=陈"),
        ("XiaoDong=小东", "Li=丽", "Wei=伟", "MeiLing=美玲"),
    ),
)
"""Character sets with family and given names; "=" separates the alphabetic, ideographic and phonetic group."""


@dataclass(frozen=True, slots=True)
class _Unit:
    """An invented X-ray unit and the way it stores images."""

    modality: str
    manufacturer: str
    model: str
    bits: int
    monochrome1: bool
    window: bool
    syntax: UID
    border: float
    """Attenuation shown outside the collimation: 1 is unexposed (white on a bone-white display), 0 a black shutter."""


_UNITS = (
    _Unit("DX", "SIEMENS", "Fluorospot Compact FD", 12, False, True, ExplicitVRLittleEndian, 0.0),
    _Unit("CR", "FUJI PHOTO FILM CO. LTD.", "IRS", 10, True, True, ImplicitVRLittleEndian, 1.0),
    _Unit("DX", "Philips Medical Systems", "DigitalDiagnost", 14, False, True, JPEG2000Lossless, 0.0),
    _Unit("CR", "Agfa", "ADC_51xx", 12, False, False, RLELossless, 0.95),
    _Unit("DX", "GE Healthcare", "Discovery XR656", 14, True, True, JPEGLosslessSV1, 0.05),
    _Unit("CR", "KODAK", "CR 975", 12, True, False, ExplicitVRLittleEndian, 0.9),
    _Unit("CR", "FUJI PHOTO FILM CO. LTD.", "IRS", 16, True, True, JPEGLSLossless, 0.9),
    _Unit("DX", "Canon Inc.", "CXDI", 12, False, True, ExplicitVRLittleEndian, 0.0),
)


def cohort(folder: Path, seed: int, *, patients: int = PATIENTS) -> Cohort:
    """Write the cohort into `folder`: half of the patients of each class, one or two images each, and `labels.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        made = tuple(pool.map(lambda number: _patient(folder, seed, number), range(patients)))
    labels = folder / "labels.csv"
    _write_labels(labels, made, seed)
    return Cohort(folder, made, labels)


def uid(*parts: object) -> str:
    """Give a UID derived from `parts`: the same parts, the same UID (PS3.5 B.2)."""
    return "2.25." + str(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:16], "big"))


def _patient(folder: Path, seed: int, number: int) -> PhantomPatient:
    """Draw and write one patient; only the class is not left to chance: every unit has as many of one as of the other."""
    label, unit = CLASSES[number % 2], _UNITS[number // 2 % len(_UNITS)]
    own = np.random.default_rng([seed, number])
    age, sex = int(own.integers(2, 18)), str(own.choice(["F", "M"]))
    part = _PARTS[int(own.integers(len(_PARTS)))]
    views = ("AP", "LATERAL")[: 1 + int(own.random() < 0.5)]
    study_date = date(2019, 1, 7) + timedelta(days=int(own.integers(0, 1800)))
    birthday = study_date.replace(year=study_date.year - age, day=min(study_date.day, 28)) - timedelta(
        days=int(own.integers(0, 360))
    )
    character_set, families, given = _NAMES[int(own.choice(4, p=[0.55, 0.2, 0.1, 0.15]))]
    name = "=".join(
        f"{family}^{first}"
        for family, first in zip(str(own.choice(families)).split("="), str(own.choice(given)).split("="), strict=True)
    )
    head = Dataset()
    head.SpecificCharacterSet = list(character_set) if len(character_set) > 1 else character_set[0]
    head.PatientName = name
    head.PatientID = f"{4_100_000 + 37 * number + int(own.integers(0, 37)):07d}"
    if issuer := ("" if own.random() < 0.6 else "KIDS-2"):
        head.IssuerOfPatientID = issuer
    head.PatientBirthDate = birthday.strftime("%Y%m%d")
    head.PatientSex = sex
    head.PatientAge = f"{age:03d}Y"
    head.StudyInstanceUID = uid(seed, number, "study")
    head.StudyDate = head.SeriesDate = head.AcquisitionDate = head.ContentDate = study_date.strftime("%Y%m%d")
    head.StudyTime = head.SeriesTime = head.AcquisitionTime = head.ContentTime = (
        f"{int(own.integers(7, 19)):02d}{int(own.integers(60)):02d}00"
    )
    head.AccessionNumber = f"A{study_date:%y}{number:05d}"
    head.StudyID = f"S{number:05d}"
    head.StudyDescription = f"{part.meaning} {len(views)} view"
    head.ReferringPhysicianName = "Invented^Referrer"
    head.InstitutionName = "Invented Children's Hospital"
    side = str(own.choice(["L", "R"]))
    files = []
    for index, view in enumerate(views):
        picture = _radiograph(np.random.default_rng([seed, number, 2, index]), part, label, age, unit.border, side)
        dataset = _object(head, unit, part, view, side, index + 1, picture, (seed, number))
        files.append(folder / f"{number:03d}-{index + 1}.dcm")
        dcmwrite(files[-1], dataset, enforce_file_format=True)
    return PhantomPatient(
        head.PatientID, issuer, head.AccessionNumber, head.StudyInstanceUID, label, age, sex, study_date, tuple(files)
    )


_COLUMNS = (
    "patient_id",
    "issuer",
    "study",
    "sop_instance_uid",
    "label",
    "reader",
    "labelled_on",
    "confirmed_by",
    "first_treatment_on",
)


def _write_labels(file: Path, patients: tuple[PhantomPatient, ...], seed: int) -> None:
    """Write the label table (docs/design.md, promise 14): most studies by accession number, some by UID."""
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(_COLUMNS)
        for number, patient in enumerate(patients):
            rng = np.random.default_rng([seed, number, 3])
            labelled = patient.study_date + timedelta(days=int(rng.integers(5, 60)))
            treated = patient.study_date + timedelta(days=int(rng.integers(3, 30))) if rng.random() < 0.5 else ""
            confirmed = "histology" if patient.label == CLASSES[0] else str(rng.choice(["culture", "histology", "follow-up"]))
            study = patient.study_uid if rng.random() < 0.2 else patient.accession_number
            table.writerow(
                [patient.patient_id, patient.issuer, study, "", patient.label, "invented reader", labelled, confirmed, treated]
            )


# ---- the picture -------------------------------------------------------------------------------------------------------------


def _smooth(edge0: float, edge1: float, x: Plane) -> Plane:
    """Rise smoothly from 0 at `edge0` to 1 at `edge1`."""
    t = np.clip((x - edge0) / (edge1 - edge0), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _noise(rng: np.random.Generator, shape: tuple[int, int], grain: tuple[float, float]) -> Plane:
    """Draw smooth noise of unit variance whose grain is so many pixels high and wide."""
    small = tuple(max(2, round(length / size)) for length, size in zip(shape, grain, strict=True))
    field = Image.fromarray(rng.standard_normal(small, np.float32))
    large = np.asarray(field.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
    return np.asarray(large / (large.std() + 1e-6), np.float32)


def _chord(x: Plane, radius: NDArray[np.floating[Any]] | float) -> Plane:
    """Length of the ray through a round body of `radius` at distance `x` from its axis."""
    return np.asarray(2 * np.sqrt(np.maximum(np.square(radius) - np.square(x), 0)), np.float32)


def _radiograph(rng: np.random.Generator, part: _Part, label: str, age: int, border: float, side: str) -> Plane:
    """Draw one limb as attenuation in 0…1 (1: white on a bone-white display), by rays through round bones in round flesh."""
    height, width = (
        int(rng.integers(280, 380)),
        int(rng.integers(256, 300)),
    )  # drawn at half size, then enlarged: four times faster
    zoom = (1.1 + 0.012 * age) * float(rng.uniform(0.92, 1.08))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = (y - height / 2) / (height / 2), (x - width / 2) / (height / 2)
    turn = float(rng.uniform(-0.16, 0.16))
    along = (x * np.sin(turn) + y * np.cos(turn)) / zoom  # -1 … 1 down the limb
    across = (x * np.cos(turn) - y * np.sin(turn) + float(rng.uniform(-0.08, 0.08))) / zoom
    across = across + float(rng.uniform(-0.05, 0.05)) * np.square(along)  # a slight bow
    if rng.random() < 0.5:
        across = -across
    if rng.random() < 0.5:
        along = -along
    joint = float(rng.uniform(0.52, 0.72))  # where the growth plate lies

    flesh = part.flesh * (1 - 0.22 * _smooth(0.0, 1.0, along) + 0.06 * np.cos(2.6 * along + float(rng.uniform(-1, 1))))
    attenuation = np.float32(0.75) * _chord(across, flesh) + 0.018 * _noise(rng, (height, width), (45, 15)) * (
        np.abs(across) < flesh
    )
    for index, (offset, radius, reach) in enumerate(part.bones):
        ends = joint * reach
        bone = _bone(rng, along, across - offset, radius * float(rng.uniform(0.9, 1.1)), ends, age)
        if index == 0:
            bone = bone + _lesion(rng, label, along, across - offset, radius, ends)
        attenuation = attenuation + bone
    attenuation = attenuation / np.float32(1.35)
    attenuation = attenuation + 0.05 * float(rng.uniform(0.3, 1)) * _smooth(-1, 1, x)  # heel effect and scatter
    large = Image.fromarray(attenuation).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    noisy = np.asarray(large) + np.float32(0.007) * rng.standard_normal((2 * height, 2 * width), np.float32)
    return np.clip(_collimate(rng, 0.06 + 0.86 * np.clip(noisy, 0, 1.05), border, side), 0, 1)


def _bone(rng: np.random.Generator, along: Plane, across: Plane, radius: float, ends: float, age: int) -> Plane:
    """Draw a long bone: a cortical tube that flares to a spongy metaphysis, growth plate, epiphysis and the next bone."""
    flare = _smooth(ends - 0.42, ends, along)
    outer = radius * (1 + 0.75 * np.square(flare) + 0.02 * np.sin(5 * along))
    wall = 0.42 - 0.34 * flare + 0.02 * float(rng.standard_normal())
    tube = _chord(across, outer) - _chord(across, outer * (1 - wall))
    spongy = _chord(across, outer * (1 - wall))
    grain = 1 + 0.10 * _noise(rng, along.shape, (7, 3)) * (0.3 + 0.7 * flare)
    gap = 0.012 + 0.014 * (17 - age) / 15  # the plate narrows with age
    shaft = (2.6 * tube + (0.5 + 0.75 * flare) * spongy * grain) * _smooth(ends + 0.006, ends - 0.006, along)
    cap = np.sqrt(np.maximum(1 - np.square((along - ends - gap - 0.07) / 0.075), 0)) * radius * 1.75
    epiphysis = 1.35 * _chord(across, cap) * grain * _smooth(ends + gap - 0.008, ends + gap + 0.006, along)
    far = ends + gap + 0.17
    end = radius * (1.75 - 0.5 * _smooth(far, far + 0.5, along)) * np.sqrt(_smooth(far - 0.01, far + 0.09, along))
    other = 1.3 * _chord(across, end) * grain
    return np.asarray(shaft + epiphysis + other, np.float32)


def _lesion(rng: np.random.Generator, label: str, along: Plane, across: Plane, radius: float, ends: float) -> Plane:
    """Draw what the classes differ in: the grain of the destroyed bone and the layers of the periosteum, zero in the mean.

    One class has fine, drawn-out holes and thin parallel layers, the other coarse round holes and one thick layer; each image
    mixes a share of the other's pattern in, so that no single image is a caricature. Size, place and strength are alike in both.
    """
    shape = along.shape
    centre, length = ends - float(rng.uniform(0.2, 0.5)), float(rng.uniform(0.24, 0.36))
    stray = STRAY * float(rng.random()) ** 1.5
    share = 1 - stray if label == CLASSES[0] else stray
    pixels = shape[0] / 640  # so many for what would be one of 640
    fine = _noise(rng, shape, (20 * pixels, 9 * pixels))
    coarse = _noise(rng, shape, (64 * pixels, 58 * pixels))
    holes = np.tanh(1.5 * (np.sqrt(share) * fine + np.sqrt(1 - share) * coarse))
    reach = np.exp(-np.square(np.square((along - centre) / length)))  # flat top, soft ends
    inside = reach * np.exp(-np.square(np.square(across / (radius * 1.25))))
    away = (np.abs(across) - radius * 1.12) / radius  # outside the cortex
    skin = reach * np.exp(-np.square(away / 0.45)) * (away > -0.25)
    wobble = 0.10 * _noise(rng, shape, (60 * pixels, 400 * pixels))
    layers = share * np.sin(2 * np.pi * (away + 0.4 * wobble) / 0.24) + (1 - share) * 1.3 * np.sin(
        2 * np.pi * (away + wobble) / 0.85
    )
    strength = float(rng.uniform(0.75, 1.25))
    drawn = strength * (0.085 * inside * (holes - 0.25) + 0.07 * skin * layers)
    extent = inside + skin
    drawn = drawn - extent * (drawn.sum() / extent.sum())
    rms = np.sqrt(np.square(drawn).sum() / extent.sum())
    return np.asarray(drawn * (0.11 * strength / rms), np.float32)


def _collimate(rng: np.random.Generator, picture: Plane, border: float, side: str) -> Plane:
    """Close the collimator around the limb and lay a lead side marker beside it."""
    tilt = float(rng.uniform(-0.03, 0.03))
    bottom, right = 1.0, picture.shape[1] / picture.shape[0]
    y = np.linspace(-bottom, bottom, picture.shape[0], dtype=np.float32)[:, None]
    x = np.linspace(-right, right, picture.shape[1], dtype=np.float32)[None, :]
    edges = [float(rng.uniform(0.86, 1.04)) for _ in range(4)]
    distance = np.minimum.reduce(
        [
            right * edges[0] - (x + tilt * y),
            right * edges[1] + (x + tilt * y),
            bottom * edges[2] - (y - tilt * x),
            bottom * edges[3] + (y - tilt * x),
        ]
    )
    inside = _smooth(-0.008, 0.008, np.asarray(distance, np.float32))
    marker = Image.new("F", (picture.shape[1], picture.shape[0]), 0.0)
    size = picture.shape[0] // 18
    spot = (int(picture.shape[1] * (0.12 if rng.random() < 0.5 else 0.82)), int(picture.shape[0] * rng.uniform(0.1, 0.85)))
    ImageDraw.Draw(marker).text(spot, side, fill=1.0, font=ImageFont.load_default(size))
    lead = np.asarray(marker) * 0.55
    return np.asarray((np.maximum(picture, picture + lead)) * inside + border * (1 - inside), np.float32)


# ---- the object --------------------------------------------------------------------------------------------------------------


def _object(
    head: Dataset, unit: _Unit, part: _Part, view: str, side: str, number: int, picture: Plane, seeds: tuple[int, int]
) -> Dataset:
    """Wrap a picture into a CR (PS3.3 A.2) or DX (PS3.3 A.26) object."""
    dataset = Dataset()
    dataset.update(head)
    is_dx = unit.modality == "DX"
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation if is_dx else ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = uid(*seeds, "image", number)
    dataset.SeriesInstanceUID = uid(*seeds, "series", number if is_dx else 1)
    dataset.Modality = unit.modality
    dataset.SeriesNumber = number if is_dx else 1
    dataset.InstanceNumber = number
    dataset.Manufacturer = unit.manufacturer
    dataset.ManufacturerModelName = unit.model
    dataset.StationName = f"XR{seeds[1] // 2 % len(_UNITS)}"
    dataset.DeviceSerialNumber = f"SN-{1000 + seeds[1] // 2 % len(_UNITS)}"
    dataset.SoftwareVersions = "1.0"
    dataset.BodyPartExamined = part.term
    dataset.ViewPosition = "AP" if view == "AP" else ("LL" if is_dx else "LATERAL")
    dataset.ImageType = ["ORIGINAL", "PRIMARY", ""] if is_dx else ["ORIGINAL", "PRIMARY"]
    dataset.PatientOrientation = ["L", "F"] if view == "AP" else ["A", "F"]
    dataset.KVP = "55"
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"
    dataset.ImagerPixelSpacing = ["0.4", "0.4"]
    if is_dx:
        _digital_x_ray(dataset, unit, part, side, view)
    else:
        dataset.Laterality = side
        dataset.PlateID = f"P{seeds[1]:04d}"
    _pixels(dataset, unit, picture)
    return dataset


def _digital_x_ray(dataset: Dataset, unit: _Unit, part: _Part, side: str, view: str) -> None:
    """Add what the DX modules ask for beyond CR (PS3.3 C.8.11)."""
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.ImageLaterality = side
    dataset.PositionerType = ""
    dataset.DetectorType = "SCINTILLATOR"
    dataset.DetectorConfiguration = "AREA"
    dataset.PixelIntensityRelationship = "LOG"
    dataset.PixelIntensityRelationshipSign = 1 if unit.monochrome1 else -1  # -1: higher values, less beam
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "US"
    dataset.PresentationLUTShape = "INVERSE" if unit.monochrome1 else "IDENTITY"
    dataset.AnatomicRegionSequence = [_code(part.code, "SCT", part.meaning)]
    dataset.ViewCodeSequence = [
        _code("399348003", "SCT", "antero-posterior") if view == "AP" else _code("399198007", "SCT", "right lateral")
    ]
    dataset.ViewCodeSequence[0].ViewModifierCodeSequence = []
    dataset.AcquisitionContextSequence = []


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _pixels(dataset: Dataset, unit: _Unit, picture: Plane) -> None:
    """Store the picture in the unit's bits, polarity, window and transfer syntax."""
    top = 2**unit.bits - 1
    shown = np.round(picture * top).astype(np.uint16)
    stored = np.ascontiguousarray(top - shown if unit.monochrome1 else shown)
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if unit.monochrome1 else "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, unit.bits, unit.bits - 1
    dataset.PixelRepresentation = 0
    if unit.window:
        low, high = (int(value) for value in np.percentile(stored[::8, ::8], [1, 99]))
        dataset.WindowCenter, dataset.WindowWidth = str((low + high) // 2), str(max(2, high - low))
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = unit.syntax
    encoded = _encoded(stored, unit)
    dataset["PixelData"] = DataElement(
        "PixelData", "OW" if encoded is None else "OB", encapsulate([encoded]) if encoded else stored.tobytes()
    )
    dataset["PixelData"].is_undefined_length = encoded is not None


def _encoded(stored: NDArray[np.uint16], unit: _Unit) -> bytes | None:
    """Compress one frame without loss; None for what is stored plain."""
    rows, columns = stored.shape
    if unit.syntax == RLELossless:
        size = {"rows": rows, "columns": columns, "samples_per_pixel": 1, "bits_allocated": 16, "number_of_frames": 1}
        return bytes(encode_pixel_data(stored.tobytes(), byteorder="<", **size))
    if unit.syntax == JPEG2000Lossless:
        return bytes(imagecodecs.jpeg2k_encode(stored, codecformat="j2k", level=0, reversible=True, bitspersample=unit.bits))
    if unit.syntax == JPEGLosslessSV1:
        return bytes(imagecodecs.jpeg8_encode(stored, lossless=True, predictor=1, bitspersample=unit.bits))
    if unit.syntax == JPEGLSLossless:
        return bytes(imagecodecs.jpegls_encode(stored))  # states 16 bits, as the unit does
    return None
