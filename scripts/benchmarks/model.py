"""RedNets against the ResNets of the same depth: inference and where its time goes, a training step, memory, Table 2.

Each side runs in every variant, all interleaved; what counts is best against best.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import families, runtimes, timing
from benchmarks.breakdown import breakdown
from benchmarks.fresh import PeakMemory, fresh
from benchmarks.machine import fill_heap
from benchmarks.networks import DTYPES, images, rounds, trained, training_step
from benchmarks.report import Report, Row
from benchmarks.table2 import NOTE, table2
from involution import fold

Call = Callable[[], Any]


def frozen(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compiled by inductor with the weights as constants, which folds and packs them too."""
    torch._inductor.config.freezing = True
    return torch.compile(model, dynamic=False)


def inference_variants(name: str, args: argparse.Namespace) -> dict[str, Callable[[Tensor], Tensor]]:
    """Variant -> callable; all give the same logits."""
    dtype = DTYPES[args.dtype]
    model = trained(name, args.side, args.device)
    variants: dict[str, Any] = {"folded": fold(model).to(dtype)}
    variants = {"eager": model.to(dtype), **variants}
    if args.compile:
        variants["compiled"] = frozen(copy.deepcopy(variants["folded"]))
    x = images(2, args.side, args.device, dtype)
    with torch.no_grad():
        torch.testing.assert_close(variants["folded"](x), variants["eager"](x), rtol=2e-2, atol=2e-2)
    return variants


def inference(depth: int, batch: int, args: argparse.Namespace, variants: dict[str, Any]) -> Row:
    """One row: RedNet-depth against ResNet-depth."""
    x = images(batch, args.side, args.device, DTYPES[args.dtype])

    def case(model: Callable[[Tensor], Tensor]) -> Call:
        def call() -> Tensor:
            with torch.no_grad():
                return model(x)

        return call

    cases = {
        f"{kind} {variant}": case(model)
        for kind in kinds(depth)
        for variant, model in variants[f"{kind}{depth}".lower()].items()
    }
    return row(depth, batch, timing.interleave(cases, args.repeats, args.device))


def training(depth: int, args: argparse.Namespace) -> Row:
    """One row: a whole training step (forward, backward, SGD with momentum)."""
    cases: dict[str, Call] = {}
    if depth == 50:
        cases["torchvision's ResNet"] = training_step("resnet50", args.train_batch, args, theirs=True)
    for kind in kinds(depth):
        for variant in ["eager", "compiled"] if args.compile_training else ["eager"]:
            cases[f"{kind} {variant}"] = training_step(
                f"{kind}{depth}".lower(), args.train_batch, args, variant == "compiled"
            )
    samples = timing.interleave(cases, rounds(args), args.device)
    result = row(depth, args.train_batch, samples)
    if depth == 50:
        best = result["best"].split(", ")[1]
        result["torchvision's ResNet / best RedNet"] = timing.ratio(samples, "torchvision's ResNet", best)
    return result


def kinds(depth: int) -> list[str]:
    return ["ResNet"] if depth == 101 else ["ResNet", "RedNet"]  # the paper's Table 2 has ResNet-101 without a peer


def row(depth: int, batch: int, samples: timing.Samples) -> Row:
    """All variants in ms, and the ratio of the two sides' best."""
    result: Row = {"depth": depth, "batch": batch}
    result |= {f"{case} (ms)": timing.ms(samples, case) for case in samples}
    best = {
        kind: min((c for c in samples if c.startswith(kind)), key=lambda c: timing.ms(samples, c))
        for kind in kinds(depth)
    }
    result["best"] = ", ".join(best.values())
    result["best ResNet / best RedNet"] = timing.ratio(samples, *best.values()) if len(best) == 2 else None
    return result


def peak_memory(name: str, batch: int, side: int, device: str, dtype: str) -> float:
    """MiB of a training run on top of the imports: weights, optimizer, activations (run in a fresh process)."""
    args = argparse.Namespace(side=side, device=device, dtype=dtype)
    with PeakMemory(device) as memory:
        step = training_step(name, batch, args)
        for _ in range(2):
            step()
    return memory.mib


