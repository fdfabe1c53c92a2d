"""The device of a rank, and why it is not the GPU that the machine has."""

import ctypes
import logging
import os
import warnings
from pathlib import Path

import torch

from involution.checks import first_line
from involution.engine.errors import UserError

log = logging.getLogger("involution")
MALLOC = {-1: -1, -2: 1 << 26, -4: 0}  # glibc's malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl")  # where NVIDIA's driver shows


def choose_device(device: str, local_rank: int, ranks: int) -> torch.device:
    """This rank's device, for auto | cpu | cuda.

    Raises:
        UserError: there is no GPU for it, or several ranks would work on the CPU because of a driver.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu":
        return torch.device("cpu")
    if not available:
        problem = _unusable_gpu()
        if device == "cuda":
            raise UserError(problem or "device=cuda asks for a GPU, but torch sees none here; use device=cpu")
        if problem and ranks > 1:
            raise UserError(f"{problem}. If {ranks} ranks on the CPU are what you want, say so with device=cpu")
        if problem:
            log.warning("%s: training on the CPU", problem)
        return torch.device("cpu")
    if available == 1 and "SLURM_PROCID" in os.environ:  # a site that shows each task its own GPU alone
        return torch.device("cuda", 0)
    if local_rank >= available:
        flag = "--ntasks-per-node" if "SLURM_PROCID" in os.environ else "--nproc-per-node"
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: this machine has {available}. "
            f"Start at most {available} processes here ({flag}={available})"
        )
    return torch.device("cuda", local_rank)


def _unusable_gpu() -> str:
    """Why torch cannot use the NVIDIA GPU that this machine has; empty where there is none."""
    if not any(Path(place).exists() for place in DRIVER):
        if any(os.environ.get(f"SLURM_{scope}_GPUS") for scope in ("JOB", "STEP")):
            return "SLURM has given this job GPUs, but there is no NVIDIA driver (a container without --nv?)"
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # a driver too old for these wheels, or a torch without CUDA
        return f"there is an NVIDIA GPU here, but torch cannot use it: {first_line(error)}"
    return "there is an NVIDIA driver here, but no GPU that torch may use (CUDA_VISIBLE_DEVICES?)"


def keep_freed_memory() -> bool:
    """Whether glibc's malloc now keeps what this process frees, instead of returning it to the kernel.

    A training step on a CPU frees all its large tensors, and without this each comes back as zeroed pages, one fault
    for 4 KiB: 5 to 17 % of RedNet-26's time (96 pixels, 32 images, one thread; seven pairs of runs). The heap has gaps
    then: RedNet-50's peak is 17 % higher, ResNet-50's 27 % (docs/benchmarks/model-memory.md; default allocator:
    d56ef6a). Variables MALLOC_* or GLIBC_TUNABLES, where set, have the last word.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none, or one that does nothing
    return mallopt is not None and all(mallopt(option, value) for option, value in MALLOC.items())
