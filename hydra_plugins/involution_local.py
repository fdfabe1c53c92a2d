"""hydra/launcher=submitit_local (`hydra_plugins` is where Hydra looks for such things)."""

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from involution.engine.errors import Preempted, UserError
from involution.engine.submit import SubmititLauncher, on_stop

log = logging.getLogger("involution")


class LocalLauncher(SubmititLauncher):
    """Jobs with ranks of their own on this machine, as many at a time as there are GPUs for."""

    option = "submitit_local"

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        available = torch.cuda.device_count() if torch.cuda.is_available() else 0
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = chosen.split(",")[:available] if chosen else [str(i) for i in range(available)]
        a_job = self.params["gpus_per_node"]
        if a_job is None:
            a_job = self.params["gpus_per_node"] = available
        if a_job > available:
            raise UserError(f"hydra.launcher.gpus_per_node={a_job}, but this machine has {available} GPUs")
        self.params["tasks_per_node"] = self.params["tasks_per_node"] or a_job or 1
        self.slots = [gpus[i : i + a_job] for i in range(0, available - a_job + 1, a_job)] if a_job else [[]]

    def run(self, jobs: list[list[str]], folders: list[Path]) -> list[str | None]:
        running: dict[int, tuple[Any, list[str]]] = {}
        waiting, free = list(range(len(jobs))), list(self.slots)
        reasons: list[str | None] = [None] * len(jobs)
        stopped = False

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal stopped
            stopped = True
            for job, _ in running.values():
                job._process.send_signal(signal.SIGTERM)  # submitit passes it on to the ranks

        with on_stop(stop):
            while running or (waiting and not stopped):
                while waiting and free and not stopped:
                    i, gpus = waiting.pop(0), free.pop(0)
                    log.info("job %d of %d: %s", i + 1, len(jobs), folders[i].name)
                    (folders[i] / "summary.json").unlink(missing_ok=True)
                    running[i] = self._start(jobs[i], gpus), gpus
                for i in [i for i, (job, _) in running.items() if job.done()]:
                    job, gpus = running.pop(i)
                    free.append(gpus)
                    if not stopped:
                        reasons[i] = self.ended(folders[i], job.job_id)
                time.sleep(0.1)
        if stopped:
            raise Preempted("the sweep was stopped; run the same command again to continue")
        return reasons

    def _start(self, overrides: list[str], gpus: list[str]) -> Any:
        from submitit import LocalExecutor

        executor = LocalExecutor(self.logs)
        executor.update_parameters(**self.params)
        executor.parameters["visible_gpus"] = gpus  # update_parameters takes no names such as MIG-...
        # Ctrl-C reaches all processes of a terminal: the ranks shall save their state before submitit kills them
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return executor.submit(self.program, overrides)
        finally:
            signal.signal(signal.SIGINT, handler)
