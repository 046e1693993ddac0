"""How a study moves: by images, by time, by repliers, by destinations, by people (design.md, 5.5, 5.6, 5.7 and section 6)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from shelf import CLAIM_S, MAX_WAIT_S, QUIET_S, WITHIN_H, Desk, findings

from node.errors import NotFound, NotToBeAnswered
from node.keep.catalogue import Catalogue, states
from node.keep.records import DeliveryState, Hold, Purpose, StudyState

if TYPE_CHECKING:
    from postgres import Cluster

LEARN, ANSWER = Purpose.LEARN, Purpose.ANSWER


@pytest.fixture
def desk(catalogue_url: str) -> Iterator[Desk]:
    with Catalogue.open(catalogue_url) as catalogue:
        yield Desk(catalogue)


# --- complete ------------------------------------------------------------------------------------------------------------------


def test_a_study_is_complete_when_it_was_quiet_for_long_enough(desk: Desk) -> None:
    desk.image(number=1)
    desk.later(seconds=QUIET_S - 1)
    desk.image(number=2)
    desk.later(seconds=QUIET_S - 1)
    assert desk.complete() == 0
    desk.later(seconds=1)
    assert desk.complete() == 1
    assert desk.state() is StudyState.COMPLETE
    assert desk.study().instances == 2


def test_a_study_that_is_never_quiet_is_complete_after_the_longest_wait(desk: Desk) -> None:
    for number in range(int(MAX_WAIT_S / 60)):
        desk.image(number=number)
        assert desk.complete() == 0
        desk.later(seconds=60)
    assert desk.complete() == 1


def test_the_longest_wait_counts_from_the_first_image_of_the_round(desk: Desk) -> None:
    desk.image(number=1)
    desk.answer()
    desk.later(hours=2)
    desk.image(number=2)
    assert desk.state() is StudyState.RECEIVING
    assert desk.complete() == 0
    desk.later(seconds=QUIET_S)
    assert desk.complete() == 1


def test_times_survive_a_restart(catalogue_url: str) -> None:
    with Catalogue.open(catalogue_url) as catalogue:
        before = Desk(catalogue)
        before.image()
    with Catalogue.open(catalogue_url) as catalogue:
        after = Desk(catalogue, before.now + timedelta(seconds=QUIET_S))
        assert after.complete() == 1


def test_a_study_to_learn_from_is_learned_and_never_claimed(desk: Desk) -> None:
    desk.image(purpose=LEARN)
    desk.later(seconds=QUIET_S)
    assert desk.complete() == 1
    assert desk.state() is StudyState.LEARNED
    assert desk.claim() is None
    with pytest.raises(NotToBeAnswered):
        desk.catalogue.studies.reopen("1", now=desk.now)
    assert desk.state() is StudyState.LEARNED


# --- the quarantine ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reasons", "purpose", "state"),
    [
        ([Hold.MODALITY], ANSWER, StudyState.COMPLETE),
        ([Hold.MODALITY, Hold.MODALITY], ANSWER, StudyState.COMPLETE),
        ([Hold.MODALITY], LEARN, StudyState.QUARANTINED),
        ([Hold.MODALITY, Hold.BURNED_IN], ANSWER, StudyState.QUARANTINED),
        ([Hold.SECONDARY], ANSWER, StudyState.QUARANTINED),
        ([Hold.PATIENT_ID], ANSWER, StudyState.QUARANTINED),
    ],
)
def test_a_study_that_is_all_in_the_quarantine(desk: Desk, reasons: list[Hold], purpose: Purpose, state: StudyState) -> None:
    for number, reason in enumerate(reasons):
        desk.hold(number=number, reason=reason, purpose=purpose)
    desk.later(seconds=QUIET_S)
    assert desk.complete() == 1
    assert desk.state() is state
    if state is StudyState.QUARANTINED:
        assert all(reason.value in desk.study().reason for reason in reasons)
        assert desk.claim() is None


def test_one_image_in_the_archive_is_enough_to_go_on(desk: Desk) -> None:
    desk.image(number=1)
    desk.hold(number=2, reason=Hold.BURNED_IN)
    desk.later(seconds=QUIET_S)
    desk.complete()
    assert desk.state() is StudyState.COMPLETE


def test_a_released_image_starts_the_study_again(desk: Desk) -> None:
    desk.hold(number=1, reason=Hold.BURNED_IN)
    desk.later(seconds=QUIET_S)
    desk.complete()
    with pytest.raises(NotToBeAnswered, match="quarantine"):
        desk.catalogue.studies.reopen("1", now=desk.now)
    content = desk.catalogue.studies.content("1")
    desk.image(number=1)
    desk.catalogue.instances.unhold("held-1-1-BURNED_IN", by="dr", reason="seen", decision="released", now=desk.now)
    assert desk.state() is StudyState.RECEIVING
    assert desk.catalogue.studies.content("1") == content
    assert desk.answer()


def test_what_is_of_doubtful_identity_moves_no_study(desk: Desk) -> None:
    desk.image(number=1)
    desk.answer()
    content = desk.catalogue.studies.content("1")
    for number, reason in enumerate([Hold.PATIENT_CONFLICT, Hold.PATIENT_ID, Hold.PIXEL_CONFLICT, Hold.MALFORMED]):
        desk.hold(number=10 + number, reason=reason, pid="OST-OTHER")
    assert desk.state() is StudyState.DELIVERED
    assert desk.catalogue.studies.content("1") == content


def test_the_same_held_object_sent_again_moves_nothing(desk: Desk) -> None:
    desk.image(number=1)
    desk.hold(number=2)
    result = desk.answer()
    desk.hold(number=2)
    assert desk.state() is StudyState.DELIVERED
    desk.hold(number=3)
    assert desk.state() is StudyState.RECEIVING
    assert desk.answer().predecessor == result.id


# --- late images ---------------------------------------------------------------------------------------------------------------


def reach(desk: Desk, state: StudyState) -> None:
    """Bring study "1" of one image to `state`."""
    desk.image(number=1, purpose=LEARN if state is StudyState.LEARNED else ANSWER)
    desk.later(seconds=QUIET_S)
    if state is StudyState.RECEIVING:
        return
    desk.complete()
    if state in (StudyState.EXPIRED, StudyState.REMOVED):
        desk.later(hours=WITHIN_H + 1)
        desk.expire()
    if state is StudyState.REMOVED:
        assert desk.catalogue.studies.take_for_removal({ANSWER: timedelta(0)}, now=desk.now, limit=1) == ["1"]
        desk.catalogue.studies.removed("1", now=desk.now)
        desk.later(hours=1)
    if state in (StudyState.COMPLETE, StudyState.EXPIRED, StudyState.LEARNED, StudyState.REMOVED):
        return
    assert desk.claim() is not None
    if state is StudyState.WAITING:
        desk.catalogue.studies.wait_for_model("1", now=desk.now)
    if state is StudyState.FAILED:
        desk.catalogue.studies.fail("1", reason="no memory", next_attempt_at=desk.now + timedelta(minutes=1), now=desk.now)
    if state in (StudyState.INFERRED, StudyState.DELIVERING, StudyState.DELIVERED):
        desk.put()
    if state in (StudyState.DELIVERING, StudyState.DELIVERED):
        desk.open()
    if state is StudyState.DELIVERED:
        delivery = desk.take()
        assert delivery is not None
        desk.send(delivery)


AT_REST = [s for s in StudyState if s not in (StudyState.INFERRING, StudyState.INFERRED, StudyState.DELIVERING)]


@pytest.mark.parametrize("state", [state for state in AT_REST if state is not StudyState.QUARANTINED])
def test_a_late_image_opens_a_new_round_where_nobody_works(desk: Desk, state: StudyState) -> None:
    reach(desk, state)
    assert desk.state() is state
    desk.image(number=2, purpose=desk.study().purpose)
    assert desk.state() is StudyState.RECEIVING
    assert not desk.study().late
    assert desk.study().last_at == desk.now


@pytest.mark.parametrize("state", [StudyState.INFERRING, StudyState.INFERRED, StudyState.DELIVERING])
def test_a_late_image_waits_for_the_result_in_work_and_then_revises_it(desk: Desk, state: StudyState) -> None:
    reach(desk, state)
    content = desk.catalogue.studies.content("1")
    desk.image(number=2)
    assert desk.state() is state
    assert desk.study().late
    if state is StudyState.INFERRING:
        desk.catalogue.results.put(
            "1", findings(), content_digest=content, settings_digest="s", destinations=["main"], now=desk.now
        )
    desk.open()
    delivery = desk.take()
    assert delivery is not None
    first = desk.send(delivery)
    assert desk.state() is StudyState.RECEIVING
    revised = desk.answer()
    assert desk.state() is StudyState.DELIVERED
    assert (revised.run, revised.predecessor) == (2, delivery.result_id)
    row = desk.catalogue.deliveries.list()[-1]
    assert desk.catalogue.deliveries.documents_before(row.id) == [first]


def test_an_image_that_came_before_the_claim_is_not_late(desk: Desk) -> None:
    reach(desk, StudyState.INFERRING)
    desk.image(number=2)
    desk.later(seconds=CLAIM_S)  # the replier was killed; the next one sees both images
    assert desk.claim() is not None
    desk.put()
    desk.open()
    delivery = desk.take()
    assert delivery is not None
    desk.send(delivery)
    assert desk.state() is StudyState.DELIVERED


def test_a_late_image_is_answered_even_where_one_destination_is_dead(desk: Desk) -> None:
    desk.image(number=1)
    desk.later(seconds=QUIET_S)
    desk.complete()
    desk.claim()
    desk.put(to=["main", "gone"])
    desk.open()
    for name in ("main", "gone"):
        delivery = desk.take(name)
        assert delivery is not None
        if name == "main":
            desk.send(delivery)
        else:
            desk.catalogue.deliveries.kill(delivery.id, reason="no answer for three days", now=desk.now)
            assert desk.state() is StudyState.DELIVERING
    desk.image(number=2)
    assert desk.state() is StudyState.RECEIVING


def test_filling_the_archive_re_answers_nothing(desk: Desk) -> None:
    """Unknown images of an answered study that are sent to be learned from are kept, and nothing else happens."""
    desk.image(number=1)
    desk.answer()
    assert desk.image(number=2, purpose=LEARN)
    assert desk.state() is StudyState.DELIVERED
    assert desk.study().purpose is ANSWER
    assert desk.study().instances == 2


# --- purposes ------------------------------------------------------------------------------------------------------------------


def test_a_learned_study_sent_again_to_be_answered_is_answered(desk: Desk) -> None:
    reach(desk, StudyState.LEARNED)
    desk.later(hours=1000)
    assert not desk.image(number=1, purpose=ANSWER, ae="WARD"), "every instance is known"
    assert desk.state() is StudyState.RECEIVING
    assert (desk.study().purpose, desk.study().calling_ae) == (ANSWER, "WARD")
    assert desk.expire() == 0
    desk.answer()
    assert desk.state() is StudyState.DELIVERED


def test_a_held_study_to_learn_from_sent_again_to_be_answered_is_answered(desk: Desk) -> None:
    desk.hold(purpose=LEARN)
    desk.later(seconds=QUIET_S)
    desk.complete()
    assert desk.state() is StudyState.QUARANTINED
    desk.hold(purpose=ANSWER, calling_ae="WARD")
    assert desk.state() is StudyState.RECEIVING
    desk.answer()
    assert desk.study().calling_ae == "WARD"


@pytest.mark.parametrize("state", [StudyState.DELIVERED, StudyState.EXPIRED, StudyState.WAITING])
@pytest.mark.parametrize("purpose", [ANSWER, LEARN])
def test_a_known_image_sent_again_moves_no_study_to_be_answered(desk: Desk, state: StudyState, purpose: Purpose) -> None:
    reach(desk, state)
    before = desk.study()
    desk.later(hours=1)
    assert not desk.image(number=1, purpose=purpose, ae="OTHER")
    assert desk.study() == before


def test_a_first_champion_over_learned_studies_answers_nothing(desk: Desk) -> None:
    for number in range(100):
        desk.image(str(number), purpose=LEARN)
    desk.later(seconds=QUIET_S)
    desk.complete()
    assert desk.catalogue.studies.wake_waiting(desk.now) == 0
    assert desk.claim() is None
    assert desk.open() == 0
    assert desk.catalogue.studies.by_state()[StudyState.LEARNED] == 100


# --- expiry --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state", [StudyState.COMPLETE, StudyState.WAITING, StudyState.INFERRED, StudyState.FAILED, StudyState.INFERRING]
)
def test_what_was_not_answered_in_time_expires_and_only_a_person_starts_it_again(desk: Desk, state: StudyState) -> None:
    reach(desk, state)
    desk.later(hours=WITHIN_H - 1)
    assert desk.expire() == 0
    desk.later(hours=1)
    assert desk.expire() == 1
    assert desk.state() is StudyState.EXPIRED
    assert "by hand" in desk.study().reason
    assert desk.claim() is None
    assert desk.open() == 0
    assert desk.catalogue.studies.wake_waiting(desk.now) == 0
    desk.catalogue.studies.reopen("1", by="dr", reason="asked by phone", now=desk.now)
    assert desk.expire() == 0, "a request makes it young again"
    desk.answer()
    assert desk.state() is StudyState.DELIVERED
    assert [(act.by, act.what, act.reason) for act in desk.catalogue.history.acts(subject="1")] == [
        ("dr", "study reopened", "asked by phone")
    ]


@pytest.mark.parametrize("state", [StudyState.DELIVERING, StudyState.DELIVERED, StudyState.LEARNED, StudyState.RECEIVING])
def test_what_is_on_its_way_or_done_does_not_expire(desk: Desk, state: StudyState) -> None:
    reach(desk, state)
    desk.later(hours=1000)
    assert desk.expire() == 0
    assert desk.state() is state


def test_a_study_held_by_a_working_replier_does_not_expire(desk: Desk) -> None:
    desk.image()
    desk.later(seconds=QUIET_S)
    desk.complete()
    desk.later(hours=WITHIN_H, seconds=-QUIET_S)
    assert desk.claim() is not None
    desk.later(seconds=60)
    assert desk.expire() == 0


def test_answers_that_were_off_for_long_expire_instead_of_leaving(desk: Desk) -> None:
    reach(desk, StudyState.INFERRED)
    assert desk.open(answers_on=False) == 0
    assert desk.state() is StudyState.INFERRED
    desk.later(hours=WITHIN_H + 1)
    desk.expire()
    assert desk.open(answers_on=True) == 0
    assert desk.catalogue.deliveries.list() == []


# --- claims --------------------------------------------------------------------------------------------------------------------


def test_the_oldest_study_is_claimed_first_and_once(desk: Desk) -> None:
    for uid in ("a", "b"):
        desk.image(uid)
        desk.later(seconds=1)
    desk.later(seconds=QUIET_S)
    desk.complete()
    first, second = desk.claim(), desk.claim()
    assert first is not None
    assert second is not None
    assert (first.uid, second.uid) == ("a", "b")
    assert (first.state, first.attempts) == (StudyState.INFERRING, 1)
    assert first.claimed_until == desk.now + timedelta(seconds=CLAIM_S)
    assert desk.claim() is None


def test_a_claim_that_is_over_is_taken_by_the_next(desk: Desk) -> None:
    reach(desk, StudyState.INFERRING)
    desk.later(seconds=CLAIM_S - 1)
    assert desk.claim() is None
    desk.later(seconds=1)
    again = desk.claim()
    assert again is not None
    assert again.attempts == 2


def claimed(desk: Desk) -> str:
    study = desk.claim()
    return study.uid if study else ""


def test_a_study_that_ends_its_replier_again_and_again_is_put_off_and_says_so(desk: Desk) -> None:
    """A crash every five minutes, day and night, would cost the others their answers."""
    desk.image("1")
    desk.later(seconds=QUIET_S)
    desk.complete()
    for _ in range(states.ABANDONED_MAX):
        assert claimed(desk) == "1"
        desk.later(seconds=CLAIM_S)
    desk.image("2")
    desk.later(seconds=QUIET_S)
    desk.complete()
    assert claimed(desk) == "2"
    assert desk.state("1") is StudyState.FAILED
    assert "replier ended" in desk.study("1").reason
    desk.later(hours=1)
    assert claimed(desk) == "1"


def test_a_clock_that_was_set_back_keeps_nothing_for_ever(desk: Desk) -> None:
    """The clock was years ahead while one study came in, one was claimed, one had failed and one was being sent."""
    for uid in ("sent", "claimed", "failed"):
        desk.image(uid)
        desk.later(seconds=QUIET_S)
        desk.complete()
        assert claimed(desk) == uid
        if uid == "sent":
            desk.put(uid)
            desk.open()
            assert desk.take() is not None
        if uid == "failed":
            desk.catalogue.studies.fail(uid, reason="odd", next_attempt_at=desk.now + timedelta(hours=1), now=desk.now)
    desk.image("received")
    desk.later(hours=-24 * 400)
    desk.complete()
    assert {claimed(desk), claimed(desk), claimed(desk)} == {"claimed", "failed", "received"}
    assert desk.take() is not None


def test_a_failed_study_is_tried_again_when_due(desk: Desk) -> None:
    reach(desk, StudyState.FAILED)
    assert desk.study().reason == "no memory"
    assert desk.claim() is None
    desk.later(minutes=1)
    again = desk.claim()
    assert again is not None
    assert (again.reason, again.next_attempt_at, again.attempts) == ("", None, 2)
    desk.catalogue.studies.fail("1", reason="for good", next_attempt_at=None, now=desk.now)
    desk.later(hours=1)
    assert desk.claim() is None


def test_a_study_waits_for_a_model_and_wakes(desk: Desk) -> None:
    reach(desk, StudyState.WAITING)
    assert desk.claim() is None
    assert desk.catalogue.studies.wake_waiting(desk.now) == 1
    assert desk.claim() is not None


def test_two_repliers_in_threads_claim_each_study_once(desk: Desk) -> None:
    for number in range(50):
        desk.image(str(number))
    desk.later(seconds=QUIET_S)
    desk.complete()
    claimed: list[str] = []

    def reply() -> None:
        while found := desk.claim():
            claimed.append(found.uid)

    threads = [threading.Thread(target=reply) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(str(number) for number in range(50))


def test_a_host_whose_clock_is_ahead_works_twice_and_answers_once(desk: Desk) -> None:
    """Deadlines are of the clock of who wrote them: beyond a claim's length another host takes it for abandoned."""
    desk.image()
    desk.later(seconds=QUIET_S)
    desk.complete()
    assert desk.claim() is not None
    ahead = Desk(desk.catalogue, desk.now + timedelta(seconds=CLAIM_S - 1))
    assert ahead.claim() is None
    ahead.later(seconds=2)
    assert ahead.claim() is not None
    assert ahead.put() == desk.put()
    desk.open()
    ahead.open()
    first = desk.take()
    ahead.later(seconds=CLAIM_S)
    second = ahead.take()
    assert first is not None
    assert second is not None
    assert first.id == second.id
    assert desk.send(first) == ahead.send(second)
    assert desk.state() is StudyState.DELIVERED
    assert [row.state for row in desk.catalogue.deliveries.list()] == [DeliveryState.SENT]


