"""Write the table of a study from its run folders: one row a setting, averaged over seeds.

    python scripts/report.py runs/study                                  every run below it, as Markdown
    python scripts/report.py runs/study --format latex --out table.tex   (booktabs); also csv
    python scripts/report.py --compare RUN_A RUN_B                       McNemar's test on the same images

Top-1 is that of the last epoch. "To default" is the difference to the same model (for a ResNet the RedNet of its depth)
and stem with nothing else changed. The paper's figures (docs/paper) and the difference to them are for ImageNet.
--compare takes what `eval.py checkpoint=RUN predictions=RUN/predictions.csv` writes, or folders with a predictions.csv.
"""

import argparse
import csv
import inspect
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import yaml
from model_table import ABLATIONS, PAPER

from involution.complexity import Complexity, count
from involution.models import RedNet, create_model

DEFAULTS = {name: p.default for name, p in inspect.signature(RedNet).parameters.items()}
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
PLACE = {"name", "output_root", "device", "seed"}  # what does not make it another setting


@dataclass
class Run:
    """One run folder."""

    path: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    @property
    def top1(self) -> float | None:
        scores = [line["val_top1"] for line in self.lines if line.get("val_top1") is not None]
        return scores[-1] if scores else None

    @property
    def options(self) -> dict[str, Any]:
        """What differs from the model's defaults."""
        model = self.config["model"]
        return {k: v for k, v in model.items() if k in DEFAULTS and k != "num_classes" and v != DEFAULTS[k]}

    @property
    def setting(self) -> str:
        options = (f"{k}={'C' if v is None else v}" for k, v in self.options.items())
        return " ".join([self.config["model"]["name"], *options])

    def complexity(self) -> Complexity:
        side = self.config["data"]["val_size"]
        with torch.device("meta"):
            return count(create_model(**self.config["model"]), (3, side, side))


