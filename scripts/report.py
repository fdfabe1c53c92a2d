"""Write the table of a study from its run folders: one row a setting, averaged over seeds.

    python scripts/report.py runs/study                                  every run below it, as Markdown
    python scripts/report.py runs/study --format latex --out table.tex   (booktabs); also csv
    python scripts/report.py --compare RUN_A RUN_B                       McNemar's test on the same images
    python scripts/report.py --compare runs/rednet26 runs/resnet26       the same, seed by seed, and all seeds together

Runs of detectors and segmentors make a table in the form of the paper's Table 3 (dense_report.py), others this one:
Top-1 is that of the last epoch. "To default" is the difference to the same model (for a ResNet the RedNet of its depth)
and stem with nothing else changed. The paper's figures (docs/paper) and the difference to them are for ImageNet.
--compare takes what `eval.py checkpoint=RUN predictions=RUN/predictions.csv` writes, folders with a predictions.csv, or
folders of such folders, paired in the order of their names.
"""

import argparse
import csv
import io
import re
import sys
from pathlib import Path
from statistics import mean, median, stdev

import dense_report
from model_table import ABLATIONS, ATTENTION, PAPER
from run_folders import Run, find_runs, settings

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def default_of(run: Run) -> str:
    """The setting that `run` is compared with."""
    stem = run.options.get("stem")
    name = re.sub("^resnet", "rednet", run.config["model"]["name"])
    return f"{name} stem={stem}" if stem else name


def paper_top1(run: Run) -> str:
    """The paper's ImageNet top-1 of this setting; Table 6 is about RedNet-50 with the convolution stem."""
    name, options = run.config["model"]["name"], dict(run.options)
    if not options:
        with open(PAPER / "table1_classification.csv", newline="") as file:
            rows = {row["architecture"].lower().replace("-", ""): row["top1"] for row in csv.DictReader(file)}
        return rows.get(ATTENTION.get(name, (name,))[0].lower().replace("-", ""), "")
    if options.pop("stem", None) != "convolution":
        return ""
    with open(PAPER / "table6_ablation.csv", newline="") as file:
        for row in csv.DictReader(file):
            if ABLATIONS[row["study"], row["setting"]] == options:
                return row["top1"] + ("" if name == "rednet50" else " (RedNet-50)")
    return ""


def table(runs: list[Run]) -> list[dict[str, str]]:
    """The rows of the report.

    Raises:
        ValueError: classifiers and dense models together.
    """
    if all(run.is_dense for run in runs):
        return dense_report.table(runs)
    if any(run.is_dense for run in runs):
        raise ValueError("classifiers and detectors or segmentors have no scores in common; report them one by one")
    groups = settings(runs)
    tops = {
        k: [top for r in group if r.finished and (top := r.score("top1")) is not None] for k, group in groups.items()
    }
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


def find_predictions(place: Path) -> list[Path]:
    """The file itself, the folder's predictions.csv, or all that lie below it.

    Raises:
        ValueError: there are none.
    """
    file = place / "predictions.csv" if place.is_dir() else place
    files = [file] if file.is_file() else sorted(place.rglob("predictions.csv"))
    if not files:
        command = f"""python eval.py "checkpoint='{place}'" "predictions='{file}'\""""
        raise ValueError(f"{file} does not exist; write it with: {command}")
    return files


def read_predictions(file: Path) -> dict[str, bool]:
    """{image: whether the model was right}.

    Raises:
        ValueError: eval.py did not write it.
    """
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as opened:
        rows = csv.DictReader(opened)
        if not {"path", "correct"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{file} is not a file that eval.py predictions= wrote")
        return {row["path"]: row["correct"] == "1" for row in rows}


def compare(a: Path, b: Path) -> str:
    """McNemar's exact test of each pair of runs, and with several pairs the mean difference and how sure it is.

    Raises:
        ValueError: predictions are missing, about different images, or not as many of the one as of the other.
    """
    files = [find_predictions(place) for place in (a, b)]
    if len(files[0]) != len(files[1]):
        raise ValueError(f"{a} has {len(files[0])} runs with predictions and {b} {len(files[1])}; pairs need as many")
    first, second = ([read_predictions(file) for file in found] for found in files)
    images = list(first[0])
    if any(found.keys() != first[0].keys() for found in first + second):
        raise ValueError(f"{a} and {b} are about different images; evaluate both on the same data set")
    lines = [compare_two(x, y) for x, y in zip(first, second, strict=True)]
    if len(lines) > 1:
        runs = [100 * (sum(y.values()) - sum(x.values())) / len(images) for x, y in zip(first, second, strict=True)]
        each = [100 * mean(y[i] - x[i] for x, y in zip(first, second, strict=True)) for i in images]
        low, high = interval(runs)
        lines.append(f"B - A, {len(runs)} pairs of runs: {mean(runs):+.2f} points, 95 % [{low:+.2f}, {high:+.2f}] (t)")
        low, high = interval(each)
        lines.append(f"the same runs, other images like these: 95 % [{low:+.2f}, {high:+.2f}]")
    return "\n".join(lines)


def compare_two(first: dict[str, bool], second: dict[str, bool]) -> str:
    """McNemar's exact test: do the two models differ more than chance among the images that one alone gets right?"""
    from scipy.stats import binomtest

    only_a = sum(first[i] and not second[i] for i in first)
    only_b = sum(second[i] and not first[i] for i in first)
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    share = [100 * sum(right.values()) / len(right) for right in (first, second)]
    return (
        f"A {share[0]:.2f} %, B {share[1]:.2f} % of {len(first)} images; right in A alone {only_a}, "
        f"in B alone {only_b}; McNemar, exact: p = {p:.3g}"
    )


def interval(values: list[float]) -> tuple[float, float]:
    """Where the mean lies with 95 % confidence, by Student's t."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


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
