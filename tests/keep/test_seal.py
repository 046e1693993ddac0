from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import Tampered
from node.errors import BadKey
from node.keep.seal import Seal

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


@given(plain=st.binary(max_size=300), context=st.text(max_size=40))
def test_what_was_sealed_reads_back_and_is_not_in_the_envelope(plain: bytes, context: str) -> None:
    sealed = Seal(KEY).seal(plain, context)
    assert Seal(KEY).open(sealed, context) == plain
    assert len(plain) < 8 or plain not in sealed  # fewer bytes may stand in any envelope


def test_the_same_bytes_sealed_twice_are_two_envelopes() -> None:
    assert Seal(KEY).seal(b"Doe^Jane", "row 1") != Seal(KEY).seal(b"Doe^Jane", "row 1")


def test_another_key_is_named_as_such() -> None:
    with pytest.raises(BadKey):
        Seal(OTHER).open(Seal(KEY).seal(b"Doe^Jane", "row 1"), "row 1")


def test_an_envelope_opens_only_at_its_place() -> None:
    with pytest.raises(Tampered):
        Seal(KEY).open(Seal(KEY).seal(b"Doe^Jane", "row 1"), "row 2")


def test_every_flipped_bit_and_every_cut_is_found() -> None:
    sealed = Seal(KEY).seal(b"Doe^Jane", "row 1")
    for at in range(len(sealed)):
        flipped = bytearray(sealed)
        flipped[at] ^= 1
        for broken in (bytes(flipped), sealed[:at]):
            with pytest.raises((Tampered, BadKey)) as told:
                Seal(KEY).open(broken, "row 1")
            assert "Doe" not in str(told.value)


def test_the_key_id_tells_nothing_of_the_key() -> None:
    assert Seal(KEY).key_id not in KEY
    assert Seal(KEY).key_id != Seal(OTHER).key_id


def test_a_short_key_is_refused() -> None:
    with pytest.raises(BadKey):
        Seal(b"short")
