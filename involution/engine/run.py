"""A run's folder: who writes it, what is recorded there, what the user sees meanwhile."""

import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from involution.checks import strict_json
from involution.engine.distributed import World, gather_objects
from involution.engine.errors import UserError
from involution.engine.rendezvous import started_again
from involution.engine.same_run import differences
from involution.outage import NO_LOCKS

log = logging.getLogger("involution")
PACKAGES = (
    "torch", "torchvision", "timm", "hydra-core", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "triton",
    "tensorboard",
)  # fmt: skip


PATIENCE = 180  # seconds that a job which is started again waits for the lock


class RunFolder:
    """`<output_root>/<name>/` with its configuration, environment, log, metrics, TensorBoard, checkpoints and summary.

    Its path comes from the configuration alone, so that all ranks agree and a second start finds the first's state.
    Only rank 0 writes.
    """

    def __init__(self, path: Path, world: World) -> None:
        self.path = path.absolute()
        self.is_main = world.is_main
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def open(self) -> None:
        """Take the folder: no second run may write into it (the lock dies with its process, however that dies)."""
        problem = None
        if self.is_main:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._take_lock()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"cannot write to {self.path}: {error.strerror}; set output_root to a folder you can write to"
        for message in filter(None, gather_objects(problem)):
            raise UserError(message)

    def _take_lock(self) -> None:
        # lockf, not flock: a loader's worker that outlives its killed parent would inherit the latter for a while
        lock = open(self.path / ".lock", "a+")  # noqa: SIM115 (open as long as the run)
        # a server of NFS holds a dead node's lock for some time, in which SLURM starts the job on another
        patience = time.monotonic() + (PATIENCE if started_again() else 0)
        while (problem := lock_file(lock)) is not None:
            if isinstance(problem, BlockingIOError | PermissionError):
                if time.monotonic() < patience:
                    time.sleep(1)
                    continue
                lock.seek(0)
                raise UserError(
                    f"another run is writing to {self.path}: {lock.read().strip() or 'it has just started'}. "
                    "Wait for it, stop it, or give this one another name="
                )
            if problem.errno not in NO_LOCKS:
                raise problem
            log.warning("%s has no locks (%s): nothing stops a second run there", self.path, problem.strerror)
            break
        lock.truncate(0)
        lock.write(f"host {socket.gethostname()}, pid {os.getpid()}")
        lock.flush()
        self._lock = lock

    @property
    def described(self) -> bool:
        """Whether an earlier start has recorded what the run is."""
        return (self.path / "config.yaml").exists()

    def start_over(self) -> None:
        """Forget an earlier run in this folder (train.resume=never)."""
        for name in ("metrics.jsonl", "summary.json"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("tensorboard", "wandb", "checkpoints"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def describe(self, config: dict[str, Any], world: World) -> None:
        """Record the resolved configuration and the environment. From here on the run is unfinished."""
        (self.path / "summary.json").unlink(missing_ok=True)
        (self.path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (self.path / "environment.json").write_text(json.dumps(environment(world), indent=2) + "\n")

    def append_metrics(self, line: dict[str, Any]) -> None:
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(strict_json(line) + "\n")

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines of epochs that ended after `step`, and a torn one: they are about to be written again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if _last_step(line) <= step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(lines))
            temporary.replace(path)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """The program's result, with the speed over the whole course and the most memory that an epoch took."""
        metrics = self.path / "metrics.jsonl"  # which a run has none of that began at its end (train.resume=PATH)
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        if seconds := sum(line["seconds"] for line in lines):
            summary = summary | {
                "images_per_s": sum(line["images_per_s"] * line["seconds"] for line in lines) / seconds,
                "peak_memory_mb": max(line["peak_memory_mb"] for line in lines),
            }
        (self.path / "summary.json").write_text(strict_json(summary, indent=2) + "\n")


def lock_file(file: IO[str]) -> OSError | None:
    """Take the lock of a file; what is in the way, or None."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None


def _last_step(line: str) -> float:
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except json.JSONDecodeError:
        return math.inf


def environment(world: World) -> dict[str, Any]:
    """Versions, devices, and the code's git commit with what was changed since."""
    repository = Path(__file__).parents[2]
    cuda = world.device.type == "cuda"
    return {
        "command": " ".join(sys.argv),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda if cuda else None,
        "git_commit": _git(repository, "rev-parse", "HEAD"),
        "git_diff": _git(repository, "diff", "HEAD"),
    }


def same_on_all_ranks(what: str, value: dict[str, Any]) -> None:
    """Compare something across ranks. A collective call.

    Raises:
        UserError: on every rank, naming the first one that differs from rank 0, and the difference.
    """
    first, *others = gather_objects(value)
    for rank, other in enumerate(others, 1):
        if other != first:
            listed = "; ".join(
                f"{key} is {a} on rank 0, {b} on rank {rank}" for key, (a, b) in differences(first, other).items()
            )
            raise UserError(f"rank {rank} has another {what} than rank 0: {listed}")


def code_version() -> dict[str, str]:
    """What decides how a step comes out besides the configuration: a hash of the sources, the version of torch."""
    sha = hashlib.sha256()
    root = Path(__file__).parents[2]
    for path in sorted(path for folder in ("involution", "data") for path in (root / folder).rglob("*.*")):
        if path.suffix in (".py", ".h", ".cpp"):
            sha.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return {"sources": sha.hexdigest()[:12], "torch": torch.__version__}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


class _Held(logging.Handler):
    """Keeps messages for the log file, which is opened when it is known that there is a run to log."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _LogFile(logging.FileHandler):
    """A log file whose disk may be full: that must not bury the message that says so under tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def log_to(path: Path | None, is_main: bool) -> None:
    """Send the program's messages to standard error and, with details, to a file; other ranks than 0 only warn, and of
    what a machine's compiler and driver lack only the first rank there. Without a file messages are held for the next
    call."""
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter("%(message)s"))
    console.setLevel(logging.INFO if is_main else logging.WARNING)
    handlers: list[logging.Handler] = [console]
    if path is not None and is_main:
        handlers.append(_LogFile(path, encoding="utf-8", errors="backslashreplace"))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    elif path is None:
        handlers.append(_Held())
    for record in [record for held in log.handlers if isinstance(held, _Held) for record in held.records]:
        for handler in handlers[1:]:
            handler.handle(record)
    for handler in log.handlers:
        handler.close()
    log.handlers[:] = handlers
    log.setLevel(logging.DEBUG)
    log.propagate = False
    alone = int(os.environ.get("LOCAL_RANK", 0)) == 0
    logging.getLogger("involution.ops").setLevel(logging.NOTSET if alone else logging.ERROR)
