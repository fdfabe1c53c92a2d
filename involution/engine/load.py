"""The model in a file, and the images to evaluate it on."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data import ImageList
from data.datasets import numbered, present
from involution.engine import class_map
from involution.engine.build import to_device
from involution.engine.cli import user_input
from involution.engine.config import EvalConfig, check_channels, given
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.evaluate import EVAL_BATCH, evaluate
from involution.engine.outputs import output_file, write_table
from involution.engine.tasks import Evaluation, Setup, check_data, classification
from involution.loading import IMAGENET, Opened, input_channels, open_checkpoint, scaled
from involution.models import from_timm
from involution.weights.source import fetch

NULLABLE = ("exclude", "window")  # of data: null on the command line means none, elsewhere as it was trained


class Prepared(NamedTuple):
    """What `evaluate` needs, and which of its results to print."""

    model: torch.nn.Module
    loader: Any  # this rank's
    evaluation: Evaluation
    samples: int
    printed: tuple[str, ...]


def build_evaluation(config: EvalConfig, overrides: list[str], world: World) -> Prepared:
    """The model of the checkpoint and what to evaluate it on.

    Args:
        config: with one checkpoint.
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
    mapped = None
    if config.class_map is None:
        val = _by_its_own_names(opened, d) if _has_its_classes(opened, setup, d) else setup.open_val(d)
        _check_classes(opened, val.class_names, config.checkpoint)
    else:
        val, mapped = _mapped(config, opened, setup, d)
    loader = setup.eval_loader(val, d, config.batch_size or setup.EVAL_BATCH or EVAL_BATCH, world)
    model = to_device(opened.model, world.device, channels_last=True)
    if mapped is not None:
        return Prepared(model, loader, mapped, len(val), (*setup.PRINTED, "labelled"))
    return Prepared(model, loader, setup.evaluation(loader, config.predictions), len(val), setup.PRINTED)


def evaluate_each(config: EvalConfig, overrides: list[str], world: World) -> Iterator[dict[str, Any]]:
    """The scores of each checkpoint, in the order given.

    Raises:
        UserError: as in `build_evaluation`, or an output that cannot be written.
    """
    if not config.checkpoint:
        raise UserError("checkpoint is empty; give a file, a run's folder, or several: checkpoint=[a,b]")
    checkpoints = config.checkpoint if isinstance(config.checkpoint, list) else [config.checkpoint]
    if len(checkpoints) > 1 and config.predictions is not None:
        raise UserError("predictions= is of one checkpoint; give them one by one")
    if config.results is not None:
        output_file("results", config.results, ".csv")
    with user_input():
        for checkpoint in checkpoints[1:]:
            fetch(checkpoint)  # one that is not there is said before another is evaluated
    for checkpoint in checkpoints:
        one = dataclasses.replace(config, checkpoint=checkpoint)
        with user_input():
            model, loader, evaluation, samples, printed = build_evaluation(one, overrides, world)
        with closing(loader):
            found = evaluate(model, loader, evaluation, world, samples=samples, precision=config.precision)
        wanted = (*printed, *(["classes"] if config.per_class else []))
        yield {"checkpoint": str(checkpoint)} | {key: found[key] for key in wanted if key in found}


def write_results(name: str, results: Sequence[dict[str, Any]]) -> None:
    """A table with a line a checkpoint."""
    columns = list(dict.fromkeys(key for each in results for key in each if key != "classes"))
    write_table(Path(name), columns, ([each.get(key, "") for key in columns] for each in results))


def _stands_alone(setup: Setup, d: Any) -> bool:
    """Whether a classifier's pictures are there with none to train on, which number the classes elsewhere."""
    return setup is classification and d.name == "folder" and bool(d.root) and not present(Path(d.root))


def _has_its_classes(opened: Opened, setup: Setup, d: Any) -> bool:
    """Whether such pictures are in folders of the checkpoint's classes."""
    names = opened.class_names or []
    places = [Path(d.root), Path(d.root) / "val"] if _stands_alone(setup, d) else []
    return any((place / name).is_dir() for place in places for name in names)


def _by_its_own_names(opened: Opened, d: Any) -> ImageList:
    """Such pictures, their classes numbered as the checkpoint's where it has them all."""
    images, names = class_map.list_images(d.root, d.exclude), tuple(opened.class_names or ())
    return numbered(images, names, Path(d.root)) if {*images.class_names} <= {*names} else images


def _mapped(config: EvalConfig, opened: Opened, setup: Setup, d: Any) -> tuple[ImageList, Evaluation]:
    """The data set and its score, where its classes are not the model's."""
    if setup is not classification:
        raise UserError("class_map is for classifiers")
    if config.predictions is not None:
        raise UserError(
            "predictions= and class_map= exclude each other: the table has one right class for each picture"
        )
    if config.per_class:
        raise UserError("per_class= and class_map= exclude each other: a picture may have several right classes")
    images = class_map.list_images(d.root, d.exclude) if _stands_alone(setup, d) else setup.open_val(d)
    assert isinstance(images, ImageList)
    assert config.class_map is not None
    known = class_map.class_names(opened.class_names, opened.model.num_classes)
    images, right = class_map.apply(config.class_map, images, known)
    return images, class_map.MappedAccuracy(right)


def _data(opened: Opened, setup: Setup, config: EvalConfig, overrides: list[str]) -> Any:
    """What to evaluate on, prepared as in training where the checkpoint tells how."""
    typed = given(overrides)
    if "name" in opened.data:
        trained = setup.DATA(**opened.data)
        if config.data["name"] not in (None, trained.name):
            trained.root = trained.exclude = None
        elif config.data["root"] is not None and trained.name.endswith("folder"):  # another data set, too
            trained.exclude = None
    elif config.data["name"] is None or "data.name" in typed:  # a name alone does not say how pictures are prepared
        raise UserError(
            f"{config.checkpoint} holds weights of {opened.name} alone; say what to evaluate on: "
            f"data={'|'.join(setup.DATASETS)} data.root=..."
        )
    else:
        trained = setup.DATA(**config.data | {k: v for k, v in opened.data.items() if k in config.data})
    chosen = {
        key: value
        for key, value in config.data.items()
        if (value is not None or (key in NULLABLE and f"data.{key}" in typed))
        and (key not in setup.PREPARATION or f"data.{key}" in typed)
    }
    if "val_size" in chosen and "val_resize" not in chosen and hasattr(trained, "val_resize"):
        crop, resize = (opened.data.get(key, IMAGENET[key]) for key in ("val_size", "val_resize"))
        chosen["val_resize"] = scaled(resize, crop, chosen["val_size"])  # the same share is cut off
    try:
        return dataclasses.replace(trained, **chosen)
    except TypeError as error:
        raise UserError(f"{config.checkpoint} is of another task than these values of data: {error}") from error


def _check_classes(opened: Opened, names: Sequence[str], checkpoint: str) -> None:
    known = opened.class_names
    if known is not None and list(names) != known:
        raise UserError(
            f"the data set's classes ({', '.join(names[:3])}, ...) are not those that the checkpoint was trained on "
            f"({', '.join(known[:3])}, ...); say which are which by class_map=FILE (docs/data.md), or learn them: "
            f"train.py recipe=finetune checkpoint=..."
        )
    if known is None and opened.model.num_classes != len(names):
        raise UserError(f"{checkpoint} knows {opened.model.num_classes} classes, the data set has {len(names)}")
