"""Full disks, checkpoints of others and numbers that go wrong, met by the real train.py."""

import os
import pickle
import re
import subprocess

import pytest
import torch
from programs import finish
from reliability import command, lines, outcome, saved_step, start_ranks, train, train_here, write_images

from data import Batch
from involution import create_model
from involution.engine.distributed import World
from involution.engine.learner import Learner
from involution.engine.options import TrainOptions
from involution.engine.tasks.classification import Classification
from involution.weights.run_file import read


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "blobs")


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system with room for two checkpoints of 60 MB, and a function that enlarges it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=400m", disk], check=True)
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(images, tmp_path, small_disk):
    disk, enlarge = small_disk
    overrides = ["train.ema_decay=null", "data.loader=torch", "train.max_steps=9"]
    finished = train(disk / "run", images, *overrides)
    assert finished.status == 1, finished.stderr
    assert "could not be written" in finished.stderr
    assert "No space left on device" in finished.stderr
    assert "The last good one is intact" in finished.stderr
    assert "Traceback" not in finished.stderr
    folder = disk / "run" / "checkpoints"
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    assert read(folder / "last.pt")["step"] == saved_step(disk / "run")
    enlarge()
    assert train(disk / "run", images, *overrides).status == 0
    assert train(tmp_path / "untouched", images, *overrides).status == 0
    assert outcome(disk / "run") == outcome(tmp_path / "untouched")


@pytest.mark.slow
def test_checkpoints_of_others_are_refused(images, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    (tmp_path / "attack.pt").write_bytes(pickle.dumps(Attack()))
    finished = train_here(tmp_path / "run", images, f"train.resume={tmp_path}/attack.pt")
    assert finished.status == 2, finished.stderr
    assert "cannot be read as a checkpoint" in finished.stderr
    assert not (tmp_path / "owned").exists()

    done = train_here(tmp_path / "run", images, "train.max_steps=3", "train.checkpoint_every_steps=1")
    assert done.status == 0, done.stderr
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"step-00000002.pt", "step-00000003.pt", "last.pt", "best.pt"}  # train.keep_checkpoints=2
    before = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()
    finished = train_here(tmp_path / "run", images, "model.num_classes=5")
    assert finished.status == 2, finished.stderr
    assert "model.num_classes was 3, is 5" in finished.stderr
    assert "fc.weight (3, 2048) instead of (5, 2048)" in finished.stderr
    assert (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes() == before


@pytest.mark.slow
def test_a_diverging_run_of_two_ranks_stops_and_continues_with_another_learning_rate(images, tmp_path):
    """From step 3 on the learning rate makes every later loss NaN; the steps are skipped, then the run gives up."""
    overrides = ["train.checkpoint_every_steps=null", "train.max_bad_steps=4", "data.loader=torch"]
    assert train_here(tmp_path / "run", images, *overrides, "train.max_steps=3").status == 0
    good = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()
    words = command(tmp_path / "run", images, *overrides, "optimizer.lr=1e30")
    ended = [finish(rank) for rank in start_ranks([words, words])]
    errors = ended[0].stderr
    assert [each.status for each in ended] == [1, 1], errors
    assert re.search(
        r"\d steps in a row had a loss or gradient that is not finite: stopped at step \d+, lr \S+;", errors
    )
    assert re.search(r"recent losses: .*nan", errors)
    assert "Traceback" not in errors
    assert "continuing with optimizer.lr=1e+30, which was 0.02" in errors
    assert "skipped" in (tmp_path / "run" / "train.log").read_text()
    assert [line["skipped_steps"] for line in lines(tmp_path / "run")] == [0, 2]
    assert (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes() == good
    finished = train_here(tmp_path / "run", images, *overrides)
    assert finished.status == 0, finished.stderr
    assert "continuing with optimizer.lr" not in finished.stderr
    assert [line["skipped_steps"] for line in lines(tmp_path / "run")] == [0] * 5


def test_a_bad_step_leaves_no_trace_in_weights_statistics_or_momenta():
    """And the average goes on towards the weights as they are."""
    torch.manual_seed(0)
    model = create_model("rednet26", num_classes=3)
    world = World(0, 1, torch.device("cpu"))
    options = TrainOptions(
        precision="fp32", compile=False, cuda_graphs=False, clip_grad_norm=None, ema_decay=0.5, max_bad_steps=2
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    learner = Learner(model, Classification(), optimizer, lambda step: 0.1, options, world)
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    for step in range(2):
        learner.step(step, [Batch(images, targets, 4)], 1, 4)
    before, average = (
        {key: value.clone() for key, value in state.items() if value.is_floating_point()}
        for state in (model.state_dict(), learner.ema.module.state_dict())
    )
    assert not torch.equal(average["fc.weight"], before["fc.weight"])
    momenta = [learner.optimizer.state[p]["momentum_buffer"].clone() for p in learner.parameters]
    spoiled = images.clone()
    spoiled[2, 1, 5, 5] = torch.inf
    _, bad = learner.step(2, [Batch(spoiled, targets, 4)], 1, 4)
    assert bad
    torch.testing.assert_close({key: model.state_dict()[key] for key in before}, before, rtol=0, atol=0)
    now = [learner.optimizer.state[p]["momentum_buffer"] for p in learner.parameters]
    torch.testing.assert_close(now, momenta, rtol=0, atol=0)
    averaged = learner.ema.module.state_dict()
    halfway = {key: (average[key] + before[key]) / 2 for key in before}  # the decay's warm-up is over in this step
    torch.testing.assert_close({key: averaged[key] for key in before}, halfway)
    learner.guard.check(3, 0.1)  # one in a row: it goes on
    _, bad = learner.step(3, [Batch(images, targets, 4)], 1, 4)
    assert not bad
