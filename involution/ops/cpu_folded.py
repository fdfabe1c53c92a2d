"""The C++ operator for a whole layer in inference (csrc/folded.h): one image takes 100 microseconds, so each of the few
that Python takes counts.

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


@functools.lru_cache(maxsize=256)
def _folded_call(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, threads: int, level: str,
    hidden: int, groups: int, size: int, stride: int, dilation: int,
) -> tuple[Callable[..., None], Any, tuple[int, ...]]:  # fmt: skip
    """The function, its first argument and the shape of the result."""
    pixels = torch.empty_strided(shape, strides, device="meta").permute(0, 2, 3, 1)
    problem = cpu.describe(pixels, size, groups, stride, dilation * (size - 1) // 2, dilation)
    problem.hidden, problem.threads = hidden, threads
    return cpu.find("folded_forward", dtype, level, 3), ctypes.byref(problem), cpu.out_shape(problem)


def forward(input: Tensor, packed: Tensor, *options: int) -> Tensor:
    """(B, C, H, W) -> (B, C, Ho, Wo); `packed` and the options are folded.py's."""
    image = cpu.stored(input)
    multiplied = image.dtype
    if multiplied == torch.bfloat16 and not build.multiplies_half(build.instruction_set()):
        multiplied = torch.float32
    if channels_dense(input) and image is input and packed.dtype == multiplied:
        return _forward(input, packed, *options)
    image = image.contiguous(memory_format=torch.channels_last)
    return cpu.placed(_forward(image, packed.to(multiplied), *options), input)


def _forward(input: Tensor, packed: Tensor, *options: int) -> Tensor:
    level, threads = build.instruction_set(), torch.get_num_threads()
    function, problem, shape = _folded_call(input.shape, input.stride(), input.dtype, threads, level, *options)
    out = torch.empty(shape, dtype=input.dtype, memory_format=torch.channels_last)
    function(problem, input.data_ptr(), packed.data_ptr(), out.data_ptr())
    return out
