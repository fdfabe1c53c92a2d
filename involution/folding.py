"""Models made faster for inference: BatchNorm in the layers in front of it, an involution layer as one operator."""

import copy
import warnings
from collections.abc import Callable
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from involution.calls import Calls
from involution.checks import NotScripted, first_line
from involution.kernel_generation import BottleneckGeneration, is_pointwise
from involution.layers import Involution2d
from involution.models.bottleneck import Bottleneck
from involution.ops import bottleneck, folded
from involution.unwatched import as_it_seems, unchanged


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


class FoldedBottleneck(NotScripted, nn.Module):
    """What a bottleneck of folded layers does: (B, M, H, W) -> (B, N, Ho, Wo)."""

    packed: Tensor

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        narrow, layer, widen = block.conv1, cast("FoldedInvolution2d", block.conv2), block.conv3
        skip = cast("nn.Conv2d", block.downsample[0]) if isinstance(block.downsample, nn.Sequential) else None
        self.register_buffer("packed", bottleneck.pack(narrow, layer.packed, widen, skip).detach())
        self.width, self.out_channels = narrow.out_channels, widen.out_channels
        self.hidden, self.groups, self.projected = layer.hidden, layer.groups, skip is not None
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        window = self.kernel_size, self.stride, self.dilation
        sizes = self.width, self.out_channels, int(self.projected), self.hidden, self.groups
        return bottleneck.folded_bottleneck2d(x, self.packed, *sizes, *window)

    def extra_repr(self) -> str:
        """The arguments."""
        names = ("width", "out_channels", "projected", "hidden", "groups")
        return ", ".join(f"{name}={getattr(self, name)}" for name in (*names, "kernel_size", "stride", "dilation"))


def fold(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, in evaluation mode, with the same outputs but for rounding.

    A convolution takes up the BatchNorm that alone reads its output; an ``Involution2d`` of the default kernel
    generation takes up BatchNorm and ReLU and becomes one operator; where the model is on the CPU, so does a whole
    bottleneck of these. Who reads whose output is seen by ``torch.fx``, for the model as it is now and any optional
    arguments. Modules that are called twice, hooked, parametrised or otherwise changed stay as they are, and so does a
    model that torch.fx cannot trace or that decides by an argument what it runs, with a warning. Fold first, compile
    then: ``torch.compile(fold(model))``.
    """
    return _join_bottlenecks(fold_layers(model))


def fold_layers(model: nn.Module) -> nn.Module:
    """``fold`` without whole bottlenecks: what other programs than torch run best."""
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
        stacklevel=3,
    )
    return model


def fold_parts(model: nn.Module, by: Callable[[nn.Module], nn.Module] = fold) -> nn.Module:
    """``fold``, or another of these, and where it leaves the whole as it is, that of each child; it does not say what
    stays."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = by(model)
        if told:
            for name, child in found.named_children():
                setattr(found, name, by(child))
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


def _join_bottlenecks(model: nn.Module) -> nn.Module:
    """Of a folded model, with the bottlenecks that only their own forward uses as one operator each."""
    blocks = {path: block for path, block in model.named_modules() if isinstance(block, Bottleneck) and _joins(block)}
    if not blocks:
        return model
    joined = copy.deepcopy(model, {id(block): FoldedBottleneck(block) for block in blocks.values()})
    try:
        before, after = (_called(m, tuple(blocks)) for m in (model, joined))
    except Exception:  # somebody takes a block apart
        return model
    return joined if after == before else model


def _called(model: nn.Module, blocks: tuple[str, ...]) -> list[str]:
    """The layers that are called, the one behind the other; instead of those in a block, once, the block."""
    paths = [
        next((block for block in blocks if f"{node.target}.".startswith(f"{block}.")), str(node.target))
        for node in Calls(model, (Involution2d, FoldedInvolution2d, FoldedBottleneck)).nodes
        if node.op == "call_module"
    ]
    return [path for path, _ in groupby(paths)]


def _joins(block: Bottleneck) -> bool:
    layer, skip = block.conv2, block.downsample
    if not (as_it_seems(block, Bottleneck) and type(layer) is FoldedInvolution2d and unchanged(layer)):
        return False
    convs: list[tuple[nn.Module, int]] = [(block.conv1, 1), (block.conv3, 1)]
    if isinstance(skip, nn.Sequential):
        if not as_it_seems(skip, nn.Sequential):
            return False
        convs.append((skip[0], layer.stride))
    elif layer.stride != 1 or block.conv1.in_channels != block.conv3.out_channels:
        return False
    gone = block.bn1, block.bn2, block.act2, block.bn3, *([*skip][1:] if isinstance(skip, nn.Sequential) else [skip])
    return (
        all(is_pointwise(conv, stride) for conv, stride in convs)
        and all(as_it_seems(module, nn.Identity) for module in gone)
        and all(as_it_seems(act, nn.ReLU) for act in (block.act1, block.act3))
        and {(t.device.type, t.dtype) for t in (*block.parameters(), layer.packed)} == {("cpu", layer.packed.dtype)}
        and not block.conv1.out_channels % folded.PANEL
        and not block.conv3.out_channels % folded.PANEL
    )


def _as_built(layer: Involution2d) -> bool:
    generation = layer.kernel_generation
    if not as_it_seems(layer, Involution2d) or not isinstance(generation, BottleneckGeneration):
        return False
    return generation.as_built(layer.stride) and generation.norm.running_mean is not None
