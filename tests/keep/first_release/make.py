"""Made the stored site of release 0.1.0 that stands beside this file; it is run with the code of that release, never again.

    git archive <commit of 0.1.0> | tar -x -C /tmp/first
    PYTHONPATH=/tmp/first:/tmp/first/tests python make.py FOLDER [CATALOGUE_URL VAULT_URL]

Every patient in it is invented by tests/studies.py. A study of each state has its state for its UID; the keys are those of
`SITE_KEY` and `VAULT_KEY`. The PostgreSQL dumps are `pg_dump --no-owner` of the two databases that it filled.
"""

from __future__ import annotations

import base64
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from roles import hand_in
from shelf import Desk
from studies import image, study

import node
from node import settings
from node.commands.init import init_site
from node.keep.records import Hold, Label, Purpose, Role
from node.receive import intake as intake_room
from node.receive.intake import Intake

SITE_KEY, VAULT_KEY = bytes(range(32)), bytes(range(1, 33))
BEGAN = datetime(2026, 3, 1, 12, tzinfo=UTC)


def make(folder: Path, **urls: str) -> None:
    """Fill the stores of a new site in `folder`, or those behind `urls`."""
    assert node.__version__ == "0.1.0"
    callers = [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "purpose": "answer"}]
    config = init_site(folder, node={"callers": callers}, storage=urls)
    for name, key in (("site", SITE_KEY), ("vault", VAULT_KEY)):
        (folder / "keys" / f"{name}.key").chmod(0o600)
        (folder / "keys" / f"{name}.key").write_bytes(base64.b64encode(key) + b"\n")
    intake = Intake.open(settings.load(config))
    desk = Desk(intake.catalogue, BEGAN)
    intake_room._now = lambda: desk.now
    try:
        _fill(desk)
        _receive(intake, desk)
    finally:
        intake.close()


def _receive(intake: Intake, desk: Desk) -> None:
    """Take in real images: two of one patient, one whose name is corrected, one that is held."""
    desk.later(minutes=1)
    for one in (*study(patient=1, images=2), image(patient=2), image(patient=3, BurnedInAnnotation="YES")):
        hand_in(intake, one)
    hand_in(intake, image(patient=2, PatientName="Corrected^Patient2"))


def _fill(desk: Desk) -> None:
    """Bring a study into every state, and every other table to some rows."""
    desk.image("expired")
    desk.later(hours=80)
    desk.complete()
    assert desk.expire() == 1

    desk.image("learned", purpose=Purpose.LEARN, locked=True)
    desk.image("delivered")
    desk.image("delivered", 2)
    desk.answer("delivered", to=("main", "second"))
    desk.image("revised")
    desk.answer("revised")
    desk.image("revised", 2)
    desk.answer("revised", model="v2")
    desk.hold("quarantined", reason=Hold.PATIENT_CONFLICT, pid="")
    desk.hold("modality", reason=Hold.MODALITY)
    desk.answer("modality")

    for name in ("waiting", "failed", "put off", "delivering", "late", "stuck", "inferred", "inferring"):
        desk.image(name)
        desk.later(minutes=3)
        desk.complete()
        claimed = desk.claim()
        assert claimed is not None
        assert claimed.uid == name
        if name == "waiting":
            desk.catalogue.studies.wait_for_model(name, now=desk.now)
        elif name == "failed":
            desk.catalogue.studies.fail(name, reason="no decoder", next_attempt_at=None, now=desk.now)
        elif name == "put off":
            desk.catalogue.studies.fail(name, reason="busy", next_attempt_at=desk.now + timedelta(hours=2), now=desk.now)
        elif name != "inferring":
            desk.put(name, to=("main", "second"))
        if name in ("delivering", "late", "stuck"):
            desk.open()
            first, second = desk.catalogue.deliveries.of_study(name)
            if name == "stuck":
                desk.catalogue.deliveries.hold(first.id, "the PACS names another patient", now=desk.now)
                desk.catalogue.deliveries.kill(second.id, "refused", now=desk.now)
            else:
                desk.send(first)
                desk.catalogue.deliveries.retry_at(
                    second.id, reason="away", next_attempt_at=desk.now + timedelta(minutes=30), now=desk.now
                )
        if name == "late":
            desk.image("late", 2)
    _note(desk)
    desk.later(minutes=3)
    desk.image("complete")
    desk.later(minutes=3)
    desk.complete()
    desk.image("receiving", locked=True)


def _note(desk: Desk) -> None:
    """Write what people and processes write."""
    catalogue, now = desk.catalogue, desk.now
    one = Label("OST-delivered", "delivered", "", "ewing", "reader-1", "2026-03-02", "histology", "2026-03-05")
    two = Label("OST-learned", "learned", "learned.9.1", "osteomyelitis", "reader-1", "2026-03-02", "culture")
    catalogue.labels.put_all([one, two], now=now, by="operator")
    later = Label("OST-learned", "learned", "learned.9.1", "ewing", "reader-1", "2026-03-03", "histology")
    catalogue.labels.put_all([later], now=now, by="operator")
    run = catalogue.runs.add("fine-tune", "runs/1", now)
    catalogue.runs.finish(run, outcome="done", model_id="v2", decision="insufficient evidence", now=now + timedelta(hours=1))
    catalogue.runs.add("fine-tune", "runs/2", now + timedelta(hours=2))
    catalogue.roles.set_flag("answers", "paused", by="operator", reason="a test of the PACS", now=now)
    catalogue.roles.beat(Role("reply", "host-1", 4242, now, {"model": "v2", "answers": "off"}))
    catalogue.instances.dropped([("BodyPartExamined", "hash-1"), ("ViewPosition", "hash-2")], now)
    catalogue.instances.dropped([("BodyPartExamined", "hash-1")], now)
    desk.hold("quarantined", 2, Hold.DIGITISED)
    catalogue.instances.unhold(
        f"held-quarantined-2-{Hold.DIGITISED.name}", by="operator", reason="a scan", decision="discarded", now=now
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]), **dict(zip(("catalogue", "vault"), sys.argv[2:], strict=False)))
