"""Where the ranks meet, whoever started them: torchrun, srun or submitit."""

import datetime
import os
import re
import socket
from contextlib import suppress

import torch.distributed as dist

from involution.engine.errors import UserError

SIOCGIFADDR = 0x8915  # linux/sockios.h: the address of an interface


def started_again() -> bool:
    """Whether SLURM or torchrun has started this very command before: then it is to continue, whatever it says."""
    return any(int(os.environ.get(name) or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def adopt() -> None:
    """Derive what torchrun would have set in the environment, under submitit's local executor and under srun."""
    _adopt_submitit()
    _adopt_slurm()


def _port(job: str) -> str:
    """Where the ranks of a job meet: jobs that share a machine have numbers of their own.

    Below 32768, where Linux takes the ports of outgoing connections from.
    """
    return str(20000 + int(job) % 12000)


def _adopt_submitit() -> None:
    """Under submitit's local executor, derive from its variables what torchrun would have set."""
    env = os.environ
    if "RANK" in env or env.get("SUBMITIT_EXECUTOR") != "local":
        return
    env["RANK"], env["WORLD_SIZE"] = env["SUBMITIT_LOCAL_GLOBALID"], env["SUBMITIT_LOCAL_NTASKS"]
    env["LOCAL_RANK"] = env["SUBMITIT_LOCAL_LOCALID"]
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    env.setdefault("MASTER_PORT", _port(env["SUBMITIT_LOCAL_JOB_ID"]))


def _adopt_slurm() -> None:
    """Under srun, derive from SLURM's variables what torchrun would have set."""
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env or int(env.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_host(env["SLURM_STEP_NODELIST"])
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env.setdefault("MASTER_PORT", _port(env["SLURM_JOB_ID"]))


def _first_host(nodes: str) -> str:
    """The first host of a list of SLURM's: gpu[003-007,012],other. (Containers have no scontrol to ask.)"""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[]*)(?:,|$)", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes}: set MASTER_ADDR to the first of these hosts")
    return found[1] + (found[2] or "") + found[3]


def choose_interface() -> None:
    """Let gloo listen where other nodes reach this one.

    It takes the address of the host's name, and the loopback's where that has none, as on many images. Then it is the
    interface that a packet to rank 0, or on its own node to anywhere, would leave by.
    """
    env = os.environ
    here = env.get("LOCAL_WORLD_SIZE")  # of torchrun; SLURM's variables may be those of a step around it
    one_node = env.get("SLURM_STEP_NUM_NODES") == "1" if here is None else here == env["WORLD_SIZE"]
    if one_node or "GLOO_SOCKET_IFNAME" in env or env.get("MASTER_ADDR") in (None, "localhost", "127.0.0.1"):
        return
    try:
        master = socket.gethostbyname(env["MASTER_ADDR"])
    except OSError:
        return  # the rendezvous says more
    with suppress(OSError), socket.socket() as probe:
        named = socket.gethostbyname(socket.gethostname())
        probe.bind((named, 0))  # not an address of another machine
        if not named.startswith("127."):
            return
    for target in (master, "192.0.2.1"):  # the second is nobody's (RFC 5737), and connecting UDP sends nothing
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            own = probe.getsockname()[0]
            if not own.startswith("127.") and (name := _interface(own)):
                env["GLOO_SOCKET_IFNAME"] = name
                return


def _interface(address: str) -> str | None:
    """The name of the network interface with an IPv4 address (Linux)."""
    import fcntl  # not on every system

    for _, name in socket.if_nameindex():
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, name.encode()[:15].ljust(40, b"\0"))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def store_of_this_attempt(timeout: datetime.timedelta) -> dist.Store:
    """The rendezvous' store, with keys of this attempt only.

    torchrun (2.15) keeps one store for all attempts: ranks it has started again would wait for each other forever at
    the addresses of their predecessors.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
