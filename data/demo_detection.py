"""data=demo_detection: scenes of scikit-learn's digits in COCO's layout, written once."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from data.demo import write_once
from data.scenes import HEIGHT, WIDTH, Scene, scenes
from involution.cache import cache_dir, writable_cache_dir

COUNTS = {"train": 800, "val": 100}
SHAPES = [(HEIGHT, WIDTH), (WIDTH, HEIGHT), (HEIGHT, WIDTH)]  # two wide ones and a tall one, as in COCO
DIGITS, SIDES = (5, 9), (36, 60)  # large ones, as the paper's anchors begin at 32 pixels; three of them find room
VERSION = 2  # of what is drawn: another one is another folder


def demo_detection_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Folder with train2017/, val2017/ and annotations/; written on first use into `root` or the cache folder."""
    target = Path(root) if root else cache_dir() / f"detection-scenes-{VERSION}"
    if not root and not target.is_dir():
        target = writable_cache_dir() / target.name
    try:
        return write_once(target, _write)
    except OSError as error:
        raise ValueError(
            f"cannot write the demo data set to {str(target)!r}: {error.strerror}; set INVOLUTION_CACHE"
        ) from None


def _write(root: Path) -> None:
    (root / "annotations").mkdir()
    for split, count in COUNTS.items():
        folder = root / f"{split}2017"
        folder.mkdir()
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for number, made in enumerate(scenes(split, count, SHAPES, apart=True, digits=DIGITS, sides=SIDES)):
            name = f"{number:012d}.jpg"
            Image.fromarray(made.picture).save(folder / name, quality=90)
            height, width = made.picture.shape[:2]
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            objects += [row | {"id": len(objects) + k} for k, row in enumerate(_objects(made, number), 1)]
        categories = [{"id": k, "name": name} for k, name in enumerate("0123456789", 1)]
        content = {"images": images, "annotations": objects, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def _objects(made: Scene, image: int) -> list[dict[str, Any]]:
    rows = []
    for label, mask in made.digits:
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        rows.append({
            "image_id": image,
            "category_id": label + 1,
            "bbox": coco_mask.toBbox(rle).tolist(),
            "area": float(coco_mask.area(rle)),
            "iscrowd": 0,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
        })  # fmt: skip
    return rows
