"""The operator's inputs: every involution of RedNet-50, with tensors as they come in the network.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from involution.ops import involution2d, reference, span_involution2d

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GROUP = 16  # channels that share a kernel


class Shape(NamedTuple):
    """One involution of RedNet-50 at 224 x 224."""

    name: str
    channels: int
    size: int
    kernel_size: int = 7
    stride: int = 1


STAGES = [Shape(f"stage {i + 1}", 64 << i, 56 >> i) for i in range(4)]
OTHERS = [Shape("stem", 32, 112, 3)] + [Shape(f"stage {i + 1}, first", 64 << i, 112 >> i, 7, 2) for i in (1, 2, 3)]


class Problem:
    """Tensors as they come in a RedNet: the kernels are a view of a 1x1 convolution's output."""

    def __init__(self, shape: Shape, batch: int, device: str, dtype: torch.dtype, last: bool = True) -> None:
        memory_format = torch.channels_last if last else torch.contiguous_format
        self.shape, self.batch = shape, batch
        self.padding = shape.kernel_size // 2

        def make(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=dtype).contiguous(memory_format=memory_format)

        c, k, out = shape.channels, shape.kernel_size, shape.size // shape.stride
        self.input = make(batch, c, shape.size, shape.size)
        self.reduced = make(batch, c // 4, out, out)
        self.weight, self.bias = make(c // GROUP * k * k, c // 4, 1, 1), make(c // GROUP * k * k, 1, 1, 1).flatten()
        self.grad = make(batch, c, out, out)
        self.kernel = self.span(self.reduced, self.weight, self.bias).detach()
        self.window_flops = 2 * self.grad.numel() * k * k
        self.span_flops = 2 * batch * out * out * self.weight.numel()

    def span(self, reduced: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        k = self.shape.kernel_size
        return F.conv2d(reduced, weight, bias).unflatten(1, (-1, k, k))

    def unfold(self, input: Tensor, kernel: Tensor) -> Tensor:
        return reference.involution2d(input, kernel, self.shape.stride, self.padding, 1)

    def plain(self, input: Tensor, kernel: Tensor) -> Tensor:
        return involution2d(input, kernel, stride=self.shape.stride)

    def unfused(self, input: Tensor, reduced: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.plain(input, self.span(reduced, weight, bias))

    def fused(self, input: Tensor, reduced: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return span_involution2d(input, reduced, weight, bias, self.shape.kernel_size, stride=self.shape.stride)


def describe(shape: Shape) -> str:
    return (
        f"{shape.name}: C {shape.channels}, {shape.size} x {shape.size}, K {shape.kernel_size}, stride {shape.stride}"
    )


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