def find_runs(folders: list[Path]) -> list[Run]:
    """Every run in or below the folders.

    Raises:
        ValueError: a folder does not exist or holds no run, or a run's files are damaged.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        found = sorted(path.parent for path in folder.rglob("config.yaml") if path.parent.name != ".hydra")
        if not found:
            what = "holds no runs (no config.yaml below it)" if folder.exists() else "does not exist"
            raise ValueError(f"{folder} {what}; give folders that train.py wrote")
        runs |= {path.resolve(): _read_run(path) for path in found}
    return list(runs.values())


def _read_run(path: Path) -> Run:
    metrics = path / "metrics.jsonl"
    text = metrics.read_text() if metrics.is_file() else ""
    try:
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        config = yaml.safe_load((path / "config.yaml").read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: config.yaml or metrics.jsonl is damaged: {error}") from error
    if not isinstance(config, dict) or not {"model", "data", "train"} <= config.keys():
        raise ValueError(f"{path}/config.yaml is not one that train.py wrote; give folders that train.py wrote")
    return Run(path, config, lines)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.epochs": 5, ...}"""
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def settings(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by setting: the model with its options, and whatever else differs among the runs given."""
    configs = [
        {k: v for k, v in flat(run.config).items() if not k.startswith("model.") and k not in PLACE} for run in runs
    ]
    keys = sorted({key for config in configs for key in config if any(c.get(key) != config[key] for c in configs)})
    groups: dict[str, list[Run]] = {}
    for run, config in zip(runs, configs):
        groups.setdefault(" ".join([run.setting, *(f"{key}={config.get(key)}" for key in keys)]), []).append(run)
    return groups


def default_of(run: Run) -> str:
    """The setting that `run` is compared with."""
    stem = run.options.get("stem")
    name = run.config["model"]["name"].replace("resnet", "rednet")
    return f"{name} stem={stem}" if stem else name


def paper_top1(run: Run) -> str:
    """The paper's ImageNet top-1 of this setting; Table 6 is about RedNet-50 with the convolution stem."""
    name, options = run.config["model"]["name"], dict(run.options)
    if not options:
        with open(PAPER / "table1_classification.csv", newline="") as file:
            rows = {row["architecture"].lower().replace("-", ""): row["top1"] for row in csv.DictReader(file)}
        return rows.get(name, "")
    if options.pop("stem", None) != "convolution":
        return ""
    with open(PAPER / "table6_ablation.csv", newline="") as file:
        for row in csv.DictReader(file):
            if ABLATIONS[row["study"], row["setting"]] == options:
                return row["top1"] + ("" if name == "rednet50" else " (RedNet-50)")
    return ""


def table(runs: list[Run]) -> list[dict[str, str]]:
    """The rows of the report."""
    groups = settings(runs)
    tops = {k: [r.top1 for r in group if r.finished and r.top1 is not None] for k, group in groups.items()}
    means = {setting: mean(scores) for setting, scores in tops.items() if scores}
    rows = []
    for setting, group in groups.items():
        scores = tops[setting]
        default = default_of(group[0]) + setting.removeprefix(group[0].setting)
        cost = group[0].complexity()
        row = {"setting": setting, "parameters (M)": f"{cost.params / 1e6:.2f}", "FLOPs (M)": f"{cost.flops / 1e6:.1f}"}
        row["top-1 (%)"] = f"{means[setting]:.1f}" if scores else ""
        row["deviation"] = f"{stdev(scores):.1f}" if len(scores) > 1 else ""
        compared = setting != default and setting in means and default in means
        row["to default"] = f"{means[setting] - means[default]:+.1f}" if compared else ""
        row["paper, ImageNet"] = paper = paper_top1(group[0])
        same = scores and group[0].config["model"]["num_classes"] == 1000 and paper and "(" not in paper
        row["to paper"] = f"{means[setting] - float(paper):+.1f}" if same else ""
        speeds = [line["images_per_s"] for run in group for line in run.lines]
        row["images/s"] = f"{median(speeds):.0f}" if speeds else ""
        row["hours"] = f"{sum(line['seconds'] for run in group for line in run.lines) / 3600:.2f}"
        unfinished = len(group) - len(scores)
        row["runs"] = f"{len(scores)}, {unfinished} unfinished" if unfinished else f"{len(scores)}"
        rows.append(row)
    return rows


def as_text(rows: list[dict[str, str]], style: str) -> str:
    """The table as markdown, csv or latex."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    if style == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(cells)
        return buffer.getvalue()
    if style == "latex":
        body = [" & ".join(map(_in_latex, line)) + r" \\" for line in cells]
        begin = rf"\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}"
        rules = [begin, r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
        return "\n".join([*rules, r"\end{tabular}", ""])
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in cells]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(cells[0]) - 1), *lines[1:], ""])


def _in_latex(cell: str) -> str:
    """A cell with a minus for a minus, and LaTeX's own characters as themselves."""
    if cell[:1] in ("+", "-"):
        return f"${cell}$"
    return "".join(
        LATEX.get(character, rf"\{character}" if character in "&%$#_{}" else character) for character in cell
    )


def read_predictions(path: Path) -> dict[str, bool]:
    """{image: whether the model was right}.

    Raises:
        ValueError: there is no such file, or eval.py did not write it.
    """
    file = path / "predictions.csv" if path.is_dir() else path
    if not file.is_file():
        command = f"""python eval.py "checkpoint='{path}'" "predictions='{file}'\""""
        raise ValueError(f"{file} does not exist; write it with: {command}")
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as opened:
        rows = csv.DictReader(opened)
        if not {"path", "correct"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{file} is not a file that eval.py predictions= wrote")
        return {row["path"]: row["correct"] == "1" for row in rows}


def compare(a: Path, b: Path) -> str:
    """McNemar's exact test: do the two models differ more than chance among the images that one alone gets right?"""
    from scipy.stats import binomtest

    first, second = read_predictions(a), read_predictions(b)
    if first.keys() != second.keys():
        raise ValueError(f"{a} and {b} are about different images; evaluate both on the same data set")
    only_a = sum(first[i] and not second[i] for i in first)
    only_b = sum(second[i] and not first[i] for i in first)
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    share = [100 * sum(right.values()) / len(right) for right in (first, second)]
    return (
        f"A {share[0]:.2f} %, B {share[1]:.2f} % of {len(first)} images; right in A alone {only_a}, "
        f"in B alone {only_b}; McNemar, exact: p = {p:.3g}"
    )


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="run folders, or folders of runs")
    parser.add_argument("--format", choices=("markdown", "csv", "latex"), default="markdown")
    parser.add_argument("--out", type=Path, help="file to write (default: print)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("RUN_A", "RUN_B"))
    arguments = parser.parse_args()
    if not arguments.folders and not arguments.compare:
        parser.error("give run folders, or --compare RUN_A RUN_B")
    try:
        parts = [as_text(table(find_runs(arguments.folders)), arguments.format)] if arguments.folders else []
        parts += [compare(*arguments.compare) + "\n"] if arguments.compare else []
    except ValueError as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join(parts))
    print(arguments.out or "\n".join(parts), end="\n" if arguments.out else "")


if __name__ == "__main__":
    main()
