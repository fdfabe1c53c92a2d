"""The model in a file, and the images to evaluate it on."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from involution.engine.build import to_device
from involution.engine.config import EvalConfig, check_channels, given
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.tasks import Evaluation, Setup, check_data
from involution.loading import Opened, input_channels, open_checkpoint
from involution.models import from_timm

EVAL_BATCH = 64


class Prepared(NamedTuple):
    """What `evaluate` needs, and which of its results to print."""

    model: torch.nn.Module
    loader: Any  # this rank's
    evaluation: Evaluation
    samples: int
    printed: tuple[str, ...]


def build_evaluation(config: EvalConfig, overrides: list[str], world: World) -> Prepared:
    """The model of a checkpoint and what to evaluate it on.

    Args:
        overrides: of the command line. Pictures are prepared as in training unless it says otherwise: data=imagenet
            chooses other pictures, data.val_size=256 another size.

    Raises:
        ValueError: for a file that cannot be used, or data that do not fit it.
    """
    opened = open_checkpoint(config.checkpoint)
    setup = check_data(opened.name, config.data["name"])
    d = _data(opened, setup, config, overrides)
    if hasattr(d, "mean"):  # detectors normalise by themselves
        check_channels(input_channels(opened.model), d.mean, d.std)
    if "library" in opened.arguments:
        from_timm.check_sizes(opened.model, opened.arguments, [d.val_size])
    _, val = setup.open_dataset(d)
    _check_classes(opened, val.class_names, config.checkpoint)
    loader = setup.eval_loader(val, d, config.batch_size or setup.EVAL_BATCH or EVAL_BATCH, world)
    evaluation = setup.evaluation(loader, config.predictions)
    return Prepared(
        to_device(opened.model, world.device, channels_last=True), loader, evaluation, len(val), setup.PRINTED
    )


def _data(opened: Opened, setup: Setup, config: EvalConfig, overrides: list[str]) -> Any:
    """What to evaluate on, prepared as in training where the checkpoint tells how."""
    if "name" in opened.data:
        trained = setup.DATA(**opened.data)
        if config.data["name"] not in (None, trained.name):
            trained.root = trained.exclude = None
    elif config.data["name"] is None:
        raise UserError(
            f"{config.checkpoint} holds weights alone; say what to evaluate on: data=imagenet data.root=..."
        )
    else:
        trained = setup.DATA(**config.data | {k: v for k, v in opened.data.items() if k in config.data})
    chosen = {
        key: value
        for key, value in config.data.items()
        if value is not None and (key not in setup.PREPARATION or f"data.{key}" in given(overrides))
    }
    try:
        return dataclasses.replace(trained, **chosen)
    except TypeError as error:
        raise UserError(f"{config.checkpoint} is of another task than these values of data: {error}") from error


def _check_classes(opened: Opened, names: Sequence[str], checkpoint: str) -> None:
    known = opened.class_names
    if known is not None and list(names) != known:
        raise UserError(
            f"the data set's classes ({', '.join(names[:3])}, ...) are not those that the checkpoint was trained on "
            f"({', '.join(known[:3])}, ...)"
        )
    if known is None and opened.model.num_classes != len(names):
        raise UserError(f"{checkpoint} knows {opened.model.num_classes} classes, the data set has {len(names)}")
