"""train.batchnorm_size: one large micro-batch takes the step of several small ones."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from data import Batch
from involution import Involution2d, create_model
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.ghost import use_ghost_batches
from involution.engine.learner import Learner
from involution.engine.options import TrainOptions
from involution.engine.tasks.classification import Classification
from involution.ops import norm

IMAGES, SIZE = 8, 2


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), Involution2d(16, 3), nn.BatchNorm2d(16)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).double()


def after_a_step(model: nn.Module, images: Tensor, targets: Tensor, batch_size: int) -> dict[str, Tensor]:
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    options = TrainOptions(
        precision="fp32", compile=False, cuda_graphs=False, clip_grad_norm=None, ema_decay=None, max_bad_steps=2
    )  # fmt: skip
    world = World(0, 1, torch.device("cpu"))
    learner = Learner(model, Classification(), optimizer, lambda step: 1.0, options, world)
    parts = zip(images.split(batch_size), targets.split(batch_size))
    batches = [Batch(part, target, len(part)) for part, target in parts]
    learner.step(0, batches, len(batches), IMAGES)
    return model.state_dict()


def test_a_large_batch_in_parts_takes_the_step_of_small_ones() -> None:
    images, targets = torch.randn(IMAGES, 3, 9, 9, dtype=torch.float64), torch.randint(5, (IMAGES,))
    model = network()
    expected = after_a_step(model, images, targets, SIZE)
    whole = after_a_step(model, images, targets, IMAGES)
    use_ghost_batches(model, SIZE)
    found = after_a_step(model, images, targets, IMAGES)
    assert found.keys() == expected.keys()
    assert max((found[k] - v).abs().max() for k, v in expected.items()) < 1e-6  # the loss is taken in float32
    assert max((whole[k] - v).abs().max() for k, v in expected.items()) > 1e-2
    assert found["1.num_batches_tracked"] == IMAGES // SIZE
    assert torch.equal(model.eval()(images), network().eval()(images))


@pytest.mark.parametrize("name", ["rednet26", "resnet26"])
def test_layers_run_together_in_parts_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With BatchNorm and ReLU as one operator and an involution layer as another, as the modules one by one."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=3).to(memory_format=torch.channels_last).train()
    use_ghost_batches(model, SIZE)
    modules, images = copy.deepcopy(model), torch.randn(6, 3, 64, 64).to(memory_format=torch.channels_last)
    parts, describe = [], norm.describe

    def noted(*arguments: Any) -> norm.Norm:
        problem = describe(*arguments)
        parts.append(problem.parts)
        return problem

    monkeypatch.setattr(norm, "describe", noted)
    found = []
    for one in (model, modules):
        with contextlib.ExitStack() as stack:
            if one is modules:  # somebody watches
                stack.callback(register_module_forward_hook(lambda *_: None).remove)
            logits = one(images)
            logits.square().mean().backward()
        found.append([logits, *(p.grad for p in one.parameters()), *one.buffers()])
    assert set(parts) == {3}
    assert len(parts) > 20
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


def test_other_kinds_of_batchnorm_are_refused() -> None:
    with pytest.raises(UserError, match="0 is a BatchNorm1d"):
        use_ghost_batches(nn.Sequential(nn.BatchNorm1d(3)), 2)
