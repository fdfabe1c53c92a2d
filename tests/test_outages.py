"""Disks, networks and servers that fail for a while: waited for, named, and never taken for damage or for an end."""

import errno
import fcntl
import os
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from reliability import read, train, train_here, write_images

import data
from data.folder import save_arrays
from data.image_list import read_file
from involution import create_model, outage
from involution.engine import boards, monitor
from involution.engine.checkpoint import CheckpointFolder
from involution.engine.cli import _outcome
from involution.engine.distributed import World, synchronise
from involution.engine.errors import UserError
from involution.engine.run import RunFolder
from involution.engine.tasks.losses import CrossEntropy
from involution.ops.ghost import GhostBatchNorm2d
from involution.weights import files

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def failing(call: Any, code: int, times: int) -> Any:
    """`call`, which first fails so many times."""
    left = [times]

    def replaced(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(code, os.strerror(code))
        return call(*args, **options)

    return replaced


def test_a_read_that_fails_for_a_while_is_repeated(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(images / "train/a/0.jpg")
    expected = read_file(path)
    monkeypatch.setattr(os, "open", failing(os.open, errno.EIO, len(outage.PAUSES)))
    assert read_file(path) == expected
    monkeypatch.setattr(os, "open", failing(os.open, errno.EIO, len(outage.PAUSES) + 1))
    with pytest.raises(data.BadImageError, match="Input/output error"):
        read_file(path)
    monkeypatch.setattr(os, "open", failing(os.open, errno.EACCES, 1))
    with pytest.raises(data.BadImageError, match="Permission denied"):  # which waiting does not change
        read_file(path)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_skipping_files_ends_where_none_is_left(images: Path, loader: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    train_set, val_set = data.open_dataset("folder", images)
    options: dict[str, Any] = {"loader": loader, "workers": 0, "on_error": "skip"}
    batches = data.train_loader(train_set, batch_size=4, global_batch_size=4, seed=0, train_size=32, **options)
    next(batches)
    (images / "train").rename(images / "away")
    with pytest.raises(data.LostDataError, match="is the data set still there") as error:
        list(batches)
    status, message = _outcome(error.value)
    assert status == 1
    assert "Traceback" not in message
    (images / "val").rename(images / "gone")
    with pytest.raises(data.LostDataError, match="No such file"):
        list(data.eval_loader(val_set, batch_size=4, val_size=32, val_resize=32, **options))


def test_an_unreadable_checkpoint_is_not_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save({"model": {"w": torch.ones(2)}, "ema": None, "step": step}, step)
    folder.wait()
    load = torch.load
    monkeypatch.setattr(torch, "load", failing(load, errno.ESTALE, 2))
    assert folder.newest()[1]["step"] == 2
    monkeypatch.setattr(torch, "load", failing(load, errno.ESTALE, 99))
    with pytest.raises(OSError, match=r"last\.pt") as error:
        folder.newest()
    status, message = _outcome(error.value)
    assert status == 1
    assert "start the same again to continue" in message
    monkeypatch.setattr(torch, "load", failing(load, errno.EINVAL, 1))  # of seeking in a torn file
    with pytest.raises(ValueError, match="cannot be read as weights"):
        files.load(tmp_path / "last.pt")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "lockf", failing(fcntl.lockf, code, 99))
    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, code, 99))
    RunFolder(tmp_path / "run", ALONE).open()
    assert "nothing stops a second run there" in caplog.text
    with open(tmp_path / "lock", "w") as lock:
        outage.wait_for_lock(lock)
    monkeypatch.setattr(fcntl, "lockf", failing(fcntl.lockf, errno.EIO, 99))
    with pytest.raises(UserError, match="cannot write to"):
        RunFolder(tmp_path / "other", ALONE).open()


def test_a_job_that_is_started_again_waits_for_its_predecessors_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "lockf", failing(fcntl.lockf, errno.EAGAIN, 3))
    with pytest.raises(UserError, match="another run is writing"):
        RunFolder(tmp_path / "run", ALONE).open()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunFolder(tmp_path / "run", ALONE).open()


