"""Draw Figure 2: top-1 against FLOPs and against parameters, the paper's models and one's own runs.

    python scripts/plot_accuracy.py runs/study --out docs/benchmarks/study-accuracy     writes .png and .pdf

Above the paper's ImageNet figures (docs/paper/table1_classification.csv), a line a family; below the own runs, a point
a setting, with the standard deviation over seeds. Their scales differ: own runs are rarely 130 epochs of ImageNet.
"""

import argparse
import csv
import re
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from model_table import PAPER
from run_folders import find_runs, settings

AXES = (("flops", "FLOPs"), ("params", "parameters"))


def paper(axes: Any) -> None:
    """One line a family; RedNet stands out."""
    families: dict[str, list[tuple[float, float, float]]] = {}
    with open(PAPER / "table1_classification.csv", newline="") as file:
        for row in csv.DictReader(file):
            family = re.sub(r"-?(\d+|[SML])$", "", row["architecture"])
            point = float(row["flops_g"]), float(row["params_m"]), float(row["top1"])
            families.setdefault(family, []).append(point)
    for family, points in families.items():
        style = {"lw": 2.2, "zorder": 3, "color": "black"} if family == "RedNet" else {"lw": 1, "alpha": 0.8}
        for axis, column in zip(axes, (0, 1)):
            line = sorted((point[column], point[2]) for point in points)
            axis.plot(*zip(*line), marker="o", ms=4, label=family, **style)
    axes[0].set(xlabel="FLOPs (G, 224 px)", ylabel="top-1 (%)", title="the paper, ImageNet")
    axes[1].set(xlabel="parameters (M)", title="the paper, ImageNet")
    axes[1].legend(fontsize=7)


def own(axes: Any, folders: list[Path]) -> None:
    """One point a setting."""
    for index, (setting, runs) in enumerate(settings(find_runs(folders)).items()):
        scores = [top for run in runs if run.finished and (top := run.score("top1")) is not None]
        if not scores:
            continue
        cost, bar = runs[0].complexity(), stdev(scores) if len(scores) > 1 else 0
        for axis, (key, _) in zip(axes, AXES):
            style = {"fmt": "osD^v<>P*X"[index % 10], "ms": 6, "capsize": 2, "label": setting}
            axis.errorbar(getattr(cost, key) / 1e6, mean(scores), bar, **style)
    axes[0].set(xlabel="FLOPs (M)", ylabel="top-1 (%)", title="own runs (bars: deviation over seeds)")
    axes[1].set(xlabel="parameters (M)", title="own runs")
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def draw(folders: list[Path], out: Path) -> list[Path]:
    """Write out.png and out.pdf."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.4 if folders else 3.8), layout="constrained")
    axes = figure.subplots(2 if folders else 1, 2, squeeze=False)
    paper(axes[0])
    if folders:
        own(axes[1], folders)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out.with_name(out.name + ending) for ending in (".png", ".pdf")]
    for file in files:
        figure.savefig(file, dpi=120)
    return files


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="run folders, or folders of runs")
    parser.add_argument("--out", type=Path, default=Path("accuracy"), help="pictures to write, without ending")
    arguments = parser.parse_args()
    try:
        files = draw(arguments.folders, arguments.out)
    except ValueError as error:
        print(f"plot_accuracy.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(*files)


if __name__ == "__main__":
    main()
