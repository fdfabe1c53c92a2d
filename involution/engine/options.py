"""The trainer's own options: the `train` node of the configuration, explained in conf/train.yaml."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from involution.engine.errors import UserError


@dataclass
class TrainOptions:
    epochs: int | None = MISSING
    steps: int | None = MISSING
    global_batch_size: int = MISSING
    batch_size: int = MISSING
    label_smoothing: float = MISSING
    precision: str = MISSING
    compile: bool = MISSING
    channels_last: bool = MISSING
    sync_batchnorm: Any = MISSING  # a bool or "auto"
    clip_grad_norm: float | None = MISSING
    ema_decay: float | None = MISSING
    exclude_from_decay: str = MISSING
    freeze: Any = MISSING  # a number or a list of names
    resume: str = MISSING
    max_steps: int | None = MISSING
    max_bad_steps: int = MISSING
    log_every_steps: int = MISSING
    evaluate_every_epochs: int = MISSING
    evaluate_every_steps: int | None = MISSING
    checkpoint_every_steps: int | None = MISSING
    checkpoint_every_minutes: float | None = MISSING
    keep_checkpoints: int = MISSING
    timeout_minutes: float = MISSING

    def check(self) -> None:
        """Refuse what cannot be said at once.

        Raises:
            UserError: naming the keys.
        """
        if (self.epochs is None) == (self.steps is None):
            what = "are both set; set the other to null" if self.steps else "are both null; set one of them"
            raise UserError(f"train.epochs={self.epochs} and train.steps={self.steps} {what}")

    def in_epochs(self, steps_per_epoch: int) -> "TrainOptions":
        """The same with `steps` and `evaluate_every_steps` in whole epochs, rounded up, and a limit to the steps."""
        changed: dict[str, Any] = {}
        if self.steps is not None:
            changed["epochs"] = math.ceil(self.steps / steps_per_epoch)
            changed["max_steps"] = min(self.steps, self.max_steps or self.steps)
        if self.evaluate_every_steps is not None:
            changed["evaluate_every_epochs"] = math.ceil(self.evaluate_every_steps / steps_per_epoch)
        return dataclasses.replace(self, **changed)
