"""Pillow's pictures of any mode in RGB."""

import numpy as np
from PIL import Image

SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def to_rgb(picture: Image.Image) -> Image.Image:
    """As ``convert("RGB")``, but 16 bits become 8 by a division, and floating point counts in [0, 1].

    Pillow cuts both off at 255: such a picture would be white, or black.

    Raises:
        ValueError: it has values that are not finite.
    """
    if picture.mode in SIXTEEN_BITS:
        values = np.asarray(picture).clip(0, 65535) / 257
    elif picture.mode == "F":
        values = np.asarray(picture) * 255
        if not np.isfinite(values).all():
            raise ValueError("it has values that are not finite")
    else:
        return picture.convert("RGB")
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
