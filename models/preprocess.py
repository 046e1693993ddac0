"""Turn a stored radiograph into what the network eats; the same function for training and for serving.

In: a data set with its file meta information, and a `Preprocessing`. Out: display values, or the tensor. Only pixels and the
attributes that say how they are to be shown are read here: nothing of the patient, and no error ever repeats a value of the
data set.

The steps are those of PS3.3 C.11.1 (modality LUT), C.11.2 (VOI LUT), C.7.6.3.1.2 (polarity) and C.7.5.1.1.2 (padding). Stored
samples have at most 16 bits, so the whole chain is worked out once for each bit pattern and then looked up.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    JPEG2000,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from models.errors import Unreadable

MAX_PIXELS = 100_000_000
"""Images with more pixels are refused before anything is allocated; the largest flat panels have about 20 million."""

_BLOCK = 1 << 17
_SAMPLES = 1 << 18

Floats = NDArray[np.float64]
Patterns = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Everything that defines the tensor of a given image."""

    size_px: int
    """Edge of the square that the network sees."""
    clip_percent: float = 0.5
    """Share of the darkest and of the brightest pixels that saturate where the file states no window."""
    version: int = 1
    """Counts changes of `preprocess` that alter tensors; a card of another version is not served."""

    def __post_init__(self) -> None:
        if not 16 <= self.size_px <= 4096:
            raise ValueError("size_px must lie between 16 and 4096")
        if not 0 <= self.clip_percent < 50:
            raise ValueError("clip_percent must lie between 0 and 50")
        if self.version != 1:
            raise ValueError("this version of Osteon preprocesses by version 1 only")


