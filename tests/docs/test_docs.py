"""What the documents claim is so."""

from __future__ import annotations

import claims
import pytest


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.__name__)
def test_docs_say_what_is_so(claim: claims.Claim) -> None:
    assert list(claim()) == []
