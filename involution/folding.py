"""Models made faster for inference: BatchNorm in the layers in front of it, an involution layer as one operator."""

import copy
import itertools
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from involution.checks import NotScripted
from involution.kernel_generation import BottleneckGeneration
from involution.layers import Involution2d
from involution.ops import folded


class FoldedInvolution2d(NotScripted, nn.Module):
    """What an ``Involution2d``, a BatchNorm and a ReLU do in evaluation: (B, C, H, W) -> (B, C, Ho, Wo)."""

    packed: Tensor

    def __init__(self, layer: Involution2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        generation = cast("BottleneckGeneration", layer.kernel_generation)
        reduce, span = fuse_conv_bn_eval(generation.reduce, generation.norm), generation.span
        scale = norm.weight * torch.rsqrt(cast("Tensor", norm.running_var) + norm.eps)
        shift = norm.bias - cast("Tensor", norm.running_mean) * scale
        self.register_buffer("packed", folded.pack(reduce, span, scale, shift).detach())
        self.hidden = reduce.out_channels
        self.groups, self.kernel_size, self.stride = layer.groups, layer.kernel_size, layer.stride
        self.dilation = layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        window = self.kernel_size, self.stride, self.dilation
        return folded.folded_involution2d(x, self.packed, self.hidden, self.groups, *window)

    def extra_repr(self) -> str:
        """The arguments."""
        names = ("hidden", "groups", "kernel_size", "stride", "dilation")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def fold(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, in evaluation mode, with the same outputs but for rounding.

    Every convolution takes up the BatchNorm right behind it; an ``Involution2d`` of the default kernel generation takes
    up BatchNorm and ReLU and becomes one operator. "Right behind" is the order in which a module registered its
    children, as in our models and in ``nn.Sequential``. Fold first, compile then: ``torch.compile(fold(model))``.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        children = list(module.named_children())
        for (name, layer), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(layer, norm))
                setattr(module, norm_name, nn.Identity())
        for (name, layer), (norm_name, norm), (act_name, act) in zip(
            children, children[1:], children[2:], strict=False
        ):
            if _generates(layer) and isinstance(norm, nn.BatchNorm2d) and isinstance(act, nn.ReLU):
                setattr(module, name, FoldedInvolution2d(cast("Involution2d", layer), norm))
                setattr(module, norm_name, nn.Identity())
                setattr(module, act_name, nn.Identity())
    return model


def _generates(layer: nn.Module) -> bool:
    return isinstance(layer, Involution2d) and isinstance(layer.kernel_generation, BottleneckGeneration)
