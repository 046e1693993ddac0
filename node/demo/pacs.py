"""A small PACS of ours, for the demo where no Orthanc is installed and for tests: a storage SCP that also answers C-FIND.

In: C-ECHO, C-STORE of any storage class and syntax, Study Root C-FIND at STUDY level. Out: Part 10 files in `folder`, as the
bytes that came. It keeps identified data in clear, as a PACS does: it is never part of a node. It binds loopback unless told
otherwise, and refuses callers and called titles that it was not told of.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from time import sleep
from types import TracebackType

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)
from pynetdicom.transport import ThreadedAssociationServer

from models import durable
from node import peer

SUCCESS = 0x0000
PENDING = 0xFF00
CANCELLED = 0xFE00
IDENTIFIER_DOES_NOT_MATCH = 0xA900

_STUDY_KEYS = (
    "SpecificCharacterSet",
    "StudyInstanceUID",
    "PatientID",
    "PatientName",
    "IssuerOfPatientID",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "StudyDescription",
)


class Pacs:
    """A running PACS, for the length of a `with` block.

    The plain attributes are what a test may change while it runs, to see what a failing PACS does to its peers.
    """

    def __init__(
        self,
        folder: Path,
        *,
        callers: Sequence[str] = ("OSTEON",),
        ae_title: str = "PACS",
        host: str = "127.0.0.1",
        port: int = 0,
        sop_classes: Sequence[str] | None = None,
        syntaxes: Sequence[str] = ALL_TRANSFER_SYNTAXES,
        finds: bool = True,
    ) -> None:
        self.folder = folder
        self.ae_title = ae_title
        self.callers = tuple(callers)
        self.host = host
        self.port = port
        """The port it listens on; known once it runs, when 0 was asked for."""
        self.received: list[Path] = []
        """The file of each C-STORE that was answered with success or a warning, in order; a repeat names its file again."""
        self.store_status = SUCCESS
        """What a C-STORE is answered with; the object is kept when it is success or a warning."""
        self.find_status = SUCCESS
        """What a C-FIND ends with; matches are sent only before a success."""
        self.delay_s = 0.0
        """How long it waits before it answers a C-STORE or C-FIND."""
        self.aborts = False
        """Whether it aborts the association instead of answering a C-STORE."""
        self.aborts_find = False
        """Whether it aborts the association instead of answering a C-FIND."""
        self.ignores_keys = False
        """Whether it answers a C-FIND with every study it holds."""
        self.associations = 0
        """How many associations it has accepted."""
        self._sop_classes, self._syntaxes, self._finds = sop_classes, list(syntaxes), finds
        self._held: dict[str, Path] = {}
        self._lock = threading.Lock()
        self._server: ThreadedAssociationServer | None = None

    def start(self) -> None:
        """Listen; `port` is known afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.dcm")):
            self._held[path.stem] = path
        entity: AE = peer.ae(self.ae_title)
        entity.require_calling_aet = list(self.callers)
        entity.require_called_aet = True
        entity.maximum_pdu_size = 0
        entity.add_supported_context(Verification)
        if self._finds:
            entity.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
        known = [context.abstract_syntax for context in AllStoragePresentationContexts]
        for sop_class in known if self._sop_classes is None else self._sop_classes:
            if sop_class is not None:
                entity.add_supported_context(sop_class, self._syntaxes)
        handlers = [
            (evt.EVT_ACCEPTED, self._on_accepted),
            (evt.EVT_C_ECHO, lambda event: SUCCESS),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_C_FIND, self._on_find),
        ]
        self._server = entity.start_server((self.host, self.port), block=False, evt_handlers=handlers)  # type: ignore[arg-type]
        if self._server is not None:
            self.port = self._server.server_address[1]

    def stop(self) -> None:
        """Stop listening and end the associations; what was received stays in `folder`."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            for thread in self._server.active_associations:
                thread.abort()
            self._server = None

    def __enter__(self) -> Pacs:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def put(self, dataset: Dataset) -> Path:
        """Keep an object as if it had been sent before; it does not count as received."""
        out = BytesIO()
        dcmwrite(out, dataset, enforce_file_format=True)
        return self._keep(str(dataset.SOPInstanceUID), out.getvalue())

    def held(self, modality: str | None = None) -> list[Path]:
        """Give the files of all objects it holds (of one modality), one an instance."""
        with self._lock:
            paths = sorted(self._held.values())
        return [path for path in paths if modality is None or _header(path).get("Modality") == modality]

    def _keep(self, sop_uid: str, part10: bytes) -> Path:
        path = self.folder / f"{''.join(char for char in sop_uid if char in '.0123456789')}.dcm"
        durable.write(path, part10, mode=0o600)
        with self._lock:
            self._held[sop_uid] = path
        return path

    def _on_accepted(self, event: evt.Event) -> None:
        self.associations += 1

    def _on_store(self, event: evt.Event) -> int:
        sleep(self.delay_s)
        if self.aborts:
            event.assoc.abort()
            return SUCCESS
        if self.store_status == SUCCESS or self.store_status >> 12 == 0xB:
            path = self._keep(str(event.file_meta.MediaStorageSOPInstanceUID), event.encoded_dataset())
            with self._lock:
                self.received.append(path)
        return self.store_status

    def _on_find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        sleep(self.delay_s)
        if self.aborts_find:
            event.assoc.abort()
            return
        query = event.identifier
        if query.get("QueryRetrieveLevel") != "STUDY":
            yield IDENTIFIER_DOES_NOT_MATCH, None
            return
        if self.find_status != SUCCESS:
            yield self.find_status, None
            return
        answered = set()
        for path in self.held():
            header = _header(path)
            whose = (header.get("StudyInstanceUID"), header.get("PatientID"))
            if event.is_cancelled:
                yield CANCELLED, None
                return
            if whose not in answered and (self.ignores_keys or _matches(header, query)):
                answered.add(whose)
                yield PENDING, _answer(header, query, self.ae_title)


def _header(path: Path) -> Dataset:
    return dcmread(path, stop_before_pixels=True, force=True)


def _matches(header: Dataset, query: Dataset) -> bool:
    """Compare the study keys that the query gives a value for, exactly or by the wild cards * and ? (PS3.4 C.2.2.2)."""
    wanted = {keyword: str(query.get(keyword) or "") for keyword in _STUDY_KEYS if keyword != "SpecificCharacterSet"}
    patterns = {keyword: re.escape(value).replace(r"\*", ".*").replace(r"\?", ".") for keyword, value in wanted.items() if value}
    return all(re.fullmatch(pattern, str(header.get(keyword, ""))) for keyword, pattern in patterns.items())


def _answer(header: Dataset, query: Dataset, ae_title: str) -> Dataset:
    """Give the keys that were asked for, as the study's first object says them."""
    answer = Dataset()
    answer.QueryRetrieveLevel = "STUDY"
    answer.RetrieveAETitle = ae_title
    for keyword in _STUDY_KEYS:
        if keyword in query or keyword in ("SpecificCharacterSet", "StudyInstanceUID"):
            value = header.get(keyword)
            if value is not None or keyword != "SpecificCharacterSet":
                setattr(answer, keyword, "" if value is None else value)
    return answer
