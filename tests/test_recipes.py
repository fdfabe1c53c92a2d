"""All that recipes of today switch on, at once: killed and resumed to the bit, moved to another number of ranks."""

import pytest
import torch
from programs import finish, start
from reliability import command, kill, lines, outcome, saved_step, train, wait_until, write_images

from involution.weights.run_file import read

EVERYTHING = [
    "recipe=rsb_a1", "model.drop_path_rate=0", "optimizer.lr=0.002", "schedule.warmup_epochs=0",
    "train.layer_decay=0.9", "augmentation.erasing=0.5", "augmentation.color_jitter=0.4", "train.max_steps=4",
    "train.checkpoint_every_steps=1", "train.keep_checkpoints=9",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "blobs")


@pytest.fixture(scope="module")
def untouched(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untouched") / "run"
    finished = train(folder, images, *EVERYTHING)
    assert finished.status == 0, finished.stderr
    return folder


@pytest.mark.slow
def test_killed_and_resumed_the_run_ends_bit_equal(untouched, images, tmp_path):
    words = command(tmp_path / "run", images, *EVERYTHING)
    process = start(words)
    wait_until(lambda: saved_step(tmp_path / "run") >= 1, process)
    kill(process)
    assert saved_step(tmp_path / "run") < 4
    finished = finish(start(words))
    assert finished.status == 0, finished.stderr
    assert outcome(tmp_path / "run") == outcome(untouched)


@pytest.mark.slow
def test_two_ranks_go_on_with_the_same_pictures(untouched, images, tmp_path):
    before = untouched / "checkpoints" / "step-00000003.pt"
    finished = train(tmp_path / "run", images, *EVERYTHING, f"train.resume={before}", ranks=2)
    assert finished.status == 0, finished.stderr
    assert lines(tmp_path / "run")[-1]["train_loss"] == pytest.approx(lines(untouched)[-1]["train_loss"], rel=1e-4)
    moved, wanted = (read(run / "checkpoints" / "last.pt")["model"] for run in (tmp_path / "run", untouched))
    own = ("running_mean", "running_var", "num_batches_tracked")  # of the batches that rank 0 saw itself
    for key in wanted:
        if not key.endswith(own):
            torch.testing.assert_close(moved[key], wanted[key], rtol=1e-3, atol=1e-4)
