"""Small, valid CR and DX images of invented patients, as a hospital would send them.

`study(patient=1, images=2)` gives data sets with a file meta; `part10` and `encoded` give their bytes. The same arguments give
the same UIDs, so a study can be sent again. Any attribute is set by its keyword: `image(PatientName="SECRET^NAME")`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from io import BytesIO
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.charset import convert_encodings, encode_string
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import dcmwrite, write_dataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

STUDY_DATE = "20240310"


def uid(*parts: object) -> str:
    """Give a UID that is always the same for the same parts."""
    return "2.25." + str(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:15], "big"))


def born(age: float, study_date: str = STUDY_DATE) -> str:
    """Give the birth date (DA) of somebody `age` years and a few days old on the study date."""
    at = date.fromisoformat(study_date)
    return (at - timedelta(days=round(age * 365.25) + 20)).strftime("%Y%m%d")


def pixels(
    *, rows: int = 64, columns: int = 48, bits_stored: int = 12, dtype: str = "uint16", seed: int = 0
) -> NDArray[np.integer[Any]]:
    """Draw a bone-like bright band on a dark ground, in the full range of `bits_stored`."""
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float64)
    band = np.exp(-(((x - columns / 2) / (columns / 8)) ** 2)) * (0.7 + 0.3 * np.sin(y / 5 + seed))
    noise = np.random.default_rng(seed).normal(0, 0.01, band.shape)
    return (np.clip(0.1 + 0.8 * band + noise, 0, 1) * (2**bits_stored - 1)).astype(dtype)


def image(
    *,
    patient: int = 1,
    study: int = 1,
    series: int = 1,
    instance: int = 1,
    modality: str = "DX",
    age: float = 12,
    birth_date: str | None = None,
    study_date: str = STUDY_DATE,
    charset: str | Sequence[str] = "ISO_IR 192",
    transfer_syntax: str = ExplicitVRLittleEndian,
    photometric: str = "MONOCHROME2",
    rows: int = 64,
    columns: int = 48,
    bits_stored: int = 12,
    dtype: str = "uint16",
    array: NDArray[np.integer[Any]] | None = None,
    **attributes: object,
) -> FileDataset:
    """Make one image. `attributes` are set last, by keyword; None deletes the attribute."""
    dataset = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    who = (patient, study, series, instance)
    dataset.SpecificCharacterSet = charset if isinstance(charset, str) else list(charset)
    dataset.SOPClassUID = ComputedRadiographyImageStorage if modality == "CR" else DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = uid("sop", *who)
    dataset.StudyInstanceUID = uid("study", patient, study)
    dataset.SeriesInstanceUID = uid("series", patient, study, series)
    dataset.Modality = modality
    dataset.PatientName = f"Test^Patient{patient}"
    dataset.PatientID = f"PID{patient:05d}"
    dataset.PatientBirthDate = born(age, study_date) if birth_date is None else birth_date
    dataset.PatientSex = "FM"[patient % 2]
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = study_date
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = "101530"
    dataset.AccessionNumber = f"ACC{patient:03d}{study:03d}"
    dataset.StudyID = f"S{study}"
    dataset.StudyDescription = "Lower leg"
    dataset.ReferringPhysicianName = "Ref^Physician"
    dataset.Manufacturer = "Canon Inc."
    dataset.SeriesNumber = series
    dataset.InstanceNumber = instance
    dataset.BodyPartExamined = "LEG"
    dataset.ViewPosition = "AP"
    dataset.PatientOrientation = ["L", "F"]
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    if modality == "DX":
        _describe_dx(dataset)
    else:
        dataset.Laterality = "L"
    _put_pixels(
        dataset,
        pixels(rows=rows, columns=columns, bits_stored=bits_stored, dtype=dtype, seed=instance) if array is None else array,
        bits_stored=bits_stored,
        photometric=photometric,
    )
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    encode(dataset, transfer_syntax)
    return dataset


def study(*, patient: int = 1, study: int = 1, series: int = 1, images: int = 2, **options: Any) -> list[FileDataset]:
    """Make the images of one study: `series` series of `images` images each; `options` as for `image`."""
    return [
        image(patient=patient, study=study, series=at, instance=number, **options)
        for at in range(1, series + 1)
        for number in range(1, images + 1)
    ]


def _describe_dx(dataset: Dataset) -> None:
    """Add what PS3.3 A.26 asks of a DX image for presentation."""
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.ImageLaterality = "L"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", ""]
    dataset.AnatomicRegionSequence = [coded("30021000", "SCT", "Lower leg")]
    dataset.ViewCodeSequence = [coded("399348003", "SCT", "antero-posterior")]
    dataset.ViewCodeSequence[0].ViewModifierCodeSequence = []
    dataset.AcquisitionContextSequence = []
    dataset.PatientOrientation = ["L", "F"]
    dataset.PixelIntensityRelationship = "LOG"
    dataset.PixelIntensityRelationshipSign = -1
    dataset.LossyImageCompression = "00"
    dataset.BurnedInAnnotation = "NO"
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "US"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.DetectorType = "SCINTILLATOR"
    dataset.ImagerPixelSpacing = ["0.125", "0.125"]
    dataset.PositionerType = "NONE"


def coded(value: str, scheme: str, meaning: str) -> Dataset:
    """Make the item of a code sequence."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _put_pixels(dataset: Dataset, array: NDArray[np.integer[Any]], *, bits_stored: int, photometric: str) -> None:
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = photometric
    dataset.Rows, dataset.Columns = array.shape
    dataset.BitsAllocated = 8 * array.dtype.itemsize
    dataset.BitsStored = bits_stored
    dataset.HighBit = bits_stored - 1
    dataset.PixelRepresentation = int(array.dtype.kind == "i")
    top = 2**bits_stored - 1
    dataset.WindowCenter, dataset.WindowWidth = str((top + 1) // 2), str(top + 1)
    if photometric == "MONOCHROME1" and "PresentationLUTShape" in dataset:
        dataset.PresentationLUTShape = "INVERSE"
    dataset.PixelData = array.tobytes() + b"\0" * (array.nbytes % 2)
    dataset["PixelData"].VR = "OW" if array.dtype.itemsize == 2 else "OB"


def encode(dataset: FileDataset, transfer_syntax: str) -> None:
    """Give the native pixels of `dataset` another transfer syntax, in place; sets the file meta."""
    if transfer_syntax == RLELossless:
        dataset.compress(RLELossless, generate_instance_uid=False)
    elif transfer_syntax in _ENCODERS:
        dataset.PixelData = encapsulate([_ENCODERS[transfer_syntax](dataset.pixel_array)])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
    elif transfer_syntax == ExplicitVRBigEndian and dataset.BitsAllocated == 16:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    meta = dataset.file_meta
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = UID(transfer_syntax)
    dataset.set_original_encoding(meta.TransferSyntaxUID.is_implicit_VR, meta.TransferSyntaxUID.is_little_endian)
    meta.ImplementationClassUID = uid("implementation")
    meta.ImplementationVersionName = "TEST_1"


def part10(dataset: Dataset) -> bytes:
    """Write `dataset` as a Part 10 file, in the transfer syntax its file meta names."""
    out = BytesIO()
    dcmwrite(out, dataset, enforce_file_format=True)
    return out.getvalue()


def encoded(dataset: Dataset) -> bytes:
    """Write `dataset` as a C-STORE carries it: without preamble and file meta."""
    syntax = dataset.file_meta.TransferSyntaxUID
    return _encoded(dataset, implicit=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)


def encoded_implicit(dataset: Dataset) -> bytes:
    """Write `dataset` in Implicit VR Little Endian: the content of an item of a sequence in VR UN."""
    return _encoded(dataset, implicit=True, little_endian=True)


def _encoded(dataset: Dataset, *, implicit: bool, little_endian: bool) -> bytes:
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = implicit, little_endian
    write_dataset(out, dataset)
    return out.getvalue()


def elements(dataset: Dataset) -> dict[int, bytes]:
    """Write each element of `dataset` by itself, so that a test can put odd ones between them."""
    alone: dict[int, bytes] = {}
    for element in dataset:
        lonely = Dataset()
        lonely.add(element)
        lonely.file_meta = dataset.file_meta
        alone[int(element.tag)] = encoded(lonely)
    return alone


def read(raw: bytes) -> FileDataset:
    """Read a Part 10 file as the intake does."""
    return dcmread(BytesIO(raw), force=True)


_ENCODERS = {
    JPEG2000Lossless: lambda array: imagecodecs.jpeg2k_encode(array, level=0, reversible=True, codecformat="j2k"),
    JPEGLSLossless: imagecodecs.jpegls_encode,
    JPEGLosslessSV1: imagecodecs.ljpeg_encode,
    JPEGBaseline8Bit: lambda array: imagecodecs.jpeg8_encode(array, level=95),
}


def day(text: str) -> date:
    """Read a DA."""
    return date.fromisoformat(f"{text[:4]}-{text[4:6]}-{text[6:8]}")


def spelt(text: str, character_set: str) -> bytes:
    """Encode a text as a value of an element, with the escape sequences of ISO 2022 where the character set needs them."""
    with quiet():
        return bytes(encode_string(text, convert_encodings(character_set.split("\\"))))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom, which warns of the odd values that a test plants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
