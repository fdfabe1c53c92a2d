"""Which tile a Triton kernel works on, and where its taps are made: one configuration a shape, by a rule, never by a
measurement.

A tuner would choose by what the first batch happens to be, on every rank anew; tiles whose sums run
in another order would then give other bits. The rule takes the first candidate whose registers suffice, in an order
that was measured on an H100 (RedNet-50, batch 128, bf16: docs/benchmarks/gpu.md). `scripts/check_kernels.py`
prints registers, spills and shared memory of what it chooses.
"""

from typing import Any, NamedTuple

import torch


class Tile(NamedTuple):
    """J runs x GB groups a program, spread over `warps` of 32 threads."""

    J: int
    GB: int
    warps: int = 4


TILES = (
    Tile(8, 8), Tile(8, 4, 2), Tile(16, 4), Tile(8, 4), Tile(16, 2, 2), Tile(16, 1), Tile(4, 4), Tile(4, 2), Tile(8, 1),
    Tile(2, 1),
)  # fmt: skip


def share(tile: Tile, a: dict[str, Any]) -> float:
    """Channels of a run that a thread has; ``a`` as for ``registers_suffice``."""
    return tile.J * tile.GB * a["BC"] / (32 * tile.warps)


def registers_suffice(tile: Tile, a: dict[str, Any], hidden: int, channels: int = 8) -> bool:
    """Whether a thread can hold its share: so many channels of a run, and `hidden` values of the reduced tile.

    Args:
        a: the launch's arguments; G groups, BC channels at once, RP reduced channels (padded).
        hidden: measured in compiled code, a bound a kernel.
    """
    return 2 * a["G"] > tile.GB and share(tile, a) <= channels and tile.J * a.get("RP", 16) <= hidden * tile.warps


def registers(a: dict[str, Any]) -> int | None:
    """At most so many registers a thread (255 are all that there are), or as the compiler likes.

    What it likes is to spill one or two for a program more at once, here on one architecture and there on another. With
    the paper's 7 x 7 taps for 16 channels it does not, on any.
    """
    return None if (a["K"], a["GC"]) == (7, 16) else 255


def _first(candidates: tuple[Tile, ...], a: dict[str, Any], hidden: int, channels: int = 8) -> Tile:
    return next((tile for tile in candidates if registers_suffice(tile, a, hidden, channels)), candidates[-1])


def forward_tile(a: dict[str, Any], exact: bool = False) -> Tile:
    """`exact`: products of float32 without tensor cores, which hold their operands in registers. More than 8 taps of a
    row take those of 16. The first tile is one for gradients."""
    hidden = 128 if exact else 512 if a["KP"] == 8 else 256
    return _first(TILES[1:], a, hidden)


def grad_input_tile(a: dict[str, Any], exact: bool = False) -> Tile:
    """Two tiles of taps are alive where a run touches more than 8 output columns. Made of more than 32 hidden channels
    they leave registers for half a share."""
    hidden = 128 if exact else 256 if a["KP"] == 8 else 64
    return _first(TILES, a, hidden, channels=8 if a.get("RP", 16) <= 32 else 4)


def make_taps(hidden: int, dtype: torch.dtype) -> bool:
    """Whether taps are made on the chip; else a convolution makes all kernels for that moment.

    float64, which nobody trains in, and more than a kilobyte of hidden channels (float32: 256) would take more shared
    memory than GPUs but the largest have: Table 6c's linear map has 512 of them in its last stage.
    """
    return dtype != torch.float64 and power(hidden) * dtype.itemsize <= 1024


def make_taps_again(hidden: int, dtype: torch.dtype) -> bool:
    """The same for the gradient of the input.

    Every row of input makes 13/7 of the forward's taps again. On an H100 (RedNet-50, batch 128, bf16) that is faster
    than a convolution and reading what it wrote up to 64 hidden channels: 213 us against 593 in stage 1, 93 against 149
    in stage 3; in stage 4 it is as fast, where it fits into registers. float32 is not measured.
    """
    return make_taps(hidden, dtype) and hidden <= (32 if dtype.itemsize > 2 else 64)


def grad_kernel_tile(a: dict[str, Any]) -> Tile:
    return _first(TILES, a, 512)


def power(value: int) -> int:
    """The next power of two."""
    return 1 << max(0, value - 1).bit_length()
