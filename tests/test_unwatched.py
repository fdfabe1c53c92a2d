"""Layers run together only where nobody watches or changes a module: every way of doing so has its effect.

In training and in evaluation, in both layouts, behind a BatchNorm and a ReLU, with which an involution runs together.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from involution import Involution2d
from involution.ops import reference
from involution.sequence import add_residual, sequence

PARTS = ("pool", "reduce", "norm", "act", "span")


class Block(nn.Module):
    """BatchNorm, ReLU, involution, BatchNorm, ReLU, convolution, and a BatchNorm with a residual that has one too."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.act1, self.inv = nn.BatchNorm2d(16), nn.ReLU(inplace=True), Involution2d(16, 3, 2)
        self.bn2, self.act2, self.conv = nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 1)
        self.bn3, self.act3 = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(16, 16, 1, 2), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        y = sequence(x, self.bn1, self.act1, self.inv, self.bn2, self.act2, self.conv)
        return add_residual(y, self.bn3, self.act3, x, self.shortcut)

    def one_by_one(self, x: Tensor) -> Tensor:
        """The same, by calls of all modules and the literal operator."""
        skip = self.shortcut(x)
        x = self.act1(self.bn1(x))
        phi = self.inv.kernel_generation
        kernel = phi(x) if not hasattr(phi, "span") else phi.span(phi.act(phi.norm(phi.reduce(phi.pool(x)))))
        x = reference.involution2d(x, kernel.unflatten(1, (1, 3, 3)), 2, 1, 1)
        x = self.conv(self.act2(self.bn2(x)))
        return self.act3(self.bn3(x) + skip)


def inputs(layout: str) -> Tensor:
    torch.manual_seed(0)
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.randn(2, 16, 6, 8).contiguous(memory_format=format).requires_grad_()


def forward_hook(module: nn.Module, fired: list[nn.Module]) -> None:
    module.register_forward_hook(lambda m, *_: fired.append(m))


def forward_pre_hook(module: nn.Module, fired: list[nn.Module]) -> None:
    module.register_forward_pre_hook(lambda m, *_: fired.append(m))


def backward_hook(module: nn.Module, fired: list[nn.Module]) -> None:
    module.register_full_backward_hook(lambda m, *_: fired.append(m))


def backward_pre_hook(module: nn.Module, fired: list[nn.Module]) -> None:
    module.register_full_backward_pre_hook(lambda m, *_: fired.append(m))


def other_forward(module: nn.Module, fired: list[nn.Module]) -> None:
    run = module.forward
    module.forward = lambda x: (fired.append(module), run(x))[1]


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("watch", [forward_hook, forward_pre_hook, backward_hook, backward_pre_hook, other_forward])
def test_a_watched_module_is_called_once(watch, layout):
    for training in (True, False):
        names = [name for name, _ in Block().named_modules() if name]
        for name in names:
            block, fired = Block().train(training), []
            module = block.get_submodule(name)
            for act in (m for m in block.modules() if isinstance(m, nn.ReLU)):
                act.inplace = False  # backward hooks do not go with it
            watch(module, fired)
            block(inputs(layout)).sum().backward()
            assert fired == [module], name


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
@pytest.mark.parametrize("training", [True, False])
def test_hooks_of_all_modules(register, training):
    block, fired = Block().train(training), []
    for act in (m for m in block.modules() if isinstance(m, nn.ReLU)):
        act.inplace = False
    hook = getattr(nn.modules.module, f"register_module_{register}")(lambda m, *_: fired.append(m))
    try:
        block(inputs("channels_last")).sum().backward()
    finally:
        hook.remove()
    assert len(fired) == len(set(fired)) == len(list(block.modules()))


@pytest.mark.parametrize("owner", [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, Involution2d])
def test_a_class_whose_forward_was_replaced(owner, monkeypatch):
    block, fired, run = Block(), [], owner.forward
    monkeypatch.setattr(owner, "forward", lambda m, x: (fired.append(m), run(m, x))[1])
    block(inputs("channels_last"))
    assert set(fired) == {m for m in block.modules() if isinstance(m, owner)}


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (nn.Module, "_call_impl", 18),
        (nn.Conv2d, "_conv_forward", 4),
        (F, "conv2d", 4),
        (F, "batch_norm", 5),
        (F, "relu", 4),
    ],
    ids=str,
)
def test_a_function_that_was_replaced(owner, name, calls, layout, monkeypatch):
    """As profilers and counters do, to count the calls."""
    fired: list[Any] = []
    run = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **options: (fired.append(a), run(*a, **options))[1])
    Block().train()(inputs(layout))
    Block().eval()(inputs(layout))
    monkeypatch.undo()
    assert len(fired) == 2 * calls


