"""SAN, "Exploring Self-attention for Image Recognition" (Zhao et al., CVPR 2020), on the involution operator.

    y = involution2d(W3 x, kernel), with a kernel for 8 channels, and images reflected at their borders
    pairwise:   kernel = softmax(MLP([x1(i) - x2(j), p(i) - p(j)]))   one neighbour j, one tap, at a time
    patchwise:  kernel = MLP([x1(i), all K * K neighbours of x2])     no softmax: it ends in a 1x1, and runs fused

x1, x2 and W3 are 1x1 convolutions, p is a linear map of the pixel's place. SAN-10/15/19 have 10.532 / 14.065 / 17.596 M
parameters pairwise, 11.841 / 16.181 / 20.519 M patchwise. Weights start as torch's layers do, as in the released code.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from involution.checks import NotTraced, SizeError, check_positive
from involution.kernel_generation import SpanGeneration
from involution.models.staged import StagedNetwork
from involution.ops import involution2d, span_involution2d
from involution.sequence import sequence

STEM_WIDTH = 64
WIDTHS = (256, 512, 1024, 2048)
SHARED = 8  # channels that share a kernel
SMALLEST = 128  # pixels a side: the last stage's 4 pixels are the fewest that can be reflected by 3


def reflect(x: Tensor, kernel_size: int) -> Tensor:
    """``x`` with its border reflected, so that each pixel has a window."""
    border, (height, width) = kernel_size // 2, x.shape[2:]
    if min(height, width) <= border:
        raise SizeError(
            f"features of {height} x {width} pixels cannot be reflected by {border} at their borders; SAN takes images "
            f"of at least {SMALLEST} pixels a side (data.train_size and data.val_size)"
        )
    return F.pad(x, (border,) * 4, mode="reflect")


def neighbours(x: Tensor, kernel_size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, K*K, H*W): what each pixel's window holds."""
    return F.unfold(reflect(x, kernel_size), kernel_size).unflatten(1, (x.shape[1], -1))


class PairwiseGeneration(nn.Module):
    """Kernels (B, G*K*K, H, W) from the difference of a pixel and each of its neighbours."""

    sums_to_one = True  # each kernel

    def __init__(self, channels: int, groups: int, kernel_size: int) -> None:
        super().__init__()
        width = channels // 16
        self.kernel_size, self.groups = kernel_size, groups
        self.query = nn.Conv2d(channels, width, 1)
        self.key = nn.Conv2d(channels, width, 1)
        self.position = nn.Conv2d(2, 2, 1)
        self.bn1 = nn.BatchNorm2d(width + 2)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(width + 2, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, groups, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        place = self.position(_places(height, width, x)).expand(x.shape[0], -1, -1, -1)
        pairs = (self.query(x), self.key(x)), (place, place)
        differences = [q.flatten(2).unsqueeze(2) - neighbours(k, self.kernel_size) for q, k in pairs]
        layers = self.bn1, self.act1, self.conv1, self.bn2, self.act2, self.conv2
        y = sequence(torch.cat(differences, dim=1), *layers)  # (B, G, K*K, H*W)
        return y.softmax(2).flatten(1, 2).unflatten(2, (height, width))

    def products(self, x: Tensor, output: Tensor) -> int:
        """None but its layers'."""
        return 0

    def additions(self, x: Tensor, output: Tensor) -> int:
        """The subtractions; the released counter has the softmax for nothing."""
        return self.bn1.num_features * self.kernel_size**2 * x.shape[2] * x.shape[3]


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """(1, 2, H, W): x and y of each pixel, from -1 to 1."""
    x, y = (torch.linspace(-1, 1, n, dtype=like.dtype, device=like.device) for n in (width, height))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None]


