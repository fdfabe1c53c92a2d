"""The Triton backend (GPU, or TRITON_INTERPRET=1 on the CPU): sizes, tuning and launches of the kernels beside it.

B images, C channels, G groups, K taps a side, H x W input, Ho x Wo output, R reduced channels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_gradients, triton_kernels
from .shapes import empty_kernel, empty_output, empty_product, output_hw

INTERPRETED = triton.knobs.runtime.interpret
_ACCUMULATE = {torch.float64: tl.float64} | dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), tl.float32)
_Tile = tuple[int | None, int | None, int]  # J, GB, warps


class Launch(NamedTuple):
    """A kernel, its arguments, and its number of programs as a function of all arguments with the tuned ones."""

    kernel: Any
    arguments: dict[str, Any]
    programs: Callable[[dict[str, Any]], int]


def _tuned(kernel: Any, configs: list[_Tile], key: str, most: int = 512) -> Any:
    """Autotuning over (J, GB, warps), None where the launch fixes it: whatever would change the order of a sum, so that
    the choice never changes a result.  The batch size is no part of the key."""

    def fitting(configs: list[triton.Config], named: dict[str, Any], **arguments: Any) -> list[triton.Config]:
        """The first three (a compilation takes seconds) that do not spill: 8 channels of a run a thread, J * RP / warps
        <= most."""

        def fits(config: triton.Config) -> bool:
            v = {"RP": 16, **named, **arguments, **config.kwargs}
            held = v["J"] * v["GB"] * v["BC"] / (32 * config.num_warps)
            return config.kwargs.get("GB", 1) < 2 * v["G"] and held <= 8 and v["J"] * v["RP"] <= most * config.num_warps

        return [config for config in configs if fits(config)][:3] or configs[-1:]

    choices = []
    for j, gb, warps in configs:
        tile = {name: value for name, value in (("J", j), ("GB", gb)) if value is not None}
        choices.append(triton.Config(tile, num_warps=warps, num_stages=2))
    prune = {"early_config_prune": fitting}
    return triton.autotune(choices, key=key.split(), prune_configs_by=prune, cache_results=True)(kernel)


_KEY = "G GC K S P D H W WIDE STEP"
_TILES: list[_Tile] = [(16, 4, 4), (8, 4, 2), (8, 4, 4), (32, 2, 4), (16, 1, 4), (4, 4, 4), (2, 1, 4)]
_SUMS: list[_Tile] = [(16, None, 4), (8, None, 4), (2, None, 4)]
_forward = _tuned(triton_kernels.forward_kernel, _TILES, _KEY + " R")
_grad_input = _tuned(triton_kernels.grad_input_kernel, _TILES, _KEY + " R", most=256)
_grad_kernel = _tuned(triton_gradients.grad_kernel_kernel, _TILES, _KEY)
_grad_reduced = _tuned(triton_gradients.grad_reduced_kernel, _SUMS, _KEY + " R", most=256)
_grad_weight = _tuned(triton_gradients.grad_weight_kernel, [(None, None, 4), (None, None, 2)], _KEY + " R")


def _power(value: int, least: int = 1) -> int:
    return max(least, triton.next_power_of_2(value))


def _is_wide(*tensors: Tensor | None) -> bool:
    """Whether some offset needs 64 bits (they cost registers everywhere else)."""
    spans = (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors if t is not None)
    return max(spans) >= 2**30


def common_arguments(
    input: Tensor, kernel_size: int, groups: int, reduced: Tensor | None, stride: int, padding: int, dilation: int
) -> dict[str, Any]:
    """The arguments that all kernels share."""
    height, width = output_hw(input, kernel_size, stride, padding, dilation)
    channels = input.shape[1] // groups
    taps = _power(kernel_size, 8)
    arguments = {
        "H": input.shape[2], "W": input.shape[3], "HO": height, "WO": width, "G": groups, "GC": channels,
        "K": kernel_size, "S": stride, "P": padding, "D": dilation, "ACC": _ACCUMULATE[input.dtype],
        "BC": min(64, _power(channels)), "KP": taps, "LOG_KP": taps.bit_length() - 1,
        "RUN": 7 if kernel_size <= 7 and input.dtype != torch.float64 else 4,  # else the registers do not suffice
    }  # fmt: skip
    if reduced is not None:
        arguments |= {"R": reduced.shape[1], "RP": _power(reduced.shape[1], 16)}
    return arguments


def _runs(arguments: dict[str, Any], images: int, rows: str = "HO", width: str = "WO") -> int:
    return images * arguments[rows] * triton.cdiv(arguments[width], arguments["RUN"])


def _taps_from(kernel: Tensor | None, reduced: Tensor | None, *span: Tensor | None) -> dict[str, Any]:
    """Where taps come from: a kernel, or the operands of the span convolution."""
    arguments: dict[str, Any] = {"kernel": kernel, "reduced": reduced, "weight": span[0], "bias": span[1]}
    arguments["reduced_strides"] = None if reduced is None else reduced.stride()
    if kernel is None:
        return arguments | {"kernel_strides": None, "KSTEP": None}
    return arguments | {"kernel_strides": kernel.stride(), "KSTEP": kernel.stride(5), "R": 1, "RP": 16}


def plan_forward(
    input: Tensor, kernel: Tensor | None, reduced: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    out: Tensor, common: dict[str, Any],
) -> Launch:  # fmt: skip
    arguments = common | _taps_from(kernel, reduced, weight, bias)
    arguments |= {"x": input, "x_strides": input.stride(), "STEP": input.stride(3)}
    arguments |= {"out": out, "out_strides": out.stride(), "WIDE": _is_wide(input, kernel, reduced, out)}
    arguments["total"] = _runs(common, input.shape[0])
    return Launch(_forward, arguments, _tiles_by_groups_by_chunks)


def plan_grad_input(
    grad: Tensor, kernel: Tensor | None, reduced: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    out: Tensor, common: dict[str, Any],
) -> Launch:  # fmt: skip
    arguments = common | _taps_from(kernel, reduced, weight, bias)
    arguments |= {"grad": grad, "grad_strides": grad.stride(), "STEP": grad.stride(3)}
    if common["S"] > 1:
        arguments["RUN"] = triton.cdiv(4, common["S"]) * common["S"]  # a multiple of the stride: see the kernel
    arguments |= {"out": out, "out_strides": out.stride(), "WIDE": _is_wide(grad, kernel, reduced, out)}
    arguments["total"] = _runs(arguments, grad.shape[0], "H", "W")
    return Launch(_grad_input, arguments, _tiles_by_groups_by_chunks)


def _correlation(grad: Tensor, input: Tensor, common: dict[str, Any], *others: Tensor) -> dict[str, Any]:
    arguments = {"x": input, "grad": grad, "x_strides": input.stride(), "grad_strides": grad.stride()}
    arguments |= {"STEP": input.stride(3), "total": _runs(common, input.shape[0])}
    return common | arguments | {"WIDE": _is_wide(grad, input, *others)}


def plan_grad_kernel(grad: Tensor, input: Tensor, out: Tensor, common: dict[str, Any]) -> Launch:
    arguments = _correlation(grad, input, common, out)
    arguments |= {"out": out, "out_strides": out.stride(), "KSTEP": out.stride(5)}
    return Launch(_grad_kernel, arguments, lambda a: triton.cdiv(a["total"], a["J"]) * triton.cdiv(a["G"], a["GB"]))


def plan_grad_reduced(grad: Tensor, input: Tensor, weight: Tensor, out: Tensor, common: dict[str, Any]) -> Launch:
    arguments = _correlation(grad, input, common, out) | {"weight": weight, "out": out, "out_strides": out.stride()}
    arguments["GB"] = max(
        2, min(4, _power(common["G"]), 64 // common["BC"])
    )  # the tensor cores sum over 16 taps or more
    return Launch(_grad_reduced, arguments, lambda a: triton.cdiv(a["total"], a["J"]))


def plan_grad_weight(
    grad: Tensor, input: Tensor, reduced: Tensor, with_bias: bool, common: dict[str, Any]
) -> tuple[Launch, Tensor, Tensor | None]:
    """The launch, and the partial sums of weight (parts, G*K*K, R) and bias (parts, G*K*K) that it fills."""
    arguments = _correlation(grad, input, common, reduced)
    taps, channels, padded = common["G"] * common["K"] ** 2, common["R"], common["RP"]
    # Two rows of taps a program: they share most input rows (in L1); more take minutes to compile.  The sums of a row,
    # KP taps x GB groups x RP, are at most 2048 values of a program's registers.
    rows, groups = min(2, common["K"]), min(4, _power(common["G"]), max(1, 64 // common["BC"]), max(1, 256 // padded))
    runs = min(1024 // (groups * max(16, common["BC"])), 2048 // padded)
    runs = max(2, 2 * runs // input.element_size())  # wider types take more shared memory
    programs = triton.cdiv(common["G"], groups) * triton.cdiv(common["K"], rows)
    # about four programs a multiprocessor of the largest GPUs; no device property, so that results depend on none
    parts = min(triton.cdiv(528, programs), triton.cdiv(arguments["total"], runs))
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    weights = torch.empty((parts, taps, channels), dtype=accumulate, device=input.device)
    biases = torch.empty((parts, taps), dtype=accumulate, device=input.device) if with_bias else None
    arguments |= {"reduced": reduced, "reduced_strides": reduced.stride(), "GB": groups, "UB": rows, "J": runs}
    arguments |= {"parts": parts, "weight_parts": weights, "bias_parts": biases}
    return Launch(_grad_weight, arguments, lambda _: programs * parts), weights, biases


def _tiles_by_groups_by_chunks(a: dict[str, Any]) -> int:
    return triton.cdiv(a["total"], a["J"]) * triton.cdiv(a["G"], a["GB"]) * triton.cdiv(a["GC"], a["BC"])


def _run(launch: Launch, device: torch.device) -> None:
    assert launch.arguments["total"] > 0
    if INTERPRETED:  # one small configuration: nothing to tune
        small = {"J": 16, "GB": 2} | launch.arguments
        launch.kernel.fn[(launch.programs(small),)](**small)
        return
    with torch.cuda.device(device):  # multiply-adds stay fused whatever Triton's default is (3.10 changes it)
        launch.kernel[lambda meta: (launch.programs(meta),)](**launch.arguments, enable_fp_fusion=True)


# ---- the backend's functions (shapes as in functional.py) ------------------------------------------------------------


def unsupported(input: Tensor, kernel: Tensor) -> str | None:
    """Why this backend cannot run on these tensors; None if it can."""
    if input.dtype not in _ACCUMULATE or kernel.dtype != input.dtype:
        return f"input is {input.dtype} and kernel {kernel.dtype}; both have to be one of float64, 32, 16, bfloat16"
    if INTERPRETED:
        return "Triton's interpreter multiplies the bit patterns of bfloat16" if input.dtype == torch.bfloat16 else None
    if input.device.type != "cuda":
        return f"the tensors are on {input.device}; it needs a CUDA device (or TRITON_INTERPRET=1)"
    if torch.cuda.get_device_capability(input.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def forward(input: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    common = common_arguments(input, kernel.shape[2], kernel.shape[1], None, stride, padding, dilation)
    out = empty_output(input, input.shape[1], common["HO"], common["WO"])
    _run(plan_forward(input, kernel, None, None, None, out, common), input.device)
    return out


def backward(
    grad: Tensor, input: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int, needs_input: bool,
    needs_kernel: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    common = common_arguments(input, kernel.shape[2], kernel.shape[1], None, stride, padding, dilation)
    grad_input = empty_output(input, *input.shape[1:]) if needs_input else None
    grad_kernel = empty_kernel(kernel) if needs_kernel else None
    if grad_input is not None:
        _run(plan_grad_input(grad, kernel, None, None, None, grad_input, common), input.device)
    if grad_kernel is not None:
        _run(plan_grad_kernel(grad, input, grad_kernel, common), input.device)
    return grad_input, grad_kernel


def transpose(
    grad: Tensor, kernel: Tensor, height: int, width: int, stride: int, padding: int, dilation: int
) -> Tensor:
    out = empty_output(grad, grad.shape[1], height, width)
    common = common_arguments(out, kernel.shape[2], kernel.shape[1], None, stride, padding, dilation)
    _run(plan_grad_input(grad, kernel, None, None, None, out, common), grad.device)
    return out


def product(
    query: Tensor, key: Tensor, kernel_size: int, groups: int, stride: int, padding: int, dilation: int
) -> Tensor:
    common = common_arguments(key, kernel_size, groups, None, stride, padding, dilation)
    out = empty_product(query, groups, kernel_size)
    _run(plan_grad_kernel(query, key, out, common), key.device)
    return out


def _span(
    input: Tensor, reduced: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, *options: int
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    weight = weight.reshape(weight.shape[0], reduced.shape[1]).contiguous()
    common = common_arguments(input, kernel_size, weight.shape[0] // kernel_size**2, reduced, *options)
    return weight, None if bias is None else bias.contiguous(), common


def span_forward(
    input: Tensor, reduced: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, stride: int, padding: int,
    dilation: int,
) -> Tensor:  # fmt: skip
    weight, bias, common = _span(input, reduced, weight, bias, kernel_size, stride, padding, dilation)
    out = empty_output(input, input.shape[1], common["HO"], common["WO"])
    _run(plan_forward(input, None, reduced, weight, bias, out, common), input.device)
    return out


def span_backward(
    grad: Tensor, input: Tensor, reduced: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, stride: int,
    padding: int, dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    rows, bias_row, common = _span(input, reduced, weight, bias, kernel_size, stride, padding, dilation)
    grad_input, grad_reduced = empty_output(input, *input.shape[1:]), empty_output(reduced, *reduced.shape[1:])
    _run(plan_grad_input(grad, None, reduced, rows, bias_row, grad_input, common), input.device)
    _run(plan_grad_reduced(grad, input, rows, grad_reduced, common), input.device)
    launch, weights, biases = plan_grad_weight(grad, input, reduced, bias is not None, common)
    _run(launch, input.device)
    grad_weight = weights.sum(0).to(weight.dtype).view(weight.shape)
    return grad_input, grad_reduced, grad_weight, None if biases is None else biases.sum(0).to(weight.dtype)
