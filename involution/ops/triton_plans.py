"""What the Triton backend launches: each kernel's arguments and its number of programs, from shapes alone.

Tensors may lie on the meta device: scripts/check_kernels.py compiles these launches on machines without a GPU.

B images, C channels, G groups, K taps a side, H x W input, Ho x Wo output, R reduced channels.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import triton_gradients, triton_kernels
from . import triton_tiles as tiles
from .shapes import output_hw

ACCUMULATE = {torch.float64: tl.float64} | dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), tl.float32)


class Launch(NamedTuple):
    """A kernel, its arguments with those of its tile, the number of programs and the warps of each.

    Args:
        registers: at most so many a thread; None leaves it to the compiler (``tiles.registers``).
    """

    kernel: Any
    arguments: dict[str, Any]
    programs: int
    warps: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's. Multiply-adds stay fused whatever Triton's default is (3.10 changes it)."""
        return {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": True, "maxnreg": self.registers}


def ceil(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes ten times as long, and a launch needs five of them."""
    return -(-a // b)


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
    taps = max(8, tiles.power(kernel_size))
    arguments = {
        "H": input.shape[2], "W": input.shape[3], "HO": height, "WO": width, "G": groups, "GC": channels,
        "K": kernel_size, "S": stride, "P": padding, "D": dilation, "ACC": ACCUMULATE[input.dtype],
        "BC": min(64, tiles.power(channels)), "KP": taps, "LOG_KP": taps.bit_length() - 1,
        "RUN": 7 if kernel_size <= 7 and input.dtype != torch.float64 else 4,  # else the registers do not suffice
    }  # fmt: skip
    if reduced is not None:
        arguments |= {"R": reduced.shape[1], "RP": max(16, tiles.power(reduced.shape[1]))}
        # the span is a convolution, so that its products are as exact as cuDNN's are set to be
        arguments["PRECISION"] = "tf32" if input.dtype == torch.float32 and _convolutions_use_tf32() else "ieee"
    return arguments


def _convolutions_use_tf32() -> bool:
    """cuDNN's setting. The older name of it raises where a program has used the newer one."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"


def _exact(input: Tensor, arguments: dict[str, Any]) -> bool:
    return input.dtype == torch.float32 and arguments["PRECISION"] == "ieee"


def _runs(arguments: dict[str, Any], images: int, rows: str = "HO", width: str = "WO") -> int:
    return images * arguments[rows] * ceil(arguments[width], arguments["RUN"])


def _taps_from(kernel: Tensor | None, reduced: Tensor | None, *span: Tensor | None) -> dict[str, Any]:
    """Where taps come from: a kernel, or the operands of the span convolution."""
    arguments: dict[str, Any] = {"kernel": kernel, "reduced": reduced, "weight": span[0], "bias": span[1]}
    arguments["reduced_strides"] = None if reduced is None else reduced.stride()
    arguments["RSTEP"] = None if reduced is None else reduced.stride(3)
    if kernel is None:
        return arguments | {"kernel_strides": None, "KSTEP": None}
    return arguments | {
        "kernel_strides": kernel.stride(),
        "KSTEP": kernel.stride(5),
        "R": 1,
        "RP": 16,
        "PRECISION": "ieee",
    }


def plan_forward(
    input: Tensor, kernel: Tensor | None, reduced: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    out: Tensor, common: dict[str, Any],
) -> Launch:  # fmt: skip
    arguments = common | _taps_from(kernel, reduced, weight, bias)
    arguments |= {"x": input, "x_strides": input.stride(), "STEP": input.stride(3)}
    arguments |= {"out": out, "out_strides": out.stride(), "WIDE": _is_wide(input, kernel, reduced, out)}
    arguments["total"] = _runs(common, input.shape[0])
    return _tiled(triton_kernels.forward_kernel, arguments, tiles.forward_tile(arguments, _exact(input, arguments)))


def plan_grad_input(
    grad: Tensor, kernel: Tensor | None, reduced: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    out: Tensor, common: dict[str, Any],
) -> Launch:  # fmt: skip
    arguments = common | _taps_from(kernel, reduced, weight, bias)
    arguments |= {"grad": grad, "grad_strides": grad.stride(), "STEP": grad.stride(3)}
    if common["S"] > 1:
        arguments["RUN"] = ceil(4, common["S"]) * common["S"]  # a multiple of the stride: see the kernel
    arguments |= {"out": out, "out_strides": out.stride(), "WIDE": _is_wide(grad, kernel, reduced, out)}
    every = common["S"] if common["D"] == 1 else 1
    arguments["total"] = grad.shape[0] * ceil(common["H"], every) * ceil(common["W"], arguments["RUN"])
    launch = _tiled(
        triton_kernels.grad_input_kernel, arguments, tiles.grad_input_tile(arguments, _exact(grad, arguments))
    )
    return launch._replace(programs=every * launch.programs)


def plan_grad_kernel(grad: Tensor, input: Tensor, out: Tensor, common: dict[str, Any]) -> Launch:
    arguments = common | {"x": input, "grad": grad, "x_strides": input.stride(), "grad_strides": grad.stride()}
    arguments |= {"STEP": input.stride(3), "total": _runs(common, input.shape[0])}
    arguments |= {"out": out, "out_strides": out.stride(), "KSTEP": out.stride(5), "WIDE": _is_wide(grad, input, out)}
    launch = _tiled(triton_gradients.grad_kernel_kernel, arguments, tiles.grad_kernel_tile(arguments))
    return launch._replace(programs=_tiles(launch.arguments))


def _tiled(kernel: Any, arguments: dict[str, Any], tile: tiles.Tile) -> Launch:
    """The launch in a tile, with a program for each tile of runs, groups and chunks of channels."""
    a = arguments | {"J": tile.J, "GB": tile.GB}
    return Launch(kernel, a, _tiles(a) * ceil(a["GC"], a["BC"]), tile.warps, tiles.registers(a))


def _tiles(a: dict[str, Any]) -> int:
    return ceil(a["total"], a["J"]) * ceil(a["G"], a["GB"])


def in_tile(launch: Launch, tile: tiles.Tile) -> Launch:
    """The same work in other tiles of runs and groups."""
    a = launch.arguments | {"J": tile.J, "GB": tile.GB}
    programs = launch.programs // _tiles(launch.arguments) * _tiles(a)
    return launch._replace(arguments=a, programs=programs, warps=tile.warps)