def preprocess(dataset: Dataset, spec: Preprocessing) -> NDArray[np.float32]:
    """Give the network's view of an image: displayed, padded with black to a square, resized with antialiasing.

    Returns
    -------
    NDArray[np.float32]
        (1, size, size) in 0…1, exactly on the grid k/255 (a uint8 cache loses nothing); 1 is the brightest displayed value.

    Raises
    ------
    Unreadable
        No codec for the transfer syntax, no or truncated pixels, more than one frame or channel, or nothing but one grey.
    """
    shown = display(dataset, clip_percent=spec.clip_percent)
    height, width = shown.shape
    edge = max(height, width)
    square = Image.new("L", (edge, edge))
    square.paste(Image.fromarray(shown), ((edge - width) // 2, (edge - height) // 2))
    small = square.resize((spec.size_px, spec.size_px), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return (np.asarray(small, dtype=np.float32) / np.float32(255))[np.newaxis]


def display(dataset: Dataset, *, clip_percent: float = 0.5) -> NDArray[np.uint8]:
    """Give the image as a viewer would first show it.

    Returns
    -------
    NDArray[np.uint8]
        (rows, columns); 255 is the brightest displayed value, pixel padding is 0.

    Raises
    ------
    Unreadable
        As `preprocess`.
    """
    try:
        return _display(dataset, clip_percent)
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # a damaged header or stream may raise anything in pydicom or a codec
        raise Unreadable(f"the image cannot be decoded ({type(error).__name__})") from None


def first_look(dataset: Dataset) -> tuple[NDArray[np.uint8], int]:
    """Give what a person sees first of an image that may be none of ours: its first frame, in colour when it is, and how many.

    Returns
    -------
    tuple[NDArray[np.uint8], int]
        (rows, columns) as `display`, or (rows, columns, 3) in RGB; and the number of frames.

    Raises
    ------
    Unreadable
        It cannot be decoded, or has neither one nor three samples a pixel.
    """
    try:
        frames = int(dataset.get("NumberOfFrames") or 1)
        if int(dataset.get("SamplesPerPixel", 1)) == 3:
            return _in_colour(dataset), frames
        return _display(_alone(dataset, frames) if frames > 1 else dataset, 0.5), frames
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # as in `display`
        raise Unreadable(f"the image cannot be decoded ({type(error).__name__})") from None


def _alone(dataset: Dataset, frames: int) -> Dataset:
    """Give a data set with the first frame alone."""
    element = dataset["PixelData"]
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        data = encapsulate([get_frame(element.value, 0, number_of_frames=frames)])
    else:
        data = element.value[: int(dataset.Rows) * int(dataset.Columns) * int(dataset.BitsAllocated) // 8]
    alone = copy(dataset)
    alone["PixelData"] = DataElement("PixelData", element.VR, data)
    alone.NumberOfFrames = 1
    return alone


def _in_colour(dataset: Dataset) -> NDArray[np.uint8]:
    """Decode a picture of three samples a pixel: what screens and scanners send."""
    from pydicom.pixels import pixel_array  # type: ignore[attr-defined]  # re-exported from its utils

    if int(dataset.Rows) * int(dataset.Columns) > MAX_PIXELS:
        raise Unreadable(f"the image has more than {MAX_PIXELS // 1_000_000} million pixels")
    shown = pixel_array(dataset, index=0)
    if shown.dtype != np.uint8 or shown.ndim != 3:
        raise Unreadable("the image is in colours that are not shown here")
    return shown


def _display(dataset: Dataset, clip_percent: float) -> NDArray[np.uint8]:
    layout = _Layout.of(dataset)
    patterns, stored = _decode(dataset, layout)
    padded = _padding(dataset, stored, layout)
    values = _modality(dataset, stored)
    sample = _sample(patterns, padded)
    grey = _voi(dataset, values)
    if grey is None or _flat(grey[sample]):  # no window, or one that shows nothing
        grey = _auto_window(values, sample, clip_percent)
    table = np.floor(np.clip(grey, 0, 1) * 255 + 0.5).astype(np.uint8)
    if _inverted(dataset):
        table = 255 - table
    table[padded] = 0
    return _look_up(table, patterns)


# --- what the header says of the pixels ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the samples lie (PS3.3 C.7.6.3)."""

    rows: int
    columns: int
    allocated: int
    stored: int
    high_bit: int
    signed: bool

    @classmethod
    def of(cls, dataset: Dataset) -> _Layout:
        if "PixelData" not in dataset:
            raise Unreadable("the image has no pixel data")
        colours = str(dataset.get("PhotometricInterpretation", ""))
        if dataset.get("SamplesPerPixel", 1) != 1 or colours not in ("MONOCHROME1", "MONOCHROME2"):
            raise Unreadable("the image is not a grey image (MONOCHROME1 or MONOCHROME2, one sample a pixel)")
        if int(dataset.get("NumberOfFrames") or 1) != 1:
            raise Unreadable("the image has several frames; only single-frame radiographs are read")
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        if rows < 1 or columns < 1 or rows * columns > MAX_PIXELS:
            raise Unreadable(f"the image has no pixels or more than {MAX_PIXELS // 1_000_000} million of them")
        allocated = int(dataset.BitsAllocated)
        stored = int(dataset.get("BitsStored") or allocated)
        high_bit = int(dataset.get("HighBit", stored - 1))
        if allocated not in (8, 16) or not 1 < stored <= allocated or not stored - 1 <= high_bit < allocated:
            raise Unreadable("the image's samples are not of 2 to 16 bits in 8 or 16")
        return cls(rows, columns, allocated, stored, high_bit, bool(dataset.get("PixelRepresentation", 0)))

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns


def _inverted(dataset: Dataset) -> bool:
    """Say whether large values are dark. DX states it twice (MONOCHROME1 and INVERSE, PS3.3 C.8.11.3), which inverts once."""
    return str(dataset.PhotometricInterpretation) == "MONOCHROME1" or str(dataset.get("PresentationLUTShape")) == "INVERSE"


# --- pixel bytes -> bit patterns, and what each pattern means -----------------------------------------------------------------


def _decode(dataset: Dataset, layout: _Layout) -> tuple[Patterns, Floats]:
    """Give the samples as unsigned bit patterns, and the stored value that each pattern stands for."""
    syntax = getattr(dataset, "file_meta", Dataset()).get("TransferSyntaxUID")
    if syntax is None:
        raise Unreadable("the image does not say its transfer syntax")
    if not syntax.is_transfer_syntax:
        raise Unreadable("the image's transfer syntax is not one of the standard's")
    if not syntax.is_compressed or syntax.is_deflated:
        patterns = _native(dataset, layout, big_endian=not syntax.is_little_endian)
        return patterns, _meaning(patterns.dtype, layout.stored, layout.high_bit, signed=layout.signed)
    if syntax not in _CODECS and syntax != RLELossless:
        raise Unreadable("no codec for the image's transfer syntax")
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if syntax == RLELossless:
        patterns = _run_length(frame, layout)
        return patterns, _meaning(patterns.dtype, layout.stored, layout.high_bit, signed=layout.signed)
    codec, lossless = _CODECS[syntax]
    precision = _precision(frame, layout)
    decoded = codec(frame)
    if decoded.shape != layout.shape or decoded.dtype.itemsize > 2:
        raise Unreadable("the compressed image is not of the size that its header states")
    patterns = decoded.view(f"u{decoded.dtype.itemsize}")
    # A lossless stream may carry overlay bits above BitsStored; a lossy one may overshoot it and must not wrap around.
    bits = min(layout.stored, precision) if lossless else precision
    return patterns, _meaning(patterns.dtype, bits, bits - 1, signed=layout.signed)


def _native(dataset: Dataset, layout: _Layout, *, big_endian: bool) -> Patterns:
    data, wanted = dataset.PixelData, layout.rows * layout.columns
    if len(data) * 8 < wanted * layout.allocated:
        raise Unreadable("the pixel data are truncated")
    if layout.allocated == 16:
        samples = np.frombuffer(data, dtype=">u2" if big_endian else "<u2", count=wanted)
        return samples.astype(np.uint16, copy=False).reshape(layout.shape)
    if big_endian and dataset["PixelData"].VR == "OW":  # bytes in swapped words (PS3.5 8.1.1)
        data = np.frombuffer(data, dtype=">u2").astype("<u2").tobytes()
    return np.frombuffer(data, dtype=np.uint8, count=wanted).reshape(layout.shape)


def _run_length(frame: bytes, layout: _Layout) -> Patterns:
    from rle.utils import decode_frame  # type: ignore[attr-defined]  # an extension module's function, re-exported

    try:
        data = decode_frame(frame, layout.rows * layout.columns, layout.allocated, "<")
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of Rust, on a stream that is too long; pyo3 makes it no Exception
            raise Unreadable("the compressed image is not of the size that its header states") from None
        raise
    return np.frombuffer(data, dtype=f"<u{layout.allocated // 8}").reshape(layout.shape)


def _jpeg(frame: bytes) -> NDArray[Any]:
    import imagecodecs

    return np.asarray(imagecodecs.jpeg8_decode(_whole(frame)))


def _jpeg_ls(frame: bytes) -> NDArray[Any]:
    import imagecodecs

    return np.asarray(imagecodecs.jpegls_decode(_whole(frame)))


def _jpeg_2000(frame: bytes) -> NDArray[Any]:
    import imagecodecs

    return np.asarray(imagecodecs.jpeg2k_decode(frame, numthreads=2))


def _whole(frame: bytes) -> bytes:
    """Give a JPEG or JPEG-LS stream up to its end of image, which no entropy-coded byte can look like (ITU T.81 B.1.1.5).

    Without it libjpeg fills what is missing with grey and says nothing, and CharLS 2.4 computes for ten seconds.
    """
    end = frame.rfind(b"\xff\xd9")
    if end < 0:
        raise Unreadable("the pixel data are truncated")
    return frame[: end + 2]


# The fastest codec that agrees with python-gdcm on every file of the test corpus (ms for 2140x1760: JPEG lossless 22 by
# libjpeg-turbo against 51 by jpegsof3; JPEG-LS 36 by CharLS; JPEG 2000 on two threads is 1.9 times as fast as on one).
_CODECS: dict[str, tuple[Callable[[bytes], NDArray[Any]], bool]] = {
    JPEGBaseline8Bit: (_jpeg, False),
    JPEGExtended12Bit: (_jpeg, False),
    JPEGLossless: (_jpeg, True),
    JPEGLosslessSV1: (_jpeg, True),
    JPEGLSLossless: (_jpeg_ls, True),
    JPEGLSNearLossless: (_jpeg_ls, False),
    JPEG2000Lossless: (_jpeg_2000, True),
    JPEG2000: (_jpeg_2000, False),
}


def missing_codecs() -> list[str]:
    """Name the decoders that this installation lacks; empty when every accepted transfer syntax can be decoded."""
    missing = []
    try:
        import imagecodecs
    except ImportError:
        missing += ["JPEG", "JPEG-LS", "JPEG 2000"]
    else:
        codecs: dict[str, Any] = {"JPEG": imagecodecs.JPEG8, "JPEG-LS": imagecodecs.JPEGLS, "JPEG 2000": imagecodecs.JPEG2K}
        missing += [name for name, codec in codecs.items() if not codec.available]
    return missing + ([] if find_spec("rle") else ["RLE"])


def _precision(frame: bytes, layout: _Layout) -> int:
    """Read bits per sample from the code stream; refuse another size than the header's before a decoder allocates it."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start >= 0:  # JPEG 2000: SIZ (ISO 15444-1 A.5.1), bare or in a JP2 box
        width, height, left, top = struct.unpack_from(">4I", frame, start + 8)
        (components,) = struct.unpack_from(">H", frame, start + 40)
        precision, rows, columns = (frame[start + 42] & 0x7F) + 1, height - top, width - left
    else:
        precision, rows, columns, components = _frame_header(frame)
    if (rows, columns) != layout.shape or components != 1 or not 1 < precision <= 16:
        raise Unreadable("the compressed image is not of the size that its header states")
    return precision


def _frame_header(frame: bytes) -> tuple[int, int, int, int]:
    """Find the SOF marker of a JPEG or JPEG-LS stream (ITU T.81 B.2.2): precision, rows, columns, components."""
    at = frame.index(b"\xff\xd8") + 2
    while True:
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if frame[at] != 0xFF or (length < 2 and marker != 0xFF):
            raise Unreadable("the compressed image has no frame header")
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            precision, rows, columns, components = struct.unpack_from(">BHHB", frame, at + 4)
            return precision, rows, columns, components
        at += 1 if marker == 0xFF else 2 + length  # a marker may be preceded by fill bytes


def _meaning(dtype: np.dtype[Any], bits: int, high_bit: int, *, signed: bool) -> Floats:
    """Give the stored value of every bit pattern: what lies above the high bit or below the sample is no part of it."""
    patterns = np.arange(256 if dtype.itemsize == 1 else 65536, dtype=np.int64)
    values = (patterns >> (high_bit + 1 - bits)) & ((1 << bits) - 1)
    if signed:
        values = np.where(values >> (bits - 1), values - (1 << bits), values)
    return values.astype(np.float64)


def _padding(dataset: Dataset, stored: Floats, layout: _Layout) -> NDArray[np.bool_]:
    """Say which patterns are pixel padding (PS3.3 C.7.5.1.1.2): a value, or the range up to the limit, both included."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(len(stored), dtype=bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = [_as_sample(value, layout), _as_sample(value if limit is None else limit, layout)]
    return np.asarray((stored >= min(ends)) & (stored <= max(ends)))


def _as_sample(value: int | bytes, layout: _Layout) -> int:
    """Read a US-or-SS value by the pixel representation, whatever VR the writer gave it."""
    number = int.from_bytes(value[:2], "little") if isinstance(value, bytes) else int(value)
    number &= 0xFFFF
    return number - 0x10000 if layout.signed and number & 0x8000 else number


# --- stored value -> modality value -> displayed grey -------------------------------------------------------------------------


def _modality(dataset: Dataset, stored: Floats) -> Floats:
    """Apply the modality LUT, or rescale slope and intercept (PS3.3 C.11.1)."""
    if dataset.get("ModalityLUTSequence"):
        first, entries = _lut(dataset.ModalityLUTSequence[0], signed_input=bool(stored.min() < 0))
        return _through(stored, first, entries)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    slope = 1.0 if slope is None else float(slope)
    intercept = 0.0 if intercept is None else float(intercept)
    if not math.isfinite(intercept) or not math.isfinite(slope) or slope == 0:
        return stored
    return stored * slope + intercept


def _voi(dataset: Dataset, values: Floats) -> Floats | None:
    """Apply the first VOI LUT, else the first window (PS3.3 C.11.2); None when the file states neither in a usable way."""
    if dataset.get("VOILUTSequence"):
        first, entries = _lut(dataset.VOILUTSequence[0], signed_input=bool(values.min() < 0))
        # The descriptor's bit depth is often wrong; the entries tell what they span.
        full = (1 << int(entries.max()).bit_length()) - 1
        return _through(values, first, entries) / max(full, 1)
    center, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    if center is None or width is None or width <= 0:
        return None
    function = dataset.get("VOILUTFunction") or "LINEAR"
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700))))
    if function == "LINEAR_EXACT":
        return (values - center) / width + 0.5
    if width <= 1:  # LINEAR with a width of 1 is a threshold (C.11.2.1.2.1)
        return np.where(values > center - 0.5, 1.0, 0.0) if width == 1 else None
    return (values - (center - 0.5)) / (width - 1) + 0.5


