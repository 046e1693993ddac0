"""Pseudonymised Part 10 files, written once and durably: `<pid>/<study>/<series>/<sop>.dcm`.

In: a pseudonymised data set. Out: a read-only file and its digests. A path is made of checked pseudonyms alone; nothing here may
change a file that stands, follow a name that a peer chose, or see an identity.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydicom import Dataset, FileDataset, dcmread, dcmwrite
from pydicom.dataelem import DataElement
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import correct_ambiguous_vr_element, write_data_element
from pydicom.uid import UID

from models import durable
from node.errors import PixelConflict, Refused, disk_full_said
from node.keep.records import Instance

_PID = re.compile(r"OST-[A-Z2-7]{16}")
_UID = re.compile(r"2\.25\.(0|[1-9][0-9]{0,38})")

_NOT_THE_IMAGE = frozenset(
    {
        "PatientAge",
        "PatientSex",
        "FloatPixelData",
        "DoubleFloatPixelData",
        "PixelData",
        "PlanarConfiguration",
        "LossyImageCompression",
        "LossyImageCompressionRatio",
        "DeidentificationMethod",
        "DeidentificationMethodCodeSequence",
        "LossyImageCompressionMethod",
    }
)
"""No part of the header digest: demographics, which are corrected; what a PACS writes anew in another transfer syntax; and our
own version, so that an image sent again after an upgrade is the same image."""


class Archive:
    """The folder of pseudonymised images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        durable.make_folder(folder)

    def put(self, clean: Dataset, instance: Instance) -> tuple[Instance, bool]:
        """Write `clean` durably; on return the file survives a power cut.

        A file that stands under the UID was written before a crash or by another receiver: the same image is left alone,
        whatever its syntax, and described as it is.

        Returns
        -------
        tuple[Instance, bool]
            `instance` with path, digests and transfer syntax of the file, and whether the file is new.

        Raises
        ------
        PixelConflict
            Another image stands under the UID.
        Refused
            An identifier is no pseudonym of ours.
        NoSpace
            The disk is full; no part of a file is left.
        """
        path = self.path(instance)
        filled = self._described(clean, instance)
        if not path.exists() and self._publish(path, clean):
            return filled, True
        durable.sync_folder(path.parent)  # another receiver may have put it there a moment ago
        there = self._described(self.read(instance), instance)
        if not is_same_image(there, filled):
            raise PixelConflict
        return there, False

    def _publish(self, path: Path, clean: Dataset) -> bool:
        """Write the file unless another receiver, of this host or another, puts one there first; say whether it was written."""
        with disk_full_said():
            durable.make_folder(path.parent, below=self.folder)
            try:
                durable.write_with(path, lambda file: dcmwrite(file, clean, enforce_file_format=True), replaces=False)
            except FileExistsError:
                return False
        return True

    def read(self, instance: Instance) -> FileDataset:
        """Read an image back."""
        return dcmread(self.path(instance))

    def holds_same(self, known: Instance, clean: Dataset, new: Instance) -> bool:
        """Say whether the file of `known` holds the image that came as `clean` and `new`."""
        return is_same_image(self._described(self.read(known), known), self._described(clean, new))

    def path(self, instance: Instance) -> Path:
        """Say where the file of `instance` lies (or would); it stays where it was filed, whoever its patient is now."""
        return self.folder / _relative(instance)

    def withdraw(self, instance: Instance) -> None:
        """Remove a file that the catalogue did not take."""
        path = self.path(instance)
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            durable.sync_folder(path.parent)

    def digests(self, clean: Dataset) -> tuple[str, str]:
        """Give header digest and pixel digest of a pseudonymised data set (see `Instance`)."""
        header = hashlib.sha256()
        _feed(header, clean, little_endian=_transfer_syntax(clean).is_little_endian)
        pixels = hashlib.sha256(clean.get("PixelData", b""))
        if len(clean.get("PixelData", b"")) % 2:
            pixels.update(b"\0")  # as it will be padded in the file
        return header.hexdigest(), pixels.hexdigest()

    def _described(self, clean: Dataset, instance: Instance) -> Instance:
        header, pixels = self.digests(clean)
        return replace(
            instance,
            path=_relative(instance).as_posix(),
            header_digest=header,
            pixel_digest=pixels,
            transfer_syntax_uid=str(_transfer_syntax(clean)),
        )


def is_same_image(one: Instance, other: Instance) -> bool:
    """Say whether two files under one UID hold the same image: by the pixels in the same syntax, by the header in another.

    Under two pseudonyms of one person the headers have other dates: in another syntax nothing can be compared: believed.
    """
    if one.transfer_syntax_uid == other.transfer_syntax_uid:
        return one.pixel_digest == other.pixel_digest
    return one.header_digest == other.header_digest or filed_as(one) != filed_as(other)


def filed_as(image: Instance) -> str:
    """Give the pseudonym below which the file lies."""
    return image.path.partition("/")[0]


def _relative(instance: Instance) -> Path:
    """Build the path of an instance; everything in it is a pseudonym."""
    before = filed_as(instance)
    pid = before if _PID.fullmatch(before) else instance.pid
    if not _PID.fullmatch(pid):
        raise Refused("the patient's pseudonym is not one of ours; nothing was written")
    uids = (instance.study_uid, instance.series_uid, instance.sop_uid)
    if not all(_UID.fullmatch(uid) for uid in uids):
        raise Refused("a UID is not one of our pseudonyms; nothing was written")
    return Path(pid, instance.study_uid, instance.series_uid, f"{instance.sop_uid}.dcm")


def _transfer_syntax(dataset: Dataset) -> UID:
    syntax: UID = dataset.file_meta.TransferSyntaxUID
    return syntax


def _feed(digest: hashlib._Hash, dataset: Dataset, *, little_endian: bool) -> None:
    """Feed a data set to a digest as its meaning: Implicit VR Little Endian, UTF-8, neither lengths nor delimiters of sequences.

    So it is the same in every transfer syntax and however a PACS spells lengths; the colour space of the pixels counts for
    MONOCHROME1 and 2 alone, because a compressor may change the others.
    """
    for element in dataset:
        if element.keyword in _NOT_THE_IMAGE:
            continue
        if element.keyword == "PhotometricInterpretation" and not str(element.value).startswith("MONOCHROME"):
            continue
        if element.VR == "SQ":
            digest.update(b"(%08x %d" % (element.tag, len(element.value)))
            for item in element.value:
                digest.update(b"[")
                _feed(digest, item, little_endian=little_endian)
            digest.update(b")")
        else:
            digest.update(_spelt(element, dataset, little_endian=little_endian))


def _spelt(element: DataElement, dataset: Dataset, *, little_endian: bool) -> bytes:
    known = correct_ambiguous_vr_element(element, dataset, little_endian)
    if known.VR == "OW" and not little_endian:  # pydicom leaves the words of OW in the byte order of the file
        words: Any = known.value
        known = DataElement(known.tag, "OW", bytes(byte for pair in zip(words[1::2], words[0::2], strict=True) for byte in pair))
    out = DicomBytesIO()
    out.is_little_endian, out.is_implicit_VR = True, True
    write_data_element(out, known, ["utf8"])
    return out.getvalue()
