"""Schedules as the paper and the released configuration give them; parameter groups; momentum after a skipped step."""

import math

import pytest
import torch
from torch import nn

from involution import create_model
from involution.engine.optim import build_schedule, exponential_average, parameter_groups, prepare

EPOCHS, STEPS = 130, 626  # ImageNet: ceil(1281167 / 2048) steps an epoch


def test_paper_schedule_is_half_a_cosine_from_0_8_to_0():
    lr = build_schedule(0.8, EPOCHS, STEPS, name="cosine", warmup_epochs=0, warmup_start=0.25)
    total = EPOCHS * STEPS
    assert lr(0) == 0.8
    assert lr(total // 2) == pytest.approx(0.4)
    assert lr(total // 4) == pytest.approx(0.4 * (1 + math.cos(math.pi / 4)))
    assert lr(total) == pytest.approx(0.0, abs=1e-12)


def test_released_schedule_warms_up_from_a_quarter_for_3130_steps():
    lr = build_schedule(0.8, EPOCHS, STEPS, name="cosine", warmup_epochs=5, warmup_start=0.25)
    cosine = build_schedule(0.8, EPOCHS, STEPS, name="cosine", warmup_epochs=0, warmup_start=0.25)
    assert lr(0) == pytest.approx(0.25 * 0.8)
    assert lr(3129) < cosine(3129)
    assert lr(3130) == cosine(3130)
    assert all(lr(step) < lr(step + 1) for step in range(0, 3000, 100))


def test_staircase():
    lr = build_schedule(1.0, 12, 10, name="step", warmup_epochs=0, warmup_start=0.1, milestones=[8, 11], gamma=0.1)
    assert [lr(0), lr(79), lr(80), lr(110)] == pytest.approx([1.0, 1.0, 0.1, 0.01])


def test_unknown_schedule():
    with pytest.raises(ValueError, match="'cosine' or 'step'"):
        build_schedule(0.1, 2, 10, name="cos", warmup_epochs=0, warmup_start=0.25)


def test_norms_and_biases_are_found_by_their_dimensions():
    model = create_model("rednet26", num_classes=10)
    assert len(parameter_groups(model)) == 1
    decayed, spared = parameter_groups(model, "norm_and_bias")
    assert spared["weight_decay"] == 0
    expected = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {id(p) for p in decayed["params"]} == expected
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.AdamW])
def test_a_skipped_first_step_leaves_weights_and_state_alone(build):
    parameter = nn.Parameter(torch.ones(1000))
    options = {"momentum": 0.9} if build is torch.optim.SGD else {}
    optimizer = prepare(build([parameter], lr=0.1, fused=True, **options))
    reference = nn.Parameter(torch.ones(1000))
    plain = build([reference], lr=0.1, **options)
    optimizer.grad_scale = None
    for gradient in (torch.full((1000,), float("nan")), torch.full((1000,), 2.0), torch.full((1000,), -1.0)):
        parameter.grad = gradient.clone()
        optimizer.found_inf = (~torch.isfinite(gradient).all()).float()
        optimizer.step()
        if torch.isfinite(gradient).all():
            reference.grad = gradient.clone()
            plain.step()
    torch.testing.assert_close(parameter, reference)


def test_an_optimizer_that_cannot_skip_on_the_device_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.fused=true"):
        prepare(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


def test_average_follows_weights_and_statistics():
    model = nn.BatchNorm1d(2)
    average = exponential_average(model, 0.9)
    average.update_parameters(model)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.running_mean.fill_(1.0)
    average.update_parameters(model)
    torch.testing.assert_close(average.module.weight, torch.full((2,), 1.1))
    torch.testing.assert_close(average.module.running_mean, torch.full((2,), 0.1))
