"""Activations that are remade in the backward: the same bits, less memory, and out of others' way."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from involution import create_model
from involution.models.rednet import InvolutionBottleneck
from involution.remake import norm_act, norm_relu


def plainly(x: Tensor, norm: nn.Module, act: nn.Module, layer: nn.Module) -> Tensor:
    return layer(norm_relu(x, norm, act))


def step(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    loss = model(images).square().mean()
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters()}, model.state_dict()


@pytest.mark.parametrize("setting", ["fp32", "channels_last", "bf16", "frozen"])
def test_a_training_step_is_the_same_to_the_bit(setting, monkeypatch):
    torch.manual_seed(0)
    model = create_model("rednet26", num_classes=4, zero_init_residual=False)
    if setting == "frozen":
        model.freeze(["layer1"])
        model.layer2.eval()
    images = torch.randn(2, 3, 64, 64)
    if setting == "channels_last":  # BatchNorm and ReLU are one operator then
        model, images = (t.to(memory_format=torch.channels_last) for t in (model, images))
    results = []
    for function in (norm_act, plainly):
        monkeypatch.setattr("involution.models.rednet.norm_act", function)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "bf16"):
            results.append(step(copy.deepcopy(model), images))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def layers() -> tuple[Tensor, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]:
    torch.manual_seed(0)
    return torch.randn(2, 8, 5, 5, requires_grad=True), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1)


def test_the_activation_is_not_kept_but_remade():
    x, norm, act, conv = layers()
    node = norm_act(x, norm, act, conv).grad_fn
    assert not isinstance(node._raw_saved_input.data, Tensor)
    assert torch.equal(node._saved_input, act(norm(x)))
    assert node._saved_input is not None  # asked for twice, as by retain_graph


@pytest.mark.parametrize("other", ["another normalisation", "another activation", "hooks", "no gradients"])
def test_it_leaves_the_choice_to_others(other):
    x, norm, act, conv = layers()
    norm = nn.GroupNorm(2, 8) if other == "another normalisation" else norm
    act = nn.GELU() if other == "another activation" else act
    expected = conv(act(norm(x)))
    if other == "no gradients":
        with torch.no_grad():
            output = norm_act(x, norm, act, conv)
        assert not output.requires_grad
    elif other == "hooks":
        asked = []
        with saved_tensors_hooks(lambda t: asked.append(t) or t, lambda t: t):
            output = norm_act(x, norm, act, conv)
        assert any(torch.equal(t, act(norm(x))) for t in asked)
    else:
        output = norm_act(x, norm, act, conv)
        assert isinstance(output.grad_fn._raw_saved_input.data, Tensor)
    assert torch.equal(output, expected)


def test_activation_checkpointing_of_a_block():
    torch.manual_seed(0)
    block = create_model("rednet26").layer2[1]
    assert isinstance(block, InvolutionBottleneck)
    x = torch.randn(2, 512, 6, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    (result,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(result, expected)
