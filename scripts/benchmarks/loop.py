"""The trainer's step against a bare loop with the same model, optimizer and synthetic batch, or against timm's loop.

The trainer really runs `fit`. Its loader is where the two alternate: every time the trainer asks for a batch, the
loader takes the time since its last answer, which is one step of the trainer, and then times one step of the bare loop.
With `--peer timm` both load pictures of a folder, each with its own loader, in this process: workers of one side would
go on in the other's turn. With `--peer plain` the trainer's pictures have RandAugment, erasing and mixup, the bare
loop's the augmentation of recipe=paper alone, each from a worker process that is ready before its side's turn comes.
"""

import argparse
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from benchmarks import peer_timm, timing
from benchmarks.loaders import our_loader
from benchmarks.machine import fill_heap
from benchmarks.report import Report, Row
from data import Batch
from data.demo import demo_root
from data.mask_list import IGNORED
from data.segmentation import SegmentationBatch
from involution import create_model
from involution.engine.distributed import World
from involution.engine.optim import cosine
from involution.engine.options import TrainOptions
from involution.engine.run import RunFolder
from involution.engine.tasks import Task
from involution.engine.tasks.classification import Classification
from involution.engine.tasks.losses import CrossEntropy
from involution.engine.tasks.segmentation import Segmentation
from involution.engine.trainer import Trainer

WARM_UP = 3
LR, SMOOTHING = 1e-3, 0.1
SEGMENTOR = "semantic_fpn"  # with involutions, on RedNet-26


class OneBatch:
    """A loader of one batch."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        self.skipped: dict[str, str] = {}

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch])

    def close(self) -> None:
        pass


class AlternatingLoader(OneBatch):
    """The trainer's loader protocol, around a step of the peer; `block` steps of either side make one sample."""

    def __init__(
        self, batches: Iterator[Any], peer: Callable[[], object], steps: int, batch_size: int, block: int, device: str
    ) -> None:
        super().__init__(next(batches))
        self.batches, self.peer, self.block, self.device = batches, peer, block, device
        self.steps_per_epoch, self.batch_size = steps, batch_size
        self.times: timing.Samples = {"trainer": [], "peer": []}
        self.handed_out = 0
        self._begin = 0.0

    def samples(self, step: int) -> int:
        return self.batch_size

    def micro_batches(self, step: int) -> int:
        return 1

    def seek(self, step: int) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.handed_out % self.block == 0:
            timing.synchronize(self.device)
            now = timing.clock()
            if self.handed_out:
                self.times["trainer"].append((now - self._begin) / self.block)
            for _ in range(self.block):
                self.peer()
            timing.synchronize(self.device)
            self._begin = timing.clock()
            if self.handed_out:
                self.times["peer"].append((self._begin - now) / self.block)
        self.handed_out += 1
        return next(self.batches)


def make_model(name: str, device: str, classes: int = 100) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"backbone": "rednet26", "neck": "involution"} if name == SEGMENTOR else {}
    if name.startswith("timm/"):
        name, options = name.removeprefix("timm/"), {"library": "timm"}
    return create_model(name, num_classes=classes, **options).to(device).to(memory_format=torch.channels_last).train()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4, fused=True)


