"""What involution kernels look at: the heat maps of the paper's Figure 3.

Shapes:  B images, G groups, K kernel size, Ho x Wo output pixels of the layer, S x T pixels of the images

Each kernel is summed up by the sum of its K*K values; a heat map has these sums at all positions, for one group.
Kernels that end in a softmax, as attention's, always sum up to 1: there it is the sum of squares, from 1 / K^2, where a
pixel attends to its whole window alike, to 1, where it attends to one place only.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from involution.kernel_generation import SpanGeneration
from involution.layers import Involution2d
from involution.models.lrnet import LocalRelation
from involution.models.san import SelfAttention
from involution.models.standalone import LocalAttention

FIGURE3 = "conv3_4"  # the paper's layer
Layer = Involution2d | LocalAttention | LocalRelation | SelfAttention
IN_BLOCK = re.compile(r"layer(\d+)\.(?:(?:\d+\.)?blocks\.)?(\d+)\.(?:conv2|attention)")


def involutions(model: nn.Module) -> dict[str, Layer]:
    """The involutions of a model, self-attention written as one among them: in the residual blocks by the paper's
    names, elsewhere by their module's path.

    conv2_1 is the first block of the first stage (``layer1.0``), conv3_4 the fourth of the next (``layer2.3``).
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Layer):
            block = IN_BLOCK.fullmatch(path)
            found[f"conv{int(block[1]) + 1}_{int(block[2]) + 1}" if block else path] = module
    return found


def find_layer(model: nn.Module, layer: str | None = None) -> str | None:
    """The name of the layer to look at: `layer`, or Figure 3's, or where a model is too shallow for that the last of
    the same stage, or the last of all. None for a model without involutions.

    Raises:
        ValueError: the model has no such layer; the message lists those it has.
    """
    names = list(involutions(model))
    if layer is None:
        same_stage = [name for name in names if name.startswith(FIGURE3[:-1])]
        return FIGURE3 if FIGURE3 in names else next(reversed(same_stage or names), None)
    if layer in names:
        return layer
    raise ValueError(
        f"there is no involution layer {layer}; "
        + (f"this model has {', '.join(names)}" if names else "this model has no involutions at all")
    )


def kernel_sums(layer: Layer, x: Tensor) -> Tensor:
    """The sums over the K*K values, or squares, of each kernel that `layer` makes: (B, C, H, W) -> (B, G, Ho, Wo).

    The kernels of the built-in generators are linear in what precedes their last convolution, so its weights are summed
    up instead: the kernels themselves are never made.
    """
    generation = getattr(layer, "kernel_generation", layer)
    if not isinstance(generation, SpanGeneration):
        kernel = layer.kernel(x)
        return (kernel.square() if getattr(generation, "sums_to_one", False) else kernel).sum((2, 3))
    span = generation.span
    weight = span.weight.unflatten(0, (layer.groups, -1)).sum(1)
    bias = None if span.bias is None else span.bias.unflatten(0, (layer.groups, -1)).sum(1)
    return F.conv2d(generation.hidden(x), weight, bias)


@torch.no_grad()
def kernel_heat_maps(model: nn.Module, images: Tensor, layer: str | None = None) -> Tensor:
    """The heat maps of one layer, float32 (B, G, Ho, Wo). The model is left as it was: modes, buffers, random state.

    Args:
        model: any with a ``Layer`` in it.
        images: (B, 3, S, T), normalised as in training, on the model's device.
        layer: see ``find_layer``, also for the default.

    Raises:
        ValueError: the model has no such layer, or no involutions at all.
    """
    name = find_layer(model, layer)
    if name is None:
        raise ValueError("this model has no involutions, hence no kernels to show")
    sums: list[Tensor] = []
    hook = involutions(model)[name].register_forward_pre_hook(
        lambda module, args: sums.append(kernel_sums(module, *args))
    )
    try:
        with evaluating(model):
            model(images)
    finally:
        hook.remove()
    return sums[0].float()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module's own mode is restored afterwards (some may have been frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def scaled(maps: Tensor) -> Tensor:
    """Each (Ho, Wo) map stretched to [0, 1]; a map of one value alone becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)


def visible(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images (B, C, S, T) as colours (B, 3, S, T) in [0, 1].

    Of other than one or three channels the first three are shown, or the first.
    """
    shift, scale = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images * scale + shift).clamp(0, 1)[:, : 3 if images.shape[1] >= 3 else 1].expand(-1, 3, -1, -1)


def heat_map_picture(
    images: Tensor, maps: Tensor, mean: Sequence[float], std: Sequence[float], groups: int = 8
) -> Tensor:
    """Figure 3 as one picture (3, B*(S+1)-1, (1+groups)*(T+1)-1) in [0, 1]: a row an image, beside it its heat maps.

    Blue is a map's lowest value, red its highest.

    Args:
        images: (B, C, S, T) normalised with `mean` and `std`, in units of [0, 1]; see `visible`.
        maps: (B, G, Ho, Wo), of which the first `groups` are shown.
    """
    maps = F.interpolate(scaled(maps[:, :groups]), images.shape[-2:], mode="bilinear", align_corners=False)
    colours = (1.5 - (4 * maps[:, :, None] - maps.new_tensor([3, 2, 1])[:, None, None]).abs()).clamp(0, 1)
    rows = torch.cat([visible(images, mean, std)[:, None], colours.to(images.dtype)], 1)
    framed = F.pad(rows, (0, 1, 0, 1), value=1.0)  # (B, 1 + groups, 3, S + 1, T + 1)
    return framed.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[:, :-1, :-1]
