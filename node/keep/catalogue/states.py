"""The states of a study (docs/design.md, section 6): every change of one stands in this file.

In: a connection inside a write, and the time. Out: the study in its next state. Work is claimed by a conditional update whose
row count is believed, so that a kill between any two lines leaves a state from which the next claim goes on. Where several hosts
share the catalogue, a study's row is locked before what it has is looked at (FOR NO KEY UPDATE: images and deliveries that point
to it may still be entered, so that two receivers do not wait for each other). A study that was sent to be learned from must never
reach `complete`, the only door to an answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, func, or_, select, true, update

from node.errors import IdentityConflict, NotFound, NotToBeAnswered, StoreBusy
from node.keep.catalogue.patients import is_same_person
from node.keep.catalogue.schema import delivery, held, history, instance, result, study
from node.keep.database import insert_if_absent
from node.keep.records import DeliveryState, Hold, Purpose, StudyState

BEING_REMOVED = "being removed, as [storage.keep_days] says"
SENT_AGAIN = "sent again after it was removed"
"""Reason of a study in `receiving` whose results are known from before."""
SET_ASIDE = "unanswered when the backup of "
"""Begins the reason of a study of which a restored site does not know whether it was answered since."""
GIVEN = "study given to another patient"
"""In the history, under the study's UID: it was sent under a wrong patient."""
REFUSED_AFTER_REMOVAL = timedelta(minutes=10)
"""Longer than any instance is on its way between vault and catalogue."""
AT_REST = (
    StudyState.COMPLETE,
    StudyState.WAITING,
    StudyState.LEARNED,
    StudyState.EXPIRED,
    StudyState.FAILED,
    StudyState.QUARANTINED,
    StudyState.DELIVERED,
)
"""Nobody works on the study: a late image opens a new round at once."""
IN_WORK = (StudyState.INFERRING, StudyState.INFERRED, StudyState.DELIVERING)
"""A result is being made or sent: it is finished first, the late image follows."""
HELD_AS_CONTENT = (Hold.MODALITY, Hold.BURNED_IN, Hold.SECONDARY, Hold.DIGITISED)
"""Held instances that surely belong to their study; the other reasons doubt whose they are, or what."""
CLAIM_LOOK = 20
"""Candidates looked at in one claim: enough that another process cannot take them all from under it."""
FAR = timedelta(days=2)
"""The settings plan nothing so far ahead: what is planned beyond it was planned before the clock was set back, and is due."""
ABANDONED_MAX = 5
"""So many attempts, and a study that no replier came back with is put off: what ends the process must not end it all day."""
ABANDONED_WAIT = timedelta(hours=1)


def is_past(planned: ColumnElement[datetime | None], now: datetime) -> ColumnElement[bool]:
    """Say that a planned moment has come."""
    return or_(planned <= now, planned > now + FAR)


def change(
    connection: Connection, uid: str, state: StudyState, *, now: datetime, where: ColumnElement[bool], **also: Any
) -> bool:
    """Move the study to `state` where the condition still holds; say whether it did."""
    values = {"state": state, "state_at": now, "claimed_until": None, "next_attempt_at": None, "reason": ""} | also
    return connection.execute(update(study).where(study.c.uid == uid, where).values(values)).rowcount == 1


# --- images arrive -------------------------------------------------------------------------------------------------------------


def see(connection: Connection, uid: str, *, pid: str, purpose: Purpose, calling_ae: str, now: datetime) -> bool:
    """Make sure that the study has a row, in `receiving` when it is new; True when it is new.

    Raises
    ------
    IdentityConflict
        The study is another patient's.
    """
    new = insert_if_absent(
        connection,
        study,
        uid=uid,
        pid=pid,
        state=StudyState.RECEIVING,
        purpose=purpose,
        calling_ae=calling_ae,
        first_at=now,
        round_at=now,
        last_at=now,
        state_at=now,
        late=False,
        attempts=0,
        reason="",
    )
    if not new and pid:
        known = connection.scalar(select(study.c.pid).where(study.c.uid == uid).with_for_update(key_share=True))
        if not known:
            connection.execute(update(study).where(study.c.uid == uid).values(pid=pid))
        elif not is_same_person(connection, known, pid):
            raise IdentityConflict
    return new


