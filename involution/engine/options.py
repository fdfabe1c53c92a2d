"""The trainer's own options: the `train` node of the configuration, explained in conf/train.yaml."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


@dataclass
class TrainOptions:
    epochs: int = MISSING
    global_batch_size: int = MISSING
    batch_size: int = MISSING
    label_smoothing: float = MISSING
    precision: str = MISSING
    compile: bool = MISSING
    channels_last: bool = MISSING
    sync_batchnorm: bool = MISSING
    clip_grad_norm: float | None = MISSING
    ema_decay: float | None = MISSING
    exclude_from_decay: str = MISSING
    freeze: Any = MISSING  # a number or a list of names
    resume: str = MISSING
    max_steps: int | None = MISSING
    max_bad_steps: int = MISSING
    log_every_steps: int = MISSING
    evaluate_every_epochs: int = MISSING
    checkpoint_every_steps: int | None = MISSING
    checkpoint_every_minutes: float | None = MISSING
    keep_checkpoints: int = MISSING
    timeout_minutes: float = MISSING