def test_two_repliers_in_processes_claim_and_deliver_each_study_once(desk: Desk, catalogue_url: str) -> None:
    for number in range(50):
        desk.image(str(number))
    desk.later(seconds=QUIET_S)
    desk.complete()
    program = (
        "from datetime import datetime\nfrom node.keep.catalogue import Catalogue\nfrom shelf import Desk\n"
        f"with Catalogue.open({catalogue_url!r}) as catalogue:\n"
        f"    desk = Desk(catalogue, datetime.fromisoformat({desk.now.isoformat()!r}))\n"
        "    while study := desk.claim():\n"
        "        desk.put(study.uid)\n"
        "        desk.open()\n"
        "        print('claimed', study.uid)\n"
        "    while delivery := desk.take():\n"
        "        desk.send(delivery)\n"
        "        print('sent', delivery.study_uid)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        for _ in range(2)
    ]
    told = [line for process in processes for line in process.communicate(timeout=120)[0].splitlines()]
    assert [process.returncode for process in processes] == [0, 0]
    uids = sorted(str(number) for number in range(50))
    assert sorted(line.split()[1] for line in told if line.startswith("claimed")) == uids
    assert sorted(line.split()[1] for line in told if line.startswith("sent")) == uids
    assert desk.catalogue.studies.by_state()[StudyState.DELIVERED] == 50


