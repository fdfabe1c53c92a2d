"""The paper's Table 2, latency of one image, with this machine's beside the paper's."""

import csv
from collections.abc import Sequence

from benchmarks.machine import REPOSITORY
from benchmarks.report import Row

BASE = "ResNet-50"
FAMILIES = {"san19_pairwise": "SAN19", "axial_resnet_s": "Axial ResNet-S"}
NOTE = (
    "In the paper's order; its GPU is a TITAN Xp, its CPU a Xeon E5-2660 v4. Milliseconds of different machines do not "
    "compare, the last two columns do: how many times as fast as ResNet-50. Rows without figures of ours were not "
    "measured in this run (SAN19, here pairwise, and Axial ResNet-S: --attention; those two are folded, the others "
    "compiled). The last column divides medians, of other depths of rounds that were not interleaved with each other."
)


def table2(rows: list[Row], device: str, families: Sequence[Row] = ()) -> list[Row]:
    """The paper's rows, with what was measured at batch 1: eager, and the fastest variant."""
    with open(REPOSITORY / "docs" / "paper" / "table2_runtime.csv", newline="") as file:
        paper = {line["architecture"]: line for line in csv.DictReader(file)}
    ours = {}
    for measured in (row for row in rows if row["batch"] == 1):
        for kind in ("ResNet", "RedNet"):
            times = {key: v for key, v in measured.items() if key.startswith(f"{kind} ") and v is not None}
            if times:
                ours[f"{kind}-{measured['depth']}"] = times[f"{kind} eager (ms)"], min(times.values())
    for measured in families:
        if measured["model"] in FAMILIES:
            eager, folded = measured["eager (ms)"], measured["folded (ms)"]
            ours[FAMILIES[measured["model"]]] = eager, min(eager, folded)
    name, column = ("GPU", "gpu_ms") if device == "cuda" else ("CPU", "cpu_ms")
    result = []
    for architecture, line in paper.items():
        eager, best = ours.get(architecture, (None, None))
        theirs = float(line[column]) if line[column] else None
        row: Row = {"architecture": architecture, "paper top-1 (%)": line["top1"]}
        row |= {"paper GPU (ms)": line["gpu_ms"], "paper CPU (ms)": line["cpu_ms"]}
        row |= {f"our {name}, eager (ms)": eager, f"our {name}, best (ms)": best}
        row[f"{BASE}'s / this, paper's {name}"] = theirs and float(paper[BASE][column]) / theirs
        row[f"{BASE}'s / this, ours"] = ours[BASE][1] / best if best and BASE in ours else None
        result.append(row)
    return result if ours.keys() & paper.keys() else []
