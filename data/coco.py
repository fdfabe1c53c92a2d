"""Images with their objects, as COCO's instances_*.json files list them, in flat arrays.

118 000 images with 860 000 objects take about 200 MB once, however many worker processes look at them: Python dicts
would be copied into each, for counting references writes to every page. Masks stay run lengths (RLE) of 150 bytes each.

Shapes: n images, m objects of all of them, C categories.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from data.image_list import Names, read_file

SMALLEST_IMAGE = 32  # pixels a side, below which an image is left out of training (Chen et al., mmdetection)
SMALLEST_BOX = 1.0  # pixels a side, below which an object is


class Objects(NamedTuple):
    """Objects of one image: boxes (k, 4) float32 x0 y0 x1 y1 inside the image, labels (k,) int64, masks k RLEs."""

    boxes: np.ndarray
    labels: np.ndarray
    masks: list[bytes]


@dataclass(frozen=True)
class CocoImages:
    """One split of a detection data set, sorted by image id.

    Attributes:
        paths: of the images.
        ids: (n,) int64, of the images in the file.
        sizes: (n, 2) int32 height and width.
        first: (n + 1,) int64; image i has the objects first[i] to first[i + 1].
        boxes: (m, 4) float64 x y width height, as in the file.
        areas: (m,) float64, as in the file (of the mask, not the box).
        labels: (m,) int32, contiguous from 0: places in `category_ids`.
        crowd: (m,) bool, regions of many objects, which count neither for nor against a detector.
        masks: m RLEs over the whole image, empty where the file has none.
        category_ids: (C,) int64, the file's.
        class_names: C of them.
        total_bytes: of the annotation file.
    """

    paths: Names
    ids: np.ndarray
    sizes: np.ndarray
    first: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    masks: Names
    category_ids: np.ndarray
    class_names: tuple[str, ...]
    total_bytes: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def without_masks(self) -> int:
        """How many objects have none."""
        return int(np.sum(np.diff(self.masks.offsets) == 0))

    @property
    def owners(self) -> np.ndarray:
        """(m,) the image of every object."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    def clipped(self) -> np.ndarray:
        """(m, 4) float64 corners x0 y0 x1 y1 of the boxes, inside their images."""
        limits = self.sizes[self.owners][:, [1, 0]].astype(np.float64)
        low = self.boxes[:, :2]
        return np.concatenate([low.clip(0, limits), (low + self.boxes[:, 2:]).clip(0, limits)], axis=1)

    def degenerate(self) -> np.ndarray:
        """(m,) bool: under a pixel wide or high inside the image. A detector cannot learn from them."""
        corners = self.clipped()
        return np.any(corners[:, 2:] - corners[:, :2] < SMALLEST_BOX, axis=1)

    def objects(self, index: int) -> Objects:
        """What a detector learns from in an image: no crowds, nothing degenerate."""
        mine = slice(int(self.first[index]), int(self.first[index + 1]))
        height, width = self.sizes[index]
        low = self.boxes[mine, :2]
        corners = np.concatenate([low, low + self.boxes[mine, 2:]], axis=1).clip(0, [width, height, width, height])
        keep = ~self.crowd[mine] & np.all(corners[:, 2:] - corners[:, :2] >= SMALLEST_BOX, axis=1)
        masks = [self.masks.raw(mine.start + int(k)) for k in np.flatnonzero(keep)]
        return Objects(corners[keep].astype(np.float32), self.labels[mine][keep].astype(np.int64), masks)

    def read(self, index: int) -> bytes:
        """Encoded bytes of an image.

        Raises:
            BadImageError: the file cannot be read.
        """
        return read_file(self.paths[index])

    def select(self, keep: Sequence[int] | np.ndarray) -> "CocoImages":
        """The images at the sorted indices `keep`; categories stay."""
        keep = np.asarray(keep, np.int64)
        chosen = np.zeros(len(self), bool)
        chosen[keep] = True
        rows = np.flatnonzero(chosen[self.owners])
        names = Names.pack(self.paths.raw(int(i)) for i in keep)
        names.prefix = self.paths.prefix
        first = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.diff(self.first)[keep])])
        masks = Names.pack(self.masks.raw(int(k)) for k in rows)
        of_objects = (self.boxes[rows], self.areas[rows], self.labels[rows], self.crowd[rows], masks)
        return CocoImages(
            names, self.ids[keep], self.sizes[keep], first, *of_objects,
            self.category_ids, self.class_names, self.total_bytes,
        )  # fmt: skip

    def learnable(self) -> "CocoImages":
        """The images to train on: of at least 32 pixels a side, and with an object that is no crowd."""
        useful = ~self.crowd & ~self.degenerate()
        with_objects = np.bincount(self.owners[useful], minlength=len(self)) > 0
        return self.select(np.flatnonzero(with_objects & (self.sizes.min(axis=1) >= SMALLEST_IMAGE)))

    @property
    def fingerprint(self) -> dict[str, int | str]:
        """Counts, size and a hash over images, objects and classes: equal on all ranks and after a resume."""
        digest = hashlib.sha256()
        parts = (self.paths.block, self.ids, self.sizes, self.first, self.boxes, self.labels, self.crowd)
        for part in (*parts, self.masks.block):
            digest.update(np.ascontiguousarray(part).data)
        digest.update("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        return {
            "images": len(self),
            "objects": len(self.labels),
            "classes": len(self.class_names),
            "bytes": self.total_bytes,
            "sha256": digest.hexdigest(),
        }


def bitmaps(masks: Sequence[bytes], height: int, width: int) -> np.ndarray:
    """RLEs -> (k, height, width) uint8 of 0 and 1; an object without a mask has an empty one."""
    if not masks:
        return np.zeros((0, height, width), np.uint8)
    empty = coco_mask.encode(np.zeros((height, width, 1), np.uint8, order="F"))[0]["counts"]
    decoded = coco_mask.decode([{"size": [height, width], "counts": mask or empty} for mask in masks])
    return np.ascontiguousarray(decoded.transpose(2, 0, 1))


class CocoSplits(NamedTuple):
    train: CocoImages  # what there is to learn from
    val: CocoImages  # everything: images without objects can be got wrong too


def image_names(folder: Path) -> set[str]:
    """Names of the files in a folder.

    Raises:
        ValueError: there is no such folder.
    """
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"image folder {str(folder)!r}: {error.strerror}; set data.root to the one above it") from None