# --- results -------------------------------------------------------------------------------------------------------------------


def test_the_same_result_put_again_is_the_first_one(desk: Desk) -> None:
    reach(desk, StudyState.INFERRING)
    first = desk.put()
    desk.later(minutes=10)
    assert desk.put() == first
    assert desk.catalogue.results.of_study("1") == [first]
    assert (first.run, first.predecessor) == (1, None)
    assert desk.state() is StudyState.INFERRED


def test_a_study_answered_again_with_nothing_new_sends_nothing(desk: Desk) -> None:
    desk.image()
    result = desk.answer()
    (row,) = desk.catalogue.deliveries.list()
    desk.later(hours=100)
    desk.catalogue.studies.reopen("1", now=desk.now)
    assert desk.claim() is not None
    assert desk.put() == result
    assert desk.open() == 1
    assert desk.state() is StudyState.DELIVERED
    assert desk.catalogue.deliveries.list() == [row]


def test_a_study_asked_for_by_hand_is_sent_where_it_was_given_up(desk: Desk) -> None:
    desk.image("1")
    desk.later(seconds=QUIET_S)
    desk.complete()
    assert claimed(desk) == "1"
    desk.put("1", to=("main", "other"))
    desk.open()
    for _ in range(2):
        delivery = desk.take()
        assert delivery is not None
        if delivery.destination == "main":
            desk.send(delivery)
        else:
            desk.catalogue.deliveries.kill(delivery.id, reason="away for days", now=desk.now)
    desk.catalogue.studies.reopen("1", now=desk.now)
    assert claimed(desk) == "1"
    desk.put("1", to=("main", "other"))
    desk.open()
    delivery = desk.take()
    assert delivery is not None
    assert delivery.destination == "other"
    desk.send(delivery)
    assert desk.take() is None
    assert desk.state("1") is StudyState.DELIVERED


