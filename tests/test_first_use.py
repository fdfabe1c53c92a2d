"""The first hour: folders as archives leave them, other settings under an old name, patterns of the shell."""

import shutil
from pathlib import Path

import pytest
import torch
from programs import Finished, in_process, python
from reliability import train_here, write_images

from involution.engine.class_map import _words
from involution.engine.pictures import find_images

SHORT = ["train.max_steps=3", "train.ema_decay=null", "data.loader=torch", "data.workers=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "blobs")


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    finished = train_here(folder, images, *SHORT)
    assert finished.status == 0, finished.stderr
    return folder


def refused(finished: Finished, message: str) -> None:
    assert finished.status == 2, finished.stderr
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_log_says_what_was_found_and_what_was_missed(images: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    shutil.copytree(images, some)
    shutil.rmtree(some / "val" / "c")
    finished = train_here(tmp_path / "run", some, *SHORT, "train.max_steps=1")
    assert finished.status == 0, finished.stderr
    log = (tmp_path / "run" / "train.log").read_text()
    for message in (
        "45 samples to train on, 12 to validate, 3 classes: a, b, c",
        "val has no images of 1 of the 3 classes: c",  # from before there was a log
    ):
        assert message in log
        assert message in finished.stderr
    assert "HYDRA" not in finished.stdout


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("train.precision=bf16", "train.precision"),
        ("data.val_size=24", "data.val_size"),
        ("train.max_steps=2", "train.max_steps"),
    ],
)
def test_an_ended_run_is_not_the_result_of_other_settings(run: Path, images: Path, change: str, key: str) -> None:
    files = [run / name for name in ("config.yaml", "summary.json", "metrics.jsonl", "environment.json")]
    before = [path.read_bytes() for path in files]
    finished = train_here(run, images, *SHORT, change)
    refused(finished, "this run has gone on past its new end" if key == "train.max_steps" else "this run has ended")
    assert f"{key} was" in finished.stderr
    assert [path.read_bytes() for path in files] == before


def test_an_ended_run_is_returned_for_what_changes_nothing(run: Path, images: Path) -> None:
    config = (run / "config.yaml").read_bytes()
    finished = train_here(run, images, *SHORT, "train.log_every_steps=2", "data.workers=1")
    assert finished.status == 0, finished.stderr
    assert finished.result["steps"] == 3
    assert (run / "config.yaml").read_bytes() == config


def test_a_folder_one_level_too_deep(images: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(images / split, tmp_path / "deep" / split / "images")
    finished = train_here(tmp_path / "run", tmp_path / "deep", *SHORT)
    refused(finished, "train/images/a is one level too deep")


def test_evaluating_pictures_without_a_training_split(run: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    shutil.copytree(images / "val", tmp_path / "alone" / "val")
    shutil.rmtree(tmp_path / "alone" / "val" / "a")  # numbered by the checkpoint, not by what is there
    whole, alone = (
        in_process("eval.py", f"checkpoint={run}", "device=cpu", f"data.root={root}", "per_class=true")
        for root in (images, tmp_path / "alone")
    )
    assert alone.status == 0, alone.stderr
    assert (whole.result["n"], alone.result["n"]) == (18, 12)
    for name in "bc":
        assert alone.result["classes"][name] == whole.result["classes"][name]
    assert alone.result["classes"]["a"] == {"top1": None, "n": 0}
    mean = sum(each["top1"] * each["n"] for each in whole.result["classes"].values()) / 18
    assert mean == pytest.approx(whole.result["top1"])
    (images / "val").rename(images / "valid")
    try:
        refused(train_here(tmp_path / "run", images, *SHORT), "has no folder val, and valid should be called so")
    finally:
        (images / "valid").rename(images / "val")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=demo", "schedule.min_lr=5"], "schedule.min_lr=5 should be at most optimizer.lr=0.02"),
        (["recipe=demo", "schedule=step", "schedule.milestones=[-1]"], "it should be a list of epochs"),
        (["recipe=demo", "schedule.warmup_steps=2.5"], "schedule.warmup_steps=2.5 should be a whole number"),
        (["recipe=demo", "optimizer=adamw", "optimizer.lr=1e-3", "optimizer.betas=[0.9]"], "list index out of range"),
        (["device=gpu"], "did you mean cuda?"),
        (["recipe=demo_detection", "model.backbone.name=convnext_tiny"], "unknown backbone.name 'convnext_tiny'"),
        (["recipe=demo", "data.mean=0.5"], "data.mean: it should be a list, as in [0.5,0.5,0.5]"),
        (["recipe=finetune", "checkpoint=true", "data.root=IMAGES"], "true is no file of weights"),
    ],
)  # fmt: skip
def test_values_that_cannot_work(arguments: list[str], message: str, images: Path, tmp_path: Path) -> None:
    given = [argument.replace("IMAGES", str(images)) for argument in arguments]
    refused(in_process("train.py", *given, "device=cpu" if "device=gpu" not in given else "seed=0",
                       f"output_root={tmp_path}"), message)  # fmt: skip