def _refuse_while_removed(connection: Connection, uid: str, *, now: datetime) -> None:
    """Let nothing in while a study is removed, and shortly after: what began to come before would lose its identity."""
    going = or_(study.c.next_attempt_at.is_not(None), study.c.claimed_until > now)
    if connection.scalar(select(exists().where(study.c.uid == uid, study.c.state == StudyState.REMOVED, going))):
        raise StoreBusy("the study is being removed ([storage.keep_days]); send it again in some minutes")


def image_came(connection: Connection, uid: str, *, purpose: Purpose, calling_ae: str, now: datetime) -> None:
    """Take note that a study has an image more: the late rule.

    An image that was sent to be learned from never moves a study that was to be answered beyond `receiving`: filling the
    archive with old images re-answers nothing (promise 5).

    Raises
    ------
    StoreBusy
        The study is being removed; the sender tries again later.
    """
    known = select(study.c.state, study.c.purpose).where(study.c.uid == uid)
    row = connection.execute(known.with_for_update(key_share=True)).one()
    becomes_answer = purpose is Purpose.ANSWER and row.purpose != Purpose.ANSWER
    owner = {"purpose": purpose, "calling_ae": calling_ae} if becomes_answer else {}
    if becomes_answer and _has_results(connection, uid):  # answered, removed, and sent again to be learned from in between
        owner["reason"] = SENT_AGAIN
    if row.state == StudyState.RECEIVING:
        connection.execute(update(study).where(study.c.uid == uid).values(last_at=now, **owner))
    elif row.state == StudyState.REMOVED:
        _refuse_while_removed(connection, uid, now=now)
        afresh = {"purpose": purpose, "calling_ae": calling_ae, "last_at": now, "reason": SENT_AGAIN}
        _new_round(connection, uid, now=now, where=study.c.state == StudyState.REMOVED, **afresh)
    elif purpose is Purpose.LEARN and row.purpose == Purpose.ANSWER:
        return
    elif row.state in IN_WORK:
        connection.execute(update(study).where(study.c.uid == uid).values(last_at=now, late=True))
        if row.state == StudyState.DELIVERING:
            settle(connection, uid, now=now)
    else:
        _new_round(connection, uid, now=now, where=study.c.state.in_(AT_REST), last_at=now, **owner)


def image_came_again(connection: Connection, uid: str, *, purpose: Purpose, calling_ae: str, now: datetime) -> None:
    """Take note that a known image was sent again: only a study that so far was to be learned from is moved by it."""
    _refuse_while_removed(connection, uid, now=now)
    known = connection.scalar(select(study.c.purpose).where(study.c.uid == uid))
    if purpose is Purpose.ANSWER and known == Purpose.LEARN:
        image_came(connection, uid, purpose=purpose, calling_ae=calling_ae, now=now)


def given(connection: Connection, uid: str, *, now: datetime) -> None:
    """Let a study that was answered, or is being, be answered for the patient whose it is now: as by a late image."""
    known = select(study.c.state, study.c.purpose, study.c.calling_ae).where(study.c.uid == uid)
    row = connection.execute(known.with_for_update(key_share=True)).one_or_none()
    if row is None or row.purpose != Purpose.ANSWER or row.state == StudyState.REMOVED:
        return
    if row.state in IN_WORK or connection.scalar(select(exists().where(result.c.study_uid == uid))):
        image_came(connection, uid, purpose=Purpose.ANSWER, calling_ae=row.calling_ae, now=now)


def _new_round(connection: Connection, uid: str, *, now: datetime, where: ColumnElement[bool], **also: Any) -> bool:
    return change(connection, uid, StudyState.RECEIVING, now=now, where=where, round_at=now, late=False, attempts=0, **also)


# --- time passes ---------------------------------------------------------------------------------------------------------------


def is_due_to_complete(*, quiet_s: float, max_wait_s: float, now: datetime) -> ColumnElement[bool]:
    """Quiet for long enough, or waited for long enough since the first image of this round.

    A round that began later than now by more than the longest wait began before the clock was set back: it is over.
    """
    quiet, longest = timedelta(seconds=quiet_s), timedelta(seconds=max_wait_s)
    waited = or_(study.c.round_at <= now - longest, study.c.round_at > now + longest)
    return and_(study.c.state == StudyState.RECEIVING, or_(study.c.last_at <= now - quiet, waited))