def test_another_model_asked_for_by_hand_gives_a_second_result_that_names_the_first(desk: Desk) -> None:
    desk.image()
    first = desk.answer(model="v1")
    desk.catalogue.studies.reopen("1", now=desk.now)
    second = desk.answer(model="v2")
    assert (second.run, second.predecessor) == (2, first.id)
    assert desk.catalogue.results.latest("1") == second
    desk.catalogue.studies.reopen("1", now=desk.now)
    assert desk.answer(model="v1") == first, "a rollback finds the old result again"
    assert len(desk.catalogue.deliveries.list()) == 2


def test_a_destination_that_is_new_gets_the_result_and_the_others_do_not_get_it_twice(desk: Desk) -> None:
    desk.image()
    result = desk.answer(to=[])
    assert desk.state() is StudyState.DELIVERED
    assert desk.catalogue.deliveries.list() == []
    for to in (["main"], ["main", "second"]):
        desk.catalogue.studies.reopen("1", now=desk.now)
        assert desk.answer(to=to) == result
        assert [row.destination for row in desk.catalogue.deliveries.list()] == to
        assert desk.state() is StudyState.DELIVERED


def test_a_result_without_destinations_is_delivered_even_when_answers_are_off(desk: Desk) -> None:
    reach(desk, StudyState.INFERRING)
    desk.put(to=[])
    assert desk.state() is StudyState.DELIVERED


