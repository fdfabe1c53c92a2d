"""Networks of bottlenecks: the names of RedNets' and ResNets' tensors elsewhere, and options read off their shapes."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from involution.weights import unreleased

#: a tensor that each of them has, here and elsewhere
OURS = ELSEWHERE = "layer1.0.conv1.weight"

_GENERATION = {"conv1.conv": "reduce", "conv1.bn": "norm", "conv2.conv": "span"}
#: released name within a block -> ours
_BLOCK = {f"conv2.{released}": f"conv2.kernel_generation.{ours}" for released, ours in _GENERATION.items()}
#: released name outside the blocks, without ``backbone.`` -> ours
_STEM = {
    "stem.0.conv": "stem.conv1",
    "stem.0.bn": "stem.bn1",
    **{f"stem.1.{released}": f"stem.conv2.kernel_generation.{ours}" for released, ours in _GENERATION.items()},
    "stem.2": "stem.bn2",
    "stem.4.conv": "stem.conv3",
    "stem.4.bn": "stem.bn3",
}
#: ResNets of OpenMMLab, torchvision and timm
_RESNET = {"conv1": "stem.conv1", "bn1": "stem.bn1"}


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a released RedNet (without ``backbone.``), of a torchvision or timm ResNet, or ours, as ours."""
    return {ours(key): value for key, value in state.items()}


def ours(key: str) -> str:
    """Our name of such a tensor."""
    return _rename(key, _STEM | _RESNET, _BLOCK)


def released(key: str) -> str:
    """The released RedNets' name, without ``backbone.``; the inverse of ``to_ours``."""
    return _rename(key, {ours_: name for name, ours_ in _STEM.items()}, {ours_: name for name, ours_ in _BLOCK.items()})


def _rename(key: str, stem: Mapping[str, str], block: Mapping[str, str]) -> str:
    name, _, leaf = key.rpartition(".")
    if in_block := re.fullmatch(r"(layer\d\.\d+)\.(.+)", name):
        return f"{in_block[1]}.{block.get(in_block[2], in_block[2])}.{leaf}"
    return f"{stem.get(name, name)}.{leaf}"


def describe(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Name and options of the model that has these weights (our names).

    Raises:
        ValueError: they are those of no RedNet or ResNet.
    """
    blocks = {key.rsplit(".conv1.", 1)[0] for key in state if re.fullmatch(r"layer\d\.\d+\.conv1\.weight", key)}
    number, deep = 3 * len(blocks) + 2, "stem.0.weight" in state
    try:
        options: dict[str, Any] = {
            "num_classes": state["fc.weight"].shape[0] if "fc.weight" in state else 0,
            "in_chans": state[_first_convolution(state)].shape[1],
        }
        if attention := unreleased.describe(state, number):
            return attention[0], options | attention[1]
        if "layer1.0.conv2.weight" in state:
            return f"resnet{number}", options | ({"stem": "deep"} if deep else {})
        return f"rednet{number}", options | _rednet_options(state)
    except KeyError as error:
        raise ValueError(
            f"these weights are of no RedNet or ResNet whose options their shapes tell: {error.args[0]!r} is missing"
        ) from error


def _first_convolution(state: Mapping[str, Tensor]) -> str:
    """Of a deep, an attention's, or another stem."""
    return next((key for key in ("stem.0.weight", "stem.query.weight") if key in state), "stem.conv1.weight")


def _rednet_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    options: dict[str, Any] = {"stem": "involution" if "stem.conv3.weight" in state else "convolution"}
    generation = "layer{}.0.conv2.kernel_generation"
    if f"{generation.format(4)}.reduce.weight" in state:
        options["kernel_generation"] = "bottleneck"
        options["reduction_ratio"] = 512 // state[f"{generation.format(4)}.reduce.weight"].shape[0]
    else:
        options["kernel_generation"] = "linear"
    # K*K*G rows, G = C / group_channels; K*K is odd and group_channels a power of two, so their ratio tells both
    rows = [state[f"{generation.format(i)}.span.weight"].shape[0] for i in (1, 2)]
    one_group = rows[0] == rows[1]
    group = 64 // math.gcd(rows[0], 64)
    options["group_channels"] = None if one_group else group
    options["kernel_size"] = math.isqrt(rows[0] if one_group else rows[0] * group // 64)
    if options["stem"] == "involution":
        rows_stem = state["stem.conv2.kernel_generation.span.weight"].shape[0]
        options["stem_kernel_size"] = math.isqrt(rows_stem if one_group else rows_stem * group // 32)
    return options
