"""Losses of three kinds, the word of an attempt, rotten checkpoints and resting workers

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    for table, columns in _columns().items():
        with op.batch_alter_table(table) as batch:
            for column in columns:
                batch.add_column(column)


def downgrade() -> None:
    for table, columns in _columns().items():
        with op.batch_alter_table(table) as batch:
            for column in columns:
                batch.drop_column(column.name)


def _columns() -> dict[str, tuple[sa.Column[object], ...]]:
    return {
        "jobs": (
            _count("host_losses"),
            _count("rests"),
            sa.Column("attempt", sa.String(), nullable=True),
            sa.Column("avoid_worker", sa.String(), nullable=True),
            sa.Column("avoid_until", sa.Double(), nullable=True),
            sa.Column("progress_at", sa.Double(), nullable=True),
        ),
        "checkpoints": (
            sa.Column("contents_sha256", sa.String(length=64), nullable=True),
            sa.Column("unusable_at", sa.Double(), nullable=True),
        ),
        "workers": (
            sa.Column("queues", sa.String(), nullable=True),
            _count("faults"),
            sa.Column("resting_until", sa.Double(), nullable=True),
        ),
    }


def _count(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.BigInteger(), server_default="0", nullable=False)
