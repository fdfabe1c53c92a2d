"""The real train.py and eval.py on real images, as a user runs them."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from programs import Finished, in_process, python, torchrun

from data import dali_installed

TINY = ["recipe=demo", "device=cpu", "train.max_steps=4", "train.log_every_steps=2", "train.label_smoothing=0.1"]


def train(root: Path, *overrides: str) -> Finished:
    compiled = "train.compile=true" in overrides  # what dynamo has compiled stays with a process
    return (python if compiled else in_process)("train.py", *TINY, f"output_root={root}", *overrides)


def evaluate(*arguments: str, ranks: int = 1) -> dict:
    arguments = ("eval.py", "device=cpu", *arguments)
    finished = torchrun(ranks, *arguments) if ranks > 1 else in_process(*arguments)
    assert finished.status == 0, finished.stderr
    return finished.result


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run: 4 steps over the digits, with the torch loader. Its name looks like a number, and stays a name."""
    root = tmp_path_factory.mktemp("runs")
    finished = train(root, "name=2024_01_02", "data.loader=torch")
    assert finished.status == 0, finished.stderr
    folder = root / "2024_01_02"
    summary = json.loads((folder / "summary.json").read_text())
    assert min(summary.pop("images_per_s"), summary.pop("peak_memory_mb")) > 0
    assert finished.result == summary
    assert set(finished.result) == {"run_dir", "epochs", "steps", "val_top1", "val_top5", "best_top1"}
    assert finished.result["run_dir"] == str(folder)
    assert finished.result["steps"] == 4
    return folder


def test_the_run_folder_holds_what_the_design_promises(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["train"]["max_steps"] == 4
    assert config["model"]["num_classes"] == 10
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert "rednet26" in (run / "train.log").read_text()
    (line,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = "epoch step lr train_loss val_loss val_top1 val_top5 images_per_s data_wait seconds peak_memory_mb"
    assert set(expected.split()) <= set(line)
    assert 0 <= line["data_wait"] <= 1
    assert line["step"] == 4
    assert list((run / "tensorboard").iterdir())
    assert {"last.pt", "best.pt"} <= {path.name for path in (run / "checkpoints").iterdir()}


def test_tensorboard_has_the_scalars_and_the_configuration(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/lr", "epoch/val_top1", "epoch/train_loss"} <= set(events.Tags()["scalars"])
    assert any("config" in tag for tag in events.Tags()["tensors"])


def test_starting_a_finished_run_again_trains_nothing(run):
    before = (run / "metrics.jsonl").read_text()
    finished = train(run.parent, "name=2024_01_02", "data.loader=torch")
    assert finished.status == 0, finished.stderr
    assert finished.result["steps"] == 4
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(("ranks", "loader"), [(1, "torch"), (2, "dali" if dali_installed() else "torch")])
def test_evaluation_is_the_same_for_any_number_of_ranks_and_either_loader(run, ranks, loader):
    recorded = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    result = evaluate(f"checkpoint={run}/checkpoints/last.pt", f"data.loader={loader}", "batch_size=100", ranks=ranks)
    assert set(result) == {"checkpoint", "top1", "top5", "loss", "n"}
    assert result["n"] == 355
    assert result["top1"] == pytest.approx(recorded["val_top1"], abs=1e-6)
    assert result["loss"] == pytest.approx(recorded["val_loss"], rel=1e-4)


def test_eval_takes_a_run_folder_and_its_best_checkpoint(run, tmp_path):
    """Named as sweeps name theirs, and typed without quotes."""
    folder = tmp_path / "model.kernel_size=3,seed=0"
    folder.symlink_to(run)
    assert evaluate(f"checkpoint={folder}", "data.loader=torch")["n"] == 355


def test_eval_takes_weights_alone_in_the_released_layout(run, tmp_path):
    from involution.weights import to_released
    from involution.weights.run_file import best_weights, read

    recorded = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    released = tmp_path / "released.pth"
    torch.save({"state_dict": to_released(best_weights(read(run / "checkpoints" / "last.pt")))}, released)
    assert evaluate(f"checkpoint={released}", "data=demo")["top1"] == pytest.approx(recorded["val_top1"], abs=0.3)
    refused = in_process("eval.py", f"checkpoint={released}")
    assert refused.status == 2
    assert "say what to evaluate on" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=nowhere.pt"], "there is no file nowhere.pt"),
        (["checkpoint=README.md"], "README.md cannot be read as weights"),
        ([], "checkpoint is not set; give it as checkpoint=PATH (a run's folder, a file, or rednet50)"),
        (["checkpoint={run}", "model=rednet26"], "there is no key model; the checkpoint tells the model and how it"),
        (["checkpoint={run}", "recipe=demo"], "there is no key recipe; the checkpoint tells the model and how it"),
        (["checkpoint={run},{run}"], "a list is 'checkpoint=[{run},{run}]'"),
        (["checkpoint={run}", "data=folder", "data.root={run}"], "has no folder train; expected"),
        (["checkpoint={run}", "data=folder"], "set data.root"),
        (["checkpoint={run}", "data.val_sise=3"], "did you mean data.val_size?"),
    ],
)
def test_wrong_input_to_eval(run, arguments, message):
    finished = in_process("eval.py", *(argument.format(run=run) for argument in arguments))
    assert finished.status == 2, finished.stderr
    assert message.format(run=run) in finished.stderr
    assert "Traceback" not in finished.stderr


def test_ranks_share_the_recipes_batch_train_one_model_and_write_one_run(tmp_path):
    words = [*TINY, f"output_root={tmp_path}", "name=all", "train.max_steps=1", "data.loader=torch", "data.workers=0"]
    finished = torchrun(4, "train.py", *words)
    assert finished.status == 0, finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["all"]
    assert len((tmp_path / "all" / "metrics.jsonl").read_text().splitlines()) == 1
    assert yaml.safe_load((tmp_path / "all" / "config.yaml").read_text())["train"]["batch_size"] == 8
    assert "train.batch_size=8, not 32, so that" in (tmp_path / "all" / "train.log").read_text()
    assert len([line for line in finished.stdout.splitlines() if line.startswith("{")]) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.precision=bf16", "train.ema_decay=0.9", "train.clip_grad_norm=1", "model=resnet26"],
        ["train.precision=fp16", "train.channels_last=false", "train.exclude_from_decay=norm_and_bias"],
        ["optimizer=adamw", "schedule=step", "train.batchnorm_size=8", "data.loader=torch", "data.workers=0"],
        ["model.kernel_generation=linear", "model.group_channels=null", "model.stem=convolution"],
        ["train.compile=true", "train.max_steps=2", "model=resnet26"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_switch_trains_and_its_checkpoint_evaluates(tmp_path, overrides):
    finished = train(tmp_path, "name=a", *overrides)
    assert finished.status == 0, finished.stderr
    (line,) = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(line["train_loss"])
    assert line["skipped_steps"] == 0 or "train.precision=fp16" in overrides  # which looks for its scale
    result = evaluate(f"checkpoint={tmp_path}/a")
    assert result["n"] == 355


def test_rednet_learns_on_photos(tmp_path, imagenette):
    finished = in_process(
        "train.py", "recipe=demo", "data=imagenette", f"data.root={imagenette}", "device=cpu",
        "data.train_size=64", "data.val_size=64", "data.val_resize=73", f"output_root={tmp_path}", "name=photos",
        "train.max_steps=60", "optimizer.lr=0.02", "schedule.warmup_epochs=0.1",
    )  # fmt: skip
    assert finished.status == 0, finished.stderr
    assert finished.result["val_top1"] > 15  # chance is 10
