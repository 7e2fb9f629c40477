"""Deployment, marks of the sweep, tries to erase a file, indexes for what the reaper looks for

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_INDEXES = (
    ("files", ("expires_at",)),
    ("files", ("erased_at", "deleted_at")),
    ("files", ("blob_key",)),
    ("jobs", ("state", "saved_at")),
    ("jobs", ("state", "created_at")),
    ("jobs", ("state", "finished_at")),
    ("jobs", ("training_file",)),
    ("jobs", ("validation_file",)),
    ("artifacts", ("quarantined",)),
    ("models", ("artifact_id",)),
    ("workers", ("seen_at",)),
    ("replies", ("created_at",)),
)


def upgrade() -> None:
    op.create_table(
        "deployments",
        sa.Column("pepper", sa.String(), nullable=True),
        sa.Column("queue", sa.String(), nullable=True),
        sa.Column("bound_at", sa.Double(), nullable=True),
        sa.Column("audit_due", sa.Boolean(), nullable=False),
        sa.Column("swept_at", sa.Double(), nullable=True),
        sa.Column("sweeps", sa.BigInteger(), nullable=False),
        *_every_table("deployments"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "sweep_marks",
        sa.Column("seen_at", sa.Double(), nullable=False),
        *_every_table("sweep_marks"),
        sqlite_autoincrement=True,
    )
    op.add_column("files", sa.Column("erase_after", sa.Double(), nullable=True))
    op.add_column("files", sa.Column("erase_failures", sa.BigInteger(), nullable=True))
    for table, columns in _INDEXES:
        op.create_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table, list(columns))
    # earlier releases opened the undefended project `baseline` in every deployment; the demo makes itself a new key
    op.execute(
        "UPDATE api_keys SET revoked_at = created_at WHERE revoked_at IS NULL AND project_id IN "
        "(SELECT id FROM projects WHERE name = 'baseline' AND policy = 'plain')"
    )


def downgrade() -> None:
    for table, columns in reversed(_INDEXES):
        op.drop_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table)
    op.drop_column("files", "erase_failures")
    op.drop_column("files", "erase_after")
    op.drop_table("sweep_marks")
    op.drop_table("deployments")


def _every_table(name: str) -> tuple[sa.schema.SchemaItem, ...]:
    return (
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=160), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f(f"pk_{name}")),
        sa.UniqueConstraint("id", name=op.f(f"uq_{name}_id")),
    )
