"""Augmentation of single pictures: torchvision's and timm's operations pixel by pixel, chosen as often."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import RandAugment as TheirRandAugment
from torchvision.transforms.autoaugment import TrivialAugmentWide, _apply_op

from data import policies
from data.policies import (
    BINS,
    TIMM,
    TORCHVISION,
    ColorJitter,
    RandAugment,
    ThreeAugment,
    TimmRandAugment,
    TrivialAugment,
)

FILL = (124, 116, 104)
THEIRS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
TIMMS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd",
    "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY",
    "TranslateXRel", "TranslateYRel",
)  # fmt: skip


@pytest.fixture(scope="module")
def picture():
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)


def same(image: Image.Image, expected: Image.Image, *, but: float = 0) -> bool:
    return (np.asarray(image) != np.asarray(expected)).mean() <= but


@pytest.mark.parametrize(("ranges", "wide"), [(policies._RAND, False), (policies._TRIVIAL, True)])
def test_operations_are_torchvisions(picture, ranges, wide):
    space = (
        TrivialAugmentWide()._augmentation_space(BINS)
        if wide
        else TheirRandAugment()._augmentation_space(BINS, (48, 64))
    )
    for name, theirs in zip(TORCHVISION, THEIRS, strict=True):
        magnitudes, signed = space[theirs]
        for number in (0, 1, 9, 15, 22, 30):
            for negative in (False, True) if signed else (False,):
                magnitude = (float(magnitudes[number]) if magnitudes.ndim else 0.0) * (-1 if negative else 1)
                expected = _apply_op(picture, theirs, magnitude, F.InterpolationMode.NEAREST, None)
                assert same(ranges.apply(picture, name, number, negative), expected), (name, number, negative)


def test_operations_are_timms(picture, monkeypatch):
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BILINEAR}
    mine = TimmRandAugment.parse("rand-m7-mstd0.5-inc1", FILL)
    assert auto_augment.rand_augment_choices("", increasing=True) == list(TIMMS)
    for name, theirs in zip(TIMM, TIMMS, strict=True):
        for magnitude in (0, 0.4, 5, 7.3, 9.9):
            for negative in (False, True):
                monkeypatch.setattr(
                    auto_augment, "_randomly_negate", lambda v, negative=negative: -v if negative else v
                )
                expected = auto_augment.AugmentOp(theirs, 1.0, magnitude, hparams)(picture)
                assert same(mine.apply(picture, name, magnitude / 10, negative), expected), (name, magnitude, negative)


def test_color_jitter_is_torchvisions(picture):
    draw = [0.2, 0.9, 0.4, 0.3, 0.8, 0.1, 0.6, 0.2]  # the last four: contrast, hue, saturation, brightness
    expected = F.adjust_contrast(picture, 0.6 + 0.8 * 0.9)
    expected = F.adjust_hue(expected, 0.1 * (2 * 0.3 - 1))
    expected = F.adjust_brightness(F.adjust_saturation(expected, 0.6 + 0.8 * 0.4), 0.6 + 0.8 * 0.2)
    assert same(ColorJitter(0.4, 0.4, 0.4, 0.1)(picture, draw), expected)
    assert ColorJitter(0, 0, 0)(picture, draw) is picture


def test_three_augment_is_gray_solarised_or_blurred(picture):
    three = ThreeAugment()
    assert np.ptp(np.asarray(three(picture, [0.1, 0])), axis=2).max() == 0
    assert same(three(picture, [0.5, 0]), F.solarize(picture, 128))
    spread = [np.asarray(three(picture, [0.9, radius])).std() for radius in (0, 0.5, 1)]
    assert spread == sorted(spread, reverse=True)


def test_policies_choose_as_often(picture):
    """How far the pictures of many draws are from the original: the same mean as torchvision's and timm's."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    draws = np.random.default_rng(1).random((250, 10)).tolist()
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BILINEAR}
    timms = auto_augment.rand_augment_transform("rand-m7-mstd0.5-inc1", hparams)
    pairs = [
        (RandAugment(), TheirRandAugment()), (TrivialAugment(), TrivialAugmentWide()),
        (TimmRandAugment.parse("rand-m7-mstd0.5-inc1", FILL), timms),
    ]  # fmt: skip
    for mine, theirs in pairs:
        changes = [[_change(picture, mine(picture, draw[: mine.draws])) for draw in draws]]
        changes += [[_change(picture, theirs(picture)) for _ in draws]]
        (a, b), (da, db) = np.mean(changes, 1), np.std(changes, 1) / len(draws) ** 0.5
        assert abs(a - b) < 3 * np.hypot(da, db), (mine, a, b)


def _change(before: Image.Image, after: Image.Image) -> float:
    return float(np.abs(np.asarray(before, np.int16) - np.asarray(after, np.int16)).mean())


@pytest.mark.parametrize("text", ["rand-m9", "augmix-m3", "rand-m9-mstd0.5-inc1-tweights", "rand-x9-inc1", "m9"])
def test_notations_that_are_not_there_are_refused(text):
    with pytest.raises(ValueError, match=text):
        TimmRandAugment.parse(text, FILL)
