"""What runs as one operator in training on the CPU: the numbers of the modules it stands for, and out of the way."""

import contextlib
import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from involution import Involution2d, create_model
from involution.ops import cpu
from involution.sequence import add_residual, sequence

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 2e-2}
RESIDUALS = ("none", "plain", "normalised")


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def run(x: Tensor, norm: nn.Module, skip: Tensor | None = None) -> Tensor:
    """relu(norm(x) [+ skip]); of two BatchNorms the second one is the residual's."""
    norm, *others = norm if isinstance(norm, nn.Sequential) else (norm,)
    act = nn.ReLU()
    return sequence(x, norm, act) if skip is None else add_residual(x, norm, act, skip, nn.Sequential(*others))


def norms_for(residual: str, channels: int, dtype: torch.dtype, **options: object) -> nn.Module:
    count = 2 if residual == "normalised" else 1
    return nn.Sequential(*(batch_norm(channels, dtype, **options) for _ in range(count)))


def watch(module: nn.Module) -> nn.Module:
    """Every module in it has a hook, and is called therefore."""
    for part in module.modules():
        part.register_forward_hook(lambda *_: None)
    return module


def batch_norm(channels: int, dtype: torch.dtype = torch.float32, **options: object) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels, dtype=dtype, **options)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


def operators(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the C++ functions that run from now on."""
    names: list[str] = []
    call = cpu.call
    monkeypatch.setattr(cpu, "call", lambda name, *args: (names.append(name), call(name, *args))[1])
    return names


def everything(output: Tensor, module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The output, the gradients of inputs and parameters, and what the module keeps."""
    wanted = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    torch.manual_seed(1)
    grad = torch.randn_like(output, dtype=torch.float64).bfloat16().to(output.dtype)  # in every type the same
    return [output, *torch.autograd.grad(output, wanted, grad), *module.buffers()]


def exactly(x: Tensor) -> Tensor:
    """The same in a type to compare bfloat16 with."""
    return x.detach().float().requires_grad_() if x.dtype == torch.bfloat16 else x


def assert_alike(result: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(result, expected, strict=True):
        assert one.stride() == other.stride()
        assert float(((one - other).abs().max() / other.abs().max().clamp(min=1e-2)).detach()) < tolerance


@pytest.mark.parametrize("mode", ["training", "frozen", "average"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_batch_norm_and_relu(dtype, residual, mode, instruction_set, monkeypatch):
    torch.manual_seed(0)
    for channels, size, threads in itertools.product((1, 7, 64), ((2, 1, 1), (3, 5, 4), (40, 9, 9)), (1, 3)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        batch, height, width = size
        x = image(batch, channels, height, width, dtype=dtype)
        skip = None if residual == "none" else image(batch, channels, height, width, dtype=dtype)
        inputs = (x,) if skip is None else (x, skip)
        in_float = dtype == torch.bfloat16 and residual != "plain"  # as under autocast
        momentum = None if mode == "average" else 0.1
        module = norms_for(residual, channels, torch.float32 if in_float else dtype, momentum=momentum)
        other = copy.deepcopy(module).to(exactly(x).dtype)
        for m in (module, other):
            m.train(mode != "frozen")
        for _ in range(2):  # the second time on statistics that have changed
            names = operators(monkeypatch)
            result = everything(run(x, module, skip), module, *inputs)
            assert names == ["norm_statistics"] * len(module) + ["norm_apply", "norm_backward"]
            others = [exactly(t) for t in inputs]
            plain = sum((nn.Sequential(*other[i : i + 1])(t) for i, t in enumerate(others[1:], 1)), other[0](others[0]))
            assert_alike(result, everything(plain.relu(), other, *others), TOLERANCE[dtype])


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_images_that_no_cache_holds_are_written_past_it_with_the_same_bits(dtype, residual, instruction_set):
    torch.manual_seed(0)
    module = norms_for(residual, 64, torch.float32 if dtype == torch.bfloat16 else dtype).eval()
    inputs = [image(20, 64, 96, 96, dtype=dtype) for _ in range(1 if residual == "none" else 2)]
    out, *grads = everything(run(inputs[0], module, *inputs[1:]), module, *inputs)[: 1 + len(inputs)]
    torch.manual_seed(1)
    grad = torch.randn_like(out, dtype=torch.float64).bfloat16().to(dtype)
    for n in (0, 19):
        one = [t[n : n + 1].detach().requires_grad_() for t in inputs]
        result = run(one[0], module, *one[1:])
        assert torch.equal(result, out[n : n + 1])
        for found, expected in zip(torch.autograd.grad(result, one, grad[n : n + 1]), grads, strict=True):
            assert torch.equal(found, expected[n : n + 1])


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("training", [False, True])
def test_derivatives_of_batch_norm_and_relu(training, residual):
    torch.manual_seed(0)
    module = norms_for(residual, 3, torch.float64).train(training)
    images = [image(2, 3, 2, 2, dtype=torch.float64) for _ in range(1 if residual == "none" else 2)]

    def function(*inputs: Tensor) -> Tensor:
        return run(inputs[0], module, *inputs[1 : len(images)])

    inputs = (*images, *module.parameters())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_large_mean_takes_nothing_from_the_variance():
    torch.manual_seed(0)
    x = (image(8, 16, 20, 20) + 3e4).detach().requires_grad_()
    module = batch_norm(16)
    result = run(x, module)
    expected = nn.functional.batch_norm(
        x.double(), None, None, module.weight.double(), module.bias.double(), True
    ).relu()
    assert (result - expected).abs().max() < 2e-2  # what is left of x itself: 3e4 * 2^-24 = 2e-3
    torch.testing.assert_close(module.running_var, 0.9 + 0.1 * x.double().var((0, 2, 3)).float(), rtol=1e-5, atol=0)


def test_nan_stays_nan_and_one_value_is_an_error():
    module = batch_norm(4).eval()
    x = image(2, 4, 3, 3)
    x.data[0, 0, 0, 0] = torch.nan
    assert run(x, module).isnan().sum() == 1
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(image(1, 4, 1, 1), module.train())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_layer_in_training(dtype, stride, instruction_set, monkeypatch):
    torch.manual_seed(0)
    for channels, kernel_size, bias, size in [
        (32, 7, True, (2, 9, 8)),
        (64, 3, False, (5, 4, 7)),
        (16, 1, True, (2, 2, 2) if dtype != torch.bfloat16 else (2, 5, 4)),  # of two values it may see two equal ones
    ]:
        autocast = dtype == torch.bfloat16 and stride == 1
        layer = Involution2d(channels, kernel_size, stride).to(torch.float32 if autocast else dtype)
        if not bias:
            layer.kernel_generation.span.bias = None
        nn.init.normal_(layer.kernel_generation.norm.bias)
        if dtype == torch.bfloat16:  # whose rounding opens or closes no ReLU
            layer.kernel_generation.norm.bias.data.sign_().mul_(6)
        x = image(size[0], channels, *size[1:], dtype=dtype)
        other = copy.deepcopy(layer).to(exactly(x).dtype)
        names = operators(monkeypatch)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = layer(x)
        assert output.dtype == dtype
        result = everything(output, layer, x)
        assert names[-1] == "pointwise_backward"
        exact = exactly(x)
        expected = everything(watch(other)(exact), other, exact)
        assert names.count("pointwise_backward") == 1
        assert_alike(result, expected, TOLERANCE[dtype])


def test_derivatives_of_a_layer():
    torch.manual_seed(0)
    layer = Involution2d(16, 3, 2, group_channels=8).double()
    x = image(2, 16, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    small = Involution2d(16, 3, 2, reduction_ratio=8).double()
    x = image(1, 16, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x, *_: small(x), (x, *small.parameters()))


def test_a_layer_keeps_neither_kernels_nor_the_hidden_tensor():
    layer, x = Involution2d(64, 7), image(2, 64, 8, 8)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(x)
    assert any(shape[1:2] == (16,) and len(shape) == 4 for shape in kept)  # hooks: the modules run one by one
    output = layer(x)
    sizes = [tuple(t.shape) for t in output.grad_fn.saved_tensors if t is not None and t.dim() == 4]
    assert sorted(sizes) == sorted([(2, 64, 8, 8), (2, 16, 8, 8), (16, 64, 1, 1), (196, 16, 1, 1)])


@pytest.mark.parametrize(
    "other",
    ["hook", "wrapped", "global hook", "layout", "type", "backend", "no statistics", "functorch", "autocast", "mode"],
)
def test_it_leaves_the_modules_to_others(other, monkeypatch):
    torch.manual_seed(0)
    layer, x = Involution2d(32, 3), image(2, 32, 6, 6)
    handle = None
    if other == "hook":
        handle = layer.kernel_generation.norm.register_forward_hook(lambda *_: None)
    elif other == "wrapped":
        layer.kernel_generation.reduce.forward = layer.kernel_generation.reduce.forward
    elif other == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    elif other == "layout":
        x = x.detach().contiguous().requires_grad_()
    elif other == "type":
        layer, x = layer.half(), x.detach().half().requires_grad_()
    elif other == "backend":
        monkeypatch.setenv("INVOLUTION_BACKEND", "shifted")
    elif other == "no statistics":
        layer.kernel_generation.norm = nn.BatchNorm2d(8, track_running_stats=False)
    names = operators(monkeypatch)
    if other == "functorch":
        assert torch.func.grad(lambda x: run(x, batch_norm(32)).sum())(x).shape == x.shape
    else:
        mode = FlopCounterMode(display=False) if other == "mode" else contextlib.nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=other == "autocast"), mode:
            run(layer(x), nn.BatchNorm2d(32, dtype=x.dtype))
    if handle is not None:
        handle.remove()
    may_norm = "no statistics", "hook", "wrapped", "autocast"
    assert not [name for name in names if name.startswith("norm") and other not in may_norm]
    assert "pointwise_backward" not in names


def test_a_training_step_of_a_model_in_channels_last():
    torch.manual_seed(0)
    for name in ("rednet26", "resnet26"):
        model = create_model(name, num_classes=4, zero_init_residual=False)
        model = model.to(memory_format=torch.channels_last).double()
        images = image(2, 3, 64, 64, dtype=torch.float64)
        together, one_by_one = copy.deepcopy(model), watch(copy.deepcopy(model))
        results = [everything(m(images), m, images) for m in (together, one_by_one)]
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