def bare(model: nn.Module, batches: Iterator[Batch], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        batch = next(batches)
        F.cross_entropy(model(batch.images), batch.targets, label_smoothing=SMOOTHING).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare_segmentation(
    model: nn.Module, batch: SegmentationBatch, optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    assert isinstance(batch.masks, torch.Tensor)
    targets = batch.masks.long()

    def step() -> None:
        logits = F.interpolate(model(batch.images)["out"], targets.shape[1:], mode="bilinear")
        F.cross_entropy(logits, targets, ignore_index=IGNORED).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def options(batch_size: int) -> TrainOptions:
    """The defaults of conf/train.yaml; checkpoints come once, after the last step."""
    return TrainOptions(
        epochs=1, steps=None, global_batch_size=batch_size, batch_size=batch_size, label_smoothing=SMOOTHING,
        precision="fp32", compile=False, cuda_graphs=False, channels_last=True, sync_batchnorm=False,
        batchnorm_size=None, clip_grad_norm=None, ema_decay=None, exclude_from_decay="none", resume="never",
        max_steps=None, max_bad_steps=10, log_every_steps=50, evaluate_every_epochs=1, evaluate_every_steps=None,
        checkpoint_every_steps=None, checkpoint_every_minutes=None, keep_checkpoints=1,
    )  # fmt: skip


def fit(
    model: nn.Module, batches: Iterator[Any], peer: Callable[[], object], batch_size: int, args: argparse.Namespace,
    task: Task | None = None, val: SegmentationBatch | None = None,
) -> timing.Samples:  # fmt: skip
    """Seconds a step of the trainer and of its peer; it evaluates once, on `val` or a batch."""
    block, steps = _block_and_steps(args)
    loader = AlternatingLoader(batches, peer, steps, batch_size, block, args.device)
    world = World(0, 1, torch.device(args.device))
    with tempfile.TemporaryDirectory() as folder:
        run_folder = RunFolder(Path(folder) / "run", world)
        run_folder.open()
        trainer = Trainer(
            model, task or Classification(CrossEntropy(SMOOTHING)), make_optimizer(model), cosine(LR, steps), loader,
            OneBatch(val or loader.batch), val_size=val.valid if val else batch_size, options=options(batch_size),
            world=world, run=run_folder, extra_state={"config": {}, "class_names": []},
        )  # fmt: skip
        trainer.fit()
    return {case: times[WARM_UP:] for case, times in loader.times.items()}


def _block_and_steps(args: argparse.Namespace) -> tuple[int, int]:
    block = 10 if args.device == "cuda" else 1  # a synchronisation a step would hide what the trainer costs a GPU
    return block, (WARM_UP + args.repeats) * block + 1


def against_bare(name: str, side: int, batch_size: int, args: argparse.Namespace) -> timing.Samples:
    images = torch.randn(batch_size, 3, side, side, device=args.device).contiguous(memory_format=torch.channels_last)
    if name == SEGMENTOR:
        return _segmentor_against_bare(images, args)
    batch = Batch(images, torch.randint(100, (batch_size,), device=args.device), batch_size)
    other = make_model(name, args.device)
    step = bare(other, itertools.repeat(batch), make_optimizer(other))
    return fit(make_model(name, args.device), itertools.repeat(batch), step, batch_size, args)


def _segmentor_against_bare(images: torch.Tensor, args: argparse.Namespace) -> timing.Samples:
    size, side, classes = len(images), images.shape[2], 19
    masks = torch.randint(classes, (size, side, side), device=args.device, dtype=torch.uint8)
    batch = SegmentationBatch(images, masks, np.arange(size), size)
    val = SegmentationBatch([images[:1]], [masks[0]], np.arange(1), 1)
    model, other = (make_model(SEGMENTOR, args.device, classes) for _ in range(2))
    step = bare_segmentation(other, batch, make_optimizer(other))
    return fit(model, itertools.repeat(batch), step, size, args, Segmentation(), val)


def _pictures(args: argparse.Namespace) -> tuple[str, int]:
    """The folder with train/ and val/, and the number of its classes."""
    root = args.root or str(demo_root())
    return root, len(data.open_dataset("folder", root).train.class_names)


def against_timm(name: str, side: int, batch_size: int, args: argparse.Namespace) -> timing.Samples:
    root, classes = _pictures(args)
    batches, close = our_loader(root, "torch", batch_size, side, 0, args.device)
    model, other = (make_model(name, args.device, classes) for _ in range(2))
    theirs = peer_timm.loop(
        other, root, side=side, batch_size=batch_size, lr=LR, smoothing=SMOOTHING, updates=_block_and_steps(args)[1],
        device=args.device,
    )  # fmt: skip
    samples = fit(model, batches, theirs, batch_size, args)
    close()
    return samples


def against_plain(name: str, side: int, batch_size: int, args: argparse.Namespace) -> timing.Samples:
    root, classes = _pictures(args)
    (strong, close), (plain, close_plain) = (
        our_loader(root, "torch", batch_size, side, 1, args.device, strong=strong) for strong in (True, False)
    )
    model, other = (make_model(name, args.device, classes) for _ in range(2))
    samples = fit(model, strong, bare(other, plain, make_optimizer(other)), batch_size, args)
    close()
    close_plain()
    return samples


class Peer(NamedTuple):
    name: str
    measure: Callable[[str, int, int, argparse.Namespace], timing.Samples]
    images: str


PEERS = {
    "bare": Peer("bare loop", against_bare, "synthetic images."),
    "timm": Peer("timm's loop", against_timm, "loading included, by the torch loader and timm's."),
    "plain": Peer(
        "plain loop", against_plain, "loading included, by the torch loader with a worker a side: the trainer's "
        "pictures with RandAugment, erasing and mixup, the plain loop's without.",
    ),
}  # fmt: skip


def run(args: argparse.Namespace, report: Report) -> None:
    logging.getLogger("involution").setLevel(logging.ERROR)  # it would complain about the loader
    fill_heap(args, 0.1 if args.quick else 2)
    peer = PEERS[args.peer]
    rows: list[Row] = []
    quick = ["rednet26:32:2", f"{SEGMENTOR}:32:2"] if args.peer == "bare" else ["rednet26:32:2"]
    for setup in quick if args.quick else args.setup:
        name, side, batch_size = setup.split(":")
        samples = peer.measure(name, int(side), int(batch_size), args)
        rows.append({
            "model": name, "images": f"{batch_size} x {side} x {side}",
            "trainer (ms)": timing.ms(samples, "trainer"), f"{peer.name} (ms)": timing.ms(samples, "peer"),
            f"trainer / {peer.name}": timing.ratio(samples, "trainer", "peer"),
        })  # fmt: skip
    what = f"Forward, backward, SGD with momentum, label smoothing; {peer.images}"
    report.table("A training step", rows, what)
    ratios = [row[f"trainer / {peer.name}"].median for row in rows]
    report.verdict(f"Time of the trainer / {peer.name}: at most {max(ratios):.2f}.")


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "loop", parents=[common], help="the trainer's overhead", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--setup", nargs="+", default=["rednet26:64:16", "rednet50:224:8"], metavar="MODEL:SIDE:BATCH",
        help="default rednet26:64:16 (a short step, where overhead shows) rednet50:224:8; for segmentation "
        f"{SEGMENTOR}:64:4 (with involutions, on RedNet-26); timm/NAME for one of timm's",
    )  # fmt: skip
    parser.add_argument("--peer", choices=PEERS, default="bare", help="the other side (default bare)")
    parser.add_argument(
        "--root", help="--peer timm, plain: train/<class>/ and val/<class>/ are in it (default: the demo set)"
    )
    parser.set_defaults(run=run, title="The cost of the training loop", repeats=25)