class Doubled(nn.Conv2d):
    """A subclass of nn.Conv2d that does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Adapter(nn.Module):
    """A low-rank adapter around a convolution, which it shows the attributes of."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.low = conv, nn.Conv2d(conv.in_channels, conv.out_channels, 1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.low(x)


class Negated(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


class Loud(Tensor):
    """A weight with a say in every operation on it."""

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result * 3 if function in (F.conv2d, torch.conv2d) else result


def to_subclass(conv: nn.Conv2d) -> nn.Module:
    other = Doubled(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None)
    other.load_state_dict(conv.state_dict())
    return other


def to_loud(conv: nn.Conv2d) -> nn.Module:
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Loud))
    return conv


def with_hook(conv: nn.Conv2d) -> nn.Module:
    conv.register_forward_hook(lambda m, i, o: o * 2)
    return conv


CHANGES: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "subclass": to_subclass,
    "adapter": Adapter,
    "tensor subclass": to_loud,
    "hook that changes": with_hook,
    "pruning": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "weight norm of old": lambda conv: nn.utils.weight_norm(conv),
    "spectral norm of old": lambda conv: nn.utils.spectral_norm(conv, n_power_iterations=1, eps=1e-3),
    "weight norm": lambda conv: parametrizations.weight_norm(conv),
    "parametrisation": lambda conv: parametrize.register_parametrization(conv, "weight", Negated()) or conv,
    "wider": lambda conv: nn.Sequential(nn.Conv2d(conv.in_channels, 5, 1), nn.Conv2d(5, conv.out_channels, 1)),
    "circular": lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, padding_mode="circular"),
    "with a bias": lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 1),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:.*spectral_norm.* is deprecated")
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_convolution_has_its_effect(change, layout):
    for name in ("inv.kernel_generation.span", "inv.kernel_generation.reduce", "conv"):
        for training in (True, False):
            torch.manual_seed(0)
            block = Block().train(training)
            owner, _, attribute = name.rpartition(".")
            owner = block.get_submodule(owner)
            setattr(owner, attribute, CHANGES[change](getattr(owner, attribute)))
            block.train(training)
            state = {key: value.clone() for key, value in block.state_dict().items()}
            x = inputs(layout)
            weights = [x, *(p for p in block.parameters() if p.requires_grad)]
            results = []
            for run in (block, block.one_by_one):
                block.load_state_dict(state)
                output = run(x).as_subclass(Tensor)
                results.append([output, *torch.autograd.grad(output.square().sum(), weights)])
            for result, expected in zip(*results, strict=True):
                torch.testing.assert_close(
                    result.as_subclass(Tensor), expected.as_subclass(Tensor), rtol=1e-3, atol=1e-3, msg=name
                )


def test_training_a_pruned_layer_goes_on():
    torch.manual_seed(0)
    layer = Involution2d(32)
    span = prune.l1_unstructured(layer.kernel_generation.span, "weight", 0.5)
    before, kept = span.weight.detach().clone(), span.weight_mask.bool()
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(2, 32, 6, 6)).square().mean().backward()
        optimizer.step()
    layer(torch.randn(2, 32, 6, 6))  # which makes the weight from what was learnt
    assert not span.weight[~kept].any()
    assert (span.weight != before)[kept].all()


@pytest.mark.parametrize("what", ["generator", "norm", "pool", "act"])
def test_replaced_modules_of_a_generator(what):
    torch.manual_seed(0)
    block = Block()
    phi = block.inv.kernel_generation
    if what == "generator":
        block.inv.kernel_generation = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(16, 9, 1))
    elif what == "norm":
        phi.norm = nn.GroupNorm(2, 4)
    elif what == "pool":
        phi.pool = nn.MaxPool2d(2)
    else:
        phi.act = nn.GELU()
    x = inputs("channels_last")
    torch.testing.assert_close(block(x), block.one_by_one(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", ["norm", "input", "span"])
def test_wrong_sizes_are_errors_as_ever(wrong):
    block, x = Block(), inputs("channels_last")
    if wrong == "norm":
        block.bn1 = nn.BatchNorm2d(8)
    elif wrong == "input":
        x = torch.randn(2, 32, 6, 8).contiguous(memory_format=torch.channels_last)
    else:
        block.inv.kernel_generation.span = nn.Conv2d(4, 18 * 7, 1)
    with pytest.raises((RuntimeError, ValueError)):
        block(x)
