"""The model in a file, and the images to evaluate it on."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

import data
from data import ImageList
from involution import create_model
from involution.engine.build import build_eval_loader, to_device
from involution.engine.checkpoint import ForeignFile, State, best_weights, load_weights, read
from involution.engine.config import DataConfig, EvalConfig
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.task import Classification
from involution.models import load_model

PREPARATION = ("train_size", "val_size", "val_resize", "mean", "std")  # of pictures: part of what a model has learned


def build_evaluation(
    config: EvalConfig, overrides: list[str], world: World
) -> tuple[torch.nn.Module, Any, Classification, int]:
    """The model of a checkpoint, this rank's loader, the task and the number of samples.

    Args:
        overrides: of the command line. Pictures are prepared as in training unless it says otherwise: data=imagenet
            chooses other pictures, data.val_size=256 another size.

    Raises:
        ValueError: for a file that cannot be used, or data that do not fit it.
    """
    path = Path(config.checkpoint)
    try:
        state = read(path / "checkpoints" / "best.pt" if path.is_dir() else path)
    except ForeignFile:
        state = None
    model, d, images = _weights_alone(path, config) if state is None else _own(state, config, overrides)
    model = to_device(model, world.device, channels_last=True)
    return model, build_eval_loader(images, d, config.batch_size, world), Classification(), len(images)


def _own(state: State, config: EvalConfig, overrides: list[str]) -> tuple[torch.nn.Module, DataConfig, ImageList]:
    """What train.py wrote."""
    trained = DataConfig(**state["config"]["data"])
    if config.data["name"] not in (None, trained.name):
        trained.root = trained.exclude = None
    given = {override.partition("=")[0] for override in overrides}
    chosen = {
        key: value
        for key, value in config.data.items()
        if value is not None and (key not in PREPARATION or f"data.{key}" in given)
    }
    d = dataclasses.replace(trained, **chosen)
    images = data.open_dataset(d.name, d.root, d.exclude).val
    if list(images.class_names) != state["class_names"]:
        raise UserError(
            f"the data set's classes ({', '.join(images.class_names[:3])}, ...) are not those that the checkpoint was "
            f"trained on ({', '.join(state['class_names'][:3])}, ...)"
        )
    model = create_model(**state["config"]["model"])
    load_weights(model, best_weights(state))
    return model, d, images


def _weights_alone(path: Path, config: EvalConfig) -> tuple[torch.nn.Module, DataConfig, ImageList]:
    """The authors' released weights, or timm's or torchvision's of a ResNet: classes and pictures are not told."""
    if config.data["name"] is None:
        raise UserError(f"{path} holds weights alone; say what to evaluate on: data=imagenet data.root=...")
    model, d = load_model(path), DataConfig(**config.data)
    images = data.open_dataset(d.name, d.root, d.exclude).val
    if model.num_classes != len(images.class_names):
        raise UserError(f"{path} knows {model.num_classes} classes, the data set has {len(images.class_names)}")
    return model, d, images
