"""A real Orthanc as the PACS of the demo and of the tests.

In: a folder for everything it keeps, and who may speak to it. Out: a running Orthanc on free ports. Its HTTP side answers
loopback only, unknown AE titles and hosts are refused, DICOMweb is on where the plugin is installed. It keeps identified data
in clear, as a PACS does, and is never part of a node.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Any

from models.errors import Final
from node.errors import PeerAway

PLUGIN_FOLDERS = ("/usr/share/orthanc/plugins", "/usr/lib/orthanc", "/usr/local/share/orthanc/plugins")
DICOM_WEB = "libOrthancDicomWeb.so"
READY_S = 30.0
STOP_S = 15.0


class NotInstalled(Final):
    """Orthanc is not installed; on Debian: `apt-get install orthanc orthanc-dicomweb`."""


def executable() -> str | None:
    """Find the Orthanc program; Debian keeps it where ordinary users do not look."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return shutil.which("Orthanc", path=places)


def free_port() -> int:
    """Name a TCP port that is free on loopback now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass
class Orthanc:
    """A running Orthanc, for the length of a `with` block (or between `start` and `stop`)."""

    folder: Path
    """Its storage, index, settings and log."""
    callers: Mapping[str, int]
    """AE titles on 127.0.0.1 that it answers, with the port it reaches them at."""
    ae_title: str = "ORTHANC"
    port: int = 0
    """DICOM port; 0 takes a free one."""
    http_port: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Where its REST interface and its explorer answer."""
        return f"http://127.0.0.1:{self.http_port}"

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises
        ------
        NotInstalled
            There is no Orthanc on this machine.
        PeerAway
            It ended at once or did not answer in time; its log lies in `folder`.
        """
        program = executable()
        if program is None:
            raise NotInstalled
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        self.http_port = self.http_port or free_port()
        settings = self.folder / "orthanc.json"
        settings.write_text(json.dumps(self._settings(), indent=2))
        with (self.folder / "orthanc.log").open("ab") as log:
            self._process = subprocess.Popen([program, str(settings)], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = monotonic() + READY_S
        while not self._answers():
            ended = self._process.poll() is not None
            if ended or monotonic() > deadline:
                self.stop()
                raise PeerAway(f"Orthanc {'ended at once' if ended else 'did not answer in time'}; see {self.folder}/orthanc.log")
            sleep(0.1)

    def stop(self) -> None:
        """End it; what it holds stays in `folder`."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Orthanc:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def get(self, path: str) -> Any:
        """Read from the REST interface: JSON, or the bytes of a `/file`."""
        with self._open(urllib.request.Request(self.url + path)) as answer:  # noqa: S310 - our own Orthanc on loopback
            content = answer.read()
        return content if path.endswith("/file") else json.loads(content)

    def post(self, path: str, body: object) -> Any:
        """Write JSON to the REST interface; `/modalities/OSTEON/store` routes to a caller."""
        request = urllib.request.Request(self.url + path, data=json.dumps(body).encode(), method="POST")  # noqa: S310
        with self._open(request) as answer:
            return json.loads(answer.read())

    def _open(self, request: urllib.request.Request) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy
        return opener.open(request, timeout=30)

    def _answers(self) -> bool:
        try:
            self.get("/system")
        except (urllib.error.URLError, OSError, ValueError):
            return False
        return True

    def _settings(self) -> dict[str, Any]:
        plugin = next((path for folder in PLUGIN_FOLDERS if (path := Path(folder) / DICOM_WEB).exists()), None)
        storage = str((self.folder / "storage").resolve())
        return {
            "Name": "Osteon demo PACS",
            "StorageDirectory": storage,
            "IndexDirectory": storage,
            "Plugins": [] if plugin is None else [str(plugin)],
            "DicomWeb": {"Enable": plugin is not None},
            "HttpServerEnabled": True,
            "HttpPort": self.http_port,
            "HttpBindAddresses": ["127.0.0.1"],  # from 1.12 on; older ones ignore it and refuse what is not loopback
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomServerEnabled": True,
            "DicomAet": self.ae_title,
            "DicomPort": self.port,
            "DicomCheckCalledAet": True,
            "DicomCheckModalityHost": True,
            "DicomAlwaysAllowEcho": False,
            "DicomAlwaysAllowStore": False,
            "DicomAlwaysAllowFind": False,
            "DicomAlwaysAllowGet": False,
            "UnknownSopClassAccepted": False,
            "OverwriteInstances": False,
            "StableAge": 1,
            "ConcurrentJobs": 2,
            "DicomModalities": {title: [title, "127.0.0.1", port] for title, port in self.callers.items()},
        }
