"""The C++ operators for a whole layer and a whole bottleneck in inference (csrc/folded.h, csrc/bottleneck.h): a layer
takes one image 100 microseconds, so each of the few that Python takes counts.

Shape legend: B batch, C channels, H W input size, Ho Wo output size.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import build, cpu
from .shapes import channels_dense

_Call = tuple[Callable[..., int], Any, tuple[int, ...]]  # a function, its first argument, the shape of the result


@functools.lru_cache(maxsize=256)
def _layer(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, threads: int, level: str,
    hidden: int, groups: int, size: int, stride: int, dilation: int,
) -> _Call:  # fmt: skip
    pixels = torch.empty_strided(shape, strides, device="meta").permute(0, 2, 3, 1)
    problem = cpu.describe(pixels, size, groups, stride, dilation * (size - 1) // 2, dilation)
    problem.hidden, problem.threads = hidden, threads
    return cpu.find("folded_forward", dtype, level, 3), ctypes.byref(problem), cpu.out_shape(problem)


@functools.lru_cache(maxsize=256)
def _bottleneck(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, threads: int, level: str,
    width: int, out_channels: int, projected: int, hidden: int, groups: int, size: int, stride: int, dilation: int,
) -> _Call:  # fmt: skip
    pixels = torch.empty(shape[0], *shape[2:], width, device="meta")
    problem = cpu.describe(pixels, size, groups, stride, dilation * (size - 1) // 2, dilation)
    problem.hidden, problem.threads = hidden, threads
    problem.in_channels, problem.out_channels, problem.projected = shape[1], out_channels, projected
    out_shape = shape[0], out_channels, problem.out_height, problem.out_width
    return cpu.find("bottleneck_forward", dtype, level, 3), ctypes.byref(problem), out_shape


def forward(input: Tensor, packed: Tensor, *options: int) -> Tensor:
    """(B, C, H, W) -> (B, C, Ho, Wo); `packed` and the options are folded.py's."""
    return _placed(_layer, input, packed, options, channels_dense(input))


def bottleneck(input: Tensor, packed: Tensor, *options: int) -> Tensor:
    """(B, M, H, W) -> (B, N, Ho, Wo); `packed` and the options are bottleneck.py's."""
    dense = channels_dense(input) and input.is_contiguous(memory_format=torch.channels_last)
    return _placed(_bottleneck, input, packed, options, dense)


def _placed(
    find: Callable[..., _Call], input: Tensor, packed: Tensor, options: tuple[int, ...], readable: bool
) -> Tensor:
    """The result in type and layout of `input`, which is converted where C++ does not read it as it is."""
    image = cpu.stored(input)
    multiplied = image.dtype
    if multiplied == torch.bfloat16 and not build.multiplies_half(build.instruction_set()):
        multiplied = torch.float32
    if readable and image is input and packed.dtype == multiplied:
        return _run(find, input, packed, options)
    image = image.contiguous(memory_format=torch.channels_last)
    return cpu.placed(_run(find, image, packed.to(multiplied), options), input)


def _run(find: Callable[..., _Call], input: Tensor, packed: Tensor, options: tuple[int, ...]) -> Tensor:
    level, threads = build.instruction_set(), torch.get_num_threads()
    function, problem, shape = find(input.shape, input.stride(), input.dtype, threads, level, *options)
    out = torch.empty(shape, dtype=input.dtype, memory_format=torch.channels_last)
    if function(problem, input.data_ptr(), packed.data_ptr(), out.data_ptr()):
        raise MemoryError(cpu.NO_MEMORY)
    return out
