"""`eval.py images=...`: what a model says of the user's own pictures."""

import importlib.util
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from involution.checks import strict_json
from involution.engine.cli import print_text
from involution.engine.config import EvalConfig, given
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.evaluate import EVAL_BATCH, autocast
from involution.engine.outputs import output_file, write_table
from involution.engine.pictures import find_images, open_picture
from involution.engine.tasks import Predictor, classification, detection, segmentation, task_of
from involution.loading import open_checkpoint

log = logging.getLogger("involution")
Predictions = list[tuple[Path, Any]]  # file, and what the task's Predictor says of it
Writer = Callable[[Path, Predictions, Predictor], None]


def predict_images(config: EvalConfig, overrides: list[str], world: World) -> dict[str, Any]:
    """Print and write what the checkpoint sees in `config.images`; returns the program's result.

    Raises:
        ValueError: for a checkpoint, picture or output file that cannot be used.
    """
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
    if "layer" in given(overrides) and config.contact_sheet is None:
        raise UserError("layer= chooses the kernels that contact_sheet=FILE.png shows: give both")
    told = {k: config.data[k] for k in setup.PREPARATION if k in config.data and f"data.{k}" in given(overrides)}
    predictor = setup.predictor(opened, config, told, device)
    predictions: Predictions = []
    started = time.perf_counter()
    size, skip = config.batch_size or setup.EVAL_BATCH or EVAL_BATCH, config.data.get("on_error") == "skip"
    open_one = partial(open_picture, channels=predictor.channels, scaled=setup is not classification)
    for batch in _batches(paths, size, open_one, skip):
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


def _batches(
    paths: list[Path], size: int, open_one: Callable[[Path], Any], skip: bool
) -> Iterator[list[tuple[Path, Any]]]:
    """Pictures with their paths, `size` at a time: threads decode a batch while the one before it is looked at.

    skip: name files that are no pictures and go on, instead of stopping.
    """
    with ThreadPoolExecutor() as pool:
        ahead: list[Future[Any]] = []
        for start in range(0, len(paths), size):
            now = ahead or [pool.submit(open_one, path) for path in paths[:size]]
            ahead = [pool.submit(open_one, path) for path in paths[start + size : start + 2 * size]]
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


def _outputs(config: EvalConfig) -> list[tuple[Path, Writer]]:
    """What is to be written, refused here when it cannot be, before anything is computed."""
    found: list[tuple[Path, Writer]] = []
    by_ending: dict[str, dict[str, Writer]] = {
        "output": {".csv": _write_csv, ".json": _write_json},
        "contact_sheet": {".png": _draw, ".pdf": _draw},
    }
    for key, writers in by_ending.items():
        if (name := getattr(config, key)) is not None:
            path = output_file(key, name, *writers)
            found.append((path, writers[path.suffix]))
    if config.contact_sheet is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("a contact sheet needs matplotlib: pip install matplotlib")
    return found


def _write_csv(path: Path, predictions: Predictions, predictor: Predictor) -> None:
    write_table(path, predictor.columns, (row for prediction in predictions for row in predictor.rows(*prediction)))


def _write_json(path: Path, predictions: Predictions, predictor: Predictor) -> None:
    path.write_text(strict_json([predictor.as_dict(*prediction) for prediction in predictions], indent=2) + "\n")


def _draw(path: Path, predictions: Predictions, predictor: Predictor) -> None:
    predictor.draw(path, predictions)
