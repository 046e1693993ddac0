"""The sealed stores of a site, opened together with its keys, or a clear word on what is wrong with them.

In: the settings. Out: keys, vault, catalogue, quarantine that belong to each other. Nothing may be written here before the keys
are known to be the right ones, and nothing new may be begun beside stores that are full.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from node.errors import BadKey, LostStore
from node.keep.catalogue import Catalogue
from node.keep.quarantine import Quarantine
from node.keep.seal import Seal
from node.keep.vault import Vault
from node.pseudonym import SiteKeys
from node.settings import Storage, load_key

SITE_FLAG = "site key"
"""The catalogue's note of the site key under which its pseudonyms were made: a value derived one way."""
_NO_CATALOGUE = (
    "the catalogue is not there or empty, while the vault knows patients: a new one would know neither results nor merges nor "
    "who is locked. Restore the catalogue from its backup, or correct [storage] catalogue; is it lost for good, begin a new site "
    "in another directory"
)


@dataclass(frozen=True, slots=True)
class Custody:
    """What may open the sealed stores, and those stores."""

    keys: SiteKeys
    vault: Vault
    quarantine: Quarantine
    catalogue: Catalogue

    @classmethod
    def open(cls, storage: Storage) -> Custody:
        """Open the stores of a site; a new site's are made.

        Raises
        ------
        BadKey
            A key is missing, malformed, readable by others, swapped with the other, or not this site's. Nothing was written.
        RotationUnfinished
            The vault lies under two keys. Nothing was written.
        LostStore
            The vault is gone and other stores are not, or the other way round. Nothing was written.
        """
        site_key, vault_key = _keys(storage)
        keys = SiteKeys.derive(site_key)
        sealed_with = Vault.sealed_with(storage.vault)
        if sealed_with is None:
            if full := _full(storage):
                raise LostStore(
                    f"the vault is empty or not there, while {full} is not: a new one would know nobody in it. Restore the vault "
                    "from its backup, or correct [storage] vault; is it lost for good, begin a new site in another directory"
                )
        elif sealed_with == Seal(site_key).key_id and sealed_with != Seal(vault_key).key_id:
            raise BadKey(
                "the keys are swapped: [storage] site_key names the key that sealed this vault; exchange the places of site_key "
                "and vault_key"
            )
        vault = Vault.open(storage.vault, vault_key)
        try:
            vault.check_site(fingerprint(keys))
            knows_patients = Vault.is_full(storage.vault)
            if knows_patients and not Catalogue.is_there(storage.catalogue):
                raise LostStore(_NO_CATALOGUE)
            catalogue = Catalogue.open(storage.catalogue)
        except BaseException:
            vault.close()
            raise
        try:
            check_site(keys, catalogue)
            is_noted = catalogue.roles.flag(SITE_FLAG) is not None
            if knows_patients and not is_noted and not Catalogue.is_full(storage.catalogue):  # a verb made it, on the spot
                raise LostStore(_NO_CATALOGUE)
            catalogue.roles.remember_flag(SITE_FLAG, fingerprint(keys))
            return cls(keys, vault, Quarantine(storage.root / "quarantine", vault_key), catalogue)
        except BaseException:
            vault.close()
            catalogue.close()
            raise

    def close(self) -> None:
        """Close the stores."""
        self.catalogue.close()
        self.vault.close()

    def __enter__(self) -> Custody:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def require_old_key(storage: Storage, old: bytes) -> None:
    """Make sure that there is a vault to be sealed anew, and that the old key is not the site key.

    Raises
    ------
    LostStore, BadKey
        There is none, or the keys are swapped.
    """
    if Vault.sealed_with(storage.vault) is None:
        raise LostStore("there is no vault at [storage] vault whose key could be rotated")
    if hmac.compare_digest(old, load_key(storage.site_key)):
        raise BadKey("the old key is the site key: the vault is sealed with a key of its own ([storage] vault_key)")


def site_keys(storage: Storage, catalogue: Catalogue) -> SiteKeys:
    """Make the pseudonyms' keys for a verb that turns what was typed into pseudonyms; the vault stays closed.

    Raises
    ------
    BadKey
        The site key is missing, malformed or readable by others, or not the one of this catalogue.
    """
    keys = SiteKeys.derive(load_key(storage.site_key))
    check_site(keys, catalogue)
    return keys


def check_site(keys: SiteKeys, catalogue: Catalogue) -> None:
    """Hold the site key against the one that made the pseudonyms of the catalogue."""
    noted = catalogue.roles.flag(SITE_FLAG)
    if noted is not None and noted != fingerprint(keys):
        raise BadKey(
            "this is not the site key whose pseudonyms are in this catalogue ([storage] site_key): put the site's own key back, "
            "or correct [storage] catalogue"
        )


def fingerprint(keys: SiteKeys) -> str:
    """Give a value that tells one site key from another and tells nothing of it."""
    return keys.report_uid("site")


def occupied(storage: Storage) -> str:
    """Name a store of this place that is not empty, "" when all are: keys must not be made anew beside it."""
    return "the vault" if Vault.sealed_with(storage.vault) is not None else _full(storage)


def _full(storage: Storage) -> str:
    """Name a store beside the vault that is not empty."""
    if Catalogue.is_full(storage.catalogue):
        return "the catalogue"
    for name, pattern in (("archive", "*/*/*/*.dcm"), ("quarantine", "*.sealed")):
        if next((storage.root / name).glob(pattern), None) is not None:
            return f"the {name}"
    return ""


def _keys(storage: Storage) -> tuple[bytes, bytes]:
    """Read both keys; one in both places is none."""
    site_key, vault_key = load_key(storage.site_key), load_key(storage.vault_key)
    if hmac.compare_digest(site_key, vault_key):
        raise BadKey(
            "site key and vault key are the same: one of the two places holds a copy of the other; put the right key back"
        )
    return site_key, vault_key
