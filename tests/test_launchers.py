"""Sweeps whose jobs have two ranks each, on this machine and in a real SLURM: killed, preempted, and all the same."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm
from programs import ROOT, finish, in_process, kill, start
from reliability import outcome, saved_step, wait_until

pytestmark = pytest.mark.slow

SETTINGS = [
    "recipe=demo", "device=cpu", "deterministic=true", "data.loader=torch", "data.workers=0", "train.max_steps=16",
    "train.global_batch_size=16", "train.batch_size=8", "train.checkpoint_every_steps=2", "train.log_every_steps=2",
]  # fmt: skip
GRID = ["model.kernel_size=3,5", "seed=0,1"]


def sweep(root: Path, launcher: str, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    place = [f"output_root={root}", "name=grid", f"hydra/launcher={launcher}", "hydra.launcher.tasks_per_node=2"]
    command = [sys.executable, "train.py", "-m", *SETTINGS, *GRID, *place, *overrides]
    return start(command, **environment)


def jobs(root: Path) -> list[Path]:
    """The folders of the grid's jobs, in order, as far as they are there."""
    return sorted((root / "grid").glob("*model.kernel_size=*"))


def finished(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def continued(folder: Path) -> int:
    """How many times a run has gone on from a checkpoint."""
    log = folder / "train.log"
    return log.read_text().count("going on from") if log.exists() else 0


def check(process: subprocess.Popen[str], root: Path) -> str:
    """The sweep ends well, every job's result and its own on standard output, a report; returns what it said."""
    done = finish(process)
    assert done.status == 0, done.stderr
    assert done.result == {"sweep_dir": str(root / "grid"), "jobs": 4, "finished": 4, "failed": 0}
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"run_dir"')]
    assert sorted(result["run_dir"] for result in results) == [str(folder) for folder in jobs(root)]
    report = in_process("scripts/report.py", str(root / "grid"), "--format", "csv")
    rows = list(csv.DictReader(report.stdout.splitlines()))
    assert [(row["setting"], row["runs"]) for row in rows] == [
        ("rednet26 kernel_size=3", "2"), ("rednet26 kernel_size=5", "2")
    ], report.stderr  # fmt: skip
    return done.stderr


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A 2 x 2 grid with two ranks a job, killed during its second job and started again."""
    root = tmp_path_factory.mktemp("local")
    first = sweep(root, "submitit_local")
    wait_until(lambda: len(jobs(root)) == 4 and finished(jobs(root)[0]) and saved_step(jobs(root)[1]) >= 2, first)
    kill(first)
    assert not finished(jobs(root)[1])
    said = check(sweep(root, "submitit_local"), root)
    assert said.count("finished before: ") == 1
    assert continued(jobs(root)[1])
    return root


def test_local_jobs_have_two_ranks_and_survive_a_kill(local):
    for folder in jobs(local):
        assert json.loads((folder / "environment.json").read_text())["world_size"] == 2


@pytest.fixture(scope="module")
def one_node() -> Iterator[dict[str, str]]:
    """A SLURM of one node: the environment that its commands need."""
    if reason := slurm.missing():
        pytest.skip(reason)
    try:
        with slurm.running() as environment:
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # train.sbatch says `python`
            yield environment | {"PATH": path}
    except slurm.NotStarted as error:
        pytest.skip(str(error))


@pytest.fixture
def cluster(one_node) -> Iterator[dict[str, str]]:
    """The same with an empty queue; what its daemons say is shown where a test fails."""
    yield one_node
    print(slurm.logs(one_node))
    slurm.cancel_all(one_node)


def ask(cluster: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=os.environ | cluster, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_slurm_jobs_are_preempted_requeued_and_found_again(local, cluster, tmp_path):
    for_slurm = ["hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]
    first = sweep(tmp_path, "slurm", *for_slurm, **cluster)
    wait_until(lambda: jobs(tmp_path) and saved_step(jobs(tmp_path)[0]) >= 2, first)
    array = (jobs(tmp_path)[0] / ".slurm_job").read_text().partition("_")[0]
    # the step: scancel 22.05 takes its success with a task of an array for a failure, and tries again for a minute
    number = ask(cluster, "squeue", "--noheader", f"--jobs={array}_0", "--format=%A").strip()
    ask(cluster, "scancel", "--signal=USR2", f"{number}.0")  # what SLURM does at the end of the job's time
    wait_until(lambda: saved_step(jobs(tmp_path)[1]) >= 2, first)
    ask(cluster, "scontrol", "requeue", f"{array}_1")  # what SLURM does to a job that a more important one displaces
    kill(first)  # the jobs stay in the queue
    said = check(sweep(tmp_path, "slurm", *for_slurm, **cluster), tmp_path)
    (script,) = (tmp_path / "grid" / ".submitit").rglob("*_submission.sh")
    assert " --cpus-per-task=1 " in script.read_text()
    assert said.count(f"SLURM job {array}_") + said.count("finished before: ") == 4
    assert [continued(folder) for folder in jobs(tmp_path)] == [1, 1, 0, 0]
    assert [outcome(folder) for folder in jobs(tmp_path)] == [outcome(folder) for folder in jobs(local)]


def test_the_batch_script_comes_back_after_preemption_and_time_out(local, cluster, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run, log = tmp_path / "run", tmp_path / "job.out"
    job = ask(
        cluster, "sbatch", "--parsable", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1",
        f"--output={log}", "scripts/train.sbatch", *SETTINGS, "model.kernel_size=5", "seed=1",
        f"output_root={tmp_path}", "name=run",
    ).strip()  # fmt: skip
    watch = start(["sleep", "3000"])
    try:
        wait_until(lambda: saved_step(run) >= 2, watch)
        ask(cluster, "scontrol", "requeue", job)  # what SLURM does to a job that a more important one displaces
        wait_until(lambda: continued(run) == 1, watch)
        ask(cluster, "scancel", "--batch", "--signal=USR1", job)  # what SLURM does 300 s before the end of the time
        wait_until(lambda: not ask(cluster, "squeue", "--noheader"), watch)
    finally:
        watch.kill()
        watch.communicate()
    said = log.read_text() if log.exists() else "the job wrote nothing"
    assert finished(run), said
    assert continued(run) == 2, said
    described = json.loads((run / "environment.json").read_text())
    assert described["device"] == "cpu, 1 threads", "of the machine's, for this SLURM binds tasks to no core"
    assert outcome(run) == outcome(jobs(local)[3])


def test_the_batch_script_hands_its_cores_to_the_ranks(tmp_path):
    """A SLURM of one node that binds no tasks would not tell: what srun is asked for."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    node = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "3", "SLURM_JOB_ID": "1"}
    done = finish(start(["bash", "scripts/train.sbatch", "seed=1"], **node))
    assert (done.status, done.stdout) == (0, "--kill-on-bad-exit=1 --cpus-per-task=3 python train.py seed=1\n")
