"""Empty batches: every operator, layer and network gives an empty result and zero gradients, as torch's layers do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from involution import Involution2d, fold
from involution.models import RedNet, ResNet
from involution.ops import involution2d

OPERATORS = sorted(
    name.removeprefix("involution::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("involution::")
)


def _calls(batch: int, image: Callable[..., Tensor]) -> dict[str, tuple[Any, ...]]:
    """Operator -> arguments, for a batch of images that ``image`` makes."""
    x, out, hidden = image(batch, 16, 5, 7), image(batch, 16, 3, 4), image(batch, 4, 3, 4)
    kernel, weight, bias = torch.randn(batch, 1, 3, 3, 3, 4), torch.randn(9, 4, 1, 1), torch.randn(9)
    packed = torch.randn(16 * 32 + 32 + 4 * 32 + 32 + 2 * 16)
    block = torch.randn(2 * 32 * 17 + (32 * 32 + 32 + 4 * 32 + 32 + 2 * 32) + 32 * 33)
    return {
        "involution2d": (x, kernel, 2, 1, 1),
        "involution2d_backward": (out, x, kernel, 2, 1, 1, True, True),
        "involution2d_transpose": (out, kernel, 5, 7, 2, 1, 1),
        "neighbourhood_product": (out, x, 3, 1, 2, 1, 1),
        "span_involution2d": (x, hidden, weight, bias, 3, 2, 1, 1),
        "span_involution2d_backward": (out, x, hidden, weight, bias, 3, 2, 1, 1),
        "folded_involution2d": (x, packed, 4, 1, 3, 2, 1),
        "folded_bottleneck2d": (x, block, 32, 32, 1, 4, 1, 3, 2, 1),
    }


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_takes_an_empty_batch(name: str, layout: torch.memory_format) -> None:
    """What two images give, without the images: gradients of weights are zeros."""

    def results(batch: int) -> tuple[Tensor, ...]:
        arguments = _calls(batch, lambda *shape: torch.randn(shape).to(memory_format=layout))[name]
        found = getattr(torch.ops.involution, name)(*arguments)
        return found if isinstance(found, tuple) else (found,)

    for found, two in zip(results(0), results(2), strict=True):
        assert found.shape == (two[:0] if len(two) == 2 else two).shape
        assert found.dtype == two.dtype
        assert not found.any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
def test_layers_and_networks_take_an_empty_batch(training: bool, layout: torch.memory_format) -> None:
    rednet = RedNet((1, 1, 1, 1), num_classes=3, kernel_size=3)
    resnet = ResNet((1, 1, 1, 1), num_classes=3)
    folded = fold(nn.Sequential(Involution2d(16), nn.BatchNorm2d(16), nn.ReLU()))
    layers = [Involution2d(16), Involution2d(16, 3, 2), Involution2d(16, kernel_generation="linear"), folded]
    for module, channels in ((rednet, 3), (resnet, 3), *((layer, 16) for layer in layers)):
        x = torch.randn(0, channels, 32, 32).contiguous(memory_format=layout).requires_grad_()
        out = module.to(memory_format=layout).train(training)(x)
        out.sum().backward()
        assert out.shape[0] == 0
        assert x.grad.shape == x.shape
        assert all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_no_pixels_are_zeros_where_padding_makes_windows() -> None:
    assert not involution2d(torch.randn(1, 4, 0, 5), torch.randn(1, 2, 3, 3, 4, 9), padding=3).any()
    assert not torch.ops.involution.involution2d_backward(
        torch.randn(1, 0, 4, 4), torch.randn(1, 0, 4, 4), torch.randn(1, 2, 3, 3, 4, 4), 1, 1, 1, True, True
    )[1].any()
