"""`folded_involution2d`: a layer in inference, with the BatchNorm and the ReLU behind it, as one operator.

    relu(scale * involution(x, kernels) + shift)      kernels = span(relu(reduce(pool(x))))

On the CPU one call does all of it from weights that were packed beforehand; elsewhere it is what it stands for, in
torch operations that compilers fuse. There are no gradients.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.flop_counter import register_flop_formula

from . import backends, cpu, cpu_folded, packaged
from .functional import span_involution2d
from .registration import register_autocast
from .shapes import empty_output, output_hw
from .standard import exporting
from .transforms import active

PANEL = 32  # columns of a packed panel (csrc/fused.h)


def pack_convolution(conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution from M to N channels: its weight in panels (ceil(N/32), M, 32), then its bias
    (ceil(N/32) * 32,)."""
    extra = -conv.out_channels % PANEL
    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    rows = F.pad(conv.weight.flatten(1), (0, 0, 0, extra))
    return torch.cat([rows.unflatten(0, (-1, PANEL)).transpose(1, 2).flatten(), F.pad(bias, (0, extra))])


def packed_size(outputs: int, inputs: int) -> int:
    """Elements of such a convolution."""
    return -(-outputs // PANEL) * PANEL * (inputs + 1)


def unpack_convolution(packed: Tensor, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Its weight (N, M, 1, 1) and bias (N,)."""
    panels, bias = packed.split([packed.numel() // (inputs + 1) * inputs, packed.numel() // (inputs + 1)])
    weight = panels.view(-1, inputs, PANEL).transpose(1, 2).flatten(0, 1)
    return weight[:outputs, :, None, None], bias[:outputs]


def pack(reduce: nn.Conv2d, span: nn.Conv2d, scale: Tensor, shift: Tensor) -> Tensor:
    """All operands as the CPU reads them, in one tensor: both convolutions, then scale (C,) and shift (C,)."""
    return torch.cat([pack_convolution(reduce), pack_convolution(span), scale, shift])


def size(channels: int, hidden: int, taps: int) -> int:
    """Elements of what ``pack`` gives."""
    return packed_size(hidden, channels) + packed_size(taps, hidden) + 2 * channels


def check(input: Tensor, packed: Tensor, size: Callable[[int], int]) -> None:
    """
    Args:
        size: elements of ``packed`` for a number of channels of ``input``.

    Raises:
        ValueError: they do not fit.
    """
    if input.dim() != 4 or packed.numel() != size(input.shape[1]):
        raise ValueError(f"the input is {tuple(input.shape)}; it should be (B, C, H, W), with the C of the weights")


def unpack(packed: Tensor, channels: int, hidden: int, taps: int) -> list[Tensor]:
    """Weight (N, M, 1, 1) and bias (N,) of both convolutions, scale (C,) and shift (C,)."""
    sizes = packed_size(hidden, channels), packed_size(taps, hidden), channels, channels
    reduce, span, scale, shift = packed.split(sizes)
    return [*unpack_convolution(reduce, hidden, channels), *unpack_convolution(span, taps, hidden), scale, shift]


def composed(
    input: Tensor, packed: Tensor, hidden: int, groups: int, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    """The operator in torch operations."""
    operands = unpack(packed.to(input.dtype), input.shape[1], hidden, groups * kernel_size**2)
    reduce, reduce_bias, span, span_bias, scale, shift = operands
    pooled = input if stride == 1 else F.avg_pool2d(input, stride, stride, 0, True, False)
    reduced = F.conv2d(pooled, reduce, reduce_bias).relu()
    out = span_involution2d(input, reduced, span, span_bias, kernel_size, stride=stride, dilation=dilation)
    return (out * scale[:, None, None] + shift[:, None, None]).relu()


_library = torch.library.Library("involution", "FRAGMENT")
_library.define(
    "folded_involution2d(Tensor input, Tensor packed, int hidden, int groups, int kernel_size, int stride, "
    "int dilation) -> Tensor"
)


@torch.library.impl(_library, "folded_involution2d", "CPU")
def _on_cpu(
    input: Tensor, packed: Tensor, hidden: int, groups: int, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    options = hidden, groups, kernel_size, stride, dilation
    if input.numel() and backends.choose(input, packed) is cpu:
        return cpu_folded.forward(input, packed, *options)
    return composed(input, packed, *options)


register_autocast(_library, "folded_involution2d", "cpu")


@torch.library.register_fake("involution::folded_involution2d")
def _fake(
    input: Tensor, packed: Tensor, hidden: int, groups: int, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    padding = dilation * (kernel_size - 1) // 2
    return empty_output(input, input.shape[1], *output_hw(input, kernel_size, stride, padding, dilation))


@register_flop_formula(torch.ops.involution.folded_involution2d)
def flops(
    input: Any, packed: Any, hidden: int, groups: int, kernel_size: int, stride: int, dilation: int, **_: Any
) -> int:
    """Two a multiply-add: hidden tensor, kernels, window."""
    batch, channels, height, width = input
    pixels = batch * -(-height // stride) * -(-width // stride)
    return int(2 * pixels * (channels * hidden + (hidden * groups + channels) * kernel_size**2))


def folded_involution2d(
    input: Tensor, packed: Tensor, hidden: int, groups: int, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    """The operator, or what it stands for where it has no kernel, no derivative or does not exist."""
    options = hidden, groups, kernel_size, stride, dilation
    if has_torch_function((input, packed)):
        return handle_torch_function(folded_involution2d, (input, packed), input, packed, *options)
    check(input, packed, lambda channels: size(channels, hidden, groups * kernel_size**2))
    return call(torch.ops.involution.folded_involution2d, composed, input, packed, *options)


def call(
    operator: Callable[..., Tensor], composed: Callable[..., Tensor], input: Tensor, packed: Tensor, *options: int
) -> Tensor:
    """``operator``, or ``composed``, what it stands for, where it has no kernel, no derivative or does not exist."""
    if exporting():
        kept = packaged.keeps(input, packed)
        return operator(packaged.image(input), packed, *options) if kept else composed(input, packed, *options)
    differentiated = torch.is_grad_enabled() and (input.requires_grad or packed.requires_grad)
    if differentiated or input.device.type != "cpu" or active():
        return composed(input, packed, *options)
    return operator(input, packed, *options)
