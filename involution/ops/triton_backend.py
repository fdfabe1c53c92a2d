"""The Triton backend (GPU, or TRITON_INTERPRET=1 on the CPU): whether it can run, and its launches.

Shapes as in functional.py.
"""

import contextlib
import functools
import subprocess
from typing import Any

import torch
import triton
from torch import Tensor

from . import composed
from . import triton_norm_plans as norm_plans
from . import triton_tiles as tiles
from .shapes import empty_kernel, empty_output, empty_product
from .triton_plans import (
    ACCUMULATE,
    Launch,
    ceil,
    common_arguments,
    plan_forward,
    plan_grad_input,
    plan_grad_kernel,
)

INTERPRETED = triton.knobs.runtime.interpret
KERNELS_AT_ONCE = 2**28  # values that a backward may store: 512 MB in 16 bits; RedNet-50's at batch 256 are 1.6e8


def _run(launch: Launch, device: torch.device) -> None:
    assert launch.programs > 0
    with contextlib.nullcontext() if INTERPRETED else torch.cuda.device(device):
        launch.kernel[(launch.programs,)](**launch.arguments, **launch.options)


@functools.cache
def _cannot_launch(device: torch.device) -> str | None:
    """Why Triton cannot launch anything on this GPU: it builds a piece of C for the driver at run time."""
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA's GPUs, and were never compiled for AMD's"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    try:
        with torch.cuda.device(device):
            triton.runtime.driver.active.get_current_target()
    except Exception as error:  # subprocess, OSError, RuntimeError: as the compiler or the driver fails
        return (
            f"Triton cannot start ({_brief(error)}); it takes the driver's libcuda, a C compiler (gcc, or the one CC "
            "names), Python's headers (Debian's python3-dev) and a folder for its cache (TRITON_CACHE_DIR)"
        )
    return None


def _brief(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):  # its text is the command, its reason on standard error
        return f"{error.cmd[0]} failed"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---- the backend's functions (shapes as in functional.py) ------------------------------------------------------------


def unsupported(input: Tensor, kernel: Tensor) -> str | None:
    """Why this backend cannot run on these tensors; None if it can."""
    if input.dtype not in ACCUMULATE or kernel.dtype != input.dtype:
        return f"input is {input.dtype} and kernel {kernel.dtype}; both have to be one of float64, 32, 16, bfloat16"
    if INTERPRETED:
        return "Triton's interpreter multiplies the bit patterns of bfloat16" if input.dtype == torch.bfloat16 else None
    if input.device.type != "cuda":
        return f"the tensors are on {input.device}; it needs a CUDA device (or TRITON_INTERPRET=1)"
    return _cannot_launch(input.device)


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
    if not tiles.make_taps(reduced.shape[1], input.dtype):
        return forward(input, composed.span_kernel(reduced, weight, bias, kernel_size), stride, padding, dilation)
    weight, bias, common = _span(input, reduced, weight, bias, kernel_size, stride, padding, dilation)
    out = empty_output(input, input.shape[1], common["HO"], common["WO"])
    _run(plan_forward(input, None, reduced, weight, bias, out, common), input.device)
    return out


def span_backward(
    grad: Tensor, input: Tensor, reduced: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, stride: int,
    padding: int, dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The kernels' gradient is stored, of as many images as KERNELS_AT_ONCE allows, and dropped."""
    options = (kernel_size, stride, padding, dilation)
    at_once = max(1, KERNELS_AT_ONCE // (weight.shape[0] * grad.shape[2] * grad.shape[3]))
    parts = zip(grad.split(at_once), input.split(at_once), reduced.split(at_once), strict=True)
    found = [_span_backward(*part, weight, bias, *options) for part in parts]
    if len(found) == 1:
        return found[0]
    inputs, hidden, weights, biases = zip(*found, strict=True)
    grad_bias = None if bias is None else _sum(biases)
    return torch.cat(inputs), torch.cat(hidden), _sum(weights), grad_bias


def _sum(parts: tuple[Tensor, ...]) -> Tensor:
    accumulate = torch.promote_types(parts[0].dtype, torch.float32)
    return torch.stack(parts).sum(0, dtype=accumulate).to(parts[0].dtype)


def _span_backward(
    grad: Tensor, input: Tensor, reduced: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, *options: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    groups = weight.shape[0] // kernel_size**2
    plain = common_arguments(input, kernel_size, groups, None, *options)
    grad_input = empty_output(input, *input.shape[1:])
    if tiles.make_taps_again(reduced.shape[1], input.dtype):
        rows, bias_row, common = _span(input, reduced, weight, bias, kernel_size, *options)
        _run(plan_grad_input(grad, None, reduced, rows, bias_row, grad_input, common), input.device)
    else:
        kernel = composed.span_kernel(reduced, weight, bias, kernel_size)
        _run(plan_grad_input(grad, kernel, None, None, None, grad_input, plain), input.device)
        del kernel
    taps = weight.shape[0]
    pixels = grad.new_empty(grad.shape[0], *grad.shape[2:], ceil(taps, composed.ALIGNED) * composed.ALIGNED)
    pixels[..., taps:] = 0
    grad_kernel = pixels[..., :taps].unflatten(3, (groups, kernel_size, kernel_size)).permute(0, 3, 4, 5, 1, 2)
    _run(plan_grad_kernel(grad, input, grad_kernel, plain), input.device)
    return grad_input, *composed.span_gradients(pixels.permute(0, 3, 1, 2), reduced, weight, bias)


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float, training: bool,
    skip: Tensor | None, groups: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """relu(norm(x) [+ skip]) and the coefficients (groups, 6, C) for the backward; updates mean and var in training,
    by one group of images after the other."""
    out, coefficients = torch.empty_like(x), torch.empty(groups, 6, x.shape[1], dtype=torch.float32, device=x.device)
    sums = norm_plans.plan_statistics(x, groups) if training else None
    if sums is not None:
        _run(sums, x.device)
    finish = norm_plans.plan_finish_statistics(x, sums, weight, bias, mean, var, coefficients, momentum, eps)
    _run(finish, x.device)
    _run(norm_plans.plan_apply(x, skip, coefficients, out), x.device)
    return out, coefficients


def norm_remake(x: Tensor, coefficients: Tensor) -> Tensor:
    """The result of `norm_forward` without a skip again, to the last bit."""
    out = torch.empty_like(x)
    _run(norm_plans.plan_apply(x, None, coefficients, out), x.device)
    return out


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, coefficients: Tensor, training: bool, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight, bias and skip. out: the result where there was a skip."""
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    masked = None if out is None else torch.empty_like(x)
    sums = norm_plans.plan_gradients(grad, x, out, coefficients, masked)
    _run(sums, x.device)
    _run(norm_plans.plan_finish_gradients(x, sums, coefficients, grad_weight, grad_bias, training), x.device)
    through = grad if masked is None else masked
    _run(norm_plans.plan_apply_gradients(through, x, coefficients, grad_x, masked is None), x.device)
    return grad_x, grad_weight, grad_bias, masked
