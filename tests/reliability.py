"""Runs of the real train.py on a few dozen small JPEGs, to be killed, stopped and continued."""

import gc
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from programs import Finished, descendants, finish, in_process, start

from data.scenes import scenes
from involution.weights.run_file import digest, read

# 45 images in steps of 16 make 3 steps an epoch, the last one ragged; micro-batches of 4 make one rank accumulate 4
SETTINGS = [
    "data=folder", "model=rednet26", "device=cpu", "deterministic=true", "train.epochs=5", "train.global_batch_size=16",
    "train.batch_size=4", "train.ema_decay=0.9", "train.checkpoint_every_steps=2", "train.log_every_steps=1",
    "train.label_smoothing=0.1", "optimizer.lr=0.02", "data.train_size=32", "data.val_size=32", "data.val_resize=32",
    "data.workers=1",
]  # fmt: skip
STEPS = 15


def write_images(root: Path, val: int = 18) -> Path:
    """Three classes of noisy blobs: 45 images to train on, `val` to validate."""
    random = np.random.default_rng(0)
    for split, each in (("train", 15), ("val", val // 3)):
        for name in "abc":
            folder = root / split / name
            folder.mkdir(parents=True)
            blob = random.integers(0, 256, (4, 4, 3))
            for i in range(each):
                noisy = (blob + random.integers(-40, 41, blob.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return root


def write_masks(root: Path) -> Path:
    """Pictures of digits with masks that tell them from the ground: four to train on, two to validate."""
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i, (picture, digits) in enumerate(scenes(split, count)):
            Image.fromarray(picture).save(root / split / "images" / f"{i}.jpg")
            mask = np.any([digit.mask for digit in digits], 0).astype(np.uint8)
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
    return root


def command(run: Path, images: Path, *overrides: str, ranks: int = 1, restarts: int = 0) -> list[str]:
    """The command line of a run in the folder `run`, under torchrun where it has several ranks."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
    ]
    place = [f"output_root={run.parent}", f"name={run.name}", f"data.root={images}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), "train.py", *SETTINGS, *place, *overrides]


def train(run: Path, images: Path, *overrides: str, ranks: int = 1) -> Finished:
    """Train to the end."""
    return finish(start(command(run, images, *overrides, ranks=ranks)))


def train_here(run: Path, images: Path, *overrides: str) -> Finished:
    """The same on one rank, in this process: it costs seconds less."""
    ended = in_process("train.py", *command(run, images, *overrides)[2:])
    gc.collect()  # or a run that failed would keep its folder's lock from other processes
    return ended


def start_ranks(commands: list[list[str]], **environment: str) -> list[subprocess.Popen[str]]:
    """Start a process a rank as srun does: no launcher watches over them, and each has its own exit status."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    return [start(words, RANK=str(r), LOCAL_RANK=str(r), **shared) for r, words in enumerate(commands)]


def wait_until(happened: Callable[[], Any], process: subprocess.Popen[str], timeout: float = 300) -> None:
    """Wait for something to happen while a program runs."""
    end = time.monotonic() + timeout
    while not happened():
        assert process.poll() is None, f"ended early with {process.returncode}: {process.communicate()}"
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def saved_step(run: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return max((int(path.stem[5:]) for path in (run / "checkpoints").glob("step-*.pt")), default=0)


def rank_pid(process: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank that torchrun started."""
    for pid in descendants(process.pid):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in words:
            return pid
    raise AssertionError(f"rank {rank} is not there")


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the memory decides."""
    varying = ("images_per_s", "data_wait", "seconds", "peak_memory_mb")
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in varying} for line in parsed]


def outcome(run: Path) -> tuple[str, list[dict[str, Any]], float]:
    """All that a run leaves behind, to the last bit: weights, averages, momenta, random streams, epochs, best score."""
    state = read(run / "checkpoints" / "last.pt")
    for clock in ("seconds", "waiting"):
        state["meter"].pop(clock)
    trained = {key: value for key, value in state.items() if key not in ("config", "data")}
    return digest(trained), lines(run), read(run / "checkpoints" / "best.pt")["best"]
