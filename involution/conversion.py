"""A network of one's own with its K x K convolutions turned into involutions."""

import copy
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize

from involution.checks import check_positive
from involution.complexity import count
from involution.layers import Involution2d


@dataclass
class Change:
    """One convolution of more than one pixel: what becomes of it."""

    name: str
    before: nn.Conv2d
    after: nn.Module | None  # None: it is left
    reason: str = ""  # why it is left

    def __str__(self) -> str:
        conv = self.before
        shape = f"{conv.in_channels} -> {conv.out_channels}, {' x '.join(map(str, conv.kernel_size))}"
        if self.after is None:
            return f"{self.name}: {shape}: left ({self.reason})"
        layer = next(each for each in self.after.modules() if isinstance(each, Involution2d))
        front = "" if layer is self.after else "1 x 1 convolution, "
        size = f"{layer.kernel_size} x {layer.kernel_size}"
        return f"{self.name}: {shape} -> {front}involution {size}, {layer.group_channels} channels a group"


@dataclass
class Conversion:
    """What ``convert`` does to a network; ``str()`` lists it."""

    changes: list[Change]
    params: tuple[int, int] = (0, 0)  # before and after
    flops: tuple[int, int] | None = None  # of one image of ``input_size``, counted as the paper does
    input_size: tuple[int, int, int] | None = field(default=None, repr=False)

    @property
    def converted(self) -> list[str]:
        """Names of the convolutions that become involutions."""
        return [change.name for change in self.changes if change.after is not None]

    def __str__(self) -> str:
        lines = [str(change) for change in self.changes]
        lines.append(f"{len(self.converted)} of {len(self.changes)} convolutions become involutions")
        lines.append("parameters: {:.3f} M -> {:.3f} M".format(*(n / 1e6 for n in self.params)))
        if self.flops is not None and self.input_size is not None:
            before, after = (n / 1e9 for n in self.flops)
            size = " x ".join(map(str, self.input_size))
            lines.append(f"FLOPs of an image {size}: {before:.3f} G -> {after:.3f} G")
        return "\n".join(lines)


def convert(
    module: nn.Module,
    kernel_size: int | None = 7,
    *,
    group_channels: int | None = 16,
    reduction_ratio: int = 4,
    kernel_generation: str = "bottleneck",
    kernel_activation: str | None = None,
    grouped: bool = False,
    skip: Sequence[str] = (),
    dry_run: bool = False,
    input_size: tuple[int, int, int] | None = None,
) -> Conversion:
    """Turn the K x K convolutions (K > 1) of a network into involutions, in place.

    Each gets the convolution's name, stride and dilation; where that has other channels out than in, a 1 x 1
    convolution to them stands in front. Everything else stays as it is, and the new layers start from fresh values,
    initialised as a RedNet's. Left are convolutions whose output an involution cannot have: without the padding for
    ceil(size / stride) (patches, "valid" ones), of other strides or dilations along the two axes, not square, with a
    padding that is not zeros, parametrised ones.

    Args:
        module: a network with convolutions in it, on any device.
        kernel_size: of the involutions, odd; None for each convolution's own.
        group_channels: at most so many channels share a kernel: the largest number that divides a layer's channels.
            None: all of them.
        reduction_ratio, kernel_generation, kernel_activation: as in ``Involution2d``.
        grouped: convert grouped and depthwise convolutions too.
        skip: names of convolutions to leave, or of modules with them in it; ``*`` stands for anything.
        dry_run: change nothing, say only what would change.
        input_size: (C, H, W) of an image, to count FLOPs with: the network then runs twice, without numbers.

    Raises:
        ValueError: ``module`` is itself a convolution, a name in ``skip`` fits nothing, or an argument is impossible.
    """
    if isinstance(module, nn.Conv2d):
        raise ValueError("module is a convolution itself: convert what it is in, such as nn.Sequential(module)")
    check_positive(
        reduction_ratio=reduction_ratio, **{} if group_channels is None else {"group_channels": group_channels}
    )
    _check_skip(module, skip)

    def replacement(conv: nn.Conv2d) -> nn.Module:
        ins, outs, weight = conv.in_channels, conv.out_channels, conv.weight
        shared = max(n for n in range(1, outs + 1) if outs % n == 0 and n <= (group_channels or outs))
        size = conv.kernel_size[0] if kernel_size is None else kernel_size
        ratio = min(reduction_ratio, outs)
        window = conv.stride[0], conv.dilation[0]
        with torch.device(weight.device):
            new: nn.Module = Involution2d(outs, size, *window, shared, ratio, kernel_generation, kernel_activation)
            if ins != outs:
                new = nn.Sequential(nn.Conv2d(ins, outs, 1, bias=False), new)
        _initialise(new)
        return new.to(weight.dtype).train(conv.training).requires_grad_(weight.requires_grad)

    target = copy.deepcopy(module).to("meta") if dry_run else module
    before = count(module, input_size).flops if input_size else None
    result = Conversion([], (_parameters(module), 0), input_size=input_size)
    new: dict[nn.Module, nn.Module | None] = {}
    for name, conv in _convolutions(target):
        reason = "skipped" if _fits(name, skip) else _why_left(conv, grouped, kernel_size)
        if conv not in new:
            new[conv] = None if reason else replacement(conv)
        result.changes.append(Change(name, conv, new[conv], reason))
        if (layer := new[conv]) is not None:
            parent, _, child = name.rpartition(".")
            setattr(target.get_submodule(parent), child, layer)
    result.params = result.params[0], _parameters(target)
    if before is not None and input_size is not None:
        result.flops = before, count(target, input_size).flops
    return result


