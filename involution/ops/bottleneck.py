"""`folded_bottleneck2d`: a bottleneck in inference, its BatchNorms folded, as one operator.

    relu(widen(layer(relu(narrow(x)))) + skip(x))

`narrow`, `widen` and `skip` are 1x1 convolutions, `skip` one of the layer's stride or the identity; `layer` is
`folded_involution2d`. On the CPU one call does all of it, an image's tensors between the parts staying in the cache;
elsewhere it is what it stands for. There are no gradients.

Shape legend: B batch, M channels in, C in the middle, N out, H W input size, Ho Wo output size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.flop_counter import register_flop_formula

from . import backends, cpu, cpu_folded, folded
from .folded import PANEL, pack_convolution, packed_size, unpack_convolution
from .registration import register_autocast
from .shapes import empty_output, layout, output_hw


def pack(narrow: nn.Conv2d, layer: Tensor, widen: nn.Conv2d, skip: nn.Conv2d | None) -> Tensor:
    """All operands as the CPU reads them, in one tensor; `layer` is what ``folded.pack`` gives.

    Raises:
        ValueError: C or N is no multiple of 32.
    """
    for conv in (narrow, widen):
        if conv.out_channels % PANEL:
            raise ValueError(f"a 1x1 convolution has {conv.out_channels} output channels; they come by {PANEL}")
    parts = [pack_convolution(narrow), layer, pack_convolution(widen)]
    return torch.cat(parts if skip is None else [*parts, pack_convolution(skip)])


def _size(
    channels: int, width: int, out_channels: int, projected: int, hidden: int, groups: int, kernel_size: int, *_: int
) -> int:
    """Elements of what it gives."""
    convolutions = packed_size(width, channels) + packed_size(out_channels, width + projected * (channels + 1))
    return convolutions + folded.size(width, hidden, groups * kernel_size**2)


def composed(
    input: Tensor, packed: Tensor, width: int, out_channels: int, projected: int, hidden: int, *window: int
) -> Tensor:
    """The operator in torch operations."""
    channels, stride = input.shape[1], window[2]
    first, last = packed_size(width, channels), packed_size(out_channels, width)
    skip = packed_size(out_channels, channels) if projected else 0
    narrow, layer, widen, project = packed.split([first, packed.numel() - first - last - skip, last, skip])

    def convolved(x: Tensor, conv: Tensor, outputs: int, stride: int = 1) -> Tensor:
        weight, bias = unpack_convolution(conv.to(x.dtype), outputs, x.shape[1])
        return F.conv2d(x, weight, bias, stride)

    inside = folded.folded_involution2d(convolved(input, narrow, width).relu(), layer, hidden, *window)
    skipped = convolved(input, project, out_channels, stride) if projected else input
    return (convolved(inside, widen, out_channels) + skipped).relu()


_library = torch.library.Library("involution", "FRAGMENT")
_library.define(
    "folded_bottleneck2d(Tensor input, Tensor packed, int width, int out_channels, int projected, int hidden, "
    "int groups, int kernel_size, int stride, int dilation) -> Tensor"
)


@torch.library.impl(_library, "folded_bottleneck2d", "CPU")
def _on_cpu(input: Tensor, packed: Tensor, *options: int) -> Tensor:
    if input.numel() and backends.choose(input, packed) is cpu:
        return cpu_folded.bottleneck(input, packed, *options)
    return composed(input, packed, *options).contiguous(memory_format=layout(input))


register_autocast(_library, "folded_bottleneck2d", "cpu")


@torch.library.register_fake("involution::folded_bottleneck2d")
def _fake(
    input: Tensor, packed: Tensor, width: int, out_channels: int, projected: int, hidden: int,
    groups: int, kernel_size: int, stride: int, dilation: int,
) -> Tensor:  # fmt: skip
    padding = dilation * (kernel_size - 1) // 2
    return empty_output(input, out_channels, *output_hw(input, kernel_size, stride, padding, dilation))


@register_flop_formula(torch.ops.involution.folded_bottleneck2d)
def _flops(
    input: Any, packed: Any, width: int, out_channels: int, projected: int, hidden: int, groups: int, kernel_size: int,
    stride: int, dilation: int, **_: Any,
) -> int:  # fmt: skip
    batch, channels, *sides = input
    height, columns = (-(-side // stride) for side in sides)
    convolutions = sides[0] * sides[1] * channels * width + height * columns * out_channels * (
        width + projected * channels
    )
    layer = folded.flops((batch, width, *sides), packed, hidden, groups, kernel_size, stride, dilation)
    return int(2 * batch * convolutions + layer)


def folded_bottleneck2d(input: Tensor, packed: Tensor, *options: int) -> Tensor:
    """(B, M, H, W) -> (B, N, Ho, Wo): the operator, or what it stands for where it has no kernel, no derivative or does
    not exist.

    Args:
        packed: from ``pack``.
        options: width (C), out_channels (N), projected (1 with a convolution in `skip`, else 0), hidden, groups,
            kernel_size, stride, dilation.
    """
    if has_torch_function((input, packed)):
        return handle_torch_function(folded_bottleneck2d, (input, packed), input, packed, *options)
    folded.check(input, packed, lambda channels: _size(channels, *options))
    projected = options[2]
    if not projected and torch.is_autocast_enabled("cpu") and input.dtype != torch.get_autocast_dtype("cpu"):
        return composed(input, packed, *options)  # the sum has the type of the skip, which autocast leaves alone
    return folded.call(torch.ops.involution.folded_bottleneck2d, composed, input, packed, *options)
