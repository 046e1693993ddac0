"""The tensor of a radiograph does not depend on how the file stores it, and a broken file is `Unreadable`, never a guess."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shared
import studies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_decoder
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    JPEG2000,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from models import preprocess as subject
from models.errors import Unreadable
from models.preprocess import Preprocessing, display, preprocess

SPEC = Preprocessing(64)
ONE_GREY_LEVEL = 1.001 / 255
LOSSLESS = (RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, ExplicitVRBigEndian, ImplicitVRLittleEndian)


def image(array: NDArray[Any] | None = None, **options: Any) -> FileDataset:
    """Make a CR without a window, unless `options` give one."""
    if array is None:
        array = studies.pixels(rows=96, columns=64, bits_stored=options.get("bits_stored", 12))
    plain = {"WindowCenter": None, "WindowWidth": None} if "WindowCenter" not in options else {}
    return studies.image(modality="CR", array=array, **(plain | options))


def reread(dataset: FileDataset) -> Dataset:
    return studies.read(studies.part10(dataset))


def lut(entries: Sequence[int], *, first: int = 0, bits: int = 16, signed: bool = False) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if signed else "US", [len(entries) & 0xFFFF, first, bits])
    item.LUTExplanation = "test"
    item.add_new("LUTData", "OW", np.asarray(entries, "<u2").tobytes())
    return item


# --- the tensor ---------------------------------------------------------------------------------------------------------------


def test_the_tensor_is_square_between_0_and_1_and_on_the_grid_of_a_byte() -> None:
    tensor = preprocess(image(), SPEC)
    assert tensor.shape == (1, 64, 64)
    assert tensor.dtype == np.float32
    as_bytes = np.round(tensor * 255).astype(np.uint8)
    assert np.array_equal(as_bytes.astype(np.float32) / np.float32(255), tensor)


def test_the_image_is_padded_with_black_and_keeps_its_proportions() -> None:
    tensor = preprocess(tall(), SPEC)[0]
    assert tensor[:, :15].max() == 0
    assert tensor[:, -15:].max() == 0
    assert tensor[:, 20:44].mean() > 0.3


def tall() -> FileDataset:
    """An image of twice its width in height; its lower half is white."""
    array = np.zeros((256, 128), np.uint16)
    array[128:] = 4095
    return image(array)


def test_white_is_the_brightest_displayed_value() -> None:
    tensor = preprocess(tall(), SPEC)[0]
    assert tensor[2, 32] == 0
    assert tensor[-3, 32] == 1


def test_a_fine_grating_comes_out_grey_because_the_resize_is_antialiased() -> None:
    array = np.zeros((512, 512), np.uint16)
    array[:, ::2] = 4095
    tensor = preprocess(image(array), SPEC)[0]
    assert np.abs(tensor[8:-8, 8:-8] - 0.5).max() < 0.02


@pytest.mark.parametrize("bits", [8, 10, 11, 12, 13, 14, 15, 16])
def test_monochrome_1_and_2_give_the_same_tensor(bits: int) -> None:
    array = studies.pixels(rows=90, columns=70, bits_stored=bits, dtype="uint8" if bits == 8 else "uint16")
    inverted = ((1 << bits) - 1 - array).astype(array.dtype)
    one = preprocess(image(inverted, bits_stored=bits, photometric="MONOCHROME1"), SPEC)
    two = preprocess(image(array, bits_stored=bits), SPEC)
    assert np.abs(one - two).max() <= ONE_GREY_LEVEL


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_monochrome_1_and_2_give_the_same_tensor_through_a_mirrored_window(function: str) -> None:
    array = studies.pixels(rows=90, columns=70, bits_stored=12)
    window = {"WindowCenter": "1500", "WindowWidth": "1800", "VOILUTFunction": function}
    # LINEAR is centred half a value below (PS3.3 C.11.2.1.2.1), so its mirror image is one value off
    mirrored = window | {"WindowCenter": "2596" if function == "LINEAR" else "2595"}
    one = preprocess(image((4095 - array).astype(np.uint16), photometric="MONOCHROME1", **mirrored), SPEC)
    assert np.abs(one - preprocess(image(array, **window), SPEC)).max() <= ONE_GREY_LEVEL


def test_inverse_presentation_lut_shape_inverts_once() -> None:
    """DX says it twice, as MONOCHROME1 and as INVERSE (PS3.3 C.8.11.3)."""
    dx = studies.image(modality="DX", photometric="MONOCHROME1")
    assert dx.PresentationLUTShape == "INVERSE"
    both = display(dx)
    dx.PresentationLUTShape = "IDENTITY"
    assert np.array_equal(display(dx), both)
    dx.PhotometricInterpretation = "MONOCHROME2"
    assert np.array_equal(display(dx), 255 - both)
    dx.PresentationLUTShape = "INVERSE"
    assert np.array_equal(display(dx), both)


def test_signed_and_unsigned_samples_give_the_same_tensor() -> None:
    array = studies.pixels(rows=90, columns=70, bits_stored=12)
    signed = (array.astype(np.int32) - 2048).astype(np.int16)
    assert np.array_equal(preprocess(image(signed, bits_stored=12), SPEC), preprocess(image(array), SPEC))


@pytest.mark.parametrize("signed", [False, True])
def test_bits_above_the_high_bit_are_no_part_of_the_sample(signed: bool) -> None:
    array = studies.pixels(rows=90, columns=70, bits_stored=12)
    if signed:
        array = (array.astype(np.int32) - 2048).astype(np.int16)
    garbage = np.random.default_rng(0).integers(0, 16, array.shape).astype(np.uint16) << 12
    dirty = ((array.view(np.uint16) & 0x0FFF) | garbage).view(array.dtype)
    assert np.array_equal(display(image(dirty, bits_stored=12)), display(image(array, bits_stored=12)))


def test_samples_that_end_below_the_top_bit_are_shifted() -> None:
    array = studies.pixels(rows=90, columns=70, bits_stored=12)
    high = image((array << 4).astype(np.uint16), HighBit=15)
    assert np.array_equal(display(high), display(image(array)))


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_the_transfer_syntax_does_not_matter(syntax: str, bits: int) -> None:
    if bits == 8 and syntax == ExplicitVRBigEndian:
        pytest.skip("8-bit words in big endian have a test of their own")
    array = studies.pixels(rows=90, columns=70, bits_stored=bits, dtype="uint8" if bits == 8 else "uint16")
    stored = reread(image(array, bits_stored=bits, transfer_syntax=syntax))
    assert np.array_equal(display(stored), display(image(array, bits_stored=bits)))


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1])
def test_signed_samples_survive_compression(syntax: str) -> None:
    array = (studies.pixels(rows=90, columns=70, bits_stored=16).astype(np.int32) - 30000).astype(np.int16)
    native = image(array, bits_stored=16)
    packed = image(array, bits_stored=16)
    if syntax in (JPEGLSLossless, JPEGLosslessSV1):  # both have unsigned samples only
        import imagecodecs

        encode = imagecodecs.jpegls_encode if syntax == JPEGLSLossless else imagecodecs.ljpeg_encode
        packed.PixelData = encapsulate([encode(array.view(np.uint16))])
        packed["PixelData"].VR = "OB"
        packed.file_meta.TransferSyntaxUID = syntax
    else:
        studies.encode(packed, syntax)
    assert np.array_equal(display(packed), display(native))


def test_words_of_bytes_in_big_endian_are_unswapped() -> None:
    array = studies.pixels(rows=90, columns=70, bits_stored=8, dtype="uint8")
    swapped = image(array, bits_stored=8)
    swapped.PixelData = np.frombuffer(array.tobytes(), "<u2").astype(">u2").tobytes()
    swapped["PixelData"].VR = "OW"
    swapped.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    assert np.array_equal(display(swapped), display(image(array, bits_stored=8)))


@pytest.mark.parametrize(("syntax", "bits"), [(JPEGBaseline8Bit, 8), (JPEGExtended12Bit, 12), (JPEG2000, 12)])
def test_lossy_syntaxes_give_nearly_the_same_tensor(syntax: str, bits: int) -> None:
    import imagecodecs

    array = studies.pixels(rows=96, columns=64, bits_stored=bits, dtype="uint8" if bits == 8 else "uint16")
    lossy = image(array, bits_stored=bits)
    encoders = {
        JPEGBaseline8Bit: lambda: imagecodecs.jpeg8_encode(array, level=95),
        JPEGExtended12Bit: lambda: imagecodecs.jpeg8_encode(array, level=95, bitspersample=12),
        JPEG2000: lambda: imagecodecs.jpeg2k_encode(array, level=50, codecformat="j2k", bitspersample=12),
    }
    lossy.PixelData = encapsulate([encoders[syntax]()])
    lossy["PixelData"].VR = "OB"
    lossy.file_meta.TransferSyntaxUID = syntax
    assert np.abs(preprocess(lossy, SPEC) - preprocess(image(array, bits_stored=bits), SPEC)).mean() < 0.02


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bits=st.integers(8, 16), signed=st.booleans(), seed=st.integers(0, 1000), slope=st.sampled_from([1.0, 0.5, -1.0, 3.7]))
def test_inverting_values_and_polarity_changes_nothing(bits: int, signed: bool, seed: int, slope: float) -> None:
    array = studies.pixels(rows=50, columns=70, bits_stored=bits, seed=seed).astype(np.int32)
    top, shift = (1 << bits) - 1, 1 << (bits - 1) if signed else 0
    dtype = np.int16 if signed else np.uint16
    rescale = {"RescaleSlope": str(slope), "RescaleIntercept": "-100"}
    two = image((array - shift).astype(dtype), bits_stored=bits, **rescale)
    one = image((top - array - shift).astype(dtype), bits_stored=bits, photometric="MONOCHROME1", **rescale)
    assert np.abs(preprocess(one, SPEC) - preprocess(two, SPEC)).max() <= ONE_GREY_LEVEL


# --- modality, VOI, padding ---------------------------------------------------------------------------------------------------


def expected(dataset: Dataset) -> NDArray[np.float64]:
    """Apply both LUTs with pydicom's own implementation, and scale to 0…255."""
    values = apply_modality_lut(dataset.pixel_array, dataset)
    with np.errstate(over="ignore"):
        shown = apply_voi_lut(values, dataset).astype(float)
    if "VOILUTSequence" in dataset:
        return shown / (2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1) * 255
    low, high = (0, 2**dataset.BitsStored - 1) if "RescaleSlope" not in dataset else output_range(dataset)
    return (shown - low) / (high - low) * 255


