"""What only a GPU can tell: one check a call, its result as JSON.

python scripts/gpu/checks.py machine                    the GPU and the software; exits with 2 where there is no GPU
python scripts/gpu/checks.py step                       a training step: time, time of the host alone, images/s, memory
python scripts/gpu/checks.py synchronisations           lines of a training step that make the host wait for the GPU
python scripts/gpu/checks.py profile                    the kernels of a step by their time
python scripts/gpu/checks.py tiles --batch 128          the involution's kernels in their tiles and in others
python scripts/gpu/checks.py loader --root FOLDER       DALI: images/s, and whether pictures change while they are read
python scripts/gpu/checks.py same-bits --runs A B       whether two runs ended with the same weights
"""

import argparse
import dataclasses
import gc
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks import timing
from benchmarks.loop import make_model, make_optimizer, options
from benchmarks.machine import conditions

import data
from data import Batch
from data.transforms import normalise
from involution.engine.device import choose_device
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.ghost import use_ghost_batches
from involution.engine.learner import Learner
from involution.engine.meter import Meter
from involution.engine.tasks.classification import Classification
from involution.engine.tasks.losses import CrossEntropy
from involution.weights.run_file import read

MODELS = ("resnet50", "rednet50")


def machine(args: argparse.Namespace) -> dict[str, Any]:
    found = conditions(
        argparse.Namespace(
            device=args.device, threads=torch.get_num_threads(), clock="wall", repeats=1, allocator="default"
        )
    )
    for name in ("command", "threads", "clock", "repeats", "allocator"):  # each step has its own
        found.pop(name)
    if args.out and args.out.exists() and (before := json.loads(args.out.read_text())["GPU"]) != found["GPU"]:
        raise UserError(
            f"{args.out.parent} has results of another GPU, {before}, and this is {found['GPU']}: give another folder, "
            "scripts/gpu_session.sh FOLDER OUT"
        )
    if args.device != "cuda":
        return found
    gpu = torch.cuda.get_device_properties(0)
    return found | {"memory": f"{gpu.total_memory / 2**30:.0f} GiB", "compute capability": f"{gpu.major}.{gpu.minor}"}