def _first(value: object) -> float | None:
    """Give the first of one or several numbers; None when there is none that is finite."""
    if value is None or value == "":
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _first(value[0]) if len(value) else None
    number = float(value)  # type: ignore[arg-type]
    return number if math.isfinite(number) else None


def _lut(item: Dataset, *, signed_input: bool) -> tuple[int, Floats]:
    """Read one LUT (PS3.3 C.11.1.1): the first value mapped, and the entries."""
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    count = (count & 0xFFFF) or 65536
    first &= 0xFFFF
    if signed_input and first & 0x8000:
        first -= 0x10000
    data = item.LUTData
    if isinstance(data, bytes):
        order = ">" if item.original_encoding[1] is False else "<"  # None: made in memory
        entries = np.frombuffer(data, dtype=np.uint8 if bits <= 8 and len(data) < 2 * count else f"{order}u2")
    else:
        entries = np.atleast_1d(np.asarray(data, dtype=np.int64)) & 0xFFFF
    if len(entries) < count:
        raise Unreadable("a look-up table of the image is shorter than it states")
    return first, entries[:count].astype(np.float64)


def _through(values: Floats, first: int, entries: Floats) -> Floats:
    index = np.clip(np.rint(values) - first, 0, len(entries) - 1)
    mapped: Floats = entries[index.astype(np.intp)]
    return mapped


