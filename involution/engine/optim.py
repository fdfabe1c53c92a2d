"""Parameter groups, learning-rate schedules (pure functions of the step) and the average of the weights."""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

Schedule = Callable[[int], float]


def parameter_groups(
    model: nn.Module, exclude_from_decay: str = "none", layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Split the parameters into those that weight decay shrinks and those that it leaves alone, and by depth.

    Args:
        exclude_from_decay: "none" decays everything, as the paper does; "norm_and_bias" spares every parameter with at
            most one dimension, which are exactly biases and the weights of normalisation layers.
        layer_decay: the learning rate of a layer is that of the next one times this (Clark et al., 2020): "lr_scale"
            in its groups. None: all have the same.
    """
    depths = {} if layer_decay is None else layers(model)
    last = max(depths.values(), default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        spared = exclude_from_decay == "norm_and_bias" and parameter.ndim <= 1
        if parameter.requires_grad:
            groups.setdefault((depths.get(name, last), spared), []).append(parameter)
    found: list[dict[str, Any]] = []
    for (depth, spared), parameters in sorted(groups.items(), key=lambda item: item[0]):
        scale = {} if layer_decay is None else {"lr_scale": layer_decay ** (last - depth)}
        found.append({"params": parameters, **scale, **({"weight_decay": 0.0} if spared else {})})
    return found


def layers(model: nn.Module) -> dict[str, int]:
    """{name of a parameter: depth of its layer}, the classifier's the largest: as a timm model says it, otherwise the
    model's children in their order, and the blocks of those that are sequences."""
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        return group_parameters(model, matcher(coarse=False), reverse=True)
    prefixes: dict[str, int] = {}
    found = {}
    for name, _ in model.named_parameters():
        first, second, *_ = [*name.split("."), ""]
        prefix = f"{first}.{second}" if second.isdigit() else first
        found[name] = prefixes.setdefault(prefix, len(prefixes))
    return found


def timm_optimizer(groups: list[dict[str, Any]], *, name: str, **options: Any) -> torch.optim.Optimizer:
    """An optimizer of timm by its name there.

    Raises:
        ValueError: it has none of that name, with the nearest ones; or it is of second order.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    known = [str(one) for one in list_optimizers()]
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known)) or "timm.optim.list_optimizers()"
        raise ValueError(f"optimizer.name={name} is no optimizer of timm; nearest: {near}")
    if get_optimizer_info(name).second_order:
        raise ValueError(f"optimizer.name={name} needs second derivatives, which training does not make")
    return create_optimizer_v2(groups, name, **options)  # type: ignore[arg-type]


class Update:
    """An optimizer's step, which leaves everything as it was where `bad` says so.

    Fused optimizers read `found_inf` in their kernels, so a step that is not finite costs no synchronisation. Fused SGD
    takes its first gradient as the momentum; were that step skipped, the buffer would stay uninitialised memory, so
    momentum starts from zero. Of other optimizers the weights and the state are put back on the device; only numbers
    that they keep on the CPU, such as the count of steps, go on counting. On the CPU the step is not taken at all.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.fused = bool(optimizer.defaults.get("fused"))
        if self.fused and optimizer.defaults.get("momentum"):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def __call__(self, bad: Tensor) -> None:
        """Step unless `bad` (a bool on the device)."""
        if self.fused:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bad.device.type == "cpu" or not self.optimizer.state:  # a first step makes state, so it has to be known
            if not bad:
                self.optimizer.step()
        else:
            self.masked(bad)

    def masked(self, bad: Tensor) -> None:
        """Step, and put back what there was before if `bad`: copies of whole types of tensors, no waiting."""
        device = bad.device
        changed = [p for group in self.optimizer.param_groups for p in group["params"]]
        changed += [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in changed:
            if tensor.device == device:
                by_type.setdefault(tensor.dtype, []).append(tensor.detach())
        before = {dtype: torch.cat([t.flatten() for t in tensors]) for dtype, tensors in by_type.items()}
        self.optimizer.step()
        for dtype, tensors in by_type.items():
            kept = torch.where(bad, before[dtype], torch.cat([t.flatten() for t in tensors]))
            parts = kept.split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])


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
        ValueError: for an unknown name, or milestones that are no list of epochs.
    """
    if not isinstance(milestones, list | tuple) or not all(isinstance(m, int | float) and m > 0 for m in milestones):
        raise ValueError(f"schedule.milestones is {milestones!r}; it should be a list of epochs, as in [30,60,90]")
    if min_lr > lr:
        raise ValueError(f"schedule.min_lr={min_lr} should be at most optimizer.lr={lr}")
    if warmup_steps is not None and not isinstance(warmup_steps, int):
        raise ValueError(f"schedule.warmup_steps={warmup_steps} should be a whole number")
    if name == "cosine":
        schedule = cosine(lr, total_steps, min_lr)
    elif name == "poly":
        schedule = poly(lr, total_steps, power, min_lr)
    elif name == "step":
        schedule = staircase(lr, [round(m * steps_per_epoch) for m in milestones], gamma)
    else:
        raise ValueError(f"schedule.name is {name!r}; it should be 'cosine', 'poly' or 'step'")
    steps = warmup_length(steps_per_epoch, warmup_epochs=warmup_epochs, warmup_steps=warmup_steps)
    return warmup(schedule, steps, warmup_start) if steps else schedule


def warmup_length(steps_per_epoch: int, *, warmup_epochs: float = 0, warmup_steps: int | None = None, **_: Any) -> int:
    """Steps of warm-up."""
    return round(warmup_epochs * steps_per_epoch) if warmup_steps is None else warmup_steps


def exponential_average(model: nn.Module, decay: float) -> "ModelEmaV3":
    """A copy of the model whose weights and BatchNorm statistics follow the model's.

    `update(model, step)` after optimizer step number `step`, counted from 1, makes them w += (1 - d) (model - w) with
    d = min(decay, 1 - step^(-2/3)), timm's warm-up. It therefore forgets the random start however short the run:
    0.9999 alone would leave 98 % of it after 180 steps. Its only state is the weights, so it resumes exactly.
    """
    from timm.utils import ModelEmaV3  # training without an average needs no timm

    return ModelEmaV3(model, decay=decay, use_warmup=True)
