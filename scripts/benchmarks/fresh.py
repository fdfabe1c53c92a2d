"""Run a function in a fresh process, whose memory nobody else has touched."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from involution.engine.meter import forget_peak_memory, peak_memory_mb

SCRIPTS = Path(__file__).resolve().parents[1]
_PROGRAM = """
import importlib, json, sys, torch
sys.path[:0] = {paths}
from involution.engine.device import keep_freed_memory
keep_freed_memory()
torch.set_num_threads({threads})
result = getattr(importlib.import_module({module!r}), {function!r})(*json.loads({arguments!r}))
print(json.dumps(result))
"""


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a module's function in a new process, with freed memory kept as in train.py.

    Raises:
        RuntimeError: it failed; the message is the end of its standard error.
    """
    program = _PROGRAM.format(
        paths=[str(SCRIPTS), str(SCRIPTS.parent)],
        threads=torch.get_num_threads(),
        module=function.__module__,
        function=function.__name__,
        arguments=json.dumps(arguments),
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{function.__name__}{arguments} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _status(field: str, process: str = "self") -> float:
    """A field of /proc/PID/status in MiB. (getrusage's maximum would include the parent's.)"""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def resident() -> float:
    """MiB resident in this process and its children (pages that they share count in each)."""
    children = [c for task in Path("/proc/self/task").iterdir() for c in (task / "children").read_text().split()]
    return sum(_status("VmRSS", process) for process in ("self", *children))


class PeakMemory:
    """The most memory in use since the start of the block, in MiB above what was in use then (`.mib`).

    On the CPU resident memory, which only a fresh process can tell; on the GPU what torch allocated.
    """

    def __init__(self, device: str) -> None:
        self.device, self.mib = device, 0.0

    def __enter__(self) -> "PeakMemory":
        forget_peak_memory(torch.device(self.device))
        self._base = torch.cuda.memory_allocated() / 2**20 if self.device == "cuda" else _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.mib = peak_memory_mb(torch.device(self.device)) - self._base
