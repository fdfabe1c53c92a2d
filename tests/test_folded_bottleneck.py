"""A folded bottleneck as one operator: the outputs of its layers, and left alone wherever somebody looks inside."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from test_folding import TOLERANCE, relative_error, settled
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from involution import Involution2d, fold
from involution.folding import FoldedBottleneck, fold_layers
from involution.models.bottleneck import Bottleneck
from involution.ops import bottleneck


def joined(model: nn.Module) -> nn.Module:
    return fold(nn.Sequential(model))[0]


def block(in_channels: int = 64, width: int = 32, stride: int = 1, out: int = 64, **options: int | None) -> Bottleneck:
    torch.manual_seed(0)

    def spatial(channels: int, stride: int, dilation: int) -> nn.Module:
        return Involution2d(channels, stride=stride, dilation=dilation, **options)

    made = settled(Bottleneck(in_channels, width, stride, 1 if stride > 1 else 2, spatial, out))
    assert isinstance(made, Bottleneck)
    return made


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@torch.no_grad()
@pytest.mark.usefixtures("threads", "instruction_set")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_operator_equals_the_layers(dtype):
    """Few pixels and many, wide and narrow: threads share images, rows or columns, and tiles do not come out even."""
    blocks = [
        block(kernel_size=3),
        block(in_channels=48, width=96, stride=2, out=32, kernel_size=7),
        block(in_channels=7, width=32, stride=3, out=160, group_channels=None, kernel_size=1),
    ]
    shapes = [(1, 13, 9), (2, 30, 31), (3, 4, 4), (4, 5, 6)]
    for model, (batch, height, width) in itertools.product(blocks, shapes):
        quick = joined(model.to(dtype))
        assert isinstance(quick, FoldedBottleneck)
        x = torch.randn(batch, model.conv1.in_channels, height, width, dtype=dtype)
        expected = model.double()(x.double())
        for view in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
            result = quick(view)
            assert relative_error(result.double(), expected) < TOLERANCE[dtype]
            assert result.dtype == dtype
            assert result.stride() == model.to(dtype)(view).stride()
        channels_first = torch.randn(batch, height, width, 2 * x.shape[1], dtype=dtype).permute(0, 3, 1, 2)
        half = channels_first[:, : x.shape[1]]  # a slice of the channels of a channels_last image
        assert relative_error(quick(half), quick(half.contiguous())) < TOLERANCE[dtype]


@torch.no_grad()
def test_an_image_gives_the_same_bits_in_any_batch_and_with_any_threads():
    quick, x = joined(block(128, 64, 2, 256)), torch.randn(3, 128, 14, 15)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [quick(x), torch.cat([quick(x[:2]), quick(x[2:])])]
    torch.set_num_threads(1)
    assert all(torch.equal(result, results[0]) for result in results)


@torch.no_grad()
def test_autocast_computes_in_bfloat16():
    model, x = block(stride=2), torch.randn(2, 64, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        result = joined(model)(x)
        layers = fold_layers(model)(x)
    assert result.dtype == layers.dtype == torch.bfloat16
    assert relative_error(result.float(), model(x)) < TOLERANCE[torch.bfloat16]


@torch.no_grad()
def test_nan_empty_batches_and_other_channels():
    quick = joined(block())
    assert quick(torch.full((1, 64, 5, 5), torch.nan)).isnan().all()
    assert quick(torch.empty(0, 64, 5, 5)).shape == (0, 64, 5, 5)
    for wrong in (torch.randn(1, 32, 5, 5), torch.randn(64, 5, 5)):
        with pytest.raises(ValueError, match="with the C of the weights"):
            quick(wrong)


def test_gradient_of_the_input():
    model, x = block(stride=2), torch.randn(2, 64, 7, 7, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (result,) = torch.autograd.grad(joined(model)(x).square().sum(), x)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_in_the_compiler_and_counted():
    quick, x = joined(block(stride=2)), torch.randn(2, 64, 9, 9)
    operands = (x, quick.packed, 32, 64, 1, 8, 2, 7, 2, 1)
    torch.library.opcheck(
        torch.ops.involution.folded_bottleneck2d.default, operands, test_utils=["test_schema", "test_faketensor"]
    )
    torch.testing.assert_close(torch.compile(quick, fullgraph=True, backend="aot_eager")(x), quick(x))
    with FlopCounterMode(display=False) as counter:
        quick(x)
    inside = 8 * 32 + 8 * 2 * 49 + 32 * 49
    assert counter.get_total_flops() == 2 * 2 * (81 * 64 * 32 + 25 * (inside + 32 * 64 + 64 * 64))


def test_packing_keeps_every_weight_and_refuses_widths_that_are_not_whole_panels():
    conv = nn.Conv2d(8, 32, 1)
    layer = torch.randn(10)
    packed = bottleneck.pack(conv, layer, conv, None)
    assert torch.equal(packed[32 * 9 : 32 * 9 + 10], layer)
    with pytest.raises(ValueError, match="24 output channels; they come by 32"):
        bottleneck.pack(nn.Conv2d(8, 24, 1), layer, conv, None)


class Around(nn.Module):
    """A block and a forward of somebody's own."""

    def __init__(self, run: Callable[["Around", Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.run = block(), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@torch.no_grad()
@pytest.mark.parametrize(
    ("run", "joins"),
    [
        (lambda m, x: m.block(x), True),
        (lambda m, x: m.block(m.block(x)), False),
        (lambda m, x: m.block(x) + m.block.conv1(x).mean(), False),
        (lambda m, x: m.block.conv3(m.block.act2(m.block.bn2(m.block.conv2(m.block.conv1(x))))), False),
        (lambda m, x: m.block(x) + m.block.conv3.weight.sum(), False),
    ],
    ids=["called", "twice", "a part again", "parts alone", "its weight elsewhere"],
)
def test_blocks_that_somebody_takes_apart_stay(run, joins):
    model, x = settled(Around(run)), torch.randn(1, 64, 6, 5)
    quick = fold(model)
    assert any(isinstance(m, FoldedBottleneck) for m in quick.modules()) == joins
    torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("change", ["hook", "subclass", "another activation", "narrow", "in two types"])
def test_blocks_that_are_not_what_they_seem_stay(change):
    model, x = block(width=16 if change == "narrow" else 32), torch.randn(1, 64, 6, 5)
    if change == "hook":
        model.conv3.register_forward_hook(lambda m, i, o: o * 2)
    elif change == "subclass":
        model.__class__ = type("Doubled", (Bottleneck,), {"forward": lambda m, x: 2 * Bottleneck.forward(m, x)})
    elif change == "another activation":
        model.act3 = nn.GELU()
    elif change == "in two types":
        model.conv3.double(), model.bn3.double()
        model.conv3.register_forward_pre_hook(lambda m, i: i[0].double())
    quick = joined(model)
    assert not isinstance(quick, FoldedBottleneck)
    torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-4)
