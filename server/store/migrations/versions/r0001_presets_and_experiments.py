"""Presets with versions, experiments, and what is observed in them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _experiment_id(primary_key: bool) -> sa.Column:
    reference = sa.ForeignKey("experiments.id", ondelete="CASCADE")
    return sa.Column("experiment_id", _ID, reference, primary_key=primary_key, nullable=False)


def upgrade() -> None:
    op.create_table(
        "revisions",
        sa.Column("scope", sa.String(128), primary_key=True),
        sa.Column("number", sa.Integer, nullable=False),
    )
    op.create_table(
        "presets",
        sa.Column("scope", sa.String(128), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("atoms", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("package_version", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
    )
    op.create_table(
        "experiments",
        sa.Column("id", _ID, primary_key=True, autoincrement=True),
        sa.Column("scope", sa.String(128), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("arms", sa.Text, nullable=False),
        sa.Column("package_version", sa.Text, nullable=False),
        sa.Column("coverage", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("stopped_at", sa.Double),
        sa.Column("stop_reason", sa.Text),
        sqlite_autoincrement=True,
    )
    op.create_index("experiments_by_name", "experiments", ["scope", "name"], unique=True)
    op.create_table(
        "experiment_events",
        sa.Column("id", _ID, primary_key=True, autoincrement=True),
        _experiment_id(False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
    )
    op.create_index("ix_experiment_events_experiment_id", "experiment_events", ["experiment_id"])
    op.create_table(
        "exposures",
        _experiment_id(True),
        sa.Column("unit", sa.String(256), primary_key=True),
        sa.Column("arm", sa.String(64), nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
    op.create_table(
        "responses",
        _experiment_id(True),
        sa.Column("response_id", sa.String(128), primary_key=True),
        sa.Column("choice", sa.Integer, primary_key=True),
        sa.Column("unit", sa.String(256), nullable=False),
        sa.Column("arm", sa.String(64), nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("first_token_seconds", sa.Double),
        sa.Column("finish_reason", sa.String(32)),
        sa.Column("tokens", sa.Integer),
        sa.Column("characters", sa.Integer),
        sa.Column("marks", sa.Text, nullable=False),
    )
    op.create_index("responses_by_unit", "responses", ["experiment_id", "unit"])
    op.create_table(
        "outcomes",
        _experiment_id(True),
        sa.Column("response_id", sa.String(128), primary_key=True),
        sa.Column("metric", sa.String(64), primary_key=True),
        sa.Column("unit", sa.String(256), nullable=False),
        sa.Column("arm", sa.String(64), nullable=False),
        sa.Column("value", sa.Double, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
    op.create_index("outcomes_by_unit", "outcomes", ["experiment_id", "unit"])
    op.create_table(
        "lost_records",
        sa.Column("id", _ID, primary_key=True, autoincrement=True),
        _experiment_id(False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("count", sa.Integer, nullable=False),
    )
    op.create_index("ix_lost_records_experiment_id", "lost_records", ["experiment_id"])
