"""Who may call, what is negotiated, and what each C-STORE is answered.

In: associations. Out: the bytes of each data set for the intake, and a status for the peer. Nothing here may parse a data set,
answer success before the intake has returned, hold more than one object an association, or log what a peer sent but its AE title
and address.

pynetdicom 3.0 is used by its public events. Three of its habits are mended by them: a C-STORE request without a SOP Instance
UID is never answered, PDUs longer than negotiated are read, and nothing bounds a data set, or requests sent ahead of answers.
"""

from __future__ import annotations

import logging
import secrets
import socket
import socketserver
import threading
from collections.abc import Callable
from io import BytesIO
from time import monotonic, sleep
from typing import Any, Protocol, cast

from pydicom import Dataset
from pynetdicom import build_context, evt
from pynetdicom.association import Association
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.events import Event
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer

from node import peer
from node.errors import BadSettings, Refused, TooLarge
from node.logs import bound, safe_message
from node.logs import event as say
from node.metrics.meters import ReceiveMeters
from node.receive import status
from node.settings import Caller, Node

log = logging.getLogger("osteon.receive")

MAX_COMMAND_BYTES = 1 << 16
MAX_ASSOCIATE_BYTES = 1 << 17
"""An A-ASSOCIATE-RQ is not under the negotiated maximum (PS3.8 D.1); 128 presentation contexts fit in this."""
WAITING_CONNECTIONS = 16
"""Connections over `max_associations` that may wait for their rejection; more are closed at once."""
ACSE_TIMEOUT_S = 15.0
GRACE_S = 10.0
RECV_BYTES = 1 << 18

# PS3.8 9.3.4: result, source, reason of an A-ASSOCIATE-RJ
_NO_REASON = (1, 1, 1, "no reason given")
_CALLING_UNKNOWN = (1, 1, 3, "calling AE title not recognised")
_CALLED_UNKNOWN = (1, 1, 7, "called AE title not recognised")
_LIMIT = "local limit exceeded"
"""What pynetdicom answers itself: result 2, source 3, reason 2."""


class TakeIn(Protocol):
    """Takes one data set in; what it returns on is safe, what it cannot take it raises (see `node.receive.status`)."""

    def __call__(
        self, raw: bytes, *, transfer_syntax_uid: str, sop_class_uid: str, sop_instance_uid: str, calling_ae: str, called_ae: str
    ) -> object:
        """Take in the encoded data set `raw`."""


