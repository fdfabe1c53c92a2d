"""SANs: names and order of channels of hszhao/SAN's released files, and options read off the tensors' shapes.

There channel c of a layer uses the weights c mod G, in the operator c // 8. So the value's rows, the BatchNorm behind
it and the columns of the block's last convolution change places here, and nothing does when the model runs.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: a tensor that each of them has: in released files, and here
ELSEWHERE = "conv_in.weight"
OURS = "stem.stage.conv.weight"

SHARED = 8  # channels that share a kernel
_STEM = {"conv_in": "stem.conv1", "bn_in": "stem.bn1"}
#: released name within a block -> ours; the last convolution of the weights is conv_w.5
_BLOCK = {
    "sam.conv1": "attention.kernel_generation.query",
    "sam.conv2": "attention.kernel_generation.key",
    "sam.conv3": "attention.value",
    "sam.conv_p": "attention.kernel_generation.position",
    "sam.conv_w.0": "attention.kernel_generation.bn1",
    "sam.conv_w.2": "attention.kernel_generation.conv1",
    "sam.conv_w.3": "attention.kernel_generation.bn2",
}
_LAST = {"pairwise": "attention.kernel_generation.conv2", "patchwise": "attention.kernel_generation.span"}
_STAGE = ("stem.stage", "layer1", "layer2.1", "layer3.1", "layer4.1")
_ROWS = ("sam.conv3.weight", "sam.conv3.bias", "bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var")


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state (without its prefix ``module.``) as ours."""
    kind = "pairwise" if any(".conv_p." in key for key in state) else "patchwise"
    return {_ours(key, kind): _in_order(key, value) for key, value in state.items()}


def _ours(key: str, kind: str) -> str:
    name, _, leaf = key.rpartition(".")
    if block := re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", name):
        within = _LAST[kind] if block[3] == "sam.conv_w.5" else _BLOCK.get(block[3], block[3])
        return f"{_STAGE[int(block[1])]}.blocks.{block[2]}.{within}.{leaf}"
    if transition := re.fullmatch(r"(conv|bn)(\d)", name):
        return f"{_STAGE[int(transition[2])]}.{transition[1]}.{leaf}"
    return f"{_STEM.get(name, name)}.{leaf}"


def _in_order(key: str, value: Tensor) -> Tensor:
    in_block = re.fullmatch(r"layer\d\.\d+\.(.+)", key)
    if in_block and in_block[1] in _ROWS:
        return value[_order(len(value))]
    if in_block and in_block[1] == "conv.weight":
        return value[:, _order(value.shape[1])]
    return value


def _order(channels: int) -> Tensor:
    """Where our channels are in a released file: those of a group side by side."""
    return torch.arange(channels).view(SHARED, channels // SHARED).T.flatten()


def describe(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Name and options of the SAN that has these weights (our names).

    Raises:
        ValueError: its depth is none of 10, 15, 19.
    """
    blocks = sum(1 for key in state if re.search(r"\.blocks\.\d+\.conv\.weight$", key))
    kind = "pairwise" if any(".position." in key for key in state) else "patchwise"
    if blocks not in (10, 15, 19):
        raise ValueError(f"these weights are of a SAN with {blocks} blocks; SAN-10, -15 and -19 are known")
    options = {"num_classes": len(state["fc.weight"]) if "fc.weight" in state else 0}
    return f"san{blocks}_{kind}", options | {"in_chans": state["stem.conv1.weight"].shape[1]}