def output_range(dataset: Dataset) -> tuple[float, float]:
    """Give the range that pydicom spreads a window over: that of the rescaled values."""
    slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
    return intercept, (2**dataset.BitsStored - 1) * slope + intercept


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize(("center", "width"), [("2000", "1500"), ("100.5", "4000"), ("3000", "2")])
def test_windows_are_those_of_the_standard(function: str | None, center: str, width: str) -> None:
    dataset = image(WindowCenter=center, WindowWidth=width)
    if function:
        dataset.VOILUTFunction = function
    assert np.abs(display(dataset) - expected(dataset)).max() <= 0.5001


def test_rescale_comes_before_the_window() -> None:
    dataset = image(WindowCenter="50", WindowWidth="900", RescaleSlope="0.5", RescaleIntercept="-1024")
    assert np.abs(display(dataset) - expected(dataset)).max() <= 0.5001


def test_the_first_of_several_windows_is_taken() -> None:
    several = image(WindowCenter=["2000", "10"], WindowWidth=["1500", "20"])
    assert np.array_equal(display(several), display(image(WindowCenter="2000", WindowWidth="1500")))


def test_a_voi_lut_is_applied_and_goes_before_a_window() -> None:
    curve = (np.linspace(0, 1, 3000) ** 0.5 * 4095).astype(int)
    dataset = image(WindowCenter="2000", WindowWidth="1500", VOILUTSequence=[lut(list(curve), first=500, bits=12)])
    assert np.abs(display(dataset) - expected(dataset)).max() <= 0.5001


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_look_up_tables_survive_every_encoding(syntax: str) -> None:
    curve = list((np.linspace(0, 1, 4096) ** 2 * 65535).astype(int))
    native = image(ModalityLUTSequence=[lut(curve)])
    raw = studies.part10(image(ModalityLUTSequence=[lut(curve)], transfer_syntax=syntax))
    if syntax == ExplicitVRBigEndian:  # pydicom writes bytes as they are
        little = np.asarray(curve, "<u2").tobytes()
        assert raw.count(little) == 1
        raw = raw.replace(little, np.asarray(curve, ">u2").tobytes())
    assert np.array_equal(display(studies.read(raw)), display(native))


