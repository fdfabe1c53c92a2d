"""Reads instances_*.json files and the folders beside them; says what is wrong with them, one message each.

Only the files of train and val are opened: captions, key points and panoptic ones may lie beside them.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from data.coco import CocoImages, CocoSplits, image_names
from data.image_list import Names

log = logging.getLogger("involution.data")
COCO = (("{split}2017", "annotations/instances_{split}2017.json"),)
FOLDER = (  # the first of these that exists, as other tools write them
    ("{split}", "annotations/instances_{split}.json"),
    ("{split}", "annotations/{split}.json"),
    ("{split}", "{split}/_annotations.coco.json"),
    *COCO,
)


def open_coco(root: str | os.PathLike[str] | None, layouts: Sequence[tuple[str, str]] = FOLDER) -> CocoSplits:
    """The training and validation images of a folder.

    Args:
        root: has train2017/, val2017/ and annotations/instances_{train,val}2017.json (`layouts` COCO), or train/ and
            val/ with annotations/instances_{split}.json, annotations/{split}.json or {split}/_annotations.coco.json.

    Raises:
        ValueError: something is missing, or contradicts itself.
    """
    train, val = (open_coco_split(root, layouts, split) for split in ("train", "val"))
    base = Path(os.path.abspath(root or ""))
    _check_categories(train, val, base)
    learnable = train.learnable()
    if not len(learnable):
        raise ValueError(f"{str(base)!r} has no training image of 32 pixels or more with an object in it")
    small, crowd = int((train.degenerate() & ~train.crowd).sum()), int(train.crowd.sum())
    log.info(
        "%d of %d training images, with %d objects, are for learning; left out: %d without objects or under 32 pixels, "
        "%d boxes under a pixel, %d crowds",
        len(learnable), len(train), len(train.labels) - small - crowd, len(train) - len(learnable), small, crowd,
    )  # fmt: skip
    return CocoSplits(learnable, val)


def open_coco_split(root: str | os.PathLike[str] | None, layouts: Sequence[tuple[str, str]], split: str) -> CocoImages:
    """All images of one split of `open_coco`; the same errors."""
    if not root:
        raise ValueError("this data set needs its folder: set data.root to the folder with annotations/")
    base = Path(os.path.abspath(root))
    if not base.is_dir():
        raise ValueError(f"data folder {str(base)!r} does not exist; set data.root to the folder with annotations/")
    return read_split(*_find(base, split, layouts))


def _find(base: Path, split: str, layouts: Sequence[tuple[str, str]]) -> tuple[Path, Path]:
    for folder, file in layouts:
        annotations = base / file.format(split=split)
        if annotations.is_file():
            return annotations, base / folder.format(split=split)
    wanted = " or ".join(file.format(split=split) for _, file in layouts)
    raise ValueError(f"data folder {str(base)!r} has no annotations of {split}; expected {wanted}")


def read_split(annotations: Path, folder: Path) -> CocoImages:
    """The images of one annotation file, which lie in `folder`.

    Raises:
        ValueError: naming the file and the first thing in it that is wrong.
    """
    try:
        return _Reader(annotations, folder).images()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(annotations)!r} is no COCO file of instances: {error!r} while reading it") from error


class _Reader:
    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        try:
            with open(path, "rb") as file:
                self.content: Any = json.load(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"annotation file {str(path)!r} cannot be read: {error}") from None
        missing = [key for key in ("images", "annotations", "categories") if key not in self.content]
        if missing:
            raise ValueError(f"annotation file {str(path)!r} has no {' or '.join(missing)}: it lists no instances")

    def fail(self, count: int, what: str) -> ValueError:
        return ValueError(f"{str(self.path)!r}: {f'{count} times, first ' if count > 1 else ''}{what}")

    def images(self) -> CocoImages:
        listed = sorted(self.content["images"], key=lambda image: image["id"])
        categories = sorted(self.content["categories"], key=lambda category: category["id"])
        ids = np.array([image["id"] for image in listed], np.int64)
        if not len(ids) or not categories:
            raise ValueError(f"{str(self.path)!r} lists no {'categories' if len(ids) else 'images'}")
        if len(np.unique(ids)) != len(ids):
            raise ValueError(f"{str(self.path)!r} lists an image id twice")
        numbers = {category["id"]: k for k, category in enumerate(categories)}
        if len(numbers) != len(categories):
            raise ValueError(f"{str(self.path)!r} lists a category id twice")
        self._check_files([image["file_name"] for image in listed])
        sizes = np.array([(image["height"], image["width"]) for image in listed], np.int32)
        names = Names.pack(os.fsencode(image["file_name"]) for image in listed)
        names.prefix = f"{self.folder}/"
        rows, owner = self._sorted_objects(ids)
        if strange := [row for row in rows if row["category_id"] not in numbers]:
            what = "object {id} has category {category_id}, which is not listed".format(**strange[0])
            raise self.fail(len(strange), what)
        boxes = self._boxes(rows, sizes[owner])
        told = np.array([row.get("area") for row in rows], np.float64)  # None: not a number
        areas = np.where(np.isfinite(told), told, boxes[:, 2] * boxes[:, 3])
        return CocoImages(
            names, ids, sizes, np.searchsorted(owner, np.arange(len(ids) + 1)), boxes, areas,
            np.array([numbers[row["category_id"]] for row in rows], np.int32),
            np.array([bool(row.get("iscrowd", 0)) for row in rows], bool),
            Names.pack(self._masks(rows, sizes[owner])),
            np.array([category["id"] for category in categories], np.int64),
            tuple(_names(categories)),
            self.path.stat().st_size,
        )  # fmt: skip

    def _check_files(self, names: list[str]) -> None:
        there = image_names(self.folder)
        # file names with folders in them are looked up one by one
        absent = [n for n in names if n not in there and not ("/" in n and Path(f"{self.folder}/{n}").is_file())]
        if absent:
            raise ValueError(
                f"{len(absent)} of {len(names)} images of {str(self.path)!r} are not in {str(self.folder)!r}, "
                f"first {absent[0]}"
            )

    def _sorted_objects(self, ids: np.ndarray) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The annotations in the order of their images, and the place (m,) of each one's image."""
        rows = self.content["annotations"]
        of = np.array([row["image_id"] for row in rows], np.int64)
        place = np.searchsorted(ids, of).clip(max=len(ids) - 1)
        if len(lost := np.flatnonzero(ids[place] != of)):
            what = f"object {rows[lost[0]].get('id')} is in image {of[lost[0]]}, which is not listed"
            raise self.fail(len(lost), what)
        order = np.argsort(place, kind="stable")
        return [rows[k] for k in order], place[order]

    def _boxes(self, rows: list[dict[str, Any]], sizes: np.ndarray) -> np.ndarray:
        """(m, 4); a box most of which is outside tells of another image, or of corners in place of width and height."""
        try:
            boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(len(rows), 4)
        except ValueError:
            bad = next(row for row in rows if len(row["bbox"]) != 4)
            raise self.fail(1, f"object {bad.get('id')} has the bbox {bad['bbox']}, not four numbers") from None
        wrong = np.flatnonzero(~np.isfinite(boxes).all(axis=1) | (boxes[:, 2:] < 0).any(axis=1))
        if len(wrong):
            what = f"object {rows[wrong[0]].get('id')} has the bbox {boxes[wrong[0]].tolist()}"
            raise self.fail(len(wrong), f"{what}, not x, y, width >= 0, height >= 0")
        limits = sizes[:, ::-1].astype(np.float64)
        inside = (boxes[:, :2] + boxes[:, 2:]).clip(0, limits) - boxes[:, :2].clip(0, limits)
        # half of it, but a thin one at the border may stick out by a pixel
        mostly = (inside.prod(axis=1) < 0.5 * boxes[:, 2:].prod(axis=1)) & ((boxes[:, 2:] - inside).max(axis=1) > 1)
        outside = np.flatnonzero(mostly)
        if len(outside):
            k, (height, width) = outside[0], sizes[outside[0]]
            raise self.fail(
                len(outside),
                f"object {rows[k].get('id')} in image {rows[k]['image_id']} has the bbox {boxes[k].tolist()}, mostly "
                f"outside the image of {width} x {height} pixels; expected [x, y, width, height]",
            )
        return boxes

    def _masks(self, rows: list[dict[str, Any]], sizes: np.ndarray) -> Iterator[bytes]:
        for row, size in zip(rows, sizes.tolist()):
            shape = row.get("segmentation")
            try:
                yield rle(shape, size) if shape else b""
            except Exception as error:  # pycocotools raises almost every type
                raise self.fail(1, f"object {row.get('id')} in image {row['image_id']}: its mask {error}") from error


