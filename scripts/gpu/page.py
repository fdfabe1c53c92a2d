"""The page of a session on one GPU: docs/benchmarks/gpu.md and .json from what scripts/gpu_session.sh left.

python scripts/gpu/page.py gpu-out [--out docs/benchmarks/gpu]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Report, Row

#: the steps that scripts/benchmark.py measures
BENCHMARKS = ("training", "training-32", "training-fp32", "training-compiled", "op", "loop", "data")
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
    report.table("Steps", steps(folder), "Exit 124: out of time. A step that is not here was not reached.")
    if found := _load(folder / "synchronisations.json"):
        places = ", ".join(found["places"])
        report.verdict(f"A training step waits for the GPU {f'in {places}' if places else 'nowhere'}.")
    if found := _load(folder / "same-bits.json"):
        same = "ends with" if found["same"] else "DOES NOT END WITH"
        report.verdict(f"A run that was stopped and resumed {same} the bits of one that was not (deterministic=true).")
    for found in filter(None, (_load(folder / f"{name}.json") for name in ("step", "step-ghost"))):
        note = "host: the time until the last launch; where it is the whole step, the host is what limits."
        ghost = f", train.batchnorm_size={found['batchnorm_size']}" if found["batchnorm_size"] else ""
        report.table(f"Training step, {found['precision']}{ghost}", found["rows"], note)
        _speeds(report, found["rows"])
    for name in BENCHMARKS:
        for table in (_load(folder / f"{name}.json") or {"tables": []})["tables"]:
            if "rows" in table:
                report.table(table["title"], [_flat(row) for row in table["rows"]], table["note"])
    if found := _load(folder / "profile.json"):
        title = f"Kernels of a step of {found['model']}, batch {found['batch']}: {found['all (ms)']:.1f} ms in all"
        report.table(title, found["rows"], "The twenty that take longest; calls and microseconds of a step.")
    if found := _load(folder / "loader.json"):
        rates = ", ".join(f"{rate:.0f} images/s with data.decoder={name}" for name, rate in found["images/s"].items())
        stay = "do not change" if found["pictures stay while they are read"] else "CHANGE (a race)"
        report.verdict(f"DALI: {rates}. Pictures {stay} while the GPU reads them late.")


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
    best = max((rate, batch) for (name, batch), rate in speed.items() if name.startswith("red"))
    hours = IMAGES / best[0] / 3600
    report.verdict(
        f"docs/cluster.md's r: {best[0]:.0f} images/s at batch {best[1]}, so that its 130 epochs of ImageNet take "
        f"{hours:.1f} h of this GPU, {hours / 8:.1f} h of eight without what they lose to their network."
    )


def steps(folder: Path) -> list[Row]:
    """What ran, from steps.tsv: a line a try, of which the last counts."""
    path = folder / "steps.tsv"
    tries = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
    last = {name: (name, int(status), int(seconds), command) for name, status, seconds, command in tries}
    return [dict(zip(("step", "exit", "seconds", "command"), row)) for row in last.values()]


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
