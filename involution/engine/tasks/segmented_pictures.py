"""The classes of the pixels of the user's own pictures: shares, overlays, label files."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.cityscapes import CITYSCAPES
from data.mask_list import IGNORED
from data.transforms import normalise
from involution.checks import printable
from involution.engine.config import EvalConfig
from involution.engine.errors import UserError
from involution.engine.pictures import find_images, for_pictures, open_picture
from involution.engine.tasks.mean_iou import classify
from involution.engine.tasks.overlays import colours_of, overlay, write_sheet
from involution.loading import IMAGENET, Opened

log = logging.getLogger("involution")
SHEET = 30  # pictures on a contact sheet


class Segmented(NamedTuple):
    """Shares of a picture's area by class, and its classes (H, W) uint8 where a sheet will show them."""

    shares: dict[str, float]  # the largest first
    classes: np.ndarray | None


class LabelFiles:
    """Writes classes as label files into a folder: `values` (N,) of the classes, as the benchmark numbers them.

    Raises:
        UserError: it is no folder that can be written to.
    """

    def __init__(self, folder: str, values: Sequence[int] | np.ndarray) -> None:
        self.folder, self.values = Path(folder), np.full(256, IGNORED, np.uint8)
        self.values[: len(values)] = values  # model.num_classes may be more
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"predictions is {folder}; it should be a folder: {error.strerror}") from error

    def write(self, name: str, classes: Tensor) -> None:
        path = self.folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.values[classes.cpu().numpy()]).save(path)


def label_names(pictures: Sequence[str]) -> list[str]:
    """A label file's name for each picture, all different: its own, or with the folders below the common one; the
    ending stays where only that tells two apart."""
    common = os.path.commonpath([os.path.dirname(path) for path in pictures]) if pictures else ""
    relative = [os.path.relpath(path, common) for path in pictures]
    without_ending = [os.path.splitext(path)[0] for path in relative]
    for names in ([os.path.basename(path) for path in without_ending], without_ending):
        if len(set(names)) == len(names):
            return names
    return relative


class SegmentedPictures:
    """See Predictor in this folder's __init__.py. Pictures go through the model one by one, as large as they are."""

    columns: tuple[str, ...] = ("image", "class", "percent")  # a line for every picture and class in it
    channels = 3

    def __init__(self, opened: Opened, config: EvalConfig, told: dict[str, Any], device: torch.device) -> None:
        prepared = {key: opened.data.get(key, IMAGENET.get(key)) for key in ("mean", "std", "window")} | told
        self.mean, self.std, self.window = (prepared[key] for key in ("mean", "std", "window"))
        self.model, self.device = for_pictures(opened.model, config, device), device
        self.class_names = class_names_of(opened)
        self.left = SHEET if config.contact_sheet is not None else 0
        city = self.class_names == CITYSCAPES.names
        values = CITYSCAPES.values if city else np.arange(len(self.class_names))
        self.files = None if config.predictions is None else LabelFiles(config.predictions, values)
        pictures = [os.path.abspath(path) for path in find_images(config.images)] if self.files else []
        self.names = dict(zip(pictures, label_names(pictures)))

    @torch.inference_mode()
    def predict(self, pictures: Sequence[tuple[Path, Image.Image]]) -> list[Segmented]:
        return [self._predict(path, np.array(picture)) for path, picture in pictures]

    def _predict(self, path: Path, picture: np.ndarray) -> Segmented:
        pixels = normalise(torch.from_numpy(picture)[None].to(self.device), self.mean, self.std)
        classes = classify(self.model, pixels, picture.shape[:2], self.window)
        if self.files is not None:
            self.files.write(self.names[os.path.abspath(path)], classes)
        counts = np.bincount(classes.cpu().numpy().ravel(), minlength=len(self.class_names))
        order = np.argsort(-counts, kind="stable")
        shares = {self.class_names[i]: counts[i] / counts.sum() for i in order.tolist() if counts[i]}
        self.left -= 1
        return Segmented(shares, classes.cpu().numpy() if self.left >= 0 else None)

    def text(self, path: Path, prediction: Segmented) -> str:
        return "\n".join(
            [printable(path), *(f"  {100 * share:5.1f} %  {name}" for name, share in prediction.shares.items())]
        )

    def as_dict(self, path: Path, prediction: Segmented) -> dict[str, Any]:
        return {"image": str(path), "classes": {name: round(100 * p, 4) for name, p in prediction.shares.items()}}

    def rows(self, path: Path, prediction: Segmented) -> Iterator[tuple[Path, str, str]]:
        return ((path, name, f"{100 * share:.4f}") for name, share in prediction.shares.items())

    def draw(self, sheet: Path, predictions: list[tuple[Path, Segmented]]) -> None:
        """A row for every picture: as it is, and under the colours of its classes."""
        if len(predictions) > SHEET:
            log.warning("the contact sheet shows the first %d of %d pictures", SHEET, len(predictions))
        rows, shown, colours = [], set(), colours_of(self.class_names)
        for path, prediction in predictions[:SHEET]:
            assert prediction.classes is not None
            picture = np.asarray(open_picture(path, scaled=True))
            rows.append([picture, overlay(picture, prediction.classes, colours)])
            shown |= set(np.unique(prediction.classes).tolist())
        names = [path.name for path, _ in predictions[:SHEET]]
        write_sheet(sheet, rows, names, ("picture", "prediction"), self.class_names, sorted(shown))


def class_names_of(opened: Opened) -> tuple[str, ...]:
    """The names of a model's classes; weights alone with 19 are taken for Cityscapes', others are numbered."""
    count = opened.model.num_classes
    if opened.class_names is None and count == len(CITYSCAPES.names):
        return CITYSCAPES.names
    names = tuple(opened.class_names or ())
    return names + tuple(str(i) for i in range(len(names), count))  # model.num_classes may exceed the data set's