def test_a_late_result_of_a_replier_that_was_given_up_changes_nothing(desk: Desk) -> None:
    reach(desk, StudyState.INFERRING)
    desk.later(seconds=CLAIM_S)
    desk.claim()
    first = desk.put()
    desk.open()
    delivery = desk.take()
    assert delivery is not None
    desk.send(delivery)
    assert desk.put() == first
    desk.catalogue.studies.fail("1", reason="late", next_attempt_at=desk.now, now=desk.now)
    desk.catalogue.studies.wait_for_model("1", now=desk.now)
    assert desk.state() is StudyState.DELIVERED


# --- by hand -------------------------------------------------------------------------------------------------------------------


def test_a_request_by_hand_for_an_unknown_study_is_not_found(desk: Desk) -> None:
    with pytest.raises(NotFound):
        desk.catalogue.studies.reopen("9", now=desk.now)
    assert desk.catalogue.history.acts() == []


def test_a_request_by_hand_while_delivering_waits_for_the_running_answer(desk: Desk) -> None:
    reach(desk, StudyState.DELIVERING)
    desk.catalogue.studies.reopen("1", now=desk.now)
    assert desk.state() is StudyState.DELIVERING
    delivery = desk.take()
    assert delivery is not None
    desk.send(delivery)
    assert desk.state() is StudyState.RECEIVING
    desk.answer(model="v2")
    assert len(desk.catalogue.results.of_study("1")) == 2


