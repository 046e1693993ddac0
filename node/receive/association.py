"""Who may call, what is negotiated, and what each C-STORE is answered.

In: connections, plain and over TLS. Out: the bytes of each data set for the intake, and a status for the peer. Nothing here may
parse a data set, answer success before the intake has returned, hold more than one object an association, let a peer make
another one wait, wait for a peer without an end, or log what a peer sent but its AE title, its address and the fingerprint of its
certificate.

pynetdicom 3.0 is used by its public events. Its habits that are mended by them: a C-STORE request without a SOP Instance UID is
never answered, PDUs longer than negotiated are read, nothing bounds a data set, or requests sent ahead of answers. Its server is
given connections only once they have something to say: it would shake hands in the loop that accepts, and spend two threads on
each silent connection.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import socketserver
import ssl
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
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
from pynetdicom.pdu_primitives import A_ASSOCIATE, UserIdentityNegotiation
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer

from models.errors import Final
from node import peer, tls
from node.errors import BadSettings, Refused, TooLarge
from node.logs import bound, safe_message
from node.logs import event as say
from node.metrics.meters import ReceiveMeters
from node.receive import status
from node.settings import Caller, Node, load_passcode

log = logging.getLogger("osteon.receive")

MAX_COMMAND_BYTES = 1 << 16
MAX_ASSOCIATE_BYTES = 1 << 17
"""An A-ASSOCIATE-RQ is not under the negotiated maximum (PS3.8 D.1); 128 presentation contexts fit in this."""
WAITING = 128
"""Connections that were not admitted yet, at most: in their handshake, before their request, or on their way out."""
WAITING_PER_ADDRESS = 32
"""The same from one address; one more closes the oldest of them, so that who stalls is in the way of nobody."""
OPENING_TIMEOUT_S = 15.0
"""For the TLS handshake and the first byte together; then again for the A-ASSOCIATE request."""
GRACE_S = 10.0
TLS_RECORD = b"\x16"
"""What a TLS handshake begins with."""
SAY_AGAIN_S = 60.0
"""The same trouble from the same address is logged once in this time, with how often it was."""
SAID_AT_MOST = 1024
"""So many troubles are remembered for that."""
UNLIMITED = 1 << 16

# PS3.8 9.3.4: result, source, reason of an A-ASSOCIATE-RJ
_NO_REASON = (1, 1, 1, "no reason given")
_CALLING_UNKNOWN = (1, 1, 3, "calling AE title not recognised")
_NOT_ITS_CERTIFICATE = (1, 1, 3, "the certificate is not one of this calling AE title")
_CALLED_UNKNOWN = (1, 1, 7, "called AE title not recognised")
_NOT_ITS_USER = (1, 1, 1, "user identity missing or wrong")
_TOO_MANY = (2, 3, 2, "local limit exceeded")
_TOO_MANY_OF_CALLER = (2, 3, 2, "local limit exceeded: max_associations of this caller")
NO_HANDSHAKE = "TLS handshake failed"
"""Among the reasons of rejections: nothing was asked for yet."""
_VERDICTS = (
    *(_NO_REASON, _CALLING_UNKNOWN, _NOT_ITS_CERTIFICATE, _CALLED_UNKNOWN, _NOT_ITS_USER),
    *(_TOO_MANY, _TOO_MANY_OF_CALLER),
)
Verdict = tuple[int, int, int, str]


class TakeIn(Protocol):
    """Takes one data set in; what it returns on is safe, what it cannot take it raises (see `node.receive.status`)."""

    def __call__(
        self, raw: bytes, *, transfer_syntax_uid: str, sop_class_uid: str, sop_instance_uid: str, calling_ae: str, called_ae: str
    ) -> object:
        """Take in the encoded data set `raw`."""


class Listener:
    """The door: listens on `[node] host`, in clear and over TLS as the settings say, and gives each data set to `take_in`."""

    def __init__(self, node: Node, take_in: TakeIn, *, meters: ReceiveMeters | None = None) -> None:
        self.node = node
        self.meters = meters or ReceiveMeters()
        self.meters.expect(
            reasons=[NO_HANDSHAKE, *(verdict[3] for verdict in _VERDICTS)],
            statuses=[peer.status_text(code) for code in status.FAILURES],
        )
        self.meters.open.set_function(lambda: sum(one.is_established for one in self._admitted))
        self.port = self.tls_port = 0
        """The ports bound, known once started; 0 is none."""
        self.certificate_until = ""
        """The day on which our certificate stops being valid; empty without TLS."""
        self._take_in = take_in
        self._callers = {caller.ae_title.strip(): caller for caller in node.callers}
        self._called = {node.ae_title.strip(), node.learn_ae_title.strip()}
        self._passcodes: dict[str, bytes] = {}
        self._servers: list[_Server] = []
        self._threads: list[threading.Thread] = []
        self._waiting = _Waiting()
        self._admitted: list[Association] = []
        self._admitting = threading.Lock()
        self._tls_files = [file for file in (node.tls.certificate, node.tls.key, node.tls.ca, node.tls.crl) if file]
        self._tls_seen = tls.stamp(self._tls_files)

    def start(self) -> None:
        """Listen from now on, in threads of its own.

        Raises
        ------
        BadSettings, BadKey
            An address cannot be bound, or a certificate, key or passcode cannot be used.
        """
        self._passcodes = {title: load_passcode(caller.passcode) for title, caller in self._callers.items() if caller.passcode}
        context = self._context() if self.node.tls.on else None
        try:
            if self.node.listens_in_clear:
                self.port = self._listen("[node] host, port", self.node.port, None)
            if context is not None:
                self.tls_port = self._listen("[node] host, [node.tls] port", self.node.tls.port, context)
        except BadSettings:
            self.stop()
            raise

    def _context(self) -> ssl.SSLContext:
        context = tls.server_context(self.node.tls)
        self.certificate_until = f"{tls.ends(self.node.tls.certificate):%Y-%m-%d}"
        return context

    def _listen(self, named: str, port: int, context: ssl.SSLContext | None) -> int:
        entity = peer.ae(self.node.ae_title)
        entity.maximum_associations = UNLIMITED  # pynetdicom counts connections; `_verdict` counts whom it admitted
        entity.maximum_pdu_size = self.node.max_pdu
        entity.network_timeout = self.node.idle_timeout_s
        entity.acse_timeout = self._opening_s
        handlers = [
            (evt.EVT_CONN_OPEN, self._on_connection),
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_ABORTED, self._on_aborted),
            (evt.EVT_C_ECHO, self._on_echo),
            (evt.EVT_C_STORE, self._on_store),
        ]
        try:
            made = entity.make_server(
                (self.node.host, port), contexts=contexts(), evt_handlers=cast(Any, handlers), server_class=_Server
            )
        except OSError as error:
            where = f"{self.node.host}:{port}"
            raise BadSettings(f"{named}: cannot listen on {where} ({error.strerror}); is it in use?") from None
        server = cast(_Server, made)
        server.context, server.waiting, server.opening_s = context, self._waiting, self._opening_s
        server.meters = self.meters
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="listener", daemon=True)
        self._servers.append(server)
        self._threads.append(thread)
        thread.start()
        return int(server.server_address[1])

    @property
    def _opening_s(self) -> float:
        return min(OPENING_TIMEOUT_S, self.node.idle_timeout_s)

    def listens(self) -> bool:
        """Say whether somebody takes connections, on every port."""
        return bool(self._threads) and all(thread.is_alive() for thread in self._threads)

    def check(self) -> None:
        """Raise `RuntimeError` when nobody listens any more: a role that only looks alive must end and be started again."""
        if not self.listens():
            raise RuntimeError("the listener has ended")

    def where(self) -> dict[str, Any]:
        """Say where it listens, and until when its certificate is valid: for a log line, or a heartbeat."""
        told = {"port": self.port, "tls_port": self.tls_port, "certificate_until": self.certificate_until}
        return {"host": self.node.host} | {name: value for name, value in told.items() if value}

    def renew(self) -> None:
        """Take certificate, key and authorities anew when a file of them changed; keep the old while the new cannot be used."""
        seen = tls.stamp(self._tls_files)
        if seen == self._tls_seen:
            return
        self._tls_seen = seen
        try:
            context = self._context()
        except Final as error:
            say(log, "certificate not renewed", level=logging.ERROR, reason=str(error))
            return
        for server in self._servers:
            server.context = server.context and context
        say(log, "certificate renewed", until=self.certificate_until)

    def stop(self, *, grace_s: float = GRACE_S) -> None:
        """Take no more connections, finish what is being taken in, and end the associations."""
        servers, self._servers = self._servers, []
        for server in servers:
            socketserver.BaseServer.shutdown(server)
            server.server_close()
        deadline = monotonic() + grace_s
        while any(_guard(one).unanswered and one.is_alive() for one in self._admitted) and monotonic() < deadline:
            sleep(0.02)
        self._waiting.close()
        for association in self._admitted:
            if association.is_alive():
                association.abort()

    # --- who may call ------------------------------------------------------------------------------------------------------

    def _on_connection(self, event: Event) -> None:
        _Guard(event.assoc, self.node, self.meters).stand()

    def _on_requested(self, event: Event) -> None:
        """Admit a listed caller that proves who it is, and reject everything else, also on a fault here."""
        association, guard = event.assoc, _guard(event.assoc)
        calling, called = "", ""
        verdict: Verdict | None = _NO_REASON
        try:
            request = cast(A_ASSOCIATE, association.requestor.primitive)
            calling, called = request.calling_ae_title.strip(), request.called_ae_title.strip()
            verdict = self._verdict(association, guard, calling, called)
        finally:
            if verdict is None:
                guard.admit(calling, called)
                self._waiting.leave(guard.connection)
                self._say_accepted(association, guard)
            else:
                result, source, reason, why = verdict
                association.acse.send_reject(result, source, reason)
                self.meters.rejected(why)
                say(
                    log,
                    "association rejected",
                    level=logging.WARNING,
                    association=guard.id,
                    calling_ae=peer.printable(calling),
                    called_ae=peer.printable(called),
                    address=association.requestor.address,
                    reason=why,
                    **({"certificate": guard.fingerprint} if guard.fingerprint else {}),
                )
                association.kill()

    def _verdict(self, association: Association, guard: _Guard, calling: str, called: str) -> Verdict | None:
        """Say why this request is rejected, None when it is not; it then counts as admitted until its association ends."""
        caller = self._callers.get(calling)
        if caller is None or not caller.calls_from(association.requestor.address):
            return _CALLING_UNKNOWN
        if caller.certificate_names and not tls.bears(guard.borne, caller.certificate_names):
            return _NOT_ITS_CERTIFICATE
        if called not in self._called:
            return _CALLED_UNKNOWN
        if caller.username and not self._names_its_user(caller, association, secured=isinstance(guard.connection, ssl.SSLSocket)):
            return _NOT_ITS_USER
        with self._admitting:
            self._admitted = [other for other in self._admitted if other.is_alive()]
            if len(self._admitted) >= self.node.max_associations:
                return _TOO_MANY
            if [_guard(other).calling_ae for other in self._admitted].count(calling) >= caller.max_associations:
                return _TOO_MANY_OF_CALLER
            guard.calling_ae = calling
            self._admitted.append(association)
        return None

    def _say_accepted(self, association: Association, guard: _Guard) -> None:
        self.meters.accepted(guard.calling_ae)
        say(
            log,
            "association accepted",
            association=guard.id,
            calling_ae=peer.printable(guard.calling_ae),
            called_ae=peer.printable(guard.called_ae),
            address=association.requestor.address,
        )

    def _names_its_user(self, caller: Caller, association: Association, *, secured: bool) -> bool:
        """Compare the user identity of a request (PS3.7 D.3.3.7) in a time that tells nothing, and confirm it where asked to."""
        given = association.requestor.user_identity
        if given is None or not (secured or caller.passcode_in_clear or not caller.passcode):
            return False
        passcode = self._passcodes.get(caller.ae_title.strip(), b"")
        named = hmac.compare_digest(given.primary_field or b"", caller.username.encode("utf-8"))
        proved = hmac.compare_digest(given.secondary_field or b"", passcode) if passcode else True
        if not (named and proved and given.user_identity_type in (1, 2)):
            return False
        if given.positive_response_requested:
            answer = UserIdentityNegotiation()
            answer.server_response = b""
            association.acceptor.add_negotiation_item(answer)
        return True

    def _on_aborted(self, event: Event) -> None:
        """Say so, unless nothing was ever said: a load balancer that looks whether the port is open is no event."""
        guard = _guard(event.assoc)
        level = logging.WARNING if guard.spoken_to else logging.DEBUG
        if guard.spoken_to:
            self.meters.aborted(guard.calling_ae)
        say(log, "association aborted", level=level, association=guard.id, calling_ae=peer.printable(guard.calling_ae))

    # --- what is asked -----------------------------------------------------------------------------------------------------

    def _on_echo(self, event: Event) -> int:
        return status.SUCCESS if _guard(event.assoc).admitted else status.NOT_AUTHORISED

    def _on_store(self, event: Event) -> int | Dataset:
        """Give the data set to the intake and answer what became of it; never raises."""
        guard, began = _guard(event.assoc), monotonic()
        if not guard.admitted:
            return status.NOT_AUTHORISED
        with bound(association=guard.id):
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
        self.id = secrets.token_hex(4)
        """By which the log names this association."""
        self.max_object_bytes = node.max_object_mb << 20
        self.max_pdu_bytes = node.max_pdu
        self.idle_timeout_s = node.idle_timeout_s
        self.object_timeout_s = node.object_timeout_s
        self.calling_ae = self.called_ae = ""
        self.admitted = self.spoken_to = False
        self.connection: socket.socket | None = None
        self.fingerprint = ""
        """Of the peer's certificate; empty without one."""
        self.borne: frozenset[str] = frozenset()
        """What its certificate bears, for `tls.bears`."""
        self._object_began = 0.0
        self.unanswered = False
        """Whether a C-STORE came whose answer has not left yet."""
        self._fault = ""

    def stand(self) -> None:
        """Watch the association's messages, and read its socket only within bounds."""
        setattr(self.association, _GUARD, self)
        self.association.bind(evt.EVT_PDU_RECV, self._on_pdu)
        self.association.bind(evt.EVT_DIMSE_RECV, self._on_message)
        self.association.bind(evt.EVT_PDU_SENT, self._on_sent)
        transport = cast(Any, self.association.dul.socket)
        self.connection = transport.socket
        transport.recv = self._reader(self.connection)
        self.connection.settimeout(self.idle_timeout_s)
        if isinstance(self.connection, ssl.SSLSocket):  # now, while nobody else can have closed it
            self.fingerprint, self.borne = tls.fingerprint(self.connection), tls.borne_by(self.connection)

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
            self._refuse(self._fault or ("PDU longer than negotiated" if nr_bytes > limit else ""))
            seconds = self.idle_timeout_s if settled else min(OPENING_TIMEOUT_S, self.idle_timeout_s)
            read = peer.read_within(connection, nr_bytes, seconds)
            self.spoken_to = self.spoken_to or bool(read)
            connection.settimeout(self.idle_timeout_s)  # what is written next has a time of its own
            if not settled and read[:1] == TLS_RECORD:
                self._refuse("TLS on the plain port")
            return read

        return recv

    def _refuse(self, fault: str) -> None:
        if fault:
            calling = peer.printable(self.calling_ae)
            say(log, "association aborted", level=logging.WARNING, association=self.id, calling_ae=calling, reason=fault)
            raise _Violation(fault)

    def _on_pdu(self, event: Event) -> None:
        """See each PDU before its fragments are joined: what was joined so far must be within bounds."""
        if not isinstance(event.pdu, P_DATA_TF):
            return
        if self.unanswered:
            self._fault = "a request ahead of the answer to the last one"  # PS3.7 D.3.3.3: no asynchronous window was agreed
        message = self.association.dimse.message
        if message is None:
            self._object_began = monotonic()
            return
        if monotonic() - self._object_began > self.object_timeout_s:
            self._fault = "an object that did not come whole in time"
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
            self.unanswered = True
        elif command.get("MessageID") is not None:
            self._answer_incomplete(command, message.context_id)

    def _on_sent(self, event: Event) -> None:
        if isinstance(event.pdu, P_DATA_TF):
            self.unanswered = False

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