def _sample(patterns: Patterns, padded: NDArray[np.bool_]) -> NDArray[Any]:
    """Give the patterns of a regular grid of pixels without the padding; of all pixels where the grid shows but one."""
    step = max(1, math.isqrt(patterns.size // _SAMPLES))
    for view in (patterns[::step, ::step], patterns):
        sample = view.ravel()
        sample = sample[~padded[sample]]
        if sample.size and sample.min() != sample.max():
            return sample
    raise Unreadable("the image shows a single grey value")


def _flat(greys: NDArray[Any]) -> bool:
    """Say whether these pixels would all come out the same."""
    shown = np.clip(greys, 0, 1)
    return bool(shown.min() == shown.max())


def _auto_window(values: Floats, sample: NDArray[Any], clip_percent: float) -> Floats:
    """Spread the valid range over black to white; a share of each end saturates. Mirrored images give mirrored windows."""
    valid = values[sample]
    rank = int(valid.size * clip_percent / 100)
    ordered = np.partition(valid, (rank, valid.size - 1 - rank))
    low, high = float(ordered[rank]), float(ordered[valid.size - 1 - rank])
    if high <= low:  # nearly everything is one value: take what there is
        low, high = float(valid.min()), float(valid.max())
    if high <= low:
        raise Unreadable("the image shows a single grey value")
    return (values - low) / (high - low)


def _look_up(table: NDArray[np.uint8], patterns: NDArray[Any]) -> NDArray[np.uint8]:
    """Map every pixel through the table, block by block so that numpy's index copy stays in the cache."""
    flat = np.ascontiguousarray(patterns).reshape(-1)
    out = np.empty(flat.size, dtype=np.uint8)
    for start in range(0, flat.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        np.take(table, flat[block], out=out[block], mode="clip")  # in range by construction; "clip" writes without a buffer
    return out.reshape(patterns.shape)
