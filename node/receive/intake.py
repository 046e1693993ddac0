"""Reception, wired: data set -> pseudonymise -> vault -> archive -> catalogue.

In: one encoded data set and what its C-STORE says of it. Out: `Taken`, and then the object survives a power cut; or an error
of the tree. Each step can be the last before a kill: the next sending of the same object finds what is there and goes on. Nothing
here may return before the object is safe, let an identity into archive, catalogue or log, or pass on what cannot be
judged.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from time import monotonic
from typing import Any

import pydicom.config
from pydicom import Dataset, dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.errors import BytesLengthException
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID

from node import peer
from node.errors import (
    IdentityConflict,
    NotAsAnnounced,
    NotFound,
    NotReleasable,
    NotUnderstood,
    PixelConflict,
    Refused,
    StoreBusy,
)
from node.keep import frozen
from node.keep.archive import Archive, filed_as, is_same_image
from node.keep.catalogue import Catalogue
from node.keep.custody import Custody
from node.keep.quarantine import Quarantine
from node.keep.records import Held, Hold, Instance, Purpose, Role
from node.keep.vault import Vault
from node.logs import event
from node.metrics import disk
from node.metrics.meters import ReceiveMeters
from node.pseudonym import SiteKeys
from node.receive.pseudonymise import Malformed, Pseudonymised, Rules, UnusablePatientID, as_patient, pseudonymise
from node.settings import Settings

log = logging.getLogger("osteon.receive")

RELEASABLE = frozenset({Hold.BURNED_IN, Hold.SECONDARY, Hold.DIGITISED})
"""A person who has looked at the image may overrule these; a modality, or a doubt about the patient, nobody can."""
STUDY, NEWCOMER = "study", "newcomer"
"""Whose a held image is, in a person's word: its study's patient, or the one it names itself."""
BROKEN = (
    *(ValueError, TypeError, AttributeError, KeyError, IndexError, EOFError, OverflowError, RecursionError, struct.error),
    *(NotImplementedError, BytesLengthException),
)
"""What pydicom raises when values are not what their VR and length say."""
_PIXEL_DATA = 0x7FE00010
_UNDEFINED_LENGTH = 0xFFFFFFFF
_ITEM = b"\xfe\xff\x00\xe0"
_DELIMITER = b"\xfe\xff\xdd\xe0\0\0\0\0"
_LOCKS = 64
SILENT_S = 30.0
"""A receiver whose sign of life was not taken for so long is not ready; it leaves one every 5 s."""


class Taken(StrEnum):
    """What became of an object; each is answered 0000."""

    NEW = "new"
    """Archived."""
    KNOWN = "known"
    """It was archived before; identity and purpose are up to date."""
    OURS = "ours"
    """One of this node's own results, routed back; not kept."""
    HELD = "held"
    """Sealed in the quarantine, until a person decides."""


@dataclass(frozen=True, slots=True)
class _Arrival:
    """One object as it came."""

    raw: bytes
    transfer_syntax_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    calling_ae: str
    purpose: Purpose

    def meta(self) -> FileMetaDataset:
        meta = FileMetaDataset()
        meta.FileMetaInformationVersion = b"\0\1"
        meta.MediaStorageSOPClassUID = UID(self.sop_class_uid)
        meta.MediaStorageSOPInstanceUID = UID(self.sop_instance_uid)
        meta.TransferSyntaxUID = UID(self.transfer_syntax_uid)
        meta.ImplementationClassUID = peer.IMPLEMENTATION_CLASS_UID
        return meta

    def part10(self) -> bytes:
        """Give the object as a file: what the quarantine seals."""
        file = DicomBytesIO()
        file.write(b"\0" * 128 + b"DICM")
        write_file_meta_info(file, self.meta())
        file.write(self.raw)
        return file.getvalue()


