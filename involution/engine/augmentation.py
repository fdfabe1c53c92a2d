"""Augmentation of classifiers: the configuration's `augmentation`, and what of it excludes each other."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from involution.engine.errors import UserError

RANGES: dict[str, tuple[float, float | None]] = {
    "augmentation.mixup": (0, None),
    "augmentation.cutmix": (0, None),
    "augmentation.mix_probability": (0, 1),
    "augmentation.mix_switch": (0, 1),
}
OFF: dict[str, Any] = {  # as conf/augmentation/plain.yaml, for configurations from before there were these keys
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
    mixup: float = MISSING
    cutmix: float = MISSING
    mix_probability: float = MISSING
    mix_switch: float = MISSING

    def check(self, batch_size: int) -> None:
        """Refuse what cannot be said at once.

        Raises:
            UserError: naming the keys.
        """
        if (self.mixup or self.cutmix) and batch_size == 1:
            raise UserError(
                f"augmentation.mixup={self.mixup} and cutmix={self.cutmix} mix the pictures of a batch: "
                "train.batch_size=1 leaves none to mix with. Take 2 or more, or set both to 0"
            )
