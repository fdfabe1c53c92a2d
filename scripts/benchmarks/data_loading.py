"""The loaders against their peers, the model alone, both together, and which of the two holds the other up.

Every turn builds a loader, lets it fill its queues and runs it for a while; turns of all loaders are interleaved.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

import data
from benchmarks import timing
from benchmarks.fresh import fresh, resident
from benchmarks.loaders import STRONG, Source, sources
from benchmarks.loop import bare, make_optimizer
from benchmarks.report import Report, Row
from involution import create_model

FILL = 8  # batches taken before the clock starts: more than any queue holds
SMALL = 256  # images of the memory test


def rate(make: Callable[[], Source], batches: int, batch: int, device: str, step: Callable[[Any], Any] | None) -> float:
    """Images/s of a turn: a new loader, its queues filled, then `batches` batches, each given to `step`."""
    iterator, close = make()
    for item in itertools.islice(iterator, 1 if step else FILL):
        _ = step(item) if step else None
    timing.synchronize(device)
    begin = time.perf_counter()
    for item in itertools.islice(iterator, batches):
        _ = step(item) if step else None
    timing.synchronize(device)
    seconds = time.perf_counter() - begin
    del iterator
    close()
    gc.collect()
    return batches * batch / seconds


def load_only(root: str, args: argparse.Namespace, report: Report) -> dict[str, float]:
    made = sources(root, args)
    rates: timing.Samples = {name: [] for name in made}
    for i in range(args.repeats):
        for name in reversed(made) if i % 2 else made:
            rates[name].append(rate(made[name], args.batches, args.batch, args.device, None))
    rows: list[Row] = []
    for name, values in rates.items():
        row: Row = {"loader": name, "images/s": median(values)}
        for peer in (peer for peer in made if peer.endswith("(peer)")):
            row[f"/ {peer}"] = timing.spread([a / b for a, b in zip(values, rates[peer])]) if peer != name else None
        if name.endswith(STRONG):
            plain = rates[name.removesuffix(STRONG)]
            row["/ recipe=paper"] = timing.spread([a / b for a, b in zip(values, plain)])
        rows.append(row)
    report.table(
        "Loading only", rows, f"Batches of {args.batch}, random resized crops of {args.side}, {args.workers} workers."
    )
    return {name: median(values) for name, values in rates.items()}


def together(root: str, loading: dict[str, float], args: argparse.Namespace, report: Report) -> None:
    """A training step on synthetic images, and the same fed by each of our loaders."""
    from data import Batch

    torch.manual_seed(0)
    model = create_model(args.model, num_classes=1000).to(args.device).to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer(model)
    images = torch.randn(args.batch, 3, args.side, args.side, device=args.device)
    synthetic = Batch(
        images.contiguous(memory_format=torch.channels_last),
        torch.randint(10, (args.batch,), device=args.device),
        args.batch,
    )

    def step(batch: Any) -> None:
        images = batch.images.to(args.device, non_blocking=True)
        bare(model, iter([Batch(images, batch.targets.to(args.device), args.batch)]), optimizer)()

    made: dict[str, Callable[[], Source]] = {"synthetic": lambda: (itertools.repeat(synthetic), lambda: None)}
    made |= {
        name: make for name, make in sources(root, args).items() if name.startswith("data.") and STRONG not in name
    }
    rates: timing.Samples = {name: [] for name in made}
    for _ in range(max(1, args.repeats // 2)):
        for name in made:
            rates[name].append(rate(made[name], max(2, args.batches // 8), args.batch, args.device, step))
    alone = median(rates["synthetic"])
    rows: list[Row] = [
        {
            "loader": name, "loading only (images/s)": loading.get(name), "model only (images/s)": alone,
            "end to end (images/s)": median(values), "end to end / model only": median(values) / alone,
        }
        for name, values in rates.items() if name != "synthetic"
    ]  # fmt: skip
    report.table(f"Training {args.model}, batch {args.batch}", rows)
    for row in rows:
        loader, fast = row["loader"], row["loading only (images/s)"]
        slower = "the model" if alone < fast else "the loader"
        report.verdict(f"{loader}: {slower} is the bottleneck (loading {fast:.0f}, model {alone:.0f} images/s).")


def memory_over_epochs(root: str, loader: str, workers: int, epochs: int) -> list[float]:
    """Resident MiB of this process and its workers after each epoch of a small set (run in a fresh process)."""
    images = data.open_dataset("folder", root).train
    images = images.select(np.arange(0, len(images), max(1, len(images) // SMALL)))
    made = data.train_loader(
        images, batch_size=32, global_batch_size=32, seed=0, train_size=64, loader=loader, workers=workers
    )
    sizes = []
    for _ in range(epochs):
        for _ in range(made.steps_per_epoch):
            next(made)
        sizes.append(resident())
    made.close()
    return sizes


def memory(root: str, args: argparse.Namespace, report: Report) -> None:
    epochs = 3 if args.quick else 20
    rows = []
    for loader in ("dali", "torch") if "data.loader=dali" in sources(root, args) else ("torch",):
        sizes = fresh(memory_over_epochs, root, loader, args.workers, epochs)
        row = {"loader": loader} | {f"after epoch {n} (MiB)": sizes[n - 1] for n in (1, 2, epochs)}
        rows.append(row | {"growth since epoch 2 (MiB an epoch)": (sizes[-1] - sizes[1]) / (epochs - 2)})
    note = f"About {SMALL} images; fresh processes, which keep freed memory as train.py does."
    report.table(f"Resident memory over {epochs} epochs, with the workers", rows, note)


def run(args: argparse.Namespace, report: Report) -> None:
    if args.quick:
        args.batch, args.batches, args.side, args.model = 4, 2, 32, "rednet26"
    splits = data.open_dataset("folder", args.root)
    sample = [splits.train.read(i) for i in range(min(200, len(splits.train)))]
    kib = sum(map(len, sample)) / len(sample) / 1024
    report.verdict(f"Data: {len(splits.train)} training images, {kib:.0f} KiB each on average.")
    loading = load_only(args.root, args, report)
    if not args.loading_only:
        together(args.root, loading, args, report)
        memory(args.root, args, report)


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("data", parents=[common], help="the loaders", description=__doc__)
    parser.add_argument("root", help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("--batch", type=int, default=64, help="images a batch (default 64)")
    parser.add_argument("--batches", type=int, default=24, help="batches a turn (default 24)")
    parser.add_argument("--side", type=int, default=224, help="of the crops (default 224)")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads that decode (default 2)")
    parser.add_argument("--model", default="rednet50", help="default rednet50")
    parser.add_argument("--loader", choices=("dali", "torch"), help="this one and its peer alone")
    parser.add_argument("--loading-only", action="store_true", help="neither the model nor memory")
    parser.set_defaults(run=run, title="Data loading")
