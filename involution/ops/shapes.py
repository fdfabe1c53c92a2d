"""Sizes and memory layouts that every backend and the fake kernels must agree on.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size.
"""

import torch
from torch import Tensor


def output_size(size: int, kernel_size: int, stride: int, padding: int, dilation: int) -> int:
    """Number of K-wide windows, taken every `stride`, that fit into `size` plus padding on both sides."""
    return (size + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1


def output_hw(input: Tensor, kernel_size: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """(Ho, Wo) for an input of (B, C, H, W)."""
    height = output_size(input.shape[2], kernel_size, stride, padding, dilation)
    return height, output_size(input.shape[3], kernel_size, stride, padding, dilation)


def channels_dense(input: Tensor) -> bool:
    """True where the channels of one pixel lie together (channels_last, or a channel slice of it)."""
    return not input.is_contiguous() and input.stride(1) == 1


def layout(input: Tensor) -> torch.memory_format:
    """The memory format that outputs and gradients of this input take."""
    return torch.channels_last if channels_dense(input) else torch.contiguous_format


def empty_output(input: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised (B, channels, height, width) in the layout of `input`."""
    shape = (input.shape[0], channels, height, width)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout(input))


def taps_dense(kernel: Tensor) -> bool:
    """True where the G*K*K values of one pixel lie together: (B, G, K, K, Ho, Wo) seen in a channels_last tensor."""
    size = kernel.shape[2]
    return not kernel.is_contiguous() and kernel.stride()[1:4] == (size * size, size, 1)


def empty_kernel(kernel: Tensor, device: torch.device | str | None = None) -> Tensor:
    """An uninitialised tensor of the shape of `kernel` (B, G, K, K, Ho, Wo) and of its layout."""
    batch, groups, size, _, height, width = kernel.shape
    device = kernel.device if device is None else device
    if not taps_dense(kernel):
        return torch.empty(kernel.shape, dtype=kernel.dtype, device=device)
    dense = torch.empty((batch, height, width, groups, size, size), dtype=kernel.dtype, device=device)
    return dense.permute(0, 3, 4, 5, 1, 2)
