"""Draw the learning curves of runs into one picture.

    python scripts/plot_curves.py runs/photos-rednet26 runs/photos-resnet26 --out docs/benchmarks/curves.png

Left the training loss, right the validation top-1, against the epoch: a line a run, named by its folder.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The epochs of a run.

    Raises:
        ValueError: when the folder holds no run.
    """
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    if not lines:
        raise ValueError(f"{run} holds no finished epoch (no lines in {path}); give folders that train.py wrote")
    return [json.loads(line) for line in lines]


def draw(runs: list[Path], out: Path) -> None:
    """Draw the curves of `runs` into the file `out` (PNG, PDF or SVG by its ending)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, key, title in zip(
        axes, ("train_loss", "val_top1"), ("training loss", "validation top-1 (%)"), strict=True
    ):
        for run in runs:
            points = [(line["epoch"], line[key]) for line in read_metrics(run) if line[key] is not None]
            axis.plot(*zip(*points, strict=True), marker=".", label=run.resolve().name)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[1].legend(loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write")
    arguments = parser.parse_args()
    try:
        draw(arguments.runs, arguments.out)
    except ValueError as error:
        print(f"plot_curves.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(arguments.out)


if __name__ == "__main__":
    main()
