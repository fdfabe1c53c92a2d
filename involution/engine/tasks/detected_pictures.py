"""Boxes, masks, names and scores drawn into pictures: on boards while a run trains, and of the user's own pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from data.coco import CocoImages, bitmaps
from data.decode import BadImageError, decode
from involution.checks import printable
from involution.engine.config import EvalConfig
from involution.engine.pictures import for_pictures, open_picture
from involution.engine.tasks.average_precision import Found, as_found
from involution.loading import Opened
from involution.visualize import evaluating

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

log = logging.getLogger("involution")
PICTURES = 4  # on boards
SURE = 0.3  # least score of what is drawn there
SHEET = 50  # pictures on a contact sheet
LONG_SIDE = 480  # pixels of a picture that is shown
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#008080", "#9a6324")


def draw_objects(picture: Tensor, found: Found, class_names: Sequence[str], scores: bool = True) -> Tensor:
    """A picture (3, H, W) uint8 with what was found in it, at most `LONG_SIDE` pixels long."""
    height, width = picture.shape[-2:]
    factor = min(1.0, LONG_SIDE / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    shown = torch.nn.functional.interpolate(picture[None].float(), size, mode="bilinear", antialias=True)
    shown = shown[0].round().clamp(0, 255).byte()
    if not len(found.scores):
        return shown
    colours = [COLOURS[label % len(COLOURS)] for label in found.labels.tolist()]
    if found.masks is not None:
        masks = torch.from_numpy(bitmaps(found.masks, height, width)).float()[:, None]
        masks = torch.nn.functional.interpolate(masks, size, mode="area")[:, 0] > 0.5
        shown = draw_segmentation_masks(shown, masks, alpha=0.5, colors=colours)
    known = dict(enumerate(class_names))  # model.num_classes may be more
    names = [known.get(label, str(label)) for label in found.labels.tolist()]
    if scores:
        names = [f"{name} {score:.2f}" for name, score in zip(names, found.scores.tolist())]
    boxes = torch.from_numpy(found.boxes) * factor
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)  # a line at least
    labels = {"label_colors": "white", "label_background_colors": colours, "fill_labels": True}
    return draw_bounding_boxes(shown, boxes, names, colours, width=2, **labels)


def truth_of(images: CocoImages, index: int, masks: bool) -> Found:
    objects = images.objects(index)
    ones = np.ones(len(objects.labels), np.float32)
    return Found(index, objects.boxes, ones, objects.labels.astype(np.int32), objects.masks if masks else None)


def find(model: nn.Module, picture: Tensor, index: int, least: float) -> Found:
    """What a model is at least so sure of in a picture (3, H, W) uint8."""
    result = model([picture])[0]
    sure = result["scores"] >= least
    size = (picture.shape[-2], picture.shape[-1])
    return as_found(index, {key: value[sure] for key, value in result.items()}, size)


class DetectedGallery:
    """A few validation pictures, evenly spread over the data set: what the model finds (above) and what is there."""

    def __init__(self, images: CocoImages) -> None:
        self.images = images
        self.pictures: dict[int, Tensor] = {}
        for index in np.unique(np.linspace(0, len(images) - 1, PICTURES).astype(int)).tolist():
            try:
                height, width = images.sizes[index].tolist()
                picture = decode(images.read(index), images.paths[index], annotated=(width, height))
            except BadImageError:
                continue  # the loader says so
            self.pictures[index] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    @torch.inference_mode()
    def draw(self, model: nn.Module) -> dict[str, Tensor]:
        """{title: picture (3, H, W) in [0, 1]}. The model stays as it is."""
        if not self.pictures:
            return {}
        names = self.images.class_names
        with evaluating(model):
            found = [find(model, picture, index, SURE) for index, picture in self.pictures.items()]
        rows = [draw_objects(picture, one, names) for picture, one in zip(self.pictures.values(), found)]
        masks = any(one.masks is not None for one in found)
        for index, picture in self.pictures.items():
            rows.append(draw_objects(picture, truth_of(self.images, index, masks), names, scores=False))
        return {"detections": sheet_of(rows, len(self.pictures)).float() / 255}


def sheet_of(pictures: Sequence[Tensor], columns: int) -> Tensor:
    """Pictures (3, H, W) uint8 of any sizes side by side."""
    height, width = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
    same = [
        torch.nn.functional.pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1]), value=255)
        for picture in pictures
    ]
    return make_grid(torch.stack(same), columns, padding=4, pad_value=255)


class Seen(NamedTuple):
    """The objects in a picture of (height, width)."""

    found: Found
    size: tuple[int, int]


class DetectedPictures:
    """See Predictor in this folder's __init__.py."""

    columns: tuple[str, ...] = ("image", "class", "score", "x0", "y0", "x1", "y1")  # a line an object
    channels = 3

    def __init__(self, opened: Opened, config: EvalConfig, device: torch.device) -> None:
        self.model, self.device, self.least = for_pictures(opened.model, config, device), device, config.min_score
        known = opened.class_names or []
        self.class_names = [*known, *(str(k) for k in range(len(known), opened.model.num_classes))]

    @torch.inference_mode()
    def predict(self, pictures: Sequence[tuple[Path, Picture]]) -> list[Seen]:
        return [
            Seen(find(self.model, torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(self.device), 0, self.least),
                 (picture.height, picture.width))
            for _, picture in pictures
        ]  # fmt: skip

    def _objects(self, seen: Seen) -> Iterator[tuple[str, float, list[float]]]:
        labels, scores, boxes = (part.tolist() for part in (seen.found.labels, seen.found.scores, seen.found.boxes))
        return (
            (self.class_names[label], round(score, 6), [round(side, 2) for side in box])
            for label, score, box in zip(labels, scores, boxes)
        )

    def text(self, path: Path, prediction: Seen) -> str:
        lines = [f"  {100 * score:5.1f} %  {name}  at {box}" for name, score, box in self._objects(prediction)]
        return "\n".join([printable(path), *(lines or [f"  nothing with a score of {self.least} or more"])])

    def as_dict(self, path: Path, prediction: Seen) -> dict[str, Any]:
        objects: list[dict[str, Any]] = [
            {"class": name, "score": score, "box": box} for name, score, box in self._objects(prediction)
        ]
        for row, mask in zip(objects, prediction.found.masks or ()):
            row["mask"] = {"size": list(prediction.size), "counts": mask.decode("ascii")}
        return {"image": str(path), "objects": objects}

    def rows(self, path: Path, prediction: Seen) -> Iterator[tuple[Any, ...]]:
        return ((path, name, score, *box) for name, score, box in self._objects(prediction))

    def draw(self, sheet: Path, predictions: list[tuple[Path, Seen]]) -> None:
        if len(predictions) > SHEET:
            log.warning("the contact sheet shows the first %d of %d pictures", SHEET, len(predictions))
        drawn = [
            draw_objects(
                torch.from_numpy(np.array(open_picture(path, scaled=True))).permute(2, 0, 1),
                seen.found,
                self.class_names,
            )
            for path, seen in predictions[:SHEET]
        ]
        Image.fromarray(sheet_of(drawn, min(4, len(drawn))).permute(1, 2, 0).numpy()).save(sheet)
