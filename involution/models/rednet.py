"""RedNet: ResNet's bottlenecks with the 3x3 convolution replaced by a 7x7 involution (Section 3.2).

RedNet-26/38/50/101/152 have 9.233 / 12.387 / 15.541 / 25.653 / 33.985 M parameters with 1000 classes. The paper
states 1.7 / 2.2 / 2.7 / 4.7 / 6.8 G FLOPs and 75.9 / 77.6 / 78.4 / 79.1 / 79.3 % top-1.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from involution.checks import check_odd, check_positive
from involution.layers import Involution2d
from involution.models.bottleneck import DEPTHS, STAGE_WIDTHS, Bottleneck, BottleneckNetwork, ConvolutionStem
from involution.sequence import sequence


class InvolutionStem(nn.Module):
    """The stem as a bottleneck: 3x3 convolution of stride 2 to 32 channels, involution, 3x3 convolution to 64."""

    def __init__(self, in_chans: int, kernel_size: int, involution: dict[str, Any]) -> None:
        super().__init__()
        check_positive(in_chans=in_chans)
        check_odd(stem_kernel_size=kernel_size)
        width, group = STAGE_WIDTHS[0] // 2, involution["group_channels"]
        if group not in (None, *(divisors := [n for n in range(1, width + 1) if width % n == 0])):
            raise ValueError(
                f"group_channels={group} does not divide the stem's {width} channels: take one of "
                f"{', '.join(map(str, divisors))}, None (null on the command line) for all of them, or "
                f'{2 * width} with stem="convolution"'
            )
        self.conv1 = nn.Conv2d(in_chans, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = Involution2d(width, kernel_size, **involution)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, STAGE_WIDTHS[0], 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(STAGE_WIDTHS[0])
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.conv1, self.bn1, self.act1, self.conv2, self.bn2, self.act2, self.conv3, self.bn3, self.act3
        return sequence(x, *layers)


class RedNet(BottleneckNetwork):
    """RedNet with ``depths`` blocks in its four stages.

    Args:
        num_classes: 0 for no classifier.
        in_chans: channels of the images.
        kernel_size: of the trunk's involutions (Table 6a).
        group_channels: channels that share a kernel, in trunk and stem; None for all (Table 6b).
        reduction_ratio: of the kernel generation, in trunk and stem (Table 6c).
        kernel_generation: "bottleneck", "linear" (Table 6c), "attention", "position" (Section 4.2), in trunk and stem.
        kernel_activation: None, "softmax" or "sigmoid" (Section 5.2), in trunk and stem.
        stem: "involution" (default) or "convolution", ResNet's 7x7 of stride 2 (Table 6's ablations).
        stem_kernel_size: of the stem's involution; the paper takes 7 for dense prediction.
        output_stride, zero_init_residual, drop_path_rate, drop_rate, global_pool: see ``BottleneckNetwork``.
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        kernel_size: int = 7,
        group_channels: int | None = 16,
        reduction_ratio: int = 4,
        kernel_generation: str = "bottleneck",
        kernel_activation: str | None = None,
        stem: str = "involution",
        stem_kernel_size: int = 3,
        output_stride: int = 32,
        zero_init_residual: bool = True,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        involution: dict[str, Any] = {
            "group_channels": group_channels,
            "reduction_ratio": reduction_ratio,
            "kernel_generation": kernel_generation,
            "kernel_activation": kernel_activation,
        }

        def spatial(channels: int, stride: int, dilation: int) -> nn.Module:
            return Involution2d(channels, kernel_size, stride, dilation, **involution)

        if stem == "involution":
            stem_module: nn.Module = InvolutionStem(in_chans, stem_kernel_size, involution)
        elif stem == "convolution":
            stem_module = ConvolutionStem(in_chans)
        else:
            raise ValueError(f'stem is {stem!r}; it should be "involution" or "convolution"')
        block = partial(Bottleneck, spatial=spatial)
        super().__init__(
            stem_module, block, depths, num_classes, output_stride, zero_init_residual,
            drop_path_rate=drop_path_rate, drop_rate=drop_rate, global_pool=global_pool,
        )  # fmt: skip


MODELS = {f"rednet{number}": partial(RedNet, depths) for number, depths in DEPTHS.items()}
