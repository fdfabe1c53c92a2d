"""Small image folders for tests."""

import io
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
