"""Batches of pictures with objects, at their own sizes and in 8 bits: resizing and padding happen where the model is.

Shapes: a batch has b pictures (3, H, W) of any sizes, each with k objects.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset

from data.coco import CocoImages, CocoSplits, Objects, bitmaps
from data.coco_file import COCO, FOLDER, open_coco, open_coco_split
from data.decode import BadImageError, decode
from data.demo_detection import demo_detection_root
from data.loader import EvalLoader, TrainLoader
from data.orders import by_orientation
from data.sampling import MicroBatch, Plan, draws, eval_batches
from data.torch_loader import TorchBackend

DATASETS = ("coco", "detection_folder", "demo_detection")
BLANK = 64  # pixels a side of what stands for a picture when none of a batch can be read


def open_detection(name: str, root: str | os.PathLike[str] | None = None) -> CocoSplits:
    """A data set of `DATASETS`, from its folder; demo_detection needs none.

    Raises:
        ValueError: the name is unknown, or the folder is not what it should be.
    """
    return open_coco(*_place(name, root))


def open_detection_val(name: str, root: str | os.PathLike[str] | None = None) -> CocoImages:
    """The validation images of a data set of `DATASETS`, whether or not training ones are there; errors alike."""
    return open_coco_split(*_place(name, root), "val")


def _place(name: str, root: str | os.PathLike[str] | None) -> tuple[Any, Sequence[tuple[str, str]]]:
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(DATASETS)}")
    if name == "demo_detection":
        return demo_detection_root(root), COCO
    return root, COCO if name == "coco" else FOLDER


class DetectionBatch(NamedTuple):
    """Pictures with their objects; only the first `valid` of them count.

    images b of (3, H, W) uint8, boxes b of (k, 4) float32 x0 y0 x1 y1 in pixels, labels b of (k,) int64, masks b lists
    of k RLEs (empty where they are not wanted), indices b places in the data set; `bad` are unreadable files.
    """

    images: list[Tensor]
    boxes: list[Tensor]
    labels: list[Tensor]
    masks: list[list[bytes]]
    indices: list[int]
    valid: int
    bad: list[BadImageError]
    dataset: CocoImages | None = None  # what the indices are places of; an evaluation's batches have it

    def to(self, device: torch.device, *, channels_last: bool = False) -> "DetectionBatch":
        """The batch on the device; the masks become pixels there only when `targets` is called."""
        images, boxes, labels = ([part.to(device, non_blocking=True) for part in parts] for parts in self[:3])
        return self._replace(images=images, boxes=boxes, labels=labels)

    def targets(self, masks: bool) -> list[dict[str, Tensor]]:
        """What a detector learns from: {"boxes", "labels"}, with `masks` also "masks" (k, H, W) uint8."""
        found = [{"boxes": boxes, "labels": labels} for boxes, labels in zip(self.boxes, self.labels)]
        for target, image, rle in zip(found, self.images, self.masks) if masks else ():
            target["masks"] = torch.from_numpy(bitmaps(rle, *image.shape[-2:])).to(image.device, non_blocking=True)
        return found


@dataclass(frozen=True)
class DetectionPictures(Dataset[DetectionBatch]):
    """Maps a request for a micro-batch to it, in a worker process.

    Args:
        seed: with epoch and sample it decides which pictures are mirrored. None: none is, as in evaluation.
        flip: probability of it.
        masks: whether they are wanted.
    """

    images: CocoImages
    seed: int | None = None
    flip: float = 0.0
    masks: bool = False

    def __getitem__(self, request: MicroBatch) -> DetectionBatch:
        # what fills up the last batch does not count, and is only needed where nothing else is there
        indices = request.indices[: max(request.valid, 1)]
        mirrored = np.zeros(len(indices), bool)
        if self.seed is not None:
            mirrored = draws(self.seed, request.epoch, indices)[:, -1] < self.flip
        rows: list[tuple[Tensor, Objects, int]] = []
        bad: list[BadImageError] = []
        for index, mirror in zip(indices.tolist(), mirrored.tolist()):
            try:
                rows.append((*self._row(index, mirror), index))
            except BadImageError as error:
                bad.append(error)  # a DataLoader would wrap the message in a traceback of its worker
        valid = min(len(rows), request.valid)
        if not rows:
            nothing = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), [])
            rows = [(torch.zeros(3, BLANK, BLANK, dtype=torch.uint8), nothing, 0)]
        return DetectionBatch(
            [picture for picture, _, _ in rows],
            [torch.from_numpy(objects.boxes) for _, objects, _ in rows],
            [torch.from_numpy(objects.labels) for _, objects, _ in rows],
            [objects.masks for _, objects, _ in rows],
            [index for _, _, index in rows], valid, bad if request.valid else [],
        )  # fmt: skip

    def _row(self, index: int, mirror: bool) -> tuple[Tensor, Objects]:
        images = self.images
        height, width = images.sizes[index].tolist()
        picture = np.array(decode(images.read(index), images.paths[index], annotated=(width, height)))
        if picture.shape[:2] != (height, width):
            reason = f"it has {picture.shape[1]} x {picture.shape[0]} pixels, in the annotations {width} x {height}"
            raise BadImageError(images.paths[index], reason)
        objects = images.objects(index)
        if not self.masks:
            objects = objects._replace(masks=[])
        if mirror:
            picture, objects = picture[:, ::-1], mirrored_objects(objects, height, width)
        return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))), objects


def mirrored_objects(objects: Objects, height: int, width: int) -> Objects:
    """Left becomes right."""
    boxes = objects.boxes.copy()
    boxes[:, [0, 2]] = width - objects.boxes[:, [2, 0]]
    masks = objects.masks
    if masks:  # one after the other: a hundred of 4000 x 3000 pixels are a gigabyte
        pixels = (bitmaps([mask], height, width)[0, :, ::-1] for mask in masks)
        masks = [coco_mask.encode(np.asfortranarray(mask))["counts"] for mask in pixels]
    return Objects(boxes, objects.labels, masks)


class DetectionTrainLoader(TrainLoader):
    """See data.loader.TrainLoader; neighbours in an epoch's order have the same orientation."""

    def _order(self, epoch: int) -> np.ndarray:
        sizes = self.settings.images.sizes
        return by_orientation(super()._order(epoch), sizes[:, 0] > sizes[:, 1], self.plan.global_batch_size)

    def _accept(self, loaded: Any) -> Any:
        self._note(loaded.bad, loaded.valid)
        return loaded