class Listener:
    """The door: listens on `[node] host` and `port`, and gives each data set to `take_in`."""

    def __init__(self, node: Node, take_in: TakeIn, *, meters: ReceiveMeters | None = None) -> None:
        self.node = node
        self.meters = meters or ReceiveMeters()
        self.meters.expect(
            reasons=[*(verdict[3] for verdict in (_NO_REASON, _CALLING_UNKNOWN, _CALLED_UNKNOWN)), _LIMIT],
            statuses=[peer.status_text(code) for code in status.FAILURES],
        )
        self.port = 0
        """The port bound, known once started."""
        self._take_in = take_in
        self._callers = {caller.ae_title.strip(): caller for caller in node.callers}
        self._called = {node.ae_title.strip(), node.learn_ae_title.strip()}
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._working = _Counter()

    def start(self) -> None:
        """Listen from now on, in threads of its own.

        Raises
        ------
        BadSettings
            The address cannot be bound.
        """
        entity = peer.ae(self.node.ae_title)
        entity.maximum_associations = self.node.max_associations
        entity.maximum_pdu_size = self.node.max_pdu
        entity.network_timeout = self.node.idle_timeout_s
        entity.acse_timeout = min(ACSE_TIMEOUT_S, self.node.idle_timeout_s)
        handlers = [
            (evt.EVT_CONN_OPEN, self._on_connection),
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_REJECTED, self._on_rejected),
            (evt.EVT_ABORTED, self._on_aborted),
            (evt.EVT_C_ECHO, self._on_echo),
            (evt.EVT_C_STORE, self._on_store),
        ]
        try:
            made = entity.make_server(
                (self.node.host, self.node.port), contexts=contexts(), evt_handlers=cast(Any, handlers), server_class=_Server
            )
        except OSError as error:
            where = f"{self.node.host}:{self.node.port}"
            raise BadSettings(f"[node] host, port: cannot listen on {where} ({error.strerror}); is it in use?") from None
        server = cast(_Server, made)
        server.connections = self.node.max_associations + WAITING_CONNECTIONS
        self._server, self.port = server, int(server.server_address[1])
        self.meters.open.set_function(lambda: sum(one.is_established for one in server.active_associations))
        self._thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="listener", daemon=True)
        self._thread.start()

    def listens(self) -> bool:
        """Say whether somebody takes connections."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise `RuntimeError` when nobody listens any more: a role that only looks alive must end and be started again."""
        if not self.listens():
            raise RuntimeError("the listener has ended")

    def stop(self, *, grace_s: float = GRACE_S) -> None:
        """Take no more connections, finish what is being taken in, and end the associations."""
        if self._server is None:
            return
        server, self._server = self._server, None
        socketserver.BaseServer.shutdown(server)
        server.server_close()
        deadline = monotonic() + grace_s
        while self._working.value and monotonic() < deadline:
            sleep(0.02)
        for association in server.active_associations:
            association.abort()

    # --- who may call ------------------------------------------------------------------------------------------------------

    def _on_connection(self, event: Event) -> None:
        _Guard(event.assoc, self.node, self.meters).stand()

    def _on_requested(self, event: Event) -> None:
        """Admit a listed caller from a listed network under one of our titles; reject everything else, also on a fault here."""
        association = event.assoc
        calling, called = "", ""
        verdict: tuple[int, int, int, str] | None = _NO_REASON
        try:
            request = cast(A_ASSOCIATE, association.requestor.primitive)
            calling, called = request.calling_ae_title.strip(), request.called_ae_title.strip()
            verdict = self._verdict(self._callers.get(calling), called, association.requestor.address)
        finally:
            if verdict is None:
                _guard(association).admit(calling, called)
                self._say_accepted(association)
            else:
                result, source, reason, why = verdict
                association.acse.send_reject(result, source, reason)
                self._say_rejected(association, calling, called, why)
                association.kill()

    def _verdict(self, caller: Caller | None, called: str, address: str) -> tuple[int, int, int, str] | None:
        if caller is None or not caller.calls_from(address):
            return _CALLING_UNKNOWN
        return None if called in self._called else _CALLED_UNKNOWN

    def _on_rejected(self, event: Event) -> None:
        """Say that pynetdicom itself rejected: too many associations (PS3.8 9.3.4: transient, local limit exceeded)."""
        guard = _guard(event.assoc)
        self._say_rejected(event.assoc, guard.calling_ae, guard.called_ae, _LIMIT)

    def _say_accepted(self, association: Association) -> None:
        guard = _guard(association)
        self.meters.accepted(guard.calling_ae)
        say(
            log,
            "association accepted",
            association=guard.id,
            calling_ae=peer.printable(guard.calling_ae),
            called_ae=peer.printable(guard.called_ae),
            address=association.requestor.address,
        )

    def _say_rejected(self, association: Association, calling: str, called: str, why: str) -> None:
        self.meters.rejected(why)
        say(
            log,
            "association rejected",
            level=logging.WARNING,
            calling_ae=peer.printable(calling),
            called_ae=peer.printable(called),
            address=association.requestor.address,
            reason=why,
        )

    def _on_aborted(self, event: Event) -> None:
        guard = _guard(event.assoc)
        self.meters.aborted(guard.calling_ae)
        calling = peer.printable(guard.calling_ae)
        say(log, "association aborted", level=logging.WARNING, association=guard.id, calling_ae=calling)

    # --- what is asked -----------------------------------------------------------------------------------------------------

    def _on_echo(self, event: Event) -> int:
        return status.SUCCESS if _guard(event.assoc).admitted else status.NOT_AUTHORISED

    def _on_store(self, event: Event) -> int | Dataset:
        """Give the data set to the intake and answer what became of it; never raises."""
        guard, began = _guard(event.assoc), monotonic()
        if not guard.admitted:
            return status.NOT_AUTHORISED
        with self._working, bound(association=guard.id):
            try:
                self._store(event, guard)
            except Exception as error:  # the rim: whatever it is, the peer gets a status and the log one line
                code = status.status_of(error)
                self.meters.refused(peer.status_text(code))
                say(
                    log,
                    "instance refused",
                    level=logging.ERROR if code == status.UNEXPECTED else logging.WARNING,
                    calling_ae=peer.printable(guard.calling_ae),
                    status=peer.status_text(code),
                    reason=safe_message(error),
                    ms=round(1000 * (monotonic() - began)),
                )
                return _answer(code, safe_message(error))
        return status.SUCCESS

    def _store(self, event: Event, guard: _Guard) -> None:
        request = cast(C_STORE, event.request)
        data_set = request.DataSet
        if isinstance(data_set, _Discarded) or data_set is None or len(data_set.getbuffer()) > guard.max_object_bytes:
            raise TooLarge
        if request.AffectedSOPClassUID != event.context.abstract_syntax:
            raise Refused("the C-STORE request names another SOP class than its presentation context")
        self._take_in(
            data_set.getvalue(),
            transfer_syntax_uid=str(event.context.transfer_syntax),
            sop_class_uid=str(request.AffectedSOPClassUID),
            sop_instance_uid=str(request.AffectedSOPInstanceUID),
            calling_ae=guard.calling_ae,
            called_ae=guard.called_ae,
        )


