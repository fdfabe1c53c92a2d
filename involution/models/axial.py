"""Axial ResNet, "Axial-DeepLab: Stand-Alone Axial-Attention for Panoptic Segmentation" (Wang et al., ECCV 2020).

Every 3x3 convolution becomes attention along the height, then along the width. It has one dimension, and positions have
a part in the values too, so it is no involution:

    a = softmax over keys j of  q_i . k_j + q_i . rq + k_j . rk,     y_i = sum over j of a (v_j + rv)

with BatchNorm on each of the three scores and of the two sums. Tables rq and rv are indexed by query - key, rk by key -
query; the 8 heads share them. Axial ResNet-S/M/L have 12.496 / 26.548 / 45.803 M parameters, the released 26s 5.945 M.

S, M and L are the paper's "full" variant, whose stem is three axial blocks and whose queries attend to the 15 pixels
around them; 26s has ResNet's stem and queries that attend to their whole row or column. Span and tables of 509 rows are
the authors' settings; the strides of stem and first stage are what the paper's counts say. M's stem has 3 channels a
head, so that of the 6 for query, key and value one is left over: an assumption.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from involution.checks import NotTraced, SizeError, check_odd, check_positive
from involution.kernel_generation import stride_pool
from involution.models.staged import StagedNetwork
from involution.sequence import add_residual, sequence

HEADS = 8
QUERIES = 14  # a block of them shares its keys where the span is limited
TABLE = 509  # rows of a table, distances -254 ... 254


class AxialAttention(NotTraced, nn.Module):
    """(B, C, H, W) -> (B, C, H, W): attention along one axis, "height" or "width".

    Args:
        table: rows of the position tables; sides up to (table + 1) / 2 can be attended to.
        span: pixels that a query attends to, with itself in the middle; None: all.
    """

    def __init__(self, channels: int, axis: str, table: int, span: int | None) -> None:
        super().__init__()
        self.axis, self.span, self.table = axis, span, table
        self.qkv = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.bn_qkv = nn.BatchNorm2d(2 * channels)
        self.bn_similarity = nn.BatchNorm2d(3 * HEADS)
        self.bn_output = nn.BatchNorm2d(2 * channels)
        self.relative = nn.Parameter(torch.empty(2 * channels // HEADS, table))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(2, 3) if self.axis == "height" else x  # now along the last axis
        batch, channels, rows, length = x.shape
        depth = channels // HEADS
        qkv = self.bn_qkv(self.qkv(x)).transpose(1, 2).flatten(0, 1).unflatten(1, (HEADS, -1))
        sizes = [depth // 2, depth // 2, depth, depth % 2]  # of query, key, value; the rest has no use
        query, key, value, _ = qkv.split(sizes, 2)  # (B * rows, heads, D, length)
        query, key, value, away, outside = self._blocks(query, key, value)
        table_q, table_k, table_v, _ = self.relative.split(sizes)
        middle = self.table // 2
        to_query, to_key = away + middle, middle - away  # (queries, keys): rows of the tables
        scores = (
            torch.einsum("nhdbi,nhdbj->nhbij", query, key),
            torch.einsum("nhdbi,dij->nhbij", query, table_q[:, to_query]),
            torch.einsum("nhdbj,dij->nhbij", key, table_k[:, to_key]),
        )
        similarity = self.bn_similarity(torch.cat(scores, 1).flatten(2, 3)).unflatten(1, (3, HEADS)).sum(1)
        weights = similarity.unflatten(2, scores[0].shape[2:4]).masked_fill(outside, float("-inf")).softmax(4)
        content = torch.einsum("nhbij,nhdbj->nhdbi", weights, value)
        position = torch.einsum("nhbij,dij->nhdbi", weights, table_v[:, to_query])
        sums = torch.stack([content, position], 3).flatten(4)[..., :length].flatten(1, 3)  # two neighbours a channel
        y = self.bn_output(sums.unflatten(0, (batch, rows)).transpose(1, 2)).unflatten(1, (channels, 2)).sum(2)
        return y.transpose(2, 3) if self.axis == "height" else y

    def _blocks(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries (N, heads, D, blocks, queries), keys and values of each block (N, heads, D, blocks, keys), the
        distance query - key (queries, keys), and where a query does not attend (blocks, queries, keys)."""
        length, reach = query.shape[3], (query.shape[3] if self.span is None else self.span // 2)
        if length <= QUERIES + 2 * reach:  # one block
            if 2 * length - 1 > self.table:
                raise SizeError(
                    f"attention along {length} pixels; the position tables reach {(self.table + 1) // 2}. "
                    "Make the model with a larger image_size"
                )
            place = torch.arange(length, device=query.device)
            away = place[:, None] - place
            return query.unsqueeze(3), key.unsqueeze(3), value.unsqueeze(3), away, (away.abs() > reach)[None]
        padding = -length % QUERIES
        query = F.pad(query, (0, padding)).unflatten(3, (-1, QUERIES))
        key, value = (F.pad(t, (reach, reach + padding)).unfold(3, QUERIES + 2 * reach, QUERIES) for t in (key, value))
        queries = torch.arange(QUERIES, device=query.device)
        keys = torch.arange(QUERIES + 2 * reach, device=query.device) - reach
        away = queries[:, None] - keys
        first = QUERIES * torch.arange(query.shape[3], device=query.device)[:, None]
        places, added = first + keys, (first + queries >= length)[:, :, None]  # queries made up, which may see all
        outside = ~added & ((away.abs() > reach) | ((places < 0) | (places >= length))[:, None])
        return query, key, value, away, outside

    def products(self, x: Tensor, output: Tensor) -> int:
        """Scores and sums; with a limited span for the keys of a block of queries, as the paper counts."""
        length = x.shape[2] if self.axis == "height" else x.shape[3]
        keys = length if self.span is None else QUERIES + 2 * (self.span // 2)
        return int(3.5 * x.numel() * keys)


class AxialBlock(nn.Module):
    """1x1 convolution to ``width``, attention along both axes, pooling by the stride, 1x1 convolution."""

    def __init__(
        self, in_channels: int, width: int, out_channels: int, stride: int, table: int, span: int | None
    ) -> None:
        super().__init__()
        self.conv_down = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.height = AxialAttention(width, "height", table, span)
        self.width = AxialAttention(width, "width", table, span)
        self.pool = stride_pool(stride)
        self.act2 = nn.ReLU(inplace=True)
        self.conv_up = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = sequence(x, self.conv_down, self.bn1, self.act1, self.height, self.width)
        y = self.conv_up(self.act2(self.pool(y)))
        return add_residual(y, self.bn2, self.act3, x, self.downsample)


class ConvolutionStem(nn.Sequential):
    """7x7 convolution of stride 2, BatchNorm, ReLU."""

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)


class AxialResNet(StagedNetwork):
    """Axial ResNet with ``depths`` blocks in its four stages, of 128, 256, 512 and 1024 channels times ``scale``.

    Args:
        stem: "axial", three blocks, or "convolution", ResNet's.
        num_classes: 0 for no classifier.
        in_chans: channels of the images.
        span: pixels along an axis that a query attends to, odd; None: all.
        image_size: pixels a side of the largest images, where the span is all.
        zero_init_residual: the last BatchNorm of every residual branch starts at 0, as in the released code.
    """

    def __init__(
        self,
        depths: Sequence[int],
        scale: float,
        stem: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        span: int | None = 15,
        image_size: int = 224,
        zero_init_residual: bool = True,
    ) -> None:
        super().__init__()
        check_positive(in_chans=in_chans, image_size=image_size)
        if span is not None:
            check_odd(span=span)
        channels = int(64 * scale)

        def block(in_channels: int, width: int, out_channels: int, stride: int, reduction: int) -> AxialBlock:
            table = 2 * -(-image_size // reduction) - 1 if span is None else TABLE
            return AxialBlock(in_channels, width, out_channels, stride, table, span)

        if stem == "axial":
            first = block(in_chans, channels // 2, channels, 2, 1)
            self.stem = nn.Sequential(first, *(block(channels, channels // 2, channels, 1, 2) for _ in range(2)))
        else:
            self.stem = ConvolutionStem(in_chans, channels)
        self.maxpool = nn.Identity() if stem == "axial" else nn.MaxPool2d(3, 2, 1)
        self.feature_info = [{"module": "stem", "num_chs": channels, "reduction": 2}]
        in_channels, reduction = channels, 2 if stem == "axial" else 4
        for i, depth in enumerate(depths):
            width, target = int(128 * scale) * 2**i, 4 * 2**i
            blocks = [block(in_channels, width, 2 * width, target // reduction, reduction)]
            blocks += [block(2 * width, width, 2 * width, 1, target) for _ in range(depth - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            in_channels, reduction = 2 * width, target
            self.feature_info.append({"module": f"layer{i + 1}", "num_chs": in_channels, "reduction": target})
        self.num_features = in_channels
        self.add_classifier(num_classes)
        self._init_weights(zero_init_residual)

    def _init_weights(self, zero_init_residual: bool) -> None:
        """As the released code."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, AxialBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)
        for module in self.modules():
            if isinstance(module, AxialAttention):
                channels = module.qkv.in_channels
                nn.init.normal_(module.qkv.weight, std=channels**-0.5)
                nn.init.normal_(module.relative, std=(channels // HEADS) ** -0.5)


MODELS = {
    "axial_resnet_s": partial(AxialResNet, (3, 4, 6, 3), 0.5, "axial"),
    "axial_resnet_m": partial(AxialResNet, (3, 4, 6, 3), 0.75, "axial"),
    "axial_resnet_l": partial(AxialResNet, (3, 4, 6, 3), 1.0, "axial"),
    "axial_resnet26s": partial(AxialResNet, (1, 2, 4, 1), 0.5, "convolution", span=None),
}
