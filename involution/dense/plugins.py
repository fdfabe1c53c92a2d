"""The attention blocks that Table 7 compares involution with, as parts of a ResNet inside a detector.

NL: Wang et al., CVPR 2018. RCCA: Huang et al., ICCV 2019. GC: Cao et al., ICCVW 2019. DCN: Dai et al., ICCV 2017,
and Zhu et al., CVPR 2019. The fifth of the table, DGMN, is not here. What a block adds starts at 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from involution.checks import unknown_name
from involution.dense.backbone import LEVELS, Backbone
from involution.models.bottleneck import Bottleneck


class NonLocal(nn.Module):
    """Softmax attention of all pixels to all (embedded Gaussian) with half the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.out = nn.Conv2d(channels // 2, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (f(x).flatten(2).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return x + self.norm(self.out(y.transpose(1, 2).unflatten(2, x.shape[-2:])))

    def products(self, x: Tensor, output: Tensor) -> int:
        """Multiply-adds of the attention: see ``involution.complexity``."""
        pixels = x.shape[2] * x.shape[3]
        return 2 * len(x) * pixels**2 * self.query.out_channels


class CrissCross(nn.Module):
    """Attention of a pixel to its row and column, twice with the same weights, so that all pixels are reached."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Conv2d(channels, channels // 8, 1) for _ in range(2))
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self._once(self._once(x))

    def _once(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        height = x.shape[2]
        column = torch.einsum("bchw,bciw->bhwi", query, key)
        itself = torch.eye(height, dtype=torch.bool, device=x.device)[:, None]  # is in its row already
        row = torch.einsum("bchw,bchj->bhwj", query, key)
        weights = torch.cat([column.masked_fill(itself, float("-inf")), row], 3).softmax(3)
        y = torch.einsum("bhwi,bciw->bchw", weights[..., :height], value)
        return x + self.gamma * (y + torch.einsum("bhwj,bchj->bchw", weights[..., height:], value))

    def products(self, x: Tensor, output: Tensor) -> int:
        """Multiply-adds of the attention, of both passes."""
        batch, channels, height, width = x.shape
        return 2 * batch * height * width * (height + width) * (self.query.out_channels + channels)


class GlobalContext(nn.Module):
    """One vector for the image, pooled by attention, through a bottleneck (r = 16), added to every pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = channels // 16
        self.attention = nn.Conv2d(channels, 1, 1)
        self.reduce, self.expand = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1)
        self.norm = nn.LayerNorm([reduced, 1, 1])
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        weights = self.attention(x).flatten(2).softmax(2)
        context = (x.flatten(2) @ weights.transpose(1, 2))[..., None]
        return x + self.expand(self.norm(self.reduce(context)).relu())

    def products(self, x: Tensor, output: Tensor) -> int:
        """Multiply-adds of the pooling."""
        return x.numel()


class Deformable(nn.Module):
    """A convolution whose taps move by what another convolution says; ``modulated`` weighs them too (version 2)."""

    def __init__(self, convolution: nn.Conv2d, modulated: bool) -> None:
        super().__init__()
        self.convolution = convolution
        taps = convolution.weight[0, 0].numel()
        self.shifts = 2 * taps
        channels = self.shifts + taps * modulated
        size, stride, padding = convolution.kernel_size, convolution.stride, convolution.padding
        self.offset = nn.Conv2d(convolution.in_channels, channels, size, stride, padding)  # type: ignore[arg-type]
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        moved, c = self.offset(x), self.convolution
        mask = moved[:, self.shifts :].sigmoid() if moved.shape[1] > self.shifts else None
        dtype = torch.promote_types(x.dtype, torch.float32)  # there is no bfloat16
        tensors = x, moved[:, : self.shifts], c.weight, c.bias, mask
        *wide, mask = (None if t is None else t.to(dtype) for t in tensors)
        return deform_conv2d(*wide, c.stride, c.padding, c.dilation, mask).to(x.dtype)  # type: ignore[arg-type]

    def products(self, x: Tensor, output: Tensor) -> int:
        """Multiply-adds of the convolution, which is not called as a layer; the sampling is not counted."""
        return output.numel() * self.convolution.weight[0].numel()


PLUGINS = ("nl", "rcca", "gc", "dcn", "dcn_v2")


def add(backbone: Backbone, plugin: str) -> None:
    """Put a block where its paper has it: nl and rcca before the last bottleneck of C4, gc after the last BatchNorm of
    each bottleneck of C5, dcn and dcn_v2 (modulated) in place of its 3x3 convolution.

    Raises:
        ValueError: an unknown name, or a backbone without such convolutions.
    """
    if plugin not in PLUGINS:
        raise ValueError(unknown_name("plugin", plugin, PLUGINS))
    if plugin in ("nl", "rcca"):
        block = NonLocal(LEVELS[2]) if plugin == "nl" else CrissCross(LEVELS[2])
        backbone.layer3.insert(len(backbone.layer3) - 1, block)
    for bottleneck in backbone.layer4:
        assert isinstance(bottleneck, Bottleneck)
        if plugin == "gc":
            bottleneck.bn3 = nn.Sequential(bottleneck.bn3, GlobalContext(LEVELS[3]))  # type: ignore[assignment]
        elif plugin.startswith("dcn"):
            if not isinstance(bottleneck.conv2, nn.Conv2d):
                raise ValueError(f"plugin is {plugin!r}, which needs the 3x3 convolutions of a ResNet as backbone")
            bottleneck.conv2 = Deformable(bottleneck.conv2, modulated=plugin == "dcn_v2")
    for name in backbone.frozen:  # with what is new in them
        getattr(backbone, name).requires_grad_(False)
    backbone.train(backbone.training)
