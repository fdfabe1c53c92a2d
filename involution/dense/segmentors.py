"""Semantic FPN (Kirillov et al., CVPR 2019) and UPerNet (Xiao et al., ECCV 2018), as trained for Tables 4 and 5.

Shapes:  images (B, 3, H, W), of any size  ->  logits (B, num_classes, ceil(H / 4), ceil(W / 4))
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from involution.checks import check_positive
from involution.dense.backbone import LEVELS, STRIDES, build_backbone
from involution.dense.pyramid import CHANNELS, NECKS, FeaturePyramid
from involution.layers import Involution2d


def norm_relu(layer: nn.Module, channels: int) -> nn.Sequential:
    """A layer without bias, BatchNorm, ReLU."""
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def convolution(in_channels: int, channels: int, kernel_size: int) -> nn.Sequential:
    layer = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
    return norm_relu(layer, channels)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of ``like``."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class Classify(nn.Sequential):
    """Dropout of whole channels and the 1x1 convolution to logits."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))

    def init_weights(self) -> None:
        """As released."""
        nn.init.normal_(self[1].weight, std=0.01)  # type: ignore[arg-type]
        nn.init.zeros_(self[1].bias)  # type: ignore[arg-type]


class SemanticFPNHead(nn.Module):
    """Each level of the pyramid comes to the finest by 3x3 convolutions and upsampling; their sum is classified."""

    def __init__(self, num_classes: int, channels: int = 128) -> None:
        super().__init__()
        self.scales = nn.ModuleList()
        for stride in STRIDES:
            halvings = stride.bit_length() - STRIDES[0].bit_length()
            layers: list[nn.Module] = []
            for i in range(max(1, halvings)):
                layers.append(convolution(channels if i else CHANNELS, channels, 3))
                if halvings:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scales.append(nn.Sequential(*layers))
        self.classify = Classify(channels, num_classes)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        total = self.scales[0](levels[0])
        for scale, x in zip(list(self.scales)[1:], levels[1:], strict=True):
            total = total + resize(scale(x), total)  # sizes that are no multiple of 32 end up a pixel off
        return self.classify(total)


class UPerHead(nn.Module):
    """Pyramid pooling on C5, a feature pyramid with BatchNorm and ReLU, and all its levels fused at the finest.

    ``neck="involution"`` puts an involution in the place of each 3x3 output convolution, which the paper did not try.
    """

    def __init__(self, num_classes: int, neck: str, channels: int = 512, pools: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        *finer, coarsest = LEVELS
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), convolution(coarsest, channels, 1)) for size in pools
        )
        self.bottleneck = convolution(coarsest + len(pools) * channels, channels, 3)
        self.lateral = nn.ModuleList(convolution(c, channels, 1) for c in finer)
        self.output = nn.ModuleList(
            norm_relu(Involution2d(channels, 7), channels)
            if neck == "involution"
            else convolution(channels, channels, 3)
            for _ in finer
        )
        self.fuse = convolution(len(LEVELS) * channels, channels, 3)
        self.classify = Classify(channels, num_classes)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        *finer, coarsest = levels
        pooled = [resize(pool(coarsest), coarsest) for pool in self.pools]
        sums = [layer(x) for layer, x in zip(self.lateral, finer, strict=True)]
        sums.append(self.bottleneck(torch.cat([coarsest, *pooled], 1)))
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + resize(sums[i], sums[i - 1])
        outputs = [layer(x) for layer, x in zip(self.output, sums[:-1], strict=True)] + sums[-1:]
        return self.classify(self.fuse(torch.cat([resize(x, outputs[0]) for x in outputs], 1)))


class Segmentor(nn.Module):
    """What both have in common.

    Args:
        backbone: name of a network of bottlenecks, or a dictionary of its name and the options of ``Backbone``. Nothing
            is frozen unless they say so. A ResNet has the deep stem of the paper's baselines unless ``stem`` is given.
        neck: "convolution" or "involution".

    In evaluation the logits come out, in training ``{"out": logits}``, and ``"aux"`` where there is a second head.
    """

    aux_weight = 0.4  # of the auxiliary head's loss
    outputs: tuple[str, ...] = ("out",)  # in training
    classifiers: tuple[str, ...] = ("head.classify",)  # which start afresh where weights are for other classes
    pools_to_a_pixel = False  # and normalises it: with one image a batch there would be nothing to normalise over

    def __init__(self, num_classes: int, backbone: str | Mapping[str, Any], neck: str) -> None:
        super().__init__()
        check_positive(num_classes=num_classes)
        if neck not in NECKS:
            raise ValueError(f'neck is {neck!r}; it should be "convolution" or "involution"')
        name = backbone if isinstance(backbone, str) else str(backbone.get("name"))
        self.num_classes = num_classes
        self.backbone = build_backbone(backbone, **{"stem": "deep"} if name.startswith("resnet") else {})

    def _init_head(self, head: nn.Module) -> nn.Module:
        """As released: Kaiming normal (fan out), the classifier from a normal distribution of deviation 0.01."""
        for module in head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in head.modules():
            if isinstance(module, Classify):
                module.init_weights()
        return head


class SemanticFPN(Segmentor):
    """Semantic FPN; with RedNet-50 and involution neck 16.4 M parameters and 79.2 mIoU on Cityscapes in the paper."""

    def __init__(
        self, num_classes: int = 19, backbone: str | Mapping[str, Any] = "rednet50", neck: str = "convolution"
    ) -> None:
        super().__init__(num_classes, backbone, neck)
        self.neck = FeaturePyramid(LEVELS, neck)
        self.head = self._init_head(SemanticFPNHead(num_classes))

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        logits = self.head(self.neck(self.backbone(x)))
        return {"out": logits} if self.training else logits


class UPerNet(Segmentor):
    """UPerNet, in training with an auxiliary head on C4; with RedNet-50 56.4 M parameters, 80.6 mIoU in the paper."""

    outputs = ("out", "aux")
    classifiers = ("head.classify", "auxiliary.1")
    pools_to_a_pixel = True

    def __init__(
        self, num_classes: int = 19, backbone: str | Mapping[str, Any] = "rednet50", neck: str = "convolution"
    ) -> None:
        super().__init__(num_classes, backbone, neck)
        self.head = self._init_head(UPerHead(num_classes, neck))
        self.auxiliary = self._init_head(nn.Sequential(convolution(LEVELS[2], 256, 3), Classify(256, num_classes)))

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        levels = self.backbone(x)
        logits = self.head(levels)
        return {"out": logits, "aux": self.auxiliary(levels[2])} if self.training else logits
