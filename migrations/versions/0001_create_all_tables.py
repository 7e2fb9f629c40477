"""Create all tables

Revision ID: 0001
Revises: nothing
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "orgs",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("slug", sa.String(), nullable=False),
        *_every_table("orgs"),
        sa.UniqueConstraint("slug", name=op.f("uq_orgs_slug")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "workers",
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("devices", sa.String(), nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        *_every_table("workers"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "projects",
        sa.Column("org_id", sa.String(length=160), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("policy", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_projects_org_id")),
        *_every_table("projects"),
        sa.UniqueConstraint("name", name=op.f("uq_projects_name")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "api_keys",
        sa.Column("project_id", sa.String(length=160), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.Column("hint", sa.String(), nullable=False),
        sa.Column("scopes", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_api_keys_project_id")),
        *_every_table("api_keys"),
        sa.UniqueConstraint("hash", name=op.f("uq_api_keys_hash")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "files",
        sa.Column("project_id", sa.String(length=160), nullable=False),
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("status_details", sa.String(length=512), nullable=True),
        sa.Column("blob_key", sa.String(length=512), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("validation", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("woken_at", sa.Double(), nullable=True),
        sa.Column("deleted_at", sa.Double(), nullable=True),
        sa.Column("erased_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_files_project_id")),
        *_every_table("files"),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_files_project_id_created_at_seq"), "files", ["project_id", "created_at", "seq"])
    op.create_index(op.f("ix_files_status_created_at"), "files", ["status", "created_at"])

    op.create_table(
        "replies",
        sa.Column("project_id", sa.String(length=160), nullable=False),
        sa.Column("route", sa.String(), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=True),
        sa.Column("body_hash", sa.String(length=64), nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.JSON(none_as_null=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_replies_project_id")),
        *_every_table("replies"),
        sa.UniqueConstraint("project_id", "route", "key", name=op.f("uq_replies_project_id_route_key")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_replies_project_id_route_body_hash"), "replies", ["project_id", "route", "body_hash"])

    op.create_table(
        "jobs",
        sa.Column("project_id", sa.String(length=160), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("base_id", sa.String(length=160), nullable=False),
        sa.Column("policy", sa.String(), nullable=False),
        sa.Column("request", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("recipe", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("queue", sa.String(), nullable=False),
        sa.Column("training_file", sa.String(length=160), nullable=True),
        sa.Column("validation_file", sa.String(length=160), nullable=True),
        sa.Column("suffix", sa.String(), nullable=True),
        sa.Column("metadata", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("stage", sa.String(), nullable=False),
        sa.Column("progress", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("worker_id", sa.String(), nullable=True),
        sa.Column("losses", sa.BigInteger(), nullable=False),
        sa.Column("run_after", sa.Double(), nullable=False),
        sa.Column("woken_at", sa.Double(), nullable=True),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("saved_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=True),
        sa.Column("fine_tuned_model", sa.String(), nullable=True),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_jobs_project_id")),
        sa.ForeignKeyConstraint(["training_file"], ["files.id"], name=op.f("fk_jobs_training_file")),
        sa.ForeignKeyConstraint(["validation_file"], ["files.id"], name=op.f("fk_jobs_validation_file")),
        *_every_table("jobs"),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_jobs_project_id_created_at_seq"), "jobs", ["project_id", "created_at", "seq"])
    op.create_index(op.f("ix_jobs_state_lease_until"), "jobs", ["state", "lease_until"])
    op.create_index(op.f("ix_jobs_state_run_after"), "jobs", ["state", "run_after"])

    op.create_table(
        "artifacts",
        sa.Column("job_id", sa.String(length=160), nullable=False),
        sa.Column("file_id", sa.String(length=160), nullable=False),
        sa.Column("form", sa.String(), nullable=False),
        sa.Column("quarantined", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name=op.f("fk_artifacts_file_id")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_artifacts_job_id")),
        *_every_table("artifacts"),
        sa.UniqueConstraint("file_id", name=op.f("uq_artifacts_file_id")),
        sa.UniqueConstraint("job_id", "form", name=op.f("uq_artifacts_job_id_form")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "base_models",
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("context", sa.BigInteger(), nullable=False),
        sa.Column("alignment_job", sa.String(length=160), nullable=True),
        sa.Column("alignment_file", sa.String(length=160), nullable=True),
        sa.Column("report", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(["alignment_file"], ["files.id"], name=op.f("fk_base_models_alignment_file")),
        sa.ForeignKeyConstraint(["alignment_job"], ["jobs.id"], name=op.f("fk_base_models_alignment_job")),
        *_every_table("base_models"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "checkpoints",
        sa.Column("job_id", sa.String(length=160), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("prefix", sa.String(length=512), nullable=False),
        sa.Column("metrics", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_checkpoints_job_id")),
        *_every_table("checkpoints"),
        sa.UniqueConstraint("job_id", "step", "fence", name=op.f("uq_checkpoints_job_id_step_fence")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "events",
        sa.Column("job_id", sa.String(length=160), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("data", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_events_job_id")),
        *_every_table("events"),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_events_job_id_created_at_seq"), "events", ["job_id", "created_at", "seq"])

    op.create_table(
        "models",
        sa.Column("project_id", sa.String(length=160), nullable=False),
        sa.Column("base_id", sa.String(length=160), nullable=False),
        sa.Column("job_id", sa.String(length=160), nullable=False),
        sa.Column("artifact_id", sa.String(length=160), nullable=False),
        sa.Column("deleted_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["artifact_id"], ["artifacts.id"], name=op.f("fk_models_artifact_id")),
        sa.ForeignKeyConstraint(["base_id"], ["base_models.id"], name=op.f("fk_models_base_id")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_models_job_id")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_models_project_id")),
        *_every_table("models"),
        sa.UniqueConstraint("job_id", name=op.f("uq_models_job_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_models_project_id_created_at_seq"), "models", ["project_id", "created_at", "seq"])


def downgrade() -> None:
    for table in _NEWEST_FIRST:
        op.drop_table(table)


def _every_table(name: str) -> tuple[sa.schema.SchemaItem, ...]:
    return (
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=160), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f(f"pk_{name}")),
        sa.UniqueConstraint("id", name=op.f(f"uq_{name}_id")),
    )


_NEWEST_FIRST = (
    "models",
    "events",
    "checkpoints",
    "base_models",
    "artifacts",
    "jobs",
    "replies",
    "files",
    "api_keys",
    "projects",
    "workers",
    "orgs",
)
