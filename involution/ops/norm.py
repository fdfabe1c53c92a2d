"""BatchNorm in training and the ReLU behind it as one operator, on the CPU (csrc/norm.h) and on a GPU (triton_norm.py).

Torch takes 14 passes over memory for the two and their backward, this takes 8, and 11 instead of 17 with a residual.
A residual's own BatchNorm may join them (on the CPU): 15 passes instead of 26, or 20 with it apart.
What a backward uses was saved by its forward: the module may be another by then.

Shape legend: B batch, C channels, H W size.
"""

import ctypes
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, cpu, differentiable
from .ghost import parts_of

#: values below which a GPU waits for the six launches instead of for memory; not where they are replayed
#: (train.cuda_graphs), which still leaves small images to torch's operators, for the same bits
LAUNCH_BOUND = 1 << 22


class Norm(ctypes.Structure):
    """One BatchNorm of one batch, or of each of its `parts` (ghost.py); csrc/norm.h has the mirror of the fields."""

    parts: int = 1
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "channels", "threads", "training")] + [
        (name, ctypes.c_double) for name in ("momentum", "eps")
    ]


def supports(x: Tensor, norm: nn.BatchNorm2d, skip: Tensor | None = None) -> bool:
    """Whether ``norm_relu`` takes these."""
    same = skip is None or (_plain(skip) and skip.shape == x.shape and skip.dtype == x.dtype)
    return same and fits(norm, x, x.shape[1]) and (takes(x) or _takes_on_gpu(x, norm))


def supports_both(x: Tensor, norm: nn.BatchNorm2d, skip: Tensor, skip_norm: nn.BatchNorm2d) -> bool:
    """Whether ``norm_relu`` takes a residual with a BatchNorm of its own."""
    alike = norm.training == skip_norm.training and parts_of(norm, len(x)) == parts_of(skip_norm, len(x))
    return alike and takes(x) and supports(x, norm, skip) and fits(skip_norm, skip, skip.shape[1])


def takes(x: Tensor) -> bool:
    """Whether the CPU's operators of training take this image: float32, 64 or bfloat16, and ``_plain``."""
    return (
        _plain(x)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and backends.choose(x, x) is cpu
    )


def _takes_on_gpu(x: Tensor, norm: nn.BatchNorm2d) -> bool:
    """Whether the GPU's take it, and gain by it. A plain average of the statistics would wait for the device."""
    return (
        _plain(x)
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and (x.device.type == "cpu" or x.numel() >= LAUNCH_BOUND)
        and norm.momentum is not None
        and hasattr(backends.choose(x, x), "norm_forward")
    )


def _plain(x: Tensor) -> bool:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return type(x) is Tensor and channels_last and x.numel() > 0


def fits(norm: nn.BatchNorm2d, x: Tensor, channels: int) -> bool:
    """Whether weights and statistics are there, in use, for so many channels, in the type of ``x`` or of its sums."""
    statistics, types = (norm.running_mean, norm.running_var), (x.dtype, cpu.wide(x.dtype))
    tensors = norm.weight, norm.bias, *statistics
    if norm.training and not norm.track_running_stats:  # switched off for a while: they are to stay
        return False
    parts = parts_of(norm, len(x))
    if parts is None or (parts > 1 and norm.momentum is None):  # a plain average's share changes from part to part
        return False
    if not all(t is not None and t.shape == (channels,) and t.dtype in types and t.device == x.device for t in tensors):
        return False
    return all(t is not None and t.is_contiguous() for t in statistics)  # they are written in place


def norm_relu(
    x: Tensor, norm: nn.BatchNorm2d, skip: Tensor | None = None, skip_norm: nn.BatchNorm2d | None = None
) -> Tensor:
    """x (B, C, H, W) -> relu(norm(x) [+ skip]); ``supports`` says for what. Or relu(norm(x) + skip_norm(skip)):
    ``supports_both``."""
    own = norm.running_mean, norm.running_var, describe(norm, x)
    if skip is None or skip_norm is None:
        return _NormReLU.apply(x, norm.weight, norm.bias, skip, None, None, own, None)
    of_skip = skip_norm.running_mean, skip_norm.running_var, describe(skip_norm, skip)
    return _NormReLU.apply(x, norm.weight, norm.bias, skip, skip_norm.weight, skip_norm.bias, own, of_skip)


