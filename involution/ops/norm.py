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
    return _NormReLU.apply(x, norm.weight, norm.bias, skip, norm)


def remake(x: Tensor, coefficients: Tensor) -> Tensor:
    """The result of ``norm_relu(x, norm)`` again, to the last bit."""
    out = torch.empty_like(x)
    cpu.call("norm_apply", x.dtype, _Norm(*_shape(x)), x, coefficients, out)
    return out


def _shape(x: Tensor) -> tuple[int, int, int]:
    return x.numel() // x.shape[1], x.shape[1], torch.get_num_threads()


def describe(x: Tensor, norm: nn.BatchNorm2d) -> _Norm:
    """The problem of one forward and its backward; counts the batch, as BatchNorm does."""
    if norm.training and x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # a plain average
            momentum = 1 / float(norm.num_batches_tracked)
    return _Norm(*_shape(x), int(norm.training), momentum or 0, norm.eps)


def forward(x: Tensor, norm: nn.BatchNorm2d, problem: _Norm, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What ``norm_relu`` returns, without autograd."""
    out, coefficients = torch.empty_like(x), x.new_empty(4, x.shape[1])
    operands = norm.weight, norm.bias, norm.running_mean, norm.running_var
    cpu.call("norm_forward", x.dtype, problem, x, skip, *operands, coefficients, out)
    return out, coefficients


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    coefficients: Tensor,
    problem: _Norm,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight, bias and skip. out: the result where there was a skip."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    grad_skip = None if out is None else torch.empty_like(x)
    tensors = grad, x, out, coefficients, grad_x, grad_skip, grad_weight, grad_bias
    cpu.call("norm_backward", x.dtype, problem, *tensors)
    return grad_x, grad_weight, grad_bias, grad_skip


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None, norm: nn.BatchNorm2d
    ) -> tuple[Tensor, Tensor]:
        ctx.problem = describe(x, norm)
        out, coefficients = forward(x, norm, ctx.problem, skip)
        ctx.mark_non_differentiable(coefficients)
        ctx.save_for_backward(x, weight, bias, coefficients, None if skip is None else out)
        return out, coefficients

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # somebody wants a second derivative
            return (*_differentiable(ctx, grad), None)
        x, weight, bias, coefficients, out = ctx.saved_tensors
        return (*backward(grad, x, weight, bias, coefficients, ctx.problem, out), None)


def _differentiable(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and skip, by operators of torch that can be differentiated again."""
    x, weight, bias, coefficients, out = ctx.saved_tensors
    training, eps = bool(ctx.problem.training), ctx.problem.eps
    mean, inverse, *_ = coefficients
    grad = grad * ((remake(x, coefficients) if out is None else out) > 0)
    variance = inverse**-2 - eps
    y = F.batch_norm(x, None if training else mean, None if training else variance, weight, bias, training, 0.0, eps)
    inputs = [t for t in (x, weight, bias) if t.requires_grad]
    found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    grads = (next(found) if t.requires_grad else None for t in (x, weight, bias))
    return (*grads, None if out is None else grad)
