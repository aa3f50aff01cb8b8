"""Sums that guardrails read instead of all records. An experiment that runs meanwhile is guarded by what comes after."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _experiment_id() -> sa.Column:
    reference = sa.ForeignKey("experiments.id", ondelete="CASCADE")
    return sa.Column("experiment_id", _ID, reference, primary_key=True, nullable=False)


def upgrade() -> None:
    op.create_table(
        "unit_sums",
        _experiment_id(),
        sa.Column("metric", sa.String(64), primary_key=True),
        sa.Column("unit", sa.String(256), primary_key=True),
        sa.Column("arm", sa.String(64), nullable=False),
        sa.Column("n", sa.Integer, nullable=False),
        sa.Column("total", sa.Double, nullable=False),
    )
    op.create_index("unit_sums_by_unit", "unit_sums", ["unit"])
    op.create_table(
        "arm_sums",
        _experiment_id(),
        sa.Column("metric", sa.String(64), primary_key=True),
        sa.Column("arm", sa.String(64), primary_key=True),
        sa.Column("units", sa.Integer, nullable=False),
        sa.Column("total", sa.Double, nullable=False),
        sa.Column("squares", sa.Double, nullable=False),
    )