def test_a_voi_lut_whose_stated_depth_is_wrong_still_spans_black_to_white() -> None:
    curve = list(range(4096))
    right = display(image(VOILUTSequence=[lut(curve, bits=12)]))
    assert np.array_equal(display(image(VOILUTSequence=[lut(curve, bits=16)])), right)
    assert right.max() > 200


def test_a_signed_look_up_table_starts_below_zero() -> None:
    array = (studies.pixels(rows=50, columns=50, bits_stored=12).astype(np.int32) - 2048).astype(np.int16)
    curve = (np.linspace(0, 1, 4096) ** 2 * 4095).astype(int)
    dataset = image(array, bits_stored=12, VOILUTSequence=[lut(list(curve), first=-2048, bits=12, signed=True)])
    wanted = curve[array.astype(int) + 2048] / 4095 * 255
    assert np.abs(display(dataset) - wanted).max() <= 0.5001


@pytest.mark.parametrize("window", [("", ""), ("100", "0"), ("100", "-5"), ("100", ""), ("60000", "10")])
def test_a_useless_window_is_passed_over(window: tuple[str, str]) -> None:
    """Empty, of no or negative width, or so far away that the image would be black."""
    dataset = image(WindowCenter=window[0], WindowWidth=window[1])
    assert np.array_equal(display(dataset), display(image()))


