"""BatchNorm in training and the ReLU behind it as one operator on the CPU (csrc/norm.h).

Torch takes 14 passes over memory for the two and their backward, this takes 8, and 11 instead of 17 with a residual.

Shape legend: B batch, C channels, H W size.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, cpu


class _Norm(ctypes.Structure):
    """csrc/norm.h has its mirror."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "channels", "threads", "training")] + [
        (name, ctypes.c_double) for name in ("momentum", "eps")
    ]


def supports(x: Tensor, norm: nn.BatchNorm2d, skip: Tensor | None = None) -> bool:
    """Whether ``norm_relu`` takes these: plain float32 or float64 tensors, channels_last, on the CPU."""
    tensors = [x] if skip is None else [x, skip]
    return (
        norm.affine
        and norm.running_mean is not None
        and type(norm.weight) is nn.Parameter
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > x.shape[1]  # torch has the error for a single value a channel
        and all(
            type(t) is Tensor
            and t.dtype == norm.weight.dtype
            and t.shape == x.shape
            and t.is_contiguous(memory_format=torch.channels_last)
            for t in tensors
        )
        and backends.choose(x, norm.weight) is cpu
    )


def norm_relu(x: Tensor, norm: nn.BatchNorm2d, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (B, C, H, W) -> relu(norm(x) [+ skip]) and the coefficients (4, C) that make it again, see ``remake``."""
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # a plain average
            momentum = 1 / float(norm.num_batches_tracked)
    return _NormReLU.apply(x, norm.weight, norm.bias, skip, norm, _describe(x, norm.training, momentum or 0, norm.eps))


def remake(x: Tensor, coefficients: Tensor) -> Tensor:
    """The result of ``norm_relu(x, norm)`` again, to the last bit."""
    out = torch.empty_like(x)
    cpu.call("norm_apply", x.dtype, _describe(x, False, 0, 0), x, coefficients, out)
    return out


def _describe(x: Tensor, training: bool, momentum: float, eps: float) -> _Norm:
    rows = x.numel() // x.shape[1]
    return _Norm(rows, x.shape[1], torch.get_num_threads(), int(training), momentum, eps)


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None, norm: nn.BatchNorm2d, problem: _Norm
    ) -> tuple[Tensor, Tensor]:
        out, coefficients = torch.empty_like(x), x.new_empty(4, x.shape[1])
        statistics = norm.running_mean, norm.running_var
        cpu.call("norm_forward", x.dtype, problem, x, skip, weight, bias, *statistics, coefficients, out)
        ctx.mark_non_differentiable(coefficients)
        ctx.save_for_backward(x, weight, bias, coefficients, None if skip is None else out)
        ctx.problem = problem
        return out, coefficients

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, coefficients, out = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants a second derivative
            return (*_differentiable(ctx, grad), None, None)
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        grad_skip = None if out is None else torch.empty_like(x)
        grads = grad_x, grad_skip, grad_weight, grad_bias
        cpu.call("norm_backward", x.dtype, ctx.problem, grad, x, out, coefficients, *grads)
        return grad_x, grad_weight, grad_bias, grad_skip, None, None


def _differentiable(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and skip, by operators of torch that can be differentiated again."""
    x, weight, bias, coefficients, out = ctx.saved_tensors
    mean, inverse = coefficients[:2]
    open_ = (remake(x, coefficients) if out is None else out) > 0
    grad = grad * open_
    statistics = (None, None) if ctx.problem.training else (mean, inverse**-2 - ctx.problem.eps)
    y = F.batch_norm(x, *statistics, weight, bias, bool(ctx.problem.training), 0.0, ctx.problem.eps)
    inputs = [t for t in (x, weight, bias) if t.requires_grad]
    found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    grads = (next(found) if t.requires_grad else None for t in (x, weight, bias))
    return (*grads, None if out is None else grad)
