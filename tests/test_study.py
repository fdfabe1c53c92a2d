"""A small sweep with the real train.py, and what is made of it: report, comparison, figures, TensorBoard."""

import csv
import shutil

import pytest
import yaml
from PIL import Image
from programs import ROOT, in_process, python, torchrun

JOBS = ["model.kernel_size=3,7", "seed=0,1"]
TINY = ["recipe=demo", "device=cpu", "data.workers=1", "train.max_steps=2", "train.log_every_steps=1"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a 2 x 2 sweep; in every job's folder predictions.csv would lie, here those of one job."""
    folder = tmp_path_factory.mktemp("study") / "sweep"
    finished = python("train.py", "-m", *TINY, *JOBS, f"output_root={folder.parent}", f"name={folder.name}")
    assert finished.status == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def jobs(study):
    found = sorted(path.parent for path in study.rglob("config.yaml"))
    assert len(found) == 4
    return found


@pytest.fixture(scope="module")
def predictions(jobs):
    """Of the first and of the last job, by two ranks and by one."""
    for run, program in ((jobs[0], lambda *words: torchrun(2, *words)), (jobs[-1], in_process)):
        finished = program("eval.py", f"checkpoint='{run}'", "batch_size=50", f"predictions='{run}/predictions.csv'")
        assert finished.status == 0, finished.stderr
        (run / "top1").write_text(str(finished.result["top1"]))
    return jobs[0], jobs[-1]


def test_predictions_have_each_image_once(predictions):
    for run in predictions:
        with open(run / "predictions.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["index"]) for row in rows] == list(range(355))
        assert len({row["path"] for row in rows}) == 355
        assert all(row["path"].startswith(f"val/{row['target']}/") for row in rows)
        assert [int(row["correct"]) for row in rows] == [int(row["predicted"] == row["target"]) for row in rows]
        top1 = float((run / "top1").read_text())
        assert 100 * sum(int(row["correct"]) for row in rows) / 355 == pytest.approx(top1)


def test_predictions_need_a_place(jobs):
    refused = in_process("eval.py", f"checkpoint='{jobs[0]}'", "predictions=nowhere/a.csv")
    assert refused.status == 2
    assert "there is no folder nowhere" in refused.stderr


def test_the_report_averages_seeds_and_marks_unfinished_runs(study, jobs, tmp_path):
    folder = shutil.copytree(study, tmp_path / "sweep")
    (folder / jobs[-1].name / "summary.json").unlink()
    saved = folder / jobs[0].name / "config.yaml"  # where a seed ran makes it no other setting
    saved.write_text(saved.read_text().replace("workers: 1\n", "workers: 4\n").replace("loader: ", "loader: other-"))
    finished = in_process("scripts/report.py", str(folder), "--format", "csv", "--out", str(tmp_path / "table.csv"))
    assert finished.status == 0, finished.stderr
    with open(tmp_path / "table.csv", newline="") as file:
        three, seven = csv.DictReader(file)
    assert (three["setting"], seven["setting"]) == ("rednet26 kernel_size=3", "rednet26")
    assert (three["runs"], seven["runs"]) == ("2", "1, 1 unfinished")
    assert three["deviation"]
    assert float(three["to default"]) == pytest.approx(float(three["top-1 (%)"]) - float(seven["top-1 (%)"]), abs=0.11)
    assert (three["paper, ImageNet"], seven["paper, ImageNet"]) == ("", "75.9")
    assert seven["to paper"] == ""  # digits are not ImageNet
    assert float(seven["parameters (M)"]) == pytest.approx(7.20, abs=0.01)
    for style, beginning in (("markdown", "| setting |"), ("latex", r"\begin{tabular}")):
        finished = in_process("scripts/report.py", str(study), "--format", style)
        assert finished.stdout.startswith(beginning), finished.stderr


def test_the_report_on_imagenet_has_the_difference_to_the_paper(study, tmp_path):
    for path in shutil.copytree(study, tmp_path / "sweep").glob("*/config.yaml"):
        path.write_text(path.read_text().replace("num_classes: 10\n", "num_classes: 1000\n"))
    finished = in_process("scripts/report.py", str(tmp_path / "sweep"), "--format", "csv")
    three, seven = csv.DictReader(finished.stdout.splitlines())
    assert three["to paper"] == ""  # the paper has no RedNet-26 with 3 x 3 kernels
    assert float(seven["to paper"]) == pytest.approx(float(seven["top-1 (%)"]) - 75.9, abs=0.11)
    assert float(seven["parameters (M)"]) == pytest.approx(9.23, abs=0.01)


def test_attention_networks_have_rows_and_points_too(jobs, tmp_path):
    """Two runs' models exchanged: their own options' defaults, their rows of Table 1, Figure 2."""
    models = {"standalone_resnet26": {}, "lrnet26": {"group_channels": 4}}
    for run, (name, options) in zip(jobs[:2], models.items(), strict=True):
        folder = shutil.copytree(run, tmp_path / "sweep" / name, ignore=shutil.ignore_patterns("checkpoints"))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        model = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())
        config["model"] = model | options | {"num_classes": 10}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    finished = in_process("scripts/report.py", str(tmp_path / "sweep"), "--format", "csv")
    assert finished.status == 0, finished.stderr
    rows = list(csv.DictReader(finished.stdout.splitlines()))
    assert [(row["setting"], row["paper, ImageNet"]) for row in rows] == [
        ("lrnet26 group_channels=4", ""),
        ("standalone_resnet26", "74.8"),
    ]
    finished = in_process("scripts/plot_accuracy.py", str(tmp_path / "sweep"), "--out", str(tmp_path / "a"))
    assert finished.status == 0, finished.stderr
    assert (tmp_path / "a.png").stat().st_size > 10**4


def test_latex_gets_its_own_characters_escaped(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from report import as_text

    rows = [{"setting": r"a_b & 5% {~^#$\}", "to default": "-0.1"}]
    assert as_text(rows, "latex").splitlines() == [
        r"\begin{tabular}{lr}", r"\toprule", r"setting & to default \\", r"\midrule",
        r"a\_b \& 5\% \{\textasciitilde{}\textasciicircum{}\#\$\textbackslash{}\} & $-0.1$ \\",
        r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "nothing does not exist"),
        ({}, "holds no runs"),
        ({"config.yaml": "a: 1"}, "not one that train.py wrote"),
        ({"config.yaml": "a: ["}, "is damaged"),
        ({"config.yaml": "a: 1", "metrics.jsonl": "{\n"}, "is damaged"),
    ],
)
def test_a_report_over_other_folders_says_so(tmp_path, content, message):
    folder = tmp_path / "nothing"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    refused = in_process("scripts/report.py", str(folder))
    assert refused.status == 2
    assert message in refused.stderr


