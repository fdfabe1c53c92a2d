"""Cityscapes (Cordts et al., CVPR 2016) and data sets in its layout.

leftImg8bit/<split>/<city>/<frame>_leftImg8bit.png
gtFine/<split>/<city>/<frame>_gtFine_labelTrainIds.png   the 19 classes as 0-18; taken where every frame has one
gtFine/<split>/<city>/<frame>_gtFine_labelIds.png        as downloaded: 34 labels, of which 19 are classes
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.demo import write_once
from data.image_list import Names
from data.mask_list import FOREIGN, IGNORED, MaskList, pairs, palette, partners
from data.scenes import scenes
from involution.cache import cache_dir, writable_cache_dir

PICTURE, TRAIN_IDS, IDS = "_leftImg8bit.png", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"
CLASSES = {  # name: label id, colour
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
LAST_ID = 33
DEMO_DIGITS = (0, 1, 4)  # three that a few thousand scenes teach to tell apart; ten need hours
DEMO_CLASSES = ("background", *map(str, DEMO_DIGITS))
DEMO_COUNTS = {"train": 480, "val": 64}
DEMO_SHAPE = (64, 96)
DEMO_VERSION = 3  # of what is drawn: another one is another folder


class Labels(NamedTuple):
    """What the pixels of a layout's masks mean; see MaskList."""

    names: tuple[str, ...]
    colours: np.ndarray
    values: np.ndarray


CITYSCAPES = Labels(
    tuple(CLASSES),
    np.array([colour for _, colour in CLASSES.values()], np.uint8),
    np.array([label for label, _ in CLASSES.values()], np.uint8),
)
DEMO = Labels(DEMO_CLASSES, palette(len(DEMO_CLASSES)), np.arange(len(DEMO_CLASSES), dtype=np.uint8))


def open_cityscapes(
    root: str | os.PathLike[str] | None, labels: Labels = CITYSCAPES, on_error: str = "stop"
) -> tuple[MaskList, MaskList]:
    """The splits train and val; one of them may be missing, and has no pairs then.

    Raises:
        ValueError: the folder, or a frame's mask, is missing or does not fit.
    """
    base = Path(os.path.abspath(root or "cityscapes"))
    if not root or not (base / "leftImg8bit").is_dir():
        raise ValueError(f"{str(base)!r} is no Cityscapes: set data.root to the folder with leftImg8bit/ and gtFine/")
    train, val = (_split(base, split, labels, on_error) for split in ("train", "val"))
    if not len(train) and not len(val):
        raise ValueError(f"{str(base)!r} has no frames; expected leftImg8bit/<split>/<city>/<frame>{PICTURE}")
    return train, val


def _split(base: Path, split: str, labels: Labels, on_error: str) -> MaskList:
    images = sorted((base / "leftImg8bit" / split).glob(f"*/*{PICTURE}"))
    truth = base / "gtFine" / split
    frames = [truth / path.parent.name / path.name.removesuffix(PICTURE) for path in images]
    wanted = [[frame.with_name(frame.name + kind) for kind in (TRAIN_IDS, IDS)] for frame in frames]
    masks = partners(images, wanted, truth) if images else []
    by_id = bool(masks) and masks[0].name.endswith(IDS)
    found = pairs(images, masks, on_error) if images else (Names.pack([]), Names.pack([]))
    return MaskList(*found, labels.names, labels.colours, _classes(labels, by_id), labels.values)


def _classes(labels: Labels, by_id: bool) -> np.ndarray:
    """(256,) value of a pixel -> class. Label ids that are no class (void, licence plates: 255) do not count."""
    classes = np.full(256, FOREIGN, np.uint8)
    count = len(labels.names)
    if by_id:
        classes[: LAST_ID + 1] = IGNORED
        classes[labels.values] = np.arange(count)
    else:
        classes[:count] = np.arange(count)
    classes[IGNORED] = IGNORED
    return classes


def open_demo(root: str | os.PathLike[str] | None = None) -> tuple[MaskList, MaskList]:
    """Scenes of scikit-learn's digits in Cityscapes' layout, written on first use into `root` or the cache folder."""
    target = Path(root) if root else cache_dir() / f"segmentation-scenes-{DEMO_VERSION}"
    if not root and not target.is_dir():
        target = writable_cache_dir() / target.name
    try:
        return open_cityscapes(write_once(target, _write), DEMO)
    except OSError as error:
        raise ValueError(
            f"cannot write the demo data set to {str(target)!r}: {error.strerror}; set INVOLUTION_CACHE"
        ) from None


def _write(root: Path) -> None:
    for split, count in DEMO_COUNTS.items():
        places = [root / kind / split / "canvas" for kind in ("leftImg8bit", "gtFine")]
        for place in places:
            place.mkdir(parents=True)
        for number, (picture, digits) in enumerate(scenes(split, count, [DEMO_SHAPE], True, DEMO_DIGITS)):
            frame = f"canvas_{number:06d}_000000"
            mask = np.zeros(picture.shape[:2], np.uint8)
            for digit in digits:
                mask[digit.mask] = 1 + DEMO_DIGITS.index(digit.label)
            Image.fromarray(picture).save(places[0] / (frame + PICTURE))
            Image.fromarray(mask).save(places[1] / (frame + TRAIN_IDS))
