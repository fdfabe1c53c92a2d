"""From decoded pictures to normalised batches, as torchvision does it with Pillow; both loaders take it from here.

Shapes: pictures are (H, W, 3) in 8 bits until they are normalised, or (H, W, C) of many bands (data.bands); S is the
side of the result. A window is (top, left, height, width) in pixels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from data import sampling
from data.bands import resized
from data.policies import Policy
from data.sampling import MicroBatch

Region = tuple[tuple[int, int, int, int], tuple[float, float, float, float]]
EXTREME = 8  # long side / short side above which an evaluation image is never resized as a whole


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, horizontal flip and then the `policies`, decided by (seed, epoch, sample).

    `size` is the side of the result, or a schedule {first epoch: side} for progressive resizing.
    """

    seed: int
    size: int | Mapping[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    policies: tuple[Policy, ...] = ()

    def size_at(self, epoch: int) -> int:
        if isinstance(self.size, int):
            return self.size
        return self.size[max(start for start in self.size if start <= epoch)]

    def draws(self, request: MicroBatch) -> np.ndarray:
        return request.draws(self.seed, sum(policy.draws for policy in self.policies))

    def region(self, draw: Sequence[float], height: int, width: int) -> Region:
        """Window to decode, and the box inside it (top, left, bottom, right) that is resized."""
        window = sampling.crop_window(draw, height, width, self.scale, self.ratio)
        return window, (0.0, 0.0, float(window[2]), float(window[3]))

    def mirror(self, draw: Sequence[float]) -> bool:
        return draw[sampling.DRAWS - 1] < self.flip

    def same_in_dali(self, height: int, width: int) -> bool:
        """DALI repeats the border pixel where Pillow renormalises the filter: the outermost pixels of a random window
        differ by a few levels, which augmentation dwarfs."""
        return True

    def finish(self, window: torch.Tensor, draw: Sequence[float], size: int) -> torch.Tensor:
        """The decoded window (h, w, 3) -> (S, S, 3).

        torch resizes four times as fast as Pillow and six times as fast as DALI, and differs from Pillow by one level
        in a thousandth of the values.
        """
        pixels = resized(window, size, size)
        return pixels.flip(1) if self.mirror(draw) else pixels

    def augment(self, picture: torch.Tensor, draw: Sequence[float]) -> None:
        """The policies' work on a picture (S, S, 3), in place."""
        if not self.policies:
            return
        pixels, start = picture.numpy(), sampling.DRAWS
        image = original = Image.fromarray(pixels)
        for policy in self.policies:
            image, start = policy(image, draw[start : start + policy.draws]), start + policy.draws
        if image is not original:
            pixels[:] = np.asarray(image)


@dataclass(frozen=True)
class EvalTransform:
    """Short side to `resize` (the long side rounded down), then a central crop of `size`, as torchvision does."""

    resize: int
    size: int
    policies: ClassVar[tuple[Policy, ...]] = ()

    def size_at(self, epoch: int) -> int:
        return self.size

    def draws(self, request: MicroBatch) -> np.ndarray:
        return np.zeros((len(request.indices), 0))

    def _resized(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Height and width after resizing, top and left of the crop (rounded half to even)."""
        short = min(height, width)
        h, w = int(self.resize * height / short), int(self.resize * width / short)
        return h, w, round((h - self.size) / 2.0), round((w - self.size) / 2.0)

    def region(self, draw: Sequence[float], height: int, width: int) -> Region:
        h, w, top, left = self._resized(height, width)
        y, x = height / h, width / w
        return (0, 0, height, width), (top * y, left * x, (top + self.size) * y, (left + self.size) * x)

    def mirror(self, draw: Sequence[float]) -> bool:
        return False

    def same_in_dali(self, height: int, width: int) -> bool:
        """True when the filter does not reach beyond the image (see TrainTransform.same_in_dali)."""
        h, w, top, left = self._resized(height, width)
        return (top >= 2 or h >= height) and (left >= 2 or w >= width)

    def finish(self, window: torch.Tensor, draw: Sequence[float], size: int) -> torch.Tensor:
        """The decoded picture (h, w, 3) -> (S, S, 3), by Pillow itself: published weights evaluate as published."""
        h, w, top, left = self._resized(*window.shape[:2])
        bands = window.is_floating_point()  # which Pillow does not resize
        if max(h, w) > EXTREME * self.resize:  # a 1 x 20000 image would need gigabytes; equal within rounding
            _, (y0, x0, y1, x1) = self.region(draw, *window.shape[:2])
            if bands:
                return resized(window[int(y0) : math.ceil(y1), int(x0) : math.ceil(x1)], size, size)
            image = Image.fromarray(window.numpy())
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
        elif bands:
            return resized(window, h, w)[top : top + size, left : left + size]
        else:
            image = Image.fromarray(window.numpy()).resize((w, h), Image.Resampling.BILINEAR)
            image = image.crop((left, top, left + size, top + size))
        return torch.from_numpy(np.array(image))

    def augment(self, picture: torch.Tensor, draw: Sequence[float]) -> None:
        pass


Transform = TrainTransform | EvalTransform


def cut(image: Image.Image | torch.Tensor, transform: Transform, draw: Sequence[float]) -> torch.Tensor:
    """The window (h, w, 3) of a picture that the transform needs, or (h, w, C)."""
    if isinstance(image, torch.Tensor):
        top, left, height, width = transform.region(draw, *image.shape[:2])[0]
        return image[top : top + height, left : left + width]
    top, left, height, width = transform.region(draw, image.height, image.width)[0]
    return torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))


@lru_cache(maxsize=16)  # copied to a GPU once: a copy in every step would wait for the step before
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a row of `width` pixels."""
    center, spread = (torch.tensor(values, device=device) for values in (mean, std))
    return (1 / (255 * spread)).repeat(width), (-center / spread).repeat(width)


def normalise(pictures: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(b, S, S, C) in units of 8 bits -> (b, C, S, S) float32 in channels_last; mean and std in units of [0, 1].

    With one value each: (b, 3, S, S) becomes (b, 1, S, S), gray as Pillow makes it of colours. Computed a row of C S
    values at a time: ten times as fast as pixel by pixel.
    """
    if len(mean) == 1:
        red, green, blue = pictures.int().unbind(3)
        pictures = ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[..., None]
    b, height, width, channels = pictures.shape
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), width, pictures.device)
    rows = pictures.reshape(b, height, width * channels).float()
    torch.addcmul(shift, rows, scale, out=rows)
    return rows.view(b, height, width, channels).permute(0, 3, 1, 2)
