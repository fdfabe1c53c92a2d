"""Our operators in AOTInductor packages: calls of the C++ kernels, which become part of the package (csrc/package.cpp).

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import build

#: operator -> integers among its arguments, behind two tensors
_INTEGERS = {"folded_bottleneck2d": 8, "folded_involution2d": 5, "involution2d": 3, "neighbourhood_product": 5}
_keeping = False


def keeps(*tensors: Tensor) -> bool:
    """Whether a program that is being written down calls our operators on such tensors."""
    return _keeping and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def instructions() -> list[str]:
    """What the kernels and inductor's own code use of an x86-64 processor, as g++ calls it (avx2 ...)."""
    from torch._inductor import cpu_vec_isa  # slow to import

    flags = [*cpu_vec_isa.pick_vec_isa().build_arch_flags().split(), *build.instruction_flags(build.instruction_set())]
    return sorted({flag.removeprefix("-m") for flag in flags if "=" not in flag})


@contextmanager
def kept() -> Iterator[dict[str, Any]]:
    """Programs written down meanwhile call our operators; gives the options with which inductor links them.

    Raises:
        BuildError: they cannot be compiled.
    """
    global _keeping
    path = build.package_object(build.instruction_set(), instructions())
    before = os.environ.get("LIBRARY_PATH")  # where linkers look too; inductor has no option for it
    os.environ["LIBRARY_PATH"] = os.pathsep.join([str(path.parent), *([before] if before else [])])
    _keeping = True
    try:
        yield {
            "aot_inductor.custom_ops_to_c_shims": {_overload(name): [_declaration(name)] for name in _INTEGERS},
            "aot_inductor.custom_op_libs": [f":{path.name}"],
        }
    finally:
        _keeping = False
        if before is None:
            del os.environ["LIBRARY_PATH"]
        else:
            os.environ["LIBRARY_PATH"] = before


def _overload(name: str) -> Any:
    return getattr(torch.ops.involution, name).default


def _declaration(name: str) -> str:
    arguments = ["AtenTensorHandle"] * 2 + ["int64_t"] * _INTEGERS[name] + ["AtenTensorHandle*"]
    return f"AOTITorchError aoti_torch_cpu_{name}({', '.join(arguments)})"


def involution2d(input: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """``torch.ops.involution.involution2d``, its operands as the C++ side takes them: a pixel's G*K*K taps together."""
    taps = kernel.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    return torch.ops.involution.involution2d(image(input), taps, stride, padding, dilation)


def neighbourhood_product(
    query: Tensor, key: Tensor, kernel_size: int, groups: int, stride: int, dilation: int
) -> Tensor:
    """``torch.ops.involution.neighbourhood_product``, likewise."""
    options = kernel_size, groups, stride, dilation * (kernel_size - 1) // 2, dilation
    return torch.ops.involution.neighbourhood_product(image(query), image(key), *options)


def image(tensor: Tensor) -> Tensor:
    """As the C++ side takes it."""
    return tensor.contiguous(memory_format=torch.channels_last)
