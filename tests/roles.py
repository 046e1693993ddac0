"""Start the real roles as processes, and speak DICOM to them as a hospital would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE
from studies import encoded, part10, read

from node.receive.intake import Intake, Taken

READY_S = 60.0
UNWATCHED = {"receive_port": 0, "reply_port": 0, "schedule_port": 0}
"""`[metrics]` of a site that shows none: many sites run on this machine at once."""


def until(condition: Callable[[], Any], *, seconds: float = 30.0, told: str = "") -> Any:
    """Wait until `condition` gives something true, and give that; fail after `seconds`."""
    deadline = monotonic() + seconds
    while monotonic() < deadline:
        if found := condition():
            return found
        sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {told or condition}")


class Role:
    """One `osteon` role as a process; its JSON log lines are in `events`."""

    def __init__(self, *arguments: str, command: Sequence[str] = (sys.executable, "-m", "node")) -> None:
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.events: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in (self.process.stdout, self.process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any) -> None:
        for line in stream:
            try:
                self.events.append(json.loads(line))
            except ValueError:
                self.noise.append(line)

    def event(self, name: str, *, seconds: float = READY_S) -> dict[str, Any]:
        """Wait for a log line."""

        def found() -> dict[str, Any] | None:
            if self.process.poll() is not None and not any(line["event"] == name for line in self.events):
                raise AssertionError(f"role ended with {self.process.returncode}: {self.noise} {self.events[-3:]}")
            return next((line for line in list(self.events) if line["event"] == name), None)

        event: dict[str, Any] = until(found, seconds=seconds, told=name)
        return event

    def kill(self) -> None:
        """Kill -9."""
        self.process.kill()
        self.close()

    def wait(self, seconds: float = 60.0) -> int:
        """Wait for the process's own end."""
        code = self.process.wait(seconds)
        self.close()
        return code

    def close(self) -> None:
        """End the process and read what it still had to say."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for reader in self._readers:
            reader.join(10)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@contextmanager
def running(*arguments: str, config: Path) -> Iterator[Role]:
    """Run `osteon <arguments> --config FILE` for the length of a block."""
    role = Role(*arguments, "--config", str(config))
    try:
        yield role
    finally:
        role.close()


def send(
    datasets: Sequence[Dataset], *, port: int, called: str = "OSTEON", calling: str = "SENDER", host: str = "127.0.0.1"
) -> list[int | None]:
    """C-STORE each data set in one association and give the statuses, None where no answer came; empty without an association."""
    ae = AE(ae_title=calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 30
    for pair in {(one.SOPClassUID, one.file_meta.TransferSyntaxUID) for one in datasets}:
        ae.add_requested_context(*pair)
    association = ae.associate(host, port, ae_title=called)
    if not association.is_established:
        return []
    try:
        statuses: list[int | None] = []
        for one in datasets:
            try:
                statuses.append(getattr(association.send_c_store(read(part10(one))), "Status", None))
            except RuntimeError:  # the association ended under way
                statuses.append(None)
        return statuses
    finally:
        if association.is_established:
            association.release()


def hand_in(intake: Intake, image: Dataset, *, called: str = "OSTEON", calling: str = "SENDER") -> Taken:
    """Hand one data set to the intake of this process, as the association would."""
    return intake.take_in(
        encoded(image),
        transfer_syntax_uid=image.file_meta.TransferSyntaxUID,
        sop_class_uid=image.SOPClassUID,
        sop_instance_uid=image.SOPInstanceUID,
        calling_ae=calling,
        called_ae=called,
    )