class _Waiting:
    """The connections that were not admitted yet.

    A new one hangs up the oldest of its own address when that has too many, and the oldest of the address with most when there
    are too many in all: who stalls makes room for who speaks, and does so at his own cost first.
    """

    def __init__(self) -> None:
        self._open: weakref.WeakKeyDictionary[socket.socket, str] = weakref.WeakKeyDictionary()  # in order of arrival
        self._lock = threading.Lock()
        self._closed = False

    def enter(self, connection: socket.socket, address: str) -> None:
        """Count a new connection, and make room for it."""
        with self._lock:
            if self._closed:
                _hang_up(connection)
                return
            for other in [other for other in self._open if other.fileno() < 0]:
                del self._open[other]
            self._open[connection] = address
            load = Counter(self._open.values())
            crowded = address if load[address] > WAITING_PER_ADDRESS else load.most_common(1)[0][0]
            if load[address] > WAITING_PER_ADDRESS or len(self._open) > WAITING:
                oldest = next(other for other, whose in self._open.items() if whose == crowded)
                del self._open[oldest]
                _hang_up(oldest)

    def leave(self, connection: socket.socket | None) -> None:
        """Count it no more: it was admitted, or is closed."""
        with self._lock:
            if connection is not None:
                self._open.pop(connection, None)

    def close(self) -> None:
        """Hang up on all, and on all that come."""
        with self._lock:
            self._closed = True
            for connection in list(self._open):
                _hang_up(connection)


