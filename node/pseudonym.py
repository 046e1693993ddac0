"""Keyed derivations: what a site makes of a hospital's identifiers.

In: the site key (32 random bytes) and an original identifier. Out: a pseudonym that is the same every time and that nobody can
derive, or check a guess against, without the key. Pure. Never here: an unkeyed hash of an identifier, a log line, a store.
One key per site: the same key at two sites links their patients, and a lost key ends the pseudonyms of re-sent studies.
"""

from __future__ import annotations

import base64
import hmac
from dataclasses import dataclass, field

PID_PREFIX = "OST-"
_SEPARATOR = "\x1f"
_WEEKS = 520


@dataclass(frozen=True, slots=True)
class SiteKeys:
    """The subkeys of one site, one a purpose, so that values of different kinds never meet.

    Texts are stripped of spaces and NULs at both ends before they are hashed and keep their case: "A1 " and "A1" are one
    patient, "a1" is another.
    """

    _pid: bytes = field(repr=False)
    _uid: bytes = field(repr=False)
    _date: bytes = field(repr=False)
    _acc: bytes = field(repr=False)
    _dev: bytes = field(repr=False)
    _sr: bytes = field(repr=False)
    _lock: bytes = field(repr=False)

    @classmethod
    def derive(cls, site_key: bytes) -> SiteKeys:
        """Make the subkeys from the site key of 32 bytes.

        Raises
        ------
        ValueError
            The key has another length.
        """
        if len(site_key) != 32:
            raise ValueError(f"a site key has 32 bytes, not {len(site_key)}")
        purposes = (b"pid", b"uid", b"date", b"acc", b"dev", b"sr", b"lock")
        return cls(*(hmac.digest(site_key, purpose, "sha256") for purpose in purposes))

    def pid(self, issuer: str, patient_id: str) -> str:
        """Give the pseudonym of a patient: `OST-` and 16 letters and digits (80 bits)."""
        return PID_PREFIX + base64.b32encode(_mac(self._pid, issuer, patient_id))[:16].decode()

    def uid(self, original: str) -> str:
        """Give the UID that stands for `original`, whatever its root: somebody may have made it below the standard's."""
        return _as_uid(hmac.digest(self._uid, _normal(original).encode(), "sha256"))

    def days(self, issuer: str, patient_id: str) -> int:
        """Give the shift of all dates of a patient: whole weeks into the past, 1 to 520."""
        return -7 * (1 + int.from_bytes(_mac(self._date, issuer, patient_id), "big") % _WEEKS)

    def accession(self, issuer: str, value: str) -> str:
        """Hash an accession number for look-ups; empty stays empty."""
        return self._looked_up("accession", issuer, value)

    def study_id(self, issuer: str, value: str) -> str:
        """Hash a StudyID for look-ups; empty stays empty."""
        return self._looked_up("study id", issuer, value)

    def device(self, *parts: str) -> str:
        """Give the pseudonym of a unit from manufacturer, model, station and serial; empty when all of them are."""
        return _mac(self._dev, "device", *parts).hex()[:32] if any(map(_normal, parts)) else ""

    def term(self, keyword: str, value: str) -> str:
        """Hash a text that the vocabulary does not know, so that it can be counted without being read."""
        return _mac(self._dev, "term", keyword, value).hex()[:32]

    def is_locked(self, pid: str, share: float) -> bool:
        """Say whether the patient belongs to the locked share (0 to 1) of all patients."""
        return int.from_bytes(_mac(self._lock, pid)[:8], "big") < share * 2**64

    def report_uid(self, *parts: str) -> str:
        """Derive a UID of a report; parts are told apart whatever they contain."""
        told = b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
        return _as_uid(hmac.digest(self._sr, told, "sha256"))

    def _looked_up(self, kind: str, issuer: str, value: str) -> str:
        return _mac(self._acc, kind, issuer, value).hex()[:32] if _normal(value) else ""


def _normal(text: str) -> str:
    """Take off what padding and habit put around an identifier."""
    return text.strip(" \0\t\r\n")


def _mac(key: bytes, *parts: str) -> bytes:
    return hmac.digest(key, _SEPARATOR.join(map(_normal, parts)).encode("utf-8", "surrogatepass"), "sha256")


def _as_uid(mac: bytes) -> str:
    """Write the first 16 bytes as a UID below 2.25 (PS3.5 B.2): at most 44 characters."""
    return "2.25." + str(int.from_bytes(mac[:16], "big"))