def describe(norm: nn.BatchNorm2d, x: Tensor, rows: int | None = None) -> Norm:
    """The problem of one forward and its backward; counts the batch, as BatchNorm does. rows: pixels, if not x's."""
    parts = parts_of(norm, len(x)) or 1
    rows = (x.numel() // x.shape[1] if rows is None else rows) // parts
    if norm.training and rows == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(parts)
        if momentum is None:  # a plain average
            momentum = 1 / float(norm.num_batches_tracked)
    problem = Norm(rows, len(norm.weight), torch.get_num_threads(), int(norm.training), momentum or 0, norm.eps)
    problem.parts = parts
    return problem


def _each_part(parts: int, *tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Views of the tensors' parts along the batch, in its order."""
    return zip(*([None] * parts if t is None else t.chunk(parts) for t in tensors), strict=True)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, problem: Norm, skip: Tensor | None = None,
    skip_coefficients: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """relu(norm(x) [+ skip]), and the coefficients (parts, 4, C) that the backward needs (a GPU's are 6); updates mean
    and var in training. skip_coefficients: of ``statistics``, where skip is to be normalised too."""
    backend: Any = backends.choose(x, x)
    if backend is not cpu:
        weight, bias = weight.contiguous(), bias.contiguous()
        options = problem.momentum, problem.eps, bool(problem.training)
        return backend.norm_forward(x, weight, bias, mean, var, *options, skip, problem.parts)
    coefficients = statistics(x, weight, bias, mean, var, problem)
    return _apply(x, coefficients, skip, skip_coefficients), coefficients


def statistics(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, problem: Norm) -> Tensor:
    """The coefficients (parts, 4, C) of a batch on the CPU; updates mean and var in training."""
    sums = cpu.wide(x.dtype)
    coefficients = x.new_empty(problem.parts, 4, x.shape[1], dtype=sums)
    weight, bias = (t.to(sums).contiguous() for t in (weight, bias))
    new_mean, new_var = mean.to(sums), var.to(sums)
    for of_x, k in _each_part(problem.parts, x, coefficients):
        cpu.call("norm_statistics", x.dtype, problem, of_x, weight, bias, new_mean, new_var, k)
    for statistic, new in ((mean, new_mean), (var, new_var)):
        if new is not statistic and problem.training:
            statistic.copy_(new)
    return coefficients


def remake(x: Tensor, coefficients: Tensor) -> Tensor:
    """The result of ``forward`` without a skip again, to the last bit."""
    backend: Any = backends.choose(x, x)
    return _apply(x, coefficients) if backend is cpu else backend.norm_remake(x, coefficients)


def _apply(
    x: Tensor, coefficients: Tensor, skip: Tensor | None = None, skip_coefficients: Tensor | None = None
) -> Tensor:
    out, parts = torch.empty_like(x), len(coefficients)
    problem = Norm(x.numel() // x.shape[1] // parts, x.shape[1], torch.get_num_threads())
    for tensors in _each_part(parts, x, skip, coefficients, skip_coefficients, out):
        cpu.call("norm_apply", x.dtype, problem, *tensors)
    return out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, coefficients: Tensor, problem: Norm,
    out: Tensor | None = None, skip: Tensor | None = None, skip_coefficients: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, weight, bias, skip and skip's weight; that of skip's bias is that of the bias.

    Args:
        out: the result where there was a skip.
        skip, skip_coefficients: where it was normalised.
    """
    grad = grad.contiguous(memory_format=torch.channels_last)
    backend: Any = backends.choose(x, x)
    if backend is not cpu:
        weight, bias = weight.contiguous(), bias.contiguous()
        return *backend.norm_backward(grad, x, weight, bias, coefficients, bool(problem.training), out), None
    grad_x, parts = torch.empty_like(x), problem.parts
    grad_skip = None if out is None else torch.empty_like(x)
    wanted = (True, True, skip is not None)
    by_channel = [coefficients.new_empty(parts, x.shape[1]) if want else None for want in wanted]
    images = grad, x, out, skip, coefficients, skip_coefficients, grad_x, grad_skip
    for tensors in _each_part(parts, *images, *by_channel):
        cpu.call("norm_backward", x.dtype, problem, *tensors)
    # weights may have the images' type or that of sums: autograd gives each gradient its weight's
    sums: list[Any] = [None if g is None else g.sum(0).to(weight.dtype) for g in by_channel]
    return grad_x, *sums[:2], grad_skip, sums[2]


def again(x: Tensor, weight: Tensor, bias: Tensor, coefficients: Tensor, problem: Norm) -> Tensor:
    """norm(x) again, in operators of torch that can be differentiated any number of times."""
    training, eps = bool(problem.training), problem.eps
    weight, bias = weight.to(coefficients.dtype), bias.to(coefficients.dtype)
    if training:
        parts = x.chunk(problem.parts)
        return torch.cat([F.batch_norm(part, None, None, weight, bias, True, 0.0, eps) for part in parts])
    mean, inverse, *_ = coefficients[0]
    return F.batch_norm(x, mean, inverse**-2 - eps, weight, bias, False, 0.0, eps)


class _NormReLU(torch.autograd.Function):
    """own, of_skip: running mean and variance and the problem of the BatchNorm, and of the residual's. A skip, and for
    it skip_weight, skip_bias and of_skip, may be None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        skip: Any,
        skip_weight: Any,
        skip_bias: Any,
        own: tuple[Tensor, Tensor, Norm],
        of_skip: tuple[Tensor, Tensor, Norm] | None,
    ) -> Tensor:
        skip_coefficients = None if of_skip is None else statistics(skip, skip_weight, skip_bias, *of_skip)
        out, coefficients = forward(x, weight, bias, *own, skip, skip_coefficients)
        ctx.problem, ctx.skip_problem = own[-1], None if of_skip is None else of_skip[-1]
        of_skips = (None if of_skip is None else skip, skip_weight, skip_bias, skip_coefficients)
        differentiable.keep(ctx, x, weight, bias, coefficients, None if skip is None else out, *of_skips)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, coefficients, out, skip, skip_weight, skip_bias, skip_coefficients = differentiable.kept(ctx)
        if not differentiable.again(grad):
            found = backward(grad, x, weight, bias, coefficients, ctx.problem, out, skip, skip_coefficients)
            return *found, None if skip is None else found[2], None, None
        grad = grad.masked_fill((remake(x, coefficients) if out is None else out) <= 0, 0)
        function = partial(again, coefficients=coefficients, problem=ctx.problem)
        grads = differentiable.gradients(function, grad, x, weight, bias)
        if skip_coefficients is None:
            return *grads, None if out is None else grad, None, None, None, None
        function = partial(again, coefficients=skip_coefficients, problem=ctx.skip_problem)
        return *grads, *differentiable.gradients(function, grad, skip, skip_weight, skip_bias), None, None
