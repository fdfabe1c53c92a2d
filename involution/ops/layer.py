"""An involution layer in training on the CPU as one operator: reduce, BatchNorm, ReLU, span and involution.

The steps are those of the layer's modules. What is gained lies in the backward: the two gradients of the input are
added up where the first one lies, and the thin ``reduce`` is differentiated in one pass (csrc/pointwise.h). Neither the
kernels nor the hidden tensor are kept.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels.
"""

import ctypes
from typing import Any, TypeGuard

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
        _pointwise(reduce)
        and _pointwise(span)
        and reduce.bias is None
        and all(type(p) is nn.Parameter and p.dtype == x.dtype for p in (reduce.weight, *span.parameters()))
        and reduce.in_channels % 16 == 0
        and not torch.is_autocast_enabled("cpu")
        and norm.supports(x, batch_norm)
    )


def _pointwise(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    if type(conv) is not nn.Conv2d:
        return False
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def involution_layer(
    x: Tensor,
    pooled: Tensor,
    reduce: nn.Conv2d,
    batch_norm: nn.BatchNorm2d,
    span: nn.Conv2d,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """x (B, C, H, W), pooled (B, C, Ho, Wo) -> (B, C, Ho, Wo), with padding for Ho = ceil(H / stride). pooled: the
    generator's input, often x itself."""
    options = kernel_size, stride, dilation * (kernel_size - 1) // 2, dilation
    parameters = reduce.weight, batch_norm.weight, batch_norm.bias, span.weight, span.bias
    other = None if pooled is x else pooled.contiguous(memory_format=torch.channels_last)
    return _InvolutionLayer.apply(x, other, *parameters, batch_norm, options)


class _InvolutionLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pooled: Tensor | None,
        reduce: Tensor,
        weight: Tensor,
        bias: Tensor,
        span: Tensor,
        span_bias: Tensor | None,
        batch_norm: nn.BatchNorm2d,
        options: tuple[int, int, int, int],
    ) -> Tensor:
        reduced = F.conv2d(x if pooled is None else pooled, reduce)
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
        grad_reduce = torch.empty_like(reduce)
        grad_pooled = None if pooled is None else torch.empty_like(pooled)
        source, target = (x, grad_x) if pooled is None else (pooled, grad_pooled)
        rows, channels = source.numel() // source.shape[1], source.shape[1]
        problem = _Pointwise(rows, channels, reduced.shape[1], int(pooled is None), torch.get_num_threads())
        cpu.call("pointwise_backward", x.dtype, problem, grad_reduced, source, reduce, target, grad_reduce)
        return grad_x, grad_pooled, grad_reduce, *grad_norm, *grad_span, None, None
