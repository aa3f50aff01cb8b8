"""What was observed, as Parquet: one file a table, one row a record, the experiment's name in the file's metadata."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Boolean, Double, Integer, Table, select
from sqlalchemy.types import TypeEngine

from server.experiments.spec import Experiment
from server.store.database import Database
from server.store.tables import exposures, outcomes, responses

TABLES: Mapping[str, Table] = MappingProxyType({table.name: table for table in (exposures, responses, outcomes)})
_ROWS_A_GROUP = 50_000


def export(database: Database, experiment: Experiment, table: Table) -> Path:
    """Writes a temporary Parquet file, which is the caller's to delete. Blocks; memory is bounded by a row group.

    Raises StoreUnavailableError. `marks` become a list of names, `at` a UTC timestamp.
    """
    columns = [column for column in table.columns if column.name != "experiment_id"]
    schema = pa.schema([(column.name, _type(column.name, column.type)) for column in columns])
    schema = schema.with_metadata({"atomsteer.experiment": experiment.name, "atomsteer.table": table.name})
    with tempfile.NamedTemporaryFile(suffix=".parquet", delete=False) as file:
        path = Path(file.name)
    try:
        query = select(*columns).where(table.c.experiment_id == experiment.id).order_by(*table.primary_key.columns)
        with database.read() as connection, pq.ParquetWriter(path, schema) as writer:
            rows = connection.execution_options(yield_per=_ROWS_A_GROUP).execute(query)
            for group in rows.partitions():
                values = [[_value(column.name, value) for value in column_values]
                          for column, column_values in zip(columns, zip(*group))]  # fmt: skip
                writer.write_table(pa.table(values, schema=schema))
    except BaseException:
        path.unlink()
        raise
    return path


def _type(name: str, kind: TypeEngine) -> pa.DataType:
    if name == "at":
        return pa.timestamp("us", "UTC")
    if name == "marks":
        return pa.list_(pa.string())
    if isinstance(kind, Boolean):
        return pa.bool_()
    if isinstance(kind, Integer):
        return pa.int64()
    return pa.float64() if isinstance(kind, Double) else pa.string()


def _value(name: str, value: object) -> object:
    if name == "at":
        return round(value * 1e6)  # type: ignore[operator]
    return [mark for mark in str(value).split(",") if mark] if name == "marks" else value
