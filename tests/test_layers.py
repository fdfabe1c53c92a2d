"""Involution2d against the paper's formulas written out, and what it refuses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from involution import Involution2d, create_model
from involution.kernel_generation import stride_pool


def algorithm_1(layer: Involution2d, x: Tensor) -> Tensor:
    """The paper's Algorithm 1 with unfold, from the layer's own weights; stride must divide the size."""
    k, s, g = layer.kernel_size, layer.stride, layer.groups
    hidden = F.avg_pool2d(x, s) if s > 1 else x
    if hasattr(layer.kernel_generation, "reduce"):
        hidden = layer.kernel_generation.norm(layer.kernel_generation.reduce(hidden)).relu()
    span = layer.kernel_generation.span
    kernel = F.conv2d(hidden, span.weight, span.bias)
    b, _, h, w = kernel.shape
    windows = F.unfold(x, k, layer.dilation, layer.dilation * (k - 1) // 2, s).view(b, g, -1, k * k, h, w)
    return (kernel.view(b, g, 1, k * k, h, w) * windows).sum(3).view(b, -1, h, w)


@pytest.mark.parametrize("generation", ["bottleneck", "linear"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": 5, "stride": 3, "group_channels": 4},
        {"group_channels": None, "reduction_ratio": 1},
        {"kernel_size": 1, "group_channels": 1, "reduction_ratio": 16},
    ],
)
def test_equals_the_papers_algorithm(generation, options):
    torch.manual_seed(0)
    layer = Involution2d(32, kernel_generation=generation, **options).double().train()
    x = torch.randn(2, 32, 12, 18, dtype=torch.float64)
    expected = algorithm_1(layer, x)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)


def test_gradients_equal_the_papers_algorithm():
    torch.manual_seed(0)
    layer = Involution2d(16, kernel_size=3, stride=2, group_channels=8).double()
    x = torch.randn(2, 16, 6, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), inputs)
    expected = torch.autograd.grad(algorithm_1(layer, x).square().sum(), inputs)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [(7, 7), (1, 5), (13, 8)])
@pytest.mark.parametrize("stride", [2, 3])
def test_stride_rounds_up_on_odd_sizes(size, stride):
    layer = Involution2d(16, stride=stride)
    out = layer(torch.randn(2, 16, *size))
    assert out.shape == (2, 16, *(-(-n // stride) for n in size))


def test_border_cells_of_the_stride_pool_average_real_pixels_only():
    x = torch.arange(15.0).view(1, 1, 3, 5)
    pooled = stride_pool(2)(x)
    assert pooled[0, 0, 1].tolist() == [10.5, 12.5, 14.0]
    assert pooled[0, 0, 0].tolist() == [3.0, 5.0, 6.5]
    even = torch.randn(2, 3, 8, 6)
    assert torch.equal(stride_pool(2)(even), F.avg_pool2d(even, 2))


@pytest.mark.parametrize(("c", "k", "gc", "r"), [(64, 7, 16, 4), (128, 3, 4, 16), (32, 5, 32, 1)])
def test_parameters_follow_the_papers_formula(c, k, gc, r):
    layer = Involution2d(c, k, group_channels=gc, reduction_ratio=r)
    g = c // gc
    weights = sum(p.numel() for p in layer.parameters() if p.dim() == 4)
    assert weights == (c * c + k * k * g * c) // r
    assert sum(p.numel() for p in layer.parameters()) == weights + k * k * g + 2 * c // r


def test_any_generator_may_replace_the_built_in_ones():
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_full((x.shape[0], 9, *x.shape[2:]), 1 / 9)

    layer = Involution2d(8, kernel_size=3, group_channels=None)
    layer.kernel_generation = Mean()
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(layer(x), F.avg_pool2d(x, 3, 1, 1))


def test_repr_tells_the_arguments():
    text = repr(Involution2d(64, stride=2))
    assert "Involution2d(\n  64, kernel_size=7, stride=2, dilation=1, group_channels=16" in text
    assert "Conv2d(64, 16, kernel_size=(1, 1)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels is 0; it should be an integer of at least 1"),
        ({"channels": 32.0}, "channels is 32.0"),
        ({"kernel_size": 4}, "kernel_size is 4; it should be odd"),
        ({"kernel_size": -1}, "kernel_size is -1"),
        ({"stride": 0}, "stride is 0"),
        ({"dilation": 0}, "dilation is 0"),
        ({"group_channels": 0}, "group_channels is 0"),
        ({"group_channels": 24}, r"group_channels is 24, which does not divide channels = 32; .* None \(null on the "),
        ({"reduction_ratio": 64}, "reduction_ratio is 64; it should be at most channels = 32"),
        ({"kernel_generation": "conv"}, 'kernel_generation is \'conv\'; it should be "bottleneck", "linear"'),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Involution2d(**{"channels": 32, **arguments})


def test_numpy_s_integers_are_taken_as_conv2d_takes_them():
    n = np.int64
    layer = Involution2d(n(32), n(3), n(2), n(1), n(16), n(4))
    assert layer(torch.randn(1, 32, 8, 8)).shape == (1, 32, 4, 4)
    model = create_model("rednet26", num_classes=n(5), in_chans=n(1), kernel_size=n(3), group_channels=n(8))
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    for wrong in (True, 2.0, n(0), "3"):
        with pytest.raises(ValueError, match="channels is"):
            Involution2d(wrong)
