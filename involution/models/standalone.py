"""Stand-Alone ResNet, "Stand-Alone Self-Attention in Vision Models" (Ramachandran et al., NeurIPS 2019).

    y = involution2d(Wv x, kernel),  kernel = softmax(q . k + q . r),  8 heads, K = 7

ResNet's bottlenecks with every 3x3 convolution replaced; a stride is average pooling after the attention. Stand-Alone
ResNet-26/38/50 have 10.323 / 14.165 / 18.007 M parameters.

Assumptions, where the paper is silent and no code of its authors exists: heads share their embeddings; taps outside the
image are left out of the softmax; the stem mixes 4 value matrices and has a ReLU before its pooling. That the pooling
follows the attention at once and that there is no output projection is what the paper's counts say.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from involution.attention import position_scores, window_softmax
from involution.checks import NotTraced, check_odd, check_positive
from involution.kernel_generation import stride_pool
from involution.models.bottleneck import DEPTHS, STAGE_WIDTHS, Bottleneck, BottleneckNetwork
from involution.ops import involution2d, neighbourhood_product
from involution.sequence import sequence

BLOCK = 4  # pixels a side of the stem's windows
MIXTURES = 4


def check_heads(heads: int, channels: int) -> None:
    """Raise ValueError unless heads divide channels into even numbers, half for rows and half for columns."""
    check_positive(heads=heads)
    if channels % (2 * heads):
        raise ValueError(
            f"heads is {heads}; it should divide the layer's {channels} channels, and leave each head an even number"
        )


class LocalAttention(NotTraced, nn.Module):
    """(B, C, H, W) -> (B, C, Ho, Wo): attention over the K x K window of each pixel, then pooling by ``stride``."""

    sums_to_one = True  # each kernel

    def __init__(self, channels: int, kernel_size: int, stride: int, heads: int) -> None:
        super().__init__()
        check_odd(kernel_size=kernel_size)
        check_heads(heads, channels)
        self.kernel_size, self.heads = kernel_size, heads
        self.query = nn.Conv2d(channels, channels, 1, bias=False)
        self.key = nn.Conv2d(channels, channels, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        half = channels // heads // 2  # of a head's embedding, for the row, and as many for the column
        self.rows = nn.Parameter(torch.randn(half, kernel_size))
        self.columns = nn.Parameter(torch.randn(half, kernel_size))
        self.pool = stride_pool(stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(involution2d(self.value(x), self.kernel(x)))

    def kernel(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, heads, K, K, H, W)."""
        query = self.query(x)
        scores = neighbourhood_product(query, self.key(x), self.kernel_size, groups=self.heads)
        scores = scores + position_scores(query, self.embedding(), self.heads)
        return window_softmax(scores, x.shape[2], x.shape[3])

    def embedding(self) -> Tensor:
        """r, (D, K, K): one of the rows' above one of the columns'."""
        size = self.kernel_size
        rows, columns = self.rows[:, :, None], self.columns[:, None, :]
        return torch.cat([rows.expand(-1, -1, size), columns.expand(-1, size, -1)])

    def products(self, x: Tensor, output: Tensor) -> int:
        """q . k, q . r and the weighted sums."""
        return 3 * x.numel() * self.kernel_size**2

    def additions(self, x: Tensor, output: Tensor) -> int:
        """One a score."""
        return x.shape[2] * x.shape[3] * self.heads * self.kernel_size**2


class AttentionStem(NotTraced, nn.Module):
    """Attention inside each 4 x 4 block of pixels, whose values are mixed by place; BatchNorm, ReLU.

    v_ab = sum over m of p(a, b, m) Wv_m x_ab, p = softmax over m of (row(a) + column(b)) . nu_m.
    As an involution it has a 7 x 7 kernel that is 0 outside the pixel's own block.
    """

    def __init__(self, in_chans: int, heads: int) -> None:
        super().__init__()
        check_positive(in_chans=in_chans)
        width = STAGE_WIDTHS[0]
        check_heads(heads, width)
        depth = width // heads
        self.heads = heads
        self.query = nn.Conv2d(in_chans, width, 1, bias=False)
        self.key = nn.Conv2d(in_chans, width, 1, bias=False)
        self.value = nn.Conv2d(in_chans, width * MIXTURES, 1, bias=False)
        self.rows = nn.Parameter(torch.randn(depth, BLOCK))
        self.columns = nn.Parameter(torch.randn(depth, BLOCK))
        self.mixture = nn.Parameter(torch.randn(MIXTURES, depth))
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        padding = (0, -width % BLOCK, 0, -height % BLOCK)
        inside = F.pad(x.new_ones(1, 1, height, width), padding).expand(x.shape[0], -1, -1, -1)
        x = F.pad(x, padding)
        query, key, value = (self._blocks(t) for t in (self.query(x), self.key(x), self.mixed(self.value(x))))
        mask = self._blocks(inside, heads=1).transpose(2, 3) > 0  # (B * blocks, 1, 1, pixels)
        y = F.scaled_dot_product_attention(query, key, value, mask, scale=1.0)
        blocks = (x.shape[0], x.shape[2] // BLOCK, x.shape[3] // BLOCK)
        y = y.unflatten(2, (BLOCK, BLOCK)).unflatten(0, blocks)  # B rows columns heads 4 4 D
        y = y.permute(0, 3, 6, 1, 4, 2, 5).reshape(x.shape[0], self.query.out_channels, *x.shape[2:])
        return sequence(y[:, :, :height, :width], self.bn1, self.act1)

    def mixed(self, values: Tensor) -> Tensor:
        """(B, 4 * 64, H, W) -> (B, 64, H, W): the mixture that belongs to a pixel's place in its block."""
        places = self.rows[:, :, None] + self.columns[:, None, :]
        weights = torch.einsum("md,dab->mab", self.mixture, places).softmax(0)
        repeats = (1, values.shape[2] // BLOCK, values.shape[3] // BLOCK)
        return torch.einsum("bmchw,mhw->bchw", values.unflatten(1, (MIXTURES, -1)), weights.repeat(repeats))

    def _blocks(self, x: Tensor, heads: int | None = None) -> Tensor:
        """(B, heads*D, H, W) -> (B * blocks, heads, 16, D)."""
        x = x.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).unflatten(1, (heads or self.heads, -1))
        return x.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5).flatten(0, 2)

    def products(self, x: Tensor, output: Tensor) -> int:
        """q . k and the weighted sums over 16 pixels, as many for the positions, and the mixing."""
        return output.numel() * (3 * BLOCK**2 + MIXTURES)


class StandAloneResNet(BottleneckNetwork):
    """Stand-Alone ResNet with ``depths`` bottlenecks in its four stages.

    Args:
        num_classes: 0 for no classifier.
        in_chans: channels of the images.
        kernel_size: of the attention's windows, odd.
        heads: of every attention.
        zero_init_residual: see ``BottleneckNetwork``.
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        kernel_size: int = 7,
        heads: int = 8,
        zero_init_residual: bool = True,
    ) -> None:
        def spatial(channels: int, stride: int, dilation: int) -> nn.Module:
            return LocalAttention(channels, kernel_size, stride, heads)

        stem, block = AttentionStem(in_chans, heads), partial(Bottleneck, spatial=spatial)
        super().__init__(stem, block, depths, num_classes, zero_init_residual=zero_init_residual)
        self.maxpool = nn.MaxPool2d(4, ceil_mode=True)
        self.feature_info[0]["reduction"] = 1


MODELS = {f"standalone_resnet{number}": partial(StandAloneResNet, DEPTHS[number]) for number in (26, 38, 50)}
