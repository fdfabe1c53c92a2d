"""Every kernel that a model would launch, from its layers' shapes; on the meta device, without memory or a GPU.

Shape legend: B batch, C channels, G groups, K kernel size, Ho Wo output size, R reduced channels.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from model_table import ABLATIONS
from torch import Tensor, nn

from involution import Involution2d, create_model
from involution.ops import triton_norm_plans as norm_plans
from involution.ops import triton_plans as plans
from involution.ops import triton_tiles as tiles
from involution.ops.triton_plans import Launch


class Layer(NamedTuple):
    """An involution and the size it meets: (C, H, W) of its input, G, K, stride, dilation, and R (None: plain)."""

    size: tuple[int, int, int]
    groups: int
    kernel_size: int
    stride: int
    dilation: int
    reduced: int | None

    def __str__(self) -> str:
        c, h, w = self.size
        fused = "" if self.reduced is None else f" R{self.reduced}"
        return f"{c}x{h}x{w} G{self.groups} K{self.kernel_size} s{self.stride} d{self.dilation}{fused}"


class Norm(NamedTuple):
    """A BatchNorm with the ReLU behind it, (C, H, W) of its input, and whether a residual is added between them."""

    size: tuple[int, int, int]
    skip: bool

    def __str__(self) -> str:
        c, h, w = self.size
        return f"{c}x{h}x{w}{' + residual' if self.skip else ''}"


def networks(names: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Models by name; "ablation" stands for Table 6's variants of RedNet-50, "dense" for networks around it."""
    for name in names:
        with torch.device("meta"):
            if name == "ablation":
                for options in ABLATIONS.values():
                    if options and "stem" not in options:  # RedNet-50's own layers are no variant
                        variant = ", ".join(f"{key}={value}" for key, value in options.items())
                        yield variant, create_model("rednet50", stem="convolution", **options)
            elif name == "dense":
                for model in ("semantic_fpn", "upernet"):  # the first has the detectors' neck
                    yield model, create_model(model, backbone={"name": "rednet50"}, neck="involution", num_classes=19)
            else:
                yield name, create_model(name)


def layers_of(model: nn.Module, height: int = 224, width: int = 224) -> list[Layer]:
    """The different involutions of a model, in the order in which they run."""
    found: dict[Layer, None] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, Involution2d)
        reduce = getattr(layer.kernel_generation, "reduce", None)
        span = getattr(layer.kernel_generation, "span", None)
        reduced = layer.channels if span is not None and reduce is None else getattr(reduce, "out_channels", None)
        channels, rows, columns = inputs[0].shape[1:]
        found[
            Layer((channels, rows, columns), layer.groups, layer.kernel_size, layer.stride, layer.dilation, reduced)
        ] = None

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, Involution2d)]
    _run_on_meta(model, handles, height, width)
    return list(found)


def norms_of(model: nn.Module, height: int = 224, width: int = 224) -> list[Norm]:
    """BatchNorms and ReLUs of every width in a model, each at its largest size: on what else a kernel depends."""
    found: dict[tuple[int, bool], Norm] = {}
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        channels, rows, columns = inputs[0].shape[1:]
        block, _, name = names[module].rpartition(".")
        if "downsample" in block:  # no ReLU is behind it
            return
        skip = name == "bn3" and hasattr(model.get_submodule(block), "downsample")
        found.setdefault((channels, skip), Norm((channels, rows, columns), skip))  # sizes only shrink

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if type(m) is nn.BatchNorm2d]
    _run_on_meta(model, handles, height, width)
    return list(found.values())


def _run_on_meta(model: nn.Module, handles: list[Any], height: int, width: int) -> None:
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, height, width, device="meta"))
    for handle in handles:
        handle.remove()


def norm_launches(norm: Norm, dtype: torch.dtype, batch: int) -> dict[str, Launch]:
    """The launches of BatchNorm and ReLU by name, in training."""
    channels, height, width = norm.size
    x = torch.empty(batch, channels, height, width, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    row, coefficients = torch.empty(channels, device="meta"), torch.empty(1, 6, channels, device="meta")
    skip = x if norm.skip else None
    sums, grads = norm_plans.plan_statistics(x), norm_plans.plan_gradients(x, x, skip, coefficients, skip)
    finish = norm_plans.plan_finish_statistics(x, sums, row, row, row, row, coefficients, 0.1, 1e-5)
    return {
        "norm_sums": sums,
        "norm_finish": finish,
        "norm_apply": norm_plans.plan_apply(x, skip, coefficients, x),
        "norm_grad_sums": grads,
        "norm_grad_finish": norm_plans.plan_finish_gradients(x, grads, coefficients, row, row, True),
        "norm_grad_apply": norm_plans.plan_apply_gradients(x, x, coefficients, x, not norm.skip),
    }


def launches(layer: Layer | Norm, dtype: torch.dtype, batch: int, fused: bool | None = None) -> dict[str, Launch]:
    """A layer's launches by name, in channels_last: the fused kernels (True), the plain ones (False) or as it runs."""
    if isinstance(layer, Norm):
        return norm_launches(layer, dtype, batch)
    (channels, height, width), k = layer.size, layer.kernel_size
    padding = layer.dilation * (k - 1) // 2
    out_height, out_width = -(-height // layer.stride), -(-width // layer.stride)
    options = layer.stride, padding, layer.dilation

    def empty(channels: int, *size: int) -> Tensor:
        value = torch.empty(batch, channels, *size, dtype=dtype, device="meta")
        return value.to(memory_format=torch.channels_last)

    x, out = empty(channels, height, width), empty(channels, out_height, out_width)
    taps = layer.groups * k * k
    kernel = empty(taps, out_height, out_width).view(batch, layer.groups, k, k, out_height, out_width)
    common = plans.common_arguments(x, k, layer.groups, None, *options)
    plain = {
        "forward": plans.plan_forward(x, kernel, None, None, None, out, common),
        "grad_input": plans.plan_grad_input(out, kernel, None, None, None, x, common),
        "grad_kernel": plans.plan_grad_kernel(out, x, kernel, common),
    }
    if layer.reduced is None or fused is False:
        return plain
    reduced = empty(layer.reduced, out_height, out_width)
    weight, bias = (torch.empty(*size, dtype=dtype, device="meta") for size in ((taps, layer.reduced), (taps,)))
    common = plans.common_arguments(x, k, layer.groups, reduced, *options)
    made = {
        "span_forward": plans.plan_forward(x, None, reduced, weight, bias, out, common),
        "span_grad_input": plans.plan_grad_input(out, None, reduced, weight, bias, x, common),
    }
    if fused:
        return made
    forward = "span_forward" if tiles.make_taps(layer.reduced, dtype) else "forward"
    grad_input = "span_grad_input" if tiles.make_taps_again(layer.reduced, dtype) else "grad_input"
    return {name: (plain | made)[name] for name in (forward, grad_input, "grad_kernel")}