class PatchwiseGeneration(SpanGeneration):
    """Kernels from a pixel and its whole neighbourhood at once, in order; the last 1x1 convolution is ``span``."""

    def __init__(self, channels: int, groups: int, kernel_size: int) -> None:
        super().__init__()
        width, taps = channels // 16, kernel_size**2
        self.kernel_size = kernel_size
        self.query = nn.Conv2d(channels, width, 1)
        self.key = nn.Conv2d(channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width * (taps + 1))
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(width * (taps + 1), groups, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(groups)
        self.act2 = nn.ReLU(inplace=True)
        self.span = nn.Conv2d(groups, groups * taps, 1)

    def hidden(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, G, H, W)."""
        windows = neighbours(self.key(x), self.kernel_size).flatten(1, 2).unflatten(2, x.shape[2:])
        y = torch.cat([self.query(x), windows], dim=1)
        return sequence(y, self.bn1, self.act1, self.conv1, self.bn2, self.act2)


class SelfAttention(NotTraced, nn.Module):
    """SAN's layer: (B, C, H, W) -> (B, C/4, H, W)."""

    def __init__(self, kind: str, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size, self.groups = kernel_size, channels // 4 // SHARED
        self.value = nn.Conv2d(channels, channels // 4, 1)
        generation = PairwiseGeneration if kind == "pairwise" else PatchwiseGeneration
        self.kernel_generation: nn.Module = generation(channels, self.groups, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        values, generation = reflect(self.value(x), self.kernel_size), self.kernel_generation
        if isinstance(generation, SpanGeneration) and generation.may_fuse():
            span = generation.span
            return span_involution2d(values, generation.hidden(x), span.weight, span.bias, self.kernel_size, padding=0)
        return involution2d(values, self.kernel(x), padding=0)

    def kernel(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, G, K, K, H, W)."""
        return self.kernel_generation(x).unflatten(1, (self.groups, self.kernel_size, self.kernel_size))

    def products(self, x: Tensor, output: Tensor) -> int:
        """The weighted sums."""
        return output.numel() * self.kernel_size**2


class Block(nn.Module):
    """x + conv(ReLU(BN(attention(ReLU(BN(x))))))."""

    def __init__(self, kind: str, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.attention = SelfAttention(kind, channels, kernel_size)
        self.bn2 = nn.BatchNorm2d(channels // 4)
        self.act2 = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + sequence(x, self.bn1, self.act1, self.attention, self.bn2, self.act2, self.conv)


class Stage(nn.Sequential):
    """1x1 convolution to ``channels``, blocks, BatchNorm, ReLU."""

    def __init__(self, kind: str, in_channels: int, channels: int, depth: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.blocks = nn.Sequential(*[Block(kind, channels, kernel_size) for _ in range(depth)])
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)


class Stem(nn.Sequential):
    """1x1 convolution to 64 channels at full resolution, BatchNorm, ReLU, and the first stage, with K = 3, at half."""

    def __init__(self, kind: str, in_chans: int, depth: int) -> None:
        check_positive(in_chans=in_chans)
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, STEM_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.stage = Stage(kind, STEM_WIDTH, STEM_WIDTH, depth, 3)


class SAN(StagedNetwork):
    """SAN with ``depths`` blocks in its five stages; it halves resolutions, rounding down, by max pooling.

    Args:
        kind: "pairwise" or "patchwise".
        num_classes: 0 for no classifier.
        in_chans: channels of the images.

    Images have at least 128 pixels a side: the border of the last stage is reflected.
    """

    def __init__(self, kind: str, depths: Sequence[int], num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = Stem(kind, in_chans, depths[0])
        self.maxpool = nn.MaxPool2d(2)
        self.feature_info = [{"module": "stem", "num_chs": STEM_WIDTH, "reduction": 2}]
        in_channels = STEM_WIDTH
        for i, (channels, depth) in enumerate(zip(WIDTHS, depths[1:], strict=True), start=1):
            stage: nn.Sequential = Stage(kind, in_channels, channels, depth, 7)
            if i > 1:
                stage = nn.Sequential(nn.MaxPool2d(2), stage)
            self.add_module(f"layer{i}", stage)
            self.feature_info.append({"module": f"layer{i}", "num_chs": channels, "reduction": 2 ** (i + 1)})
            in_channels = channels
        self.num_features = in_channels
        self.add_classifier(num_classes)


_DEPTHS = {10: (2, 1, 2, 4, 1), 15: (3, 2, 3, 5, 2), 19: (3, 3, 4, 6, 3)}


MODELS = {
    f"san{number}_{kind}": partial(SAN, kind, depths)
    for kind in ("pairwise", "patchwise")
    for number, depths in _DEPTHS.items()
}