def run(args: argparse.Namespace, report: Report) -> None:
    if args.quick:
        args.depth, args.batch, args.train_batch, args.side, args.compile = [26], [1], 2, 32, False
    fill_heap(args, 0.1 if args.quick else max(*args.batch, args.train_batch) / 4)
    parts = {"inference", "training", "memory", "breakdown"} if args.only is None else set(args.only)
    settings = f"{args.side} x {args.side}, {args.dtype}, channels_last"
    if args.runtime:
        report.table(f"Inference in {args.runtime}, {args.side} x {args.side}", runtimes.rows(args), runtimes.NOTE)
        return
    names = [f"{kind}{depth}".lower() for depth in args.depth for kind in kinds(depth)]
    if parts & {"inference", "breakdown"}:
        variants = {name: inference_variants(name, args) for name in names}
    others = families.inference(args) if args.attention is not None and "inference" in parts else []
    if "inference" in parts:
        rows = [inference(depth, batch, args, variants) for batch in args.batch for depth in args.depth]
        note = "eager; folded: by involution.fold; compiled: inductor with freezing, of the folded model."
        report.table(f"Inference, {settings}", rows, note)
        if found := table2(rows, args.device, others):
            report.table("The paper's Table 2 (latency of one image)", found, NOTE)
    if others:
        report.table(f"Self-attention, inference of one image, {args.dtype}", others)
    if "breakdown" in parts:
        variant = "compiled" if args.compile else "folded"
        for batch in args.batch:
            x = images(batch, args.side, args.device, DTYPES[args.dtype])
            calls = {name: partial(variants[name][variant], x) for name in names}
            title = f"Where inference spends its time, {variant}, batch {batch} (ms, under the profiler)"
            report.table(title, breakdown(calls, args.device), "Generated element-wise code is under other.")
    if "training" in parts:
        rows = [training(depth, args) for depth in args.depth if depth != 101]
        note = (
            f"{rounds(args)} rounds of forward, backward, SGD with momentum. Eager, both sides run BatchNorm "
            "and ReLU as one operator; torchvision's does not."
        )
        report.table(f"Training step, {settings}", rows, note)
        if args.attention is not None:
            families.training(args, report)
    if "memory" in parts:
        memory(args, report)


def memory(args: argparse.Namespace, report: Report) -> None:
    batch, repeats = (2, 1) if args.quick else (32, args.repeats)
    rows = []
    for depth in (depth for depth in args.depth if depth != 101):
        peaks: timing.Samples = {kind: [] for kind in kinds(depth)}
        for _ in range(repeats):
            for kind, values in peaks.items():
                model = f"{kind}{depth}".lower()
                values.append(fresh(peak_memory, model, batch, args.side, args.device, args.dtype))
        rows.append({"depth": depth, "batch": batch} | {f"{k} (MiB)": median(v) for k, v in peaks.items()})
        rows[-1]["RedNet / ResNet"] = timing.ratio(peaks, "RedNet", "ResNet")
    note = "Medians of fresh processes, which keep freed memory as train.py does."
    report.table("Peak memory of training, above what the imports take", rows, note)


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("model", parents=[common], help="the networks", description=__doc__)
    parser.add_argument("--depth", type=int, nargs="+", default=[50], choices=[26, 38, 50, 101], help="default 50")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="of inference (default 1 16)")
    parser.add_argument("--train-batch", type=int, default=16, help="of training steps (default 16; memory: always 32)")
    parser.add_argument("--side", type=int, default=224, help="of the images (default 224)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="training in bf16 is autocast (default fp32)")
    parts = ("inference", "training", "memory", "breakdown")
    parser.add_argument("--only", nargs="+", choices=parts, help="default: all four")
    parser.add_argument(
        "--attention", nargs="*", metavar="NAME", help="self-attention networks as well (default: one a family)"
    )
    parser.add_argument("--runtime", choices=runtimes.RUNTIMES, help="inference there instead, in fp32 on the CPU")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave compiled inference out")
    parser.add_argument(
        "--compile-training", action="store_true", help="compiled training steps as well (minutes each)"
    )
    parser.set_defaults(run=run, title="RedNet against ResNet")
