"""The page of a session on one GPU: docs/benchmarks/gpu.md and .json from what scripts/gpu_session.sh left.

python scripts/gpu/page.py gpu-out [--out docs/benchmarks/gpu]
"""

import argparse
import csv
import json
import os
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Report, Row
from run_folders import Run, find_runs

#: those that are tables of training steps
STEPS = ("step", "step-graphs", "step-ghost")
#: the steps that scripts/benchmark.py measures
BENCHMARKS = ("training", "training-32", "training-fp32", "training-compiled", "op", "loop", "op-attention", "data")
IMAGES = 130 * 1_281_167  # of the paper's recipe on ImageNet


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that the session wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/gpu"), help="without suffix")
    args = parser.parse_args(arguments)
    machine = _load(args.folder / "machine.json")
    if machine is None:
        print(f"{args.folder} holds no session: there is no machine.json in it", file=sys.stderr)
        return 2
    report = Report("One GPU", {"command": "scripts/gpu_session.sh FOLDER", **machine})
    fill(report, args.folder)
    report.finish(args.out)
    return 0


def fill(report: Report, folder: Path) -> None:
    """A table or a sentence for everything that was measured; what was not is in the list of steps."""
    if counts := tests(folder):
        report.verdict(f"Tests on the GPU: {counts}.")
    if found := _load(folder / "synchronisations.json"):
        places = ", ".join(found["places"])
        report.verdict(f"A training step waits for the GPU {f'in {places}' if places else 'nowhere'}.")
    if found := _load(folder / "same-bits.json"):
        same = "ends with" if found["same"] else "DOES NOT END WITH"
        report.verdict(f"A run that was stopped and resumed {same} the bits of one that was not (deterministic=true).")
    for found in filter(None, (_load(folder / f"{name}.json") for name in STEPS)):
        note = "host: the time until the last launch; where it is the whole step, the host is what limits."
        report.table(
            step_title(found["precision"], found["batchnorm_size"], found.get("cuda_graphs", False)),
            found["rows"],
            note,
        )
        _speeds(report, found["rows"])
    if trained := runs(folder):
        note = "Top-1 of n photos after the last epoch; medians of the epochs; minutes in all, without evaluations."
        report.table("Runs of train.py", trained, note)
    for name in BENCHMARKS:
        for table in (_load(folder / f"{name}.json") or {"tables": []})["tables"]:
            if "rows" in table:
                report.table(table["title"], [_flat(row) for row in table["rows"]], table["note"])
            else:
                report.verdict(table["verdict"])
    if found := _load(folder / "profile.json"):
        title = f"Kernels of a step of {found['model']}, batch {found['batch']}: {found['all (ms)']:.1f} ms in all"
        rows = [row | {"kernel": f"`{row['kernel']}`"} for row in found["rows"]]  # or <float> would be a tag of HTML
        report.table(title, rows, "The twenty that take longest; calls and microseconds of a step.")
    if found := _load(folder / "tiles.json"):
        title = f"Involution kernels of RedNet-50, {found['precision']}, batch {found['batch']}"
        note = (
            "tile: runs x groups x warps, as involution/ops/triton_tiles.py chooses; best: of all that give a "
            "thread four or eight channels; medians in microseconds, the caches emptied."
        )
        report.table(title, found["rows"], note)
    if found := _load(folder / "loader.json"):
        rates = ", ".join(f"{rate:.0f} images/s with data.decoder={name}" for name, rate in found["images/s"].items())
        stay = "do not change" if found["pictures stay while they are read"] else "CHANGE (a race)"
        report.verdict(f"DALI: {rates}. Pictures {stay} while the GPU reads them late.")
    note = "Exit 124: out of time, 75: stopped. Seconds and commit of the last try. What is not here was not reached."
    report.table("Steps", steps(folder), note)


def step_title(precision: str, batchnorm_size: int | None = None, cuda_graphs: bool = False) -> str:
    """Of a table of training steps; cluster_table.py finds it by this."""
    ghost = f", train.batchnorm_size={batchnorm_size}" if batchnorm_size else ""
    return f"Training step, {precision}{ghost}{', train.cuda_graphs=true' if cuda_graphs else ''}"


def _speeds(report: Report, rows: list[Row]) -> None:
    """How fast a RedNet is beside its ResNet, and what the best speed means for the paper's recipe."""
    speed = {(row["model"], row["batch"]): row["images/s"] for row in rows}
    pairs = [
        f"{rate / speed[other]:.2f} at batch {batch}"
        for (name, batch), rate in speed.items()
        if name.startswith("red") and (other := (name.replace("red", "res"), batch)) in speed
    ]
    if pairs:
        report.verdict(f"RedNet's speed in ResNet's: {', '.join(pairs)}.")
    best, batch = max((rate, batch) for (name, batch), rate in speed.items() if name.startswith("red"))
    report.verdict(
        f"RedNet is fastest at batch {batch}, {best:.0f} images/s: 130 epochs of ImageNet in "
        f"{IMAGES / best / 3600:.1f} h of this GPU. docs/cluster.md predicts what many GPUs do."
    )


def tests(folder: Path) -> str:
    """How many passed and failed, the last line of pytest; nothing where it did not get there."""
    path = folder / "tests.txt"
    lines = reversed(path.read_text().splitlines() if path.exists() else [])
    return next((line.strip("= ") for line in lines if re.search(r"\d (passed|failed|skipped|error)", line)), "")


def runs(folder: Path) -> list[Row]:
    """A line for every run of train.py but those that were to end with the same bits."""
    if not any((folder / "runs").glob("*/config.yaml")):
        return []
    return [_run(folder, run) for run in find_runs([folder / "runs"]) if run.lines and not run.config["deterministic"]]


def _run(folder: Path, run: Run) -> Row:
    """n is what eval.py has counted since, of a run of the study that has ended."""
    scores = folder / f"{run.path.name.replace('study', 'scores')}.csv"
    with open(scores if scores.exists() else os.devnull, newline="") as file:
        n = next((line["n"] for line in csv.DictReader(file)), None)
    return {
        "run": run.path.name, "epochs": f"{run.lines[-1]['epoch']} of {run.config['train']['epochs']}",
        "top-1 (%)": f"{run.score('top1'):.2f}", "n": n,
        "images/s": median(line["images_per_s"] for line in run.lines),
        "waiting for data (%)": 100 * median(line["data_wait"] for line in run.lines),
        "minutes": sum(line["seconds"] for line in run.lines) / 60,
        "peak (GiB)": max(line["peak_memory_mb"] for line in run.lines) / 1024,
    }  # fmt: skip


def steps(folder: Path) -> list[Row]:
    """What ran, from steps.tsv: a line a try, of which the last counts."""
    path = folder / "steps.tsv"
    tries = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
    last = {values[0]: [values[0], int(values[1]), int(values[2]), *values[3:]] for values in tries}
    return [dict(zip(("step", "exit", "seconds", "commit", "command"), row)) for row in last.values()]


def _flat(row: Row) -> Row:
    """A row with ratios as text, as benchmark.py prints them."""
    return {
        key: f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]" if isinstance(value, dict) else value
        for key, value in row.items()
    }


def _load(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
