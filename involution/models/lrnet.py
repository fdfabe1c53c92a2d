"""LR-Net, "Local Relation Networks for Image Recognition" (Hu et al., ICCV 2019), on the involution operator.

    y = W involution2d(x, kernel, stride),  kernel = softmax(q_i k_u + g_u),  one number q, k, g for 8 channels, K = 7

g, the geometry prior, is a small network of the offset u. Bottlenecks as ResNet's with this layer for the 3x3.
LR-Net-26/50/101 have 14.747 / 23.381 / 42.103 M parameters, 14.712 / 23.319 / 41.978 without BatchNorm, as the paper
counts (14.7 / 23.3 / 42.0).

The least certain of the families: ports and the layer's own CUDA kernel exist, not the network's code. The widths are
those that reproduce the paper's parameters; the stem, the geometry's hidden width of half and the softmax over the taps
inside the image are assumptions.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from involution.attention import window_softmax
from involution.checks import NotTraced, check_odd, check_positive
from involution.models.bottleneck import EXPANSION, STAGE_WIDTHS, Bottleneck, BottleneckNetwork
from involution.ops import involution2d, neighbourhood_product
from involution.sequence import sequence


class LocalRelation(NotTraced, nn.Module):
    """(B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""

    sums_to_one = True  # each kernel

    def __init__(self, channels: int, kernel_size: int, stride: int, dilation: int, group_channels: int) -> None:
        super().__init__()
        check_odd(kernel_size=kernel_size)
        check_positive(group_channels=group_channels)
        if channels % group_channels:
            raise ValueError(f"group_channels is {group_channels}; it should divide the layer's {channels} channels")
        groups = channels // group_channels
        self.kernel_size, self.stride, self.dilation, self.groups = kernel_size, stride, dilation, groups
        self.query = nn.Conv2d(channels, groups, 1, stride, bias=False)
        self.key = nn.Conv2d(channels, groups, 1, bias=False)
        hidden = max(1, groups // 2)
        self.geometry1, self.geometry2 = nn.Linear(2, hidden), nn.Linear(hidden, groups)
        self.project = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(involution2d(x, self.kernel(x), stride=self.stride, dilation=self.dilation))

    def kernel(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, G, K, K, Ho, Wo)."""
        window = {"stride": self.stride, "dilation": self.dilation}
        scores = neighbourhood_product(self.query(x), self.key(x), self.kernel_size, groups=self.groups, **window)
        scores = scores + self.prior()[:, :, :, None, None]
        return window_softmax(scores, x.shape[2], x.shape[3], **window)

    def prior(self) -> Tensor:
        """g, (G, K, K): of each tap's offset, to the right and up, in pixels; the same for all pixels and images."""
        first, second = self.geometry1, self.geometry2
        like, middle = first.weight, self.kernel_size // 2
        steps = torch.arange(-middle, middle + 1, dtype=like.dtype, device=like.device)
        up, right = torch.meshgrid(-steps, steps, indexing="ij")
        y = F.linear(torch.stack([right, up], dim=2), first.weight, first.bias).relu()
        return F.linear(y, second.weight, second.bias).movedim(2, 0)

    def products(self, x: Tensor, output: Tensor) -> int:
        """q . k and the weighted sums."""
        return output.shape[2] * output.shape[3] * self.kernel_size**2 * (x.shape[1] + self.groups)

    def additions(self, x: Tensor, output: Tensor) -> int:
        """One a score."""
        return output.shape[2] * output.shape[3] * self.kernel_size**2 * self.groups


class LocalRelationStem(nn.Module):
    """1x1 convolution to 64 channels at full resolution, then the layer with stride 2, each with BatchNorm and ReLU."""

    def __init__(self, in_chans: int, kernel_size: int, group_channels: int) -> None:
        super().__init__()
        check_positive(in_chans=in_chans)
        width = STAGE_WIDTHS[0]
        self.conv1 = nn.Conv2d(in_chans, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = LocalRelation(width, kernel_size, 2, 1, group_channels)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return sequence(x, self.conv1, self.bn1, self.act1, self.conv2, self.bn2, self.act2)


class LRNet(BottleneckNetwork):
    """LR-Net with ``depths`` bottlenecks of ``widths`` in its four stages, whose outputs have ResNet's channels.

    Args:
        num_classes: 0 for no classifier.
        in_chans: channels of the images.
        kernel_size: of the windows, odd.
        group_channels: channels that share a kernel (the paper's m).
        output_stride, zero_init_residual: see ``BottleneckNetwork``.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        kernel_size: int = 7,
        group_channels: int = 8,
        output_stride: int = 32,
        zero_init_residual: bool = True,
    ) -> None:
        narrower = dict(zip(STAGE_WIDTHS, widths, strict=True))

        def spatial(channels: int, stride: int, dilation: int) -> nn.Module:
            return LocalRelation(channels, kernel_size, stride, dilation, group_channels)

        def block(in_channels: int, width: int, stride: int, dilation: int) -> Bottleneck:
            out_channels = EXPANSION * width
            return Bottleneck(in_channels, narrower[width], stride, dilation, spatial, out_channels)

        stem = LocalRelationStem(in_chans, kernel_size, group_channels)
        super().__init__(stem, block, depths, num_classes, output_stride, zero_init_residual)


_SIZES = {
    26: ((2, 2, 2, 2), (104, 200, 408, 808)),
    50: ((3, 4, 6, 3), (104, 200, 400, 800)),
    101: ((3, 4, 23, 3), (104, 208, 416, 808)),
}


MODELS = {f"lrnet{number}": partial(LRNet, *sizes) for number, sizes in _SIZES.items()}