# --- for every sequence of events ----------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Images, time, repliers, PACS and people in any order: promises 5 and 6 hold."""

    STUDIES: ClassVar = ("a", "b")

    def __init__(self) -> None:
        super().__init__()
        self.place = ExitStack()
        self.catalogue = self.place.enter_context(Catalogue.open(self.url()))
        self.desk = Desk(self.catalogue)
        self.asked: set[str] = set()
        self.sent: list[tuple[str, str]] = []
        self.claimed: dict[str, str] = {}

    def url(self) -> str:
        """Give an empty place; in memory where there is one: order is asked here, and every commit would wait for the disk."""
        memory = "/dev/shm"  # noqa: S108 - a folder of its own is made there
        folder = tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)
        return f"sqlite:///{self.place.enter_context(folder)}/c.db"

    def teardown(self) -> None:
        self.place.close()

    studies = st.sampled_from(STUDIES)

    @initialize()
    def start(self) -> None:
        self.image("a", 1, ANSWER)
        self.image("b", 1, LEARN)

    @rule(study=studies, number=st.integers(1, 3), purpose=st.sampled_from([ANSWER, LEARN, LEARN]))
    def image(self, study: str, number: int, purpose: Purpose) -> None:
        self.desk.image(study, number, purpose=purpose)
        if purpose is ANSWER:
            self.asked.add(study)

    @rule(study=studies, purpose=st.sampled_from([ANSWER, LEARN]), reason=st.sampled_from([Hold.MODALITY, Hold.BURNED_IN]))
    def hold(self, study: str, purpose: Purpose, reason: Hold) -> None:
        self.desk.hold(study, 7, reason=reason, purpose=purpose)
        if purpose is ANSWER:
            self.asked.add(study)

    @rule(seconds=st.sampled_from([1.0, QUIET_S, QUIET_S, CLAIM_S, 3600 * WITHIN_H]))
    def time(self, seconds: float) -> None:
        self.desk.later(seconds=seconds)
        self.desk.complete()
        self.desk.expire()

    @rule()
    def claim(self) -> None:
        self.catalogue.studies.wake_waiting(self.desk.now)
        if found := self.desk.claim():
            assert found.uid in self.asked
            self.claimed[found.uid] = self.catalogue.studies.content(found.uid)

    @precondition(lambda self: self.claimed)
    @rule(data=st.data(), model=st.sampled_from(["v1", "v2"]), to=st.sampled_from([[], ["main"], ["main", "second"]]))
    def put(self, data: st.DataObject, model: str, to: list[str]) -> None:
        """A replier comes back with its result, perhaps long after its claim."""
        study = data.draw(st.sampled_from(sorted(self.claimed)))
        content = self.claimed[study]
        self.catalogue.results.put(
            study, findings(study, model), content_digest=content, settings_digest="s", destinations=to, now=self.desk.now
        )

    @precondition(lambda self: self.claimed)
    @rule(data=st.data(), wait=st.booleans())
    def give_back(self, data: st.DataObject, wait: bool) -> None:
        study = data.draw(st.sampled_from(sorted(self.claimed)))
        if wait:
            self.catalogue.studies.wait_for_model(study, now=self.desk.now)
        else:
            self.catalogue.studies.fail(study, reason="no memory", next_attempt_at=self.desk.now, now=self.desk.now)

    @rule(model=st.sampled_from(["v1", "v1", "v2"]))
    def reply(self, model: str) -> None:
        """Do at once what the rules before and after this one do singly, so that many sequences come as far as a delivery."""
        self.time(QUIET_S)
        if found := self.desk.claim():
            assert found.uid in self.asked
            self.desk.put(found.uid, model=model, to=["main", "second"])
        self.desk.open()

    @rule(answers_on=st.sampled_from([True, True, False]))
    def open(self, answers_on: bool) -> None:
        self.desk.open(answers_on=answers_on)

    @rule(outcome=st.sampled_from(["sent", "sent", "sent", "killed", "put off", "dead", "held"]))
    def deliver(self, outcome: str) -> None:
        row = self.desk.take()
        if row is None:
            return
        deliveries, now = self.catalogue.deliveries, self.desk.now
        if outcome == "sent":
            document = self.desk.send(row)
            self.sent.append((row.destination, document.sop_uid))
        elif outcome == "put off":
            deliveries.retry_at(row.id, reason="away", next_attempt_at=now, now=now)
        elif outcome == "dead":
            deliveries.kill(row.id, reason="away", now=now)
        elif outcome == "held":
            deliveries.hold(row.id, reason="other patient", now=now)

    @rule()
    def revive(self) -> None:
        self.catalogue.deliveries.revive(None, self.desk.now)

    @rule(study=studies)
    def by_hand(self, study: str) -> None:
        try:
            self.catalogue.studies.reopen(study, now=self.desk.now)
        except (NotFound, NotToBeAnswered):
            return
        assert study in self.asked

    @invariant()
    def only_what_was_asked_is_answered(self) -> None:
        for study in set(self.STUDIES) - self.asked:
            found = self.catalogue.studies.get(study)
            assert found is None or found.state in (StudyState.RECEIVING, StudyState.LEARNED, StudyState.QUARANTINED)
            assert self.catalogue.results.of_study(study) == []

    @invariant()
    def every_result_reaches_a_destination_once(self) -> None:
        assert len(set(self.sent)) == len(self.sent)
        rows = self.catalogue.deliveries.list()
        assert len({(row.result_id, row.destination) for row in rows}) == len(rows)

    @invariant()
    def delivered_means_that_everything_is_sent(self) -> None:
        rows = self.catalogue.deliveries.list()
        for study in self.STUDIES:
            found = self.catalogue.studies.get(study)
            states = {row.state for row in rows if row.study_uid == study}
            if found and found.state is StudyState.DELIVERED:
                assert states <= {DeliveryState.SENT}
            if found and found.state is StudyState.DELIVERING:
                assert states != {DeliveryState.SENT}, "nobody would ever move it"
                assert not found.late or DeliveryState.PENDING in states, "its late image would never be looked at"


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_any_order_on_postgresql(postgresql: Cluster) -> None:
    class OnPostgreSQL(AnyOrder):
        def url(self) -> str:
            return self.place.enter_context(postgresql.database(template=postgresql.catalogue_template()))

    run_state_machine_as_test(OnPostgreSQL, settings=settings(TestAnyOrder.settings, max_examples=6))