def test_two_runs_are_compared_image_by_image(predictions, jobs):
    finished = in_process("scripts/report.py", "--compare", *map(str, predictions))
    assert finished.status == 0, finished.stderr
    assert "of 355 images" in finished.stdout
    assert "McNemar, exact: p = " in finished.stdout
    refused = in_process("scripts/report.py", "--compare", str(jobs[0]), str(jobs[1]))
    assert refused.status == 2
    assert f"""python eval.py "checkpoint='{jobs[1]}'" "predictions=""" in refused.stderr


def test_the_runs_of_two_settings_are_compared_pair_by_pair(tmp_path):
    right = {"a": ["1100", "1110"], "b": ["1110", "1111"], "c": ["1111"]}  # by run, four images each
    for setting, runs in right.items():
        for seed, images in enumerate(runs):
            folder = tmp_path / setting / f"seed{seed}"
            folder.mkdir(parents=True)
            rows = [f"{i}.jpg,{correct}" for i, correct in enumerate(images)]
            (folder / "predictions.csv").write_text("\n".join(["path,correct", *rows, ""]))
    finished = in_process("scripts/report.py", "--compare", str(tmp_path / "a"), str(tmp_path / "b"))
    lines = finished.stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("A 50.00 %, B 75.00 % of 4 images")
    assert lines[2] == "B - A, 2 pairs of runs: +25.00 points, 95 % [+25.00, +25.00] (t)"
    # of the images' differences 0, 0, 50 and 50: deviation 28.87, standard error 14.43, t of three degrees 3.182
    assert lines[3].endswith("95 % [-20.93, +70.93]")
    refused = in_process("scripts/report.py", "--compare", str(tmp_path / "a"), str(tmp_path / "c"))
    assert refused.status == 2
    assert "a has 2 runs with predictions" in refused.stderr


def test_figures_of_the_runs(study, tmp_path):
    for program, *words in (("plot_accuracy.py", "--out", "a"), ("plot_curves.py", "--mean", "--out", "b.png")):
        finished = in_process(f"scripts/{program}", str(study), *words[:-1], str(tmp_path / words[-1]))
        assert finished.status == 0, finished.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_figure_3_of_ones_own_pictures(jobs, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_text("no picture")

    def draw(*words):
        return in_process("scripts/visualize_kernels.py", str(jobs[0]), *words, "--out", str(tmp_path / "kernels"))

    finished = draw(str(tmp_path / "a.png"))
    assert finished.status == 0, finished.stderr
    assert "showing conv3_2" in finished.stderr
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "kernels.pdf").read_bytes().startswith(b"%PDF")
    for words, message in (
        ([str(tmp_path / "a.png"), "--layer", "conv9_1"], "this model has stem.conv2, conv2_1"),
        ([str(tmp_path / "b.jpg")], "b.jpg cannot be read as a picture"),
    ):
        refused = draw(*words)
        assert refused.status == 2
        assert message in refused.stderr


def test_tensorboard_has_figure_3_and_the_hyperparameters(jobs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    sizes = []
    for run in jobs:
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        (image,) = events.Images("kernels/conv3_2")
        assert (image.step, image.width, image.height) == (2, 9 * 33 - 1, 4 * 33 - 1)
        content = events.PluginTagToContent("hparams")[metadata.SESSION_START_INFO_TAG]
        values = metadata.parse_session_start_info_plugin_data(content).hparams
        sizes.append((values["model.kernel_size"].number_value, values["seed"].number_value))
        assert values["train.clip_grad_norm"].number_value == 5
        assert values["train.compile"].string_value == "false"
        assert "data.root" not in values
    assert sorted(sizes) == [(3, 0), (3, 1), (7, 0), (7, 1)]
