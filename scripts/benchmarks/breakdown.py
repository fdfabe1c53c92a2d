"""Which kind of operator takes the time, by torch.profiler."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks.report import Row

# the first kind with a fragment in the operator's name takes it
KINDS = {
    "involution": ("involution", "_kernel_"),
    "convolution": ("conv", "mkldnn", "gemm", "addmm", "linear", "matmul", "aten::mm"),
    "BatchNorm": ("batch_norm",),
    "ReLU": ("relu", "clamp_min"),
    "add": ("aten::add",),
    "pooling": ("pool", "aten::mean"),
}
WARM_UP, TURNS = 4, 10  # the first calls also pay for memory that the system gives for the first time


def breakdown(calls: Mapping[str, Callable[[], Any]], device: str) -> list[Row]:
    """Milliseconds an inference by kind of operator, a row a case."""
    rows = []
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    for name, call in calls.items():
        turns = schedule(wait=0, warmup=WARM_UP, active=TURNS, repeat=1)
        with torch.no_grad(), profile(activities=activities, schedule=turns) as profiler:
            for _ in range(WARM_UP + TURNS):
                call()
                profiler.step()
        spent = dict.fromkeys([*KINDS, "other"], 0.0)
        for event in profiler.key_averages():
            if event.key.startswith("ProfilerStep"):
                continue
            time = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            spent[_kind(event.key)] += time / 1e3 / TURNS
        rows.append({"model": name, **spent, "total": sum(spent.values())})
    return rows


def _kind(operator: str) -> str:
    name = operator.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
