"""An epoch's order rearranged, so that global steps hold the same on any number of ranks."""

import math

import numpy as np


def repeat(order: np.ndarray, repeats: int, global_batch_size: int) -> np.ndarray:
    """Repeated augmentation (Hoffer et al., 2020; Berman et al., 2019), as timm's RepeatAugSampler.

    An epoch stays as long: n places for the first n / repeats samples of the order (n,), each that often. Copies of a
    sample are neighbours in it, and within a global step the first copies come before the second ones, so that
    micro-batches of several GPUs share a sample rather than one of them having it twice.

    Returns:
        (n,) sample + n x number of the copy.
    """
    n = len(order)
    copy = np.arange(n) % repeats
    chosen = order[np.arange(n) // repeats].astype(np.int64) + n * copy
    return chosen[np.lexsort((copy, np.arange(n) // global_batch_size))]


UNIT = 4  # images of one orientation that stay together: micro-batches of 1, 2 or 4 need no padding to squares


def by_orientation(order: np.ndarray, tall: np.ndarray, global_batch_size: int) -> np.ndarray:
    """An epoch's order (n,) rearranged so that neighbours have the same orientation, as a batch padded to its largest
    height and width wants it.

    Global steps keep what they hold on any number of ranks and with any batch size: the rearrangement looks at
    neither. Four images at a time are taken in the order in which each orientation's next four are complete, and within
    a step those of its first image's orientation come first (not always the wide ones: rank 0, whose BatchNorm
    statistics count, would rarely see a tall one). What fills no unit comes last.

    Args:
        order: sample indices.
        tall: (n,) bool, whether a sample is higher than wide.
    """
    unit = math.gcd(global_batch_size, UNIT)
    flags = tall[order]
    units, rest = [], []
    for flag in (False, True):
        positions = np.flatnonzero(flags == flag)
        whole = len(positions) // unit * unit
        units.append(positions[:whole].reshape(-1, unit))
        rest.append(positions[whole:])
    complete = np.concatenate(units)
    places = np.concatenate([complete[np.argsort(complete[:, -1])].ravel(), *rest])
    step = np.arange(len(order)) // global_batch_size
    other = flags[places] != flags[places][step * global_batch_size]
    return order[places[np.lexsort((other, step))]]
