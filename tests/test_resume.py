"""Killed, stopped or moved to other ranks, a run of the real train.py ends as if nothing had happened."""

import os
import random
import re
import shutil
import signal
import time

import pytest
import torch
from programs import finish, in_process, kill, start
from reliability import (
    STEPS,
    command,
    lines,
    outcome,
    rank_pid,
    saved_step,
    start_ranks,
    train,
    train_here,
    wait_until,
    write_images,
)  # fmt: skip

from involution.weights.run_file import read

SETTINGS = [(1, "torch"), (2, "dali")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "blobs")


@pytest.fixture(scope="module")
def untouched(images, tmp_path_factory):
    """{(ranks, loader): folder} of runs that nothing happens to; they keep every checkpoint."""
    found = {}

    def run(ranks, loader):
        if (ranks, loader) not in found:
            if loader == "dali":
                pytest.importorskip("nvidia.dali", reason="DALI is not installed")
            folder = tmp_path_factory.mktemp("untouched") / "run"
            finished = train(folder, images, f"data.loader={loader}", "train.keep_checkpoints=20", ranks=ranks)
            assert finished.status == 0, finished.stderr
            assert [line["step"] for line in lines(folder)] == [3, 6, 9, 12, 15]
            found[ranks, loader] = folder
        return found[ranks, loader]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "loader"), SETTINGS)