def test_a_few_extreme_pixels_do_not_spoil_the_automatic_window() -> None:
    array = studies.pixels(rows=200, columns=200, bits_stored=12) // 4
    calm = preprocess(image(array.astype(np.uint16)), SPEC)
    array[:2, :20] = 4095
    assert np.abs(preprocess(image(array.astype(np.uint16)), SPEC) - calm)[:, 8:].max() < 0.05


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("padding", [0, 4095])
def test_padding_is_black_and_does_not_enter_the_window(photometric: str, padding: int) -> None:
    array = (studies.pixels(rows=200, columns=200, bits_stored=12) // 8 + 1000).astype(np.uint16)
    whole = display(image(array, photometric=photometric))
    array[:80] = padding
    framed = display(image(array, photometric=photometric, PixelPaddingValue=padding))
    assert framed[:80].max() == 0
    assert np.abs(framed[80:].astype(int) - whole[80:]).max() < 12


def test_a_padding_range_counts_from_end_to_end() -> None:
    array = studies.pixels(rows=200, columns=200, bits_stored=12)
    array[:40, :] = np.arange(3000, 3200, dtype=np.uint16)
    shown = display(image(array, PixelPaddingValue=3199, PixelPaddingRangeLimit=3000))
    assert shown[:40].max() == 0


def test_signed_padding_is_understood_whatever_vr_it_was_given() -> None:
    array = (studies.pixels(rows=200, columns=200, bits_stored=12).astype(np.int32) - 1000).astype(np.int16)
    array[:80] = -2000
    right = display(image(array, bits_stored=16, PixelPaddingValue=-2000))
    dataset = image(array, bits_stored=16)
    dataset.add_new("PixelPaddingValue", "US", 65536 - 2000)
    assert right[:80].max() == 0
    assert np.array_equal(display(dataset), right)


# --- what cannot be read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"PixelData": None}, "no pixel data"),
        ({"SamplesPerPixel": 3}, "not a grey image"),
        ({"PhotometricInterpretation": "RGB"}, "not a grey image"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "not a grey image"),
        ({"NumberOfFrames": "2"}, "several frames"),
        ({"Rows": 9000, "Columns": 60000}, "100 million"),
        ({"Rows": 0}, "no pixels"),
        ({"Rows": 97}, "truncated"),
        ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, "2 to 16 bits"),
        ({"BitsStored": 17}, "2 to 16 bits"),
        ({"HighBit": 3}, "2 to 16 bits"),
        ({"Columns": None}, "cannot be decoded"),
    ],
)
def test_what_is_no_readable_radiograph_is_refused_with_a_reason(attributes: dict[str, Any], told: str) -> None:
    dataset = image(**{name: value for name, value in attributes.items() if name != "PixelData"})
    if "PixelData" in attributes:
        del dataset.PixelData
    with pytest.raises(Unreadable, match=told):
        preprocess(dataset, SPEC)


