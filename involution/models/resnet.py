"""ResNet with bottlenecks, the baseline of Table 1: the stride sits on the 3x3 convolution, as in torchvision's.

ResNet-26/38/50/101/152 have 13.7 / 19.6 / 25.6 / 44.5 / 60.2 M parameters. The paper states 2.4 / 3.2 / 4.1 / 7.9 /
11.6 G FLOPs and 73.6 / 76.0 / 76.8 / 78.5 / 79.3 % top-1.

ResNet-50 has torchvision's parameters under torchvision's names, but for the stem's prefix ``stem.``.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from involution.models.bottleneck import DEPTHS, STAGE_WIDTHS, Bottleneck, BottleneckNetwork, ConvolutionStem


class DeepStem(nn.Sequential):
    """Three 3x3 convolutions to 32, 32 and 64 channels, the first of stride 2, each with BatchNorm and ReLU."""

    def __init__(self, in_chans: int) -> None:
        widths = (in_chans, STAGE_WIDTHS[0] // 2, STAGE_WIDTHS[0] // 2, STAGE_WIDTHS[0])
        layers: list[nn.Module] = []
        for i in range(3):
            layers.append(nn.Conv2d(widths[i], widths[i + 1], 3, 1 if i else 2, 1, bias=False))
            layers += [nn.BatchNorm2d(widths[i + 1]), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class ResNet(BottleneckNetwork):
    """ResNet with ``depths`` bottlenecks in its four stages.

    Args:
        stem: "convolution" (7x7), or "deep": the three 3x3 convolutions of Cityscapes' baselines (Tables 4 and 5).
        num_classes, output_stride, zero_init_residual, drop_path_rate, drop_rate, global_pool: of ``BottleneckNetwork``
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        stem: str = "convolution",
        output_stride: int = 32,
        zero_init_residual: bool = True,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        def spatial(channels: int, stride: int, dilation: int) -> nn.Module:
            return nn.Conv2d(channels, channels, 3, stride, dilation, dilation, bias=False)

        if stem not in ("convolution", "deep"):
            raise ValueError(f'stem is {stem!r}; it should be "convolution" or "deep"')
        stem_module = DeepStem(in_chans) if stem == "deep" else ConvolutionStem(in_chans)
        block = partial(Bottleneck, spatial=spatial)
        super().__init__(
            stem_module, block, depths, num_classes, output_stride, zero_init_residual,
            drop_path_rate=drop_path_rate, drop_rate=drop_rate, global_pool=global_pool,
        )  # fmt: skip


MODELS = {f"resnet{number}": partial(ResNet, depths) for number, depths in DEPTHS.items()}
