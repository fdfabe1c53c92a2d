"""report.py for detectors and segmentors: a table in the form of the paper's Tables 3 and 4, a row a setting.

Scores are those of the last evaluation, means over seeds; parameters are the trainable ones; FLOPs are those of the
paper's sizes of input (1280 x 800 for detection, 2048 x 1024 for segmentation) and number of boxes whatever the run's
own are, every layer counted. The paper's score (docs/paper) stands beside runs on its own data sets.
"""

import csv
from statistics import mean, stdev

from model_table import PAPER
from run_folders import Run, settings

SCORES = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP S", "ap_medium": "AP M", "ap_large": "AP L"}
SCORES |= {f"mask_{name}": f"mask {title}" for name, title in SCORES.items()} | {"miou": "mIoU"}
NAMES = {
    "retinanet": "RetinaNet", "faster_rcnn": "Faster R-CNN", "mask_rcnn": "Mask R-CNN",
    "semantic_fpn": "Semantic FPN", "upernet": "UPerNet", "rednet50": "RedNet-50", "resnet50": "ResNet-50",
}  # fmt: skip
#: data set -> (the paper's table, its column of models)
PAPERS = {"coco": ("table3_coco.csv", "detector"), "cityscapes": ("table4_5_cityscapes.csv", "segmentor")}


def paper_score(run: Run) -> str:
    """The paper's AP or mIoU of this setting, if the run is on the paper's data set."""
    model, (table, column) = run.config["model"], PAPERS.get(run.config["data"]["name"], ("", ""))
    if not table or model.get("plugin"):
        return ""
    wanted = (NAMES[model["name"]], NAMES.get(model["backbone"]["name"], ""), model["neck"])
    with open(PAPER / table, newline="") as file:
        for row in csv.DictReader(file):
            same_head = row.get("head") in (None, model.get("head") or "convolution")
            if (row[column], row["backbone"], row["neck"]) == wanted and same_head:
                return row["miou"] if "miou" in row else row["ap"]
    return ""


def table(runs: list[Run]) -> list[dict[str, str]]:
    """The rows of the report."""
    shown = [name for name in SCORES if any(run.score(name) is not None for run in runs)]
    rows = []
    for setting, group in settings(runs).items():
        done = [run for run in group if run.finished]
        model, cost = group[0].config["model"], group[0].complexity()
        row = {"model": model["name"], "backbone": model["backbone"]["name"], "neck": model["neck"]}
        row |= {key: model.get(key) or "" for key in ("head", "plugin")}
        row["also"] = setting.removeprefix(group[0].setting).strip()
        row["parameters (M)"], row["FLOPs (G)"] = f"{cost.trainable / 1e6:.1f}", f"{cost.flops / 1e9:.1f}"
        for name in shown:
            scores = [score for run in done if (score := run.score(name)) is not None]
            row[SCORES[name]] = f"{mean(scores):.1f}" if scores else ""
            if name in ("ap", "miou"):
                row[f"{SCORES[name]} deviation"] = f"{stdev(scores):.1f}" if len(scores) > 1 else ""
        row["paper"] = paper_score(group[0])
        row["hours"] = f"{sum(line['seconds'] for run in group for line in run.lines) / 3600:.2f}"
        unfinished = len(group) - len(done)
        row["runs"] = f"{len(done)}, {unfinished} unfinished" if unfinished else f"{len(done)}"
        rows.append(row)
    return [{key: row[key] for key in row if key in _used(rows)} for row in rows]


def _used(rows: list[dict[str, str]]) -> set[str]:
    """Columns with anything in them."""
    return {key for row in rows for key, value in row.items() if value}
