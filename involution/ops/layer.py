"""An involution layer in training on the CPU as one operator: pool, reduce, BatchNorm, ReLU, span and involution.

The steps are those of the layer's modules. What is gained lies in the backward: the two gradients of the input are
added up where the first one lies, and the thin ``reduce`` is differentiated in one pass (csrc/pointwise.h). Neither the
kernels nor the hidden tensor are kept.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import cpu, norm


class _Pointwise(ctypes.Structure):
    """csrc/pointwise.h has its mirror."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "channels", "hidden", "add", "threads")]


def supports(x: Tensor, reduce: nn.Module, batch_norm: nn.BatchNorm2d, span: nn.Module) -> bool:
    """Whether ``involution_layer`` takes these: plain modules, and tensors as ``norm.norm_relu`` has them."""
    return (
        type(reduce) is nn.Conv2d
        and type(span) is nn.Conv2d
        and reduce.bias is None
        and all(type(p) is nn.Parameter and p.dtype == x.dtype for p in (reduce.weight, *span.parameters()))
        and x.shape[1] % 16 == 0
        and not torch.is_autocast_enabled("cpu")
        and norm.supports(x, batch_norm)
    )


def involution_layer(
    x: Tensor,
    reduce: nn.Conv2d,
    batch_norm: nn.BatchNorm2d,
    span: nn.Conv2d,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """(B, C, H, W) -> (B, C, Ho, Wo), with padding for Ho = ceil(H / stride); the generator's average pooling too."""
    pooled = x if stride == 1 else F.avg_pool2d(x, stride, stride, 0, True, False)
    options = kernel_size, stride, dilation * (kernel_size - 1) // 2, dilation
    parameters = reduce.weight, batch_norm.weight, batch_norm.bias, span.weight, span.bias
    return _InvolutionLayer.apply(x, pooled, *parameters, batch_norm, options)


class _InvolutionLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pooled: Tensor,
        reduce: Tensor,
        weight: Tensor,
        bias: Tensor,
        span: Tensor,
        span_bias: Tensor | None,
        batch_norm: nn.BatchNorm2d,
        options: tuple[int, int, int, int],
    ) -> Tensor:
        reduced = F.conv2d(pooled, reduce)
        problem = norm.describe(reduced, batch_norm)
        hidden, coefficients = norm.forward(reduced, batch_norm, problem)
        ctx.save_for_backward(x, pooled, reduced, coefficients, reduce, weight, bias, span, span_bias)
        ctx.problem, ctx.options = problem, options
        return cpu.span_forward(x, hidden, span, span_bias, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, pooled, reduced, coefficients, reduce, weight, bias, span, span_bias = ctx.saved_tensors
        hidden = norm.remake(reduced, coefficients)
        grad_x, grad_hidden, *grad_span = cpu.span_backward(grad, x, hidden, span, span_bias, *ctx.options)
        grad_reduced, *grad_norm, _ = norm.backward(grad_hidden, reduced, weight, bias, coefficients, ctx.problem)
        alone = ctx.options[1] > 1  # else it is x
        grad_pooled = torch.empty_like(pooled) if alone else grad_x
        grad_reduce = torch.empty_like(reduce)
        rows = pooled.numel() // pooled.shape[1]
        problem = _Pointwise(rows, pooled.shape[1], reduced.shape[1], int(not alone), torch.get_num_threads())
        tensors = grad_reduced, pooled, reduce, grad_pooled, grad_reduce
        cpu.call("pointwise_backward", x.dtype, problem, *tensors)
        return grad_x, grad_pooled if alone else None, grad_reduce, *grad_norm, *grad_span, None, None