def test_a_recipes_learning_rate_under_another_optimizer_is_remarked(tmp_path: Path) -> None:
    words = ["recipe=demo", "optimizer=adamw", "train.max_steps=1", "train.epochs=1", "schedule.warmup_epochs=15"]
    for rate in ([], ["optimizer.lr=1e-3", "train.resume=never"]):
        finished = in_process("train.py", *words, *rate, "device=cpu", f"output_root={tmp_path}")
        assert finished.status == 0, finished.stderr
        assert "optimizer.lr is never reached" in finished.stderr
        remark = (
            "recipe=demo has optimizer.lr=0.02, which is for optimizer=sgd; adamw's usual one is optimizer.lr=0.001"
        )
        assert (remark in finished.stderr) == (not rate)


def test_a_runs_folder_is_taken_wherever_a_checkpoint_is(run: Path, images: Path, tmp_path: Path) -> None:
    forked = train_here(tmp_path / "fork", images, *SHORT, "train.max_steps=4", f"train.resume={run}")
    assert forked.status == 0, forked.stderr
    assert forked.result["steps"] == 4
    found = in_process("eval.py", f"checkpoint={run}/checkpoints", "device=cpu")
    assert found.result["n"] == 18, found.stderr
    refused(in_process("eval.py", "checkpoint=[]", "device=cpu"), "checkpoint is empty")
    sizes = ["data.train_size=32", "data.val_size=32", "data.val_resize=32", f"data.root={images}"]
    tune = ["recipe=finetune", "model=rednet26", "train.epochs=1", "train.max_steps=1", "device=cpu", *sizes]
    for spelt in (run, f"{run}/", run / "checkpoints" / ".."):
        tuned = in_process("train.py", *tune, f"checkpoint={spelt}", f"output_root={tmp_path}", "name=tuned")
        assert tuned.status == 0, tuned.stderr


def test_patterns_of_pictures(images: Path) -> None:
    assert find_images(str(images / "val" / "*" / "0.jpg")) == [images / "val" / name / "0.jpg" for name in "abc"]
    assert len(find_images(str(images / "**" / "1.jpg"))) == 6
    with pytest.raises(ValueError, match="nothing matches"):
        find_images(str(images / "*.png"))


def test_class_names_with_blanks_in_a_map() -> None:
    known = {"great white shark": 0, "hen, a": 1, "7": 7}
    assert _words("great white shark", known) == ["great white shark"]
    assert _words("hen, a\n", known) == ["hen, a"]
    assert _words("n0149\tgreat white shark\then, a", known) == ["n0149", "great white shark", "hen, a"]
    assert _words("n0149 7, 3  # a remark", known) == ["n0149", "7", "3"]


def test_a_program_takes_the_pictures_that_the_model_was_trained_on(run: Path, tmp_path: Path) -> None:
    finished = in_process("scripts/export.py", str(run), str(tmp_path / "model.pt2"), "--format", "torch")
    assert finished.status == 0, finished.stderr
    assert "for images of 32 pixels a side" in finished.stderr
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert program(torch.randn(3, 3, 32, 32)).shape == (3, 3)


def test_the_soak_test_starts() -> None:
    assert "--hits" in python("scripts/soak.py", "--help").stdout
