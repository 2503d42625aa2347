"""Results of measurements, written to a JSON file atomically after every row."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

from pipelines.common.atomic import write_text


class Results:
    """{table: {row: figures}}, written after every row; a failed measurement records its error."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.tables, self.num_failed = path, {}, 0

    def measure(self, table: str, row: str, function: Callable[[], dict]) -> None:
        try:
            figures = function()
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {error}"[:300].replace("\n", " ")}
            self.num_failed += 1
        gc.collect()  # frees model and optimizer before the next measurement
        self.record(table, row, figures)

    def record(self, table: str, row: str, figures: dict) -> None:
        print(f"{table}, {row}: {figures}", flush=True)
        self.tables.setdefault(table, {})[row] = figures
        if self.path is not None:
            write_json(self.path, self.tables)


def write_json(path: Path, values: dict) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(values, indent=1, default=str) + "\n", overwrite=True)


def as_text(value: object) -> str:
    """A value in a table: four digits of a float."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
