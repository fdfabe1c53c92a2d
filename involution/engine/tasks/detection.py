"""Detection and instance segmentation: boxes, classes, masks. See Setup in this folder's __init__.py."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import MISSING
from torch import Tensor, nn

from data import detection as loaders
from data.coco import CocoImages, CocoSplits
from involution.engine.config import EvalConfig, TrainConfig
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.outputs import output_file
from involution.engine.tasks.average_precision import MASK_NAMES, NAMES, Found, as_found, score
from involution.engine.tasks.detected_pictures import DetectedGallery, DetectedPictures
from involution.loading import Opened

if TYPE_CHECKING:
    from data.detection import DetectionBatch, DetectionEvalLoader, DetectionTrainLoader

log = logging.getLogger("involution")


@dataclass
class DetectionData:
    """conf/data/_detection.yaml"""

    name: str = MISSING
    root: str | None = MISSING
    loader: str = MISSING
    workers: int = MISSING
    on_error: str = MISSING


@dataclass
class DetectionAugmentation:
    hflip: float = MISSING


DATA: type = DetectionData
AUGMENTATION: type = DetectionAugmentation
DATASETS: tuple[str, ...] = loaders.DATASETS
EVAL_BATCH: int | None = 1  # padding to a common size changes what is found
SIZES_VARY: bool = True
PREPARATION: tuple[str, ...] = ()  # sizes and normalisation are the model's own
PRINTED: tuple[str, ...] = (*NAMES, *MASK_NAMES, "n", "seconds", "scoring_seconds")
PARTS = {
    "retinanet": ("loss_classifier", "loss_box_reg"),
    "faster_rcnn": ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"),
    "mask_rcnn": ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"),
}


class Detection:
    """The losses of a detector, and COCO's average precision in percent."""

    headline = "ap"

    def __init__(self, model: str) -> None:
        self.masks, self.parts = model == "mask_rcnn", PARTS[model]
        self.names: tuple[str, ...] = (*NAMES, *MASK_NAMES) if self.masks else NAMES

    def loss(self, model: nn.Module, batch: DetectionBatch) -> dict[str, Tensor]:
        """The model's means over the micro-batch times its images: a process that accumulates and ranks that share the
        images of a step agree. (A batch of nothing that counts runs too, for every rank has to have gradients.)"""
        losses = model(batch.images, batch.targets(self.masks))
        return {name: losses[name] * batch.valid for name in self.parts}

    def evaluation(self) -> Detections:
        return Detections()


class Detections:
    """What a detector finds, kept as arrays and RLEs on the CPU until it is scored once.

    Args:
        path: of a file in COCO's result format to write as well.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.found = path, list[Found]()
        self.images: CocoImages | None = None
        self.began = time.monotonic()

    def add(self, model: nn.Module, batch: DetectionBatch) -> None:
        self.images = batch.dataset
        if not batch.valid:
            return
        for index, image, result in zip(batch.indices, batch.images, model(batch.images), strict=True):
            self.found.append(as_found(index, result, (image.shape[-2], image.shape[-1])))

    def finish(self, world: World) -> dict[str, Any]:
        assert self.images is not None, "a loader yields at least one (possibly all padding) batch"
        results = score(self.images, self.found, world, self.path)
        log.info("scored the detections of %d images in %.1f s", results["n"], results["scoring_seconds"])
        return results | {"seconds": round(time.monotonic() - self.began, 3)}


def check(config: TrainConfig, world: World) -> None:
    o, backbone = config.train, config.model.get("backbone") or {}
    _check_loader(config.data)
    if o.freeze is not None:
        raise UserError("train.freeze is for classifiers; a detector's is model.backbone.freeze")
    if o.loss != "cross_entropy":
        raise UserError(f"train.loss={o.loss} is for classifiers; a detector has losses of its own: cross_entropy")
    if o.label_smoothing:
        raise UserError(f"train.label_smoothing={o.label_smoothing} is for classifiers; set it to 0")
    weights = (backbone.get("pretrained"), config.checkpoint)
    if weights == (None, None) and (backbone.get("freeze") or backbone.get("norm_eval")) and world.is_main:
        log.warning(
            "model.backbone.pretrained is not set, so the stages and statistics that stay as they are will be random "
            "ones: give weights, or set model.backbone.freeze=null model.backbone.norm_eval=false"
        )


def _check_loader(d: DetectionData) -> None:
    if d.loader == "dali":
        raise UserError(
            "data.loader=dali has no pictures of their own sizes with boxes and masks; use data.loader=torch or auto"
        )


def build(config: TrainConfig) -> Detection:
    return Detection(config.model["name"])


def open_dataset(d: DetectionData) -> CocoSplits:
    return loaders.open_detection(d.name, d.root)


def open_val(d: DetectionData) -> CocoImages:
    return loaders.open_detection_val(d.name, d.root)


def train_loader(split: CocoImages, config: TrainConfig, world: World) -> DetectionTrainLoader:
    d, o, masks = config.data, config.train, config.model["name"] == "mask_rcnn"
    if masks and (lacking := split.without_masks):
        raise UserError(
            f"model=mask_rcnn learns masks, and {lacking} of {len(split.labels)} objects of the data set have none: "
            "complete the annotations, or use model=faster_rcnn"
        )
    return loaders.train_loader(
        split, global_batch_size=o.global_batch_size, batch_size=o.batch_size, rank=world.rank, world_size=world.size,
        seed=config.seed, flip=config.augmentation.hflip, masks=masks, **_loading(d, world),
    )  # fmt: skip


def eval_loader(split: CocoImages, d: DetectionData, batch_size: int, world: World) -> DetectionEvalLoader:
    _check_loader(d)
    if batch_size > 1:
        log.warning(
            "batch_size=%d: images are padded to the largest of their batch, which changes detections a little; "
            "published figures are those of batch_size=1", batch_size,
        )  # fmt: skip
    return loaders.eval_loader(
        split, batch_size=batch_size, rank=world.rank, world_size=world.size, **_loading(d, world)
    )


def _loading(d: DetectionData, world: World) -> dict[str, Any]:
    return {"workers": d.workers, "on_error": d.on_error, "device": world.device}


def input_shape(d: DetectionData) -> tuple[int, int, int]:
    return 3, 800, 1280  # what the paper counts FLOPs for


def gallery(split: CocoImages, d: DetectionData) -> DetectedGallery:
    return DetectedGallery(split)


def evaluation(loader: DetectionEvalLoader, predictions: str | None) -> Detections:
    return Detections(None if predictions is None else output_file("predictions", predictions, ".json"))


def predictor(opened: Opened, config: EvalConfig, told: dict[str, Any], device: torch.device) -> DetectedPictures:
    return DetectedPictures(opened, config, device)
