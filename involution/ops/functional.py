"""`involution2d`, `neighbourhood_product` and `span_involution2d`: the checks in front of the registered operators.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels of the
kernel generator.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import banded, composed, packaged, registration, standard  # noqa: F401  (registration defines torch.ops.involution)
from .shapes import output_hw
from .transforms import active, apply


def involution2d(
    input: Tensor, kernel: Tensor, *, stride: int = 1, padding: int | None = None, dilation: int = 1
) -> Tensor:
    """Involution (Eqn. 4): every output pixel has its own K x K kernel, which the C/G channels of a group share.

    Args:
        input: (B, C, H, W), floating point, any memory format.
        kernel: (B, G, K, K, Ho, Wo) of the same type (under autocast any), C divisible by G, K odd.
        stride: step between windows; Ho = ceil(H / stride) with the default padding.
        padding: zeros on each side; None means dilation * (K - 1) // 2.
        dilation: distance between the taps of a window.

    Returns:
        (B, C, Ho, Wo) in the type and memory format of `input`, added up in float32 at least.

    Raises:
        ValueError: a shape, type, device or option does not fit.
    """
    if has_torch_function((input, kernel)):  # subclasses, modes, and torch.fx, which writes the call down
        window: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        return handle_torch_function(involution2d, (input, kernel), input, kernel, **window)
    if standard.exporting():  # no checks: sizes are symbols there
        form = packaged if packaged.keeps(input, kernel) else standard
        return form.involution2d(input, kernel, stride, _same(padding, kernel.shape[2], dilation), dilation)
    if kernel.dim() != 6 or kernel.shape[2] != kernel.shape[3]:
        raise ValueError(f"kernel has shape {tuple(kernel.shape)}; it should be (B, G, K, K, Ho, Wo)")
    padding = _check_options(input, kernel.shape[2], stride, padding, dilation)
    _check_kernel(input, kernel, stride, padding, dilation)
    _check_same("kernel", kernel, input)
    return apply("involution2d", input, kernel, stride, padding, dilation)


def neighbourhood_product(
    query: Tensor, key: Tensor, kernel_size: int, *, stride: int = 1, dilation: int = 1, groups: int = 1
) -> Tensor:
    """The scores of local attention: every query times the keys of its K x K window, summed over a group's channels.

    scores[b, g, u, v, i, j] = sum over the channels c of group g of query[b, c, i, j] * key[b, c, i', j'], where
    (i', j') is tap (u, v) of the window that `involution2d` takes at (i, j). It is the gradient of `involution2d` with
    respect to its kernel, for the input `key` and the output gradient `query`; nothing is unfolded.

    Args:
        query: (B, C, Ho, Wo), floating point, any memory format; Ho = ceil(H / stride).
        key: (B, C, H, W) of the same type (under autocast any).
        kernel_size: K, odd.
        stride, dilation: of the windows, as in `involution2d` with its default padding.
        groups: G, the heads; it divides C.

    Returns:
        (B, G, K, K, Ho, Wo), 0 at taps outside the image, added up in float32 at least.

    Raises:
        ValueError: a shape, type, device or option does not fit.
    """
    if has_torch_function((query, key)):
        options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
        return handle_torch_function(neighbourhood_product, (query, key), query, key, kernel_size, **options)
    if standard.exporting():
        form = packaged if packaged.keeps(query, key) else standard
        return form.neighbourhood_product(query, key, kernel_size, groups, stride, dilation)
    padding = _check_options(key, kernel_size, stride, None, dilation, name="key")
    if groups < 1 or key.shape[1] % groups != 0:
        raise ValueError(f"groups is {groups}; it should divide the C = {key.shape[1]} channels of key")
    expected = (*key.shape[:2], *output_hw(key, kernel_size, stride, padding, dilation))
    if tuple(query.shape) != expected:
        raise ValueError(
            f"query has shape {tuple(query.shape)}; for key {tuple(key.shape)}, stride {stride} it should be {expected}"
        )
    _check_same("query", query, key, "key")
    return apply("neighbourhood_product", query, key, kernel_size, groups, stride, padding, dilation)


def span_involution2d(
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
) -> Tensor:
    """Involution with the kernels weight @ reduced + bias, which are made tile by tile and not kept (Eqn. 6).

    Args:
        input: (B, C, H, W), floating point, any memory format.
        reduced: (B, R, Ho, Wo), the hidden tensor of the kernel generator.
        weight: (G*K*K, R, 1, 1), the 1x1 "span" convolution; rows ordered group, kernel row, kernel column.
        bias: (G*K*K,) or None.
        kernel_size: K, odd.
        stride, padding, dilation: as in `involution2d`.

    Returns:
        (B, C, Ho, Wo), equal to `involution2d(input, conv1x1(reduced).view(B, G, K, K, Ho, Wo))` but for rounding.

    Raises:
        ValueError: a shape, type, device or option does not fit.
    """
    tensors = input, reduced, weight, bias
    window: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    if has_torch_function(tensors):
        return handle_torch_function(span_involution2d, tensors, *tensors, kernel_size, **window)
    if standard.exporting() and padding is None and banded.takes(input, kernel_size, stride, dilation):
        return banded.span_involution2d(input, reduced, weight, bias, kernel_size, stride, dilation)
    if standard.exporting() or active():
        return involution2d(input, composed.span_kernel(reduced, weight, bias, kernel_size), **window)
    padding = _check_options(input, kernel_size, stride, padding, dilation)
    _check_span(input, reduced, weight, bias, kernel_size)
    height, width = output_hw(input, kernel_size, stride, padding, dilation)
    if reduced.shape[0] != input.shape[0] or tuple(reduced.shape[2:]) != (height, width):
        raise ValueError(
            f"reduced has shape {tuple(reduced.shape)}; for input {tuple(input.shape)} it should be "
            f"({input.shape[0]}, R, {height}, {width})"
        )
    return torch.ops.involution.span_involution2d(input, reduced, weight, bias, kernel_size, stride, padding, dilation)


def _same(padding: int | None, kernel_size: int, dilation: int) -> int:
    """The padding; by default that of windows centred on their pixels."""
    return dilation * (kernel_size - 1) // 2 if padding is None else padding


def _check_options(
    input: Tensor, kernel_size: int, stride: int, padding: int | None, dilation: int, name: str = "input"
) -> int:
    """Checks what the operators share; returns the padding as a number."""
    if input.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(input.shape)}; it should be (B, C, H, W)")
    if not input.is_floating_point():
        raise ValueError(f"{name} is {input.dtype}; it should be a floating-point tensor")
    if kernel_size % 2 == 0 or kernel_size < 1:
        raise ValueError(f"the kernel size is {kernel_size}; it should be odd and positive, so that it has a centre")
    for name, value in (("stride", stride), ("dilation", dilation)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it should be at least 1")
    padding = _same(padding, kernel_size, dilation)
    if padding < 0:
        raise ValueError(f"padding is {padding}; it should be 0 or more")
    if min(output_hw(input, kernel_size, stride, padding, dilation)) < 1:
        raise ValueError(
            f"input {tuple(input.shape)} is smaller than one window of kernel size {kernel_size}, dilation {dilation}; "
            f"it needs more padding than {padding}"
        )
    return padding


def _check_kernel(input: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> None:
    groups, size = kernel.shape[1], kernel.shape[2]
    if groups < 1 or input.shape[1] % groups != 0:
        raise ValueError(f"kernel has G = {groups} groups; G should divide the C = {input.shape[1]} channels of input")
    expected = (input.shape[0], groups, size, size, *output_hw(input, size, stride, padding, dilation))
    if tuple(kernel.shape) != expected:
        raise ValueError(
            f"kernel has shape {tuple(kernel.shape)}; for input {tuple(input.shape)}, stride {stride}, padding "
            f"{padding}, dilation {dilation} it should be {expected}"
        )


def _check_span(input: Tensor, reduced: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int) -> None:
    taps = kernel_size * kernel_size
    if reduced.dim() != 4:
        raise ValueError(f"reduced has shape {tuple(reduced.shape)}; it should be (B, R, Ho, Wo)")
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (reduced.shape[1], 1, 1) or weight.shape[0] % taps != 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it should be (G*{taps}, {reduced.shape[1]}, 1, 1) for kernel "
            f"size {kernel_size} and reduced {tuple(reduced.shape)}"
        )
    groups = weight.shape[0] // taps
    if groups < 1 or input.shape[1] % groups != 0:
        raise ValueError(
            f"weight makes G = {groups} groups of kernels; G should divide the C = {input.shape[1]} channels of input"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it should be ({weight.shape[0]},), one a row of weight")
    for name, tensor in (("reduced", reduced), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check_same(name, tensor, input)


def _check_same(name: str, tensor: Tensor, input: Tensor, other: str = "input") -> None:
    if tensor.device != input.device:
        raise ValueError(f"{name} is on {tensor.device}; it should be on {input.device}, where {other} is")
    wide = torch.float64 in (tensor.dtype, input.dtype)  # which autocast leaves as it is
    if tensor.dtype != input.dtype and (wide or not torch.is_autocast_enabled(input.device.type)):
        raise ValueError(f"{name} is {tensor.dtype}; it should be {input.dtype}, as {other} is (or use autocast)")
