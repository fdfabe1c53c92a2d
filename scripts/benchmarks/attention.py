"""Local attention on the operator against the same by unfolding: the product q . k, and a layer of each family.

The families that are no involution (AA, Axial) are among the networks of ``benchmark.py model --attention``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.problem import STAGES, Shape, describe
from benchmarks.report import Report, Row
from involution.models.lrnet import LocalRelation
from involution.models.san import SelfAttention
from involution.models.standalone import LocalAttention
from involution.ops import neighbourhood_product

if TYPE_CHECKING:
    from benchmarks.op import Bench

K, HEADS = 7, 8
NOTE = (
    "Forward and all gradients. q . k by unfold and einsum; layers by unfold: the reference backend, which unfolds, "
    "multiplies and adds up. Their 1x1 convolutions, softmax and MLPs are the same on both sides."
)

#: family -> its layer in the place of an involution of C channels, and how many times C its input has
LAYERS: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "Stand-Alone": (lambda c: LocalAttention(c, K, 1, HEADS), 1),
    "LR-Net": (lambda c: LocalRelation(c, K, 1, 1, 8), 1),
    "SAN pairwise": (lambda c: SelfAttention("pairwise", 4 * c, K), 4),
    "SAN patchwise": (lambda c: SelfAttention("patchwise", 4 * c, K), 4),
}


def unfolded(query: Tensor, key: Tensor) -> Tensor:
    """q . k, (B, C, H, W) both -> (B, heads, K, K, H, W)."""
    batch, channels, height, width = key.shape
    windows = F.unfold(key, K, padding=K // 2).view(batch, HEADS, channels // HEADS, K, K, height, width)
    return torch.einsum("bgcij,bgcuvij->bguvij", query.unflatten(1, (HEADS, -1)), windows)


def product(query: Tensor, key: Tensor) -> Tensor:
    """q . k by the operator."""
    return neighbourhood_product(query, key, K, groups=HEADS)


def tables(bench: "Bench", batches: list[int], report: Report, quick: bool) -> None:
    """A table of the product and one of the layers, with the geometric means over the stages."""
    for title, names in (("Attention's product q . k", ["q . k"]), ("Attention layers", [*LAYERS])):
        rows = [
            measure(bench, name, shape, batch)
            for name in names
            for batch in batches
            for shape in (STAGES[3:] if quick else STAGES)
        ]
        report.table(f"{title}, forward + backward", rows, NOTE)
        for name in names:
            for batch in batches:
                ratios = [r["unfold / ours"] for r in rows if r["layer"] == name and r["batch"] == batch]
                mean = timing.geometric(ratios)
                report.verdict(f"{name}, batch {batch}: unfold / ours = {mean:.2f} (geometric mean of the stages)")


def measure(bench: "Bench", name: str, shape: Shape, batch: int) -> Row:
    """One row."""
    from benchmarks.op import both, forced

    factor = LAYERS[name][1] if name in LAYERS else 1
    size = (batch, factor * shape.channels, shape.size, shape.size)
    x, y = (torch.randn(size, device=bench.device, dtype=bench.dtype) for _ in range(2))
    last = torch.channels_last
    if name in LAYERS:
        layer = LAYERS[name][0](shape.channels).to(bench.device, bench.dtype)
        grad, weights = torch.randn_like(layer(x)), tuple(layer.parameters())

        def case(backend: str, x: Tensor) -> Callable[[], object]:
            x = x.detach().requires_grad_()
            return forced(backend, lambda: torch.autograd.grad(layer(x), (x, *weights), grad))

        cases = {"unfold": case("reference", x), "ours": case(bench.fast, x.contiguous(memory_format=last))}
    else:
        grad = torch.randn_like(product(x, y))
        ours = both(product, grad, *(t.contiguous(memory_format=last) for t in (x, y)))
        cases = {"unfold": both(unfolded, grad, x, y), "ours": forced(bench.fast, ours)}
    samples = bench.measure(cases)
    row: Row = {"layer": name, "shape": describe(shape), "batch": batch}
    row |= {f"{side} (ms)": timing.ms(samples, side) for side in samples}
    return row | {"unfold / ours": timing.ratio(samples, "unfold", "ours")}
