"""The C++ operator (csrc/) on CPU tensors: layouts, types, and the calls.

The C++ side takes images in channels_last, in float32, float64 and bfloat16, and adds up in float32 (float64 for
float64). float16 is converted here.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels.
"""

import ctypes
import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from . import build
from .shapes import empty_kernel, empty_product, layout, output_hw

logger = logging.getLogger("involution.ops")

_FIELDS = """
    batch channels groups height width out_height out_width size stride padding dilation hidden
    x_batch x_row x_pixel kernel_batch kernel_row kernel_pixel kernel_tap threads
    in_channels out_channels projected
"""


NO_MEMORY = "there is no memory left for the buffers of an operator: a smaller batch or smaller pictures need less"


class _Problem(ctypes.Structure):
    """csrc/driver.h has its mirror."""

    _fields_ = [(name, ctypes.c_int64) for name in _FIELDS.split()]


@functools.cache
def _failure(level: str, half: bool) -> str | None:
    try:
        build.library(level, half)
    except build.BuildError as error:
        logger.warning("the CPU operator runs as slower torch operations: %s", error)
        return str(error)
    return None


def unsupported(input: Tensor, kernel: Tensor) -> str | None:
    """Why these tensors cannot run here, or None."""
    if input.device.type != "cpu" or kernel.device.type != "cpu":
        return "the tensors are not on the CPU"
    if kernel.dtype != input.dtype:
        return f"the tensors are {input.dtype} and {kernel.dtype}"
    if input.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        return f"{input.dtype} is not a type it knows"
    return _failure(build.instruction_set(), input.dtype == torch.bfloat16)


@functools.cache
def find(name: str, dtype: torch.dtype, level: str, tensors: int) -> Callable[..., int]:
    suffix = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "half"}[dtype]
    function = getattr(build.library(level, dtype == torch.bfloat16), f"involution_{name}_{suffix}")
    function.argtypes, function.restype = [ctypes.c_void_p] * (1 + tensors), ctypes.c_int
    return function


def call(name: str, dtype: torch.dtype, problem: ctypes.Structure, *tensors: Tensor | None) -> None:
    """Run ``involution_<name>_<type>`` of the library on a problem and the memory of tensors."""
    assert all(t is None or t.numel() for t in tensors), f"{name} takes no empty tensors"
    function = find(name, dtype, build.instruction_set(), len(tensors))
    if function(ctypes.byref(problem), *[None if t is None else t.data_ptr() for t in tensors]):
        raise MemoryError(NO_MEMORY)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stored(tensor: Tensor) -> Tensor:
    """In a type that the C++ side reads."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _pixels(image: Tensor, dense: bool = False) -> Tensor:
    """(B, C, H, W) -> its pixels (B, H, W, C) with the channels side by side."""
    pixels = stored(image).permute(0, 2, 3, 1)
    return pixels.contiguous() if dense or (pixels.stride(3) != 1 and pixels.shape[3] > 1) else pixels


def _new_image(shape: tuple[int, ...], pixels: Tensor) -> Tensor:
    """(B, C, H, W) in channels_last. No view of a (B, H, W, C): autograd adds another gradient to one in place only
    where nobody else holds its memory."""
    return torch.empty(shape, dtype=pixels.dtype, memory_format=torch.channels_last)


def placed(image: Tensor, like: Tensor) -> Tensor:
    """In the type and memory format of `like`."""
    return image.to(like.dtype).contiguous(memory_format=layout(like))


def describe(pixels: Tensor, size: int, groups: int, stride: int, padding: int, dilation: int) -> _Problem:
    batch, height, width, channels = pixels.shape
    out_height, out_width = output_hw(pixels.permute(0, 3, 1, 2), size, stride, padding, dilation)
    x_batch, x_row, x_pixel, _ = pixels.stride()
    return _Problem(
        batch=batch, channels=channels, groups=groups, height=height, width=width, out_height=out_height,
        out_width=out_width, size=size, stride=stride, padding=padding, dilation=dilation, x_batch=x_batch,
        x_row=x_row, x_pixel=x_pixel, threads=torch.get_num_threads(),
    )  # fmt: skip


def out_shape(problem: _Problem) -> tuple[int, ...]:
    return problem.batch, problem.channels, problem.out_height, problem.out_width


def _taps(kernel: Tensor) -> Tensor:
    """(B, G, K, K, Ho, Wo) -> (B, Ho, Wo, G*K*K), a view wherever the taps have one step in memory."""
    return kernel.permute(0, 4, 5, 1, 2, 3).flatten(3)


def _describe_taps(problem: _Problem, taps: Tensor) -> None:
    problem.kernel_batch, problem.kernel_row, problem.kernel_pixel, problem.kernel_tap = taps.stride()


def forward(input: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """input (B, C, H, W), kernel (B, G, K, K, Ho, Wo) -> (B, C, Ho, Wo) in the layout of `input`."""
    pixels = _pixels(input)
    problem = describe(pixels, kernel.shape[2], kernel.shape[1], stride, padding, dilation)
    taps = _taps(stored(kernel))
    _describe_taps(problem, taps)
    out = _new_image(out_shape(problem), pixels)
    call("forward", pixels.dtype, problem, pixels, taps, out)
    return placed(out, input)


def backward(
    grad: Tensor,
    input: Tensor,
    kernel: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    needs_input: bool,
    needs_kernel: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in the layouts of input (B, C, H, W) and kernel (B, G, K, K, Ho, Wo)."""
    dtype = kernel.dtype
    pixels, grads = _pixels(input), _pixels(grad, dense=True)
    problem = describe(pixels, kernel.shape[2], kernel.shape[1], stride, padding, dilation)
    kernel = stored(kernel)
    grad_kernel = empty_kernel(kernel) if needs_kernel else None
    taps, grad_taps = _taps(kernel), None if grad_kernel is None else _taps(grad_kernel)
    if grad_taps is not None and grad_taps.stride() != taps.stride():
        taps = torch.empty_like(grad_taps).copy_(taps)
    _describe_taps(problem, taps)
    grad_input = _new_image(input.shape, pixels) if needs_input else None
    call("backward", pixels.dtype, problem, grads, pixels, taps, grad_input, grad_taps)
    return (
        None if grad_input is None else placed(grad_input, input),
        None if grad_kernel is None else grad_kernel.to(dtype),
    )


