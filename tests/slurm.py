"""A SLURM of one node on this machine, with its own configuration, ports and state in a temporary folder.

python tests/slurm.py COMMAND... runs a command (a shell, say) while it is up. Needs Debian's slurm-wlm and munge; no
systemd, no cgroups, nothing outside the folder is touched.
"""

import os
import pwd
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel", "setpriv")
CONFIGURATION = """
ClusterName=test
# ranks meet at a port that follows from the job's number: another such SLURM on this machine gets others
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a job that was requeued waits until its first start's credentials have expired: 120 s by default
AuthInfo=socket={folder}/munge.socket,cred_expire=10
# patience for machines that are busy with other tests: 10, 2 and 10 s by default
MessageTimeout=60
TCPTimeout=30
BatchStartTimeout=300
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE
"""


class NotStarted(RuntimeError):
    """This machine does not let SLURM run."""


def missing() -> str | None:
    """Why SLURM cannot be started here, or None."""
    absent = [name for name in PROGRAMS if _find(name) is None]
    return f"no {', '.join(absent)} here (apt-get install slurm-wlm munge)" if absent else None


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def running() -> Iterator[dict[str, str]]:
    """Start SLURM, yield the environment that its commands need, and stop it with all its jobs.

    Raises:
        NotStarted: with what the daemons said.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _start(folder, daemons, environment)
        yield environment
    finally:
        if daemons:
            cancel_all(environment, "--signal=KILL", "--full")
            cancel_all(environment)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, daemons: list[subprocess.Popen[bytes]], environment: dict[str, str]) -> None:
    """Start the daemons, appending to `daemons`, and see that a job runs."""
    host = socket.gethostname().partition(".")[0]
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
        socket.gethostbyname(host)
    except (KeyError, OSError) as error:
        raise NotStarted(f"SLURM needs names for this user and this host ({host}): {error}") from error
    values = {"host": host, "folder": folder, "user": user, "ports": _free_ports(2)}
    conf = CONFIGURATION.format(**values, first_job=random.SystemRandom().randint(1, 11000))
    Path(environment["SLURM_CONF"]).write_text(conf)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    files = {"key-file": key} | {f"{name}-file": folder / f"munge.{name}" for name in ("log", "pid", "seed")}
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", "--num-threads=1"]
    for command in (
        [*munge, *(f"--{name}={path}" for name, path in files.items())],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", host],
    ):
        # tests that are killed leave no daemons behind
        program = ["setpriv", "--pdeathsig=TERM", str(_find(command[0])), *command[1:]]
        with open(folder / f"{command[0]}.out", "wb") as out:
            env = os.environ | environment
            daemons.append(subprocess.Popen(program, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL))
        if command[0] == "munged":
            _wait_for(lambda: (folder / "munge.socket").exists(), daemons, environment)
    _wait_for(lambda: _ask(["sinfo", "-h", "-o", "%T"], environment) == "idle", daemons, environment)
    ran = folder / "trial.out"
    _ask(["sbatch", "--ntasks=2", f"--output={ran}", "--wrap=srun echo rank"], environment)
    _wait_for(lambda: ran.exists() and ran.read_text().split() == ["rank", "rank"], daemons, environment)


def logs(environment: dict[str, str]) -> str:
    """The queue, and the end of what each daemon has written."""
    files = sorted(Path(environment["SLURM_CONF"]).parent.glob("*.[lo][ou][gt]"))
    ends = [f"{path.name}:\n{path.read_text(errors='replace')[-3000:]}" for path in files]
    return "\n".join([_ask(["squeue"], environment), *ends])


def cancel_all(environment: dict[str, str], *options: str) -> None:
    """Empty the queue."""
    _ask(["scancel", *options, f"--user={os.getuid()}"], environment)


def _ask(command: list[str], environment: dict[str, str]) -> str:
    """What a command of SLURM's prints; nothing where it fails or hangs."""
    try:
        asked = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip()


def _wait_for(happened: Callable[[], bool], daemons: list[subprocess.Popen[bytes]], env: dict[str, str]) -> None:
    end = time.monotonic() + 120
    while not happened():
        if any(daemon.poll() is not None for daemon in daemons) or time.monotonic() > end:
            raise NotStarted(f"SLURM did not start:\n{logs(env)}")
        time.sleep(0.1)


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with running() as environment:
        sys.exit(subprocess.run(sys.argv[1:] or ["bash"], env=os.environ | environment).returncode)
