"""How tables and JSON are printed on the terminal."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

LEAST_WIDTH, WIDE = 120, 150
"""Columns of a table, and of one with many, where the output is no terminal, or a narrow one: cells that fold everywhere cannot
be read."""


def print_table(table: Table, least_width: int = LEAST_WIDTH) -> None:
    """Prints it; names and descriptions in it are somebody's text and no markup."""
    Console(width=max(Console().width, least_width), markup=False).print(table)


def print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))