def _convolutions(module: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Those of more than one pixel, each under all its names, but none inside an involution."""
    inside = [name for name, each in module.named_modules(remove_duplicate=False) if isinstance(each, Involution2d)]
    for name, each in list(module.named_modules(remove_duplicate=False)):
        within = any(name.startswith(f"{path}.") for path in inside)
        if isinstance(each, nn.Conv2d) and each.kernel_size != (1, 1) and not within:
            yield name, each


def _why_left(conv: nn.Conv2d, grouped: bool, kernel_size: int | None) -> str:
    """Why a convolution cannot become an involution; empty if it can."""
    (k, other), (stride, *_), (dilation, *_) = conv.kernel_size, conv.stride, conv.dilation
    # timm's Conv2dSame pads for ceil(size / stride) by itself
    padded = type(conv).__name__.endswith("Same") or conv.padding == "same"
    if parametrize.is_parametrized(conv):
        return "parametrised"
    if conv.groups > 1 and not grouped:
        return "depthwise" if conv.groups == conv.in_channels else f"{conv.groups} groups"
    if k != other or len({*conv.stride}) > 1 or len({*conv.dilation}) > 1:
        return "not the same along both axes"
    if conv.padding_mode != "zeros":
        return f"{conv.padding_mode} padding"
    if not padded and conv.padding != (dilation * (k - 1) / 2,) * 2:
        return f"padding {conv.padding}, with which the size is not ceil(size / {stride})"
    if kernel_size is None and k % 2 == 0:
        return "an even kernel has no centre"
    return ""


def _check_skip(module: nn.Module, skip: Sequence[str]) -> None:
    if isinstance(skip, str):
        raise ValueError(f"skip is {skip!r}; it should be a list of names: [{skip!r}]")
    names = [name for name, _ in _convolutions(module)]
    for pattern in skip:
        if not any(_fits(name, [pattern]) for name in names):
            raise ValueError(f"skip: {pattern!r} fits none of the convolutions: {', '.join(names)}")


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, each) or fnmatch.fnmatchcase(name, f"{each}.*") for each in patterns)


def _initialise(layer: nn.Module) -> None:
    for each in layer.modules():
        if isinstance(each, nn.Conv2d):
            nn.init.kaiming_normal_(each.weight, mode="fan_out", nonlinearity="relu")
            if each.bias is not None:
                nn.init.zeros_(each.bias)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
