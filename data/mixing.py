"""Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) of whole batches, with timm's definitions, on any device.

What happens to a micro-batch is a function of (seed, epoch, its first image's position in the epoch): the same after a
resume and, with the same train.batch_size, on any number of ranks.

Shapes: b images, C channels, H x W pixels. A box is (top, left, bottom, right) in pixels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from data import sampling
from data.sampling import MicroBatch


class Mix(NamedTuple):
    """Every image keeps a `share`; the rest, inside `box` (CutMix) or everywhere (mixup), is its partner's: the image
    at the same place counted from the end."""

    share: float
    box: tuple[int, int, int, int] | None = None

    def apply(self, images: torch.Tensor) -> None:
        """Mix images (b, C, H, W) in place."""
        if self.box is not None:
            top, left, bottom, right = self.box
            window = images[:, :, top:bottom, left:right]
            window.copy_(window.flip(0))
        elif self.share < 1 and images.device.type == "cpu":
            for i in range(len(images) // 2):  # a pair at a time: it stays in the cache
                first, last = images[i], images[-1 - i]
                moved = (last - first).mul_(1 - self.share)
                first.add_(moved)
                last.sub_(moved)
        elif self.share < 1:
            images.lerp_(images.flip(0), 1 - self.share)


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed.

    Args:
        mixup, cutmix: the share follows Beta(alpha, alpha) with this alpha; 0: never.
        probability: that a batch is mixed at all.
        switch: that it is CutMix where both are possible.
    """

    seed: int
    mixup: float
    cutmix: float
    probability: float = 1.0
    switch: float = 0.5

    def draw(self, request: MicroBatch, height: int, width: int) -> Mix:
        numbers = iter(sampling.batch_uniforms(self.seed, request.epoch, request.position).tolist())
        applied, switched, y, x = (next(numbers) for _ in range(4))
        if applied >= self.probability:
            return Mix(1.0)
        cut = self.cutmix > 0 and (self.mixup == 0 or switched < self.switch)
        share = beta(self.cutmix if cut else self.mixup, numbers)
        if not cut:
            return Mix(share)
        side = math.sqrt(1 - share)
        h, w = int(height * side), int(width * side)
        y, x = int(y * height), int(x * width)  # the centre: a box at the border is smaller
        top, bottom = max(y - h // 2, 0), min(y + (h + 1) // 2, height)
        left, right = max(x - w // 2, 0), min(x + (w + 1) // 2, width)
        return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))


def beta(alpha: float, numbers: Iterator[float]) -> float:
    """A number of the distribution Beta(alpha, alpha), made of uniform ones."""
    difference = _log_gamma(alpha, numbers) - _log_gamma(alpha, numbers)
    return 1 / (1 + math.exp(min(difference, 700.0)))


def _log_gamma(shape: float, numbers: Iterator[float]) -> float:
    """The logarithm of a Gamma variable (Marsaglia and Tsang, 2000), which may be too small for a float."""
    boost = math.log(1 - next(numbers)) / shape
    d = shape + 1 - 1 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        z = sampling.normal(next(numbers), next(numbers))
        v = (1 + c * z) ** 3
        if v > 0 and math.log(1 - next(numbers)) < z**2 / 2 + d - d * v + d * math.log(v):
            return math.log(d * v) + boost
