"""Run by Alembic: upgrades the database behind the connection that `node.keep.database` hands over, in its transaction."""

from __future__ import annotations

from alembic import context

from node.keep.catalogue.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
