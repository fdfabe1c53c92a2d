"""The fused operator as matrix products, for runtimes whose slices are slow (onnxruntime).

A tile is T neighbouring outputs of a row. Row t of its band matrix (T, K*L) holds the K*K taps of output t, zeros
between them, at the places of its window in the tile's L columns of K input rows; product with those (K*L, C/G) is the
tile's output. Row t starts s*t places to the right. Nothing is moved for that: the span weights, padded, write rows
that are s longer than K*L, and the same memory seen as rows of K*L has every row shifted by s more than the one before.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels, n
tiles in a row, s stride.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 7  # divides the rows of every stage at 224 pixels
_wanted = False


@contextmanager
def wanted() -> Iterator[None]:
    """Programs written down meanwhile have this form."""
    global _wanted
    _wanted = True
    try:
        yield
    finally:
        _wanted = False


def takes(input: Tensor, kernel_size: int, stride: int, dilation: int) -> bool:
    """Whether a program that is being written down has this form: a tile's columns lie in two blocks of T*s."""
    fits = dilation * (kernel_size - 1) + 1 <= stride * (_tile(kernel_size) + 1)
    return _wanted and input.dtype == torch.float32 and kernel_size > 1 and fits


def _tile(kernel_size: int) -> int:
    return max(TILE, kernel_size)


def span_involution2d(
    input: Tensor, reduced: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    """``involution.ops.span_involution2d`` with its default padding."""
    batch, (height, width) = input.shape[0], reduced.shape[2:]
    groups, tile = weight.shape[0] // kernel_size**2, _tile(kernel_size)
    number = (width + tile - 1) // tile  # of tiles in a row
    columns = stride * (tile - 1) + dilation * (kernel_size - 1) + 1
    depth = kernel_size * columns

    ones = F.pad(reduced, (0, 0, 0, 0, 0, 1), value=1.0)  # for the bias
    hidden = F.pad(ones, (0, number * tile - width)).flatten(2).transpose(1, 2).unsqueeze(1)
    kernels = hidden @ _padded_span(weight, bias, groups, kernel_size, columns, stride, dilation)
    flat = kernels.reshape(batch, groups, height * number, tile * (depth + stride))
    band = flat[..., : tile * depth].reshape(batch, groups, height * number, tile, depth)

    rows = _tile_rows(input, groups, number, tile * stride, columns, dilation * (kernel_size - 1) // 2)
    tiles, taps = (torch.arange(n, device=input.device) for n in (height * number, kernel_size))
    first = tiles + tiles // number * ((number + 1) * stride - number)
    index = first[:, None] + taps * (number + 1) * dilation
    windows = rows.index_select(2, index.flatten()).reshape(batch, groups, height * number, depth, -1)
    out = (band @ windows).reshape(batch, groups, height * number * tile, -1).transpose(2, 3)
    return out.reshape(batch, input.shape[1], height, number * tile)[..., :width]


def _padded_span(
    weight: Tensor, bias: Tensor | None, groups: int, kernel_size: int, columns: int, stride: int, dilation: int
) -> Tensor:
    """(G, R + 1, K*L + s): what the hidden channels and a one become, zeros beside a kernel row's K taps."""
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    taps = torch.cat([weight.flatten(1), bias[:, None]], 1).unflatten(0, (groups, kernel_size, kernel_size, 1))
    spread = F.pad(taps, (0, 0, 0, dilation - 1)).flatten(2, 3)
    spread = F.pad(spread, (0, 0, 0, columns - kernel_size * dilation)).flatten(1, 2)
    return F.pad(spread, (0, 0, 0, stride)).transpose(1, 2)


def _tile_rows(input: Tensor, groups: int, number: int, block: int, columns: int, padding: int) -> Tensor:
    """(B, G, (H + 2 * padding) * (n + 1) - 1, L * C/G): of every row the columns that each tile sees, its block and
    what follows; behind a row's n tiles comes one that nobody reads. No dimension is n, which may be 1: exporters would
    take it for 1, or for more, for good."""
    batch, _, height, width = input.shape
    pixels = input.reshape(batch, groups, -1, height * width).transpose(2, 3).unflatten(2, (height, width))
    right = (number + 1) * block - padding - width
    padded = F.pad(pixels, (0, 0, padding, right, padding, padding))
    blocks = padded.reshape(batch, groups, (height + 2 * padding) * (number + 1), block, -1)
    here, after = blocks[:, :, :-1, :columns], blocks[:, :, 1:, : max(0, columns - block)]
    return torch.cat([here, after], 3).flatten(3)
