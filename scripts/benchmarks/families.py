"""Self-attention networks against ResNet-50 and RedNet-50, and Stand-Alone ResNet-50 against itself by unfolding."""

import argparse
from functools import partial

import torch

from benchmarks import timing
from benchmarks.networks import DTYPES, Call, images, rounds, trained, training_step
from benchmarks.op import forced
from benchmarks.report import Report, Row
from involution import fold

#: A network a family, SAN in both kinds; SAN19 and Axial ResNet-S are in Table 2
FAMILIES = (
    "standalone_resnet50", "lrnet50", "san19_pairwise", "san19_patchwise", "aa_resnet50", "axial_resnet_s"
)  # fmt: skip


def names(args: argparse.Namespace) -> tuple[str, str, list[str]]:
    """ResNet, RedNet, and the families' networks."""
    if args.quick:
        return "resnet26", "rednet26", ["standalone_resnet26"]
    return "resnet50", "rednet50", args.attention or [*FAMILIES]


def inference(args: argparse.Namespace) -> list[Row]:
    """One image at a time."""
    *bases, others = names(args)
    x = images(1, args.side, args.device, DTYPES[args.dtype])
    cases: dict[str, Call] = {}
    for name in (*bases, *others):
        model = trained(name, args.side, args.device)
        variants = {"folded": fold(model).to(DTYPES[args.dtype]), "eager": model.to(DTYPES[args.dtype])}
        cases |= {f"{name} {variant}": partial(torch.no_grad()(m), x) for variant, m in variants.items()}
    samples = timing.interleave(cases, args.repeats, args.device)
    return [
        {"model": name}
        | {f"{variant} (ms)": timing.ms(samples, f"{name} {variant}") for variant in ("eager", "folded")}
        | {f"{base}'s / this, folded": timing.ratio(samples, f"{base} folded", f"{name} folded") for base in bases}
        for name in (*bases, *others)
    ]


def training(args: argparse.Namespace, report: Report) -> None:
    """A table of training steps, a row a network; the first family's also on the backend that unfolds."""
    *bases, others = names(args)
    fast, ours = "triton" if args.device == "cuda" else "cpu", others[0]
    unfold = f"{ours}, unfold"
    cases = {name: forced(fast, training_step(name, args.train_batch, args)) for name in (*bases, *others)}
    cases[unfold] = forced("reference", training_step(ours, args.train_batch, args))
    samples = timing.interleave(cases, rounds(args), args.device)
    rows: list[Row] = [
        {"model": name, "step (ms)": timing.ms(samples, name)}
        | {f"{base}'s / this": timing.ratio(samples, base, name) for base in bases}
        for name in cases
    ]
    title = f"Self-attention, training step, batch {args.train_batch}, {args.side} x {args.side}, {args.dtype}"
    report.table(
        title, rows, "unfold: the reference backend, which unfolds, multiplies and adds up; all else is the same."
    )
    report.verdict(f"{ours}, training step: ours / unfold = {timing.ratio(samples, ours, unfold)}")
