"""The real programs as processes that can be killed, forked from one that has imported everything: seconds cheaper."""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from programs import ROOT

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch.optim", "torchvision", "timm", "hydra", "involution.engine.build"])


class Forked:
    """`python PROGRAM ARGUMENTS` with further variables of the environment; what it prints goes to the file `log`."""

    def __init__(self, log: Path, program: str, *arguments: str, **environment: str) -> None:
        self.log = log
        self._process = _FORKS.Process(target=_run, args=(log, [program, *arguments], environment))
        self._process.start()

    def kill_when(self, happened: Callable[[], bool], timeout: float = 300) -> None:
        """What a power cut does."""
        end = time.monotonic() + timeout
        while not happened():
            assert self._process.is_alive(), f"it ended early: {self.log.read_text()}"
            assert time.monotonic() < end, "timed out"
            time.sleep(0.01)
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)
        assert self.finish() == -signal.SIGKILL

    def finish(self, timeout: float = 300) -> int:
        """Its exit status."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "timed out"
        return self._process.exitcode


def _run(log: Path, words: list[str], environment: dict[str, str]) -> None:
    os.environ |= environment
    os.chdir(ROOT)
    with open(log, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = words
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")
