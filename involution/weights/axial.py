"""Axial ResNets: the names of csrhddlam/axial-deeplab's released files, and options read off the tensors' shapes."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: a tensor that each of them has: in released files, and here
ELSEWHERE = "layer1.0.hight_block.relative"
OURS = "layer1.0.height.relative"

_STEM = {"conv1": "stem.conv1", "bn1": "stem.bn1"}
_BLOCK = {"hight_block": "height", "width_block": "width", "qkv_transform": "qkv"}


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state (without the prefix of a wrapper) as ours: one-dimensional convolutions become 1x1."""
    kept = {key: value for key, value in state.items() if not key.endswith(".flatten_index")}
    return {_ours(key): value.unsqueeze(3) if ".qkv_transform." in key else value for key, value in kept.items()}


def _ours(key: str) -> str:
    name, _, leaf = key.rpartition(".")
    if name.startswith("layer"):
        return ".".join([*(_BLOCK.get(part, part) for part in name.split(".")), leaf])
    return f"{_STEM.get(name, name)}.{leaf}"


def describe(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Name and options of the Axial ResNet that has these weights (our names).

    Raises:
        ValueError: they are those of none.
    """
    blocks = sum(1 for key in state if re.fullmatch(r"layer\d\.\d+\.conv_down\.weight", key))
    options: dict[str, Any] = {"num_classes": len(state["fc.weight"]) if "fc.weight" in state else 0}
    if "stem.conv1.weight" in state and blocks == 8:
        # tables of 2 L - 1 rows, L the last stage's side, 1/32 of the image
        size = 32 * ((state["layer4.0.height.relative"].shape[1] + 1) // 4)
        return "axial_resnet26s", options | {"in_chans": state["stem.conv1.weight"].shape[1], "image_size": size}
    widths = {64: "s", 96: "m", 128: "l"}
    width = state["layer1.0.conv_down.weight"].shape[0]
    if "stem.0.conv_down.weight" not in state or blocks != 16 or width not in widths:
        raise ValueError(f"these weights are of an Axial ResNet of {blocks} blocks and {width} channels: no known one")
    return f"axial_resnet_{widths[width]}", options | {"in_chans": state["stem.0.conv_down.weight"].shape[1]}
