"""One model version, ready to answer: images in, logits and pooled features out.

In: a version of the registry and the execution provider that the settings ask for. Out: raw numbers; calibration, thresholds and
words are for others. A file whose hash is not the card's is never loaded, a provider that is not there is never replaced in
silence, and ONNX Runtime, which is imported here alone, never tells its maker that it runs.
"""

from __future__ import annotations

import os
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.errors import NoProvider, Tampered

Provider = Literal["cpu", "cuda"]
_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Shelf(Protocol):
    """Where versions come from, each file as its card states it: `models.registry.Registry`, which this room does not know."""

    def card(self, version: str) -> Card: ...  # noqa: D102 - as there
    def model(self, version: str) -> bytes: ...  # noqa: D102
    def reference(self, version: str) -> bytes | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Model:
    """A version in memory."""

    version: str
    card: Card
    provider: Provider
    """What it really runs on."""
    degraded: str
    """What differs from what was asked for, in a sentence; empty when nothing does."""
    reference: bytes | None
    """What lies in `reference.npz`, for `models.reference`; None when there is none."""
    session: Any

    @classmethod
    def load(
        cls, registry: Shelf, version: str, *, provider: Provider = "cpu", threads: int = 0, allow_degraded: bool = False
    ) -> Model:
        """Bring a version into memory.

        Parameters
        ----------
        threads
            Within one operator; 0 takes the physical cores.
        allow_degraded
            Run on the CPU where `provider` is not available, and say so in `degraded`, instead of refusing.

        Raises
        ------
        NoSuchVersion
            The shelf does not hold it.
        Tampered
            A file is not the one that the card states, or is no model of this kind.
        NoProvider
            `provider` is not available and that is not allowed.
        """
        card, data = registry.card(version), registry.model(version)
        session, got = _session(data, provider, threads)
        degraded = "" if got == provider else f"runs on {got.upper()}: {provider.upper()} is not available"
        if degraded and not allow_degraded:
            raise NoProvider(
                f"[inference] provider = {provider!r} is asked for, but ONNX Runtime has {got!r} only: install its drivers and "
                "the extra `gpu`, or set provider = 'cpu', or allow_degraded = true"
            )
        model = cls(version, card, got, degraded, registry.reference(version), session)
        model._try_out()
        return model

    def predict(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score images as `models.preprocess` gives them.

        Parameters
        ----------
        batch
            (n, 1, size, size), 0…1.

        Returns
        -------
        tuple
            Logits (n, classes), not calibrated, and pooled features (n, width).
        """
        logits, features = self.session.run(["logits", "features"], {"image": np.ascontiguousarray(batch, dtype=np.float32)})
        return logits, features

    def _try_out(self) -> None:
        """Score a black image, so that a file of another kind is refused now and not in the middle of a study."""
        size = self.card.preprocessing.size_px
        try:
            logits, features = self.predict(np.zeros((2, 1, size, size), np.float32))
        except Exception as error:  # ONNX Runtime raises classes of its own, per failure
            raise Tampered(f"{self.version}: the model cannot be run as its card says ({type(error).__name__})") from None
        if logits.shape != (2, len(self.card.labels)) or features.ndim != 2 or not np.isfinite(logits).all():
            raise Tampered(f"{self.version}: the model does not give one finite logit for each label of its card")


def onnx_runtime() -> Any:
    """Import ONNX Runtime, with its telemetry off.

    Its wheels (1.31 for one) note an id of the machine below the user's home and report over HTTPS, where they can, that a
    session was made. The switch of its API comes too late for that: the variable has to be there before the import.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    return onnxruntime


def providers() -> tuple[Provider, ...]:
    """Name the execution providers that ONNX Runtime offers here, of those that the settings know."""
    found = onnx_runtime().get_available_providers()
    return tuple(name for name in ("cpu", "cuda") if _NAMES[name] in found)


def _session(data: bytes, provider: Provider, threads: int) -> tuple[Any, Provider]:
    onnxruntime = onnx_runtime()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what went wrong is raised; a warning on stderr would only be noise in a log of JSON lines
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a waiting daemon must not burn a core
    wanted = [_NAMES[provider]] if provider in providers() else []
    if provider == "cuda" and wanted:
        with redirect_stdout(StringIO()):  # what it misses it prints; the session says so below
            onnxruntime.preload_dlls()  # CUDA and cuDNN as pip installed them, where the loader does not look
    if _NAMES["cpu"] not in wanted:
        wanted.append(_NAMES["cpu"])
    try:
        session = onnxruntime.InferenceSession(data, options, providers=wanted)
    except Exception as error:  # as above
        raise Tampered(f"the model file is none that ONNX Runtime can load ({type(error).__name__})") from None
    # A provider whose libraries are missing is listed as available and dropped here without an error.
    return session, "cuda" if _NAMES["cuda"] in session.get_providers() else "cpu"


def physical_cores() -> int:
    """Count the physical cores that this process may use; hyper-threads do not speed up matrix products."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in usable:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:
            return len(usable)
    return max(1, len(cores))
