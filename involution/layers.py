"""Involution2d: kernel generation and operator as one layer, a drop-in for a K x K convolution C -> C."""

import torch
from torch import Tensor, nn

from involution.checks import NotScripted, check_odd, check_positive
from involution.kernel_generation import BottleneckGeneration, SpanGeneration, build_kernel_generation
from involution.ops import involution2d, norm, recompute, span_involution2d
from involution.unwatched import nobody_watches


class Involution2d(NotScripted, nn.Module):
    """Involution (Eqn. 4 to 6): (B, C, H, W) -> (B, C, Ho, Wo) with Ho = ceil(H / stride), Wo = ceil(W / stride).

    Args:
        channels: C, of the input and of the output.
        kernel_size: K, odd.
        stride: of the windows; the kernels come from the average-pooled input (see ``kernel_generation.stride_pool``).
        dilation: distance between the taps of a kernel.
        group_channels: channels that share one kernel (C/G in the paper); it divides ``channels``. None: all of them.
        reduction_ratio: r of the bottleneck, at most ``channels``.
        kernel_generation: "bottleneck" (Eqn. 6), "linear" (Table 6c), or Section 4.2's self-attention: "attention",
            softmax(Q K^T), and "position", softmax(Q R^T).
        kernel_activation: None, "softmax" or "sigmoid", of the kernels' values (Section 5.2). None leaves them as they
            are made; attention's softmax is part of it, and "sigmoid" takes its place.

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
        kernel_activation: str | None = None,
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
                "choose a divisor, or None (null on the command line) for one kernel for all channels"
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
            kernel_generation,
            channels,
            self.groups,
            kernel_size,
            stride,
            dilation,
            reduction_ratio,
            kernel_activation,
        )

    def forward(self, x: Tensor) -> Tensor:
        generation, window = self.kernel_generation, {"stride": self.stride, "dilation": self.dilation}
        if torch.is_grad_enabled() and nobody_watches() and (step := self.training_step(x)) is not None:
            return recompute.run(x, step)
        if isinstance(generation, SpanGeneration) and generation.may_fuse():
            hidden, span = generation.hidden(x), generation.span
            if all(type(t) in (Tensor, nn.Parameter) for t in (x, hidden)):  # subclasses may have a say in convolutions
                return span_involution2d(x, hidden, span.weight, span.bias, self.kernel_size, **window)
            kernel = span(hidden)
        else:
            kernel = generation(x)
        return involution2d(x, self._seen(kernel), **window)

    def kernel(self, x: Tensor) -> Tensor:
        """The kernels that it applies to ``x``: (B, C, H, W) -> (B, G, K, K, Ho, Wo)."""
        return self._seen(self.kernel_generation(x))

    def _seen(self, kernel: Tensor) -> Tensor:
        return kernel.unflatten(1, (self.groups, self.kernel_size, self.kernel_size))

    def training_step(self, x: Tensor) -> recompute.Step | None:
        """What it does in training, as one operator on the CPU; None where its modules are to run one by one.

        ``x`` tells shape, type and layout of the input. Counts the batch in the generator's BatchNorm.
        """
        generation = self.kernel_generation
        if not (norm.takes(x) and x.shape[1] == self.channels and self.channels % 16 == 0):
            return None
        if not isinstance(generation, BottleneckGeneration) or not generation.as_built(self.stride):
            return None
        reduce, batch_norm, span = generation.reduce, generation.norm, generation.span
        hidden, taps = reduce.out_channels, self.groups * self.kernel_size**2
        weights = reduce.weight, span.weight, *(() if span.bias is None else (span.bias,))
        if (
            reduce.bias is not None
            or (reduce.in_channels, span.out_channels, span.in_channels) != (self.channels, taps, hidden)
            or not recompute.computes(x, *weights)
            or not norm.fits(batch_norm, x, hidden)
        ):
            return None
        height, width = (-(-side // self.stride) for side in x.shape[2:])
        problem = norm.describe(batch_norm, x, x.shape[0] * height * width)
        options = recompute.Involution(self.kernel_size, self.stride, self.dilation, problem)
        statistics = batch_norm.running_mean, batch_norm.running_var
        operands = reduce.weight, batch_norm.weight, batch_norm.bias, span.weight, span.bias
        return recompute.Step(options, operands, statistics)

    def extra_repr(self) -> str:
        """The arguments that are not visible in the generator's own lines."""
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"group_channels={self.group_channels}"
        )
