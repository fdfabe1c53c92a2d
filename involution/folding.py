"""Models made faster for inference: BatchNorm in the layers in front of it, an involution layer as one operator."""

import copy
import warnings
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from involution.calls import Calls
from involution.checks import NotScripted, first_line
from involution.kernel_generation import BottleneckGeneration
from involution.layers import Involution2d
from involution.ops import folded
from involution.unwatched import as_it_seems


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

    A convolution takes up the BatchNorm that alone reads its output; an ``Involution2d`` of the default kernel
    generation takes up BatchNorm and ReLU and becomes one operator. Who reads whose output is seen by ``torch.fx``, for
    the model as it is now and any optional arguments. Modules that are called twice, hooked, parametrised or otherwise
    changed stay as they are, and so does a model that torch.fx cannot trace or that decides by an argument what it
    runs, with a warning. Fold first, compile then: ``torch.compile(fold(model))``.
    """
    model = copy.deepcopy(model).eval()
    try:
        calls = Calls(model)
        found = _replaced(model, calls)
        if Calls(found, (Involution2d, FoldedInvolution2d)).order() == calls.order():
            return found
        reason = "it calls other modules once some are replaced"
    except Exception as error:  # whatever a forward does with symbolic values
        reason = first_line(error)
    warnings.warn(
        f"{type(model).__name__} is not folded: torch.fx cannot tell the order of its layers ({reason}); fold parts of "
        "it, as in model.backbone = fold(model.backbone)",
        stacklevel=2,
    )
    return model


def fold_parts(model: nn.Module) -> nn.Module:
    """``fold``, and where it leaves the whole as it is, ``fold`` of each child; it does not say what stays."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = fold(model)
        if told:
            for name, child in found.named_children():
                setattr(found, name, fold(child))
    return found


def _replaced(model: nn.Module, calls: Calls) -> nn.Module:
    """A copy with every replacement under each of the names of what it stands for."""
    found: dict[nn.Module, nn.Module] = {}
    always = calls.chains()
    if calls.optional:
        for_any_arguments = set(Calls(model, any_arguments=True).chains())
        always = (chain for chain in always if chain in for_any_arguments)
    for layer, norm, act in always:
        if isinstance(layer, nn.Conv2d) and as_it_seems(layer, nn.Conv2d):
            found |= {layer: fuse_conv_bn_eval(layer, norm), norm: nn.Identity()}
        elif isinstance(layer, Involution2d) and act is not None and norm.affine and _as_built(layer):
            found |= {layer: FoldedInvolution2d(layer, norm), norm: nn.Identity()}
            if calls.once(act):  # another one stays: a ReLU twice is a ReLU
                found[act] = nn.Identity()
    return copy.deepcopy(model, {id(module): other for module, other in found.items()})


def _as_built(layer: Involution2d) -> bool:
    generation = layer.kernel_generation
    if not as_it_seems(layer, Involution2d) or not isinstance(generation, BottleneckGeneration):
        return False
    return generation.as_built(layer.stride) and generation.norm.running_mean is not None