class Training:
    """A model, its optimizer and pictures on the device: `step` is what the trainer does with them."""

    def __init__(self, args: argparse.Namespace, name: str, batch: int) -> None:
        device = torch.device(args.device)
        model = make_model(name, args.device)
        if args.batchnorm_size:
            use_ghost_batches(model, args.batchnorm_size)
        settings = dataclasses.replace(options(batch), precision=args.precision, cuda_graphs=args.cuda_graphs)
        world = World(0, 1, device)
        task = Classification(CrossEntropy(0.1))
        self.learner = Learner(model, task, make_optimizer(model), lambda step: 1e-3, settings, world)
        self.meter = Meter(world)
        shape = (batch, args.size, args.size, 3)
        self.pictures = torch.randint(0, 255, shape, dtype=torch.uint8, device=device)
        self.targets = torch.randint(100, (batch,), device=device)
        self.batch = batch

    def step(self, number: int = 0) -> None:
        images = normalise(self.pictures, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        batch = Batch(images, self.targets, self.batch)
        loss, bad = self.learner.step(number, [batch], 1, self.batch)
        self.meter.add(loss, self.batch, bad)


def step(args: argparse.Namespace) -> dict[str, Any]:
    rows, training = [], None
    for batch, name in itertools.product(args.batch, args.models):
        begin = time.perf_counter()
        if args.device == "cuda":
            training = None  # the row before is not to count into this one's peak
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        training = Training(args, name, batch)
        training.step()
        timing.synchronize(args.device)
        first = time.perf_counter() - begin
        for _ in range(args.repeats // 4):
            training.step()
        timing.synchronize(args.device)
        begin = time.perf_counter()
        for _ in range(args.repeats):
            training.step()
        host = (time.perf_counter() - begin) / args.repeats
        timing.synchronize(args.device)
        whole = (time.perf_counter() - begin) / args.repeats
        peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None
        rows.append({
            "model": name, "batch": batch, "step (ms)": 1e3 * whole, "host (ms)": 1e3 * host,
            "images/s": batch / whole, "peak (GiB)": peak, "first step (s)": first,
        })  # fmt: skip
    told = {name: getattr(args, name) for name in ("precision", "batchnorm_size", "cuda_graphs")}
    return told | {"rows": rows}


def synchronisations(args: argparse.Namespace) -> dict[str, Any]:
    if args.device != "cuda":
        raise UserError("only a GPU has the mode that finds synchronisations")
    training = Training(args, "rednet50", args.batch[0])
    for i in range(4):
        training.step(i)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.step(4)
    torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return {"places": sorted(set(places))}


def profile(args: argparse.Namespace) -> dict[str, Any]:
    activity = torch.profiler.ProfilerActivity
    on_gpu = args.device == "cuda"
    training = Training(args, args.models[-1], args.batch[0])
    for _ in range(2):
        training.step()
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as recorded:
        for _ in range(3):
            training.step()
        timing.synchronize(args.device)

    def us(event: Any) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 3

    events = sorted(recorded.key_averages(), key=us, reverse=True)
    rows = [{"kernel": e.key[:70], "calls": e.count / 3, "us": us(e)} for e in events[:20]]
    return {"model": args.models[-1], "batch": args.batch[0], "all (ms)": sum(map(us, events)) / 1e3, "rows": rows}


def tiles(args: argparse.Namespace) -> dict[str, Any]:
    if args.device != "cuda":
        raise UserError("only a GPU runs the kernels")
    from gpu.tiles import measure  # with Triton, which the other checks do without

    return measure(args.batch[0])


def loader(args: argparse.Namespace) -> dict[str, Any]:
    if not args.root:
        raise UserError("loader needs --root FOLDER, with train/<class>/ of photos")
    images = data.open_dataset("folder", args.root).train
    found: dict[str, Any] = {"images/s": {}}
    decoders = ("mixed", "cpu") if args.device == "cuda" else ("cpu",)

    def made(decoder: str, batch: int) -> data.TrainLoader:
        return data.train_loader(
            images, batch_size=batch, global_batch_size=batch, seed=0, train_size=args.size, loader="dali",
            device=args.device, decoder=decoder, workers=args.workers,
        )  # fmt: skip

    for decoder in decoders:
        batches = made(decoder, args.batch[-1])
        for _ in range(args.repeats // 4):
            next(batches)
        timing.synchronize(args.device)
        begin = time.perf_counter()
        for _ in range(args.repeats):
            next(batches)
        timing.synchronize(args.device)
        found["images/s"][decoder] = args.repeats * args.batch[-1] / (time.perf_counter() - begin)
        batches.close()
    sums = []
    for wait in (False, True):  # the second time the GPU sleeps before it reads a batch, while DALI makes the next ones
        batches, read_late = made(decoders[0], args.batch[0]), []
        for batch in itertools.islice(batches, args.repeats):
            if wait and args.device == "cuda":
                torch.cuda._sleep(200_000_000)
            read_late.append(batch.images.double().sum())
        sums.append(torch.stack(read_late))
        batches.close()
    return found | {"pictures stay while they are read": torch.equal(*sums)}


def same_bits(args: argparse.Namespace) -> dict[str, Any]:
    if len(args.runs) != 2:
        raise UserError("same-bits needs --runs A B, two folders of runs")
    states = [read(Path(run) / "checkpoints/last.pt") for run in args.runs]
    if states[0]["step"] != states[1]["step"]:
        raise UserError(f"these runs ended after {states[0]['step']} and {states[1]['step']} steps: not comparable")
    first, second = (state["model"] for state in states)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    return {"same": not different and first.keys() == second.keys(), "different": different}


CHECKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "machine": machine, "step": step, "synchronisations": synchronisations, "profile": profile, "loader": loader,
    "same-bits": same_bits, "tiles": tiles,
}  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=list(CHECKS))
    parser.add_argument("--out", type=Path, help="write the result to this file as well")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: does it run?")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--batchnorm-size", type=int, help="images that BatchNorm sees at a time; default: all")
    parser.add_argument("--cuda-graphs", action="store_true", help="train.cuda_graphs=true")
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--repeats", type=int, default=24, help="steps, or batches")
    parser.add_argument("--workers", type=int, default=8, help="threads that decode")
    parser.add_argument("--root", help="folder of photos")
    parser.add_argument("--runs", nargs="*", default=[], help="folders of runs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        if args.device == "cuda" and args.check != "same-bits":
            torch.cuda.set_device(choose_device("cuda", 0, 1))
        result = CHECKS[args.check](args)
    except UserError as error:
        print(f"{args.check}: {error}", file=sys.stderr)
        return 2
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
