"""Authenticated encryption of what must never rest in clear.

In: bytes and the place they belong to. Out: an envelope that only the same key opens, and only at that place. Nothing here may
return bytes whose tag was not checked, or say more of a key than its id.

Envelope: `OST`, version 1, key id (8 bytes), nonce (12 bytes), AES-256-GCM ciphertext with its tag (16 bytes). The header and the
context ("table and key of the row") are authenticated, so an envelope that was moved to another row does not open.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from models.errors import Tampered
from node.errors import BadKey

MAGIC = b"OST\x01"
KEY_ID_BYTES = 8
NONCE_BYTES = 12
_HEADER_BYTES = len(MAGIC) + KEY_ID_BYTES


def key_id(sealed: bytes) -> bytes:
    """Say by its id which key sealed an envelope; empty when it is none."""
    return sealed[len(MAGIC) : _HEADER_BYTES] if sealed.startswith(MAGIC) else b""


class Seal:
    """Seals and opens with one key of 32 bytes."""

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise BadKey(f"the key has {len(key)} bytes, not 32")
        self._cipher = AESGCM(hmac.digest(key, b"seal", hashlib.sha256))
        self.key_id = hmac.digest(key, b"key id", hashlib.sha256)[:KEY_ID_BYTES]
        """Names the key and tells nothing of it."""

    def seal(self, plain: bytes, context: str) -> bytes:
        """Encrypt `plain` for the place `context`."""
        header = MAGIC + self.key_id
        nonce = secrets.token_bytes(NONCE_BYTES)
        return header + nonce + self._cipher.encrypt(nonce, plain, header + context.encode())

    def open(self, sealed: bytes, context: str) -> bytes:
        """Give back what was sealed for the place `context`.

        Raises
        ------
        BadKey
            Another key sealed it.
        Tampered
            It is no envelope, was changed, or belongs to another place.
        """
        header, nonce = sealed[:_HEADER_BYTES], sealed[_HEADER_BYTES : _HEADER_BYTES + NONCE_BYTES]
        if len(nonce) != NONCE_BYTES or not header.startswith(MAGIC):
            raise Tampered("this was not sealed by Osteon, or is cut short; restore it from a backup")
        if header[len(MAGIC) :] != self.key_id:
            raise BadKey("another key sealed this; put the right key back ([storage] vault_key)")
        try:
            return self._cipher.decrypt(nonce, sealed[_HEADER_BYTES + NONCE_BYTES :], header + context.encode())
        except InvalidTag:
            raise Tampered("what was sealed has been changed or moved; restore it from a backup") from None
