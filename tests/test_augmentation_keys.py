"""What the keys of `augmentation` become."""

from typing import Any

import pytest
from test_config import config

from data.mixing import Mixing
from data.policies import ColorJitter, RandAugment, ThreeAugment, TimmRandAugment, TrivialAugment
from involution.engine.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        ([], []),
        (["augmentation.randaugment=9"], [RandAugment]),
        (["augmentation.randaugment=rand-m7-mstd0.5-inc1"], [TimmRandAugment]),
        (["augmentation.trivialaugment=true"], [TrivialAugment]),
        (["augmentation.three_augment=true", "augmentation.color_jitter=0.3"], [ThreeAugment, ColorJitter]),
        (["augmentation.color_jitter=[0.4,0.4,0.4,0.1]"], [ColorJitter]),
        (["recipe=rsb_a2"], [TimmRandAugment]),
    ],
    ids=str,
)
def test_policies(overrides: list[str], kinds: list[Any]) -> None:
    policies = config(*overrides).augmentation.policies([0.5] * 3)
    assert [type(policy) for policy in policies] == kinds


def test_values_arrive_where_they_belong() -> None:
    jitter, randaugment = (
        config(f"augmentation.{value}").augmentation.policies([0.5] * 3)[0]
        for value in ("color_jitter=[0.4,0.3,0.2,0.1]", "randaugment=5")
    )
    assert jitter == ColorJitter(0.4, 0.3, 0.2, 0.1)
    assert randaugment == RandAugment(5)
    assert config().augmentation.mixing(0) is None
    keys = ("mixup=0.8", "cutmix=1", "mix_probability=0.7", "mix_switch=0.3")
    mixing = config(*(f"augmentation.{key}" for key in keys)).augmentation.mixing(5)
    assert mixing == Mixing(5, 0.8, 1, 0.7, 0.3)


def test_one_of_three() -> None:
    chosen = config("augmentation.randaugment=9", "augmentation.trivialaugment=true").augmentation
    with pytest.raises(UserError, match=r"randaugment and augmentation\.trivialaugment exclude each other"):
        chosen.check(32, 2048)
