"""One process or many: the same few functions, started by python, torchrun, srun or submitit."""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from involution.cores import cores
from involution.engine import rendezvous
from involution.engine.device import choose_device, keep_freed_memory
from involution.engine.errors import UserError
from involution.engine.peers import Peers

SYNCHRONISED = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "BatchNormAct2d"]
_peers: Peers | None = None  # there is one process group in a process, and one watch over it


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    timeout: datetime.timedelta = datetime.timedelta(minutes=10)  # of a collective

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_world(device: str = "auto", timeout_minutes: float = 10) -> World:
    """Join the other ranks, if there are any, and choose this one's device; torch's threads are no more than its cores.

    Args:
        device: auto (a GPU where there is one) | cpu | cuda.
        timeout_minutes: after which the ranks that keep the others waiting are named, and all leave.

    Raises:
        UserError: for a GPU that is not there.
    """
    rendezvous.adopt()
    if "OMP_NUM_THREADS" not in os.environ and cores() < torch.get_num_threads():
        torch.set_num_threads(cores())
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    chosen = choose_device(device, local_rank, size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    # the watch over the ranks comes first and names who is missing; the collectives' own time-outs are its safety net
    timeout = datetime.timedelta(minutes=timeout_minutes, seconds=30)
    if size > 1:
        # gloo beside NCCL: flags and objects travel between CPUs and never wait for the GPU
        rendezvous.choose_interface()
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        store = rendezvous.store_of_this_attempt(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        _watch(rank, size, 60 * timeout_minutes)
    return World(rank, size, chosen, timeout)


def _watch(rank: int, size: int, timeout: float) -> None:
    global _peers
    store = dist.distributed_c10d._get_default_store().clone()
    _peers = Peers(rank, size, dist.PrefixStore("involution", store), timeout)


def progress() -> None:
    """Note for the other ranks that this one is getting on."""
    if _peers is not None:
        _peers.progress += 1


def announce(status: int, message: str) -> tuple[int, int, str]:
    """Tell the other ranks that this one fails; returns the rank, status and message of the first that did."""
    rank = int(os.environ.get("RANK", 0))
    return (rank, status, message) if _peers is None else _peers.announce(status, message)


def part() -> None:
    """Meet the other ranks for the last time: whoever leaves from here on leaves nobody waiting."""
    gather_objects(None)
    if _peers is not None:
        _peers.stop()


def synchronised(wanted: Any, world: World) -> bool:
    """What `train.sync_batchnorm` means: "auto" is on where there are several GPUs."""
    return world.size > 1 and world.device.type == "cuda" if wanted == "auto" else bool(wanted)


def synchronise(model: torch.nn.Module) -> torch.nn.Module:
    """The model with SyncBatchNorm in place of BatchNorm, activations that timm's BatchNorm holds included.

    Raises:
        UserError: it has a kind of BatchNorm whose own work would be lost.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and type(module).__name__ not in SYNCHRONISED:
            raise UserError(
                f"train.sync_batchnorm knows torch's and timm's BatchNorm; {name} is a {type(module).__name__}"
            )
    try:
        from timm.layers import convert_sync_batchnorm
    except ImportError:  # then nothing of timm's is in the model
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return convert_sync_batchnorm(model)


def leave_world() -> None:
    """Take leave of the other ranks."""
    if _peers is not None:
        _peers.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's tensor, on all of them."""
    progress()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on all of them."""
    progress()
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Give every rank rank 0's buffers (BatchNorm statistics): what DDP would do, only when somebody reads them.

    Rank 0 never changes, so an evaluation or an extra checkpoint leaves its course untouched to the last bit.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


class Agreement:
    """A small number that all ranks agree on: the largest that any of them asked for at the last poll.

    With several ranks the exchange runs beside the step, between CPUs, so polling costs no waiting and no GPU
    synchronisation; the answer comes one poll late, at the same step on every rank.
    """

    def __init__(self, world: World) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=world.timeout) if world.size > 1 else None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def poll(self, request: int) -> int:
        """Ask for `request` (0: nothing) and return what was agreed on."""
        progress()
        if self._group is None:
            return request
        agreed = self.finish()
        flag = torch.tensor(request, dtype=torch.int32)
        self._pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag)
        return agreed

    def finish(self) -> int:
        """Wait for the exchange under way, and return what it agreed on."""
        if self._pending is None:
            return 0
        work, flag = self._pending
        self._pending = None
        work.wait()
        return int(flag)
