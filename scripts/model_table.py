"""Print parameters and FLOPs of every model of Tables 1 and 3 to 7 beside the paper's figures, as Markdown.

    python scripts/model_table.py

The figures of the paper are docs/paper/*.csv, printed to one decimal; FLOPs are counted as the paper counts them
(involution/complexity.py). Tables 3, 4, 5 and 7 are in dense_table.py.
"""

import csv
import functools
from pathlib import Path
from typing import Any

import torch

from involution.complexity import Complexity, count
from involution.models import MODELS, create_model

PAPER = Path(__file__).resolve().parents[1] / "docs" / "paper"

#: Table 6, (study, setting) -> options of RedNet-50, on top of the convolution stem that the studies have in common
ABLATIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("kernel_size", "3"): {"kernel_size": 3},
    ("kernel_size", "5"): {"kernel_size": 5},
    ("kernel_size", "7"): {},
    ("kernel_size", "9"): {"kernel_size": 9},
    ("group_channels", "1"): {"group_channels": 1},
    ("group_channels", "4"): {"group_channels": 4},
    ("group_channels", "16"): {},
    ("group_channels", "C"): {"group_channels": None},
    ("kernel_generation", "W"): {"kernel_generation": "linear"},
    ("kernel_generation", "W1-sigma-W0 r=1"): {"reduction_ratio": 1},
    ("kernel_generation", "W1-sigma-W0 r=4"): {},
    ("kernel_generation", "W1-sigma-W0 r=16"): {"reduction_ratio": 16},
    ("stem", "7x7 convolution"): {},
    ("stem", "3x3 involution"): {"stem": "involution"},
}


@functools.cache
def measure(name: str, **options: Any) -> Complexity:
    """Count a model on the meta device, where it takes no memory."""
    with torch.device("meta"):
        return count(create_model(name, **options))


def table1() -> list[tuple[str, Complexity, dict[str, str]]]:
    """(name, ours, the paper's row) for each row of Table 1 that is a model of this repository."""
    with open(PAPER / "table1_classification.csv", newline="") as file:
        paper = {row["architecture"].lower().replace("-", ""): row for row in csv.DictReader(file)}
    return [(paper[name]["architecture"], measure(name), paper[name]) for name in MODELS]


def table6() -> list[tuple[str, Complexity, dict[str, str]]]:
    """(study and setting, ours, the paper's row) for each row of Table 6."""
    with open(PAPER / "table6_ablation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        (
            f"{row['study']} {row['setting']}",
            measure("rednet50", **{"stem": "convolution", **ABLATIONS[row["study"], row["setting"]]}),
            row,
        )
        for row in rows
    ]


def markdown(title: str, rows: list[tuple[str, Complexity, dict[str, str]]]) -> str:
    """One table."""
    lines = [
        f"### {title}",
        "",
        "| model | parameters (M) | paper | FLOPs (G) | paper | MACs alone (G) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, ours, paper in rows:
        params, flops, macs = ours.params / 1e6, ours.flops / 1e9, ours.macs / 1e9
        lines.append(f"| {name} | {params:.3f} | {paper['params_m']} | {flops:.2f} | {paper['flops_g']} | {macs:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import dense_table

    print(markdown("Table 1", table1()))
    print()
    print(markdown("Table 6 (RedNet-50)", table6()))
    for title, rows in dense_table.tables():
        print(f"\n{dense_table.markdown(title, rows)}")
