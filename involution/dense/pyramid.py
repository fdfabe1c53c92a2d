"""The feature pyramid (Lin et al., CVPR 2017), with convolutions or involutions as its output layers.

Shapes:  levels (B, C_i, H_i, W_i), each half the one before (rounded up)  ->  levels (B, width, H_i, W_i), and coarser
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from involution.layers import Involution2d

NECKS = ("convolution", "involution")
CHANNELS = 256


def spatial_layer(kind: str, argument: str, width: int = CHANNELS) -> nn.Module:
    """The layer width -> width of a neck or head: a 3x3 convolution, or the 7x7 involution that takes its place.

    Raises:
        ValueError: naming ``argument``, when ``kind`` is none of ``NECKS``.
    """
    if kind not in NECKS:
        raise ValueError(f'{argument} is {kind!r}; it should be "convolution" or "involution"')
    return Involution2d(width, 7) if kind == "involution" else nn.Conv2d(width, width, 3, padding=1)


class FeaturePyramid(nn.Module):
    """1x1 convolutions to one width, coarse levels added to finer ones, one spatial layer a level.

    There is neither norm nor activation outside the involutions' generators; the BatchNorm inside them trains.

    Args:
        in_channels: of the levels that come in.
        neck: "convolution" or "involution".
        extra: further levels. None; "subsample": one, every second pixel of the coarsest (Faster and Mask R-CNN);
            "convolution": two, 3x3 convolutions of stride 2 from the coarsest level that came in (RetinaNet).
        width: channels of every level that goes out; the paper's are 256.
    """

    def __init__(
        self, in_channels: Sequence[int], neck: str = "convolution", extra: str | None = None, width: int = CHANNELS
    ) -> None:
        super().__init__()
        self.extra = extra
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in in_channels)
        self.output = nn.ModuleList(spatial_layer(neck, "neck", width) for _ in in_channels)
        if extra == "convolution":
            self.p6 = nn.Conv2d(in_channels[-1], width, 3, 2, 1)
            self.p7 = nn.Conv2d(width, width, 3, 2, 1)
        for module in self.modules():  # as released
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        sums = [layer(x) for layer, x in zip(self.lateral, levels, strict=True)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=sums[i - 1].shape[-2:])  # nearest, to any size
        outputs = [layer(x) for layer, x in zip(self.output, sums, strict=True)]
        if self.extra == "subsample":
            outputs.append(outputs[-1][..., ::2, ::2])
        elif self.extra == "convolution":
            outputs.append(self.p6(levels[-1]))
            outputs.append(self.p7(outputs[-1]))
        return outputs
