"""A TCP proxy that stops, or drips, when a test says so: what a PACS behind a broken firewall looks like."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from time import sleep
from types import TracebackType


class Wall:
    """Passes bytes between whoever connects and a server on 127.0.0.1, for the length of a `with` block.

    Parameters
    ----------
    to_server, to_client
        So many bytes pass in this direction; then it reads no more, and keeps the connection.
    drip_s
        To the client, one byte passes each so many seconds; 0 lets all pass at once.
    """

    def __init__(self, port: int, *, to_server: int = 1 << 40, to_client: int = 1 << 40, drip_s: float = 0.0) -> None:
        self.left = {"server": to_server, "client": to_client}
        self._drip_s, self._server_port = drip_s, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]
        self._ended = threading.Event()

    def stop(self) -> None:
        """Let nothing pass any more."""
        self.left = {"server": 0, "client": 0}

    def __enter__(self) -> Wall:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._ended.set()
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while not self._ended.is_set():
                client, _ = self._listener.accept()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                server = socket.socket()
                server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                server.connect(("127.0.0.1", self._server_port))
                self._open += [client, server]
                threading.Thread(target=self._pass, args=(client, server, "server"), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, "client"), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, to: str) -> None:
        drip_s = self._drip_s if to == "client" else 0.0
        with suppress(OSError):
            while not self._ended.is_set():
                if self.left[to] <= 0:
                    sleep(0.05)
                    continue
                part = source.recv(1 if drip_s else min(self.left[to], 4096))
                if self.left[to] <= 0:  # stopped while it waited
                    continue
                if not part:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(part)
                self.left[to] -= len(part)
                sleep(drip_s)
