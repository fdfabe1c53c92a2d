"""Order and augmentation are pure functions: known answers, exactly-once, and torchvision's distribution."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from data import orders, sampling
from data.sampling import MicroBatch, Plan, eval_batches

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def test_philox_known_answers():
    """Test vectors of the Random123 distribution (kat_vectors, philox4x32 10)."""
    full = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 4, (full,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, expected in cases:
        assert sampling.philox(np.array([counter], np.uint64), key)[0].tolist() == list(expected)


def test_permutation_is_a_shuffle_of_seed_and_epoch():
    order = sampling.permutation(3, 5, 1000)
    assert sorted(order) == list(range(1000))
    assert np.array_equal(order, sampling.permutation(3, 5, 1000))
    others = [sampling.permutation(3, 6, 1000), sampling.permutation(4, 5, 1000), np.arange(1000)]
    assert all((order == other).mean() < 0.02 for other in others)
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


def test_copies_of_a_sample_share_a_step_and_not_a_micro_batch():
    order = sampling.permutation(0, 0, 50)
    plans = [Plan(50, 4, 24, rank, 2, repeats=3) for rank in range(2)]
    repeated = orders.repeat(order, 3, 24)
    micro_batches = [plan.micro_batch(repeated, 0, number) for number in range(3) for plan in plans]  # the first step's
    found = [(int(i), int(copy)) for batch in micro_batches for i, copy in zip(batch.indices, batch.copies)]
    assert sorted(found) == sorted((int(i), copy) for i in order[:8] for copy in range(3))
    assert all(len(set(batch.indices.tolist())) == 4 for batch in micro_batches)
    assert len(set(repeated.tolist())) == 50
    rows = micro_batches[0].take(np.array([0, 0]), 2)
    rows.copies[1] = 1
    assert not np.array_equal(*rows.draws(0, 4))
    first = MicroBatch(0, rows.indices, 2)  # a first copy's crop is that of a sample without repetition
    assert np.array_equal(first.draws(0)[0], sampling.draws(0, 0, rows.indices)[0])
    assert np.array_equal(first.draws(0)[0], rows.draws(0)[0])
    with pytest.raises(ValueError, match="repeats is 25"):
        Plan(50, 4, 24, repeats=25)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 11, 24, 25, 97])
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 1), (3, 1), (2, 4), (40, 2)])
def test_every_image_once_an_epoch_in_the_same_steps(world: int, n: int, batch: int, accumulation: int):
    size = batch * accumulation * world
    plans = [Plan(n, batch, size, rank, world) for rank in range(world)]
    order = sampling.permutation(0, 0, n)
    assert len({plan.batches_per_epoch for plan in plans}) == 1
    seen: list[int] = []
    for step in range(plans[0].steps_per_epoch):
        of_step: list[int] = []
        for plan in plans:
            epoch, first = plan.position(step)
            assert epoch == 0
            for number in range(first, first + plan.micro_batches(step)):
                part = plan.micro_batch(order, 0, number)
                assert len(part.indices) == batch
                of_step += part.indices[: part.valid].tolist()
        assert sorted(of_step) == sorted(order[step * size : (step + 1) * size])  # whatever the number of ranks
        assert {plan.samples(step) for plan in plans} == {len(of_step)}
        seen += of_step
    assert sorted(seen) == list(range(n))
    assert plans[0].position(plans[0].steps_per_epoch) == (1, 0)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 33])
def test_evaluation_counts_every_image_once(world: int, n: int):
    ranks = [eval_batches(n, 4, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(part.indices) == 4 for batches in ranks for part in batches)
    counted = [int(i) for batches in ranks for part in batches for i in part.indices[: part.valid]]
    assert sorted(counted) == list(range(n))


def test_impossible_plans_say_what_to_change():
    with pytest.raises(ValueError, match="global_batch_size 10 is not a multiple of batch_size 4 x 2 ranks"):
        Plan(100, 4, 10, 0, 2)
    with pytest.raises(ValueError, match="not possible"):
        Plan(0, 4, 8)


def test_augmentation_does_not_depend_on_the_batch_a_sample_is_in():
    whole = sampling.draws(1, 2, np.arange(50))
    assert whole.shape == (50, sampling.DRAWS)
    assert np.array_equal(whole[[7, 30]], sampling.draws(1, 2, np.array([7, 30])))
    assert not np.array_equal(whole, sampling.draws(1, 3, np.arange(50)))
    assert not np.array_equal(whole, sampling.draws(2, 2, np.arange(50)))
    flat = sampling.draws(1, 2, np.arange(4000)).ravel()
    assert flat.min() >= 0
    assert flat.max() < 1
    assert np.allclose(np.histogram(flat, 16, (0, 1))[0] / len(flat), 1 / 16, atol=0.002)


def _features(windows: list[tuple[int, int, int, int]], height: int, width: int) -> np.ndarray:
    """(4, n): area share, log ratio, relative place of the window's top and left in the room it has."""
    top, left, h, w = np.array(windows, float).T
    return np.stack([h * w / (height * width), np.log(w / h), top / (height - h + 1), left / (width - w + 1)])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (90, 400)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int):
    n = 4000
    ours = [
        sampling.crop_window(draw, height, width, SCALE, RATIO) for draw in sampling.draws(0, 0, np.arange(n)).tolist()
    ]
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(n)]
    a, b = _features(ours, height, width), _features(theirs, height, width)
    for x, y in zip(np.sort(a), np.sort(b)):  # two-sample Kolmogorov-Smirnov statistic
        grid = np.concatenate([x, y])
        gap = np.abs(np.searchsorted(x, grid, "right") - np.searchsorted(y, grid, "right")).max() / n
        assert gap < 1.95 * math.sqrt(2 / n)  # p = 0.001


def test_crop_windows_lie_inside_and_fall_back_to_the_centre():
    rng = np.random.default_rng(0)
    for draw in sampling.draws(0, 0, np.arange(500)).tolist():
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        top, left, h, w = sampling.crop_window(draw, height, width, SCALE, RATIO)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert h > 0
        assert w > 0
    middle = [0.5] * sampling.DRAWS
    assert sampling.crop_window(middle, 1, 20000, (0.5, 1.0), RATIO) == (0, 9999, 1, 1)
    assert sampling.crop_window(middle, 900, 90, (0.9, 1.0), RATIO) == (390, 0, 120, 90)


def test_flips_are_even():
    assert abs((sampling.draws(0, 0, np.arange(10000))[:, -1] < 0.5).mean() - 0.5) < 0.02