class _HoldIt(Exception):
    """The object belongs into the quarantine: caught where the quarantine is."""

    def __init__(self, reason: Hold, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Intake:
    """Everything one receiver holds open."""

    def __init__(
        self, settings: Settings, *, keys: SiteKeys, rules: Rules, vault: Vault, archive: Archive, catalogue: Catalogue,
        quarantine: Quarantine, meters: ReceiveMeters | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.keys, self.rules = settings, keys, rules
        self.vault, self.archive, self.catalogue, self.quarantine = vault, archive, catalogue, quarantine
        self.meters = meters or ReceiveMeters()
        self._beaten_at = monotonic()
        self._callers = {caller.ae_title.strip(): caller for caller in settings.node.callers}
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    @classmethod
    def open(cls, settings: Settings, *, meters: ReceiveMeters | None = None) -> Intake:
        """Open the stores; a wrong key or a missing folder is an error before anything is received."""
        # Odd values are what hospitals send; they are judged here, not warned of by pydicom, whose warnings repeat them.
        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        node, storage = settings.node, settings.storage
        rules = Rules.load(
            default_issuer=node.default_issuer,
            placeholder_patient_ids=node.placeholder_patient_ids,
            site_vocabulary=Path(node.vocabulary) if node.vocabulary else None,
        )
        stores = Custody.open(storage)
        return cls(
            settings,
            keys=stores.keys,
            rules=rules,
            vault=stores.vault,
            archive=Archive(storage.root / "archive"),
            catalogue=stores.catalogue,
            quarantine=stores.quarantine,
            meters=meters,
        )

    def beat(self, told: Mapping[str, object]) -> None:
        """Leave a sign of life that `osteon status` shows, and so try both databases."""
        now = _now()
        self.catalogue.roles.beat(Role(name="receive", host=socket.gethostname(), pid=os.getpid(), seen_at=now, told=told))
        self.vault.check_site(self.keys.report_uid("site"))
        self._beaten_at = monotonic()

    def troubles(self) -> list[str]:
        """Say what keeps images from being taken in now; nothing when they can be."""
        found = disk.troubles(self.settings.storage, written=("archive", "quarantine"))
        silent_s = monotonic() - self._beaten_at
        if silent_s > SILENT_S:
            found.append(f"the databases have taken nothing for {silent_s:.0f} s")
        return found

    def close(self) -> None:
        """Close the stores."""
        self.catalogue.close()
        self.vault.close()

    # --- one object --------------------------------------------------------------------------------------------------------

    def take_in(
        self, raw: bytes, *, transfer_syntax_uid: str, sop_class_uid: str, sop_instance_uid: str, calling_ae: str, called_ae: str
    ) -> Taken:
        """Take in one data set; on return it is safe, or it was one of our own results.

        Raises
        ------
        Refused
            A SOP class or transfer syntax that this node does not take, or a structured report of somebody else.
        NotUnderstood, NotAsAnnounced
            The bytes are no data set, or one of another SOP class or instance than the request says.
        Retriable
            A store cannot take it now.
        """
        began = monotonic()
        purpose = self._purpose(calling_ae, called_ae)
        arrival = _Arrival(raw, transfer_syntax_uid, sop_class_uid, sop_instance_uid, calling_ae.strip(), purpose)
        _refuse_strangers(arrival)
        taken: Taken
        told: dict[str, Any]
        if sop_class_uid in peer.RESULT_CLASSES:
            taken, told = self._recognise(arrival), {}
        else:
            taken, told = self._shelve_or_hold(arrival, _parse(arrival))
        seconds = monotonic() - began
        self.meters.taken(taken, calling_ae=arrival.calling_ae, size=len(raw), seconds=seconds, reason=told.get("reason", ""))
        event(
            log,
            {Taken.OURS: "own result recognised", Taken.HELD: "instance held"}.get(taken, "instance stored"),
            **told,
            outcome=taken.value,
            calling_ae=peer.printable(calling_ae),
            purpose=purpose.value,
            status="0000H",
            ms=round(1000 * seconds),
        )
        return taken

    def release(self, held_id: str, *, by: str, reason: str, whose: str = "") -> Taken:
        """Take in what the quarantine holds, because a person says that it may be.

        Parameters
        ----------
        whose
            For an image whose patient is in doubt: `STUDY`, it is of the patient of its study; `NEWCOMER`, it is right, and the
            study was sent under a wrong patient; or a pseudonym, which must be one of these two. "" decides nothing: the image is
            looked at again.

        Raises
        ------
        NotReleasable
            It is held for something that a person cannot overrule, or is still in doubt.
        NotFound
            Nothing is held under `held_id`.
        """
        found = self.catalogue.instances.held_one(held_id)
        if found is None:
            raise NotFound(f"the quarantine holds nothing under {held_id}; `osteon quarantine list` shows what it holds")
        held, _since = found
        if held.reason is Hold.MODALITY:
            raise NotReleasable("only CR and DX go to the archive: what is held for its modality cannot be released")
        file = dcmread(BytesIO(self.quarantine.read(held_id)))
        study = self.catalogue.studies.get(held.study_uid)
        arrival = _arrival_of(file, held, study.purpose if study else held.purpose)  # it may have been sent again meanwhile
        try:
            decision = "released"
            if whose:
                decision += f" as patient of the {self._settle_whose(held, file, whose, by=by, reason=reason)}"
            taken, told = self._shelve(_pseudonymised(file, self.keys, self.rules), arrival, overruled=RELEASABLE)
        except _HoldIt as hold:
            is_doubt = hold.reason in (Hold.PATIENT_CONFLICT, Hold.PATIENT_ID) and not whose
            says_whose = f"say whose it is with --as-patient, as `osteon quarantine show {held_id}` tells"
            remedy = says_whose if is_doubt else "mend it at its source and send it again"
            raise NotReleasable(f"{hold.reason.value}: {hold.detail.rstrip('.')}; {remedy}") from None

        def goes(_since: datetime) -> bool:
            self.quarantine.discard(held_id)
            return True

        self.catalogue.instances.unhold(held_id, by=by, reason=reason, decision=decision, now=_now(), goes=goes)
        event(log, "instance released", **told, outcome=taken.value, held=held_id, reason=held.reason.value)
        return taken

    def gives_study_away(self, held_id: str, whose: str) -> bool:
        """Say whether `release` with `whose` would give the whole study to another patient: a person should be asked first."""
        found = self.catalogue.instances.held_one(held_id)
        if found is None or not whose or whose == STUDY:
            return False
        return (
            whose == NEWCOMER
            or whose not in self.catalogue.patients.person(self.catalogue.patients.whose(found[0].study_uid)).pseudonyms
        )

    def _settle_whose(self, held: Held, file: FileDataset, whose: str, *, by: str, reason: str) -> str:
        """Make image and study name one patient, as a person decided: the study's is written into the image, or the other way.

        Returns
        -------
        str
            Which of the two it was: `STUDY` or `NEWCOMER`.

        Raises
        ------
        NotReleasable
            Nothing is in doubt, nothing says whose the study is, or `whose` is neither of the two.
        """
        if held.reason not in (Hold.PATIENT_CONFLICT, Hold.PATIENT_ID):
            raise NotReleasable(f"whose it is, is not in doubt: it is held for {held.reason.value}")
        try:
            identity = self.vault.study(held.study_uid)
        except NotFound:
            raise NotReleasable(
                "no image of this study came under a usable PatientID, so nothing says whose it is: correct the PatientID in the "
                "PACS, send the study again, and discard this one"
            ) from None
        own = None if held.reason is Hold.PATIENT_ID else _pseudonymised(file, self.keys, self.rules)
        patients = self.catalogue.patients
        theirs = patients.person(identity.pid).pseudonyms
        is_half_given = patients.whose(held.study_uid) not in ("", *theirs)  # cut short, or the study came back otherwise
        if whose == STUDY or (whose in theirs and not is_half_given):
            as_patient(file, identity)
            return STUDY
        if own is not None and (whose == NEWCOMER or whose in patients.person(own.instance.pid).pseudonyms):
            self._correct_study(own, identity.pid, by=by, reason=reason)
            return NEWCOMER
        raise NotReleasable(
            "this is neither the patient of the study nor the one the image names; `osteon patients merge` if two of them are "
            "one person"
        )

    def _correct_study(self, right: Pseudonymised, wrong_pid: str, *, by: str, reason: str) -> None:
        """Give a study that came under a wrong patient first to the patient whom a later image names.

        Nothing changes before it is known that the image will be taken in. The vault first: between the two steps nothing of
        either patient is taken in, doing it again finishes it, and the round that the catalogue opens finds the right patient.
        """
        new, patients = right.instance, self.catalogue.patients
        before = patients.whose(new.study_uid) or wrong_pid
        named_by = self._learned_from(before)
        self._require_fit(right)
        self.vault.hand_over([new.study_uid], right.identity, now=_now())
        is_locked = self.keys.is_locked(new.pid, self.settings.training.locked)
        self.catalogue.studies.reassign(
            new.study_uid, new.pid, locked=is_locked, named_by=named_by, by=by, reason=reason, now=_now()
        )
        # a run that froze its lists between the look and the change did not see the lock, nor the look the lists
        patients.free(new.pid, named_by=self._learned_from(before), by=by, now=_now())

    def _learned_from(self, pid: str) -> str:
        """Say which frozen corpora name a patient, under any pseudonym; "" for none."""
        catalogue = self.catalogue
        return frozen.naming(catalogue, self.settings.storage.root, catalogue.patients.person(pid).pseudonyms)

    def _require_fit(self, found: Pseudonymised) -> None:
        """Hold now what would be held for more than its patient once it is taken in; nothing of it stays."""
        known = self.catalogue.instances.find(found.instance.sop_uid)
        if known is not None:
            self._compare_image(known, found)
        elif found.hold is not None and found.hold not in RELEASABLE:
            raise _HoldIt(found.hold, found.hold_detail)
        else:
            shelved, is_new_file = self._put(found)
            if is_new_file:
                self.archive.withdraw(shelved)

    def _purpose(self, calling_ae: str, called_ae: str) -> Purpose:
        """Say why it was sent: called under the learning title, or by a caller that only teaches, it is never answered."""
        caller = self._callers.get(calling_ae.strip())
        to_learn = called_ae.strip() == self.settings.node.learn_ae_title.strip() or (caller and caller.purpose == "learn")
        return Purpose.LEARN if to_learn else Purpose.ANSWER

    def _recognise(self, arrival: _Arrival) -> Taken:
        """Tell a result of ours, which the PACS routed back, from a report of somebody else."""
        if self.catalogue.results.is_ours(arrival.sop_instance_uid) or _observer_uid(_parse(arrival)) == self.keys.report_uid(
            "device"
        ):
            return Taken.OURS
        raise Refused("structured reports are not taken, but for this node's own results")

    def _shelve_or_hold(self, arrival: _Arrival, dataset: Dataset) -> tuple[Taken, dict[str, Any]]:
        """Archive an image or seal it in the quarantine; one object under a UID at a time."""
        sop_uid = self.keys.uid(arrival.sop_instance_uid)
        with self._locks[hash(sop_uid) % _LOCKS]:
            found: Pseudonymised | None = None
            try:
                found = _pseudonymised(dataset, self.keys, self.rules)
                return self._shelve(found, arrival)
            except _HoldIt as hold:
                return self._hold(hold, arrival, dataset, found)

    def _shelve(
        self, found: Pseudonymised, arrival: _Arrival, *, overruled: frozenset[Hold] = frozenset()
    ) -> tuple[Taken, dict[str, Any]]:
        """Vault, then archive, then catalogue.

        An identity without a file is harmless, a file that nobody can answer for is not, and a row promises both.
        """
        told: dict[str, Any] = {"study": found.instance.study_uid, "instance": found.instance.sop_uid}
        known = self.catalogue.instances.find(found.instance.sop_uid)
        if known is not None:
            self._compare(known, found)
            self._remember(found)
            age_years, sex = found.instance.age_years, found.instance.sex
            if (known.age_years, known.sex) != (age_years, sex):  # the next answer asks for the corrected age
                self.catalogue.instances.correct(known.sop_uid, age_years=age_years, sex=sex)
            self._seen_again(known, arrival)
            return Taken.KNOWN, told
        self._remember(found)  # also what will be held: it must be of the same patient, and may be answered "not applicable"
        if found.hold is not None and found.hold not in overruled:
            raise _HoldIt(found.hold, found.hold_detail)
        shelved, is_new_file = self._put(found)
        try:
            is_new = self.catalogue.instances.note(
                shelved,
                purpose=arrival.purpose,
                calling_ae=arrival.calling_ae,
                locked=self.keys.is_locked(shelved.pid, self.settings.training.locked),
                now=_now(),
            )
        except IdentityConflict as error:
            if is_new_file:
                self.archive.withdraw(shelved)
            raise _HoldIt(Hold.PATIENT_CONFLICT, str(error)) from None
        if is_new and found.dropped:
            self.catalogue.instances.dropped(found.dropped, _now())
        return (Taken.NEW if is_new else Taken.KNOWN), told

    def _compare(self, known: Instance, found: Pseudonymised) -> None:
        """Hold what comes under a known UID and is another image: another patient's, of another series, or of other pixels."""
        pid = found.instance.pid
        if known.pid != pid and pid not in self.catalogue.patients.person(known.pid).pseudonyms:
            raise _HoldIt(Hold.PATIENT_CONFLICT, "the SOP Instance UID is known, of another patient")
        self._compare_image(known, found)

    def _compare_image(self, known: Instance, found: Pseudonymised) -> None:
        """Hold what is another image than the known one, whosever it is; a file that was lost is put back."""
        new = found.instance
        is_filed_elsewhere = filed_as(known) != new.pid
        if (known.study_uid, known.series_uid) != (new.study_uid, new.series_uid):
            raise _HoldIt(Hold.PIXEL_CONFLICT, "the SOP Instance UID is known, in another series")
        if is_filed_elsewhere and self.archive.path(known).exists():
            if not self.archive.holds_same(known, found.clean, new):
                raise _HoldIt(Hold.PIXEL_CONFLICT, "the archive holds other pixels under this SOP Instance UID")
            return
        shelved, file_was_gone = self._put(found)
        if file_was_gone:
            if not is_same_image(known, shelved):
                self.archive.withdraw(shelved)
                raise _HoldIt(Hold.PIXEL_CONFLICT, str(PixelConflict()))
            self.catalogue.instances.refiled(shelved)

    def _seen_again(self, known: Instance, arrival: _Arrival) -> None:
        purpose, calling_ae = arrival.purpose, arrival.calling_ae
        try:
            self.catalogue.instances.seen_again(known.sop_uid, purpose=purpose, calling_ae=calling_ae, now=_now())
        except NotFound:
            raise StoreBusy("the image was removed ([storage.keep_days]) while it came again; send it once more") from None

    def _remember(self, found: Pseudonymised) -> None:
        try:
            self.vault.remember(found.identity, now=_now())
        except IdentityConflict:
            person = self.catalogue.patients.person(found.identity.pid)
            try:
                self.vault.remember(found.identity, now=_now(), person=person)
            except IdentityConflict as error:
                raise _HoldIt(Hold.PATIENT_CONFLICT, str(error)) from None

    def _put(self, found: Pseudonymised) -> tuple[Instance, bool]:
        try:
            return self.archive.put(found.clean, found.instance)
        except PixelConflict as error:
            raise _HoldIt(Hold.PIXEL_CONFLICT, str(error)) from None
        except BROKEN as error:
            raise _HoldIt(Hold.MALFORMED, f"it cannot be written as DICOM ({type(error).__name__})") from None

    def _hold(
        self, hold: _HoldIt, arrival: _Arrival, dataset: Dataset, found: Pseudonymised | None
    ) -> tuple[Taken, dict[str, Any]]:
        """Seal the object as it came, then write down that it is held.

        The id is derived, so that the same object sent again, also after a kill between the two, is the same entry.
        """
        sop_uid = self.keys.uid(arrival.sop_instance_uid)
        held = Held(
            id=self.keys.term("held", "\x1f".join((sop_uid, hold.reason, hashlib.sha256(arrival.raw).hexdigest()))),
            reason=hold.reason,
            detail=hold.detail,
            modality=found.instance.modality if found else "",
            sop_class_uid=arrival.sop_class_uid,
            study_uid=found.instance.study_uid if found else self._study_uid(dataset),
            sop_uid=sop_uid,
            pid=found.instance.pid if found and hold.reason is not Hold.PATIENT_CONFLICT else "",
            calling_ae=arrival.calling_ae,
            purpose=arrival.purpose,
        )
        is_new_file = self._seal(arrival, held)
        try:
            # asked once more under the row: its limit or a person may have taken the file before the object came anew
            self.catalogue.instances.hold(held, now=_now(), seal=lambda: self._seal(arrival, held))
        except IdentityConflict as error:  # the catalogue knows of a patient that the vault does not
            if is_new_file:
                self.quarantine.discard(held.id)
            return self._hold(_HoldIt(Hold.PATIENT_CONFLICT, str(error)), arrival, dataset, found)
        return Taken.HELD, {"study": held.study_uid, "instance": held.sop_uid, "reason": held.reason.value, "held": held.id}

    def _seal(self, arrival: _Arrival, held: Held) -> bool:
        """Put the object into the quarantine unless its file stands there; say whether it was put. A row alone proves no file.

        On return it survives a power cut, whoever put it.
        """
        if self.quarantine.holds(held.id):
            return False
        self.vault.require_key()  # nothing is sealed with a key that was changed under this process
        self.quarantine.put(arrival.part10(), held)
        return True

    def _study_uid(self, dataset: Dataset) -> str:
        try:
            original = str(dataset.get("StudyInstanceUID") or "").strip()
        except BROKEN:
            return ""
        return self.keys.uid(original) if original else ""


# --- reading -------------------------------------------------------------------------------------------------------------------


def _refuse_strangers(arrival: _Arrival) -> None:
    if arrival.sop_class_uid not in (*peer.IMAGE_CLASSES, *peer.RESULT_CLASSES):
        raise Refused("this SOP class is not taken")
    if arrival.transfer_syntax_uid not in peer.IMAGE_SYNTAXES:
        raise Refused("this transfer syntax is not taken")


def _parse(arrival: _Arrival) -> FileDataset:
    """Read the header; values are converted only when they are asked for.

    Raises
    ------
    NotUnderstood
        It is no data set, or one without SOP class and instance.
    NotAsAnnounced
        These are others than the request says.
    """
    syntax = UID(arrival.transfer_syntax_uid)
    try:
        read = read_dataset(BytesIO(arrival.raw), syntax.is_implicit_VR, syntax.is_little_endian)
        said = tuple(str(read.get(keyword) or "").strip(" \0") for keyword in ("SOPClassUID", "SOPInstanceUID"))
    except (*BROKEN, OSError) as error:  # pydicom's OSError: a sequence that ends too early
        raise NotUnderstood(f"no data set in the announced transfer syntax ({type(error).__name__})") from None
    if not all(said):
        raise NotUnderstood("no data set with a SOP class and a SOP instance")
    if said != (arrival.sop_class_uid, arrival.sop_instance_uid):
        raise NotAsAnnounced
    return FileDataset("", read, preamble=b"\0" * 128, file_meta=arrival.meta(), is_implicit_VR=syntax.is_implicit_VR,
                       is_little_endian=syntax.is_little_endian)  # fmt: skip


def _pseudonymised(dataset: Dataset, keys: SiteKeys, rules: Rules) -> Pseudonymised:
    """Pseudonymise an image, or say why it must be held."""
    try:
        _check_pixels(dataset)
        return pseudonymise(dataset, keys, rules)
    except UnusablePatientID as error:
        raise _HoldIt(Hold.PATIENT_ID, str(error)) from None
    except Malformed as error:
        raise _HoldIt(Hold.MALFORMED, str(error)) from None
    except BROKEN as error:
        raise _HoldIt(Hold.MALFORMED, f"a value is not what its VR says ({type(error).__name__})") from None


def _check_pixels(dataset: Dataset) -> None:
    """Hold an image without pixels, and one whose pixels are not stored as its transfer syntax says (PS3.5 A.4)."""
    element = dataset.get_item(_PIXEL_DATA) if "PixelData" in dataset else None
    value = bytes(element.value or b"") if element else b""
    if not value:
        raise _HoldIt(Hold.MALFORMED, "an image without pixel data")
    is_open = getattr(element, "is_undefined_length", False) or getattr(element, "length", 0) == _UNDEFINED_LENGTH
    # Some write fragments with a length around them: against PS3.5 A.4, but plain what is meant.
    fits = _is_fragments(value) if dataset.file_meta.TransferSyntaxUID.is_encapsulated else not is_open
    if not fits:
        raise _HoldIt(Hold.MALFORMED, "the pixel data are not in the announced transfer syntax")


def _is_fragments(value: bytes) -> bool:
    """Say whether a value is items one after the other and nothing else: what stands between them is no pixel data."""
    value, at = value.removesuffix(_DELIMITER), 0
    while value[at : at + 4] == _ITEM and at + 8 <= len(value):
        at += 8 + int.from_bytes(value[at + 4 : at + 8], "little")
    return 0 < at == len(value)


def _arrival_of(file: FileDataset, held: Held, purpose: Purpose) -> _Arrival:
    meta = file.file_meta
    return _Arrival(
        raw=b"",  # it is sealed already
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
        sop_class_uid=str(meta.MediaStorageSOPClassUID),
        sop_instance_uid=str(meta.MediaStorageSOPInstanceUID),
        calling_ae=held.calling_ae,
        purpose=purpose,
    )


def _observer_uid(report: Dataset) -> str:
    """Give the Device Observer UID (121012, DCM) that a structured report states, empty when it states none."""
    try:
        for item in report.get("ContentSequence") or []:
            name = (item.get("ConceptNameCodeSequence") or [Dataset()])[0]
            if (name.get("CodeValue"), name.get("CodingSchemeDesignator")) == ("121012", "DCM"):
                return str(item.get("UID") or "")
    except BROKEN:
        pass
    return ""


def _now() -> datetime:
    return datetime.now(UTC)
