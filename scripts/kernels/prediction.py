"""A training step's time on a GPU that is not here, from bytes, FLOPs and the compiled kernels' instructions.

Eager, bf16 autocast, channels_last. Every operator takes the longer of its bytes at 85 % of the memory's bandwidth and
its FLOPs at what cuDNN reaches, and 1.5 us for its launch; an involution's kernels take their bytes, or 1.4 times
the floor of their instructions. For ResNet-50 on an A100 that gives about 2650 images/s, where NVIDIA publishes 2470.

That is with torch's operators. Ours are one for a BatchNorm, the ReLU behind it and a residual between them
(involution/ops/triton_norm.py), whose instructions take less than its bytes everywhere.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from involution import create_model
from involution.ops.norm import LAUNCH_BOUND
from involution.ops.triton_tiles import make_taps_again
from kernels.launches import Layer, Norm

Floors = Mapping[tuple[str, Layer | Norm], float]  # microseconds by kernel and layer
LAUNCH = 1.5e-6  # seconds
SLACK = 1.4  # issue slots are never all used
ELEMENT = 2  # bytes


class Card(NamedTuple):
    """bytes/s that are reached, FLOP/s of 1x1 and of larger convolutions."""

    name: str
    bandwidth: float
    pointwise: float
    spatial: float


CARDS = {80: Card("A100", 0.85 * 1.95e12, 180e12, 170e12), 90: Card("H100", 0.85 * 3.35e12, 400e12, 330e12)}
#: (reads and writes of the first operand, launches) of what only moves memory
PASSES = {
    "aten::native_batch_norm": ("BatchNorm", 3, 2), "aten::native_batch_norm_backward": ("BatchNorm", 5, 2),
    "aten::relu_": ("ReLU", 2, 1), "aten::threshold_backward": ("ReLU", 3, 1), "aten::add": ("sums", 3, 1),
    "aten::max_pool2d_with_indices": ("pooling", 2, 1), "aten::max_pool2d_with_indices_backward": ("pooling", 2, 1),
    "aten::avg_pool2d": ("pooling", 1.25, 1), "aten::avg_pool2d_backward": ("pooling", 5, 1),
}  # fmt: skip


class _Cost(TorchDispatchMode):
    def __init__(self, card: Card, floors: Floors, joined: bool) -> None:
        super().__init__()
        self.card, self.floors, self.joined = card, floors, joined
        self.seconds: dict[str, float] = defaultdict(float)
        self.behind = "nothing"  # that a ReLU could be joined with: BatchNorm, or BatchNorm and a residual
        self.relus: list[str] = []  # what was in front of each, which the backward meets in reverse

    def add(self, kind: str, values: float, flops: float = 0, rate: float = 1, launches: int = 1) -> None:
        self.seconds[kind] += max(ELEMENT * values / self.card.bandwidth, flops / rate) + launches * LAUNCH

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = function(*args, **(kwargs or {})), function._schema.name
        if name == "aten::convolution":
            self._convolution(out, args[0], args[1])
        elif name == "aten::convolution_backward":
            for _ in range(2 if args[10][0] else 1):  # the first layer has no gradient of its input
                self._convolution(*args[:3])
        elif name == "involution::span_involution2d":
            self._involution(False, out, *args)
        elif name == "involution::span_involution2d_backward":
            self._involution(True, *args)
        elif name in PASSES and args[0].dim() == 4:
            kind, passes, launches = PASSES[name]
            if self.joined and args[0].numel() >= LAUNCH_BOUND:
                kind, passes, launches = self._join(name, kind, passes, launches)
            self.add(kind, passes * args[0].numel(), launches=launches)
        return out

    def _join(self, name: str, kind: str, passes: float, launches: int) -> tuple[str, float, int]:
        """What an operator adds to the one that it is part of: three launches forward, three backward."""
        if name == "aten::native_batch_norm":
            self.behind, launches = "BatchNorm", 3
        elif name == "aten::native_batch_norm_backward":
            launches = 3
        elif name == "aten::add" and self.behind == "BatchNorm":
            self.behind = "residual"
            return "BatchNorm", 1, 0  # it is read
        elif name == "aten::relu_":
            self.relus.append(self.behind)
            if self.behind != "nothing":
                passes, launches = 0, 0
            self.behind = "nothing"
        elif name == "aten::threshold_backward":
            joined = {"BatchNorm": ("BatchNorm", 0, 0), "residual": ("BatchNorm", 2, 0)}  # the output, and its gradient
            return joined.get(self.relus.pop(), (kind, passes, launches))
        return kind, passes, launches

    def _convolution(self, out: Tensor, x: Tensor, weight: Tensor) -> None:
        spatial = weight.shape[2] > 1
        rate = self.card.spatial if spatial else self.card.pointwise
        flops = 2 * out.numel() * math.prod(weight.shape[1:])
        self.add("3x3 and 7x7" if spatial else "1x1", x.numel() + weight.numel() + out.numel(), flops, rate)

    def _involution(
        self, backward: bool, out: Tensor, x: Tensor, reduced: Tensor, weight: Tensor, bias: Any,
        kernel_size: int, stride: int, padding: int, dilation: int, *_: Any,
    ) -> None:  # fmt: skip
        """Its kernels and, backward, the matrix products that make the kernels and use their gradient."""
        size, groups = (x.shape[1], x.shape[2], x.shape[3]), weight.shape[0] // kernel_size**2
        layer = Layer(size, groups, kernel_size, stride, dilation, reduced.shape[1])
        taps, pixels, products = weight.shape[0] * reduced[:, 0].numel(), x.numel() + out.numel(), 0
        moved = {"span_forward": pixels + reduced.numel()}
        if backward:  # the bias' gradient is eight more hidden channels, which copies add and take away
            products = 2
            moved = {"grad_kernel": pixels + taps}
            self.add("involution", 4 * reduced.numel(), launches=2)
            if make_taps_again(reduced.shape[1], torch.bfloat16):
                moved["span_grad_input"] = pixels + reduced.numel()
            else:
                products = 3
                moved["grad_input"] = pixels + taps
        for kernel, values in moved.items():
            floor = SLACK * 1e-6 * self.floors[kernel, layer]
            self.seconds["involution"] += max(floor, ELEMENT * values / self.card.bandwidth) + LAUNCH
        for _product in range(products):
            flops = 2 * taps * reduced.shape[1]
            self.add("involution", taps + reduced.numel() + weight.numel(), flops, self.card.pointwise)


def predict(
    name: str, batch: int, arch: int, floors: Floors, size: tuple[int, int] = (224, 224), joined: bool = False
) -> dict[str, float]:
    """Milliseconds of a training step of a model by kind of operator; `floors` are of its kernels at this batch.

    joined: BatchNorm, residual and ReLU as one operator.
    """
    with torch.device("meta"):
        model = create_model(name).to(memory_format=torch.channels_last).train()
        images = torch.empty(batch, 3, *size).to(memory_format=torch.channels_last)
    cost = _Cost(CARDS[arch], floors, joined)
    with cost:
        model(images).sum().backward()
    # SGD with momentum in float32, casts of the weights to bf16 and of their gradients back
    parameters = sum(p.numel() for p in model.parameters())
    cost.add("optimizer, casts", parameters * (4 * 5 + 4 + 2 + 2 + 4) / ELEMENT, launches=160)
    return {kind: 1e3 * seconds for kind, seconds in cost.seconds.items()}
