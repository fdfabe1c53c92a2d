"""Involution2d: kernel generation and operator as one layer, a drop-in for a K x K convolution C -> C."""

from functools import partial

import torch
from torch import Tensor, nn

from involution.checks import check_odd, check_positive
from involution.kernel_generation import BottleneckGeneration, SpanGeneration, build_kernel_generation
from involution.ops import involution2d, span_involution2d
from involution.ops.layer import involution_layer


class Involution2d(nn.Module):
    """Involution (Eqn. 4 to 6): (B, C, H, W) -> (B, C, Ho, Wo) with Ho = ceil(H / stride), Wo = ceil(W / stride).

    Args:
        channels: C, of the input and of the output.
        kernel_size: K, odd.
        stride: of the windows; the kernels come from the average-pooled input (see ``kernel_generation.stride_pool``).
        dilation: distance between the taps of a kernel.
        group_channels: channels that share one kernel (C/G in the paper); it divides ``channels``. None: all of them.
        reduction_ratio: r of the bottleneck, at most ``channels``.
        kernel_generation: "bottleneck" (Eqn. 6) or "linear" (Table 6c).

    ``.kernel_generation`` maps the input to kernels (B, G*K*K, Ho, Wo) and may be replaced by any module that does;
    a ``SpanGeneration`` runs as the fused operator.

    Raises:
        ValueError: an argument outside the ranges above.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        group_channels: int | None = 16,
        reduction_ratio: int = 4,
        kernel_generation: str = "bottleneck",
    ) -> None:
        super().__init__()
        group_channels = channels if group_channels is None else group_channels
        check_positive(
            channels=channels,
            stride=stride,
            dilation=dilation,
            group_channels=group_channels,
            reduction_ratio=reduction_ratio,
        )
        check_odd(kernel_size=kernel_size)
        channels, kernel_size, stride, dilation = int(channels), int(kernel_size), int(stride), int(dilation)
        group_channels, reduction_ratio = int(group_channels), int(reduction_ratio)  # NumPy's, for the operators
        if channels % group_channels:
            raise ValueError(
                f"group_channels is {group_channels}, which does not divide channels = {channels}; "
                "choose a divisor, or None for one kernel for all channels"
            )
        if reduction_ratio > channels:
            raise ValueError(f"reduction_ratio is {reduction_ratio}; it should be at most channels = {channels}")
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.group_channels = group_channels
        self.groups = channels // group_channels
        self.reduction_ratio = reduction_ratio
        self.kernel_generation = build_kernel_generation(
            kernel_generation, channels, self.groups * kernel_size**2, stride, reduction_ratio
        )

    def forward(self, x: Tensor) -> Tensor:
        generation = self.kernel_generation
        if torch.jit.is_scripting():  # knows neither isinstance of a module nor keywords; any generator will do
            kernel = generation(x).unflatten(1, (self.groups, self.kernel_size, self.kernel_size))
            padding = self.dilation * (self.kernel_size - 1) // 2
            return torch.ops.involution.involution2d(x, kernel, self.stride, padding, self.dilation)
        if isinstance(generation, BottleneckGeneration) and generation.runs_with(x):
            modules = generation.reduce, generation.norm, generation.span
            return involution_layer(x, generation.pool(x), *modules, self.kernel_size, self.stride, self.dilation)
        if isinstance(generation, SpanGeneration):
            return generation.into(partial(self._fused, x, generation.span), x)
        kernel = generation(x).unflatten(1, (self.groups, self.kernel_size, self.kernel_size))
        return involution2d(x, kernel, stride=self.stride, dilation=self.dilation)

    def _fused(self, x: Tensor, span: nn.Conv2d, hidden: Tensor) -> Tensor:
        return span_involution2d(
            x, hidden, span.weight, span.bias, self.kernel_size, stride=self.stride, dilation=self.dilation
        )

    def extra_repr(self) -> str:
        """The arguments that are not visible in the generator's own lines."""
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"group_channels={self.group_channels}"
        )
