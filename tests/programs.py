"""The real programs: as processes, or in this one."""

import io
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hydra.core.global_hydra import GlobalHydra

from involution.engine.signals import SIGNALS

ROOT = Path(__file__).resolve().parent.parent
_started: list[subprocess.Popen[str]] = []  # by the test that runs


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
    pipe = subprocess.PIPE
    _started.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=pipe, stderr=pipe))
    return _started[-1]


def descendants(pid: int) -> list[int]:
    """All processes that a process started, and they in turn."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *descendants(child))]


def kill(process: subprocess.Popen[str]) -> None:
    """What a power cut does to a program and all that it started."""
    process.send_signal(signal.SIGSTOP)
    for pid in [*descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def kill_what_runs() -> None:
    """Kill what a test that failed has left running."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            kill(process)


def finish(process: subprocess.Popen[str], timeout: float = 600) -> Finished:
    stdout, stderr = process.communicate(timeout=timeout)
    return _finished(process.returncode, stdout, stderr)


def _finished(status: int, stdout: str, stderr: str) -> Finished:
    lines = stdout.strip().splitlines()
    result = json.loads(lines[-1]) if status == 0 and lines and lines[-1].startswith("{") else {}
    return Finished(status, stdout, stderr, result)


def python(*arguments: str, timeout: float = 600, **environment: str) -> Finished:
    """Run `python ...` in the repository."""
    return finish(start([sys.executable, *arguments], **environment), timeout)


def in_process(program: str, *arguments: str) -> Finished:
    """Run a program here, where a process of its own would show nothing more: it costs seconds of imports."""
    output, errors, status = io.StringIO(), io.StringIO(), 0
    logging.getLogger("involution").handlers.clear()  # of an earlier call
    torch.set_num_threads(1)  # as `start` has it
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with (
        redirect_stdout(output),
        redirect_stderr(errors),
        patch.object(sys, "argv", [program, *arguments]),
        patch.object(sys, "path", [str((ROOT / program).parent), *sys.path]),
    ):
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as leave:
            status = int(leave.code or 0)
        finally:
            GlobalHydra.instance().clear()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return _finished(status, output.getvalue(), errors.getvalue())


def torchrun(ranks: int, *arguments: str, timeout: float = 600) -> Finished:
    """Run `torchrun --nproc-per-node=ranks ...` in the repository."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return finish(start([*launcher, *arguments]), timeout)
