"""Augmentation of classifiers: the configuration's `augmentation`, and what of it excludes each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from data.mixing import Mixing
from data.policies import ColorJitter, Policy, RandAugment, ThreeAugment, TimmRandAugment, TrivialAugment
from involution.engine.errors import UserError

RANGES: dict[str, tuple[float, float | None]] = {
    "augmentation.mixup": (0, None),
    "augmentation.cutmix": (0, None),
    "augmentation.mix_probability": (0, 1),
    "augmentation.mix_switch": (0, 1),
    "augmentation.erasing": (0, 1),
}
OFF: dict[str, Any] = {  # as conf/augmentation/plain.yaml, for configurations from before there were these keys
    "augmentation.trivialaugment": False,
    "augmentation.three_augment": False,
    "augmentation.erasing": 0,
    "augmentation.repeats": 1,
    "augmentation.mixup": 0,
    "augmentation.cutmix": 0,
    "augmentation.mix_probability": 1,
    "augmentation.mix_switch": 0.5,
}


@dataclass
class AugmentationConfig:
    """conf/augmentation/plain.yaml, and what recipes add."""

    scale: tuple[float, float] = MISSING
    ratio: tuple[float, float] = MISSING
    hflip: float = MISSING
    randaugment: Any = MISSING
    trivialaugment: bool = MISSING
    three_augment: bool = MISSING
    color_jitter: Any = MISSING
    erasing: float = MISSING
    repeats: int = MISSING
    mixup: float = MISSING
    cutmix: float = MISSING
    mix_probability: float = MISSING
    mix_switch: float = MISSING

    def check(self, batch_size: int, global_batch_size: int) -> None:
        """Refuse what cannot be said at once.

        Raises:
            UserError: naming the keys.
        """
        if (self.mixup or self.cutmix) and batch_size == 1:
            raise UserError(
                f"augmentation.mixup={self.mixup} and cutmix={self.cutmix} mix the pictures of a batch: "
                "train.batch_size=1 leaves none to mix with. Take 2 or more, or set both to 0"
            )
        if not 1 <= self.repeats <= global_batch_size:
            raise UserError(
                f"augmentation.repeats={self.repeats} should be at least 1, and no more than "
                f"train.global_batch_size={global_batch_size}: the copies of a picture share a step"
            )
        names = ("randaugment", "trivialaugment", "three_augment")
        chosen = [name for name in names if getattr(self, name) not in (None, False)]
        if len(chosen) > 1:
            raise UserError(f"augmentation.{' and augmentation.'.join(chosen)} exclude each other; set one of them")
        self.policies([0.5] * 3)

    def policies(self, mean: Sequence[float]) -> tuple[Policy, ...]:
        """What happens to a picture after crop and flip; `mean` of the data's channels, in [0, 1]."""
        found: list[Policy] = []
        if self.randaugment is not None:
            found.append(_rand_augment(self.randaugment, mean))
        if self.trivialaugment:
            found.append(TrivialAugment())
        if self.three_augment:
            found.append(ThreeAugment())
        if self.color_jitter is not None:
            found.append(_color_jitter(self.color_jitter))
        return tuple(found)

    def mixing(self, seed: int) -> Mixing | None:
        if not self.mixup and not self.cutmix:
            return None
        return Mixing(seed, self.mixup, self.cutmix, self.mix_probability, self.mix_switch)


def _rand_augment(value: Any, mean: Sequence[float]) -> Policy:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 30:
        return RandAugment(value)
    red, green, blue = (min(255, round(255 * colour)) for colour in ([*mean] * 3)[:3])
    try:
        return TimmRandAugment.parse(str(value), (red, green, blue))
    except ValueError as error:
        raise UserError(
            f"augmentation.randaugment={value} should be torchvision's magnitude, 0 to 30, or timm's notation: {error}"
        ) from error


def _color_jitter(value: Any) -> ColorJitter:
    values = [value] * 3 if isinstance(value, int | float) else value
    numbers = isinstance(values, list) and all(isinstance(x, int | float) and x >= 0 for x in values)
    if not numbers or len(values) not in (3, 4) or (len(values) == 4 and values[3] > 0.5):
        raise UserError(
            f"augmentation.color_jitter={value} should be a number, or [brightness,contrast,saturation] or "
            "[brightness,contrast,saturation,hue], each at least 0 and the hue at most 0.5"
        )
    return ColorJitter(*values)
