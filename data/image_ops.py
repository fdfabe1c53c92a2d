"""Operations on pictures that augmentations are made of, as torchvision and timm have them, all by Pillow.

Pillow alone decides the pixels, so that loaders and machines agree to the last bit. Empty corners get the
colour `fill`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

Fill = tuple[int, int, int]
BLACK: Fill = (0, 0, 0)
NEAREST, BILINEAR = Image.Resampling.NEAREST, Image.Resampling.BILINEAR
_SMOOTHED = 13  # the weights of Pillow's SMOOTH filter: 5 in the middle, 1 around it


def affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill, resample: Image.Resampling) -> Image.Image:
    """Pixel (x, y) of the result is pixel (a x + b y + c, d x + e y + f) of the picture."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def shear_x(image: Image.Image, factor: float, fill: Fill = BLACK, resample: Image.Resampling = NEAREST) -> Image.Image:
    return affine(image, (1, factor, 0, 0, 1, 0), fill, resample)


def shear_y(image: Image.Image, factor: float, fill: Fill = BLACK, resample: Image.Resampling = NEAREST) -> Image.Image:
    return affine(image, (1, 0, 0, factor, 1, 0), fill, resample)


def move_x(image: Image.Image, pixels: float, fill: Fill = BLACK, resample: Image.Resampling = NEAREST) -> Image.Image:
    """To the left."""
    return affine(image, (1, 0, pixels, 0, 1, 0), fill, resample)


def move_y(image: Image.Image, pixels: float, fill: Fill = BLACK, resample: Image.Resampling = NEAREST) -> Image.Image:
    """Upwards."""
    return affine(image, (1, 0, 0, 0, 1, pixels), fill, resample)


def rotate(image: Image.Image, degrees: float, fill: Fill = BLACK, resample: Image.Resampling = NEAREST) -> Image.Image:
    """Against the clock."""
    return image.rotate(degrees, resample, fillcolor=fill)


@lru_cache(maxsize=1)
def _ramp() -> Image.Image:
    """Every gray once: what an operation on single values does to it, it does to a picture's."""
    return Image.fromarray(np.arange(256, dtype=np.uint8)[None])


def _by_table(image: Image.Image, ramp: Image.Image) -> Image.Image:
    return image.point(list(ramp.tobytes()) * 3)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    return _by_table(image, Image.blend(Image.new("L", (256, 1)), _ramp(), factor))


def contrast(image: Image.Image, factor: float) -> Image.Image:
    gray = np.array(image.convert("L").histogram())
    mean = int((gray * np.arange(256)).sum() / gray.sum() + 0.5)
    return _by_table(image, Image.blend(Image.new("L", (256, 1), mean), _ramp(), factor))


def color(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Away from (factor > 1) or towards the picture smoothed by Pillow's SMOOTH, which here is four times as fast."""
    pixels = np.asarray(image)
    if min(image.size) < 3:
        return image
    sums = pixels[:-2].astype(np.uint16) + pixels[1:-1] + pixels[2:]
    sums = sums[:, :-2] + sums[:, 1:-1] + sums[:, 2:] + 4 * pixels[1:-1, 1:-1].astype(np.uint16)
    smooth = pixels.copy()  # the border stays
    smooth[1:-1, 1:-1] = (2 * sums + _SMOOTHED) // (2 * _SMOOTHED)
    return Image.blend(Image.fromarray(smooth), image, factor)


def hue(image: Image.Image, shift: float) -> Image.Image:
    """Shift by a share of the circle of colours."""
    h, s, v = image.convert("HSV").split()
    moved = (np.array(h, np.int16) + int(255 * shift)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(moved), s, v)).convert("RGB")


def posterize(image: Image.Image, bits: float) -> Image.Image:
    return image if bits >= 8 else ImageOps.posterize(image, max(int(bits), 1))


def solarize(image: Image.Image, threshold: float) -> Image.Image:
    return ImageOps.solarize(image, threshold)  # type: ignore[arg-type]


def solarize_add(image: Image.Image, added: float) -> Image.Image:
    """Dark values, below 128, become lighter."""
    return image.point([min(255, i + int(added)) if i < 128 else i for i in range(256)] * 3)


def autocontrast(image: Image.Image, _: float = 0) -> Image.Image:
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, _: float = 0) -> Image.Image:
    return ImageOps.equalize(image)


def invert(image: Image.Image, _: float = 0) -> Image.Image:
    return ImageOps.invert(image)


def gray(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def blur(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def tangent(factor: float) -> float:
    """As torchvision rounds it on its way through degrees: a pixel depends on it now and then."""
    return math.tan(math.radians(math.degrees(math.atan(factor))))


Operation = Callable[[Image.Image, float], Image.Image]
