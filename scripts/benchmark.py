"""Measure the operator, the models, the training loop and the data loaders of this repository.

    python scripts/benchmark.py op             the operator: stages of RedNet-50, every backend, the roofline, attention
    python scripts/benchmark.py model          RedNets against ResNets: inference, training, memory, Table 2
    python scripts/benchmark.py detection      Faster R-CNN with RedNet-50, with ResNet-50, and torchvision's own
    python scripts/benchmark.py loop           the trainer's step against a bare loop; --peer timm | plain
    python scripts/benchmark.py data FOLDER    loaders, model, and which of the two is the bottleneck
    python scripts/benchmark.py op --out docs/benchmarks/op    also writes op.md and op.json, with the command

What is compared runs interleaved (A B C, C B A, ...) in one process; figures are medians, ratios are medians of the
ratios within a round with their quartiles in brackets. Peak memory is taken in a fresh process each.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `data`, which is no installed package

import torch
from benchmarks import data_loading, detection, loop, model, op, timing
from benchmarks.machine import conditions
from benchmarks.report import Report

from involution.engine.device import keep_freed_memory


def common_options() -> argparse.ArgumentParser:
    """The options of every subcommand."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's CPU threads (default: all cores)")
    common.add_argument("--repeats", type=int, default=7, help="interleaved rounds (default 7)")
    common.add_argument(
        "--allocator",
        choices=("keep", "default"),
        default="keep",
        help="keep: freed memory stays with the process, as in train.py, for all sides alike (default); without that "
        "page faults take 1.2 to 4 times as long as CPU operators",
    )
    common.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    common.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, for machines with busy neighbours; needs --threads 1 (default wall)",
    )
    common.add_argument("--out", type=Path, metavar="NAME", help="write NAME.md and NAME.json")
    common.add_argument("--quick", action="store_true", help="tiny shapes and one round: does it run?")
    return common


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{op,model,detection,loop,data}")
    for module in (op, model, detection, loop, data_loading):
        module.add_command(commands, common_options())
    args = parser.parse_args()
    if args.clock == "cpu" and (args.threads != 1 or args.command == "data"):
        parser.error("--clock cpu needs --threads 1, and means nothing to loaders, which work in threads and processes")
    return args


def main() -> None:
    args = parse()
    if args.allocator == "keep" and not keep_freed_memory():
        args.allocator = "default"  # or what MALLOC_* says
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.quick:
        args.repeats = args.threads = 1
    torch.set_num_threads(args.threads)
    timing.clock = time.process_time if args.clock == "cpu" else time.perf_counter
    report = Report(args.title, conditions(args))
    try:
        args.run(args, report)
    except (ValueError, FileNotFoundError) as error:  # a folder that is none, most likely
        print(f"benchmark.py: {error}", file=sys.stderr)
        sys.exit(2)
    report.finish(args.out)


if __name__ == "__main__":
    main()
