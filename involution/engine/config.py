"""The configuration's shape: types and checks for what conf/*.yaml and the command line put together.

Values live in the YAML files alone; here every key has a type, and `validate` refuses the impossible before any data is
read or a GPU touched.
"""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.decode import MAX_PIXELS
from involution.checks import first_line
from involution.engine import augmentation, resolvers  # noqa: F401 - what ${...:...} in YAML means
from involution.engine.errors import UserError
from involution.engine.options import TrainOptions


@dataclass
class DataConfig:
    """Of classification. Another task has a class of its own, with `name` and `root` in it."""

    name: str = MISSING
    root: str | None = MISSING
    loader: str = MISSING
    decoder: str = MISSING
    workers: int = MISSING
    train_size: Any = MISSING  # pixels, or {first epoch: pixels}
    val_size: int = MISSING
    val_resize: int = MISSING
    mean: list[float] = MISSING
    std: list[float] = MISSING
    exclude: str | None = MISSING
    max_pixels: int = MAX_PIXELS  # the default is for checkpoints from before there was this key
    on_error: str = MISSING


@dataclass
class TrainConfig:
    """conf/train.yaml"""

    name: str = MISSING
    output_root: str = MISSING
    checkpoint: str | None = MISSING
    seed: int = MISSING
    deterministic: bool = MISSING
    device: str = MISSING
    logging: str = MISSING
    model: dict[str, Any] = MISSING  # arguments of involution.create_model
    data: Any = field(default_factory=DataConfig)  # these two have the types that the model's task gives them
    augmentation: Any = field(default_factory=augmentation.AugmentationConfig)
    optimizer: dict[str, Any] = MISSING  # _target_ and its arguments
    schedule: dict[str, Any] = MISSING  # arguments of optim.build_schedule
    train: TrainOptions = field(default_factory=TrainOptions)


@dataclass
class EvalConfig:
    """conf/eval.yaml"""

    checkpoint: Any = MISSING  # a path or a list of paths
    batch_size: int | None = MISSING
    precision: str = MISSING
    tf32: bool = MISSING
    device: str = MISSING
    data: dict[str, Any] = MISSING  # null: as the checkpoint was trained
    predictions: str | None = MISSING
    results: str | None = MISSING
    class_map: str | None = MISSING
    per_class: bool = MISSING
    images: Any = MISSING  # a path or a list of paths
    output: str | None = MISSING
    contact_sheet: str | None = MISSING
    layer: str | None = MISSING
    min_score: float = MISSING
    fold: bool = MISSING


# keys of eval.py that mean something for one of its two uses alone
FOR_PICTURES = ("output", "contact_sheet", "layer", "fold", "min_score")  # images=
FOR_DATA = ("results", "class_map", "per_class")  # a data set

CHOICES = {
    "logging": ("tensorboard", "wandb"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("fp32", "bf16", "fp16"),
    "train.precision": ("fp32", "bf16", "fp16"),
    "train.sync_batchnorm": (True, False, "auto"),
    "train.exclude_from_decay": ("none", "norm_and_bias"),
    "train.loss": ("cross_entropy", "bce"),
    "data.loader": ("auto", "dali", "torch"),
    "data.decoder": ("auto", "cpu", "mixed"),
    "data.on_error": ("stop", "skip"),
}
RANGES = {  # lowest and highest value; None: no limit
    "train.epochs": (1, None),
    "train.steps": (1, None),
    "train.global_batch_size": (1, None),
    "train.batch_size": (1, None),
    "train.batchnorm_size": (1, None),
    "train.label_smoothing": (0, 1),
    "train.target_threshold": (0, 1),
    "train.clip_grad_norm": (0, None),
    "train.ema_decay": (0, 1),
    "train.layer_decay": (0, 1),
    "train.max_steps": (1, None),
    "train.max_bad_steps": (1, None),
    "train.log_every_steps": (1, None),
    "train.evaluate_every_epochs": (1, None),
    "train.evaluate_every_steps": (1, None),
    "train.checkpoint_every_steps": (1, None),
    "train.checkpoint_every_minutes": (0, None),
    "train.keep_checkpoints": (1, None),
    "train.timeout_minutes": (0, None),
    "data.workers": (0, None),
    "data.val_size": (1, None),
    "data.val_resize": (1, None),
    "data.max_pixels": (1, None),
    "augmentation.hflip": (0, 1),
    **augmentation.RANGES,
    "optimizer.lr": (0, None),
    "optimizer.momentum": (0, 1),
    "optimizer.weight_decay": (0, None),
    "schedule.warmup_epochs": (0, None),
    "schedule.warmup_start": (0, 1),
    "schedule.min_lr": (0, None),
    "schedule.power": (0, None),
    "model.drop_path_rate": (0, 1),
    "model.options.drop_path_rate": (0, 1),
    "schedule.warmup_steps": (0, None),
    "batch_size": (1, None),
    "min_score": (0, 1),
    "seed": (0, 2**32 - 1),
}
# "" in conf/ where the command line has to tell, and what
TOLD = {
    "model.name": "NAME",
    "optimizer.name": "NAME",
    "name": "NAME",
    "checkpoint": "PATH (a run's folder, a file, or rednet50)",
    "output_root": "PATH",
}
KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}


