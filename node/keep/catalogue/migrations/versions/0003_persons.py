"""The person to whom a patient's pseudonym belongs: patients whom the hospital merged are one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; so far everybody is a person alone."""
    op.add_column("patient", sa.Column("person", sa.String(length=64), nullable=False, server_default=""))
    op.execute("UPDATE patient SET person = pid")
    op.create_index(op.f("ix_patient_person"), "patient", ["person"], unique=False)
