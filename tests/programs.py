"""The real programs as subprocesses."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Finished:
    """How a program ended."""

    status: int
    stdout: str
    stderr: str
    result: dict[str, Any] = field(default_factory=dict)


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start a program of this repository with one thread a process (the test machines have two cores)."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str], timeout: float = 600) -> Finished:
    stdout, stderr = process.communicate(timeout=timeout)
    lines = stdout.strip().splitlines()
    result = json.loads(lines[-1]) if process.returncode == 0 and lines else {}
    return Finished(process.returncode, stdout, stderr, result)


def python(*arguments: str, timeout: float = 600, **environment: str) -> Finished:
    """Run `python ...` in the repository."""
    return finish(start([sys.executable, *arguments], **environment), timeout)


def torchrun(ranks: int, *arguments: str, timeout: float = 600) -> Finished:
    """Run `torchrun --nproc-per-node=ranks ...` in the repository."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return finish(start([*launcher, *arguments]), timeout)