def _hang_up(connection: socket.socket) -> None:
    """Wake whoever reads from `connection`, in whatever thread, with an end; TLS says no farewell to a peer that said nothing."""
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _Seldom:
    """Lets the same thing be said once in `SAY_AGAIN_S`, and counts how often it happened."""

    def __init__(self) -> None:
        self._seen: OrderedDict[object, tuple[float, int]] = OrderedDict()
        self._lock = threading.Lock()

    def times(self, what: object) -> int:
        """Say how often `what` happened since it was last said, now included; 0 when it is too early to say it again."""
        with self._lock:
            said_at, unsaid = self._seen.pop(what, (float("-inf"), 0))
            due = monotonic() - said_at >= SAY_AGAIN_S
            self._seen[what] = (monotonic(), 0) if due else (said_at, unsaid + 1)
            while len(self._seen) > SAID_AT_MOST:
                self._seen.popitem(last=False)
            return unsaid + 1 if due else 0


class _Server(ThreadedAssociationServer):
    """pynetdicom's server, given connections that are open and have something to say; with a quiet voice."""

    request_queue_size = 64
    daemon_threads = True
    context: ssl.SSLContext | None
    waiting: _Waiting
    meters: ReceiveMeters
    opening_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._failures = _Seldom()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands, wait for the first byte, and hand over: in a thread of this connection, never in the loop that accepts."""
        connection: socket.socket = request
        if self.context is not None:
            connection = self.context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        self.waiting.enter(connection, str(client_address[0]))
        if self._is_opened(connection, str(client_address[0])):
            super().finish_request(connection, client_address)
        else:
            self.waiting.leave(connection)
            connection.close()

    def _is_opened(self, connection: socket.socket, address: str) -> bool:
        """Say whether the peer has shaken hands, where it must, and begun to speak, in time."""
        deadline = monotonic() + self.opening_s
        try:
            spoken = self._speaks(connection, deadline)  # who looks whether the port is open speaks no TLS, and is no failure
            if spoken and isinstance(connection, ssl.SSLSocket):
                connection.settimeout(max(0.001, deadline - monotonic()))
                self._shake_hands(connection, address)
                spoken = self._speaks(connection, deadline)
        except OSError:
            spoken = False
        if not spoken:
            say(log, "connection closed without a request", level=logging.DEBUG, address=address)
        return spoken

    def _shake_hands(self, connection: ssl.SSLSocket, address: str) -> None:
        try:
            connection.do_handshake()
        except OSError as error:
            reason = tls.told(error)
            if times := self._failures.times((address, reason)):
                say(log, "TLS handshake failed", level=logging.WARNING, address=address, reason=reason, times=times)
            self.meters.rejected(NO_HANDSHAKE)
            raise

    @staticmethod
    def _speaks(connection: socket.socket, deadline: float) -> bool:
        """Wait for a byte on the wire without taking it."""
        connection.settimeout(max(0.001, deadline - monotonic()))
        return bool(socket.socket.recv(connection, 1, socket.MSG_PEEK))

    def handle_error(self, request: object, client_address: object) -> None:
        """Log a fault of accepting a connection without a traceback on stderr."""
        say(log, "connection failed", level=logging.WARNING)
