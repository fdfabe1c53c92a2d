"""The model in a file, and the images to evaluate it on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

import data
from involution.engine.build import build_eval_loader, to_device
from involution.engine.config import DataConfig, EvalConfig
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.task import Classification
from involution.loading import Opened, open_checkpoint

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
    opened = open_checkpoint(config.checkpoint)
    d = _data(opened, config, overrides)
    images = data.open_dataset(d.name, d.root, d.exclude).val
    _check_classes(opened, images.class_names, config.checkpoint)
    model = to_device(opened.model, world.device, channels_last=True)
    return model, build_eval_loader(images, d, config.batch_size, world), Classification(), len(images)


def _data(opened: Opened, config: EvalConfig, overrides: list[str]) -> DataConfig:
    """What to evaluate on, prepared as in training where the checkpoint tells how."""
    if "name" in opened.data:
        trained = DataConfig(**opened.data)
        if config.data["name"] not in (None, trained.name):
            trained.root = trained.exclude = None
    elif config.data["name"] is None:
        raise UserError(
            f"{config.checkpoint} holds weights alone; say what to evaluate on: data=imagenet data.root=..."
        )
    else:
        trained = DataConfig(**config.data | opened.data)
    chosen = {
        key: value
        for key, value in config.data.items()
        if value is not None and (key not in PREPARATION or f"data.{key}" in given(overrides))
    }
    return dataclasses.replace(trained, **chosen)


def given(overrides: list[str]) -> set[str]:
    """The keys that a command line sets."""
    return {override.partition("=")[0].lstrip("+") for override in overrides}


def _check_classes(opened: Opened, names: Sequence[str], checkpoint: str) -> None:
    known = opened.class_names
    if known is not None and list(names) != known:
        raise UserError(
            f"the data set's classes ({', '.join(names[:3])}, ...) are not those that the checkpoint was trained on "
            f"({', '.join(known[:3])}, ...)"
        )
    if known is None and opened.model.num_classes != len(names):
        raise UserError(f"{checkpoint} knows {opened.model.num_classes} classes, the data set has {len(names)}")