class Board:
    """Takes curves until its server is gone."""

    def __init__(self, good: int) -> None:
        self.good, self.calls = good, 0

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> None:
            self.calls += 1
            if self.calls > self.good:
                raise ConnectionResetError("the server is gone")

        return call


def test_a_board_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fails, ends_badly, works = Board(2), Board(4), Board(99)
    monkeypatch.setattr(monitor, "open_boards", lambda *_: [fails, ends_badly, works])
    shown = monitor.Monitor(tmp_path, True, 0, 10, 5, {})
    values = {"loss": 1.0, "lr": 0.1, "images_per_s": 1.0, "data_wait": 0.0}
    shown.interval(1, values)
    shown.close()
    assert (fails.calls, ends_badly.calls, works.calls) == (3, 5, 5)
    assert caplog.text.count("gets no more curves: the server is gone") == 2


def test_weights_and_biases_out_of_reach_stops_the_first_start_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")

    def unreachable(**_: Any) -> None:
        raise wandb.errors.CommError("no answer")

    monkeypatch.setattr(wandb, "init", unreachable)
    for _ in range(2):
        with pytest.raises(UserError, match="no answer"):
            boards.open_boards("wandb", tmp_path, 0, {})
    (tmp_path / "wandb" / "run-id").write_text("12345678")
    (left,) = boards.open_boards("wandb", tmp_path, 5, {})
    left.close()
    assert "the run goes on without it" in caplog.text


@pytest.mark.parametrize("stopped", [False, True])
def test_a_last_step_that_is_not_finite_leaves_a_checkpoint(
    images: Path, tmp_path: Path, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end, or where a signal comes in the middle of such steps: it is the state from before them."""
    calls, loss = [0], CrossEntropy.__call__

    def spoiled(self: CrossEntropy, *args: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3 and stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args) * (torch.nan if calls[0] == 3 else 1)

    monkeypatch.setattr(CrossEntropy, "__call__", spoiled)
    steps = [f"train.max_steps={9 if stopped else 3}", "train.batch_size=16", "train.checkpoint_every_steps=null"]
    ended = train_here(tmp_path / "run", images, *steps, "data.loader=torch", "data.workers=0")
    assert ended.status == (75 if stopped else 0), ended.stderr
    kept = read(tmp_path / "run" / "checkpoints" / "last.pt")
    assert kept["step"] == 3
    assert kept["guard"]["in_row"] == 1
    assert all(value.isfinite().all() for value in kept["model"].values())
    if stopped:
        assert "the state is saved" in ended.stderr
    else:
        assert kept["best"] is not None
        assert read(tmp_path / "run" / "checkpoints" / "best.pt")["step"] == 3


@pytest.mark.slow
def test_two_ranks_save_once_when_it_is_time_to(images: Path, tmp_path: Path) -> None:
    settings = ["train.global_batch_size=4", "train.batch_size=2", "train.checkpoint_every_minutes=0.01"]
    more = ["train.checkpoint_every_steps=null", "train.keep_checkpoints=99", "train.epochs=1"]
    finished = train(tmp_path / "run", images, *settings, *more, "data.loader=torch", "data.workers=0", ranks=2)
    assert finished.status == 0, finished.stderr
    saved = sorted(int(path.stem[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*.pt"))
    timed = [step for step in saved if step % 12]
    assert timed
    assert not [step for step in timed if step - 1 in saved], saved


def test_listings_are_for_everybody_who_may_read_the_folder(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_arrays(tmp_path / "list.npz", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "list.npz").stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["list.npz"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["regnety_002", "efficientnet_b0", "mobilenetv3_small_050", "resnet18"])
def test_synchronised_batch_norm_keeps_the_activations_of_timms_networks(name: str) -> None:
    model = create_model(name, num_classes=3, library="timm").eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    found = synchronise(model)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in found.modules())
    torch.testing.assert_close(found(x), expected)


def test_a_batch_norm_of_another_kind_is_not_synchronised() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4))
    model[0].__class__ = GhostBatchNorm2d
    with pytest.raises(UserError, match="0 is a GhostBatchNorm2d"):
        synchronise(model)
