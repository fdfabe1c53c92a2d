"""Small image folders for tests."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(number: int = 0, side: int = 12, **options: object) -> bytes:
    """A picture as the bytes of a file; a JPEG unless `format` says otherwise."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    stream = io.BytesIO()
    picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    picture.save(stream, **{"format": "JPEG"} | options)
    return stream.getvalue()


def write(root: Path, classes: tuple[str, ...] = ("a", "b", "c"), each: int = 3) -> Path:
    """root/train|val/<class>/<i>.jpg"""
    for split in ("train", "val"):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                (root / split / name / f"{i}.jpg").write_bytes(encoded(100 * number + i))
    return root


def write_squares(root: Path, counts: tuple[tuple[str, int], ...] = (("train", 9), ("val", 5))) -> Path:
    """Pictures with a red and a blue square on noise, wide and tall ones, in COCO's format with ids of their own."""
    random = np.random.default_rng(0)
    for split, count in counts:
        (root / split).mkdir(parents=True)
        images, objects = [], []
        for i in range(count):
            height, width = (48, 64) if i % 3 else (64, 48)
            picture = random.integers(0, 90, (height, width, 3))
            images.append({"id": 100 - i, "file_name": f"{i}.png", "height": height, "width": width})
            for channel, category in ((0, 7), (2, 3)):
                x, y = 4 + 20 * (channel // 2), int(random.integers(4, 20))
                picture[y : y + 16, x : x + 16, channel] = 250
                corners = [x, y, x + 16, y, x + 16, y + 16, x, y + 16]
                objects.append({
                    "id": len(objects), "image_id": 100 - i, "category_id": category, "bbox": [x, y, 16, 16],
                    "area": 256, "iscrowd": 0, "segmentation": [corners],
                })  # fmt: skip
            Image.fromarray(picture.astype(np.uint8)).save(root / split / f"{i}.png")
        categories = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]
        content = {"images": images, "annotations": objects, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root
