"""Augmentation of single pictures after crop and flip, each a function of the numbers that a sample has in an epoch.

RandAugment (Cubuk et al., 2020) by torchvision's and by timm's definition, TrivialAugment Wide (Mueller and Hutter,
2021) and ColorJitter by torchvision's, ThreeAugment (DeiT III, Touvron et al., 2022).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from PIL import Image

from data import image_ops as ops
from data.image_ops import Fill, Operation
from data.sampling import normal


class Policy(Protocol):
    @property
    def draws(self) -> int:
        """How many numbers in [0, 1) it takes."""
        ...

    def __call__(self, image: Image.Image, draw: Sequence[float]) -> Image.Image: ...


def choose(choices: Sequence[Any], number: float) -> Any:
    return choices[int(number * len(choices))]


ENHANCEMENTS: dict[str, Operation] = {
    "brightness": ops.brightness, "color": ops.color, "contrast": ops.contrast, "sharpness": ops.sharpness,
}  # fmt: skip
GEOMETRY: dict[str, Callable[..., Image.Image]] = {
    "shear_x": ops.shear_x, "shear_y": ops.shear_y, "move_x": ops.move_x, "move_y": ops.move_y, "rotate": ops.rotate,
}  # fmt: skip
VALUES: dict[str, Operation] = {
    "posterize": ops.posterize, "solarize": ops.solarize, "autocontrast": ops.autocontrast, "equalize": ops.equalize,
}  # fmt: skip
TORCHVISION = ("identity", *GEOMETRY, *ENHANCEMENTS, *VALUES)
BINS = 31


@lru_cache(maxsize=256)
def _level(maximum: float, number: int) -> float:
    """As torchvision rounds it: whole pixels depend on that."""
    return float(torch.linspace(0.0, maximum, BINS)[number])


@dataclass(frozen=True)
class _Ranges:
    """What torchvision's operations do at most."""

    shear: float
    move: float  # pixels, or below 1 a share of the side
    turn: float  # degrees
    enhance: float
    bits: int

    def apply(self, image: Image.Image, name: str, number: int, negative: bool) -> Image.Image:
        sign = -1 if negative else 1
        if name in ENHANCEMENTS:
            return ENHANCEMENTS[name](image, 1 + sign * _level(self.enhance, number))
        if name.startswith("move"):
            most = self.move * (image.size[name == "move_y"] if self.move < 1 else 1)
            return GEOMETRY[name](image, -sign * int(_level(most, number)))  # torchvision moves to the right and down
        if name.startswith("shear"):
            return GEOMETRY[name](image, sign * ops.tangent(_level(self.shear, number)))
        if name == "rotate":
            return ops.rotate(image, sign * _level(self.turn, number))
        if name == "posterize":
            return ops.posterize(image, 8 - round(number * self.bits / (BINS - 1)))
        if name == "solarize":
            return ops.solarize(image, _level(255.0, BINS - 1 - number))
        return image if name == "identity" else VALUES[name](image, 0)


_RAND, _TRIVIAL = _Ranges(0.3, 150 / 331, 30.0, 0.9, 4), _Ranges(0.99, 32.0, 135.0, 0.99, 6)


@dataclass(frozen=True)
class RandAugment:
    """torchvision's: two of its 14 operations, one after the other, with `magnitude` of 0 to 30."""

    magnitude: int = 9
    draws: int = 4

    def __call__(self, image: Image.Image, draw: Sequence[float]) -> Image.Image:
        for which, sign in zip(draw[::2], draw[1::2]):
            image = _RAND.apply(image, choose(TORCHVISION, which), self.magnitude, sign < 0.5)
        return image


@dataclass(frozen=True)
class TrivialAugment:
    """torchvision's TrivialAugmentWide: one operation, of any strength."""

    draws: int = 3

    def __call__(self, image: Image.Image, draw: Sequence[float]) -> Image.Image:
        which, strength, sign = draw
        return _TRIVIAL.apply(image, choose(TORCHVISION, which), int(strength * BINS), sign < 0.5)


TIMM = (
    "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "move_x", "move_y",
)  # fmt: skip


