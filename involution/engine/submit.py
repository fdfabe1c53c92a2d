"""Jobs of a sweep through submitit: what its launchers (hydra_plugins/) have in common.

A job is `train.py` itself, run by submitit in each rank with the job's overrides, so it behaves as if srun or torchrun
had started it: same exit statuses, same reaction to signals. submitit's own results are not used, because a rank that
fails may take the others with it before any of them writes one: a job has succeeded when its folder says so.
"""

import json
import logging
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from involution.engine.arguments import parse
from involution.engine.cli import print_result
from involution.engine.errors import UserError

log = logging.getLogger("involution")
ROOT = Path(__file__).resolve().parents[2]


class Program:
    """What submitit runs in every rank: a program of this repository with a job's overrides."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, overrides: list[str]) -> None:
        # submitit would ignore SIGTERM until the program itself listens
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = [self.path, *overrides]
        runpy.run_path(self.path, run_name="__main__")

    def checkpoint(self, overrides: list[str]) -> Any:
        """Called by submitit before it puts the job back into the queue: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, overrides)


class SubmititLauncher(Launcher):
    """The part of a launcher that does not depend on where the jobs run."""

    option = ""  # hydra/launcher=...

    def __init__(self, **params: Any) -> None:
        self.params: dict[str, Any] = {
            key: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for key, v in params.items()
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See hydra.plugins.launcher.Launcher.

        Raises:
            UserError: for what is missing on this machine.
        """
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise UserError(f"hydra/launcher={self.option} needs submitit: pip install submitit") from None

    @property
    def ranks(self) -> int:
        """Of each job."""
        return int(self.params.get("nodes", 1) * self.params["tasks_per_node"])

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; each one's return value says why it failed, or is None."""
        from submitit.core.utils import FailedJobError

        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        folders = [_folder(overrides) for overrides in job_overrides]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        self.program, self.logs = Program(str(ROOT / "train.py")), folders[0].parent / ".submitit" / "%j"
        try:
            reasons = self.run([list(overrides) for overrides in job_overrides], folders)
        except (FailedJobError, NameError, AssertionError) as error:  # the submission itself
            raise UserError(f"hydra/launcher={self.option}: {error}") from error
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=reason) for reason in reasons]

    def run(self, jobs: list[list[str]], folders: list[Path]) -> list[str | None]:
        """Run the jobs, each given by its overrides and writing into its folder; returns why each failed, or None."""
        raise NotImplementedError

    def ended(self, folder: Path, job_id: str) -> str | None:
        """Show the result of a job that has ended, or return why there is none: the last words of rank 0."""
        folder.chmod(folder.stat().st_mode)  # makes a network file system look again
        summary = folder / "summary.json"
        if summary.exists():
            print_result(json.loads(summary.read_text()))
            return None
        log_file = Path(str(self.logs).replace("%j", job_id)) / f"{job_id}_0_log.err"
        words = log_file.read_text(errors="replace").strip().splitlines() if log_file.exists() else []
        reason = f"{words[-1] if words else 'it left no word'} (see {log_file})"
        log.error("%s failed: %s", folder.name, reason)
        return reason


def _folder(overrides: Sequence[str]) -> Path:
    (place,) = (override for override in overrides if override.startswith("hydra.run.dir="))
    parsed = parse(place)
    assert parsed is not None
    return Path(str(parsed.value()))


@contextmanager
def on_stop(react: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Call `react` when somebody wants the sweep to end."""
    before = {number: signal.signal(number, react) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
