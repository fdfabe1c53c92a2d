"""Weights & Biases beside TensorBoard, offline; training without either; the pictures on them."""

import pytest
import torch
from reliability import train, train_here, write_images
from torch.nn.modules.module import register_module_forward_hook

from involution import Involution2d
from involution.engine.tasks import heat_maps

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


def test_pictures_are_drawn_under_the_runs_autocast(images, tmp_path):
    """In another type a GPU would compile kernels for them alone, while the other ranks wait."""
    types = {}

    def note(module, args, output):
        if isinstance(module, Involution2d) and not module.training:
            types.setdefault(len(output), set()).add(output.dtype)

    hook = register_module_forward_hook(note)
    try:
        overrides = ["data.workers=0", "train.batch_size=16", "train.precision=bf16", "train.max_steps=1"]
        finished = train_here(tmp_path / "run", images, *OVERRIDES[:2], *overrides)
    finally:
        hook.remove()
    assert finished.status == 0, finished.stderr
    assert types[heat_maps.IMAGES] == {torch.bfloat16}
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"kernels/conv3_2" in events.read_bytes()
