"""`folded_involution2d`: a layer in inference, with the BatchNorm and the ReLU behind it, as one operator.

    relu(scale * involution(x, kernels) + shift)      kernels = span(relu(reduce(pool(x))))

On the CPU one call does all of it from weights that were packed beforehand; elsewhere it is what it stands for, in
torch operations that compilers fuse. There are no gradients.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from . import backends, cpu, cpu_folded, packaged
from .functional import span_involution2d
from .shapes import empty_output, output_hw
from .standard import exporting
from .transforms import active

PANEL = 32  # columns of a packed panel (csrc/fused.h)


def pack(reduce: nn.Conv2d, span: nn.Conv2d, scale: Tensor, shift: Tensor) -> Tensor:
    """All operands as the CPU reads them, in one tensor: for each of the 1x1 convolutions its weight in panels
    (ceil(N/32), M, 32) and its bias (ceil(N/32) * 32,), then scale (C,) and shift (C,)."""
    parts = []
    for conv in (reduce, span):
        extra = -conv.out_channels % PANEL
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
        rows = F.pad(conv.weight.flatten(1), (0, 0, 0, extra))
        parts += [rows.unflatten(0, (-1, PANEL)).transpose(1, 2), F.pad(bias, (0, extra))]
    return torch.cat([part.flatten() for part in (*parts, scale, shift)])


def unpack(packed: Tensor, channels: int, hidden: int, taps: int) -> list[Tensor]:
    """Weight (N, M, 1, 1) and bias (N,) of both convolutions, scale (C,) and shift (C,)."""
    convs = [(hidden, channels), (taps, hidden)]
    panels = [-(-n // PANEL) for n, _ in convs]
    sizes = [size for p, (_, m) in zip(panels, convs, strict=True) for size in (p * m * PANEL, p * PANEL)]
    parts = packed.split([*sizes, channels, channels])
    result = []
    for i, (n, m) in enumerate(convs):
        weight = parts[2 * i].view(-1, m, PANEL).transpose(1, 2).flatten(0, 1)
        result += [weight[:n, :, None, None], parts[2 * i + 1][:n]]
    return [*result, *parts[4:]]


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


@torch.library.register_fake("involution::folded_involution2d")
def _fake(
    input: Tensor, packed: Tensor, hidden: int, groups: int, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    padding = dilation * (kernel_size - 1) // 2
    return empty_output(input, input.shape[1], *output_hw(input, kernel_size, stride, padding, dilation))


def folded_involution2d(
    input: Tensor, packed: Tensor, hidden: int, groups: int, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    """The operator, or what it stands for where it has no kernel, no derivative or does not exist."""
    options = hidden, groups, kernel_size, stride, dilation
    if has_torch_function((input, packed)):
        return handle_torch_function(folded_involution2d, (input, packed), input, packed, *options)
    if exporting():
        return (packaged.folded_involution2d if packaged.keeps(input, packed) else composed)(input, packed, *options)
    differentiated = torch.is_grad_enabled() and (input.requires_grad or packed.requires_grad)
    standing_in = differentiated or input.device.type != "cpu" or active()
    return (composed if standing_in else torch.ops.involution.folded_involution2d)(input, packed, *options)