def validate(config: DictConfig, schema: type) -> Any:
    """Check a composed configuration and return it as a typed object (`schema` is TrainConfig or EvalConfig).

    Raises:
        UserError: naming the key, its value and what it should be.
    """
    try:
        typed = OmegaConf.merge(_structured(schema, config), config)
        OmegaConf.resolve(typed)
        missing = sorted(OmegaConf.missing_keys(typed))
    except OmegaConfBaseException as error:
        key = error.full_key or error.key or ""
        known = [] if error.key is None else nearest(str(error.key), list(error.parent_node or []))
        known = [name for name in known if name != str(error.key)]  # there the value is wrong
        said = first_line(error)
        if "is not a ListConfig" in said:
            said = "it should be a list, as in [0.5,0.5,0.5] or [64,64]"
        if kind := re.match(r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (\w+)", said):
            raise UserError(f"{key}={kind[1]} should be {KINDS.get(kind[2], kind[2])}") from error
        what = f"{key}: {said}" if key else said
        missing_key = "not in" in str(error)
        raise UserError(f"{what}{hint(known) or (_other_recipe(key) if missing_key else '')}") from error
    if missing:
        raise UserError(f"{missing[0]} is not set; give it as {missing[0]}={TOLD.get(missing[0], 'VALUE')}")
    for key, allowed in CHOICES.items():
        value = OmegaConf.select(typed, key)
        if value is not None and value not in allowed:
            near = ["cuda"] if value == "gpu" else nearest(str(value), allowed)
            raise UserError(f"{key}={value} should be one of {', '.join(map(str, allowed))}{hint(near)}")
    for key, (low, high) in RANGES.items():
        _check_range(key, OmegaConf.select(typed, key), low, high)
    for key, what in TOLD.items():
        if OmegaConf.select(typed, key) == "":
            raise UserError(f"{key} is not set; give it as {key}={what}")
    name = PurePath(OmegaConf.select(typed, "name") or "")
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"name={name} should be the name of a folder inside output_root; set that for another place")
    if schema is TrainConfig and "mean" in typed.data:  # detectors normalise by themselves
        check_channels(typed.model.get("in_chans", 3), typed.data.mean, typed.data.std)
    return OmegaConf.to_object(typed)


def _structured(schema: type, config: DictConfig) -> DictConfig:
    """The schema, whose `data` and `augmentation` in training are those of the model's task.

    Raises:
        UserError: the data set is one for another task, or eval.py's.
    """
    from involution.engine.tasks import check_data  # it imports this file

    if schema is not TrainConfig:
        return OmegaConf.structured(schema)
    if (name := OmegaConf.select(config, "data.name")) is None:
        raise UserError("data=as_trained is for eval.py; choose a data set to train on, as in data=imagenet")
    task = check_data(OmegaConf.select(config, "model.name"), name)
    return OmegaConf.structured(TrainConfig(data=task.DATA(), augmentation=task.AUGMENTATION()))


def check_channels(channels: Any, mean: Sequence[float], std: Sequence[float]) -> None:
    """Check how pictures are normalised for a model that takes so many channels.

    Raises:
        UserError: with the values that would fit.
    """
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise UserError(
            f"model.in_chans={channels} should be 3, 1 for gray pictures, or the number of the files' bands"
        )
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            fitting = [round(sum(values) / max(len(values), 1), 3)] * channels
            raise UserError(
                f"data.{key}={list(values)} should have a value for each of the model's channels, {channels} "
                f"(model.in_chans): for example data.{key}={str(fitting).replace(' ', '')}"
            )
    if not all(0 < value < math.inf for value in std):
        raise UserError(f"data.std={list(std)} should be greater than 0, and finite: pictures are divided by it")
    if not all(map(math.isfinite, mean)):
        raise UserError(f"data.mean={list(mean)} should be finite: it is subtracted from pictures")


def _other_recipe(key: str) -> str:
    """Advice for a key that the task does not have: what recipes set is made for one task."""
    if not key.startswith(("augmentation", "data.val_resize")):
        return ""
    recipes = "recipe=cityscapes or demo_segmentation for segmentation, coco or demo_detection for detection"
    return f". The recipe is for models of another task: choose {recipes}"


def _check_range(key: str, value: Any, low: float, high: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{key}={value} should be a number")
    if not math.isfinite(value) or not low <= value <= (math.inf if high is None else high):
        finite = "" if math.isfinite(value) else "finite and "
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{key}={value} should be {finite}{bounds}")


def given(overrides: Iterable[str]) -> set[str]:
    """The keys that a command line sets."""
    return {override.partition("=")[0].lstrip("+") for override in overrides}


def refuse_other_use(config: EvalConfig, overrides: Iterable[str]) -> None:
    """Refuse keys that would be passed over: of pictures for a data set, and the other way round.

    Raises:
        UserError: naming the key.
    """
    pictures = config.images is not None
    for key in FOR_DATA if pictures else FOR_PICTURES:
        if key in given(overrides):
            instead = "; for each image of a data set there is predictions=FILE" if key == "output" else ""
            use = "a data set, which images= goes without" if pictures else "pictures of your own, images=PATH"
            raise UserError(f"{key}= is for {use}{instead}")


def nearest(name: str, known: Any) -> list[str]:
    """The known names that `name` may have been meant to be."""
    return difflib.get_close_matches(name, [str(item) for item in known], n=1)


def hint(names: list[str]) -> str:
    return f"; did you mean {names[0]}?" if names else ""
