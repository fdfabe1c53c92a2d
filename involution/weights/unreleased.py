"""Stand-Alone ResNets, LR-Nets and AA-ResNets, of which no authors' files exist: options read off shapes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def describe(state: Mapping[str, Tensor], number: int) -> tuple[str, dict[str, Any]] | None:
    """Name and options, without those that all networks have, of the model with ``number`` layers; None if another's.

    An LR-Net's kernel size is in no shape; it is taken to be 7.
    """
    if rows := _shape(state, "layer1.0.conv2.rows"):  # (half a head's channels, K)
        return f"standalone_resnet{number}", {"heads": 32 // rows[0], "kernel_size": rows[1]}
    if query := _shape(state, "layer1.0.conv2.query.weight"):  # (groups, channels, 1, 1)
        return f"lrnet{number}", {"group_channels": query[1] // query[0]}
    if rows := _shape(state, "layer4.0.conv2.attention.rows"):  # (2 L - 1, D), L the side of 1/32 of the image
        return f"aa_resnet{number}", {"image_size": 16 * (rows[0] + 1)}
    return None


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None
