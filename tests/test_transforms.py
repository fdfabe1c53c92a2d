"""Layers under torch.func, forward-mode differentiation and second derivatives: the right value on every road."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from involution import Involution2d, fold
from involution.sequence import sequence

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    layers = nn.Sequential(Involution2d(16, 3, 2), nn.BatchNorm2d(16), nn.ReLU()).double().eval()
    linear = Involution2d(16, 3, dilation=2, group_channels=4, kernel_generation="linear").double().eval()
    return {"layers": layers, "linear": linear, "folded": fold(layers)}


@pytest.fixture(params=["layers", "linear", "folded"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return networks()[request.param]


def image(layout: str, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).contiguous(memory_format=FORMATS[layout])


def scalar(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().sum()


@pytest.mark.parametrize("layout", FORMATS)
def test_gradients_tangents_and_batches(model, layout):
    x, direction = image(layout, 2, 16, 5, 6), image(layout, 2, 16, 5, 6)
    step = 1e-6 * direction
    slope = (model(x + step) - model(x - step)).detach() / 2e-6
    f, leaf = scalar(model), x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    assert expected.any()
    torch.testing.assert_close(grad(f)(x), expected)
    torch.testing.assert_close(jvp(model, (x,), (direction,))[1].detach(), slope, rtol=1e-5, atol=1e-6)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
        torch.testing.assert_close(tangent.detach(), slope, rtol=1e-5, atol=1e-6)
    several = torch.stack([x, direction, 2 * x])
    torch.testing.assert_close(vmap(model)(several), torch.stack([model(one) for one in several]))


@pytest.mark.parametrize("layout", FORMATS)
def test_second_derivatives(model, layout):
    x = image(layout, 1, 16, 2, 2)
    f = scalar(model)
    by_hand = torch.autograd.functional.hessian(f, x)  # a backward through a backward
    torch.testing.assert_close(jacfwd(jacrev(f))(x), by_hand)
    torch.testing.assert_close(jacrev(jacrev(f))(x), by_hand)
    step, column = torch.zeros_like(x), (0, 3, 1, 0)
    step[column] = 1e-6
    gradient = grad(f)
    numeric = (gradient(x + step) - gradient(x - step)).detach() / 2e-6
    torch.testing.assert_close(by_hand[(..., *column)], numeric, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", FORMATS)
def test_several_gradients_at_once(layout):
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` and vmap over ``torch.autograd.grad`` ask for them."""
    torch.manual_seed(0)
    layers = nn.BatchNorm2d(16), nn.ReLU(), Involution2d(16, 3), nn.BatchNorm2d(16), nn.ReLU()
    network, x = nn.Sequential(*layers).double(), image(layout, 2, 16, 3, 3).requires_grad_()
    out = sequence(x, *network).square().sum((0, 2, 3))
    weights = [x, *network.parameters()]
    each = [torch.autograd.grad(one, weights, retain_graph=True) for one in out]
    unit = torch.eye(16, dtype=torch.float64)
    together = (
        torch.autograd.grad(out, weights, unit, is_grads_batched=True, retain_graph=True),
        vmap(lambda g: torch.autograd.grad(out, weights, g, retain_graph=True))(unit),
    )
    for found in together:
        torch.testing.assert_close(list(found), [torch.stack(g) for g in zip(*each, strict=True)])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", FORMATS)
def test_penalty_on_gradients(layout, training):
    """As in a Wasserstein critic: gradients of the parameters through the gradient of the input."""
    torch.manual_seed(0)
    layer = Involution2d(16, 3, reduction_ratio=8).double().train(training)
    parameters, x = list(layer.parameters()), image(layout, 2, 16, 3, 3).requires_grad_()

    def penalty(step: float = 0.0) -> Tensor:
        with torch.no_grad():
            layer.kernel_generation.reduce.weight[1, 2] += step
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return gradient.square().sum()

    found = torch.autograd.grad(penalty(), parameters)[0][1, 2].item()
    up, down = penalty(1e-6).item(), penalty(-2e-6).item()
    assert abs(found - (up - down) / 2e-6) < 1e-4 * max(1, abs(found))


@pytest.mark.parametrize("layout", FORMATS)
def test_gradients_of_each_sample(layout):
    layer, x = networks()["layers"][0], image(layout, 3, 16, 4, 5)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, weights, x[None]).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    whole = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    torch.testing.assert_close([g.sum(0) for g in each.values()], list(whole))
