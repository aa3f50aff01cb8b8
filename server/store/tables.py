"""The tables. Times are Unix seconds (UTC) as doubles; JSON is kept as text, and is read by this project alone.

``scope`` is the name of a package: several packages may share one database without seeing each other's presets and
experiments. Units are whoever they are in all of them: one that is forgotten is forgotten everywhere.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

NAME, UNIT, RESPONSE = 64, 256, 128
"""Longest names of presets, experiments, arms and metrics; units; response ids."""

revisions = Table(
    "revisions",
    metadata,
    Column("scope", String(128), primary_key=True),
    Column("number", Integer, nullable=False),
    comment="Counts the changes of a package's presets and experiments: replicas ask for it to know when to read again.",
)

presets = Table(
    "presets",
    metadata,
    Column("scope", String(128), primary_key=True),
    Column("name", String(NAME), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("atoms", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("package_version", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("deleted", Boolean, nullable=False),
    comment="Every version of every preset; the highest is the one in force, unless it says deleted.",
)

# BIGINT is no alias of SQLite's rowid, INTEGER is.
_ID = BigInteger().with_variant(Integer, "sqlite")

experiments = Table(
    "experiments",
    metadata,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("scope", String(128), nullable=False),
    Column("name", String(NAME), nullable=False),
    Column("status", String(16), nullable=False),
    Column("spec", Text, nullable=False),
    Column("arms", Text, nullable=False),
    Column("package_version", Text, nullable=False),
    Column("coverage", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("stopped_at", Double),
    Column("stop_reason", Text),
    Index("experiments_by_name", "scope", "name", unique=True),
    sqlite_autoincrement=True,  # a deleted experiment's id must not be given to another, whose it would seem to be
)


def _experiment_key() -> Column:
    return Column("experiment_id", _ID, ForeignKey("experiments.id", ondelete="CASCADE"), primary_key=True)


events = Table(
    "experiment_events",
    metadata,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("experiment_id", _ID, ForeignKey("experiments.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("at", Double, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("detail", Text, nullable=False),
)

exposures = Table(
    "exposures",
    metadata,
    _experiment_key(),
    Column("unit", String(UNIT), primary_key=True),
    Column("arm", String(NAME), nullable=False),
    Column("at", Double, nullable=False),
    comment="A unit's first request under an experiment.",
)

responses = Table(
    "responses",
    metadata,
    _experiment_key(),
    Column("response_id", String(RESPONSE), primary_key=True),
    Column("choice", Integer, primary_key=True),
    Column("unit", String(UNIT), nullable=False),
    Column("arm", String(NAME), nullable=False),
    Column("at", Double, nullable=False),
    Column("status", Integer, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("first_token_seconds", Double),
    Column("finish_reason", String(32)),
    Column("tokens", Integer),
    Column("characters", Integer),
    Column("marks", Text, nullable=False),
    Index("responses_by_unit", "experiment_id", "unit"),
    comment="One row a choice. `marks` are the detectors that hold for it, as ',a,b,'.",
)

outcomes = Table(
    "outcomes",
    metadata,
    _experiment_key(),
    Column("response_id", String(RESPONSE), primary_key=True),
    Column("metric", String(NAME), primary_key=True),
    Column("unit", String(UNIT), nullable=False),
    Column("arm", String(NAME), nullable=False),
    Column("value", Double, nullable=False),
    Column("at", Double, nullable=False),
    Index("outcomes_by_unit", "experiment_id", "unit"),
    comment="What clients said of a response; the last value of a metric counts.",
)

unit_sums = Table(
    "unit_sums",
    metadata,
    _experiment_key(),
    Column("metric", String(NAME), primary_key=True),
    Column("unit", String(UNIT), primary_key=True),
    Column("arm", String(NAME), nullable=False),
    Column("n", Integer, nullable=False),
    Column("total", Double, nullable=False),
    Index("unit_sums_by_unit", "unit"),
    comment="A unit's values of a metric that a guardrail watches: how many, and their sum.",
)

arm_sums = Table(
    "arm_sums",
    metadata,
    _experiment_key(),
    Column("metric", String(NAME), primary_key=True),
    Column("arm", String(NAME), primary_key=True),
    Column("units", Integer, nullable=False),
    Column("total", Double, nullable=False),
    Column("squares", Double, nullable=False),
    comment="Over the units of an arm: how many have a value, the sums of their means and of the squares of those.",
)

losses = Table(
    "lost_records",
    metadata,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("experiment_id", _ID, ForeignKey("experiments.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("at", Double, nullable=False),
    Column("count", Integer, nullable=False),
    comment="Automatic records that a full queue made a server drop.",
)
