"""Weights & Biases beside TensorBoard, offline; training without either."""

import pytest
from reliability import train, write_images

OVERRIDES = ["data.loader=torch", "train.ema_decay=null", "logging=wandb"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "blobs")


def test_wandb_offline_goes_on_in_the_same_run(images, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for steps in (3, 6):
        finished = train(tmp_path / "run", images, *OVERRIDES, f"train.max_steps={steps}")
        assert finished.status == 0, finished.stderr
        ids.append((tmp_path / "run" / "wandb" / "run-id").read_text())
    assert ids[0] == ids[1]
    logs = list((tmp_path / "run" / "wandb").rglob(f"run-{ids[0]}.wandb"))
    assert len(logs) == 2
    assert all(b"epoch/val_top1" in log.read_bytes() for log in logs)
    assert list((tmp_path / "run" / "tensorboard").iterdir())
