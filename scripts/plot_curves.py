"""Draw the learning curves of runs into one picture.

    python scripts/plot_curves.py runs/photos-rednet26 runs/photos-resnet26 --out docs/benchmarks/curves.png
    python scripts/plot_curves.py --mean runs/study --out docs/benchmarks/study-curves.png

Left the training loss, right the validation top-1, against the epoch: a line a run in or below the folders, named by
its own. With --mean they are averaged over seeds: a line a setting, in a band from the lowest to the highest.
"""

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

from run_folders import Run, find_runs, settings

SCORES = {"val_top1": "top-1", "val_miou": "mIoU", "val_ap": "AP"}  # of the tasks
Curve = list[tuple[int, list[float]]]  # epoch, the value of each run


def curve(runs: list[Run], key: str) -> Curve:
    """The values of `key` at each epoch that any of the runs has one for."""
    values = defaultdict(list)
    for line in (line for run in runs for line in run.lines if line[key] is not None):
        values[line["epoch"]].append(line[key])
    return sorted(values.items())


def draw(groups: dict[str, list[Run]], out: Path) -> None:
    """Draw the curves of `groups` into the file `out` (PNG, PDF or SVG by its ending)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    recorded = next((run.lines[0] for runs in groups.values() for run in runs if run.lines), None)
    if recorded is None:
        raise ValueError("none of these runs has finished an epoch")
    score = next((key for key in SCORES if key in recorded), "val_top1")
    titles = ("training loss", f"validation {SCORES[score]} (%)")
    for axis, key, title in zip(axes, ("train_loss", score), titles, strict=True):
        for name, runs in groups.items():
            points = curve(runs, key)
            epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
            axis.plot(epochs, [mean(value) for value in values], marker=".", label=name)
            if len(runs) > 1:
                axis.fill_between(
                    epochs, [min(value) for value in values], [max(value) for value in values], alpha=0.12
                )
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[1].legend(loc="lower right", fontsize=7 if len(groups) > 4 else 9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def named(runs: list[Run]) -> dict[str, list[Run]]:
    """Each run by its folder's name, or where names repeat by its path below the common folder."""
    paths = [run.path.resolve() for run in runs]
    common = os.path.commonpath(paths)
    repeated = len({path.name for path in paths}) < len(paths)
    return {os.path.relpath(p, common) if repeated else p.name: [run] for p, run in zip(paths, runs, strict=True)}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of runs")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write")
    parser.add_argument("--mean", action="store_true", help="average over seeds")
    arguments = parser.parse_args()
    try:
        runs = find_runs(arguments.runs)
        draw(settings(runs) if arguments.mean else named(runs), arguments.out)
    except ValueError as error:
        print(f"plot_curves.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(arguments.out)


if __name__ == "__main__":
    main()