def complete(connection: Connection, due: ColumnElement[bool], *, now: datetime) -> list[tuple[str, StudyState]]:
    """Move every due study on, to `complete`, `learned` or `quarantined`, and give each with its new state."""
    moved = []
    quiet = select(study.c.uid, study.c.purpose, study.c.reason).where(due)
    # Locked before it is looked at, or an image that is entered at this moment is neither seen here nor late; that study's
    # receiver, or another replier, has it now, and it is due again in a moment.
    for row in connection.execute(quiet.with_for_update(key_share=True, skip_locked=True)).all():
        holds, is_answer = _holds(connection, row.uid), row.purpose == Purpose.ANSWER
        if is_answer and row.reason == SENT_AGAIN and _was_answered(connection, row.uid):
            state, reason = StudyState.DELIVERED, ""  # as if it had never been away: another model re-answers nothing
        elif _has_images(connection, row.uid) or (is_answer and holds == [Hold.MODALITY]):
            state, reason = StudyState.COMPLETE if is_answer else StudyState.LEARNED, ""
        else:
            state, reason = StudyState.QUARANTINED, "every image is in the quarantine: " + (", ".join(holds) or "discarded")
        if change(connection, row.uid, state, now=now, where=and_(due, study.c.purpose == row.purpose), reason=reason):
            moved.append((row.uid, state))
    return moved


def is_due_to_remove(keep: Mapping[Purpose, timedelta], *, now: datetime) -> ColumnElement[bool]:
    """Answered, expired or learned, longer ago than it is to be kept; nothing of it is on its way or may be wanted again.

    Its newest image is as old: one to learn from does not move an answered study, and is kept for as long as any other.
    """
    wanted = delivery.c.state != DeliveryState.SENT
    ends = {Purpose.ANSWER: (StudyState.DELIVERED, StudyState.EXPIRED), Purpose.LEARN: (StudyState.LEARNED,)}
    emptied = and_(study.c.state == StudyState.QUARANTINED, ~exists().where(held.c.study_uid == study.c.uid))
    over = [
        and_(
            *(study.c.purpose == purpose, study.c.last_at < now - limit, or_(study.c.state.in_(ends[purpose]), emptied)),
            ~exists().where(instance.c.study_uid == study.c.uid, instance.c.received_at >= now - limit),
        )
        for purpose, limit in keep.items()
    ]
    return and_(or_(*over), ~exists().where(delivery.c.study_uid == study.c.uid, wanted))


def take_for_removal(connection: Connection, due: ColumnElement[bool] | None, *, now: datetime, limit: int) -> list[str]:
    """Mark studies that are due as `removed`, and give them with those whose removal was cut short."""
    cut_short = and_(study.c.state == StudyState.REMOVED, study.c.next_attempt_at.is_not(None))
    again = list(connection.scalars(select(study.c.uid).where(cut_short).limit(limit)))
    if due is None:
        return again
    # Locked before it is looked at once more: an image that is entered at this moment keeps its study.
    these = select(study.c.uid).where(due).order_by(study.c.last_at).limit(limit - len(again))
    oldest = connection.scalars(these.with_for_update(key_share=True, skip_locked=True)).all()
    mark = {"next_attempt_at": now, "reason": BEING_REMOVED}
    return again + [uid for uid in oldest if change(connection, uid, StudyState.REMOVED, now=now, where=due, **mark)]


def removed(connection: Connection, uid: str, *, now: datetime) -> None:
    """Take the rows of a study's images out, and let it in again after a while."""
    connection.execute(delete(instance).where(instance.c.study_uid == uid))
    until = {"claimed_until": now + REFUSED_AFTER_REMOVAL, "reason": f"removed on {now:%Y-%m-%d}, as [storage.keep_days] says"}
    change(connection, uid, StudyState.REMOVED, now=now, where=study.c.state == StudyState.REMOVED, **until)


def is_due_to_expire(*, answer_within_h: float, now: datetime) -> ColumnElement[bool]:
    """Unanswered for too long since the last image or request, and in nobody's hands."""
    idle = (StudyState.COMPLETE, StudyState.WAITING, StudyState.INFERRED, StudyState.FAILED)
    abandoned = and_(study.c.state == StudyState.INFERRING, is_past(study.c.claimed_until, now))
    return and_(study.c.last_at < now - timedelta(hours=answer_within_h), or_(study.c.state.in_(idle), abandoned))


def expire(connection: Connection, due: ColumnElement[bool], *, now: datetime) -> list[str]:
    """Give up answering what is too old, and name it; only a person's request starts it again."""
    uids = connection.scalars(select(study.c.uid).where(due)).all()
    reason = "not answered in time: `osteon reply study` answers it by hand"
    return [uid for uid in uids if change(connection, uid, StudyState.EXPIRED, now=now, where=due, reason=reason)]


