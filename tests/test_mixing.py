"""Mixup, CutMix, their losses and random erasing: timm's, as functions of (seed, epoch, position)."""

import random

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy as TimmBinaryCrossEntropy
from timm.loss import SoftTargetCrossEntropy

from data import Batch, Mixing
from data.erasing import Erasing
from data.mixing import Mix, beta
from data.sampling import MicroBatch, batch_uniforms
from involution.engine.tasks.losses import BinaryCrossEntropy, CrossEntropy


def request(position: int, epoch: int = 0) -> MicroBatch:
    return MicroBatch(epoch, np.arange(6), 6, position)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 3.0])
def test_shares_follow_the_beta_distribution(alpha: float):
    shares = [beta(alpha, iter(batch_uniforms(0, 0, i).tolist())) for i in range(2000)]
    theirs = np.random.default_rng(0).beta(alpha, alpha, 4000)  # not the exact law: near 1 both round to it
    assert stats.ks_2samp(shares, theirs).pvalue > 0.01


def test_what_happens_is_timms_and_as_often():
    mixing = Mixing(0, 0.8, 1.0, 0.9, 0.25)
    mixes = [mixing.draw(request(i), 24, 30) for i in range(4000)]
    cut = np.array([mix.box is not None for mix in mixes])
    untouched = np.array([mix == Mix(1.0) for mix in mixes])
    assert abs(untouched.mean() - 0.1) < 0.02
    assert abs(cut.mean() - 0.9 * 0.25) < 0.025
    np.random.seed(0)
    theirs = [cutmix_bbox_and_lam((3, 24, 30), np.random.beta(1.0, 1.0)) for _ in range(cut.sum())]
    for edge in range(4):  # timm's order is top, bottom, left, right
        mine = [mix.box[(0, 2, 1, 3)[edge]] for mix in mixes if mix.box is not None]
        assert stats.ks_2samp(mine, [int(box[edge]) for box, _ in theirs]).pvalue > 0.01
    assert stats.ks_2samp([mix.share for mix in mixes if mix.box], [share for _, share in theirs]).pvalue > 0.01


def test_a_batch_is_a_function_of_seed_epoch_and_position():
    mixing = Mixing(0, 0.8, 1.0)
    assert mixing.draw(request(12), 8, 8) == mixing.draw(request(12), 8, 8)
    others = [
        mixing.draw(request(12, 1), 8, 8),
        mixing.draw(request(18), 8, 8),
        Mixing(1, 0.8, 1.0).draw(request(12), 8, 8),
    ]
    assert all(other != mixing.draw(request(12), 8, 8) for other in others)


@pytest.mark.parametrize(("alphas", "position"), [((0.8, 0), 1), ((0, 1.0), 2)])
def test_pictures_and_losses_are_timms(alphas, position, monkeypatch):
    images = torch.randn(6, 3, 9, 8).to(memory_format=torch.channels_last)
    targets, logits = torch.tensor([0, 1, 2, 3, 4, 4]), torch.randn(6, 5)
    mix = Mixing(3, *alphas).draw(request(position), 9, 8)
    assert 0 < mix.share < 1
    theirs = Mixup(*alphas, num_classes=5)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (mix.share, mix.box is not None))
    if mix.box is not None:
        top, left, bottom, right = mix.box
        box = (top, bottom, left, right)
        monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, **__: (box, mix.share))
    expected, soft = theirs(images.clone(), targets)
    mix.apply(images)
    torch.testing.assert_close(images, expected)
    batch = Batch(images, targets, 6, targets.flip(0), mix.share)
    torch.testing.assert_close(CrossEntropy(0.1)(logits, batch) / 6, SoftTargetCrossEntropy()(logits, soft))
    for threshold in (None, 0.2):
        criterion = TimmBinaryCrossEntropy(target_threshold=threshold)
        torch.testing.assert_close(BinaryCrossEntropy(0.1, threshold)(logits, batch) / 6, criterion(logits, soft))


def test_losses_of_plain_batches():
    targets, logits = torch.tensor([0, 4, 1]), torch.randn(3, 5)
    batch = Batch(torch.zeros(3, 3, 1, 1), targets, 2)
    expected = SoftTargetCrossEntropy()(logits[:2], mixup_target(targets[:2], 5, smoothing=0.1))
    torch.testing.assert_close(CrossEntropy(0.1)(logits[:2], batch) / 2, expected)
    expected = TimmBinaryCrossEntropy(0.1)(logits[:2], targets[:2])
    torch.testing.assert_close(BinaryCrossEntropy(0.1)(logits[:2], batch) / 2, expected)


def test_erased_boxes_are_timms():
    """As many, as large, as far from the border; filled with normal noise; each a function of (seed, epoch, sample)."""
    erasing, theirs = Erasing(0, 0.5), RandomErasing(0.5, mode="pixel", device="cpu")
    many = MicroBatch(0, np.arange(3000), 3000)
    boxes = [erasing.box(draw, 20, 24) for draw in many.erasing(0, 42).tolist()]
    found = np.array([box for box in boxes if box is not None])
    assert abs(len(found) / len(boxes) - 0.5) < 0.03
    expected = []
    random.seed(0)
    for _ in range(1000):
        image = torch.zeros(1, 20, 24)
        theirs(image)
        rows, columns = image[0].any(1).nonzero(), image[0].any(0).nonzero()
        if len(rows):
            expected.append((len(rows), len(columns)))
    for side in range(2):
        assert stats.ks_2samp(found[:, 2 + side], np.array(expected)[:, side]).pvalue > 0.01
    assert found[:, 0].min() == found[:, 1].min() == 0
    assert (found[:, 0] + found[:, 2]).max() == 20
    request = MicroBatch(1, np.array([5, 9, 5, 5]), 4, copies=np.array([0, 0, 0, 1]))
    images = torch.full((4, 3, 40, 40), 9.0)
    Erasing(0, 1.0).apply(images, request)
    noise = images[images != 9]
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[3])
