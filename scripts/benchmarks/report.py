"""Tables on the terminal, and the same as Markdown and JSON."""

import json
from pathlib import Path
from typing import Any

from benchmarks.timing import Ratio

Row = dict[str, Any]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _plain(value: Any) -> Any:
    return value._asdict() if isinstance(value, Ratio) else value


class Report:
    """Collects tables, printing each as it comes."""

    def __init__(self, title: str, conditions: dict[str, str]) -> None:
        self.title, self.conditions = title, conditions
        self.tables: list[dict[str, Any]] = []
        self._parts: list[str] = []
        self._add(f"# {title}")
        self._add("\n".join(f"- {name}: {value}" for name, value in conditions.items()))

    def _add(self, text: str) -> None:
        self._parts.append(text)
        print(text + "\n", flush=True)

    def table(self, title: str, rows: list[Row], note: str = "") -> None:
        """The rows' keys become the columns, empty where a row has no such key; `note` says how to read them."""
        columns = list({key: None for row in rows for key in row})
        cells = [columns] + [[_text(row.get(column)) for column in columns] for row in rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        self._add(f"## {title}\n\n" + (f"{note}\n\n" if note else "") + "\n".join(lines))
        plain = [{key: _plain(value) for key, value in row.items()} for row in rows]
        self.tables.append({"title": title, "note": note, "rows": plain})

    def verdict(self, text: str) -> None:
        """A sentence that sums up."""
        self._add(text)
        self.tables.append({"verdict": text})

    def finish(self, out: Path | None) -> None:
        """Write `out`.md and `out`.json; the last line of standard output is one JSON object."""
        if out is None:
            print(json.dumps({"tables": len(self.tables)}))
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".md").write_text("\n\n".join(self._parts) + "\n")
        content = {"title": self.title, "conditions": self.conditions, "tables": self.tables}
        out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        print(json.dumps({"tables": len(self.tables), "written": [str(out.with_suffix(s)) for s in (".md", ".json")]}))