@dataclass(frozen=True)
class TimmRandAugment:
    """timm's "rand-m7-mstd0.5-inc1": `operations` of 15, each with a `probability`, and a magnitude that is normally
    distributed about `magnitude` with deviation `std`, of 0 to 10. They grow with it ("inc1").

    Corners are filled with `fill`, timm's mean of the data; lines are bilinear (timm takes bicubic for half of them).
    """

    magnitude: float
    std: float
    fill: Fill
    operations: int = 2
    probability: float = 0.5

    @classmethod
    def parse(cls, text: str, fill: Fill) -> TimmRandAugment:
        """Read timm's notation.

        Raises:
            ValueError: it says something else, or what is not here.
        """
        head, *rest = text.split("-")
        found = (re.fullmatch(r"([a-z]+)([\d.]+)", part) for part in rest)
        said = {match[1]: match[2] for match in found if match}
        if head != "rand" or len(said) != len(rest) or not said.keys() <= {"m", "n", "p", "mstd", "inc"}:
            raise ValueError(f"{text!r} is not timm's notation of RandAugment, for example rand-m7-mstd0.5-inc1")
        if said.get("inc") != "1":
            raise ValueError(
                f"{text!r} lacks -inc1: operations that grow with the magnitude are the ones there are here"
            )
        return cls(
            float(said.get("m", 10)), float(said.get("mstd", 0)), fill, int(said.get("n", 2)), float(said.get("p", 0.5))
        )

    @property
    def draws(self) -> int:
        return 5 * self.operations

    def __call__(self, image: Image.Image, draw: Sequence[float]) -> Image.Image:
        for i in range(0, self.draws, 5):
            which, applied, radius, angle, sign = draw[i : i + 5]
            if applied < self.probability:
                share = min(max(self.magnitude + self.std * normal(radius, angle), 0.0), 10.0) / 10
                image = self.apply(image, choose(TIMM, which), share, sign < 0.5)
        return image

    def apply(self, image: Image.Image, name: str, share: float, negative: bool) -> Image.Image:
        sign = -1 if negative else 1
        if name in ENHANCEMENTS:
            return ENHANCEMENTS[name](image, max(0.1, 1 + sign * 0.9 * share))
        if name in GEOMETRY:
            side = image.size[name == "move_y"]
            most = {"rotate": 30.0, "move_x": 0.45 * side, "move_y": 0.45 * side}.get(name, 0.3)
            return GEOMETRY[name](image, sign * most * share, self.fill, ops.BILINEAR)
        if name == "posterize":
            return ops.posterize(image, 4 - int(4 * share))
        if name == "solarize":
            return ops.solarize(image, 256 - min(256, int(256 * share)))
        if name == "solarize_add":
            return ops.solarize_add(image, min(128, int(110 * share)))
        return ops.invert(image) if name == "invert" else VALUES[name](image, 0)


@dataclass(frozen=True)
class ThreeAugment:
    """One of gray, solarised and blurred."""

    draws: int = 2

    def __call__(self, image: Image.Image, draw: Sequence[float]) -> Image.Image:
        which, radius = draw
        if which < 1 / 3:
            return ops.gray(image)
        return ops.solarize(image, 128) if which < 2 / 3 else ops.blur(image, 0.1 + 1.9 * radius)


@dataclass(frozen=True)
class ColorJitter:
    """Each changes by a factor of 1 - x to 1 + x, in random order; the hue by -x to x of the circle."""

    brightness: float
    contrast: float
    saturation: float
    hue: float = 0.0
    draws: int = 8

    def __call__(self, image: Image.Image, draw: Sequence[float]) -> Image.Image:
        steps: list[tuple[float, Operation]] = [
            (self.brightness, ops.brightness), (self.contrast, ops.contrast), (self.saturation, ops.color)
        ]  # fmt: skip
        for i in sorted(range(4), key=lambda i: draw[4 + i]):
            if i == 3 and self.hue:
                image = ops.hue(image, self.hue * (2 * draw[3] - 1))
            elif i < 3 and steps[i][0]:
                most, step = steps[i]
                image = step(image, max(1 - most, 0) + draw[i] * (1 + most - max(1 - most, 0)))
        return image