@pytest.mark.parametrize(
    ("state", "becomes"),
    [
        (StudyState.COMPLETE, StudyState.COMPLETE),
        (StudyState.INFERRING, StudyState.INFERRING),
        (StudyState.DELIVERING, StudyState.DELIVERING),
        (StudyState.DELIVERED, StudyState.RECEIVING),
        (StudyState.LEARNED, StudyState.LEARNED),
        (StudyState.EXPIRED, StudyState.EXPIRED),
    ],
)
def test_only_what_was_answered_or_is_being_is_answered_anew_for_another_patient(
    desk: Desk, state: StudyState, becomes: StudyState
) -> None:
    reach(desk, state)
    content = desk.catalogue.studies.content("1")
    desk.catalogue.studies.reassign("1", desk.study().pid, locked=False, named_by="", by="me", reason="x", now=desk.now)
    assert (desk.state(), desk.catalogue.studies.content("1")) == (state, content), "it is this patient's already"
    for patient in ("OST-OTHER", "OST-1", "OST-OTHER"):
        desk.catalogue.studies.reassign("1", patient, locked=False, named_by="", by="me", reason="x", now=desk.now)
        assert desk.state() is becomes
        assert desk.study().late is (state in (StudyState.INFERRING, StudyState.DELIVERING))
        assert desk.catalogue.studies.content("1") != content, "also for a patient whose it was before"
        content = desk.catalogue.studies.content("1")
