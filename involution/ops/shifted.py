"""Involution as a loop over the K*K shifted slices of the input: any device, any floating type, nothing to build.

Every tap is one fused multiply-add over the whole output, so nothing larger than a padded copy of the input exists.
16-bit types are added up in float32.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import empty_kernel, empty_output, empty_product, layout, output_hw


def unsupported(input: Tensor, kernel: Tensor) -> str | None:
    """Slices work everywhere."""
    return None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _padded(input: Tensor, padding: int) -> Tensor:
    """A zero-padded copy in the accumulation type and in the layout of `input`."""
    height, width = input.shape[2] + 2 * padding, input.shape[3] + 2 * padding
    out = _wide(empty_output(input, input.shape[1], height, width)).zero_()
    out[:, :, padding : height - padding, padding : width - padding] = input
    return out


def _taps(padded: Tensor, kernel: Tensor, stride: int, dilation: int) -> Iterator[tuple[int, int, Tensor]]:
    """(row, column, slice of `padded` that this tap sees as (B, G, C/G, Ho, Wo))."""
    _, groups, size, _, height, width = kernel.shape
    for row in range(size):
        for column in range(size):
            top, left = row * dilation, column * dilation
            bottom, right = top + stride * (height - 1) + 1, left + stride * (width - 1) + 1
            window = padded[:, :, top:bottom:stride, left:right:stride]
            yield row, column, window.unflatten(1, (groups, padded.shape[1] // groups))


def forward(input: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """input (B, C, H, W), kernel (B, G, K, K, Ho, Wo) -> (B, C, Ho, Wo) in the layout of `input`."""
    groups = kernel.shape[1]
    height, width = output_hw(input, kernel.shape[2], stride, padding, dilation)
    out = empty_output(input, input.shape[1], height, width)
    total = _wide(out).zero_()
    view = total.unflatten(1, (groups, input.shape[1] // groups))
    for row, column, window in _taps(_padded(input, padding), kernel, stride, dilation):
        view.addcmul_(window, _wide(kernel[:, :, row, column]).unsqueeze(2))
    return out.copy_(total)


def backward(
    grad: Tensor,
    input: Tensor,
    kernel: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    needs_input: bool,
    needs_kernel: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in the layouts of input (B, C, H, W) and kernel (B, G, K, K, Ho, Wo)."""
    grad = grad.contiguous(memory_format=layout(input))
    options = (stride, padding, dilation)
    grad_input = transpose(grad, kernel, input.shape[2], input.shape[3], *options) if needs_input else None
    grad_kernel = _product(grad, input, empty_kernel(kernel), *options) if needs_kernel else None
    return grad_input, grad_kernel


def transpose(
    grad: Tensor, kernel: Tensor, height: int, width: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """The gradient of the input, grad (B, C, Ho, Wo) -> (B, C, height, width), in the layout of `grad`."""
    channels, groups = grad.shape[1], kernel.shape[1]
    wide_grad = _wide(grad).unflatten(1, (groups, channels // groups))
    padded = _wide(empty_output(grad, channels, height + 2 * padding, width + 2 * padding)).zero_()
    for row, column, window in _taps(padded, kernel, stride, dilation):
        window.addcmul_(wide_grad, _wide(kernel[:, :, row, column]).unsqueeze(2))
    return empty_output(grad, channels, height, width).copy_(F.pad(padded, (-padding,) * 4))


def product(
    query: Tensor, key: Tensor, kernel_size: int, groups: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """The gradient of the kernel: query (B, C, Ho, Wo), key (B, C, H, W) -> (B, G, K, K, Ho, Wo)."""
    out = empty_product(query, groups, kernel_size)
    return _product(query.contiguous(memory_format=layout(key)), key, out, stride, padding, dilation)


def _product(query: Tensor, key: Tensor, out: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    groups = out.shape[1]
    wide_query = _wide(query).unflatten(1, (groups, query.shape[1] // groups))
    for row, column, window in _taps(_padded(key, padding), out, stride, dilation):
        out[:, :, row, column] = (wide_query * window).sum(dim=2)
    return out
