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
    loss: str = MISSING
    target_threshold: float | None = MISSING
    precision: str = MISSING
    tf32: bool = MISSING
    compile: bool = MISSING
    cuda_graphs: bool = MISSING
    channels_last: bool = MISSING
    sync_batchnorm: Any = MISSING  # a bool or "auto"
    batchnorm_size: int | None = MISSING
    clip_grad_norm: float | None = MISSING
    ema_decay: float | None = MISSING
    exclude_from_decay: str = MISSING
    layer_decay: float | None = MISSING
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
        size = self.batchnorm_size
        if size is not None and self.sync_batchnorm:
            raise UserError("train.batchnorm_size parts what train.sync_batchnorm joins: set one of them")
        if size is not None and self.batch_size % size:
            near = max(1, round(self.batch_size / size)) * size
            raise UserError(
                f"train.batch_size={self.batch_size} is no multiple of train.batchnorm_size={size}, the images that "
                f"BatchNorm is to see at a time. Take train.batch_size={near}, for example"
            )
        if self.target_threshold is not None and self.loss != "bce":
            raise UserError(
                f"train.target_threshold={self.target_threshold} is for train.loss=bce: the targets of "
                f"{self.loss} are probabilities"
            )

    def in_epochs(self, steps_per_epoch: int) -> "TrainOptions":
        """The same with `steps` and `evaluate_every_steps` in whole epochs, rounded up, and a limit to the steps."""
        changed: dict[str, Any] = {}
        if self.steps is not None:
            changed["epochs"] = math.ceil(self.steps / steps_per_epoch)
            changed["max_steps"] = min(self.steps, self.max_steps or self.steps)
        if self.evaluate_every_steps is not None:
            changed["evaluate_every_epochs"] = math.ceil(self.evaluate_every_steps / steps_per_epoch)
        return dataclasses.replace(self, **changed)


def fit_batch_size(global_batch_size: int, batch_size: int, ranks: int, fixed: bool = True) -> int:
    """The size of the micro-batches of which every rank makes its part of a global batch.

    Args:
        batch_size: as configured; where that does not divide a rank's part, the largest below it that does is taken.
        fixed: the user chose it, so it stays.

    Raises:
        UserError: there is no way, or none but single images; the message lists combinations that work.
    """
    a_rank = global_batch_size // ranks if global_batch_size % ranks == 0 else 0
    sizes = [size for size in range(1, a_rank + 1) if a_rank % size == 0]
    if batch_size in sizes:
        return batch_size
    smaller = [size for size in sizes if size < batch_size and (size > 1 or a_rank == 1)]
    if smaller and not fixed:
        return smaller[-1]
    near = sorted(sorted(sizes, key=lambda size: abs(size - batch_size))[:6])
    chunk = batch_size * ranks
    totals = [
        total for total in (global_batch_size // chunk * chunk, (global_batch_size // chunk + 1) * chunk) if total
    ]
    raise UserError(
        f"train.global_batch_size={global_batch_size} cannot be made of train.batch_size={batch_size} "
        f"on {ranks} process(es){', which do not divide it' if global_batch_size % ranks else ''}. "
        + (f"Batch sizes that fit: {', '.join(map(str, near))}. " if near else "")
        + f"Global batch sizes that fit: {', '.join(map(str, totals))}; the learning rate is usually scaled along"
    )
