"""Weights in and out: files to state dicts, names of the released checkpoints <-> ours, downloads with a hash check.

Released files name tensors as OpenMMLab does (``backbone.layer1.0.conv2.conv1.conv.weight``, ``head.fc.weight``);
detection and segmentation files have the backbone without a classifier, beside a neck and heads that are not ours.
"""

import hashlib
import logging
import math
import pickle
import re
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

log = logging.getLogger("involution")
StateDict = dict[str, Tensor]

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


def to_ours(state: Mapping[str, Tensor]) -> StateDict:
    """Our names for the tensors of a released checkpoint, or of a torchvision or timm ResNet; ours stay as they are.

    Of a detector or segmentor only the backbone is taken, with the rest listed in a warning.
    """
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}
    if not any(key.startswith("backbone.") for key in state):
        return {_rename(key, _STEM | _RESNET, _BLOCK): value for key, value in state.items()}
    ours, dropped = {}, []
    for key, value in state.items():
        if key.startswith(("backbone.", "head.fc.")):
            key = key.removeprefix("backbone.").removeprefix("head.")
            ours[_rename(key, _STEM | _RESNET, _BLOCK)] = value
        else:
            dropped.append(key)
    if dropped:
        log.warning("not taken, for they are no part of the backbone: %s", _some(dropped))
    return ours


def to_released(state: Mapping[str, Tensor]) -> StateDict:
    """The released names for the tensors of one of our RedNets; the inverse of ``to_ours``."""
    stem = {ours: released for released, ours in _STEM.items()}
    block = {ours: released for released, ours in _BLOCK.items()}
    renamed = {_rename(key, stem, block): value for key, value in state.items()}
    return {f"head.{key}" if key.startswith("fc.") else f"backbone.{key}": value for key, value in renamed.items()}


def _rename(key: str, stem: Mapping[str, str], block: Mapping[str, str]) -> str:
    name, _, leaf = key.rpartition(".")
    if in_block := re.fullmatch(r"(layer\d\.\d+)\.(.+)", name):
        return f"{in_block[1]}.{block.get(in_block[2], in_block[2])}.{leaf}"
    return f"{stem.get(name, name)}.{leaf}"


def read(path: str | Path) -> StateDict:
    """The tensors of a ``.safetensors`` file or of a torch file, as they are or nested as training programs nest them.

    Of a checkpoint that holds averaged weights too (``ema``), these are taken. Nothing in the file is executed.

    Raises:
        ValueError: there is no such file, or it holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ValueError(f"reading {path} needs safetensors: pip install safetensors") from error
    except Exception as error:  # torch.load and safetensors raise a dozen types for damaged files
        raise ValueError(f"{path} cannot be read as weights: {why_unreadable(error)}") from error
    for nest in ("ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(nest), dict):
            state = {key: value for key, value in state[nest].items() if key != "n_averaged"}
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{path} holds no weights: it should be a state dict, or have one under 'state_dict' or 'model'"
        )
    return state


def why_unreadable(error: Exception) -> str:
    """Why torch.load or safetensors failed, in a line, without torch's advice to let the file run code."""
    told = str(error).strip()
    if found := re.search(r"Unsupported global: GLOBAL (\S+)", told):
        return f"besides weights it holds {found[1]}, and nothing that may run code is read"
    if isinstance(error, pickle.UnpicklingError | EOFError):
        return "torch.save did not write it, or not all of it is there"
    return told.splitlines()[0] if told else type(error).__name__


def describe(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Name and options of the model that has these weights (our names), read off their shapes.

    Raises:
        ValueError: they are those of none of our models.
    """
    blocks = {key.rsplit(".conv1.", 1)[0] for key in state if re.fullmatch(r"layer\d\.\d+\.conv1\.weight", key)}
    number = 3 * len(blocks) + 2
    try:
        options: dict[str, Any] = {
            "num_classes": state["fc.weight"].shape[0] if "fc.weight" in state else 0,
            "in_chans": state["stem.conv1.weight"].shape[1],
        }
        if "layer1.0.conv2.weight" in state:
            return f"resnet{number}", options
        return f"rednet{number}", options | _rednet_options(state)
    except KeyError as error:
        raise ValueError(
            f"these weights are of no RedNet or ResNet: {error.args[0]!r} is missing or unknown"
        ) from error


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


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights under our names. A classifier for other classes, or none, leaves the model's own as it is (logged).

    Raises:
        ValueError: any other tensor is missing, unexpected or of another shape; they are named.
    """
    own = model.state_dict()
    head = [key for key in own if key.startswith("fc.")]
    fits = all(key in state and state[key].shape == own[key].shape for key in head)
    if not fits:
        log.warning("the weights have no classifier for %d classes: it starts afresh", own["fc.weight"].shape[0])
    state = {key: value for key, value in state.items() if not key.startswith("fc.") or (fits and key in own)}
    # a classifier that starts afresh keeps its values; files from before PyTorch 0.4.1 do not count batches
    state |= {key: own[key] for key in own if key not in state and key.endswith((*head, "num_batches_tracked"))}
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {_some(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"the weights are of another model; {told}")
    model.load_state_dict(state)


def _some(keys: list[str], limit: int = 8) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def fetch(location: str | Path, sha256: str | None = None) -> Path:
    """The local file of a path or URL. Downloads are kept in ``torch.hub``'s folder; the hash is checked at every use.

    Args:
        location: a path, of a run's folder too (its ``best.pt``), or an http(s), ftp or file URL.
        sha256: the file's SHA-256 or the beginning of it. A URL like ``rednet50-0123abcd.pth`` carries it.

    Raises:
        ValueError: the file cannot be had, or its hash does not match.
    """
    location = str(location)
    if "://" not in location:
        path = Path(location)
        if path.is_dir():
            path = path / "checkpoints" / "best.pt"
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
    else:
        name = Path(urlparse(location).path).name
        in_name = re.search(r"-([0-9a-f]{8,64})\.", name)
        sha256 = sha256 or (in_name[1] if in_name else None)
        # the URL's own hash keeps two files called model.pt apart
        path = Path(torch.hub.get_dir()) / "checkpoints" / f"{hashlib.sha256(location.encode()).hexdigest()[:8]}-{name}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(location, str(path), progress=False)
            except (urllib.error.URLError, OSError) as error:
                raise ValueError(f"{location} cannot be downloaded: {getattr(error, 'reason', error)}") from error
    if sha256:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if not found.startswith(sha256.lower()):
            if "://" in location:
                path.unlink()
            raise ValueError(f"{location} has the SHA-256 {found}; it should begin with {sha256}")
    return path
