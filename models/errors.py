"""The one error tree of Osteon; the node's branch is in `node/errors.py`.

The class says what a caller may do; the class docstring is the message when none is given::

    OsteonError
    ├── Retriable          wrong now, may be right later: try again with back-off
    │   └── NoModel        no version is in service
    └── Final              the same input will fail the same way: say so, do not repeat
        ├── Unreadable     pixels that no decoder gives back
        ├── NoSuchVersion  a model version or alias that the shelf does not hold
        ├── NoSuchWeights  start weights that are unknown or not on this machine
        ├── NotAllowed     a version that may not be put into service
        ├── Tampered       a file whose hash is not the one its card states
        └── NoProvider     an execution provider that was asked for and is not there
"""

from __future__ import annotations

import inspect


class OsteonError(Exception):
    """Something in Osteon went wrong."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (inspect.getdoc(type(self)) or "").split("\n")[0])


class Retriable(OsteonError):
    """It may succeed when tried again later."""


class Final(OsteonError):
    """It will fail the same way however often it is tried."""


class NoModel(Retriable):
    """No model version is in service: promote one with `osteon models promote`."""


class Unreadable(Final):
    """The image has no pixels that an installed decoder can give back."""


class NoSuchVersion(Final):
    """The shelf holds no such model version; `osteon models list` shows what it holds."""


class NoSuchWeights(Final):
    """The start weights are unknown, or not on this machine; `osteon models fetch` brings those it knows."""


class NotAllowed(Final):
    """The version may not be put into service."""


class Tampered(Final):
    """A file does not have the hash that its card states; it is not used."""


class NoProvider(Final):
    """The ONNX Runtime execution provider that was asked for is not available here."""
