"""Section 4.2 and 5.2's kernel generations of `Involution2d`: attention, position, softmax and sigmoid."""

import pytest
import torch

import involution
from involution import Involution2d, involution2d
from involution.attention import window_softmax


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("activation", [None, "softmax", "sigmoid"])
@pytest.mark.parametrize("generation", ["bottleneck", "linear", "attention", "position"])
def test_kernel_generations(generation: str, activation: str | None) -> None:
    layer = Involution2d(
        16, 3, 2, 2, group_channels=8, kernel_generation=generation, kernel_activation=activation
    )  # stride 2, dilation 2
    x = torch.randn(2, 16, 5, 7, requires_grad=True)
    kernel = layer.kernel_generation(x).unflatten(1, (2, 3, 3))
    assert kernel.shape == (2, 2, 3, 3, 3, 4)
    torch.testing.assert_close(layer(x), involution2d(x, kernel, stride=2, dilation=2))
    sums, attends = kernel.sum((2, 3)), generation in ("attention", "position")
    assert (activation == "softmax" or (attends and activation is None)) == torch.allclose(sums, torch.ones_like(sums))
    if activation == "sigmoid":
        assert kernel.min() > 0
        assert kernel.max() < 1
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_attention_generation_is_softmax_of_q_k_and_of_q_r() -> None:
    layer, x = Involution2d(16, 3, group_channels=8, kernel_generation="attention"), torch.randn(1, 16, 4, 4)
    made = layer.kernel_generation
    query, key = made.query(x), made.key(x)
    assert query.shape[1] == 4  # C / r
    scores = involution.neighbourhood_product(query, key, 3, groups=2)
    torch.testing.assert_close(made(x), window_softmax(scores, 4, 4).flatten(1, 3))
    layer = Involution2d(16, 3, group_channels=8, kernel_generation="position")
    made = layer.kernel_generation
    scores = torch.einsum("bgdij,duv->bguvij", made.query(x).unflatten(1, (2, 2)), made.position)
    torch.testing.assert_close(made(x), window_softmax(scores, 4, 4).flatten(1, 3))
    centre = window_softmax(torch.zeros(1, 1, 3, 3, 4, 4), 4, 4)
    assert centre[0, 0, 1, 1, 0, 0] == 1 / 4  # the corner's five other taps lie outside
