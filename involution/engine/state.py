"""Randomness as state: seeding, and the position of every random stream that the loop could draw from."""

import os
import random
from typing import Any

import numpy as np
import torch

from involution.engine.distributed import World


def use_tf32(wanted: bool) -> None:
    """Whether fp32 products on a GPU may round their factors to TF32: cuDNN's, cuBLAS's and those of our kernels."""
    torch.backends.cudnn.allow_tf32 = wanted
    torch.backends.cuda.matmul.allow_tf32 = wanted


def seed_everything(seed: int, world: World, deterministic: bool, sizes_vary: bool) -> None:
    """Seed Python, NumPy and torch, and in deterministic mode choose repeatable algorithms.

    sizes_vary: pictures of every step have other sizes, for each of which cuDNN would measure all its algorithms anew.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic and not sizes_vary
    if deterministic and world.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def rng_state(world: World) -> dict[str, Any]:
    """Where the random streams of this process stand, in plain types and tensors."""
    _, python, gauss = random.getstate()
    _, numpy, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [torch.tensor(python), gauss],
        "numpy": [torch.from_numpy(np.asarray(numpy).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None,
    }


def set_rng_state(states: list[dict[str, Any]], world: World) -> None:
    """Continue this rank's streams; ranks that were not there when the state was saved keep their fresh seed."""
    if world.rank >= len(states):
        return
    state = states[world.rank]
    python, gauss = state["python"]
    random.setstate((3, tuple(python.tolist()), gauss))
    numpy, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", numpy.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if world.device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], world.device)
