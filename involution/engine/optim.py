"""Parameter groups, learning-rate schedules (pure functions of the step) and the average of the weights."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

Schedule = Callable[[int], float]


def parameter_groups(model: nn.Module, exclude_from_decay: str = "none") -> list[dict[str, Any]]:
    """Split the parameters into those that weight decay shrinks and those that it leaves alone.

    Args:
        exclude_from_decay: "none" decays everything, as the paper does; "norm_and_bias" spares every parameter with at
            most one dimension, which are exactly biases and the weights of normalisation layers.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if exclude_from_decay == "none":
        return [{"params": parameters}]
    if exclude_from_decay != "norm_and_bias":
        raise ValueError(f"exclude_from_decay is {exclude_from_decay!r}; it should be 'none' or 'norm_and_bias'")
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def prepare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Check that the optimizer can skip a step on the device, and start its momentum from zero.

    Fused optimizers read `found_inf` in their kernels, so a non-finite step costs no synchronisation. Fused SGD takes
    its first gradient as the momentum; were that step skipped, the buffer would stay uninitialised memory.
    """
    if not optimizer.defaults.get("fused"):
        name = type(optimizer).__name__
        raise ValueError(f"optimizer {name} is not fused; set optimizer.fused=true (SGD, Adam, AdamW and Adagrad can)")
    if optimizer.defaults.get("momentum"):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def warmup(schedule: Schedule, steps: int, start: float) -> Schedule:
    """Multiply the first `steps` values of a schedule by a ramp from `start` to 1 (Goyal et al., 2017)."""

    def lr(step: int) -> float:
        return schedule(step) * (start + (1 - start) * step / steps if step < steps else 1.0)

    return lr


def cosine(lr: float, total_steps: int, min_lr: float = 0.0) -> Schedule:
    """Half a cosine from `lr` at step 0 to `min_lr` at `total_steps` (paper, A.1)."""

    def at(step: int) -> float:
        return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(step, total_steps) / total_steps))

    return at


def poly(lr: float, total_steps: int, power: float, min_lr: float = 0.0) -> Schedule:
    """From `lr` at step 0 to `min_lr` at `total_steps` as a power of what is left (paper, A.3: 0.9)."""
    return lambda step: min_lr + (lr - min_lr) * (1 - min(step, total_steps) / total_steps) ** power


def staircase(lr: float, milestones: Sequence[int], gamma: float) -> Schedule:
    """`lr`, multiplied by `gamma` at each milestone (in steps)."""
    return lambda step: lr * gamma ** sum(step >= milestone for milestone in milestones)


def build_schedule(
    lr: float,
    total_steps: int,
    steps_per_epoch: int,
    *,
    name: str,
    warmup_epochs: float,
    warmup_start: float,
    warmup_steps: int | None = None,
    min_lr: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    power: float = 0.9,
) -> Schedule:
    """Make step -> learning rate from a configuration in epochs, but for `warmup_steps`.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "cosine":
        schedule = cosine(lr, total_steps, min_lr)
    elif name == "poly":
        schedule = poly(lr, total_steps, power, min_lr)
    elif name == "step":
        schedule = staircase(lr, [round(m * steps_per_epoch) for m in milestones], gamma)
    else:
        raise ValueError(f"schedule.name is {name!r}; it should be 'cosine', 'poly' or 'step'")
    steps = round(warmup_epochs * steps_per_epoch) if warmup_steps is None else warmup_steps
    return warmup(schedule, steps, warmup_start) if steps else schedule


def exponential_average(model: nn.Module, decay: float) -> "ModelEmaV3":
    """A copy of the model whose weights and BatchNorm statistics follow the model's.

    `update(model, step)` after optimizer step number `step`, counted from 1, makes them w += (1 - d) (model - w) with
    d = min(decay, 1 - step^(-2/3)), timm's warm-up. It therefore forgets the random start however short the run:
    0.9999 alone would leave 98 % of it after 180 steps. Its only state is the weights, so it resumes exactly.
    """
    from timm.utils import ModelEmaV3  # training without an average needs no timm

    return ModelEmaV3(model, decay=decay, use_warmup=True)
