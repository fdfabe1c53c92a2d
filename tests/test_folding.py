"""fold(): the same outputs, by fewer and faster operators."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from involution import Involution2d, create_model, fold
from involution.export import export_program
from involution.folding import FoldedInvolution2d
from involution.ops import folded

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def settled(model: nn.Module) -> nn.Module:
    """With BatchNorm statistics and weights as after training, not 0 and 1."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model.eval()


def layers(*args: int | None) -> nn.Sequential:
    model = nn.Sequential(Involution2d(*args), nn.BatchNorm2d(args[0]), nn.ReLU())
    return settled(model)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max().clamp(min=1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("channels", "group_channels"), [(32, 16), (96, 16), (48, None), (7, 1)])
def test_folded_layer_equals_the_three_layers(channels, group_channels, stride, dtype):
    torch.manual_seed(0)
    for (kernel_size, dilation), (batch, height, width) in itertools.product(
        [(1, 1), (3, 2), (7, 1)], [(1, 13, 9), (3, 7, 7), (5, 9, 6), (16, 5, 6)]
    ):
        model = layers(channels, kernel_size, stride, dilation, group_channels).to(dtype)
        x = torch.randn(batch, channels, height, width, dtype=dtype)
        expected = model.double()(x.double())
        quick = fold(model.to(dtype))
        assert isinstance(quick[0], FoldedInvolution2d)
        assert len(list(quick.modules())) == 4
        for view in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
            result = quick(view)
            assert relative_error(result.double(), expected) < TOLERANCE[dtype]
            assert result.dtype == dtype
            assert result.stride() == model(view).stride()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["shifted", "cpu"])
@pytest.mark.parametrize(
    ("name", "options"), [("rednet26", {}), ("rednet26", {"stem": "convolution"}), ("resnet26", {})]
)
def test_folded_models_give_the_same_logits(name, options, backend, monkeypatch):
    monkeypatch.setenv("INVOLUTION_BACKEND", backend)
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, zero_init_residual=False, **options)
    x = torch.randn(2, 3, 65, 47)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None
    model(torch.randn(4, 3, 65, 47))
    before = [*model.state_dict()]
    quick = fold(model)
    assert model.training
    assert [*model.state_dict()] == before
    assert not any(isinstance(m, (nn.BatchNorm2d, Involution2d)) for m in quick.modules())
    torch.testing.assert_close(quick(x), model.eval()(x), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_folded_stays():
    torch.manual_seed(0)
    linear = settled(nn.Sequential(Involution2d(32, 3, kernel_generation="linear"), nn.BatchNorm2d(32), nn.ReLU()))
    no_relu = settled(nn.Sequential(Involution2d(32, 3), nn.BatchNorm2d(32), nn.GELU()))
    for model in (linear, no_relu):
        quick, x = fold(model), torch.randn(2, 32, 6, 6)
        assert isinstance(quick[0], Involution2d)
        assert isinstance(quick[1], nn.BatchNorm2d)
        torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-5)


def test_gradient_of_the_input_and_nan_come_through():
    torch.manual_seed(0)
    model, x = layers(32, 3), torch.randn(1, 32, 5, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (result,) = torch.autograd.grad(fold(model)(x).square().sum(), x)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert fold(model)(torch.full((1, 32, 5, 5), torch.nan)).isnan().all()
        assert fold(model)(torch.empty(0, 32, 5, 5)).shape == (0, 32, 5, 5)


@torch.no_grad()
def test_folded_operator_in_the_compiler():
    torch.manual_seed(0)
    quick = fold(layers(32, 3, 2))
    x = torch.randn(2, 32, 9, 9)
    layer = quick[0]
    operands = (x, *layer.buffers(), 8, 2, 3, 2, 1)
    torch.library.opcheck(
        torch.ops.involution.folded_involution2d.default, operands, test_utils=["test_schema", "test_faketensor"]
    )
    compiled = torch.compile(quick, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), quick(x))


@torch.no_grad()
def test_a_folded_model_is_exported_in_standard_operators():
    torch.manual_seed(0)
    quick = fold(layers(32, 3))
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *quick)
    program = export_program(model)
    assert not any("involution" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(3, 3, 70, 58)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_packing_keeps_every_weight():
    reduce, span, scale, shift = nn.Conv2d(40, 10, 1), nn.Conv2d(10, 98, 1), torch.rand(40), torch.rand(40)
    packed = folded.pack(reduce, span, scale, shift)
    assert packed.shape == (40 * 32 + 32 + 10 * 128 + 128 + 2 * 40,)
    expected = (reduce.weight, reduce.bias, span.weight, span.bias, scale, shift)
    for result, operand in zip(folded.unpack(packed, 40, 10, 98), expected, strict=True):
        assert torch.equal(result, operand)
