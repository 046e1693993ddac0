"""What the catalogue knows, and what it must never mix up: images, patients, labels, deliveries, runs, roles."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
from shelf import CLAIM_S, QUIET_S, Desk, document, held, image

from node.errors import BadLabels, IdentityConflict, NotFound
from node.keep.catalogue import Catalogue
from node.keep.catalogue.roles import FORGET_AFTER
from node.keep.records import Delivery, DeliveryState, Hold, Label, Purpose, Role, StudyState

LABEL = Label(
    pid="OST-1",
    study_uid="1",
    sop_uid="",
    label="ewing",
    reader="dr a",
    labelled_on="2026-03-01",
    confirmed_by="histology",
    first_treatment_on="2026-04-01",
)


@pytest.fixture
def desk(catalogue_url: str) -> Iterator[Desk]:
    with Catalogue.open(catalogue_url) as catalogue:
        yield Desk(catalogue)


# --- images and patients -------------------------------------------------------------------------------------------------------


def test_an_image_reads_back_as_it_was_noted(desk: Desk) -> None:
    one = image(age_years=None, pixels_checked=False, body_part="", accession_key="")
    assert desk.catalogue.instances.note(one, purpose=Purpose.ANSWER, calling_ae="PACS", locked=False, now=desk.now)
    assert desk.catalogue.instances.find(one.sop_uid) == one
    assert desk.catalogue.instances.find("9") is None
    assert desk.catalogue.instances.of_study("1") == [one]
    assert desk.catalogue.instances.count() == 1


def test_an_image_is_noted_once(desk: Desk) -> None:
    results = []

    def note() -> None:
        results.append(
            desk.catalogue.instances.note(image(), purpose=Purpose.ANSWER, calling_ae="PACS", locked=False, now=desk.now)
        )

    threads = [threading.Thread(target=note) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 7 + [True]
    assert desk.study().instances == 1


def test_a_study_belongs_to_one_patient(desk: Desk) -> None:
    desk.image(number=1)
    other = image(number=2, pid="OST-OTHER")
    with pytest.raises(IdentityConflict):
        desk.catalogue.instances.note(other, purpose=Purpose.ANSWER, calling_ae="PACS", locked=True, now=desk.now)
    assert desk.catalogue.instances.find(other.sop_uid) is None
    assert desk.catalogue.instances.locked_patients() == frozenset(), "nothing of the newcomer is entered"
    with pytest.raises(IdentityConflict):
        desk.hold(number=3, pid="OST-OTHER")
    assert desk.catalogue.instances.held() == []


def test_who_is_locked_is_fixed_at_first_sight(desk: Desk) -> None:
    """A changed share moves nobody already placed (promise 10)."""
    for study, pid, locked in [("1", "A", True), ("2", "B", False), ("3", "A", False), ("4", "B", True)]:
        new = image(study, pid=pid)
        desk.catalogue.instances.note(new, purpose=Purpose.LEARN, calling_ae="PACS", locked=locked, now=desk.now)
    assert desk.catalogue.instances.locked_patients() == {"A"}
    assert [desk.study(uid).locked for uid in "1234"] == [True, False, True, False]


def test_the_trainer_sees_archived_images_with_the_locked_ones_marked(desk: Desk) -> None:
    desk.image("1", 2, purpose=Purpose.LEARN)
    desk.image("1", 1, purpose=Purpose.LEARN)
    desk.image("2", 1, locked=True)
    desk.hold("3", 1)
    images = desk.catalogue.instances.for_training()
    assert [(one.sop_uid, one.locked, one.purpose) for one in images] == [
        ("1.9.1", False, Purpose.LEARN),
        ("1.9.2", False, Purpose.LEARN),
        ("2.9.1", True, Purpose.ANSWER),
    ]
    assert all(getattr(images[0], field.name) == getattr(image(), field.name) for field in dataclasses.fields(image()))


def test_only_a_known_image_is_seen_again(desk: Desk) -> None:
    with pytest.raises(NotFound):
        desk.catalogue.instances.seen_again("9", purpose=Purpose.ANSWER, calling_ae="PACS", now=desk.now)


# --- the quarantine ------------------------------------------------------------------------------------------------------------


def test_held_instances_are_listed_and_struck_out_by_a_person(desk: Desk) -> None:
    first, second = held(number=1), held("", 2, Hold.MALFORMED, sop_uid="", pid="")
    for one in (first, second, first):  # the same id is the same entry
        desk.catalogue.instances.hold(one, now=desk.now)
        desk.later(seconds=1)
    instances = desk.catalogue.instances
    assert [one for one, _at in instances.held()] == [second, first], "what came again is held from then on"
    assert instances.held_one(first.id) == (first, desk.now - timedelta(seconds=1))
    assert instances.held_of_study("1") == [first]
    asked = []
    told = {"by": "dr", "reason": "not needed", "decision": "discarded", "now": desk.now}
    assert not instances.unhold(first.id, **told, goes=asked.append)  # type: ignore[arg-type]  # which says no
    assert asked == [desk.now - timedelta(seconds=1)]
    assert instances.held_one(first.id) is not None
    assert instances.unhold(first.id, by="dr", reason="not needed", decision="discarded", now=desk.now)
    assert instances.held_one(first.id) is None
    with pytest.raises(NotFound):
        instances.unhold(first.id, by="dr", reason="not needed", decision="discarded", now=desk.now)
    (act,) = desk.catalogue.history.acts(subject=first.id)
    assert (act.by, act.what, act.reason, act.at) == ("dr", "quarantine: discarded", "not needed", desk.now)


def test_a_study_held_first_gets_its_patient_with_its_first_image(desk: Desk) -> None:
    desk.hold(number=1, reason=Hold.PATIENT_ID, pid="")
    assert desk.study().pid == ""
    desk.image(number=2, locked=True)
    assert (desk.study().pid, desk.study().locked) == ("OST-1", True)


def test_the_pid_of_a_conflicting_newcomer_is_not_taken_for_the_studys(desk: Desk) -> None:
    desk.hold(number=1, reason=Hold.PATIENT_CONFLICT, pid="OST-OTHER")
    desk.image(number=2)
    assert desk.study().pid == "OST-1"


def test_dropped_words_are_counted_by_their_hash(desk: Desk) -> None:
    desk.catalogue.instances.dropped([("BodyPartExamined", "x"), ("BodyPartExamined", "y")], desk.now)
    desk.catalogue.instances.dropped([("BodyPartExamined", "y")], desk.now)
    desk.catalogue.instances.dropped([], desk.now)
    assert desk.catalogue.instances.dropped_terms() == [("BodyPartExamined", "y", 2), ("BodyPartExamined", "x", 1)]


# --- finding a study -----------------------------------------------------------------------------------------------------------


def test_a_study_is_found_by_any_uid_or_keyed_number(desk: Desk) -> None:
    desk.image("1", 1)
    desk.image("2", 1)
    desk.hold("3", 5)
    studies = desk.catalogue.studies
    for typed in ("1", "1.9", "1.9.1"):
        assert [one.uid for one in studies.find(uid=typed)] == ["1"]
    assert [one.uid for one in studies.find(uid="3.9.5")] == ["3"], "held ones too"
    assert [one.uid for one in studies.find(accession_keys=["accession-1", "id-2", ""])] == ["1", "2"]
    assert studies.find(uid="9") == studies.find() == studies.find(accession_keys=[""]) == []


def test_an_empty_accession_number_finds_nothing(desk: Desk) -> None:
    one = image(accession_key="", study_id_key="")
    desk.catalogue.instances.note(one, purpose=Purpose.ANSWER, calling_ae="PACS", locked=False, now=desk.now)
    assert desk.catalogue.studies.find(uid="", accession_keys=["", ""]) == []


def test_status_shows_the_oldest_that_waits_and_the_newest_that_failed(desk: Desk) -> None:
    studies = desk.catalogue.studies
    assert studies.oldest_open() is None
    assert studies.recent_errors() == []
    assert set(studies.by_state()) == set(StudyState)
    for uid in ("a", "b"):
        desk.image(uid)
        desk.later(seconds=QUIET_S)
    desk.image("l", purpose=Purpose.LEARN)
    desk.complete()
    assert desk.claim() is not None
    studies.fail("a", reason="no memory", next_attempt_at=None, now=desk.now)
    assert desk.claim() is not None
    desk.later(seconds=1)
    desk.put("b")
    desk.open()
    row = desk.take()
    assert row is not None
    desk.catalogue.deliveries.kill(row.id, reason="away", now=desk.now)
    oldest = studies.oldest_open()
    assert oldest is not None
    assert oldest.uid == "a"
    assert [(uid, why) for _at, uid, why in studies.recent_errors()] == [("b", "main: away"), ("a", "no memory")]
    assert len(studies.recent_errors(limit=1)) == 1
    assert studies.by_state()[StudyState.RECEIVING] == 1


# --- deliveries ----------------------------------------------------------------------------------------------------------------


def queue(desk: Desk, *studies: str, to: list[str]) -> None:
    """Classify studies and open their deliveries."""
    for uid in studies:
        desk.image(uid)
    desk.later(seconds=QUIET_S)
    desk.complete()
    while found := desk.claim():
        desk.put(found.uid, to=to)
    desk.open()


def took(desk: Desk, *destinations: str) -> Delivery:
    row = desk.take(*destinations)
    assert row is not None
    return row


def test_one_row_a_destination_and_delivered_when_all_are_sent(desk: Desk) -> None:
    queue(desk, "1", to=["main", "second"])
    assert desk.open() == 0
    assert [(row.destination, row.state, row.edition) for row in desk.catalogue.deliveries.list()] == [
        ("main", DeliveryState.PENDING, 1),
        ("second", DeliveryState.PENDING, 1),
    ]
    desk.send(took(desk))
    assert desk.state() is StudyState.DELIVERING
    desk.send(took(desk))
    assert desk.state() is StudyState.DELIVERED
    assert desk.take() is None
    assert desk.catalogue.deliveries.by_state() == {state: 2 * (state is DeliveryState.SENT) for state in DeliveryState}
    assert all(row.sent_at == desk.now for row in desk.catalogue.deliveries.of_study("1"))


def test_a_claimed_delivery_is_nobody_elses_until_its_time_is_over(desk: Desk) -> None:
    queue(desk, "1", to=["main"])
    first = took(desk)
    assert (first.attempts, first.claimed_until) == (1, desk.now + timedelta(seconds=CLAIM_S))
    assert desk.take() is None
    desk.later(seconds=CLAIM_S)
    assert took(desk).attempts == 2


def test_a_dead_destination_never_blocks_another(desk: Desk) -> None:
    queue(desk, "1", "2", "3", to=["gone", "main"])
    order = []
    for _ in range(6):
        row = took(desk)
        order.append(row.destination)
        desk.later(seconds=20)
        if row.destination == "gone":
            desk.catalogue.deliveries.retry_at(
                row.id, reason="no answer", next_attempt_at=desk.now + timedelta(hours=1), now=desk.now
            )
        else:
            desk.send(row)
    assert order == ["gone", "main"] * 3
    assert [desk.take("main"), desk.take("gone"), desk.take()] == [None, None, None]
    desk.later(hours=1)
    assert took(desk).destination == "gone"


def test_only_the_destinations_asked_for_are_claimed(desk: Desk) -> None:
    queue(desk, "1", to=["main", "second"])
    assert took(desk, "second").destination == "second"
    assert desk.take("second") is None
    assert desk.catalogue.deliveries.claim(claim_s=CLAIM_S, now=desk.now, destinations=[]) is None


def test_a_document_is_noted_before_it_leaves_and_a_repeat_is_the_same(desk: Desk) -> None:
    queue(desk, "1", to=["main"])
    row = took(desk)
    built = document(row)
    assert not desk.catalogue.results.is_ours(built.sop_uid)
    for _ in range(2):
        stamped = desk.catalogue.deliveries.stamp(row.id, built, now=desk.now)
        assert (stamped.document, stamped.edition, stamped.state) == (built, 1, DeliveryState.PENDING)
    assert desk.catalogue.results.is_ours(built.sop_uid), "it may come back before its answer does"
    assert not desk.catalogue.results.is_ours("2.25.999")
    assert desk.catalogue.deliveries.documents_before(row.id) == []


@pytest.mark.parametrize("change", ["bytes", "class"])
def test_another_document_gets_another_edition_and_names_the_one_that_may_have_left(desk: Desk, change: str) -> None:
    queue(desk, "1", to=["main"])
    row = took(desk)
    first = document(row)
    desk.catalogue.deliveries.stamp(row.id, first, now=desk.now)
    other = dataclasses.replace(first, **({"sha256": "f" * 64} if change == "bytes" else {"sop_class_uid": "1.2.3"}))
    refused = desk.catalogue.deliveries.stamp(row.id, other, now=desk.now)
    assert (refused.document, refused.edition) == (None, 2)
    assert desk.catalogue.deliveries.documents_before(row.id) == [first]
    second = document(refused, tone="new")
    assert desk.catalogue.deliveries.stamp(row.id, second, now=desk.now).document == second
    assert desk.catalogue.deliveries.documents_before(row.id) == [first]
    assert desk.catalogue.results.is_ours(first.sop_uid)
    assert desk.catalogue.results.is_ours(second.sop_uid)


def test_predecessors_are_those_of_the_same_destination_and_study(desk: Desk) -> None:
    queue(desk, "1", "2", to=["main", "second"])
    sent: dict[tuple[str, str], object] = {}
    while row := desk.take():
        sent[row.study_uid, row.destination] = desk.send(row)
    desk.image("1", 2)
    desk.later(seconds=QUIET_S)
    desk.complete()
    desk.claim()
    desk.put("1", to=["main", "third"])
    desk.open()
    new = {row.destination: row.id for row in desk.catalogue.deliveries.list([DeliveryState.PENDING])}
    assert desk.catalogue.deliveries.documents_before(new["main"]) == [sent["1", "main"]]
    assert desk.catalogue.deliveries.documents_before(new["third"]) == []


def test_what_is_held_or_dead_stays_until_a_person_revives_it(desk: Desk) -> None:
    queue(desk, "1", to=["a", "b", "c"])
    deliveries = desk.catalogue.deliveries
    ids = {name: took(desk, name).id for name in "abc"}
    deliveries.hold(ids["a"], reason="the PACS names another patient", now=desk.now)
    deliveries.kill(ids["b"], reason="no answer", now=desk.now)
    deliveries.retry_at(ids["c"], reason="no answer", next_attempt_at=desk.now + timedelta(hours=1), now=desk.now)
    assert desk.state() is StudyState.DELIVERING
    assert [row.reason for row in deliveries.list([DeliveryState.HELD, DeliveryState.DEAD])] == [
        "the PACS names another patient",
        "no answer",
    ]
    desk.later(hours=2)
    assert took(desk).destination == "c", "the others are not due, ever"
    assert deliveries.revive(ids["a"], desk.now, by="it", reason="merged") == 1
    assert deliveries.revive(None, desk.now) == 1
    revived = deliveries.get(ids["b"])
    assert revived is not None
    assert (revived.state, revived.attempts, revived.created_at) == (DeliveryState.PENDING, 0, desk.now)
    with pytest.raises(NotFound):
        deliveries.revive(999, desk.now)
    assert [act.subject for act in desk.catalogue.history.acts()] == [str(ids["b"]), str(ids["a"])]
    while row := desk.take():
        desk.send(row)
    deliveries.sent(ids["c"], now=desk.now)
    assert deliveries.revive(None, desk.now) == 0
    assert desk.state() is StudyState.DELIVERED


def test_what_is_sent_stays_sent(desk: Desk) -> None:
    queue(desk, "1", to=["main"])
    row = took(desk)
    desk.send(row)
    before = desk.catalogue.deliveries.get(row.id)
    desk.later(hours=1)
    desk.catalogue.deliveries.kill(row.id, reason="late", now=desk.now)
    desk.catalogue.deliveries.hold(row.id, reason="late", now=desk.now)
    desk.catalogue.deliveries.retry_at(row.id, reason="late", next_attempt_at=desk.now, now=desk.now)
    desk.catalogue.deliveries.sent(row.id, now=desk.now)
    assert desk.catalogue.deliveries.get(row.id) == before
    assert desk.catalogue.deliveries.revive(row.id, desk.now) == 0


def test_an_unknown_delivery_or_study_is_not_found(desk: Desk) -> None:
    assert desk.catalogue.deliveries.get(9) is None
    assert desk.catalogue.results.get(9) is None
    assert desk.catalogue.results.latest("9") is None
    with pytest.raises(NotFound):
        desk.catalogue.deliveries.sent(9, now=desk.now)
    with pytest.raises(NotFound):
        desk.catalogue.deliveries.documents_before(9)


def test_a_result_reads_back_with_its_findings(desk: Desk) -> None:
    queue(desk, "1", to=["main"])
    result = desk.catalogue.results.latest("1")
    assert result is not None
    assert desk.catalogue.results.get(result.id) == result
    assert result.findings.probabilities == (0.75, 0.25)
    assert result.content_digest == desk.catalogue.studies.content("1")


# --- labels, runs, roles -------------------------------------------------------------------------------------------------------


def test_labels_are_kept_all_or_none(desk: Desk) -> None:
    desk.image("1")
    of_image = dataclasses.replace(LABEL, sop_uid="1.9.1")
    with pytest.raises(BadLabels):
        desk.catalogue.labels.put_all([LABEL, dataclasses.replace(LABEL, study_uid="9")], now=desk.now, by="dr")
    with pytest.raises(BadLabels):
        desk.catalogue.labels.put_all([LABEL, dataclasses.replace(LABEL, pid="OST-OTHER")], now=desk.now, by="dr")
    assert desk.catalogue.labels.all() == []
    assert desk.catalogue.labels.put_all([of_image, LABEL], now=desk.now, by="dr") == 2
    assert desk.catalogue.labels.put_all([LABEL, of_image], now=desk.now, by="dr") == 0
    assert desk.catalogue.labels.all() == [LABEL, of_image]


def test_a_corrected_label_replaces_the_readers_own_and_the_history_says_so(desk: Desk) -> None:
    desk.image("1")
    other_reader = dataclasses.replace(LABEL, reader="dr b")
    desk.catalogue.labels.put_all([LABEL, other_reader], now=desk.now, by="registrar")
    corrected = dataclasses.replace(LABEL, label="osteomyelitis", labelled_on="2026-03-02")
    assert desk.catalogue.labels.put_all([corrected], now=desk.now, by="registrar") == 1
    assert desk.catalogue.labels.all() == [corrected, other_reader]
    (act,) = desk.catalogue.history.acts(subject="1")
    assert (act.by, act.what) == ("registrar", "label changed")
    assert "ewing" in act.reason
    assert "osteomyelitis" in act.reason


def test_each_process_leaves_its_last_sign_of_life(desk: Desk) -> None:
    def beat(name: str, pid: int, **told: object) -> None:
        desk.catalogue.roles.beat(Role(name, "host", pid, desk.now, told))

    beat("reply", 1, model="v1")
    beat("receive", 2)
    desk.later(seconds=5)
    beat("reply", 1, model="v2")
    assert [(role.name, role.pid, role.seen_at) for role in desk.catalogue.roles.all()] == [
        ("receive", 2, desk.now - timedelta(seconds=5)),
        ("reply", 1, desk.now),
    ]
    assert desk.catalogue.roles.all()[1].told == {"model": "v2"}
    desk.later(seconds=FORGET_AFTER.total_seconds() + 1)
    beat("reply", 3)
    assert [(role.name, role.pid) for role in desk.catalogue.roles.all()] == [("receive", 2), ("reply", 3)]


def test_a_switch_keeps_who_set_it_and_why(desk: Desk) -> None:
    roles = desk.catalogue.roles
    assert roles.flag("answers") is None
    roles.set_flag("answers", "paused", by="it", reason="first weeks", now=desk.now)
    roles.set_flag("answers", "on", by="dr", reason="trusted", now=desk.now)
    assert roles.flag("answers") == "on"
    assert [(act.by, act.what, act.reason) for act in desk.catalogue.history.acts(subject="answers")] == [
        ("dr", "answers: on", "trusted"),
        ("it", "answers: paused", "first weeks"),
    ]


def test_what_is_sorted_is_sorted_alike_on_every_server(desk: Desk) -> None:
    """Servers sort texts by their locale: dots for nothing, capitals behind small letters. Digests are of Python's order."""
    for study in ("18", "1"):
        for number in (2, 10):
            desk.image(study, number)
            desk.hold(study, number + 20, Hold.BURNED_IN)
    images = ["1.9.10", "1.9.2", "18.9.10", "18.9.2"]
    assert [one.sop_uid for one in desk.catalogue.instances.for_training()] == images
    assert [one.sop_uid for one in desk.catalogue.instances.of_study("18")] == images[2:]
    assert [one.sop_uid for one in desk.catalogue.instances.held_of_study("1")] == ["1.9.22", "1.9.30"]
    said = [Label("OST-1", "1", "", "ewing", reader, "2026-03-01", "histology") for reader in ("a", "B", "A")]
    desk.catalogue.labels.put_all(said, now=desk.now, by="x")
    assert [one.reader for one in desk.catalogue.labels.all()] == ["A", "B", "a"]


# --- what is on the disk -------------------------------------------------------------------------------------------------------


def test_what_was_noted_is_seen_by_others_as_soon_as_it_is_acknowledged(catalogue_url: str) -> None:
    """Nothing waits in memory."""
    with Catalogue.open(catalogue_url) as catalogue, Catalogue.open(catalogue_url) as other:
        desk = Desk(catalogue)
        for number in range(5):
            desk.image(number=number)
            assert other.instances.count() == number + 1
