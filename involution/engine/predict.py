"""`eval.py images=...`: the likeliest classes of the user's own pictures."""

import csv
import importlib.util
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from data.folder import EXTENSIONS
from involution.engine.config import EvalConfig
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.evaluate import autocast
from involution.engine.load import PREPARATION, given
from involution.loading import Classifier, load
from involution.visualize import find_layer, heat_map_picture, kernel_heat_maps

log = logging.getLogger("involution")
TOP = 5
SHEET = 50  # pictures on a contact sheet; each takes 260 pixels of its height
Prediction = tuple[Path, list[tuple[str, float]]]  # file; classes and their probabilities, the likeliest first
Writer = Callable[[Path, list[Prediction], Classifier], None]


def predict_images(config: EvalConfig, overrides: list[str], world: World) -> dict[str, Any]:
    """Print and write what the checkpoint sees in `config.images`; returns the program's result.

    Raises:
        ValueError: for a checkpoint, picture or output file that cannot be used.
    """
    if world.size > 1:
        raise UserError("images= runs in one process; start it with plain `python eval.py ...`")
    device, paths = world.device, find_images(config.images)
    outputs = _outputs(config)
    told = {k: config.data[k] for k in PREPARATION if k != "train_size" and f"data.{k}" in given(overrides)}
    classifier = load(config.checkpoint, device, **told)
    if config.contact_sheet is not None and find_layer(classifier.model, config.layer) is None:
        raise UserError(f"contact_sheet: {config.checkpoint} has no involutions, hence no kernels to show")
    predictions: list[Prediction] = []
    for start in range(0, len(paths), config.batch_size):
        batch = paths[start : start + config.batch_size]
        with autocast(device, config.precision):
            found = classifier.predict([open_picture(path) for path in batch], TOP)
        for prediction in zip(batch, found, strict=True):
            print(_as_text(prediction))
            predictions.append(prediction)
    for path, write in outputs:
        try:
            write(path, predictions, classifier)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return {
        "checkpoint": str(config.checkpoint),
        "n": len(predictions),
        "predictions": [_as_dict(prediction) for prediction in predictions],
    }


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


def open_picture(path: Path) -> Image.Image:
    """The picture in a file, in RGB. Unlike in data sets, cameras' note which side is up is obeyed.

    Raises:
        UserError: it cannot be read as a picture.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        reason = "Pillow cannot identify it as an image"
    except Exception as error:  # Pillow's plugins raise almost every type
        reason = str(error) or type(error).__name__
    raise UserError(f"images: {path} cannot be read as a picture: {reason}")


def _as_text(prediction: Prediction) -> str:
    path, classes = prediction
    return "\n".join([str(path), *(f"  {100 * p:5.1f} %  {name}" for name, p in classes)])


def _as_dict(prediction: Prediction) -> dict[str, Any]:
    path, classes = prediction
    return {"image": str(path), "top5": [{"class": name, "confidence": round(p, 6)} for name, p in classes]}


def _outputs(config: EvalConfig) -> list[tuple[Path, Writer]]:
    """What is to be written, refused here when it cannot be, before anything is computed."""
    found: list[tuple[Path, Writer]] = []
    draw = partial(_draw, layer=config.layer)
    by_ending: dict[str, dict[str, Writer]] = {
        "output": {".csv": _write_csv, ".json": _write_json},
        "contact_sheet": {".png": draw, ".pdf": draw},
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


def _write_csv(path: Path, predictions: list[Prediction], classifier: Classifier) -> None:
    """A line for every picture and class: image, rank (from 1), class, confidence."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "rank", "class", "confidence"])
        for image, classes in predictions:
            table.writerows([image, rank, name, f"{p:.6f}"] for rank, (name, p) in enumerate(classes, 1))


def _write_json(path: Path, predictions: list[Prediction], classifier: Classifier) -> None:
    path.write_text(json.dumps([_as_dict(prediction) for prediction in predictions], indent=2) + "\n")


def _draw(path: Path, predictions: list[Prediction], classifier: Classifier, layer: str | None) -> None:
    """A row for every picture, as the model sees it, beside the heat maps of its involution kernels (Figure 3)."""
    from matplotlib.figure import Figure

    if len(predictions) > SHEET:
        log.warning("the contact sheet shows the first %d of %d pictures", SHEET, len(predictions))
        predictions = predictions[:SHEET]
    device = next(classifier.model.parameters()).device
    normalise: Any = classifier.transform.transforms[-1]  # type: ignore[attr-defined]
    figure = Figure(figsize=(12, 1.75 * len(predictions) + 0.3), layout="constrained")
    name = find_layer(classifier.model, layer)
    figure.suptitle(f"sums of the kernels of {name}, one map a group; blue is low, red high", fontsize=9)
    for axes, (image, classes) in zip(figure.subplots(len(predictions), squeeze=False)[:, 0], predictions, strict=True):
        pixels = classifier.transform(open_picture(image))[None].to(device)
        maps = kernel_heat_maps(classifier.model, pixels, layer)
        axes.imshow(heat_map_picture(pixels, maps, normalise.mean, normalise.std).permute(1, 2, 0).cpu().numpy())
        likeliest = ", ".join(f"{name} {100 * p:.1f} %" for name, p in classes[:3])
        axes.set_title(f"{image.name}: {likeliest}", fontsize=8, loc="left", parse_math=False)
        axes.set_axis_off()
    figure.savefig(path, dpi=150)
