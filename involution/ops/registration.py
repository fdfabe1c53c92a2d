"""torch.library registration: the fused operator, and autocast and FLOP formulas of all (the plain: bilinear.py).

The forward operators save their inputs only; the fused one makes its kernels again in the backward, and keeps none.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import backends, bilinear, composed, differentiable  # noqa: F401  (bilinear defines the plain operators)
from .shapes import empty_output, nothing, output_hw, placed

_OPERATORS = ("involution2d", "span_involution2d", "neighbourhood_product")

# ---- span_involution2d -----------------------------------------------------------------------------------------------


@torch.library.custom_op("involution::span_involution2d", mutates_args=())
def _span(
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    args = (input, reduced, weight, bias, kernel_size, stride, padding, dilation)
    if input.numel() == 0:
        return _span_fake(*args).zero_()
    backend = backends.choose(input, weight)
    if hasattr(backend, "span_forward"):
        return placed(backend.span_forward(*args), input)
    return placed(composed.span_forward(backend, *args), input)


@_span.register_fake
def _span_fake(
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    return empty_output(input, input.shape[1], *output_hw(input, kernel_size, stride, padding, dilation))


@torch.library.custom_op("involution::span_involution2d_backward", mutates_args=())
def _span_backward(
    grad: Tensor,
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (grad, input, reduced, weight, bias, kernel_size, stride, padding, dilation)
    if input.numel() == 0:
        return tuple(t.zero_() for t in _span_backward_fake(*args))  # type: ignore[return-value]
    backend = backends.choose(input, weight)
    if hasattr(backend, "span_backward"):
        grads = backend.span_backward(*args)
    else:
        grads = composed.span_backward(backend, *args)
    grad_weight = _restride(grads[2].reshape(weight.shape).contiguous(), weight)
    grad_bias = nothing(weight) if bias is None else grads[3]
    return placed(grads[0], input), placed(grads[1], reduced), grad_weight, grad_bias


@_span_backward.register_fake
def _span_backward_fake(
    grad: Tensor,
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_input, grad_reduced = empty_output(input, *input.shape[1:]), empty_output(reduced, *reduced.shape[1:])
    grad_bias = nothing(weight) if bias is None else torch.empty_like(bias)
    return grad_input, grad_reduced, _restride(weight.new_empty(weight.shape), weight), grad_bias


def _restride(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient with the weight's own strides, as DDP wants it; strides of sides of 1 mean nothing."""
    same = weight.is_contiguous(memory_format=torch.channels_last)
    return grad.as_strided(weight.shape, weight.stride()) if same else grad


def _span_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _span_differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if differentiable.again(grad):
        function = partial(differentiable.span_involution2d, options=ctx.options)
        return (*differentiable.gradients(function, grad, *ctx.saved_tensors), None, None, None, None)
    grads = torch.ops.involution.span_involution2d_backward(grad, *ctx.saved_tensors, *ctx.options)
    needed = (g if needs else None for g, needs in zip(grads, ctx.needs_input_grad[:4], strict=True))
    return (*needed, None, None, None, None)


_span.register_autograd(_span_differentiate, setup_context=_span_save)

# ---- autocast: the floating-point operands take the autocast type, as those of a convolution do ----------------------


def register_autocast(library: torch.library.Library, name: str, device: str) -> None:
    """Floating-point operands of the operator take the autocast type, but for float64."""
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device]
    operator = getattr(torch.ops.involution, name).default
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(value: Any) -> Any:
        castable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(torch.get_autocast_dtype(device)) if castable else value

    def autocast(*args: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*(cast(arg) for arg in args))

    library.impl(name, autocast, key)


_library = torch.library.Library("involution", "FRAGMENT")
for _name in _OPERATORS:
    for _device in ("cpu", "cuda"):
        register_autocast(_library, _name, _device)

# ---- FLOP formulas: two a multiply-add, recomputation in the backward counted as the work it is ---------------------


def _window_flops(input_shape: Any, kernel_size: int, stride: int, padding: int, dilation: int) -> int:
    input = torch.empty(input_shape, device="meta")
    height, width = output_hw(input, kernel_size, stride, padding, dilation)
    return 2 * input.shape[0] * input.shape[1] * kernel_size**2 * height * width


def _span_flops(reduced_shape: Any, weight_shape: Any) -> int:
    batch, hidden, height, width = reduced_shape
    return int(2 * batch * hidden * height * width * weight_shape[0])


@register_flop_formula(torch.ops.involution.involution2d)
def _flops(input: Any, kernel: Any, stride: int, padding: int, dilation: int, **_: Any) -> int:
    return _window_flops(input, kernel[2], stride, padding, dilation)


@register_flop_formula(torch.ops.involution.involution2d_backward)
def _backward_flops(
    grad: Any, input: Any, kernel: Any, stride: int, padding: int, dilation: int, x: bool, k: bool, **_: Any
) -> int:
    return (int(x) + int(k)) * _window_flops(input, kernel[2], stride, padding, dilation)


@register_flop_formula(torch.ops.involution.involution2d_transpose)
def _transpose_flops(
    grad: Any, kernel: Any, height: int, width: int, stride: int, padding: int, dilation: int, **_: Any
) -> int:
    return _window_flops((*grad[:2], height, width), kernel[2], stride, padding, dilation)


@register_flop_formula(torch.ops.involution.neighbourhood_product)
def _product_flops(
    query: Any, key: Any, size: int, groups: int, stride: int, padding: int, dilation: int, **_: Any
) -> int:
    return _window_flops(key, size, stride, padding, dilation)


@register_flop_formula(torch.ops.involution.span_involution2d)
def _fused_flops(input: Any, reduced: Any, weight: Any, bias: Any, size: int, *options: int, **_: Any) -> int:
    return _window_flops(input, size, *options) + _span_flops(reduced, weight)


@register_flop_formula(torch.ops.involution.span_involution2d_backward)
def _fused_backward_flops(
    grad: Any, input: Any, reduced: Any, weight: Any, bias: Any, size: int, *options: int, **_: Any
) -> int:
    return 2 * _window_flops(input, size, *options) + 3 * _span_flops(reduced, weight)
