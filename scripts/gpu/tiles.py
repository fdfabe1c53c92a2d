"""Every involution kernel of RedNet-50 on one GPU in the tile that the rule chooses (involution/ops/triton_tiles.py),
beside others, and the span convolutions that the fused ones do without."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from kernels.launches import Layer, launches, layers_of, networks

from involution.ops.triton_plans import Launch, in_tile
from involution.ops.triton_tiles import TILES, Tile, share


class Case(NamedTuple):
    kernel: str
    layer: Layer
    tile: Tile
    chosen: bool
    launch: Launch


def cases(batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """Fused and plain kernels in the chosen tile, first, and in those that give a thread four or eight channels."""
    ((_, model),) = networks(["rednet50"])
    for layer in layers_of(model):
        found = {
            name: launch for fused in (True, False) for name, launch in launches(layer, dtype, batch, fused).items()
        }
        for name, launch in found.items():
            a = launch.arguments
            own = Tile(a["J"], a["GB"], launch.warps)
            yield Case(name, layer, own, True, launch)
            for tile in TILES:
                if tile != own and 2 * a["G"] > tile.GB and share(tile, a) in (4, 8):
                    yield Case(name, layer, tile, False, in_tile(launch, tile))


def on_gpu(launch: Launch) -> Launch:
    """The launch with random numbers in place of tensors without memory."""
    made: dict[int, torch.Tensor] = {}

    def real(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="cuda"
            ).normal_()
        return made[id(value)]

    return launch._replace(arguments={name: real(value) for name, value in launch.arguments.items()})


def median_us(run: Callable[[], object]) -> float:
    return 1e3 * triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def microseconds(launch: Launch) -> float | None:
    """None where the kernel does not fit the GPU."""

    def run() -> None:
        launch.kernel[(launch.programs,)](**launch.arguments, **launch.options)

    try:
        return median_us(run)
    except triton.runtime.errors.OutOfResources:
        return None


def span_convolution(layer: Layer, batch: int, dtype: torch.dtype) -> float:
    """Of cuDNN's, which would make the layer's kernels."""
    (_, height, width), s, taps = layer.size, layer.stride, layer.groups * layer.kernel_size**2
    assert layer.reduced is not None
    hidden = torch.randn(batch, layer.reduced, -(-height // s), -(-width // s), dtype=dtype, device="cuda")
    weight, bias = (torch.randn(*size, dtype=dtype, device="cuda") for size in ((taps, layer.reduced, 1, 1), (taps,)))
    hidden = hidden.to(memory_format=torch.channels_last)
    return median_us(lambda: torch.nn.functional.conv2d(hidden, weight, bias))


def measure(batch: int) -> dict[str, Any]:
    """Microseconds of each kernel in its tile and in the best, and of the convolutions, in bf16."""
    every, rows = list(cases(batch, torch.bfloat16)), list[dict[str, Any]]()
    for case in every:
        us, tile = microseconds(on_gpu(case.launch)), "x".join(map(str, case.tile))
        if case.chosen:
            names = {"kernel": case.kernel, "layer": str(case.layer)}
            rows.append(names | {"tile": tile, "us": us, "best": tile, "least": us})
        elif us is not None and (rows[-1]["least"] is None or us < rows[-1]["least"]):
            rows[-1] |= {"best": tile, "least": us}
    for layer in dict.fromkeys(case.layer for case in every):
        us = span_convolution(layer, batch, torch.bfloat16)
        rows.append({"kernel": "span convolution", "layer": str(layer), "tile": "cuDNN", "us": us})
    return {"batch": batch, "precision": "bf16", "rows": rows}
