"""Detectors and segmentors: names and values of their tensors in released (OpenMMLab's) files <-> ours.

Values differ in one thing: the released background is the last class, and has neither boxes nor masks; here, as in
torchvision, it is the first, with rows of zeros that nothing reads.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from involution.weights import rednet

#: a tensor that files of the model alone have, as released
_KINDS = {
    "retinanet": "bbox_head.retina_cls.weight",
    "mask_rcnn": "roi_head.mask_head.conv_logits.weight",
    "faster_rcnn": "roi_head.bbox_head.fc_cls.weight",
    "upernet": "decode_head.psp_modules.0.1.conv.weight",
    "semantic_fpn": "decode_head.scale_heads.0.0.conv.weight",
}
_GENERATION = {"kernel_generation.reduce": "conv1.conv", "kernel_generation.norm": "conv1.bn"}
_GENERATION["kernel_generation.span"] = "conv2.conv"
_ROWS = {  # our tensors with rows of the background -> how many
    "regions.box_predictor.bbox_pred": 4,
    "regions.mask_predictor.mask_fcn_logits": 1,
}
_SCORES = "regions.box_predictor.cls_score"


def kind(state: Mapping[str, Tensor]) -> str | None:
    """The name of the model whose tensors these are, under released names or ours; None for a classifier and others."""
    return _released_kind(state) or _own_kind(state)


def _released_kind(state: Mapping[str, Tensor]) -> str | None:
    return next((name for name, key in _KINDS.items() if key in state), None)


def _own_kind(state: Mapping[str, Tensor]) -> str | None:
    return next((n for n, key in _KINDS.items() if _rename(key, _inverse(_names(n)), rednet.ours) in state), None)


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names and values for those of a released file; ours stay as they are."""
    name = _released_kind(state)
    if name is None:
        return dict(state)
    table = _inverse(_names(name))
    renamed = {_rename(key, table, rednet.ours): value for key, value in state.items()}
    for key, value in renamed.items():
        layer = key.rpartition(".")[0]
        if layer in _ROWS:
            renamed[key] = torch.cat([value.new_zeros(_ROWS[layer], *value.shape[1:]), value])
        elif layer == _SCORES:
            renamed[key] = value.roll(1, 0)
    return renamed


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``to_ours``."""
    name = _own_kind(state)
    assert name is not None
    plain = "backbone.layer1.0.conv2.weight" in state  # a ResNet: its stem is called as torchvision calls it
    backbone = _resnet if plain else rednet.released
    released = {}
    for key, value in state.items():
        layer = key.rpartition(".")[0]
        if layer in _ROWS:
            value = value[_ROWS[layer] :]
        elif layer == _SCORES:
            value = value.roll(-1, 0)
        released[_rename(key, _names(name), backbone)] = value
    return released


def describe(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``create_model`` for the model whose tensors these are, as far as their shapes tell.

    Raises:
        ValueError: its backbone is none of ours.
    """
    name = kind(state)
    assert name is not None
    state = state if _released_kind(state) else to_released(state)
    prefix = "backbone."
    backbone = {rednet.ours(k.removeprefix(prefix)): v for k, v in state.items() if k.startswith(prefix)}
    net, options = rednet.describe(backbone)
    options = {key: value for key, value in options.items() if key not in ("num_classes", "in_chans")}
    if name in ("upernet", "semantic_fpn") and net.startswith("resnet"):
        options.setdefault("stem", "convolution")
    found: dict[str, Any] = {"name": name, "backbone": {"name": net, **options}}
    found["neck"] = "involution" if "neck.fpn_convs.0.conv1.conv.weight" in state else "convolution"
    if name in ("faster_rcnn", "mask_rcnn", "retinanet"):
        found["pyramid_width"] = len(state["neck.lateral_convs.0.conv.weight"])
    if name in ("faster_rcnn", "mask_rcnn"):
        found["head"] = "involution" if "rpn_head.rpn_conv.conv1.conv.weight" in state else "convolution"
        found["num_classes"] = len(state["roi_head.bbox_head.fc_cls.weight"]) - 1
        found["box_width"] = len(state["roi_head.bbox_head.shared_fcs.1.weight"])
    elif name == "retinanet":
        anchors = len(state["bbox_head.retina_reg.weight"]) // 4
        found["num_classes"] = len(state["bbox_head.retina_cls.weight"]) // anchors
        found["head_norm"] = "bbox_head.cls_convs.0.gn.weight" in state
        found["stacked_convs"] = sum(f"bbox_head.cls_convs.{i}.conv.weight" in state for i in range(4))
    else:
        found["num_classes"] = len(state["decode_head.conv_seg.weight"])
    return found


