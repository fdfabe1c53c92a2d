"""Parameters and FLOPs of every row of Tables 3, 4, 5 and 7; model_table.py prints them.

The authors' tool (that of OpenMMLab) left things out, and their rows differ in the stem, so there are two figures of
FLOPs: ours counts all layers of the model that `create_model` makes, with the 7x7 stem; "as printed" is what the paper
prints, to its last digit but for one row. There

- rows with a convolution neck have the 3x3 stem (Tables 3 and 4), rows with an involution neck the 7x7;
- synchronised BatchNorm (segmentation, outside the involutions) and the auxiliary head count nothing;
- the mask head's deconvolution and logits count in the row with an involution head alone;
- the products of attention blocks (Table 7) count nothing;
- a linear layer's bias counts once, not once a box.

Detectors are counted at 1280 x 800 with 1000 boxes and 100 masks, segmentors at 2048 x 1024.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from involution import create_model
from involution.complexity import Complexity, count, layer_cost
from involution.dense.detectors import Detector
from involution.dense.plugins import CrissCross, GlobalContext, NonLocal
from involution.kernel_generation import BottleneckGeneration
from involution.layers import Involution2d

#: (detector, neck, head) of the rows with RedNet-50, with the paper's parameters and FLOPs
DETECTORS = {
    ("retinanet", "convolution", "convolution"): (27.8, 210.1),
    ("retinanet", "involution", "convolution"): (26.3, 199.9),
    ("faster_rcnn", "convolution", "convolution"): (31.6, 177.9),
    ("faster_rcnn", "involution", "convolution"): (29.5, 135.0),
    ("faster_rcnn", "involution", "involution"): (29.0, 91.5),
    ("mask_rcnn", "convolution", "convolution"): (34.2, 224.2),
    ("mask_rcnn", "involution", "convolution"): (32.2, 181.3),
    ("mask_rcnn", "involution", "involution"): (29.5, 104.6),
}
BASELINES = {"retinanet": (37.7, 239.3), "faster_rcnn": (41.5, 207.1), "mask_rcnn": (44.2, 253.4)}  # with ResNet-50
#: (segmentor, backbone, neck)
SEGMENTORS = {
    ("semantic_fpn", "resnet50", "convolution"): (28.5, 362.8),
    ("semantic_fpn", "rednet50", "convolution"): (18.5, 293.9),
    ("semantic_fpn", "rednet50", "involution"): (16.4, 205.2),
    ("upernet", "resnet50", "convolution"): (66.4, 1894.5),
    ("upernet", "rednet50", "convolution"): (56.4, 1825.6),
}
PLUGINS = ("nl", "rcca", "gc", "dcn", "dcn_v2")


class Row(NamedTuple):
    """A row of a table."""

    name: str
    ours: Complexity
    printed: float  # FLOPs as the paper counted
    paper: tuple[float, float] | None  # parameters in M (of detectors the trainable ones) and FLOPs in G


def paper_size(name: str) -> tuple[int, int, int]:
    """(3, H, W) of the images that a model's FLOPs are counted for."""
    return (3, 1024, 2048) if name in ("semantic_fpn", "upernet") else (3, 800, 1280)


def measure(name: str, backbone: str, paper: tuple[float, float] | None = None, **options: Any) -> Row:
    """Count one model on the meta device."""
    dense, size = name in ("semantic_fpn", "upernet"), paper_size(name)
    stem = {}
    if backbone.startswith("rednet") and options["neck"] == "convolution" and not dense:
        stem = {"stem_kernel_size": 3}
    with torch.device("meta"):
        model = create_model(name, backbone={"name": backbone}, **options)
        counted_by_paper = create_model(name, backbone={"name": backbone, **stem}, **options)
    title = ", ".join([name, backbone, *(f"{k} {v}" for k, v in options.items() if v != "convolution")])
    return Row(title, count(model, size), printed_flops(counted_by_paper, size), paper)


def printed_flops(model: nn.Module, size: tuple[int, int, int]) -> float:
    """FLOPs as the authors' tool counts them."""
    left_out = _left_out(model)

    def cost(module: nn.Module, x: Tensor, output: Tensor) -> tuple[int, int]:
        if module in left_out:
            return 0, 0
        if isinstance(module, nn.Linear):
            return layer_cost(module, x, output)[0], module.out_features
        return layer_cost(module, x, output)

    return count(model, size, cost).flops


def _left_out(model: Any) -> set[nn.Module]:
    if isinstance(model, Detector):
        left_out: set[nn.Module] = {m for m in model.modules() if isinstance(m, NonLocal | CrissCross | GlobalContext)}
        regions: Any = getattr(model, "regions", None)
        if regions is not None and regions.has_mask() and not isinstance(regions.mask_head[0], Involution2d):
            left_out |= {regions.mask_predictor.conv5_mask, regions.mask_predictor.mask_fcn_logits}
        return left_out
    generators = [m for m in model.modules() if isinstance(m, BottleneckGeneration)]
    plain = {m for g in generators for m in g.modules()}
    if hasattr(model.backbone.stem, "bn2"):  # the release's stem has an ordinary one there
        plain.add(model.backbone.stem.bn2)
    norms = {m for m in model.modules() if isinstance(m, nn.BatchNorm2d)} - plain
    return norms | set(getattr(model, "auxiliary", nn.Identity()).modules())


def tables() -> Iterator[tuple[str, list[Row]]]:
    """(title, rows) of each table."""
    rows = []
    for (name, neck, head), paper in DETECTORS.items():
        if (neck, head) == ("convolution", "convolution"):
            rows.append(measure(name, "resnet50", BASELINES[name], neck=neck, head=head))
        rows.append(measure(name, "rednet50", paper, neck=neck, head=head))
    yield "Table 3", rows
    yield "Tables 4 and 5", [measure(name, net, paper, neck=neck) for (name, net, neck), paper in SEGMENTORS.items()]
    yield "Table 7", [measure("mask_rcnn", "resnet50", plugin=plugin) for plugin in PLUGINS]


def markdown(title: str, rows: list[Row]) -> str:
    """One table."""
    lines = [
        f"### {title}",
        "",
        "| model | parameters (M) | trainable (M) | paper | FLOPs (G) | as printed (G) | paper |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, ours, printed, paper in rows:
        params, flops = paper or ("", "")
        figures = f"{ours.params / 1e6:.3f} | {ours.trainable / 1e6:.3f} | {params}"
        lines.append(f"| {name} | {figures} | {ours.flops / 1e9:.2f} | {printed / 1e9:.2f} | {flops} |")
    return "\n".join(lines)
