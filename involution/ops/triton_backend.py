"""The Triton backend (GPU, or TRITON_INTERPRET=1 on the CPU): sizes, tuning and launches of the kernels beside it.

B images, C channels, G groups, K taps a side, H x W input, Ho x Wo output, R reduced channels.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_gradients, triton_kernels
from .shapes import empty_kernel, empty_output, output_hw
from .triton_kernels import WINDOW

INTERPRETED = triton.knobs.runtime.interpret
_ACCUMULATE = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float32, torch.bfloat16: tl.float32}


class Launch(NamedTuple):
    """A kernel, its arguments, and its number of programs as a function of all arguments with the tuned ones."""

    kernel: Any
    arguments: dict[str, Any]
    programs: Callable[[dict[str, Any]], int]


# ---- tuning ----------------------------------------------------------------------------------------------------------


def _fitting(configs: list[triton.Config], named: dict[str, Any], **arguments: Any) -> list[triton.Config]:
    """Configurations whose groups exist and whose tile of GB * BC channels stays within 64 (more would spill)."""
    values = {**named, **arguments}

    def fits(groups: int) -> bool:
        return groups == 1 or (groups < 2 * values["G"] and groups * values["BC"] <= 64)

    return [config for config in configs if fits(config.kwargs.get("GB", 1))]


def _tuned(kernel: Any, configs: list[tuple[int, int | None, int]], key: str) -> Any:
    """Autotuning over (J, GB or None, warps).  The batch size is no part of the key.  J and, where it is tuned, GB do
    not change the order of any sum, so the choice never changes a result."""
    options: dict[str, Any] = {"key": key.split(), "prune_configs_by": {"early_config_prune": _fitting}}
    if "cache_results" in inspect.signature(triton.autotune).parameters:
        options["cache_results"] = True  # on disk, where Triton keeps its compiled kernels
    choices = [
        triton.Config({"J": j} | ({} if gb is None else {"GB": gb}), num_warps=warps, num_stages=2)
        for j, gb, warps in configs
    ]
    return triton.autotune(choices, **options)(kernel)


_TILES: list[tuple[int, int | None, int]] = [(4, 4, 4), (8, 4, 4), (8, 4, 8), (8, 2, 4), (16, 1, 4), (32, 1, 8)]
_KEY = "G GC R K S P D H W WIDE x_strides"
_forward = _tuned(triton_kernels.forward_kernel, _TILES, _KEY + " kernel_strides reduced_strides")
_grad_input = _tuned(
    triton_kernels.grad_input_kernel, _TILES, "G GC R K S P D H W WIDE grad_strides kernel_strides reduced_strides"
)
_grad_kernel = _tuned(triton_gradients.grad_kernel_kernel, _TILES, "G GC K S P D H W WIDE x_strides out_strides")
_grad_reduced = _tuned(triton_gradients.grad_reduced_kernel, [(2, None, 4), (4, None, 4), (8, None, 8)], _KEY)
_grad_weight = _tuned(triton_gradients.grad_weight_kernel, [(8, None, 4), (8, None, 8)], _KEY)


# ---- launches --------------------------------------------------------------------------------------------------------


def _power(value: int, least: int = 1) -> int:
    return max(least, triton.next_power_of_2(value))


def _windows(rows: int, width: int, images: int) -> int:
    return images * rows * triton.cdiv(width, WINDOW)


def _is_wide(*tensors: Tensor | None) -> bool:
    """Whether some offset needs 64 bits (they cost registers everywhere else)."""
    spans = (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors if t is not None)
    return max(spans) >= 2**31


def _strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.stride()


def _common(input: Tensor, kernel_size: int, groups: int, stride: int, padding: int, dilation: int) -> dict[str, Any]:
    """The arguments that all kernels share."""
    height, width = output_hw(input, kernel_size, stride, padding, dilation)
    channels = input.shape[1] // groups
    return {
        "H": input.shape[2], "W": input.shape[3], "HO": height, "WO": width, "G": groups, "GC": channels,
        "K": kernel_size, "S": stride, "P": padding, "D": dilation, "ACC": _ACCUMULATE[input.dtype],
        "BC": min(64, _power(channels, 16)),
        "Q": _power((WINDOW - 1) * stride + (kernel_size - 1) * dilation + 1, 16),
    }  # fmt: skip


def _span_sizes(reduced: Tensor | None, kernel_size: int) -> dict[str, int]:
    channels = 1 if reduced is None else reduced.shape[1]
    return {"R": channels, "RP": _power(channels, 16), "KP": _power(kernel_size, 8)}


def plan_forward(
    input: Tensor, kernel: Tensor | None, reduced: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    out: Tensor, common: dict[str, Any],
) -> Launch:  # fmt: skip
    arguments = common | _span_sizes(reduced, common["K"])
    arguments |= {"x": input, "kernel": kernel, "reduced": reduced, "weight": weight, "bias": bias, "out": out}
    arguments |= {"x_strides": input.stride(), "kernel_strides": _strides(kernel)}
    arguments |= {"reduced_strides": _strides(reduced), "out_strides": out.stride()}
    arguments |= {"total": _windows(common["HO"], common["WO"], input.shape[0])}
    return Launch(_forward, arguments | {"WIDE": _is_wide(input, kernel, reduced, out)}, _tiles_by_groups_by_chunks)


def plan_grad_input(
    grad: Tensor, kernel: Tensor | None, reduced: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    out: Tensor, common: dict[str, Any],
) -> Launch:  # fmt: skip
    arguments = common | _span_sizes(reduced, common["K"])
    arguments |= {"grad": grad, "kernel": kernel, "reduced": reduced, "weight": weight, "bias": bias, "out": out}
    arguments |= {"grad_strides": grad.stride(), "kernel_strides": _strides(kernel)}
    arguments |= {"reduced_strides": _strides(reduced), "out_strides": out.stride()}
    arguments["Q"] = _power((WINDOW - 1 + (common["K"] - 1) * common["D"]) // common["S"] + 1, 16)
    arguments["total"] = _windows(common["H"], common["W"], grad.shape[0])
    return Launch(_grad_input, arguments | {"WIDE": _is_wide(grad, kernel, reduced, out)}, _tiles_by_groups_by_chunks)


def _correlation(grad: Tensor, input: Tensor, common: dict[str, Any], *others: Tensor) -> dict[str, Any]:
    total = _windows(common["HO"], common["WO"], input.shape[0])
    wide = _is_wide(grad, input, *others)
    strides = {"x_strides": input.stride(), "grad_strides": grad.stride()}
    return common | strides | {"x": input, "grad": grad, "total": total, "WIDE": wide}


def plan_grad_kernel(grad: Tensor, input: Tensor, out: Tensor, common: dict[str, Any]) -> Launch:
    arguments = _correlation(grad, input, common, out) | {"out": out, "out_strides": out.stride()}
    return Launch(_grad_kernel, arguments, lambda a: triton.cdiv(a["total"], a["J"]) * triton.cdiv(a["G"], a["GB"]))


def plan_grad_reduced(grad: Tensor, input: Tensor, weight: Tensor, out: Tensor, common: dict[str, Any]) -> Launch:
    arguments = _correlation(grad, input, common, out) | _span_sizes(out, common["K"])
    arguments |= {"weight": weight, "out": out, "out_strides": out.stride()}
    arguments["GB"] = _groups_at_once(arguments, 64)
    return Launch(_grad_reduced, arguments, lambda a: triton.cdiv(a["total"], a["J"]))


def plan_grad_weight(
    grad: Tensor, input: Tensor, reduced: Tensor, with_bias: bool, common: dict[str, Any]
) -> tuple[Launch, Tensor, Tensor | None]:
    """The launch, and the partial sums of weight (parts, G*K*K, R) and bias (parts, G*K*K) that it fills."""
    arguments = _correlation(grad, input, common, reduced) | _span_sizes(reduced, common["K"])
    taps, channels = common["G"] * common["K"] ** 2, reduced.shape[1]
    budget = 128  # GB * RP: with UB = 7 rows of 8 taps the sums take 7168 registers of a program
    arguments["GB"] = groups = min(_groups_at_once(arguments, 64), _power(budget // arguments["RP"]))
    arguments["UB"] = rows = max(1, min(common["K"], 8192 // (groups * arguments["RP"] * arguments["KP"])))
    programs = triton.cdiv(common["G"], groups) * triton.cdiv(common["K"], rows)
    # about four programs a multiprocessor of the largest GPUs, so that the order of the sums depends on no machine
    parts = min(triton.cdiv(528, programs), triton.cdiv(arguments["total"], 8))
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    weights = torch.empty((parts, taps, channels), dtype=accumulate, device=input.device)
    biases = torch.empty((parts, taps), dtype=accumulate, device=input.device) if with_bias else None
    arguments |= {"reduced": reduced, "reduced_strides": reduced.stride(), "parts": parts}
    arguments |= {"weight_parts": weights, "bias_parts": biases}
    return Launch(_grad_weight, arguments, lambda _: programs * parts), weights, biases


def _groups_at_once(arguments: dict[str, Any], channels: int) -> int:
    return max(1, min(_power(arguments["G"]), channels // arguments["BC"]))


def _tiles_by_groups_by_chunks(a: dict[str, Any]) -> int:
    return triton.cdiv(a["total"], a["J"]) * triton.cdiv(a["G"], a["GB"]) * triton.cdiv(a["GC"], a["BC"])


def _run(launch: Launch, device: torch.device) -> None:
    if launch.arguments["total"] == 0:
        return
    if INTERPRETED:  # one small configuration: nothing to tune
        small = {"J": 2, "GB": 2} | launch.arguments
        launch.kernel.fn[(launch.programs(small),)](**small)
        return
    with torch.cuda.device(device):
        launch.kernel[lambda meta: (launch.programs(meta),)](**launch.arguments)


# ---- the backend's functions (see functional.py for the shapes) --------------------------------------------------------


def unsupported(input: Tensor, kernel: Tensor) -> str | None:
    """Why this backend cannot run on these tensors; None if it can."""
    if input.dtype not in _ACCUMULATE or kernel.dtype != input.dtype:
        return f"input is {input.dtype} and kernel {kernel.dtype}; both have to be one of float64, 32, 16, bfloat16"
    if INTERPRETED:
        return None
    if input.device.type != "cuda":
        return f"the tensors are on {input.device}; it needs a CUDA device (or TRITON_INTERPRET=1)"
    if torch.cuda.get_device_capability(input.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def forward(input: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    common = _common(input, kernel.shape[2], kernel.shape[1], stride, padding, dilation)
    out = empty_output(input, input.shape[1], common["HO"], common["WO"])
    _run(plan_forward(input, kernel, None, None, None, out, common), input.device)
    return out


def backward(
    grad: Tensor, input: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int, needs_input: bool,
    needs_kernel: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    common = _common(input, kernel.shape[2], kernel.shape[1], stride, padding, dilation)
    grad_input = empty_output(input, *input.shape[1:]) if needs_input else None
    grad_kernel = empty_kernel(kernel) if needs_kernel else None
    if grad_input is not None:
        _run(plan_grad_input(grad, kernel, None, None, None, grad_input, common), input.device)
    if grad_kernel is not None:
        _run(plan_grad_kernel(grad, input, grad_kernel, common), input.device)
    return grad_input, grad_kernel


def _span(
    input: Tensor, reduced: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, *options: int
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    weight = weight.reshape(weight.shape[0], reduced.shape[1]).contiguous()
    common = _common(input, kernel_size, weight.shape[0] // kernel_size**2, *options)
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
