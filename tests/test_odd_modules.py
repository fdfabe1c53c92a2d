"""Modules that somebody has changed by hand: torch's numbers, whichever road they take, and no memory but their own."""

import copy
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from programs import ROOT
from test_folded_bottleneck import block
from test_training_ops import batch_norm, everything, image, operators
from torch import Tensor, nn

from involution import Involution2d, fold
from involution.ops import cpu
from involution.sequence import add_residual, sequence


def sliced(norm: nn.BatchNorm2d) -> None:
    """Channels are cut out of its tensors; the attributes stay, and torch reads none of them."""
    for name in ("weight", "bias"):
        setattr(norm, name, nn.Parameter(getattr(norm, name)[:8].detach().clone()))
    for name in ("running_mean", "running_var"):
        setattr(norm, name, getattr(norm, name)[:8].clone())


def a_column(norm: nn.BatchNorm2d) -> None:
    norm.weight = nn.Parameter(torch.randn(16, 3)[:, 1])


def not_tracking(norm: nn.BatchNorm2d) -> None:
    norm.track_running_stats = False


@pytest.mark.parametrize("change", [sliced, a_column, not_tracking])
@pytest.mark.parametrize("residual", ["none", "plain", "normalised"])
def test_a_batch_norm_that_was_changed(change: Callable[[nn.BatchNorm2d], None], residual: str) -> None:
    torch.manual_seed(0)
    norms = nn.ModuleList(batch_norm(16) for _ in range(1 + (residual == "normalised")))
    for norm in norms:
        change(norm)
    channels = len(norms[0].weight)
    inputs = [image(4, channels, 5, 5) for _ in range(1 if residual == "none" else 2)]
    other = copy.deepcopy(norms)
    if residual == "none":
        result = sequence(inputs[0], norms[0], nn.ReLU())
    else:
        result = add_residual(inputs[0], norms[0], nn.ReLU(), inputs[1], nn.Sequential(*norms[1:]))
    expected = sum((nn.Sequential(*other[i : i + 1])(x) for i, x in enumerate(inputs[1:], 1)), other[0](inputs[0]))
    for one, two in zip(everything(result, norms, *inputs), everything(expected.relu(), other, *inputs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_one_batch_norm_for_the_branch_and_the_residual_sees_the_branch_first() -> None:
    torch.manual_seed(0)
    x, skip, norm = image(4, 16, 5, 5), image(4, 16, 5, 5), batch_norm(16)
    other = copy.deepcopy(norm)
    torch.testing.assert_close(
        add_residual(x, norm, nn.ReLU(), skip, nn.Sequential(norm)), (other(x) + other(skip)).relu()
    )
    torch.testing.assert_close(norm.running_mean, other.running_mean)


def test_an_infinity_makes_its_channel_nan_as_in_torch() -> None:
    x, norm = image(4, 2, 5, 5).detach(), batch_norm(2)
    x[1, 1, 2, 2] = float("inf")
    result = sequence(x, norm, nn.ReLU())
    assert result[:, 1].isnan().all()
    assert norm.running_var[1].isnan()
    assert result[:, 0].isfinite().all()


def test_the_gradient_passes_where_a_value_is_not_a_number() -> None:
    x, skip, norm = image(2, 3, 5, 5).detach(), image(2, 3, 5, 5).detach().requires_grad_(), batch_norm(3).eval()
    x[1, 1, 2, 2] = float("nan")
    found = [torch.autograd.grad(out.sum(), [skip, norm.bias]) for out in
             (add_residual(x, norm, nn.ReLU(), skip, nn.Identity()), (norm(x) + skip).relu())]  # fmt: skip
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("place", [(0, 0), (37, 5), (111, 111)])
def test_the_variance_beside_a_pixel_that_is_far_out(place: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, norm = torch.randn(16, 4, 112, 112).contiguous(memory_format=torch.channels_last), nn.BatchNorm2d(4, momentum=1)
    x[0, :, place[0], place[1]] = 1000
    sequence(x, norm, nn.ReLU())
    expected = x.double().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("part", ["reduce", "span"])
def test_a_generators_weight_of_other_strides(part: str) -> None:
    torch.manual_seed(0)
    layer, x = Involution2d(64, 7), image(2, 64, 6, 5)
    conv = getattr(layer.kernel_generation, part)
    columns, rows = conv.weight.shape[:2]
    conv.weight = nn.Parameter(torch.randn(rows, columns).mul(0.1).T[:, :, None, None])
    other = copy.deepcopy(layer)
    for module in other.modules():
        module.register_forward_hook(lambda *_: None)
    for one, two in zip(everything(layer(x), layer, x), everything(other(x), other, x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_a_generators_weight_that_does_not_fit_is_refused() -> None:
    layer = Involution2d(32, 3)
    layer.kernel_generation.reduce.weight = nn.Parameter(torch.randn(4, 32, 1, 1))
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 8"):
        layer(image(2, 32, 5, 5))


def test_a_default_device_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    names = operators(monkeypatch)
    with torch.device("cpu"):
        sequence(image(2, 16, 5, 5), batch_norm(16), nn.ReLU())
    assert names == ["norm_statistics", "norm_apply"]


SHORT_OF_MEMORY = """
import resource, sys, torch
sys.path.insert(0, "tests")
from test_folded_bottleneck import block, joined
model, threads = joined(block(in_channels=32, width=128, out=32, kernel_size=1)), THREADS
torch.set_num_threads(threads)
large = torch.ones(threads, 32, 1024, 1024).contiguous(memory_format=torch.channels_last)
small = large[:, :, :64, :64].contiguous(memory_format=torch.channels_last)
with torch.no_grad():
    out = model(small)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20), -1))
    try:
        model(large)
    except MemoryError as error:
        print(error)
    torch.testing.assert_close(model(small), out)
    print("alive")
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux", reason="limits memory as Linux does")
def test_too_little_memory_is_an_error_and_not_the_end_of_the_process(threads: int) -> None:
    code = SHORT_OF_MEMORY.replace("THREADS", str(threads))
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert finished.stdout.splitlines() == [cpu.NO_MEMORY, "alive"], finished.stderr[-2000:]


def hooked(block: nn.Module) -> None:
    block.downsample.register_forward_hook(lambda module, inputs, output: 3 * output)


def tripled(block: nn.Module) -> None:
    kind = type("Tripled", (nn.Sequential,), {"forward": lambda m, x: 3 * nn.Sequential.forward(m, x)})
    block.downsample.__class__ = kind


def narrowed(block: nn.Module) -> None:
    for conv, norm in ((block.conv3, block.bn3), (block.downsample[0], block.downsample[1])):
        conv.weight = nn.Parameter(conv.weight[:32].detach())
        for name in ("weight", "bias"):
            setattr(norm, name, nn.Parameter(getattr(norm, name)[:32].detach()))
        for name in ("running_mean", "running_var"):
            setattr(norm, name, getattr(norm, name)[:32])


@torch.no_grad()
@pytest.mark.parametrize("change", [hooked, tripled, narrowed])
def test_a_folded_block_whose_shortcut_was_changed(change: Callable[[nn.Module], None]) -> None:
    model, x = block(stride=2), torch.randn(2, 64, 6, 5)
    change(model)
    torch.testing.assert_close(fold(nn.Sequential(model))(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("gradients", [False, True])
def test_a_shortcut_keeps_its_type_under_autocast(gradients: bool) -> None:
    model, x = block(), torch.randn(2, 64, 6, 5)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
        result: Tensor = fold(nn.Sequential(model))(x.requires_grad_(gradients))
        expected = model(x)
    assert result.dtype == expected.dtype == torch.float32