def set_aside(connection: Connection, *, made_at: datetime, now: datetime) -> int:
    """Leave what had no result when the backup was made to a person: it may have been answered since.

    A result that stands leaves first: a study that had an image more than it was answered for expires after that.
    """
    reason = f"{SET_ASIDE}{made_at:%Y-%m-%d %H:%M} UTC was made, maybe answered since: `osteon reply study` answers it by hand"
    unanswered = (StudyState.RECEIVING, StudyState.COMPLETE, StudyState.INFERRING, StudyState.WAITING, StudyState.FAILED)
    these = and_(study.c.purpose == Purpose.ANSWER, study.c.state.in_(unanswered))
    uids = connection.scalars(select(study.c.uid).where(these)).all()
    more_came = and_(study.c.late, study.c.state.in_((StudyState.INFERRED, StudyState.DELIVERING)))
    connection.execute(update(study).where(more_came).values(late=False, reason=reason))
    aside = {"reason": reason, "late": False}
    return sum(change(connection, uid, StudyState.EXPIRED, now=now, where=these, **aside) for uid in uids)


# --- a replier works -----------------------------------------------------------------------------------------------------------


def is_claimable(now: datetime) -> ColumnElement[bool]:
    """Complete, or failed and due again, or claimed by a replier that did not come back."""
    return and_(
        study.c.purpose == Purpose.ANSWER,
        or_(
            study.c.state == StudyState.COMPLETE,
            and_(study.c.state == StudyState.FAILED, is_past(study.c.next_attempt_at, now)),
            and_(study.c.state == StudyState.INFERRING, is_past(study.c.claimed_until, now)),
        ),
    )


def claim(connection: Connection, *, claim_s: float, now: datetime) -> str | None:
    """Take the oldest claimable study for `claim_s` seconds; None when there is none."""
    free = is_claimable(now)
    oldest = select(study.c.uid, study.c.state, study.c.attempts).where(free).order_by(study.c.last_at, study.c.uid)
    for row in connection.execute(oldest.limit(CLAIM_LOOK).with_for_update(key_share=True, skip_locked=True)).all():
        uid: str = row.uid
        if row.state == StudyState.INFERRING and row.attempts >= ABANDONED_MAX:
            reason = f"a replier ended while it classified this study (attempt {row.attempts})"
            stop_inferring(connection, uid, StudyState.FAILED, now=now, reason=reason, next_attempt_at=now + ABANDONED_WAIT)
            continue
        # what came before this moment is looked at now, so it is not late any more
        if change(
            connection,
            uid,
            StudyState.INFERRING,
            now=now,
            where=free,
            claimed_until=now + timedelta(seconds=claim_s),
            attempts=study.c.attempts + 1,
            late=False,
        ):
            return uid
    return None


def stop_inferring(
    connection: Connection,
    uid: str,
    state: StudyState,
    *,
    now: datetime,
    reason: str = "",
    next_attempt_at: datetime | None = None,
) -> None:
    """Give a claimed study back without a result, as `waiting` or `failed`; a late image opens a new round instead."""
    claimed = study.c.state == StudyState.INFERRING
    if connection.scalar(select(study.c.late).where(study.c.uid == uid, claimed).with_for_update(key_share=True)):
        _new_round(connection, uid, now=now, where=claimed)
    else:
        change(connection, uid, state, now=now, where=claimed, reason=reason, next_attempt_at=next_attempt_at)


def classified(connection: Connection, uid: str, result_id: int, *, now: datetime) -> None:
    """Move a claimed study that has its result to `inferred`, or to the end when there is nothing to send."""
    claimed = study.c.state == StudyState.INFERRING
    if change(connection, uid, StudyState.INFERRED, now=now, where=claimed, result_id=result_id, attempts=0) and (
        connection.scalar(select(result.c.destinations).where(result.c.id == result_id)) == "[]"
    ):
        deliver(connection, uid, now=now)