def _names(categories: list[dict[str, Any]]) -> Iterator[str]:
    """Their names, with the id where several have the same one."""
    counts = Counter(str(category["name"]) for category in categories)
    for category in categories:
        name = str(category["name"])
        yield name if counts[name] == 1 else f"{name} ({category['id']})"


def rle(shape: Any, size: list[int]) -> bytes:
    """A segmentation of the file (polygons, or run lengths plain or compressed) as compressed run lengths.

    Args:
        size: [height, width] of the image.

    Raises:
        ValueError: it is of another size.
    """
    if isinstance(shape, dict):
        if list(shape["size"]) != size:
            raise ValueError(f"is of {shape['size']} pixels, its image of {size} [height, width]")
        if isinstance(shape["counts"], list):
            if sum(shape["counts"]) != size[0] * size[1]:
                raise ValueError(f"counts {sum(shape['counts'])} pixels, its image has {size[0] * size[1]}")
            return coco_mask.frPyObjects([shape], *size)[0]["counts"]
        counts = shape["counts"]
        return counts.encode() if isinstance(counts, str) else counts
    return coco_mask.merge(coco_mask.frPyObjects(shape, *size))["counts"]


def _check_categories(train: CocoImages, val: CocoImages, base: Path) -> None:
    a, b = (dict(zip(split.category_ids.tolist(), split.class_names)) for split in (train, val))
    if a == b:
        return
    differ = [
        f"{key}: {a.get(key, 'none')} | {b.get(key, 'none')}" for key in sorted(a | b) if a.get(key) != b.get(key)
    ]
    raise ValueError(
        f"the categories of train and val below {str(base)!r} differ in {len(differ)} ids "
        f"(id: train | val): {'; '.join(differ[:4])}; make them equal"
    )
