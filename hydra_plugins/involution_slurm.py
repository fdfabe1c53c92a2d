"""hydra/launcher=slurm (`hydra_plugins` is where Hydra looks for such things)."""

import logging
import shutil
import subprocess
import time
from pathlib import Path
from types import FrameType

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from involution.engine.errors import Preempted, UserError
from involution.engine.submit import SubmititLauncher, on_stop

log = logging.getLogger("involution")
JOB_ID = ".slurm_job"  # in a job's folder: its number in SLURM's queue
SHARED = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")


class SlurmLauncher(SubmititLauncher):
    """Jobs as one job array of SLURM. Those that an earlier start of the sweep left in the queue are waited for."""

    option = "slurm"

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        if shutil.which("sbatch") is None:
            raise UserError(
                "hydra/launcher=slurm needs SLURM's sbatch, which is not on this machine: start the sweep on a login "
                "node of the cluster, or use hydra/launcher=submitit_local"
            )
        self.params["tasks_per_node"] = self.params["tasks_per_node"] or self.params["gpus_per_node"] or 1

    def run(self, jobs: list[list[str]], folders: list[Path]) -> list[str | None]:
        noted = {i: path.read_text() for i, folder in enumerate(folders) if (path := folder / JOB_ID).exists()}
        queued = in_queue(set(noted.values()))
        ids = {i: job_id for i, job_id in noted.items() if job_id in queued}
        new = [i for i in range(len(jobs)) if i not in ids]
        for i in new:
            (folders[i] / "summary.json").unlink(missing_ok=True)
        if new:
            ids |= dict(zip(new, self._submit([jobs[i] for i in new]), strict=True))
        for i, folder in enumerate(folders):
            (folder / JOB_ID).write_text(ids[i])
            log.info("SLURM job %s: %s", ids[i], folder.name)

        def stop(number: int, frame: FrameType | None) -> None:
            arrays = " ".join(sorted({job_id.partition("_")[0] for job_id in ids.values()}))
            raise Preempted(
                f"the jobs stay in SLURM's queue (scancel {arrays} would end them); run the same command again to "
                "wait for them"
            )

        with on_stop(stop):
            return self._wait(ids, folders)

    def _submit(self, jobs: list[list[str]]) -> list[str]:
        from submitit import AutoExecutor

        params = dict(self.params)
        # srun does not inherit it (SLURM 22.05 and later): a rank would decode on one core
        params["srun_args"] = [*(params["srun_args"] or []), f"--cpus-per-task={params['cpus_per_task']}"]
        executor = AutoExecutor(self.logs, cluster="slurm", slurm_max_num_timeout=params.pop("max_num_timeout"))
        executor.update_parameters(**{k if k in SHARED else f"slurm_{k}": value for k, value in params.items()})
        return [job.job_id for job in executor.map_array(self.program, jobs)]

    def _wait(self, ids: dict[int, str], folders: list[Path]) -> list[str | None]:
        reasons: list[str | None] = [None] * len(folders)
        pause, waiting = 1.0, dict(ids)
        while waiting:
            queued = in_queue(set(waiting.values()))
            for i in [i for i, job_id in waiting.items() if job_id not in queued]:
                reasons[i] = self.ended(folders[i], waiting.pop(i))
            if waiting:
                time.sleep(pause)
                pause = min(30, 1.1 * pause)
        return reasons


def in_queue(ids: set[str]) -> set[str]:
    """Those of SLURM's job ids that are waiting or running."""
    if not ids:
        return set()
    # not sacct, as submitit does: that needs an accounting data base
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(sorted(ids))}"]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        log.warning("squeue: %s; asking again", asked.stderr.strip())
        return ids
    return ids & set(asked.stdout.split())