def transpose(
    grad: Tensor, kernel: Tensor, height: int, width: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """The gradient of the input alone: grad (B, C, Ho, Wo) -> (B, C, height, width)."""
    grads = _pixels(grad, dense=True)
    out = _new_image((grad.shape[0], grad.shape[1], height, width), grads)
    pixels = out.permute(0, 2, 3, 1)
    problem = describe(pixels, kernel.shape[2], kernel.shape[1], stride, padding, dilation)
    taps = _taps(stored(kernel))
    _describe_taps(problem, taps)
    call("backward", grads.dtype, problem, grads, None, taps, out, None)
    return placed(out, grad)


def product(
    query: Tensor, key: Tensor, kernel_size: int, groups: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """The gradient of the kernel alone: query (B, C, Ho, Wo), key (B, C, H, W) -> (B, G, K, K, Ho, Wo)."""
    pixels, queries = _pixels(key), _pixels(query, dense=True)
    problem = describe(pixels, kernel_size, groups, stride, padding, dilation)
    out = empty_product(stored(query), groups, kernel_size)
    taps = _taps(out)
    _describe_taps(problem, taps)
    call("backward", pixels.dtype, problem, queries, pixels, None, None, taps)
    return out.to(query.dtype)


def span_forward(
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """The fused operator: (B, C, H, W), (B, R, Ho, Wo), (G*K*K, R, 1, 1), (G*K*K,) -> (B, C, Ho, Wo)."""
    pixels = _pixels(input)
    problem, operands = _span_problem(pixels, reduced, weight, bias, kernel_size, stride, padding, dilation)
    out = _new_image(out_shape(problem), pixels)
    call("span_forward", pixels.dtype, problem, pixels, *operands, out)
    return placed(out, input)


def span_backward(
    grad: Tensor,
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of input, reduced, weight and bias; the last two in the types that these have."""
    pixels, grads = _pixels(input), _pixels(grad, dense=True)
    problem, operands = _span_problem(pixels, reduced, weight, bias, kernel_size, stride, padding, dilation)
    rows = operands[1]
    library = build.library(build.instruction_set(), pixels.dtype == torch.bfloat16)
    chunks = library.involution_chunks(ctypes.byref(problem))
    grad_input = _new_image(input.shape, pixels)
    grad_reduced = _new_image((chunks * reduced.shape[0], *reduced.shape[1:]), pixels)
    sums = wide(pixels.dtype)
    grad_rows, grad_bias = torch.empty_like(rows, dtype=sums), rows.new_empty(rows.shape[0], dtype=sums)
    call(
        "span_backward", pixels.dtype, problem, grads, pixels, *operands, grad_input, grad_reduced, grad_rows, grad_bias
    )
    if chunks > 1:
        grad_reduced = grad_reduced.unflatten(0, (chunks, -1)).sum(0)
    return (
        placed(grad_input, input),
        placed(grad_reduced, reduced),
        grad_rows.view(weight.shape).to(weight.dtype),
        None if bias is None else grad_bias.to(bias.dtype),
    )


def _span_problem(
    pixels: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[_Problem, tuple[Tensor, Tensor, Tensor | None]]:
    groups = weight.shape[0] // (kernel_size * kernel_size)
    problem = describe(pixels, kernel_size, groups, stride, padding, dilation)
    problem.hidden = reduced.shape[1]
    rows = weight.flatten(1).to(pixels.dtype).contiguous()
    bias = None if bias is None else bias.to(wide(pixels.dtype)).contiguous()
    return problem, (_pixels(reduced, dense=True), rows, bias)
