"""Runs migrations on the connection that storage.database.migrate passes, or for the alembic command on its own.

Batch mode, because SQLite cannot alter a table: it is rebuilt, with foreign keys off (see `migrate`).
"""

from alembic import context
from sqlalchemy import Connection

from app.core.settings import load_settings
from app.core.storage import tables
from app.core.storage.database import migration_engine


def _run(connection: Connection) -> None:
    context.configure(
        connection=connection, target_metadata=tables.TableRow.metadata, render_as_batch=True, compare_type=True
    )
    with context.begin_transaction():
        context.run_migrations()


_given = context.config.attributes.get("connection")
if _given is not None:
    _run(_given)
else:
    with migration_engine(load_settings()).begin() as _own:
        _run(_own)
