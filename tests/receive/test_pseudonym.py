"""What the keyed derivations promise to everything that was derived before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.pseudonym import SiteKeys

KEYS = SiteKeys.derive(bytes(range(32)))
OTHER = SiteKeys.derive(bytes(range(1, 33)))
texts = st.text(min_size=1).filter(lambda text: text.strip(" \0\t\r\n") and "\x1f" not in text)
uids = st.from_regex(r"[1-9][0-9]{0,8}(\.[1-9][0-9]{0,8}){2,5}", fullmatch=True).filter(
    lambda uid: not uid.startswith("1.2.840.10008.")
)


def test_the_derivations_never_change_their_meaning() -> None:
    """An archive outlives every version of the code: these values were written down once."""
    assert KEYS.pid("HOSPITAL", "12345") == "OST-SV6ZFN4KKAJTWPNC"
    assert KEYS.uid("1.2.3.4") == "2.25.60283483366624275073112994968156636789"
    assert KEYS.days("HOSPITAL", "12345") == -483
    assert KEYS.accession("HOSPITAL", "A1") == "483309261e3bfff2ceea52ae8b71919d"
    assert KEYS.study_id("HOSPITAL", "A1") == "a6d9466d2617cd7f38faf4ff172fac0e"
    assert KEYS.device("Canon", "CXDI", "XR1", "7") == "8979bb64aae94f8695dcac34f7b6a219"
    assert KEYS.report_uid("series", "1.2.3") == "2.25.192651489921998127521063550137094993296"
    assert KEYS.term("BodyPartExamined", "XYZ") == "12225beab7bfd7ac6180531a1e9c9b00"
    assert [number for number in range(20) if KEYS.is_locked(f"OST-{number:016d}", 0.2)] == [11, 19]


@given(texts, texts)
def test_the_same_patient_has_the_same_pseudonym_and_another_key_another(issuer: str, patient_id: str) -> None:
    assert KEYS.pid(issuer, patient_id) == KEYS.pid(f" {issuer}\0", f"{patient_id} ")
    assert KEYS.pid(issuer, patient_id) != OTHER.pid(issuer, patient_id)


@given(texts, texts, texts)
def test_different_patients_differ(issuer: str, one: str, other: str) -> None:
    if one.strip(" \0\t\r\n") != other.strip(" \0\t\r\n"):
        assert KEYS.pid(issuer, one) != KEYS.pid(issuer, other)
        assert KEYS.pid(one, issuer) != KEYS.pid(other, issuer)


def test_case_tells_patients_apart_and_so_does_the_issuer() -> None:
    assert len({KEYS.pid("A", "x1"), KEYS.pid("A", "X1"), KEYS.pid("B", "x1"), KEYS.pid("a", "x1")}) == 4


@given(texts, texts)
def test_dates_move_back_by_whole_weeks_within_ten_years(issuer: str, patient_id: str) -> None:
    days = KEYS.days(issuer, patient_id)
    assert days % 7 == 0
    assert -3640 <= days <= -7


@given(uids)
def test_a_uid_becomes_another_valid_uid(original: str) -> None:
    uid = KEYS.uid(original)
    assert uid.startswith("2.25.")
    assert len(uid) <= 44
    assert not uid[5:].startswith("0")
    assert uid == KEYS.uid(original + "\0") != KEYS.uid(original + ".1")


@pytest.mark.parametrize("original", ["1.2.840.10008.19541231.7", "1.2.840.10008.SECRET^NAME", "1.2.840.100089.1"])
def test_no_root_lets_a_uid_pass(original: str) -> None:
    assert KEYS.uid(original).startswith("2.25.")


def test_an_empty_accession_number_or_study_id_has_no_hash() -> None:
    assert KEYS.accession("A", " ") == KEYS.study_id("A", "") == KEYS.device("", " ", "") == ""
    assert KEYS.accession("A", "1") != KEYS.study_id("A", "1")


def test_parts_of_a_report_uid_are_told_apart_whatever_they_contain() -> None:
    assert (
        len({KEYS.report_uid(*parts) for parts in (("a", "b"), ("ab",), ("a", "", "b"), ("a\x1fb",), ("a b",), ("a ", "b"))}) == 6
    )


def test_the_locked_share_is_kept_and_grows_without_moving_anybody() -> None:
    pids = [KEYS.pid("A", str(number)) for number in range(4000)]
    locked = {pid for pid in pids if KEYS.is_locked(pid, 0.2)}
    assert 0.17 < len(locked) / len(pids) < 0.23
    assert locked < {pid for pid in pids if KEYS.is_locked(pid, 0.3)}
    assert not any(KEYS.is_locked(pid, 0.0) for pid in pids)
    assert all(KEYS.is_locked(pid, 1.0) for pid in pids)


def test_a_site_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        SiteKeys.derive(b"short")


def test_no_key_is_in_the_text_of_the_keys() -> None:
    assert repr(KEYS) == "SiteKeys()"
