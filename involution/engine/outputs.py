"""Files that eval.py is to write: refused before anything is computed, and tables."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from involution.engine.errors import UserError


def output_file(key: str, name: str, *endings: str) -> Path:
    """The path of a file to be written.

    Raises:
        UserError: it has another ending, or its folder does not exist.
    """
    path = Path(name)
    if path.suffix not in endings:
        raise UserError(f"{key} is {path}; it should end with {' or '.join(endings)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{key}: there is no folder {path.parent} to write {path.name} to")
    return path


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file, whatever bytes names have."""
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(rows)
