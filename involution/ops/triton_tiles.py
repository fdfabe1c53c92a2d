"""Which tile a Triton kernel works on: one configuration a shape, by a rule, never by a measurement.

A tuner would choose by what the first batch happens to be, on every rank anew; tiles whose sums run
in another order would then give other bits. The rule takes the first candidate whose registers suffice. At every shape
of RedNet-50 that is the one with the lowest floor of time in the compiled sm_90 code, within 4 % (commit 22c6283 and
later; `python scripts/check_kernels.py` prints registers, spills and shared memory of what it chooses).
"""

from typing import Any, NamedTuple


class Tile(NamedTuple):
    """J runs x GB groups a program, spread over `warps` of 32 threads."""

    J: int
    GB: int
    warps: int = 4


TILES = (Tile(16, 4), Tile(8, 4), Tile(32, 2), Tile(16, 1), Tile(4, 4), Tile(4, 2), Tile(8, 1), Tile(2, 1))
RUNS = (16, 8, 2)  # for kernels whose groups are fixed


def registers_suffice(tile: Tile, a: dict[str, Any], hidden: int) -> bool:
    """Whether a thread can hold its share: at most 8 channels of a run, and `hidden` values of the reduced tile.

    Args:
        a: the launch's arguments; G groups, BC channels at once, RP reduced channels (padded).
        hidden: measured in compiled code, a bound a kernel.
    """
    channels = tile.J * tile.GB * a["BC"] / (32 * tile.warps)
    return 2 * a["G"] > tile.GB and channels <= 8 and tile.J * a.get("RP", 16) <= hidden * tile.warps


def forward_tile(a: dict[str, Any], exact: bool = False) -> Tile:
    """`exact`: products of float32 without tensor cores, which hold their operands in registers."""
    return next((t for t in TILES if registers_suffice(t, a, 128 if exact else 512)), TILES[-1])


def grad_input_tile(a: dict[str, Any], exact: bool = False) -> Tile:
    """Two tiles of taps are alive where a run touches more than 8 output columns: fewer channels beside a wide one.

    Nor is there room for the weights of many groups: four times 256 reduced channels would spill 136 bytes.
    """

    def fits(tile: Tile) -> bool:
        channels = tile.J * tile.GB * a["BC"] / (32 * tile.warps)
        beside = tile.J * a["RP"] / tile.warps + 16 * channels
        return registers_suffice(tile, a, 128 if exact else 256) and beside <= 320 and tile.GB * a["RP"] <= 512

    return next((t for t in TILES if fits(t)), TILES[-1])


def grad_kernel_tile(a: dict[str, Any]) -> Tile:
    return next((t for t in TILES if registers_suffice(t, a, 512)), TILES[-1])


def grad_reduced_tile(a: dict[str, Any]) -> Tile:
    """All groups are summed up by one program, GB at a time: 2 to 4, as the tensor cores sum over 16 taps or more."""
    groups = max(2, min(4, power(a["G"]), 64 // a["BC"]))
    tiles = [Tile(runs, groups) for runs in RUNS]
    return next((t for t in tiles if registers_suffice(t, {**a, "G": groups}, 256)), tiles[-1])


def grad_weight_tile(a: dict[str, Any], element_size: int) -> Tile:
    """The sums of a row, KP taps x GB groups x RP, are at most 2048 values of a program's registers."""
    groups = min(4, power(a["G"]), max(1, 64 // a["BC"]), max(1, 256 // a["RP"]))
    runs = min(1024 // (groups * max(16, a["BC"])), 2048 // a["RP"])
    if a["S"] > 1 and a["RP"] >= 64:
        runs //= 2  # the input's columns are twice as many; before sm_90 a thread would spill 232 bytes
    return Tile(max(2, 2 * runs // element_size), groups)  # wider types take more shared memory


def grad_weight_rows(tile: Tile, a: dict[str, Any]) -> int:
    """Rows of taps a program: two share most input rows (in L1), more take minutes to compile.

    One where a thread holds 8 channels of a run beside the widest sums: two would spill before sm_90 (256 x 14 x 14,
    288 bytes), and gain nothing there. One for groups of a channel, too, which threads share: each has all products.
    """
    channels = tile.J * tile.GB * a["BC"] / (32 * tile.warps)
    return 1 if 1 in (a["K"], a["BC"]) or (channels >= 8 and tile.GB * a["RP"] >= 256) else 2


def power(value: int) -> int:
    """The next power of two."""
    return 1 << max(0, value - 1).bit_length()
