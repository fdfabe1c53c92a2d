"""Scenes for the demo sets of dense tasks: scikit-learn's handwritten digits scattered over textured canvases.

What is in a scene is known by construction: the class, place and mask of every digit. The demo sets are
written from these, each in the layout of its benchmark, so that the real readers read them. Everything random is a
function of the scene's number and the split.

Shapes: H x W pixels of a scene; y down, x to the right.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import sampling

HEIGHT, WIDTH = 96, 128
DIGITS = (3, 6)  # that a scene tries to place, at least and at most
SIDES = (22, 46)  # pixels of a digit's square
VAL_SHARE = 5  # every fifth digit is for the scenes of validation, and for them alone
_INK = 0.35  # of full ink, from which on a pixel belongs to the digit
_SEEDS = {"train": 1, "val": 2}


class Digit(NamedTuple):
    """A digit of a scene: its class, and the pixels that show it, without those that a later digit hides."""

    label: int
    mask: np.ndarray  # bool (H, W), with at least one pixel


class Scene(NamedTuple):
    picture: np.ndarray  # uint8 (H, W, 3)
    digits: list[Digit]


def scenes(
    split: str,
    count: int,
    shapes: Sequence[tuple[int, int]] = ((HEIGHT, WIDTH),),
    apart: bool = False,
    only: Sequence[int] = range(10),
    digits: tuple[int, int] = DIGITS,
    sides: tuple[int, int] = SIDES,
) -> Iterator[Scene]:
    """The first `count` scenes of "train" or "val".

    Args:
        shapes: (H, W) of the scenes, taken in turn.
        apart: leave out a digit that would hide more than a tenth of another.
        only: the digits to draw from.
        digits, sides: see DIGITS and SIDES.
    """
    from sklearn.datasets import load_digits  # heavy, and needed only once

    known = load_digits()
    mine = np.arange(len(known.target)) % VAL_SHARE == 0
    mine = np.flatnonzero((mine if split == "val" else ~mine) & np.isin(known.target, only))
    inks, labels = known.images[mine] / 16, known.target[mine]
    for number in range(count):
        shape = shapes[number % len(shapes)]
        random = sampling.uniforms(_SEEDS[split], number, 512)
        yield _scene(random, inks, labels, shape, apart, digits, sides)


def _scene(
    random: np.ndarray,
    inks: np.ndarray,
    labels: np.ndarray,
    shape: tuple[int, int],
    apart: bool,
    count: tuple[int, int],
    sides: tuple[int, int],
) -> Scene:
    """One scene from numbers in [0, 1) and the digits (n, 8, 8) with their classes."""
    drawn = iter(random.tolist())
    height, width = shape
    picture = _canvas(drawn, height, width)
    digits: list[Digit] = []
    for _ in range(count[0] + int(next(drawn) * (count[1] - count[0] + 1))):
        which = int(next(drawn) * len(labels))
        side = sides[0] + int(next(drawn) * (sides[1] - sides[0] + 1))
        top, left = int(next(drawn) * (height - side + 1)), int(next(drawn) * (width - side + 1))
        ink = np.array(Image.fromarray(inks[which].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))
        ink = np.clip(ink, 0, 1)[..., None]
        mask = np.zeros(shape, bool)
        mask[top : top + side, left : left + side] = ink[..., 0] > _INK
        if apart and any((mask & shown).sum() > 0.1 * shown.sum() for _, shown in digits):
            continue
        window = picture[top : top + side, left : left + side]
        bright = 1.0 if window.mean() < 0.5 else 0.0  # the colour of the pen stands out from what lies below
        colour = np.array([abs(bright - 0.3 * next(drawn)) for _ in range(3)])
        window += ink * (colour - window)
        digits = [Digit(label, shown & ~mask) for label, shown in digits]
        digits.append(Digit(int(labels[which]), mask))
    return Scene((picture * 255).round().astype(np.uint8), [digit for digit in digits if digit.mask.any()])


def _canvas(drawn: Iterator[float], height: int, width: int) -> np.ndarray:
    """A cloudy background (H, W, 3) in [0, 1]: coarse random colours, smoothly enlarged, under a finer grey grain."""
    coarse = np.array([next(drawn) for _ in range(4 * 5 * 3)]).reshape(4, 5, 3)
    fine = np.array([next(drawn) for _ in range(12 * 16)]).reshape(12, 16, 1).repeat(3, 2)
    layers = [
        np.array(Image.fromarray((layer * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC))
        for layer in (coarse, fine)
    ]
    shift = 0.35 if next(drawn) < 0.5 else 0.0  # a light or a dark scene
    return (0.45 * layers[0] + 0.2 * layers[1]) / 255 + shift