def reopen(connection: Connection, uid: str, *, now: datetime) -> None:
    """Queue a study for an answer because a person asks; its age starts again.

    Raises
    ------
    NotFound
        No such study.
    NotToBeAnswered
        It was sent to be learned from, or there is no image outside the quarantine.
    """
    known = select(study.c.state, study.c.purpose).where(study.c.uid == uid)
    row = connection.execute(known.with_for_update(key_share=True)).one_or_none()
    if row is None:
        raise NotFound
    if row.purpose != Purpose.ANSWER:
        raise NotToBeAnswered
    if row.state == StudyState.REMOVED:
        raise NotToBeAnswered("its images were removed, as [storage.keep_days] says: send it again")
    if not _has_images(connection, uid) and _holds(connection, uid) != [Hold.MODALITY]:
        raise NotToBeAnswered("every image of this study is in the quarantine: see `osteon quarantine list`")
    connection.execute(update(study).where(study.c.uid == uid).values(last_at=now))
    if row.state == StudyState.DELIVERING and _has_deliveries(connection, uid, [DeliveryState.PENDING]):
        connection.execute(update(study).where(study.c.uid == uid).values(late=True))  # the running answer first
    elif row.state not in (StudyState.INFERRING, StudyState.INFERRED):
        change(connection, uid, StudyState.COMPLETE, now=now, where=true(), attempts=0, late=False)


# --- a result leaves -----------------------------------------------------------------------------------------------------------


def deliver(connection: Connection, uid: str, *, now: datetime) -> None:
    """Move an inferred study, whose delivery rows are written, to `delivering`; further when nothing is left to send."""
    inferred = and_(study.c.state == StudyState.INFERRED, study.c.purpose == Purpose.ANSWER)
    if change(connection, uid, StudyState.DELIVERING, now=now, where=inferred, reason=study.c.reason):  # of `set_aside`
        settle(connection, uid, now=now)


def settle(connection: Connection, uid: str, *, now: datetime) -> None:
    """See whether a delivering study is through: all sent and nothing late, or late and nothing on its way any more.

    One that was set aside is through as well, but not answered in full: a person asks for the rest.
    """
    delivering = study.c.state == StudyState.DELIVERING
    late = connection.scalar(select(study.c.late).where(study.c.uid == uid, delivering).with_for_update(key_share=True))
    if late and not _has_deliveries(connection, uid, [DeliveryState.PENDING]):
        # also with a dead or held row: a destination that cannot be reached must not keep a new image from the others
        _new_round(connection, uid, now=now, where=delivering)
    elif late is False and not _has_deliveries(connection, uid, [s for s in DeliveryState if s is not DeliveryState.SENT]):
        through, aside = and_(delivering, study.c.late.is_(False)), study.c.reason.startswith(SET_ASIDE)
        if not change(connection, uid, StudyState.EXPIRED, now=now, where=and_(through, aside), reason=study.c.reason):
            change(connection, uid, StudyState.DELIVERED, now=now, where=through)


# --- what a study has ----------------------------------------------------------------------------------------------------------


def _has_images(connection: Connection, uid: str) -> bool:
    return bool(connection.scalar(select(exists().where(instance.c.study_uid == uid))))


def _holds(connection: Connection, uid: str) -> list[str]:
    """Reasons for which instances of the study are in the quarantine, each once, sorted."""
    return sorted(connection.scalars(select(held.c.reason).distinct().where(held.c.study_uid == uid)))


def content(connection: Connection, uid: str) -> str:
    """Digest what the study consists of; see `Studies.content`."""
    belongs = held.c.reason.in_(HELD_AS_CONTENT), held.c.sop_uid != ""
    uids = set(connection.scalars(select(instance.c.sop_uid).where(instance.c.study_uid == uid)))
    uids |= set(connection.scalars(select(held.c.sop_uid).where(held.c.study_uid == uid, *belongs)))
    # results of studies that stayed with their patient keep the digest they have always had
    times = connection.scalar(select(func.count()).where(history.c.subject == uid, history.c.what == GIVEN))
    told = [*sorted(uids), *([f"given {times}"] if times else [])]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _has_results(connection: Connection, uid: str) -> bool:
    return bool(connection.scalar(select(exists().where(result.c.study_uid == uid))))


def _was_answered(connection: Connection, uid: str) -> bool:
    """Say whether a destination has a result of exactly these images."""
    its = and_(delivery.c.result_id == result.c.id, delivery.c.state == DeliveryState.SENT)
    same = result.c.study_uid == uid, result.c.content_digest == content(connection, uid)
    return bool(connection.scalar(select(exists().where(*same, its))))


def _has_deliveries(connection: Connection, uid: str, states: Sequence[DeliveryState]) -> bool:
    return bool(connection.scalar(select(exists().where(delivery.c.study_uid == uid, delivery.c.state.in_(states)))))