def _names(name: str) -> dict[str, str]:
    """Our names of layers outside the backbone -> the released ones."""
    neck = {f"neck.lateral.{i}": f"neck.lateral_convs.{i}.conv" for i in range(4)}
    neck |= _spatial({f"neck.output.{i}": f"neck.fpn_convs.{i}" for i in range(3 if name == "retinanet" else 4)})
    if name == "retinanet":
        return neck | {"neck.p6": "neck.fpn_convs.3.conv", "neck.p7": "neck.fpn_convs.4.conv"} | _retina()
    if name in ("faster_rcnn", "mask_rcnn"):
        return neck | _regions()
    return neck | _segmentation()


def _retina() -> dict[str, str]:
    names = {}
    for ours, theirs, last, its in (
        ("classification", "cls", "cls_logits", "retina_cls"),
        ("regression", "reg", "bbox_reg", "retina_reg"),
    ):
        names[f"retina.head.{ours}_head.{last}"] = f"bbox_head.{its}"
        names |= {f"retina.head.{ours}_head.conv.{i}.0": f"bbox_head.{theirs}_convs.{i}.conv" for i in range(4)}
        names |= {f"retina.head.{ours}_head.conv.{i}.1": f"bbox_head.{theirs}_convs.{i}.gn" for i in range(4)}
    return names


def _regions() -> dict[str, str]:
    rpn, box, mask = "rpn_head", "roi_head.bbox_head", "roi_head.mask_head"
    names = {f"proposals.head.conv.{a}": f"{rpn}.rpn_conv.{b}" for a, b in _GENERATION.items()}
    for i in range(4):
        names |= {f"regions.mask_head.{2 * i}.{a}": f"{mask}.convs.{i}.0.{b}" for a, b in _GENERATION.items()}
        names[f"regions.mask_head.{2 * i}"] = f"{mask}.convs.{i}.conv"
    return names | {
        "proposals.head.conv": f"{rpn}.rpn_conv",
        "proposals.head.objectness": f"{rpn}.rpn_cls",
        "proposals.head.deltas": f"{rpn}.rpn_reg",
        "regions.box_head.fc6": f"{box}.shared_fcs.0",
        "regions.box_head.fc7": f"{box}.shared_fcs.1",
        _SCORES: f"{box}.fc_cls",
        "regions.box_predictor.bbox_pred": f"{box}.fc_reg",
        "regions.mask_predictor.conv5_mask": f"{mask}.upsample",
        "regions.mask_predictor.mask_fcn_logits": f"{mask}.conv_logits",
    }


def _segmentation() -> dict[str, str]:
    head = "decode_head"
    blocks = {"head.bottleneck": f"{head}.bottleneck", "head.fuse": f"{head}.fpn_bottleneck"}
    blocks |= {f"head.scales.{i}.{k}": f"{head}.scale_heads.{i}.{k}" for i in range(4) for k in (0, 2, 4)}
    blocks |= {f"head.pools.{i}.1": f"{head}.psp_modules.{i}.1" for i in range(4)}
    blocks |= {f"head.lateral.{i}": f"{head}.lateral_convs.{i}" for i in range(3)}
    blocks |= {f"head.output.{i}": f"{head}.fpn_convs.{i}" for i in range(3)} | {
        "auxiliary.0": "auxiliary_head.convs.0"
    }
    names = {f"{a}.{i}": f"{b}.{part}" for a, b in blocks.items() for i, part in enumerate(("conv", "bn"))}
    return names | {"head.classify.1": f"{head}.conv_seg", "auxiliary.1.1": "auxiliary_head.conv_seg"}


def _spatial(layers: Mapping[str, str]) -> dict[str, str]:
    """Layers that are a convolution or an involution."""
    names = {f"{a}.{inner}": f"{b}.{its}" for a, b in layers.items() for inner, its in _GENERATION.items()}
    return names | {a: f"{b}.conv" for a, b in layers.items()}


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {b: a for a, b in names.items()}


def _resnet(key: str) -> str:
    return key.removeprefix("stem.") if key.startswith(("stem.conv1.", "stem.bn1.")) else key


def _rename(key: str, table: Mapping[str, str], backbone: Any) -> str:
    prefix = "backbone."
    if key.startswith(prefix):
        return prefix + backbone(key.removeprefix(prefix))
    name, _, leaf = key.rpartition(".")
    return f"{table.get(name, name)}.{leaf}"
