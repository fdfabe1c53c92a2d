"""What the figures depend on: the machine, the software, the settings; and what the machine can do at most."""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.timing import interleave

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = ("involution", "data", "scripts")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None:
        return "unknown"
    return git("rev-parse", "--short", "HEAD") + (" with local changes" if git("status", "--short", *CODE) else "")


def command() -> str:
    """The command line, with folders outside the repository by their last name only."""
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return shlex.join(["python", "scripts/benchmark.py", *arguments])


def conditions(args: argparse.Namespace) -> dict[str, str]:
    """Everything that a reader needs to judge or repeat a measurement."""
    packages = ("torch", "torchvision", "triton", "nvidia-dali-cuda130", "onnxruntime")
    return {
        "command": command(),
        "commit": _commit(),
        "CPU": _cpu(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "device measured": args.device,
        "threads": str(args.threads),
        "clock": args.clock,
        "repeats": str(args.repeats),
        "versions": ", ".join([f"Python {platform.python_version()}"] + [f"{p} {_version(p)}" for p in packages]),
        "allocator": "keeps freed memory, as in train.py" if args.allocator == "keep" else _malloc() or "default",
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
    }


def _malloc() -> str:
    return ", ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if "MALLOC" in k)


def fill_heap(args: argparse.Namespace, gib: float) -> None:
    """Touch memory once and free it: where it is kept, later allocations of that much find it resident. On CPUs."""
    if args.allocator == "keep" and args.device == "cpu":
        torch.zeros(int(gib * 2**28))


def bandwidth(size: int, device: str) -> float:
    """Bytes/s of the stream triad a = b + 2 c, its three arrays `size` bytes in all (small ones stay in the caches)."""
    b, c = (torch.ones(max(size // 12, 1024), device=device) for _ in range(2))
    a = torch.empty_like(b)
    return 12 * b.numel() / _best(lambda: torch.add(b, c, alpha=2, out=a), device)


def peak_flops(device: str, dtype: torch.dtype = torch.float32, small: bool = False) -> float:
    """FLOP/s of a large matrix product or of a 3x3 convolution, the better: CPU libraries differ by more than 2."""
    side, batch = (256, 1) if small else (8192, 256) if device == "cuda" else (2048, 4)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = 2 * side**3 / _best(lambda: torch.mm(a, b), device)
    x = torch.randn(batch, 128, 28, 28, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    convolution = 2 * x.numel() * 128 * 9 / _best(lambda: F.conv2d(x, weight, padding=1), device)
    return max(product, convolution)


def _best(call: Callable[[], object], device: str) -> float:
    """A limit is what is reached undisturbed: the median of the fastest half of ten."""
    times = sorted(interleave({"": call}, 10, device)[""])
    return median(times[:5])
