"""The operator on every involution of RedNet-50: each backend against unfold, compiled unfold and the machine's limits.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import attention, timing
from benchmarks.fresh import PeakMemory, fresh
from benchmarks.machine import bandwidth, fill_heap, peak_flops
from benchmarks.problem import DTYPES, OTHERS, STAGES, Problem, Shape, describe, size
from benchmarks.report import Report, Row

Call = Callable[[], Any]


def forward(function: Callable[..., Tensor], *inputs: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return call


def both(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> Call:
    """Forward and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def forced(backend: str, call: Call) -> Call:
    def run() -> Any:
        os.environ["INVOLUTION_BACKEND"] = backend
        return call()

    return run


class Bench:
    """The measurements on one machine."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.dtype, self.repeats = args.device, DTYPES[args.dtype], args.repeats
        self.fast = "triton" if self.device == "cuda" else "cpu"
        self.compiled = not (args.skip_compile or args.quick)
        self.peak = peak_flops(self.device, self.dtype, args.quick)

    def problem(self, shape: Shape, batch: int, last: bool = True) -> Problem:
        return Problem(shape, batch, self.device, self.dtype, last)

    def measure(self, cases: dict[str, Call]) -> timing.Samples:
        if self.device == "cuda":  # at these sizes Python's launches would be measured, not the kernels
            cases = {name: graphed(call) for name, call in cases.items()}
        return timing.interleave(cases, self.repeats, self.device)

    def limit(self, nbytes: int, flops: int) -> float:
        """Seconds that the roofline allows."""
        return max(nbytes / bandwidth(nbytes, self.device), flops / self.peak)

    def plain(self, shape: Shape, batch: int, backward: bool) -> Row:
        """involution2d of all backends against unfold."""
        p, q = self.problem(shape, batch), self.problem(shape, batch, last=False)

        def case(function: Callable[..., Tensor], of: Problem) -> Call:
            inputs = (of.input, of.kernel)
            return both(function, of.grad, *inputs) if backward else forward(function, *inputs)

        cases = {"unfold": case(q.unfold, q)}
        if self.compiled:
            torch._dynamo.reset()
            cases["compiled unfold"] = case(torch.compile(q.unfold, dynamic=False), q)
        cases |= {name: forced(name, case(p.plain, p)) for name in ("shifted", self.fast)}
        samples = self.measure(cases)
        moved = size(p.input, p.kernel, p.grad) * (1 + backward) + backward * size(p.input, p.kernel)
        limit = self.limit(moved, p.window_flops * (3 if backward else 1))
        row = {"shape": describe(shape), "batch": batch}
        row |= {f"{name} (ms)": timing.ms(samples, name) for name in samples}
        row |= {
            f"{name} / {self.fast}": timing.ratio(samples, name, self.fast) for name in samples if name != self.fast
        }
        return row | {"% of roofline": 1e5 * limit / timing.ms(samples, self.fast)}

    def gradients(self, shape: Shape, batch: int) -> Row:
        """The backward's two halves; each does as many operations as the forward."""
        p = self.problem(shape, batch)
        operator = partial(
            torch.ops.involution.involution2d_backward, p.grad, p.input, p.kernel, shape.stride, p.padding, 1
        )
        cases = {
            "forward": forced(self.fast, forward(p.plain, p.input, p.kernel)),
            "grad_input": forced(self.fast, lambda: operator(True, False)),
            "grad_kernel": forced(self.fast, lambda: operator(False, True)),
        }
        samples = self.measure(cases)
        rates = {f"{name} (GFLOP/s)": p.window_flops / timing.ms(samples, name) / 1e6 for name in samples}
        return {
            "shape": describe(shape), "batch": batch, **rates,
            "grad_kernel / grad_input (time)": timing.ratio(samples, "grad_kernel", "grad_input"),
        }  # fmt: skip

    def fused(self, shape: Shape, batch: int, backward: bool) -> Row:
        """span_involution2d against the span convolution followed by involution2d."""
        p = self.problem(shape, batch)
        inputs = (p.input, p.reduced, p.weight, p.bias)

        def case(function: Callable[..., Tensor]) -> Call:
            return forced(self.fast, both(function, p.grad, *inputs) if backward else forward(function, *inputs))

        samples = self.measure({"unfused": case(p.unfused), "fused": case(p.fused)})
        moved = size(p.input, p.reduced, p.weight, p.grad) * (1 + backward) + backward * size(
            p.input, p.reduced, p.weight
        )
        # the backward makes the kernels again, so that the span convolution is done four times instead of three
        flops = p.window_flops * (3 if backward else 1) + p.span_flops * (4 if backward else 1)
        return {
            "shape": describe(shape), "batch": batch,
            "unfused (ms)": timing.ms(samples, "unfused"), "fused (ms)": timing.ms(samples, "fused"),
            "unfused / fused": timing.ratio(samples, "unfused", "fused"),
            "% of roofline": 1e5 * self.limit(moved, flops) / timing.ms(samples, "fused"),
        }  # fmt: skip


