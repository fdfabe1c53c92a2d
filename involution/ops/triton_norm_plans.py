"""What BatchNorm and ReLU launch on a GPU (triton_norm.py), from shapes alone; tensors may lie on the meta device.

Shape legend: B batch, C channels, H W size; rows B H W of a group of images, P its partial sums.
"""

from typing import Any

import torch
from torch import Tensor

from . import triton_norm as kernels
from .triton_plans import Launch, ceil
from .triton_tiles import power

ROWS, CHANNELS = 32, 64  # a program's tile: 16 values a thread, loaded 8 at a time in 16 bits
GRADIENT_ROWS = (
    16  # of the gradients' sums, of three tensors at once: 0.82 of the time with 32 (H100, RedNet-50, 6babf2d)
)
PROGRAMS, PARTS = 1056, 1024  # eight programs a multiprocessor of the largest GPUs; not more partial sums than one adds


def sizes(x: Tensor, groups: int, rows: int = ROWS) -> dict[str, Any]:
    """Arguments that the kernels share, with tiles of so many rows in 16 bits."""
    channels = x.shape[1]
    block = min(CHANNELS, power(channels))
    return {
        "rows": x.numel() // channels // groups, "C": channels, "chunks": ceil(channels, block), "BC": block,
        "BR": 2 * rows * CHANNELS // (block * x.element_size()),
    }  # fmt: skip


def _sums(kernel: Any, x: Tensor, groups: int, arguments: dict[str, Any], rows: int = ROWS) -> Launch:
    """The launch, and in its arguments the partial sums, `parts` (groups, P, 2, C), of `per` rows each."""
    a = sizes(x, groups, rows)
    per = max(a["BR"], ceil(a["rows"], min(PARTS, ceil(PROGRAMS, a["chunks"] * groups))))
    count = ceil(a["rows"], per)
    parts, each = torch.empty(groups, count, 2, a["C"], dtype=torch.float32, device=x.device), a["chunks"] * count
    a |= {"x": x, "per": per, "P": count, "each": each, "parts": parts}
    return Launch(kernel, a | arguments, each * groups, 4)


def plan_statistics(x: Tensor, groups: int = 1) -> Launch:
    """Eight programs at once have 64 registers a thread; the compiler would like a ninth, and spill. Fewer channels
    than 16 take more than 64, and are left alone."""
    launch = _sums(kernels.statistics_kernel, x, groups, {})
    return launch._replace(registers=64 if launch.arguments["BC"] >= 16 else None)


def _finish(kernel: Any, x: Tensor, sums: Launch | None, arguments: dict[str, Any]) -> Launch:
    """`kernel` for a few channels a program: about 4096 partial sums."""
    parts, channels = None if sums is None else sums.arguments["parts"], x.shape[1]
    groups, count = (1, 1) if parts is None else parts.shape[:2]
    padded = power(count)
    block = min(max(4, 4096 // padded), 128, power(channels))
    arguments |= {"parts": parts, "rows": x.numel() // channels // groups, "C": channels, "P": count, "groups": groups}
    arguments |= {"PP": padded, "BC": block}
    return Launch(kernel, arguments, ceil(channels, block), 4)


def plan_finish_statistics(
    x: Tensor, sums: Launch | None, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, coefficients: Tensor,
    momentum: float, eps: float,
) -> Launch:  # fmt: skip
    """sums: plan_statistics's launch, or None to normalise with the running statistics."""
    arguments = {
        "weight": weight, "bias": bias, "running_mean": mean, "running_var": var, "coefficients": coefficients,
        "momentum": momentum, "eps": eps, "TRAINING": sums is not None,
        "per": 1 if sums is None else sums.arguments["per"],
    }  # fmt: skip
    return _finish(kernels.finish_statistics_kernel, x, sums, arguments)


def _each_place(kernel: Any, x: Tensor, arguments: dict[str, Any]) -> Launch:
    groups = len(arguments["coefficients"])
    a = sizes(x, groups) | arguments
    a["each"] = a["chunks"] * ceil(a["rows"], a["BR"])
    return Launch(kernel, a, a["each"] * groups, 4)


def plan_apply(x: Tensor, skip: Tensor | None, coefficients: Tensor, out: Tensor) -> Launch:
    return _each_place(kernels.apply_kernel, x, {"x": x, "skip": skip, "coefficients": coefficients, "out": out})


def plan_gradients(grad: Tensor, x: Tensor, out: Tensor | None, coefficients: Tensor, masked: Tensor | None) -> Launch:
    arguments = {"grad": grad, "out": out, "coefficients": coefficients, "masked": masked}
    return _sums(kernels.gradients_kernel, x, len(coefficients), arguments, GRADIENT_ROWS)


def plan_finish_gradients(
    x: Tensor, sums: Launch, coefficients: Tensor, grad_weight: Tensor, grad_bias: Tensor, training: bool
) -> Launch:
    arguments = {"coefficients": coefficients, "grad_weight": grad_weight, "grad_bias": grad_bias, "TRAINING": training}
    return _finish(kernels.finish_gradients_kernel, x, sums, arguments)


def plan_apply_gradients(grad: Tensor, x: Tensor, coefficients: Tensor, out: Tensor, mask: bool) -> Launch:
    """Of fewer channels than 16 four programs at once have 128 registers a thread; more at once would spill."""
    arguments = {"grad": grad, "x": x, "coefficients": coefficients, "out": out, "MASK": mask}
    launch = _each_place(kernels.apply_gradients_kernel, x, arguments)
    return launch._replace(registers=None if launch.arguments["BC"] >= 16 else 128)