class DetectionEvalLoader(EvalLoader):
    """See data.loader.EvalLoader."""

    def _accept(self, loaded: Any) -> Any:
        self._note(loaded.bad, loaded.valid)
        return loaded._replace(dataset=self.dataset)


def train_loader(
    images: CocoImages,
    *,
    batch_size: int,
    global_batch_size: int,
    seed: int,
    flip: float = 0.5,
    masks: bool = False,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    workers: int = 4,
    on_error: str = "stop",
) -> DetectionTrainLoader:
    """Endless training batches, mirrored with probability `flip`. Other arguments: see data.train_loader.

    Raises:
        ValueError: an argument is impossible.
    """
    plan = Plan(len(images), batch_size, global_batch_size, rank, world_size)
    pictures = DetectionPictures(images, seed, flip, masks)
    return DetectionTrainLoader(TorchBackend(pictures, workers, torch.device(device)), pictures, plan, seed, on_error)


def eval_loader(
    images: CocoImages,
    *,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    workers: int = 4,
    on_error: str = "stop",
) -> DetectionEvalLoader:
    """Evaluation batches; image p goes to rank p % world_size. Batches above 1 are padded, which changes results.

    Raises:
        ValueError: an argument is impossible.
    """
    if batch_size < 1 or not 0 <= rank < world_size or not len(images):
        raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size} and {len(images)} images do not work")
    pictures = DetectionPictures(images)
    requests = eval_batches(len(images), batch_size, rank, world_size)
    return DetectionEvalLoader(TorchBackend(pictures, workers, torch.device(device)), pictures, requests, on_error)
