"""The three bilinear maps of involution, registered so that their gradients are each other.

    involution2d:            Y[i, c] = sum over taps t of  kernel[i, g(c), t] * X[i + t, c]
    involution2d_transpose:  X[j, c] = sum over taps t of  kernel[j - t, g(c), t] * Y[j - t, c]
    neighbourhood_product:   kernel[i, g, t] = sum over the channels c of g of  Y[i, c] * X[i + t, c]

Each is linear in both of its operands, and <Y, involution2d(X, k)> = <X, transpose(Y, k)> = <k, product(Y, X)>. So the
gradient of one map is the other two, and gradients of any order follow. ``involution2d_backward`` is the last two in
one call, as a first backward wants them.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size.
"""

from typing import Any

from torch import Tensor
from torch import ops as torch_ops
from torch.library import custom_op

from . import backends
from .shapes import empty_kernel, empty_output, empty_product, nothing, output_hw, placed

Gradients = tuple[Tensor | None, ...]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.options = tuple(value for value in inputs if not isinstance(value, Tensor))
    ctx.set_materialize_grads(False)


# ---- involution2d ----------------------------------------------------------------------------------------------------


@custom_op("involution::involution2d", mutates_args=())
def _forward(input: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    if input.numel() == 0:
        return _forward_fake(input, kernel, stride, padding, dilation).zero_()
    out = backends.choose(input, kernel).forward(input, kernel, stride, padding, dilation)
    return placed(out, input)


@_forward.register_fake
def _forward_fake(input: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    return empty_output(input, input.shape[1], *output_hw(input, kernel.shape[2], stride, padding, dilation))


def _differentiate(ctx: Any, grad: Tensor | None) -> Gradients:
    if grad is None:
        return (None,) * 5
    needs = ctx.needs_input_grad[:2]
    grads = torch_ops.involution.involution2d_backward(grad, *ctx.saved_tensors, *ctx.options, *needs)
    return (*(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)

# ---- involution2d_backward: the two other maps at once ---------------------------------------------------------------


@custom_op("involution::involution2d_backward", mutates_args=())
def _backward(
    grad: Tensor,
    input: Tensor,
    kernel: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    needs_input: bool,
    needs_kernel: bool,
) -> tuple[Tensor, Tensor]:
    args = (grad, input, kernel, stride, padding, dilation, needs_input, needs_kernel)
    if input.numel() == 0:
        return tuple(t.zero_() for t in _backward_fake(*args))  # type: ignore[return-value]
    grad_input, grad_kernel = backends.choose(input, kernel).backward(*args)
    if grad_kernel is None:
        return placed(grad_input, input), nothing(kernel)
    promised = empty_kernel(kernel, "meta").stride()
    if grad_kernel.stride() != promised:
        grad_kernel = empty_kernel(kernel).copy_(grad_kernel)
    return placed(grad_input, input), grad_kernel


@_backward.register_fake
def _backward_fake(
    grad: Tensor,
    input: Tensor,
    kernel: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    needs_input: bool,
    needs_kernel: bool,
) -> tuple[Tensor, Tensor]:
    grad_input = empty_output(input, *input.shape[1:]) if needs_input else nothing(input)
    return grad_input, empty_kernel(kernel) if needs_kernel else nothing(kernel)


def _backward_differentiate(ctx: Any, to_input: Tensor | None, to_kernel: Tensor | None) -> Gradients:
    """to_input (B, C, H, W), to_kernel (B, G, K, K, Ho, Wo): what the gradients' own gradients are."""
    grad, input, kernel = ctx.saved_tensors
    *options, needs_input, needs_kernel = ctx.options
    maps, wanted = torch_ops.involution, ctx.needs_input_grad
    ours, theirs, kernels = None, None, None
    if needs_input and to_input is not None:
        ours = maps.involution2d(to_input, kernel, *options) if wanted[0] else None
        groups, size = kernel.shape[1:3]
        kernels = maps.neighbourhood_product(grad, to_input, size, groups, *options) if wanted[2] else None
    if needs_kernel and to_kernel is not None:
        if wanted[0]:
            more = maps.involution2d(input, to_kernel, *options)
            ours = more if ours is None else ours + more
        theirs = maps.involution2d_transpose(grad, to_kernel, *input.shape[2:], *options) if wanted[1] else None
    return ours, theirs, kernels, None, None, None, None, None


_backward.register_autograd(_backward_differentiate, setup_context=_save)

# ---- involution2d_transpose ------------------------------------------------------------------------------------------


@custom_op("involution::involution2d_transpose", mutates_args=())
def _transpose(
    grad: Tensor, kernel: Tensor, height: int, width: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """grad (B, C, Ho, Wo), kernel (B, G, K, K, Ho, Wo) -> (B, C, height, width) in the layout of `grad`."""
    args = (grad, kernel, height, width, stride, padding, dilation)
    if grad.numel() == 0:
        return _transpose_fake(*args).zero_()
    return placed(backends.choose(grad, kernel).transpose(*args), grad)


@_transpose.register_fake
def _transpose_fake(
    grad: Tensor, kernel: Tensor, height: int, width: int, stride: int, padding: int, dilation: int
) -> Tensor:
    return empty_output(grad, grad.shape[1], height, width)


def _transpose_differentiate(ctx: Any, to_input: Tensor | None) -> Gradients:
    if to_input is None:
        return (None,) * 7
    grad, kernel = ctx.saved_tensors
    options, maps, wanted = ctx.options[2:], torch_ops.involution, ctx.needs_input_grad
    ours = maps.involution2d(to_input, kernel, *options) if wanted[0] else None
    groups, size = kernel.shape[1:3]
    kernels = maps.neighbourhood_product(grad, to_input, size, groups, *options) if wanted[1] else None
    return ours, kernels, None, None, None, None, None


_transpose.register_autograd(_transpose_differentiate, setup_context=_save)

# ---- neighbourhood_product -------------------------------------------------------------------------------------------


@custom_op("involution::neighbourhood_product", mutates_args=())
def _product(
    query: Tensor, key: Tensor, kernel_size: int, groups: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """query (B, C, Ho, Wo), key (B, C, H, W) -> (B, G, K, K, Ho, Wo), laid out as `query` is."""
    args = (query, key, kernel_size, groups, stride, padding, dilation)
    if query.numel() == 0:
        return _product_fake(*args).zero_()
    found = backends.choose(key, query).product(*args)
    if found.stride() == empty_product(query, groups, kernel_size, "meta").stride():
        return found
    return _product_fake(*args).copy_(found)


@_product.register_fake
def _product_fake(
    query: Tensor, key: Tensor, kernel_size: int, groups: int, stride: int, padding: int, dilation: int
) -> Tensor:
    return empty_product(query, groups, kernel_size)


def _product_differentiate(ctx: Any, to_kernel: Tensor | None) -> Gradients:
    if to_kernel is None:
        return (None,) * 7
    query, key = ctx.saved_tensors
    options, maps, wanted = ctx.options[2:], torch_ops.involution, ctx.needs_input_grad
    queries = maps.involution2d(key, to_kernel, *options) if wanted[0] else None
    keys = maps.involution2d_transpose(query, to_kernel, *key.shape[2:], *options) if wanted[1] else None
    return queries, keys, None, None, None, None, None


_product.register_autograd(_product_differentiate, setup_context=_save)
