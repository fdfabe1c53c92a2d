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


def nothing(like: Tensor) -> Tensor:
    """Stands for a gradient nobody asked for (an operator's schema has no optional results)."""
    return like.new_empty(0)


def placed(result: Tensor | None, like: Tensor) -> Tensor:
    """`result` in the memory format of `like`, as the fake kernels promise; a copy only if a backend chose another."""
    return nothing(like) if result is None else result.contiguous(memory_format=layout(like))


def taps_dense(kernel: Tensor) -> bool:
    """True where the G*K*K values of one pixel lie together: (B, G, K, K, Ho, Wo) seen in a channels_last tensor."""
    size = kernel.shape[2]
    return not kernel.is_contiguous() and kernel.stride()[1:4] == (size * size, size, 1)


def empty_kernel(kernel: Tensor, device: torch.device | str | None = None) -> Tensor:
    """An uninitialised tensor of the shape of `kernel` (B, G, K, K, Ho, Wo) and of its layout."""
    batch, groups, size, _, height, width = kernel.shape
    return _empty_kernel(kernel, (batch, groups, size, height, width), taps_dense(kernel), device)


def empty_product(query: Tensor, groups: int, kernel_size: int, device: torch.device | str | None = None) -> Tensor:
    """An uninitialised (B, G, K, K, Ho, Wo) for a query of (B, C, Ho, Wo): its taps lie together if the channels do."""
    batch, _, height, width = query.shape
    return _empty_kernel(query, (batch, groups, kernel_size, height, width), channels_dense(query), device)


def _empty_kernel(
    like: Tensor, sizes: tuple[int, int, int, int, int], dense: bool, device: torch.device | str | None
) -> Tensor:
    batch, groups, size, height, width = sizes
    device = like.device if device is None else device
    if not dense:
        return torch.empty((batch, groups, size, size, height, width), dtype=like.dtype, device=device)
    pixels = torch.empty((batch, height, width, groups, size, size), dtype=like.dtype, device=device)
    return pixels.permute(0, 3, 4, 5, 1, 2)