def test_killed_and_stopped_again_and_again_the_run_ends_bit_equal(untouched, images, tmp_path, ranks, loader):
    dice = random.Random(ranks)
    expected = outcome(untouched(ranks, loader))
    # checkpoints between the steps of the untouched run, and as often as they can be written
    words = command(tmp_path / "run", images, f"data.loader={loader}", "train.checkpoint_every_minutes=0", ranks=ranks)
    for step in (1, 5):
        process = start(words)
        wait_until(lambda step=step: saved_step(tmp_path / "run") >= step, process)
        time.sleep(dice.uniform(0, 0.5))
        kill(process)
    process = start(words)
    wait_until(lambda: saved_step(tmp_path / "run") >= 10, process)
    os.kill(rank_pid(process, 1) if ranks > 1 else process.pid, signal.SIGTERM)
    finished = finish(process)
    assert finished.status == (75 if ranks == 1 else 1)  # torchrun has a status of its own
    assert "the state is saved" in finished.stderr
    assert 10 <= read(tmp_path / "run" / "checkpoints" / "last.pt")["step"] < STEPS
    finished = finish(start(words))
    assert finished.status == 0, finished.stderr
    assert outcome(tmp_path / "run") == expected


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_ranks(images, tmp_path):
    """From the same step on, the same images make up each step: losses and weights agree but for rounding. From one
    rank to two: test_recipes.py."""
    shared = ["train.global_batch_size=12", "train.batch_size=2", "train.max_steps=4", "data.loader=torch"]
    reference = train(tmp_path / "reference", images, *shared, ranks=2)
    assert reference.status == 0, reference.stderr
    before = tmp_path / "reference" / "checkpoints" / "step-00000002.pt"
    continued = train_here(tmp_path / "run", images, *shared, f"train.resume={before}")
    assert continued.status == 0, continued.stderr
    (expected,), (line,) = lines(tmp_path / "reference"), lines(tmp_path / "run")
    assert line["step"] == expected["step"] == 4
    assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
    own = ("running_mean", "running_var", "num_batches_tracked")  # of the batches that rank 0 saw itself
    weights, wanted = (
        {
            key: value
            for key, value in read(tmp_path / run / "checkpoints" / "last.pt")["model"].items()
            if not key.endswith(own)
        }
        for run in ("run", "reference")
    )
    torch.testing.assert_close(weights, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_that_is_made_shorter_ends_with_the_scores_of_its_end(images, tmp_path):
    """It stood between two evaluations."""
    shared = ["data.loader=torch", "train.evaluate_every_epochs=2", "train.keep_checkpoints=20"]
    assert train_here(tmp_path / "long", images, *shared, "train.max_steps=6").status == 0
    between = tmp_path / "long" / "checkpoints" / "step-00000003.pt"
    ended = train_here(tmp_path / "short", images, *shared, f"train.resume={between}", "train.max_steps=3")
    assert ended.status == 0, ended.stderr
    evaluated = in_process("eval.py", f"checkpoint={between}", "device=cpu")
    assert ended.result["val_top1"] == pytest.approx(evaluated.result["top1"])
    before = (tmp_path / "long" / "config.yaml").read_bytes()
    other = train_here(tmp_path / "long", images, *shared, "train.max_steps=6", "train.label_smoothing=0.2")
    assert other.status == 2, other.stderr
    assert "this run has ended, with other settings: train.label_smoothing was 0.1, is 0.2" in other.stderr
    assert (tmp_path / "long" / "config.yaml").read_bytes() == before


@pytest.mark.slow
def test_torchrun_restarts_ranks_that_die_and_they_resume_by_themselves(untouched, images, tmp_path):
    overrides = ["data.loader=dali", "train.resume=never"]  # which only the first start is to obey
    process = start(command(tmp_path / "run", images, *overrides, ranks=2, restarts=2))
    wait_until(lambda: saved_step(tmp_path / "run") >= 4, process)
    os.kill(rank_pid(process, 1), signal.SIGKILL)
    finished = finish(process)
    assert finished.status == 0, finished.stderr
    assert "going on from" in finished.stderr
    assert outcome(tmp_path / "run") == outcome(untouched(2, "dali"))


@pytest.mark.slow
def test_a_signal_to_one_rank_during_evaluation_stops_all_with_status_75(tmp_path):
    """Signals of all kinds: test_signals.py."""
    images = write_images(tmp_path / "images", val=900)
    overrides = ["train.max_steps=1", "train.checkpoint_every_steps=1", "data.loader=torch"]
    words = command(tmp_path / "run", images, *overrides)
    ranks = start_ranks([words, words])
    wait_until(lambda: saved_step(tmp_path / "run") == 1, ranks[0])  # saved between the step and the evaluation
    time.sleep(0.5)
    ranks[1].send_signal(signal.SIGINT)
    ended = [finish(rank) for rank in ranks]
    assert [each.status for each in ended] == [75, 75], ended
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # it was in the evaluation
    finished = finish(start(words))
    assert finished.status == 0, finished.stderr
    assert [line["step"] for line in lines(tmp_path / "run")] == [1]


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(images, tmp_path):
    """The first one waits for a step that takes long, as it accumulates many micro-batches of large pictures."""
    overrides = ["train.batch_size=2", "train.global_batch_size=44", "data.train_size=128", "data.loader=torch"]
    process = start(command(tmp_path / "run", images, *overrides, "train.checkpoint_every_steps=1"))
    wait_until(lambda: saved_step(tmp_path / "run") >= 1, process)  # after it looked for a stop: the next step is on
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "finishing the step" in _log(tmp_path / "run"), process)
    process.send_signal(signal.SIGINT)
    finished = finish(process)
    assert finished.status == 1
    assert re.search(r"^interrupted$", finished.stderr, re.MULTILINE), finished.stderr


def _log(run):
    path = run / "train.log"
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_damaged_checkpoints_are_reported_and_the_newest_whole_one_used(untouched, images, tmp_path):
    reference = untouched(1, "torch")
    shutil.copytree(reference, tmp_path / "run", symlinks=True)
    folder = tmp_path / "run" / "checkpoints"
    newest = sorted(folder.glob("step-*.pt"))[::-1]
    os.truncate(folder / "last.pt", 0)
    os.truncate(newest[0], newest[0].stat().st_size // 2)
    content = bytearray(newest[1].read_bytes())
    content[len(content) // 2] ^= 4
    newest[1].write_bytes(content)
    finished = train(tmp_path / "run", images, "data.loader=torch", "train.keep_checkpoints=20")
    assert finished.status == 0, finished.stderr
    for path in (folder / "last.pt", newest[0], newest[1]):
        assert re.search(rf"{path}.*trying the one before it", finished.stderr), finished.stderr
    assert f"going on from {newest[2]}" in finished.stderr
    assert outcome(tmp_path / "run") == outcome(reference)
