"""Print parameters and FLOPs of every model of Tables 1 and 3 to 7 beside the paper's figures, as Markdown.

    python scripts/model_table.py

The figures of the paper are docs/paper/*.csv, printed to one decimal; FLOPs are counted as the paper counts them
(involution/complexity.py). Tables 3, 4, 5 and 7 are in dense_table.py.
"""

import argparse
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


_NORMS = "the paper leaves BatchNorm out of the parameters"
_LISTS = "LR-Net's authors have ResNet-50 itself at 4.3 G"
#: models of Table 1's self-attention rows -> (their row, why a column of ours differs from the paper's)
ATTENTION = {
    "lrnet26": ("LR-Net-26", _LISTS),
    "lrnet50": ("LR-Net-50", f"{_NORMS} (23.319 without); {_LISTS}"),
    "lrnet101": ("LR-Net-101", f"{_NORMS} (41.978 without); {_LISTS}"),
    "standalone_resnet26": ("Stand-Alone ResNet-26", ""),
    "standalone_resnet38": ("Stand-Alone ResNet-38", f"{_NORMS} (14.124 without)"),
    "standalone_resnet50": ("Stand-Alone ResNet-50", ""),
    "san10_pairwise": ("SAN10", ""),
    "san15_pairwise": ("SAN15", ""),
    "san19_pairwise": ("SAN19", ""),
    "aa_resnet50": ("AA-ResNet-50", "the paper's figure is of multiply-adds alone"),
    "aa_resnet101": ("AA-ResNet-101", "a guess: half of the authors' 16.1 G, which we count as 16.4"),
    "aa_resnet152": ("AA-ResNet-152", "a guess: half of the authors' 23.8 G, which we count as 24.3"),
    "axial_resnet_s": ("Axial ResNet-S", "the paper's figure is of multiply-adds alone"),
    "axial_resnet_m": ("Axial ResNet-M", "the paper's figure is of multiply-adds alone"),
    "axial_resnet_l": ("Axial ResNet-L", "the paper's figure is of multiply-adds alone"),
}
#: patchwise SANs are no rows of Table 1; these are their authors' figures
PATCHWISE = {"san10_patchwise": ("11.8", "1.9"), "san15_patchwise": ("16.2", "2.6"), "san19_patchwise": ("20.5", "3.3")}


@functools.cache
def measure(name: str, **options: Any) -> Complexity:
    """Count a model on the meta device, where it takes no memory."""
    with torch.device("meta"):
        return count(create_model(name, **options))


def table1() -> list[tuple[str, Complexity, dict[str, str]]]:
    """(name, ours, the paper's row) for each row of Table 1 that is a model of this repository."""
    paper = {row["architecture"].lower().replace("-", ""): row for row in _table1()}
    return [
        (paper[name]["architecture"], measure(name), paper[name])
        for name in MODELS
        if name in paper and name not in ATTENTION
    ]


def attention() -> list[tuple[str, Complexity, dict[str, str]]]:
    """(model, ours, the paper's row and, under "why", what makes a column differ) for the self-attention rows."""
    paper = {row["architecture"]: row for row in _table1()}
    rows = [(name, measure(name), paper[row] | {"why": why}) for name, (row, why) in ATTENTION.items()]
    for name, (params, flops) in PATCHWISE.items():
        rows.append((name, measure(name), {"params_m": params, "flops_g": flops, "why": "(its authors' figures)"}))
    return rows


def _table1() -> list[dict[str, str]]:
    with open(PAPER / "table1_classification.csv", newline="") as file:
        return list(csv.DictReader(file))


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
    explained = any("why" in paper for _, _, paper in rows)
    lines = [
        f"### {title}",
        "",
        "| model | parameters (M) | paper | FLOPs (G) | paper | MACs alone (G) |"
        + " why a column differs |" * explained,
        "|---|---:|---:|---:|---:|---:|" + "---|" * explained,
    ]
    for name, ours, paper in rows:
        params, flops, macs = ours.params / 1e6, ours.flops / 1e9, ours.macs / 1e9
        line = f"| {name} | {params:.3f} | {paper['params_m']} | {flops:.2f} | {paper['flops_g']} | {macs:.2f} |"
        lines.append(line + f" {paper['why']} |" if explained else line)
    return "\n".join(lines)


def main() -> None:
    import dense_table

    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(markdown("Table 1", table1()))
    print()
    print(markdown("Table 1, self-attention", attention()))
    print()
    print(markdown("Table 6 (RedNet-50)", table6()))
    for title, rows in dense_table.tables():
        print(f"\n{dense_table.markdown(title, rows)}")


if __name__ == "__main__":
    main()
