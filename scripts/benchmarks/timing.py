"""Interleaved timing: neighbours on the machine and its clock disturb all sides of a comparison alike."""

import time
from collections.abc import Callable
from statistics import geometric_mean, median, quantiles
from typing import NamedTuple

import torch

SAMPLE = 0.02  # seconds a sample should last at least: shorter calls are repeated within it
# Or time.process_time, where neighbours take so much of the machine that only this process's own processor time says
# anything; with one thread, because threads that wait for others spin.
clock = time.perf_counter
Samples = dict[str, list[float]]  # case -> seconds a call, one value a round


class Ratio(NamedTuple):
    """Median over the rounds of one case's time over another's, and the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds(call: Callable[[], object], number: int, device: str) -> float:
    synchronize(device)
    begin = clock()
    for _ in range(number):
        call()
    synchronize(device)
    return (clock() - begin) / number


def interleave(cases: dict[str, Callable[[], object]], repeats: int, device: str = "cpu") -> Samples:
    """Time every case once a round, forwards in even rounds and backwards in odd ones, after a warm-up of each."""
    numbers = {}
    for name, call in cases.items():
        _seconds(call, 1, device)
        numbers[name] = max(1, min(1000, round(SAMPLE / _seconds(call, 1, device))))
    samples: Samples = {name: [] for name in cases}
    for i in range(repeats):
        for name in reversed(cases) if i % 2 else cases:
            samples[name].append(_seconds(cases[name], numbers[name], device))
    return samples


def ms(samples: Samples, case: str) -> float:
    return 1e3 * median(samples[case])


def ratio(samples: Samples, slow: str, fast: str) -> Ratio:
    """How many times longer `slow` takes than `fast`."""
    return spread([a / b for a, b in zip(samples[slow], samples[fast])])


def spread(values: list[float]) -> Ratio:
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Ratio(median(values), low, high)


def geometric(ratios: list[Ratio]) -> float:
    return geometric_mean(r.median for r in ratios)