def graphed(call: Call) -> Call:
    """The same work as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_memory(case: str, batch: int, device: str, dtype: str, quick: bool) -> float:
    """MiB on top of inputs and incoming gradient, of forward and backward of stage 1 (run in a fresh process)."""

    def prepare(shape: Shape, batch: int) -> Call:
        p = Problem(shape, batch, device, DTYPES[dtype], last=case != "unfold")
        functions: dict[str, Callable[..., Tensor]] = {
            "unfold": lambda x, *span: p.unfold(x, p.span(*span)),
            "unfused": p.unfused,
            "fused": p.fused,
        }
        return both(functions[case], p.grad, p.input, p.reduced, p.weight, p.bias)

    prepare(STAGES[3], 1)()  # loads libraries, which are not to count
    call = prepare(STAGES[3 if quick else 0], batch)
    with PeakMemory(device) as memory:
        call()
    return memory.mib


def run(args: argparse.Namespace, report: Report) -> None:
    if args.quick:
        args.batch = [1]
    fill_heap(args, 0.1 if args.quick else max(args.batch) / 4)
    bench = Bench(args)
    large = 2**22 if args.quick else 2**30
    report.verdict(
        f"Limits measured in this process: {bench.peak / 1e9:.0f} GFLOP/s ({args.dtype}, matrix product or "
        f"3x3 convolution), {bandwidth(large, args.device) / 1e9:.1f} GB/s (stream triad, {large >> 20} MiB)."
    )
    if args.only != "attention":
        operator(bench, args, report)
    if args.only != "operator":
        attention.tables(bench, args.batch, report, args.quick)


def operator(bench: Bench, args: argparse.Namespace, report: Report) -> None:
    """The tables of the operator itself."""
    shapes = STAGES[3:] if args.quick else STAGES + (OTHERS if args.all_shapes else OTHERS[:1])
    note = (
        "Inputs and kernels given, everything channels_last but for unfold, which needs NCHW. The roofline is the "
        "larger of operations / peak and bytes of all operands / bandwidth of a triad over as many bytes."
    )
    for backward in (False, True):
        what = "forward + backward" if backward else "forward"
        rows = [bench.plain(shape, batch, backward) for batch in args.batch for shape in shapes]
        report.table(f"involution2d, {what}", rows, note)
        means(report, what, rows, args.batch, f"unfold / {bench.fast}")
    rows = [bench.gradients(shape, batch) for batch in args.batch for shape in shapes]
    report.table("The two halves of the backward", rows)
    means(report, "backward", rows, args.batch, "grad_kernel / grad_input (time)")
    for backward in (False, True):
        what = "forward + backward" if backward else "forward"
        rows = [bench.fused(shape, batch, backward) for batch in args.batch for shape in shapes]
        report.table(
            f"span convolution + involution, {what}", rows, "Fused: span_involution2d, kernels never in memory."
        )
        means(report, what, rows, args.batch, "unfused / fused")
    batch = max(args.batch)
    cases = ("unfold", "unfused", "fused")[2 * args.quick :]
    peaks = {case: fresh(peak_memory, case, batch, args.device, args.dtype, args.quick) for case in cases}
    fused = peaks["fused"]  # 0 where shapes are so small (--quick) that memory already mapped was enough
    rows = [
        {"case": case, "peak (MiB)": peaks[case], "/ fused": peaks[case] / fused if fused else None} for case in cases
    ]
    report.table(
        f"Peak memory of span + involution, forward + backward, stage 1, batch {batch}, above its inputs", rows
    )


def means(report: Report, what: str, rows: list[Row], batches: list[int], column: str) -> None:
    """The geometric mean over the four stages."""
    names = {describe(shape) for shape in STAGES}
    for batch in batches:
        ratios = [row[column] for row in rows if row["batch"] == batch and row["shape"] in names]
        report.verdict(
            f"{what}, batch {batch}: {column} = {timing.geometric(ratios):.2f} (geometric mean of the stages)"
        )


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "op",
        parents=[common],
        help="the operator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="images a batch (default 1 16)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default fp32")
    parser.add_argument(
        "--all-shapes", action="store_true", help="the first, strided involution of stages 2 to 4 as well"
    )
    parser.add_argument("--only", choices=("operator", "attention"), help="default: both")
    parser.add_argument("--skip-compile", action="store_true", help="leave compiled unfold out (10 s a shape)")
    parser.set_defaults(run=run, title="The involution operator")
