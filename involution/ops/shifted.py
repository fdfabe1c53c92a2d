"""Involution as a loop over the K*K shifted slices of the input: any device, any floating type, nothing to build.

Every tap is one fused multiply-add over the whole output, so nothing larger than a padded copy of the input exists.
16-bit types are added up in float32.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import empty_kernel, empty_output, layout, output_hw


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
    groups, channels = kernel.shape[1], input.shape[1]
    wide_grad = _wide(grad.contiguous(memory_format=layout(input))).unflatten(1, (groups, channels // groups))
    padded = _padded(input, padding)
    grad_padded = torch.zeros_like(padded) if needs_input else None
    grad_kernel = empty_kernel(kernel) if needs_kernel else None
    if grad_padded is not None:
        for row, column, window in _taps(grad_padded, kernel, stride, dilation):
            window.addcmul_(wide_grad, _wide(kernel[:, :, row, column]).unsqueeze(2))
    if grad_kernel is not None:
        for row, column, window in _taps(padded, kernel, stride, dilation):
            grad_kernel[:, :, row, column] = (wide_grad * window).sum(dim=2)
    return _unpadded(grad_padded, input, padding), grad_kernel


def _unpadded(padded: Tensor | None, input: Tensor, padding: int) -> Tensor | None:
    if padded is None:
        return None
    inner = F.pad(padded, (-padding,) * 4)
    return empty_output(input, *input.shape[1:]).copy_(inner)
