"""fold(): the same outputs, by fewer and faster operators."""

import itertools
from collections.abc import Callable

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


class Parts(nn.Module):
    """Layers for forwards of all kinds; ``run`` says what they do."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        self.inv, self.bn2, self.conv2 = Involution2d(32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 1)
        self.again, self.in_a_list, self.run = nn.ModuleList([self.conv]), [self.bn], run

    def forward(self, x: Tensor, last: bool = True) -> Tensor:
        return self.run(self, x)


def with_a_side_exit(m: Parts, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.bn(y) + y


def on_other_data(m: Parts, x: Tensor) -> Tensor:
    m.kept = m.conv(x)
    return m.bn(x * 2) + m.kept


FORWARDS: dict[str, tuple[Callable[[Parts, Tensor], Tensor], bool]] = {  # and whether something is folded
    "in order": (lambda m, x: m.act(m.bn(m.conv(x))), True),
    "an involution": (lambda m, x: m.act(m.bn2(m.inv(x))), True),
    "one ReLU for all": (lambda m, x: m.conv2(m.act(m.bn2(m.inv(m.act(m.bn(m.conv(x))))))), True),
    "by other names": (lambda m, x: m.in_a_list[0](m.again[0](x)), True),
    "BatchNorm first": (lambda m, x: m.conv(m.act(m.bn(x))), False),
    "twice": (lambda m, x: m.bn(m.conv(m.bn(m.conv(x)))), False),
    "BatchNorm of two": (lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv2(x)), False),
    "an involution twice": (lambda m, x: m.act(m.bn2(m.inv(m.inv(x)))), False),
    "a side exit": (with_a_side_exit, False),
    "on other data": (on_other_data, False),
    "its weight elsewhere": (lambda m, x: m.bn(m.conv(x)) + nn.functional.conv2d(x, m.conv.weight, padding=1), False),
    "its statistics elsewhere": (lambda m, x: m.bn(m.conv(x)) + m.bn.running_mean.sum(), False),
    "something between": (lambda m, x: m.act(m.bn2(m.inv(x) * 2)), False),
    "as the data say": (lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else m.conv(m.bn(x)), False),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Parts is not folded")
@pytest.mark.parametrize("kind", FORWARDS)
def test_the_order_is_that_of_the_forward(kind):
    torch.manual_seed(0)
    run, folds = FORWARDS[kind]
    model, x = settled(Parts(run)), torch.randn(2, 32, 9, 8)
    quick = fold(model)
    torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-4)
    kinds = [type(m) for m in model.modules()], [type(m) for m in quick.modules()]
    assert (kinds[0] != kinds[1]) == folds
    assert not any(isinstance(value, torch.fx.Proxy) for value in vars(quick).values())


class Options(Parts):
    def forward(self, x: Tensor, last: bool = True, extra: Tensor | None = None) -> Tensor:
        return self.run(self, x, last, extra)


def with_extra(m: Parts, x: Tensor, last: bool, extra: Tensor | None) -> Tensor:
    y = m.conv(x)
    return m.bn(y if extra is None else y + extra)


def that_keeps(m: Parts, x: Tensor, last: bool, extra: Tensor | None) -> Tensor:
    m.features = {"conv": [m.conv(x)]}
    return m.bn(m.features["conv"][0])


def in_turn(m: Parts, x: Tensor, last: bool, extra: Tensor | None) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return m.bn(m.conv(x)) if m.calls % 2 else m.conv(m.bn(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Options is not folded")
@pytest.mark.parametrize(
    "run",
    [
        lambda m, x, last, extra: m.bn(m.conv(x)) if last else m.conv(x),
        lambda m, x, last, extra: m.bn(m.conv(x)) if last else (m.bn(m.conv(x)), m.conv(x))[1],
        with_extra,
        that_keeps,
        in_turn,
    ],
    ids=["last layer", "features", "extra", "kept", "in turn"],
)
def test_forwards_that_take_options_or_keep_something(run):
    torch.manual_seed(0)
    model, x = settled(Options(run)), torch.randn(2, 32, 9, 8)
    quick = fold(model)
    for options in ({}, {}, {"last": False}, {"extra": torch.ones_like(x)}):
        torch.testing.assert_close(quick(x, **options), model(x, **options), rtol=1e-4, atol=1e-4)
    if run is that_keeps:
        torch.testing.assert_close(quick.features, model.features)


def test_a_model_that_cannot_be_traced_is_named():
    with pytest.warns(UserWarning, match="Parts is not folded: torch.fx cannot tell .* model.backbone = fold"):
        fold(settled(Parts(FORWARDS["as the data say"][0])))


@torch.no_grad()
@pytest.mark.parametrize("change", ["hook", "weight norm", "subclass", "no statistics", "bias of the generator"])
def test_layers_that_are_not_what_they_seem_stay(change):
    torch.manual_seed(0)
    model, x = (
        settled(nn.Sequential(nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), *layers(32, 3))),
        torch.randn(2, 32, 6, 5),
    )
    if change == "hook":
        model[0].register_forward_hook(lambda m, i, o: o * 2)
        model[2].kernel_generation.span.register_forward_hook(lambda m, i, o: o * 2)
    elif change == "weight norm":
        nn.utils.parametrizations.weight_norm(model[0])
        nn.utils.parametrizations.weight_norm(model[2].kernel_generation.reduce)
    elif change == "subclass":
        model[0].__class__ = type("Doubled", (nn.Conv2d,), {"forward": lambda m, x: 2 * nn.Conv2d.forward(m, x)})
        model[2].__class__ = type("Tripled", (Involution2d,), {"forward": lambda m, x: 3 * Involution2d.forward(m, x)})
    elif change == "no statistics":
        model[1], model[3] = (nn.BatchNorm2d(32, track_running_stats=False).eval() for _ in range(2))
    else:
        model[2].kernel_generation.reduce = nn.Conv2d(32, 8, 1)
    torch.testing.assert_close(fold(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_gradient_of_the_input_and_nan_come_through():
    torch.manual_seed(0)
    model, x = layers(32, 3), torch.randn(1, 32, 5, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (result,) = torch.autograd.grad(fold(model)(x).square().sum(), x)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert fold(model)(torch.full((1, 32, 5, 5), torch.nan)).isnan().all()
        assert fold(model)(torch.empty(0, 32, 5, 5)).shape == (0, 32, 5, 5)
        with pytest.raises(ValueError, match="with the C of the weights"):
            fold(model)(torch.empty(1, 16, 5, 5))


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
