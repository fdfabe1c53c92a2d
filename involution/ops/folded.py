"""`folded_involution2d`: a layer in inference, with the BatchNorm and the ReLU behind it, as one operator.

    relu(scale * involution(x, kernels) + shift)      kernels = span(relu(reduce(pool(x))))

On the CPU one call does all of it from weights that were packed beforehand; elsewhere it is what it stands for, in
torch operations that compilers fuse. There are no gradients.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, cpu
from .functional import span_involution2d
from .shapes import empty_output, output_hw

PANEL = 32  # columns of a packed panel (csrc/fused.h)


def pack(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution M -> N as the CPU reads it: weight (ceil(N/32), M, 32) and bias (ceil(N/32) * 32,)."""
    extra = -conv.out_channels % PANEL
    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    rows = F.pad(conv.weight.flatten(1), (0, 0, 0, extra))
    return rows.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous(), F.pad(bias, (0, extra))


def unpack(panels: Tensor, bias: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The weight (N, M, 1, 1) and the bias (N,) again, N = ``channels``."""
    return panels.transpose(1, 2).flatten(0, 1)[:channels, :, None, None], bias[:channels]


def composed(
    input: Tensor,
    reduce: Tensor,
    reduce_bias: Tensor,
    span: Tensor,
    span_bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    hidden: int,
    groups: int,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """The operator in torch operations."""
    packed = (reduce, reduce_bias, span, span_bias, scale, shift)
    reduce, reduce_bias, span, span_bias, scale, shift = (t.to(input.dtype) for t in packed)
    pooled = input if stride == 1 else F.avg_pool2d(input, stride, stride, 0, True, False)
    reduced = F.conv2d(pooled, *unpack(reduce, reduce_bias, hidden)).relu()
    span, span_bias = unpack(span, span_bias, groups * kernel_size**2)
    out = span_involution2d(input, reduced, span, span_bias, kernel_size, stride=stride, dilation=dilation)
    return (out * scale[:, None, None] + shift[:, None, None]).relu()


_library = torch.library.Library("involution", "FRAGMENT")
_library.define(
    "folded_involution2d(Tensor input, Tensor reduce, Tensor reduce_bias, Tensor span, Tensor span_bias, Tensor scale, "
    "Tensor shift, int hidden, int groups, int kernel_size, int stride, int dilation) -> Tensor"
)


@torch.library.impl(_library, "folded_involution2d", "CPU")
def _on_cpu(input: Tensor, *operands: Any) -> Tensor:
    if input.numel() and backends.choose(input, input) is cpu:
        return cpu.folded_forward(input, operands[:6], *operands[6:])
    return composed(input, *operands)


@torch.library.register_fake("involution::folded_involution2d")
def _fake(input: Tensor, *operands: Any) -> Tensor:
    *_, kernel_size, stride, dilation = operands
    padding = dilation * (kernel_size - 1) // 2
    return empty_output(input, input.shape[1], *output_hw(input, kernel_size, stride, padding, dilation))


operator = torch.ops.involution.folded_involution2d.default
