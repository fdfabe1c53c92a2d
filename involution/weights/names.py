"""Names of tensors in other programs' files <-> ours.

A family of models is a module with OURS and ELSEWHERE, a tensor that each of its models has by its names here and in
others' files, ``to_ours``, which makes those tensors ours, and ``describe``. What comes before that name in a file is a
wrapper's (``module.`` DistributedDataParallel, ``model.`` or ``net.`` Lightning, ``backbone.`` OpenMMLab, ...) and is
taken off.
"""

import logging
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from involution.weights import axial, rednet, san
from involution.weights.into import some

log = logging.getLogger("involution")

FAMILIES: tuple[ModuleType, ...] = (san, axial, rednet)

#: what torch puts into the middle of names
_INSERTED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: Paddle's names for BatchNorm's statistics
_PADDLE = {"_mean": "running_mean", "_variance": "running_var"}


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the tensors of a checkpoint: released, PaddleClas's, torchvision's, timm's; ours stay as they are.

    The prefix of a wrapper is taken off, and said in a warning. Of a detector or segmentor only the backbone is taken,
    with the rest listed in a warning.

    Raises:
        ValueError: there are several networks in it.
    """
    state = {_INSERTED.sub("", key): value for key, value in state.items()}
    known = {name: family for family in FAMILIES for name in (family.OURS, family.ELSEWHERE)}
    found = [(name, key.removesuffix(name)) for name in known for key in state if _ends(key, name)]
    if len(found) > 1:
        prefixes = " and ".join(repr(prefix or name) for name, prefix in found)
        raise ValueError(
            f"these weights hold {len(found)} networks, whose names begin with {prefixes}; save those of one alone"
        )
    if not found:
        return {key.removeprefix("module."): value for key, value in state.items()}
    name, prefix = found[0]
    state = _from_paddle(_without_prefix(state, prefix))
    return known[name].to_ours(state) if name == known[name].ELSEWHERE else state


def _ends(key: str, name: str) -> bool:
    return key == name or key.endswith("." + name)


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it; OpenMMLab's classifier lies beside its ``backbone.``."""
    if not prefix:
        return dict(state)
    wrapper = prefix.removesuffix("backbone.")
    head = f"{wrapper}head.fc." if wrapper != prefix else None
    taken, dropped = {}, []
    for key, value in state.items():
        if key.startswith(prefix):
            taken[key.removeprefix(prefix)] = value
        elif head and key.startswith(head):
            taken["fc." + key.removeprefix(head)] = value
        else:
            dropped.append(key)
    if wrapper:
        log.warning("the prefix %r is taken off the names of the weights", wrapper)
    if dropped:
        log.warning("not taken, for they are no part of the backbone: %s", some(dropped))
    return taken


def _from_paddle(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in Paddle's layout as torch has them: statistics by their names, linear layers (out, in)."""
    if not any(key.endswith("._mean") for key in state):
        return state
    torch_ones: dict[str, Tensor] = {}
    for key, value in state.items():
        name, _, leaf = key.rpartition(".")
        torch_ones[f"{name}.{_PADDLE.get(leaf, leaf)}"] = value.T.contiguous() if value.ndim == 2 else value
        if leaf == "_variance":
            torch_ones[f"{name}.num_batches_tracked"] = torch.tensor(0)
    return torch_ones


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released names for the tensors of one of our RedNets; the inverse of ``to_ours``."""
    renamed = {rednet.released(key): value for key, value in state.items()}
    return {f"head.{key}" if key.startswith("fc.") else f"backbone.{key}": value for key, value in renamed.items()}


def other_options(theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of ``create_model`` in which the model of some weights (our names) differs from that of others.

    The number of classes does not count; {} where one of them is none of our models.
    """
    try:
        (name, options), (my_name, my_options) = describe(theirs), describe(mine)
    except ValueError:
        return {}
    mine_too = {"name": my_name} | my_options
    differing = {k: v for k, v in ({"name": name} | options).items() if k not in mine_too or mine_too[k] != v}
    return {key: value for key, value in differing.items() if key != "num_classes"}


def describe(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Name and options of the model that has these weights (our names), read off their shapes.

    Raises:
        ValueError: they are those of none of our models.
    """
    family = next((family for family in FAMILIES if family.OURS in state), rednet)
    return family.describe(state)
