"""Which kind of operator takes the time, by torch.profiler."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import Row

# the first kind with a fragment in the operator's name takes it
KINDS = {
    "involution": ("involution", "_kernel_"),
    "convolution": ("conv", "mkldnn", "gemm", "addmm", "linear", "matmul", "aten::mm"),
    "BatchNorm": ("batch_norm",),
    "ReLU": ("relu", "clamp_min", "threshold"),
    "add": ("aten::add",),
    "pooling": ("pool", "aten::mean"),
    "optimizer": ("sgd",),
}
TURNS = 10


def breakdown(calls: Mapping[str, Callable[[], Any]], device: str, inference: bool = False) -> list[Row]:
    """Milliseconds a call by kind of operator, a row a case."""
    rows = []
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    for name, call in calls.items():
        with torch.no_grad() if inference else torch.enable_grad():
            call()
            with profile(activities=activities) as profiler:
                for _ in range(TURNS):
                    call()
        spent = dict.fromkeys([*KINDS, "other"], 0.0)
        for event in profiler.key_averages():
            time = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            spent[_kind(event.key)] += time / 1e3 / TURNS
        rows.append({"model": name, **spent, "total": sum(spent.values())})
    return rows


def _kind(operator: str) -> str:
    name = operator.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
