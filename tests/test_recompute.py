"""What is made again in the backward: the same bits, not kept, of the forward that was run whatever happened since."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from involution import Involution2d, create_model
from involution.models import RedNet, ResNet
from involution.sequence import sequence

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def layers() -> tuple[Tensor, list[nn.Module]]:
    torch.manual_seed(0)
    modules = [nn.BatchNorm2d(16), nn.ReLU(inplace=True), Involution2d(16, 3, 2), nn.BatchNorm2d(16), nn.ReLU()]
    x = torch.randn(2, 16, 7, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    return x, [*modules, nn.Conv2d(16, 4, 3)]


def test_the_same_to_the_bit():
    x, modules = layers()
    results = []
    for steps in ([slice(0, 6)], [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)]):
        network = nn.Sequential(*copy.deepcopy(modules))
        y = x
        for step in steps:
            y = sequence(y, *network[step])
        gradients = torch.autograd.grad(y.square().sum(), [x, *network.parameters()])
        results.append([y, *gradients, *network.buffers()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_activations_around_an_involution_are_not_kept():
    x, modules = layers()
    behind = sequence(x, *modules).grad_fn  # BatchNorm, ReLU, convolution
    in_front = behind.next_functions[0][0]  # BatchNorm, ReLU, involution
    for node, inputs in ((behind, [(2, 16, 4, 3)]), (in_front, [(2, 16, 7, 6), (2, 4, 4, 3)])):
        images = [t.shape for t in node.saved_tensors if t is not None and t.dim() == 4 and len(t) == 2]
        assert [tuple(shape) for shape in images] == inputs


def networks() -> list[Callable[[], nn.Module]]:
    options = {"num_classes": 3, "zero_init_residual": False}
    return [lambda: RedNet((1, 1, 1, 1), kernel_size=3, **options), lambda: ResNet((1, 1, 1, 1), **options)]


def evaluated(model: nn.Module) -> None:
    model.eval()


def trained_and_run_again(model: nn.Module) -> None:
    model.train()
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32, dtype=torch.float64))


def replaced(model: nn.Module) -> None:
    for module in model.modules():
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                setattr(module, name, nn.Parameter(torch.randn_like(module._parameters[name])))


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", networks(), ids=["rednet", "resnet"])
def test_gradients_are_those_of_the_forward_that_was_run(network, layout, mode):
    torch.manual_seed(0)
    model = network().double().to(memory_format=LAYOUTS[layout]).train(mode == "training")
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_var.uniform_(1, 3)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout])

    def gradients(before_the_backward: Callable[[nn.Module], None]) -> list[Tensor]:
        m = copy.deepcopy(model)
        parameters = list(m.parameters())
        loss = m(images).square().mean()
        before_the_backward(m)
        return list(torch.autograd.grad(loss, parameters))

    expected = gradients(lambda model: None)
    for happening in (evaluated, replaced) + ((trained_and_run_again,) if mode == "training" else ()):
        torch.testing.assert_close(gradients(happening), expected, rtol=1e-9, atol=1e-12)
    m = copy.deepcopy(model)
    others = {name: p.detach().clone().requires_grad_() for name, p in m.named_parameters()}
    for p in m.parameters():
        p.detach().normal_()
    loss = torch.func.functional_call(m, others, images).square().mean()
    torch.testing.assert_close(torch.autograd.grad(loss, others.values()), tuple(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t[:1]], ids=["type", "size"])
def test_other_data_in_a_parameter_is_an_error(change):
    """As ``model.double()`` between forward and backward puts there: C++ would read past its end."""
    for name in ("0.weight", "2.kernel_generation.reduce.weight", "2.kernel_generation.norm.bias", "3.weight"):
        x, modules = layers()
        network = nn.Sequential(*modules)
        loss = sequence(x, *network).sum()
        parameter = network.get_parameter(name)
        parameter.data = change(parameter.data)
        with pytest.raises(RuntimeError, match="another type, size or device than in the forward"):
            loss.backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activation_checkpointing_of_a_block(layout):
    torch.manual_seed(0)
    block = create_model("rednet26").layer2[1]
    x = torch.randn(2, 512, 6, 6).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    (result,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)
