"""Find a study by what a person has in hand: an accession number, a study ID or any UID, original or pseudonymous.

What was typed is turned into the pseudonym or the keyed hash that the catalogue holds; the vault stays closed.
"""

from __future__ import annotations

from node.errors import NotFound
from node.keep.catalogue import Catalogue
from node.keep.custody import site_keys
from node.keep.records import Study
from node.settings import Settings


def find_studies(catalogue: Catalogue, settings: Settings, typed: str) -> list[Study]:
    """Give every study that `typed` may mean (accession numbers repeat over the years).

    Raises
    ------
    NotFound
        Nothing is known under it.
    BadKey
        The site key is not the one of this catalogue, or cannot be read.
    """
    keys, issuer, wanted = site_keys(settings.storage, catalogue), settings.node.default_issuer, typed.strip()
    hits = {study.uid: study for uid in (wanted, keys.uid(wanted)) for study in catalogue.studies.find(uid=uid)}
    hashes = (keys.accession(issuer, wanted), keys.study_id(issuer, wanted))
    hits |= {study.uid: study for study in catalogue.studies.find(accession_keys=hashes)}
    if not hits:
        raise NotFound(
            "no study is known under this accession number or UID; was it sent here, and did the PACS see a success? What is in "
            "the quarantine only is found by its Study Instance UID alone: see `osteon quarantine list`"
        )
    return sorted(hits.values(), key=lambda study: study.first_at)
