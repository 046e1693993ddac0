"""The tables of the catalogue. Pseudonyms, states, times and digests stand here; an identity never does.

A change here needs a revision in `migrations/versions` (a test compares the two) and its name in `HEAD`. Times are whole
microseconds (`UTCTime`), states the words of `node.keep.records`, "" means unknown in texts.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Boolean, Column, ForeignKey, Index, Integer, MetaData, String, Table, Text, UniqueConstraint

from node.keep.database import UTCTime

HEAD = "0003"
MIGRATIONS = Path(__file__).parent / "migrations"

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

patient = Table(
    "patient",
    metadata,
    Column("pid", String(64), primary_key=True),
    Column("locked", Boolean, nullable=False),
    Column("first_at", UTCTime, nullable=False),
    Column("person", String(64), nullable=False, server_default=""),
    Index(None, "person"),
)
"""Every patient seen in the archive or named in a merge; `locked` is fixed at first sight and changed by a merge alone
(promise 10), `person` is the pseudonym under which the patient counts: the own one until a merge."""

study = Table(
    "study",
    metadata,
    Column("uid", String(64), primary_key=True),
    Column("pid", String(64), nullable=False),  # "" until an instance tells it: no reference, the patient may follow later
    Column("state", String(16), nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("calling_ae", String(16), nullable=False),
    Column("first_at", UTCTime, nullable=False),
    Column("round_at", UTCTime, nullable=False),
    Column("last_at", UTCTime, nullable=False),
    Column("state_at", UTCTime, nullable=False),
    Column("late", Boolean, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_attempt_at", UTCTime),
    Column("claimed_until", UTCTime),
    Column("reason", Text, nullable=False),
    Column("result_id", Integer),
    Index(None, "state", "last_at"),
    Index(None, "pid"),
)
"""One row a study and its state; `round_at` is the first image since it was last complete, `result_id` its newest result."""

instance = Table(
    "instance",
    metadata,
    Column("sop_uid", String(64), primary_key=True),
    Column("series_uid", String(64), nullable=False),
    Column("study_uid", String(64), ForeignKey("study.uid"), nullable=False),
    Column("pid", String(64), ForeignKey("patient.pid"), nullable=False),
    Column("sop_class_uid", String(64), nullable=False),
    Column("transfer_syntax_uid", String(64), nullable=False),
    Column("path", Text, nullable=False),
    Column("header_digest", String(64), nullable=False),
    Column("pixel_digest", String(64), nullable=False),
    Column("modality", String(16), nullable=False),
    Column("body_part", String(64), nullable=False),
    Column("age_years", Integer),
    Column("sex", String(16), nullable=False),
    Column("device", String(64), nullable=False),
    Column("accession_key", String(64), nullable=False),
    Column("study_id_key", String(64), nullable=False),
    Column("pixels_checked", Boolean, nullable=False),
    Column("received_at", UTCTime, nullable=False),
    Column("seen_at", UTCTime, nullable=False),
    Index(None, "study_uid"),
    Index(None, "series_uid"),
    Index(None, "pid"),
    Index(None, "accession_key"),
    Index(None, "study_id_key"),
)
"""One row an image of the archive; `seen_at` moves when the PACS sends it again."""

held = Table(
    "held",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("reason", String(64), nullable=False),
    Column("detail", Text, nullable=False),
    Column("modality", String(16), nullable=False),
    Column("sop_class_uid", String(64), nullable=False),
    Column("study_uid", String(64), nullable=False),
    Column("sop_uid", String(64), nullable=False),
    Column("pid", String(64), nullable=False),
    Column("calling_ae", String(16), nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("held_at", UTCTime, nullable=False),
    Index(None, "study_uid"),
    Index(None, "sop_uid"),
)
"""One row a sealed file of the quarantine: what may be said of it in clear. Study and UIDs may be unknown."""

dropped_term = Table(
    "dropped_term",
    metadata,
    Column("keyword", String(64), primary_key=True),
    Column("term", String(64), primary_key=True),
    Column("count", Integer, nullable=False),
    Column("first_at", UTCTime, nullable=False),
    Column("last_at", UTCTime, nullable=False),
)
"""How often a word outside the vocabulary was dropped; `term` is its keyed hash, the word itself is kept nowhere."""

result = Table(
    "result",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("study_uid", String(64), ForeignKey("study.uid"), nullable=False),
    Column("model_id", String(128), nullable=False),
    Column("content_digest", String(64), nullable=False),
    Column("settings_digest", String(64), nullable=False),
    Column("findings", Text, nullable=False),
    Column("created_at", UTCTime, nullable=False),
    Column("run", Integer, nullable=False),
    Column("predecessor", Integer, ForeignKey("result.id")),
    Column("destinations", Text, nullable=False),
    UniqueConstraint("study_uid", "content_digest", "model_id", "settings_digest", name="uq_result_same"),
    UniqueConstraint("study_uid", "run"),
)
"""Findings as first written, one row a (study content, model, settings); `destinations` is a JSON list of names."""

delivery = Table(
    "delivery",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("result_id", Integer, ForeignKey("result.id"), nullable=False),
    Column("study_uid", String(64), ForeignKey("study.uid"), nullable=False),
    Column("destination", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("created_at", UTCTime, nullable=False),
    Column("next_attempt_at", UTCTime),
    Column("claimed_until", UTCTime),
    Column("tried_at", UTCTime),
    Column("reason", Text, nullable=False),
    Column("edition", Integer, nullable=False),
    Column("sent_at", UTCTime),
    UniqueConstraint("result_id", "destination"),
    Index(None, "state", "next_attempt_at"),
    Index(None, "study_uid"),
)
"""One row a result and destination; `edition` counts the rebuilt documents that differed from the one noted before."""

document = Table(
    "document",
    metadata,
    Column("delivery_id", Integer, ForeignKey("delivery.id"), primary_key=True),
    Column("edition", Integer, primary_key=True),
    Column("sop_class_uid", String(64), nullable=False),
    Column("sop_uid", String(64), nullable=False),
    Column("series_uid", String(64), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("stamped_at", UTCTime, nullable=False),
    Index(None, "sop_uid"),
)
"""Every SR that was sent or may have been: noted before its first byte leaves, never removed (promises 6 and 7)."""

label = Table(
    "label",
    metadata,
    Column("study_uid", String(64), ForeignKey("study.uid"), primary_key=True),
    Column("sop_uid", String(64), primary_key=True),
    Column("reader", String(64), primary_key=True),
    Column("pid", String(64), nullable=False),
    Column("label", String(64), nullable=False),
    Column("labelled_on", String(10), nullable=False),
    Column("confirmed_by", String(16), nullable=False),
    Column("first_treatment_on", String(10), nullable=False),
    Column("imported_at", UTCTime, nullable=False),
)
"""What one reader says of one study (`sop_uid` empty) or image (promise 14)."""

run = Table(
    "run",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", String(64), nullable=False),
    Column("recipe", String(64), nullable=False),
    Column("schedule", String(64), nullable=False),
    Column("origin", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("state_at", UTCTime, nullable=False),
    Column("due_at", UTCTime),
    Column("folder", Text, nullable=False),
    Column("started_at", UTCTime),
    Column("finished_at", UTCTime),
    Column("tries", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("next_attempt_at", UTCTime),
    Column("devices", String(320)),
    Column("leased_until", UTCTime),
    Column("host", String(255), nullable=False),
    Column("pid", Integer),
    Column("born", String(64), nullable=False),
    Column("reason", Text, nullable=False),
    Column("model_id", String(128), nullable=False),
    Column("decision", String(64), nullable=False),
    UniqueConstraint("schedule", "kind", "due_at"),
    UniqueConstraint("devices"),
    Index(None, "state", "due_at"),
)
"""Training runs and their queue; what they made stands in their folder. `devices` is set while a run occupies them: no two do."""

timing = Table(
    "timing",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("definition", Text, nullable=False),
    Column("since", UTCTime, nullable=False),
    Column("considered_at", UTCTime, nullable=False),
    Column("next_at", UTCTime),
    Column("zone", String(64), nullable=False),
    Column("said", Text, nullable=False),
    Column("said_at", UTCTime),
)
"""One row a schedule that a scheduler has seen: how far its due times have been dealt with, and what comes next."""

role = Table(
    "role",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("host", String(255), primary_key=True),
    Column("pid", Integer, primary_key=True),
    Column("seen_at", UTCTime, nullable=False),
    Column("told", Text, nullable=False),
)
"""The last sign of life of each process; `told` is a JSON object."""

flag = Table(
    "flag",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", String(64), nullable=False),
)
"""Switches that a person sets while the node runs (answers: on | paused), and the site key's fingerprint."""

history = Table(
    "history",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UTCTime, nullable=False),
    Column("by", String(64), nullable=False),
    Column("what", String(64), nullable=False),
    Column("subject", String(128), nullable=False),
    Column("reason", Text, nullable=False),
    Index(None, "subject"),
)
"""What people did, and why: append only."""