@pytest.mark.parametrize("attributes", [{}, {"WindowCenter": "2000", "WindowWidth": "500"}])
def test_an_image_of_one_grey_is_unreadable(attributes: dict[str, str]) -> None:
    with pytest.raises(Unreadable, match="single grey"):
        display(image(np.full((64, 64), 1234, np.uint16), **attributes))


def test_nothing_but_padding_is_unreadable() -> None:
    with pytest.raises(Unreadable, match="single grey"):
        display(image(np.full((64, 64), 7, np.uint16), PixelPaddingValue=7))


def test_a_file_without_a_transfer_syntax_is_unreadable() -> None:
    dataset = image()
    del dataset.file_meta.TransferSyntaxUID
    with pytest.raises(Unreadable, match="transfer syntax"):
        display(dataset)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.97])
def test_truncated_streams_are_unreadable(syntax: str, share: float) -> None:
    array = studies.pixels(rows=128, columns=128, bits_stored=8, dtype="uint8")
    dataset = image(array, bits_stored=8, transfer_syntax=syntax)
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    dataset.PixelData = encapsulate([frame[: int(len(frame) * share) // 2 * 2] or b"\0\0"])
    with pytest.raises(Unreadable):
        display(dataset)


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
def test_a_stream_of_another_size_than_the_header_states_is_refused_before_it_is_decoded(
    syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(frame: bytes) -> NDArray[Any]:
        raise AssertionError("decoded")

    dataset = image(studies.pixels(rows=128, columns=128, bits_stored=8, dtype="uint8"), bits_stored=8, transfer_syntax=syntax)
    dataset.Rows = 64
    monkeypatch.setattr(subject, "_CODECS", {known: (never, lossless) for known, (_, lossless) in subject._CODECS.items()})
    with pytest.raises(Unreadable, match="not of the size"):
        display(dataset)


def test_a_run_length_stream_that_is_too_long_is_unreadable() -> None:
    """Its decoder panics, which is no Exception: it would end the replier, again and again."""
    dataset = image(transfer_syntax=RLELossless)
    dataset.Rows -= 1
    with pytest.raises(Unreadable, match="not of the size"):
        display(dataset)


def test_no_message_repeats_a_value_of_the_data_set() -> None:
    dataset = image()
    dataset.PatientName = "SECRET^NAME"
    dataset.PhotometricInterpretation = "SECRET NAME"
    with pytest.raises(Unreadable) as refused:
        display(dataset)
    assert "SECRET" not in str(refused.value)
    assert refused.value.__cause__ is None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_read_or_unreadable_and_nothing_else(data: st.DataObject) -> None:
    """Any byte after the meta information may be wrong."""
    syntax = data.draw(
        st.sampled_from([JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, RLELossless, "plain"])
    )
    raw = bytearray(_PART10[syntax])
    start = raw.index(b"\x28\x00\x02\x00") if data.draw(st.booleans()) else raw.index(b"\xe0\x7f\x10\x00")
    for _ in range(data.draw(st.integers(1, 12))):
        raw[data.draw(st.integers(start, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        dataset = dcmread_quietly(bytes(raw[: data.draw(st.integers(start, len(raw)))]))
    except Exception:
        return  # not ours: what cannot be parsed never reaches the archive
    outcome = tensor_or_reason(dataset)
    if isinstance(outcome, str):
        assert "SECRET" not in outcome
    else:
        assert outcome.shape == (1, 64, 64)
        assert 0 <= outcome.min() <= outcome.max() <= 1


def tensor_or_reason(dataset: Dataset) -> NDArray[np.float32] | str:
    try:
        return preprocess(dataset, SPEC)
    except Unreadable as refused:
        return str(refused)


def dcmread_quietly(raw: bytes) -> Dataset:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return studies.read(raw)


_PART10 = {
    syntax: studies.part10(
        image(
            studies.pixels(rows=48, columns=40, bits_stored=8, dtype="uint8"),
            bits_stored=8,
            PatientName="SECRET^NAME",
            WindowCenter="128",
            WindowWidth="200",
            **({} if syntax == "plain" else {"transfer_syntax": syntax}),
        )
    )
    for syntax in (JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, RLELossless, "plain")
}


# --- real files ---------------------------------------------------------------------------------------------------------------

SECOND_DECODERS = ("gdcm", "pyjpegls", "pillow", "pydicom")


def real(name: str) -> Path:
    return shared.data("dicom") / "files" / name


@pytest.mark.filterwarnings("ignore")  # pydicom warns of many of these files when it reads them
@pytest.mark.parametrize("leg", ["J2KR", "RLE", "JPLL", "JLSL", "JLSN", "J2KI", "JPLY"])
def test_the_same_leg_looks_the_same_in_every_transfer_syntax(leg: str) -> None:
    """RG3 of NEMA's compression samples; the 12-bit JPEG Extended ones are those that pylibjpeg and gdcm cannot decode."""
    tensor = preprocess(dcmread(real(f"RG3_{leg}.dcm")), Preprocessing(224))
    wanted = preprocess(dcmread(real("RG3_J2KR.dcm")), Preprocessing(224))
    if leg in ("J2KR", "RLE", "JPLL", "JLSL"):
        assert np.array_equal(tensor, wanted)
    else:
        assert np.abs(tensor - wanted).mean() < 0.004


@pytest.mark.filterwarnings("ignore")
def test_the_same_chest_stored_as_monochrome_1_and_2_looks_the_same() -> None:
    one = dcmread(real("Fake_MONOHR1.dcm"))
    two = dcmread(real("1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm"))
    assert (one.PhotometricInterpretation, two.PhotometricInterpretation) == ("MONOCHROME1", "MONOCHROME2")
    if one.PixelData == two.PixelData:  # only the polarity was changed: then they are each other's negative
        assert np.array_equal(display(one), 255 - display(two))
    else:
        assert np.abs(preprocess(one, SPEC) - preprocess(two, SPEC)).max() <= ONE_GREY_LEVEL


@pytest.mark.filterwarnings("ignore")
def test_every_codec_agrees_with_a_second_decoder_on_every_real_grey_image() -> None:
    """python-gdcm where it is installed, else what pydicom finds; lossy streams too."""
    compared = 0
    for file in sorted((shared.data("dicom") / "files").iterdir()):
        dataset = dcmread(file, force=True)
        syntax = getattr(dataset, "file_meta", Dataset()).get("TransferSyntaxUID")
        if syntax not in (*subject._CODECS, RLELossless):
            continue
        try:
            layout = subject._Layout.of(dataset)
            patterns, meaning = subject._decode(dataset, layout)
        except Unreadable:
            continue
        decoder = get_decoder(syntax)
        for plugin in (name for name in SECOND_DECODERS if name in decoder.available_plugins):
            try:
                reference, _ = decoder.as_array(dataset, index=0, decoding_plugin=plugin, raw=True)
            except (RuntimeError, NotImplementedError, AttributeError, ValueError):
                continue  # 12-bit JPEG: that is why imagecodecs does it here
            assert np.array_equal(meaning[patterns], reference), f"{file.name}: {plugin}"
            compared += 1
            break
    if not compared:
        pytest.skip("no second decoder is installed")
    assert compared >= 40


@pytest.mark.filterwarnings("ignore")
def test_no_file_of_the_corpus_raises_anything_but_unreadable() -> None:
    outcomes = [tensor_or_reason(dcmread(file, force=True)) for file in sorted((shared.data("dicom") / "files").iterdir())]
    reasons = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(outcomes) == 150
    assert len(reasons) <= 80
    assert all(re.fullmatch(r"[A-Za-z0-9 ,;:'()\-]+", reason) for reason in reasons)
