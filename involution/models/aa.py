"""AA-ResNet, "Attention Augmented Convolutional Networks" (Bello et al., ICCV 2019).

    y = concat[conv3x3(x) to C - dv channels, Wo MHA(x) of dv channels]  in place of the 3x3s of stages 2 to 4

The attention is global, so it is no involution: logits = q / sqrt(D) . (k + rH + rW), with embeddings of the distance
in rows and in columns, which the heads share. AA-ResNet-50/101/152 have 25.809 / 45.387 / 61.614 M parameters.

8 heads, kappa = 0.2 and upsilon = 0.1 with at least 20 channels a head for query and key, 1 for values: dk = 160 and
dv = 8, 24, 48, as the paper's counts say. In stage 2 the attention runs at half the resolution and is upsampled. Two
public ports mix up the heads' outputs (a reshape without a transpose); this one does not.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from involution.checks import NotTraced, check_positive
from involution.models.bottleneck import DEPTHS, STAGE_WIDTHS, Bottleneck, BottleneckNetwork, ConvolutionStem

HEADS = 8
KAPPA, UPSILON = 0.2, 0.1  # shares of the channels for keys and for values
FEWEST = 20  # channels of a head's query and key


class GlobalAttention(nn.Module):
    """(B, C, H, W) -> (B, dv, H, W): every pixel attends to all.

    Args:
        side: of the images of features that the tables are for. Others are met by linear interpolation of the tables.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.key_channels = max(FEWEST, int(KAPPA * channels / HEADS)) * HEADS
        self.value_channels = max(1, int(UPSILON * channels / HEADS)) * HEADS
        self.qkv = nn.Conv2d(channels, 2 * self.key_channels + self.value_channels, 1, bias=False)
        self.project = nn.Conv2d(self.value_channels, self.value_channels, 1, bias=False)
        depth = self.key_channels // HEADS
        self.rows = nn.Parameter(torch.randn(2 * side - 1, depth) * depth**-0.5)
        self.columns = nn.Parameter(torch.randn(2 * side - 1, depth) * depth**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        sizes = [self.key_channels, self.key_channels, self.value_channels]
        query, key, value = (
            t.flatten(2).unflatten(1, (HEADS, -1)).transpose(2, 3) for t in self.qkv(x).split(sizes, 1)
        )  # (B, heads, H*W, D)
        y = F.scaled_dot_product_attention(query, key, value, self.position_scores(query, height, width))
        return self.project(y.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width)))

    def position_scores(self, query: Tensor, height: int, width: int) -> Tensor:
        """q / sqrt(D) . (rH + rW): (B, heads, H*W, D) -> (B, heads, H*W, H*W)."""
        query = (query * query.shape[3] ** -0.5).unflatten(2, (height, width))
        rows = torch.einsum("bnyxd,yud->bnyxu", query, distances(self.rows, height))
        columns = torch.einsum("bnyxd,xvd->bnyxv", query, distances(self.columns, width))
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)

    def products(self, x: Tensor, output: Tensor) -> int:
        """q . k, the weighted sums, and q times each row of the tables."""
        pixels = x.shape[2] * x.shape[3]
        positions = pixels * self.key_channels * (len(self.rows) + len(self.columns))
        return pixels**2 * (self.key_channels + self.value_channels) + positions

    def additions(self, x: Tensor, output: Tensor) -> int:
        """One a score."""
        return (x.shape[2] * x.shape[3]) ** 2 * HEADS


def distances(table: Tensor, side: int) -> Tensor:
    """(2 L - 1, D), one embedding for each of the distances -(L-1) ... L-1 -> (side, side, D): of query i and key j.

    Where ``side`` is not L, a distance counts as the same share of the side.
    """
    length = (len(table) + 1) // 2
    place = torch.arange(side, device=table.device)
    away = place - place[:, None]  # key - query
    scaled = (away * (length / side) + length - 1).clamp(0, len(table) - 1)
    below = scaled.floor().long().clamp(max=max(len(table) - 2, 0))
    share = (scaled - below).to(table.dtype).unsqueeze(2)
    return table[below] * (1 - share) + table[(below + 1).clamp(max=len(table) - 1)] * share


class AugmentedConvolution(NotTraced, nn.Module):
    """(B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)): a 3x3 convolution and, beside it, attention.

    Args:
        side: of the output for the image size that the tables are for.
        halve: run the attention at half the output's resolution.
    """

    def __init__(self, channels: int, stride: int, side: int, halve: bool) -> None:
        super().__init__()
        self.attention = GlobalAttention(channels, -(-side // 2) if halve else side)
        self.convolution = nn.Conv2d(channels, channels - self.attention.value_channels, 3, stride, 1, bias=False)
        halvings = (stride == 2) + halve
        self.pool = nn.Sequential(*[nn.AvgPool2d(3, 2, 1) for _ in range(halvings)])

    def forward(self, x: Tensor) -> Tensor:
        y, a = self.convolution(x), self.attention(self.pool(x))
        if a.shape[2:] != y.shape[2:]:
            a = F.interpolate(a, size=y.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([y, a], dim=1)


class AAResNet(BottleneckNetwork):
    """AA-ResNet with ``depths`` bottlenecks in its four stages.

    Args:
        num_classes: 0 for no classifier.
        in_chans: channels of the images.
        image_size: pixels a side that the position tables are for; images of other sizes interpolate them.
        zero_init_residual: see ``BottleneckNetwork``.
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        image_size: int = 224,
        zero_init_residual: bool = True,
    ) -> None:
        check_positive(image_size=image_size)
        sides = {width: -(-image_size // (4 * 2**i)) for i, width in enumerate(STAGE_WIDTHS)}

        def spatial(channels: int, stride: int, dilation: int) -> nn.Module:
            if channels == STAGE_WIDTHS[0]:
                return nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
            return AugmentedConvolution(channels, stride, sides[channels], halve=channels == STAGE_WIDTHS[1])

        block = partial(Bottleneck, spatial=spatial)
        super().__init__(ConvolutionStem(in_chans), block, depths, num_classes, zero_init_residual=zero_init_residual)


MODELS = {f"aa_resnet{number}": partial(AAResNet, DEPTHS[number]) for number in (50, 101, 152)}
