"""Runs get a queue, schedules a memory. Runs of release 0.1.0 stay listed, with their folders and decisions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from node.keep.database import UTCTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table of runs anew around its old rows, and the table of timings."""
    op.rename_table("run", "run_0001")
    if op.get_bind().dialect.name == "postgresql":  # names of indexes are the schema's there, not the table's
        op.execute("ALTER TABLE run_0001 RENAME CONSTRAINT pk_run TO pk_run_0001")
        op.execute("ALTER SEQUENCE run_id_seq RENAME TO run_0001_id_seq")
    op.create_table(
        "run",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("recipe", sa.String(length=64), nullable=False),
        sa.Column("schedule", sa.String(length=64), nullable=False),
        sa.Column("origin", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("state_at", UTCTime(), nullable=False),
        sa.Column("due_at", UTCTime(), nullable=True),
        sa.Column("folder", sa.Text(), nullable=False),
        sa.Column("started_at", UTCTime(), nullable=True),
        sa.Column("finished_at", UTCTime(), nullable=True),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", UTCTime(), nullable=True),
        sa.Column("devices", sa.String(length=320), nullable=True),
        sa.Column("leased_until", UTCTime(), nullable=True),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=True),
        sa.Column("born", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("model_id", sa.String(length=128), nullable=False),
        sa.Column("decision", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run")),
        sa.UniqueConstraint("devices", name=op.f("uq_run_devices")),
        sa.UniqueConstraint("schedule", "kind", "due_at", name=op.f("uq_run_schedule_kind_due_at")),
    )
    op.create_index(op.f("ix_run_state_due_at"), "run", ["state", "due_at"], unique=False)
    op.execute(
        "INSERT INTO run (id, kind, folder, started_at, finished_at, model_id, decision, "
        "recipe, schedule, origin, state, state_at, tries, losses, host, born, reason) "
        "SELECT id, kind, folder, started_at, finished_at, model_id, decision, '', '', 'terminal', "
        "CASE WHEN finished_at IS NULL THEN 'interrupted' WHEN outcome LIKE 'failed%' THEN 'failed' "
        "WHEN outcome = 'interrupted' THEN 'interrupted' ELSE 'done' END, "
        "COALESCE(finished_at, started_at), 0, 0, '', '', "
        "CASE WHEN outcome LIKE 'failed: %' THEN SUBSTR(outcome, 9) ELSE '' END FROM run_0001"
    )
    op.drop_table("run_0001")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("SELECT setval('run_id_seq', (SELECT COALESCE(MAX(id), 0) + 1 FROM run), false)")
    op.create_table(
        "timing",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("definition", sa.Text(), nullable=False),
        sa.Column("since", UTCTime(), nullable=False),
        sa.Column("considered_at", UTCTime(), nullable=False),
        sa.Column("next_at", UTCTime(), nullable=True),
        sa.Column("zone", sa.String(length=64), nullable=False),
        sa.Column("said", sa.Text(), nullable=False),
        sa.Column("said_at", UTCTime(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_timing")),
    )
