"""`eval.py images=...`: what a model says of the user's own pictures."""

import csv
import importlib.util
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

from data.bands import BY_PILLOW, decode_bands
from data.decode import BadImageError, check_pixels
from data.folder import EXTENSIONS
from involution.checks import strict_json
from involution.engine.cli import print_text
from involution.engine.config import EvalConfig, given
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.evaluate import autocast
from involution.engine.load import EVAL_BATCH
from involution.engine.tasks import Predictor, task_of
from involution.folding import fold_parts
from involution.loading import open_checkpoint
from involution.pictures import to_rgb

log = logging.getLogger("involution")
Predictions = list[tuple[Path, Any]]  # file, and what the task's Predictor says of it
Writer = Callable[[Path, Predictions, Predictor], None]


def predict_images(config: EvalConfig, overrides: list[str], world: World) -> dict[str, Any]:
    """Print and write what the checkpoint sees in `config.images`; returns the program's result.

    Raises:
        ValueError: for a checkpoint, picture or output file that cannot be used.
    """
    from involution.engine.tasks import classification, detection, segmentation  # which import this file

    if world.size > 1:
        raise UserError("images= runs in one process; start it with plain `python eval.py ...`")
    if isinstance(config.checkpoint, list):
        raise UserError("images= takes one checkpoint")
    device, paths = world.device, find_images(config.images)
    outputs = _outputs(config)
    opened = open_checkpoint(config.checkpoint)
    setup = task_of(opened.name)
    if config.predictions is not None and setup is not segmentation:
        raise UserError("predictions= is for data sets; of pictures of your own write output=FILE.csv or .json")
    for key, owner, what in (("min_score", detection, "detectors"), ("layer", classification, "classifiers")):
        if key in given(overrides) and setup is not owner:
            raise UserError(f"{key}= is for {what}")
    told = {k: config.data[k] for k in setup.PREPARATION if k in config.data and f"data.{k}" in given(overrides)}
    predictor = setup.predictor(opened, config, told, device)
    predictions: Predictions = []
    started = time.perf_counter()
    size, skip = config.batch_size or setup.EVAL_BATCH or EVAL_BATCH, config.data.get("on_error") == "skip"
    for batch in _batches(paths, size, predictor.channels, skip):
        with autocast(device, config.precision):
            found = predictor.predict(batch)
        for (path, _), prediction in zip(batch, found, strict=True):
            print_text(predictor.text(path, prediction))
            predictions.append((path, prediction))
    seconds = time.perf_counter() - started
    if not predictions:
        raise UserError(f"images: none of {len(paths)} files can be read as a picture")
    count = len(predictions)
    print_text(f"{count} pictures in {seconds:.2f} s: {count / seconds:.1f} a second")
    for path, write in outputs:
        try:
            write(path, predictions, predictor)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return {
        "checkpoint": str(config.checkpoint),
        "n": len(predictions),
        "predictions": [predictor.as_dict(*prediction) for prediction in predictions],
    }


def _batches(paths: list[Path], size: int, channels: int, skip: bool) -> Iterator[list[tuple[Path, Any]]]:
    """Pictures with their paths, `size` at a time: threads decode a batch while the one before it is looked at.

    skip: name files that are no pictures and go on, instead of stopping.
    """
    with ThreadPoolExecutor() as pool:
        ahead: list[Future[Any]] = []
        for start in range(0, len(paths), size):
            now = ahead or [pool.submit(open_picture, path, channels) for path in paths[:size]]
            ahead = [pool.submit(open_picture, path, channels) for path in paths[start + size : start + 2 * size]]
            batch = []
            for path, picture in zip(paths[start : start + size], now, strict=True):
                try:
                    batch.append((path, picture.result()))
                except UserError as error:
                    if not skip:
                        raise
                    log.warning("%s", error)
            if batch:
                yield batch


def for_pictures(model: nn.Module, config: EvalConfig, device: torch.device) -> nn.Module:
    """A model ready to look at pictures: folded on a CPU, unless `config` wants the last digits of evaluations."""
    model = model.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return fold_parts(model) if config.fold and device.type == "cpu" else model


def find_images(images: str | list[str]) -> list[Path]:
    """The picture files among paths of files and folders (searched to the bottom), in the order given, then by name.

    Raises:
        UserError: a path does not exist, or a folder has no pictures.
    """
    paths: list[Path] = []
    for name in [images] if isinstance(images, str) else images:
        path = Path(str(name)).expanduser()
        if not path.exists():
            raise UserError(f"images: there is no file or folder {path}")
        if not path.is_dir() and not path.is_file():
            raise UserError(f"images: {path} is a pipe or a device, no file")
        paths += _inside(path) if path.is_dir() else [path]
    if not paths:
        raise UserError("images is an empty list; give a file, a folder, or [a.jpg,b.jpg]")
    return paths


def _inside(folder: Path) -> list[Path]:
    endings = tuple(ending.decode() for ending in EXTENSIONS)
    found = sorted(path for path in folder.rglob("*") if path.name.lower().endswith(endings) and path.is_file())
    if not found:
        raise UserError(f"images: the folder {folder} has no pictures ({' '.join(endings)})")
    return found


def open_picture(path: Path, channels: int = 3) -> Any:
    """The picture in a file, in RGB. Unlike in data sets, cameras' note which side is up is obeyed.

    For a model of other than 1 or 3 `channels`: its bands (C, H, W) in [0, 1].

    Raises:
        UserError: it cannot be read as a picture.
    """
    try:
        if channels not in BY_PILLOW:
            return decode_bands(path.read_bytes(), str(path), channels).permute(2, 0, 1) / 255
        with Image.open(path) as image:
            check_pixels(image.width, image.height)
            return to_rgb(ImageOps.exif_transpose(image))
    except BadImageError as error:
        reason = error.reason
    except UnidentifiedImageError:
        reason = "Pillow cannot identify it as an image"
    except Exception as error:  # Pillow's plugins raise almost every type
        reason = str(error) or type(error).__name__
    raise UserError(f"images: {path} cannot be read as a picture: {reason}")


def _outputs(config: EvalConfig) -> list[tuple[Path, Writer]]:
    """What is to be written, refused here when it cannot be, before anything is computed."""
    found: list[tuple[Path, Writer]] = []
    by_ending: dict[str, dict[str, Writer]] = {
        "output": {".csv": _write_csv, ".json": _write_json},
        "contact_sheet": {".png": _draw, ".pdf": _draw},
    }
    for key, writers in by_ending.items():
        name = getattr(config, key)
        if name is None:
            continue
        path = Path(name)
        if path.suffix not in writers:
            raise UserError(f"{key} is {path}; it should end with {' or '.join(writers)}")
        if not path.absolute().parent.is_dir():
            raise UserError(f"{key}: there is no folder {path.parent} to write {path.name} to")
        found.append((path, writers[path.suffix]))
    if config.contact_sheet is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("a contact sheet needs matplotlib: pip install matplotlib")
    return found


def _write_csv(path: Path, predictions: Predictions, predictor: Predictor) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(predictor.columns)
        for prediction in predictions:
            table.writerows(predictor.rows(*prediction))


def _write_json(path: Path, predictions: Predictions, predictor: Predictor) -> None:
    path.write_text(strict_json([predictor.as_dict(*prediction) for prediction in predictions], indent=2) + "\n")


def _draw(path: Path, predictions: Predictions, predictor: Predictor) -> None:
    predictor.draw(path, predictions)
