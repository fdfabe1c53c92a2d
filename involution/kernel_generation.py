"""Kernel generation: the functions phi that make an involution kernel out of the pixel it is for (Eqn. 5 and 6).

Shapes:  x (B, C, H, W)  ->  kernels (B, G*K*K, Ho, Wo) with Ho = ceil(H / stride), Wo = ceil(W / stride)
Channel g*K*K + u*K + v of the output is row u, column v of group g's kernel, as in the released checkpoints.

"bottleneck" and "linear" end in a 1x1 convolution, ``span``. What comes before it is ``hidden``, so that a layer can
hand the two to the fused operator, which makes the kernels on the fly instead of storing G*K*K values a pixel.
"attention" and "position" (``involution.attention``) end in a softmax over the taps.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from involution.attention import ActivatedGeneration, AttentionGeneration, PositionGeneration
from involution.unwatched import as_it_seems, calls_are_free, is_batch_norm, unchanged


def stride_pool(stride: int) -> nn.Module:
    """The pooling that brings a generator's input to the output's resolution: AvgPool_s, rounding up.

    The released code rounds down and then reads out of bounds when the size is odd. Rounding up gives ceil(H / stride),
    the size of the strided windows; a cell that sticks out at the border averages its real pixels only (they are not
    diluted by padding), and on sizes that the stride divides nothing changes.
    """
    if stride == 1:
        return nn.Identity()
    return StridePool(stride, stride, ceil_mode=True, count_include_pad=False)


class StridePool(nn.AvgPool2d):
    """AvgPool_s of images in channels_last on a GPU as a mean, where torch's own pooling takes several times as long,
    most of all backward."""

    def forward(self, input: Tensor) -> Tensor:
        ours = (
            type(input) is Tensor and not torch.compiler.is_compiling()
        )  # nothing of compilers, exporters and tracers
        if not (ours and input.is_cuda and input.is_contiguous(memory_format=torch.channels_last)):
            return super().forward(input)
        side: int = self.kernel_size  # type: ignore[assignment]
        batch, channels, height, width = input.shape
        if height % side or width % side:
            return super().forward(input)
        cells = input.permute(0, 2, 3, 1).view(batch, height // side, side, width // side, side, channels)
        return cells.mean((2, 4)).permute(0, 3, 1, 2)


ATTENTION = {"attention": AttentionGeneration, "position": PositionGeneration}


class SpanGeneration(nn.Module):
    """A generator that ends in a 1x1 convolution: kernels = span(hidden(x))."""

    span: nn.Conv2d

    def hidden(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, R, Ho, Wo): everything before the last convolution."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.span(self.hidden(x))

    def may_fuse(self) -> bool:
        """Whether the operator may make the kernels from ``span``'s weights: calling generator or ``span`` would do the
        same, and nobody waits for the calls."""
        return (
            calls_are_free()
            and type(self).forward is SpanGeneration.forward
            and unchanged(self)
            and is_pointwise(self.span)
        )


class BottleneckGeneration(SpanGeneration):
    """Eqn. 6: kernels = W1 sigma(W0 x), W0: C -> C/r without bias, sigma = ReLU(BatchNorm), W1: C/r -> G*K*K with bias.

    Nothing follows W1: a softmax or a sigmoid there costs more than 1 % top-1 (Section 5.2).
    """

    def __init__(self, channels: int, span_channels: int, stride: int, reduction_ratio: int) -> None:
        super().__init__()
        reduced = channels // reduction_ratio
        self.pool = stride_pool(stride)
        self.reduce = nn.Conv2d(channels, reduced, 1, bias=False)
        self.norm = nn.BatchNorm2d(reduced)
        self.act = nn.ReLU(inplace=True)
        self.span = nn.Conv2d(reduced, span_channels, 1)

    def hidden(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.reduce(self.pool(x))))

    def as_built(self, stride: int) -> bool:
        """Whether calling it does what Eqn. 6 says and nothing else, down to each of its modules."""
        return (
            as_it_seems(self, BottleneckGeneration)
            and _pools(self.pool, stride)
            and is_pointwise(self.reduce)
            and is_batch_norm(self.norm)
            and as_it_seems(self.act, nn.ReLU)
            and is_pointwise(self.span)
        )


class LinearGeneration(SpanGeneration):
    """Table 6c's single linear map W: C -> G*K*K (with bias)."""

    def __init__(self, channels: int, span_channels: int, stride: int) -> None:
        super().__init__()
        self.pool = stride_pool(stride)
        self.span = nn.Conv2d(channels, span_channels, 1)

    def hidden(self, x: Tensor) -> Tensor:
        return self.pool(x)


def is_pointwise(conv: nn.Module, stride: int = 1) -> TypeGuard[nn.Conv2d]:
    """Whether it is a 1x1 convolution, as it seems, whose tensors have the sizes that it says (somebody may have cut
    channels out of them)."""
    if not (isinstance(conv, nn.Conv2d) and as_it_seems(conv, nn.Conv2d)):
        return False
    options = conv.kernel_size, conv.stride, conv.padding, conv.groups
    shape = conv.out_channels, conv.in_channels, 1, 1
    return options == ((1, 1), (stride, stride), (0, 0), 1) and conv.weight.shape == shape


def _pools(pool: nn.Module, stride: int) -> bool:
    if stride == 1:
        return as_it_seems(pool, nn.Identity)
    if not as_it_seems(pool, StridePool):
        return False
    names = "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    return [getattr(pool, name) for name in names] == [stride, stride, 0, True, False, None]


def build_kernel_generation(
    name: str,
    channels: int,
    groups: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    reduction_ratio: int,
    activation: str | None,
) -> nn.Module:
    """The generator called ``name``; ``reduction_ratio`` does not matter to "linear"."""
    if activation not in (None, "softmax", "sigmoid"):
        raise ValueError(f'kernel_activation is {activation!r}; it should be None, "softmax" or "sigmoid"')
    if name in ATTENTION:
        options = stride, dilation, reduction_ratio, stride_pool(stride), activation
        return ATTENTION[name](channels, groups, kernel_size, *options)
    span_channels = groups * kernel_size**2
    if name == "bottleneck":
        generation: SpanGeneration = BottleneckGeneration(channels, span_channels, stride, reduction_ratio)
    elif name == "linear":
        generation = LinearGeneration(channels, span_channels, stride)
    else:
        valid = '"bottleneck", "linear", "attention" or "position"'
        raise ValueError(f"kernel_generation is {name!r}; it should be {valid}")
    return generation if activation is None else ActivatedGeneration(generation, kernel_size, activation)


__all__ = ["BottleneckGeneration", "LinearGeneration", "SpanGeneration", "build_kernel_generation", "stride_pool"]
