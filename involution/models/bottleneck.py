"""What RedNet and ResNet share: a network of bottlenecks, open in its stem and in the spatial layer of a block.

Resolution of an H x W image:  stem H/2 -> max pool H/4 -> layer1 H/4 -> layer2 H/8 -> layer3 H/16 -> layer4 H/32
Channels after them:                64             64             256          512          1024         2048
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from involution.checks import check_positive, check_share
from involution.models.staged import StagedNetwork
from involution.sequence import add_residual, sequence

EXPANSION = 4
STAGE_WIDTHS = (64, 128, 256, 512)
#: blocks of the four stages
DEPTHS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

#: (channels, stride, dilation) -> the layer between a block's two 1x1 convolutions
SpatialLayer = Callable[[int, int, int], nn.Module]


class ConvolutionStem(nn.Module):
    """ResNet's stem: one 7x7 convolution of stride 2 to 64 channels."""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        check_positive(in_chans=in_chans)
        self.conv1 = nn.Conv2d(in_chans, STAGE_WIDTHS[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGE_WIDTHS[0])
        self.act1 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return sequence(x, self.conv1, self.bn1, self.act1)


class Bottleneck(nn.Module):
    """1x1 convolution to ``width``, the spatial layer with the stride, 1x1 to ``out_channels`` (None: 4 ``width``)."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        dilation: int,
        spatial: SpatialLayer,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        out_channels = width * EXPANSION if out_channels is None else out_channels
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = spatial(width, stride, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.act3 = nn.ReLU(inplace=True)
        self.drop_path_rate = 0.0  # share of the samples that a training step leaves without the branch

    def forward(self, x: Tensor) -> Tensor:
        branch = sequence(x, self.conv1, self.bn1, self.act1, self.conv2, self.bn2, self.act2, self.conv3)
        if self.training and self.drop_path_rate:
            return self.act3(drop_path(self.bn3(branch), self.drop_path_rate) + self.downsample(x))
        return add_residual(branch, self.bn3, self.act3, x, self.downsample)


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """Stochastic depth (Huang et al., 2016): zero for a random share of the samples, more for the others."""
    kept = branch.new_empty(branch.shape[0], 1, 1, 1).bernoulli_(1 - rate)
    return branch * (kept / (1 - rate))


class BottleneckNetwork(StagedNetwork):
    """Stem, max pooling, four stages of bottlenecks, global pooling, linear classifier.

    Args:
        stem: maps images to 64 channels at half their resolution.
        block: makes a bottleneck from (in_channels, width, stride, dilation).
        depths: blocks of the four stages.
        num_classes: 0 for no classifier (the pooled features come out).
        output_stride: 32, 16 or 8. Below 32 the last stages keep their resolution and dilate instead.
        zero_init_residual: start the last BatchNorm of every residual branch at 0, so that each block is the identity
            at first. The released configuration does so; the paper's text does not say.
        drop_path_rate: of stochastic depth in the last block, in the ones before it in proportion; the first has none.
        drop_rate: of dropout in front of the classifier.
        global_pool: "avg", "max", "avgmax" (their mean), "" for none.

    ``feature_info`` lists the five levels of a feature pyramid: module name, channels and stride.
    """

    def __init__(
        self,
        stem: nn.Module,
        block: Callable[[int, int, int, int], Bottleneck],
        depths: Sequence[int],
        num_classes: int = 1000,
        output_stride: int = 32,
        zero_init_residual: bool = True,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        check_share(drop_path_rate=drop_path_rate)
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {output_stride!r}; it should be 8, 16 or 32")
        self.stem = stem
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.feature_info: list[dict[str, Any]] = [{"module": "stem", "num_chs": STAGE_WIDTHS[0], "reduction": 2}]
        in_channels, net_stride, dilation = STAGE_WIDTHS[0], 4, 1
        for i, (width, depth) in enumerate(zip(STAGE_WIDTHS, depths, strict=True)):
            stride, first_dilation = (1 if i == 0 else 2), dilation
            if net_stride * stride > output_stride:
                stride, dilation = 1, dilation * stride
            net_stride *= stride
            blocks = [block(in_channels, width, stride, first_dilation)]
            in_channels = width * EXPANSION
            blocks += [block(in_channels, width, 1, dilation) for _ in range(depth - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            self.feature_info.append({"module": f"layer{i + 1}", "num_chs": in_channels, "reduction": net_stride})
        self.num_features = in_channels
        self.add_classifier(num_classes, global_pool, drop_rate)
        every = [block for block in self.modules() if isinstance(block, Bottleneck)]
        for i, each in enumerate(every):
            each.drop_path_rate = drop_path_rate * i / max(len(every) - 1, 1)
        self._init_weights(zero_init_residual)

    def _init_weights(self, zero_init_residual: bool) -> None:
        """As the released code: Kaiming normal (fan out) for every convolution, those of the generators included."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Bottleneck) and zero_init_residual:
                nn.init.zeros_(module.bn3.weight)
