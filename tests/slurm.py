"""A SLURM of one node on this machine, with its own configuration, ports and state in a temporary folder.

python tests/slurm.py COMMAND... runs a command (a shell, say) while it is up. Needs Debian's slurm-wlm and munge; no
systemd, no cgroups, nothing outside the folder is touched.
"""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a job that was requeued waits until its first start's credentials have expired: 120 s by default
AuthInfo=socket={folder}/munge.socket,cred_expire=5
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
    """Start SLURM, yield the environment that its commands need, and stop it with all its jobs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONFIGURATION.format(host=host, folder=folder, user=getpass.getuser(), ports=_free_ports(2)))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    files = {"key-file": key} | {f"{name}-file": folder / f"munge.{name}" for name in ("log", "pid", "seed")}
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", "--num-threads=1"]
    daemons: list[subprocess.Popen[bytes]] = []
    environment = {"SLURM_CONF": str(conf)}
    try:
        for command in (
            [*munge, *(f"--{name}={path}" for name, path in files.items())],
            ["slurmctld", "-D", "-i"],
            ["slurmd", "-D", "-N", host],
        ):
            with open(folder / f"{command[0]}.out", "wb") as out:
                program = [str(_find(command[0])), *command[1:]]
                env = os.environ | environment
                daemons.append(subprocess.Popen(program, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL))
            if command[0] == "munged":
                _wait_for(lambda: (folder / "munge.socket").exists(), daemons, folder)
        _wait_for(lambda: _ask(["sinfo", "-h", "-o", "%T"], environment) == "idle", daemons, folder)
        yield environment
    finally:
        _ask(["scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}"], environment)
        _ask(["scancel", f"--user={getpass.getuser()}"], environment)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _ask(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True).stdout.strip()


def _wait_for(happened, daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    end = time.monotonic() + 120
    while not happened():
        dead = any(daemon.poll() is not None for daemon in daemons)
        if dead or time.monotonic() > end:
            words = "\n".join(
                f"{path.name}: {path.read_text(errors='replace')[-2000:]}" for path in folder.glob("*.out")
            )
            raise NotStarted(f"SLURM did not start:\n{words}")
        time.sleep(0.1)


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with running() as environment:
        sys.exit(subprocess.run(sys.argv[1:] or ["bash"], env=os.environ | environment).returncode)