def contexts() -> list[PresentationContext]:
    """Give what is accepted: C-ECHO, the image classes in every syntax, and the classes of our own results, uncompressed."""
    images = [build_context(uid, list(peer.IMAGE_SYNTAXES)) for uid in peer.IMAGE_CLASSES]
    results = [build_context(uid, list(peer.UNCOMPRESSED)) for uid in peer.RESULT_CLASSES]
    return [build_context(Verification, list(peer.UNCOMPRESSED)), *images, *results]


def _answer(code: int, comment: str) -> Dataset:
    answer = Dataset()
    answer.Status = code
    answer.ErrorComment = comment[:64]  # LO; the tree's messages hold no identity
    return answer


def _guard(association: Association) -> _Guard:
    return cast("_Guard", getattr(association, _GUARD))


_GUARD = "osteon_guard"


class _Violation(Exception):
    """The peer broke the negotiated rules; raised where pynetdicom answers any exception with an A-ABORT."""


class _Discarded(BytesIO):
    """Stands in for a data set that grew too large: swallows the rest."""

    def write(self, data: Any, /) -> int:
        return len(data)


class _Guard:
    """Bounds what one association can make this process hold, and remembers whom it admitted."""

    def __init__(self, association: Association, node: Node, meters: ReceiveMeters) -> None:
        self.association, self.meters = association, meters
        self.max_object_bytes = node.max_object_mb << 20
        self.max_pdu_bytes = node.max_pdu
        self.idle_timeout_s = node.idle_timeout_s
        self.id = secrets.token_hex(4)
        """By which the log names this association."""
        self.calling_ae = self.called_ae = ""
        self.admitted = False
        self._unanswered = False
        self._fault = ""

    def stand(self) -> None:
        """Watch the association's messages, and read its socket only within bounds."""
        setattr(self.association, _GUARD, self)
        self.association.bind(evt.EVT_PDU_RECV, self._on_pdu)
        self.association.bind(evt.EVT_DIMSE_RECV, self._on_message)
        self.association.bind(evt.EVT_DIMSE_SENT, self._on_answer)
        transport = cast(Any, self.association.dul.socket)
        transport.recv = self._reader(transport.socket)

    def admit(self, calling_ae: str, called_ae: str) -> None:
        """Let it ask."""
        self.calling_ae, self.called_ae, self.admitted = calling_ae, called_ae, True

    def _reader(self, connection: socket.socket) -> Callable[[int], bytearray]:
        """Make what pynetdicom reads a PDU with: it asks for 6 bytes of header, then for as many as the peer claims.

        The whole must come in time: pynetdicom would wait for ever for the rest of a PDU, in a thread that it cannot end.
        """

        def recv(nr_bytes: int) -> bytearray:
            settled = self.association.is_established
            limit = self.max_pdu_bytes if settled else max(MAX_ASSOCIATE_BYTES, self.max_pdu_bytes)
            fault = self._fault or ("PDU longer than negotiated" if nr_bytes > limit else "")
            if fault:
                calling = peer.printable(self.calling_ae)
                say(log, "association aborted", level=logging.WARNING, association=self.id, calling_ae=calling, reason=fault)
                raise _Violation(fault)
            deadline = monotonic() + (self.idle_timeout_s if settled else min(ACSE_TIMEOUT_S, self.idle_timeout_s))
            read = bytearray()
            while len(read) < nr_bytes:
                connection.settimeout(max(0.001, deadline - monotonic()))
                part = connection.recv(min(nr_bytes - len(read), RECV_BYTES))
                if not part:
                    break
                read += part
            return read

        return recv

    def _on_pdu(self, event: Event) -> None:
        """See each PDU before its fragments are joined: what was joined so far must be within bounds."""
        if not isinstance(event.pdu, P_DATA_TF):
            return
        if self._unanswered:
            self._fault = "a request ahead of the answer to the last one"  # PS3.7 D.3.3.3: no asynchronous window was agreed
        message = self.association.dimse.message
        if message is None:
            return
        if message.encoded_command_set.tell() > MAX_COMMAND_BYTES:
            self._fault = "command set too long"
        if message.data_set is not None and message.data_set.tell() > self.max_object_bytes:
            message.data_set = _Discarded()

    def _on_message(self, event: Event) -> None:
        message = event.message
        if not isinstance(message, C_STORE_RQ):
            return
        command = message.command_set
        if command.get("AffectedSOPClassUID") and command.get("AffectedSOPInstanceUID"):
            self._unanswered = True
        elif command.get("MessageID") is not None:
            self._answer_incomplete(command, message.context_id)

    def _on_answer(self, event: Event) -> None:
        self._unanswered = False

    def _answer_incomplete(self, command: Dataset, context_id: int | None) -> None:
        """Answer a request that names no SOP class or instance; pynetdicom drops it, and the peer would wait for its time-out."""
        answer = C_STORE()
        answer.MessageIDBeingRespondedTo = command.MessageID
        answer.AffectedSOPClassUID = command.get("AffectedSOPClassUID") or None
        answer.Status = status.INVALID_SOP_INSTANCE
        self.meters.refused(peer.status_text(status.INVALID_SOP_INSTANCE))
        say(
            log,
            "instance refused",
            level=logging.WARNING,
            association=self.id,
            calling_ae=peer.printable(self.calling_ae),
            status=peer.status_text(status.INVALID_SOP_INSTANCE),
            reason="the C-STORE request names no SOP class or instance",
        )
        self.association.dimse.send_msg(answer, cast(int, context_id))


class _Counter:
    """Counts who is inside a `with` block, in any thread."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.value += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.value -= 1


class _Server(ThreadedAssociationServer):
    """pynetdicom's server, with a bound on connections and a quiet voice."""

    request_queue_size = 64
    connections = 1

    def verify_request(self, request: object, client_address: object) -> bool:
        """Close connections over the bound before a thread is spent on them."""
        return len(self.active_associations) < self.connections

    def handle_error(self, request: object, client_address: object) -> None:
        """Log a fault of accepting a connection without a traceback on stderr."""
        say(log, "connection failed", level=logging.WARNING)
