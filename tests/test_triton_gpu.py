"""The Triton kernels on a real GPU, at the shapes of RedNet-50.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, R reduced channels.
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data import Batch
from involution import create_model
from involution.engine.distributed import World
from involution.engine.learner import Learner
from involution.engine.options import TrainOptions
from involution.engine.tasks.classification import Classification
from involution.kernel_generation import stride_pool
from involution.ops import involution2d, norm, reference, span_involution2d
from scripts.gpu import checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

STAGES = {1: (64, 56, 16), 2: (128, 28, 32), 3: (256, 14, 64), 4: (512, 7, 128)}  # C, H = W, R
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def operands(stage: int, dtype: torch.dtype, stride: int = 1, batch: int = 4) -> list[torch.Tensor]:
    """input, reduced, weight, bias on the GPU in channels_last."""
    C, size, R = STAGES[stage]
    small, G = (size - 1) // stride + 1, C // 16
    shapes = [(batch, C, size, size), (batch, R, small, small), (G * 49, R, 1, 1), (G * 49,)]
    values = [torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=False) for shape in shapes]
    values[2] /= R**0.5
    values[:2] = [v.to(memory_format=torch.channels_last) for v in values[:2]]
    return [v.requires_grad_() for v in values]


def kernels(reduced: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    flat = F.conv2d(reduced, weight, bias)
    return flat.view(flat.shape[0], -1, 7, 7, *flat.shape[2:])


def close(values: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    errors = [((v.double() - e).norm() / e.norm()).item() for v, e in zip(values, expected, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("stage", list(STAGES))
def test_values_and_gradients(stage: int, dtype: torch.dtype, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    leaves = operands(stage, dtype, stride)
    exact = [v.detach().double().requires_grad_() for v in leaves]
    out = span_involution2d(*leaves, 7, stride=stride)
    grad = torch.randn_like(out)
    expected = reference.involution2d(exact[0], kernels(*exact[1:]), stride, 3, 1)
    references = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    close([out, *torch.autograd.grad(out, leaves, grad)], references, dtype)
    assert out.is_contiguous(memory_format=torch.channels_last)

    kernel = kernels(*(v.detach() for v in leaves[1:])).requires_grad_()
    out = involution2d(leaves[0], kernel, stride=stride)
    pair = [exact[0], kernel.detach().double().requires_grad_()]
    expected = reference.involution2d(*pair, stride, 3, 1)
    references = [expected, *torch.autograd.grad(expected, pair, grad.double())]
    close([out, *torch.autograd.grad(out, [leaves[0], kernel], grad)], references, dtype)


def test_tf32_rounds_the_factors_of_the_span_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = operands(3, torch.float32)
    found = []
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        out = span_involution2d(*leaves, 7)
        found.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True)]
    assert 0 < max(errors) < 2e-3, errors


@pytest.mark.parametrize("stage", list(STAGES))
def test_the_same_bits_every_time(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # which multiplies the kernels' gradient
    leaves = operands(stage, torch.bfloat16, batch=32)

    def run() -> list[torch.Tensor]:
        out = span_involution2d(*leaves, 7)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_more_than_2_to_the_31_elements() -> None:
    size, channels_last = (700, 64, 224, 224), torch.channels_last
    x = torch.empty(size, device="cuda", dtype=torch.bfloat16, memory_format=channels_last).zero_()
    x[-1] = torch.randn(64, 224, 224, device="cuda")
    kernel = torch.ones(1, 1, 1, 1, 1, 1, device="cuda", dtype=torch.bfloat16).expand(700, 1, 3, 3, 224, 224)
    out = involution2d(x, kernel)
    expected = F.avg_pool2d(x[-1:].float(), 3, 1, 1, divisor_override=1)
    torch.testing.assert_close(out[-1:].float(), expected, rtol=1e-2, atol=1e-2)


def test_in_a_cuda_graph() -> None:
    leaves = [v.detach() for v in operands(2, torch.bfloat16)]
    expected = span_involution2d(*leaves, 7)  # also compiles, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = span_involution2d(*leaves, 7)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_under_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    leaves = operands(3, torch.bfloat16)

    def step(*tensors: torch.Tensor) -> torch.Tensor:
        return span_involution2d(*tensors, 7).relu()

    out, expected = torch.compile(step, fullgraph=True)(*leaves), step(*leaves)
    grad = torch.randn_like(out)
    assert torch.equal(out, expected)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [28, 27])
def test_strided_kernel_generation_pools_as_torch_does(size: int) -> None:
    x = torch.randn(4, 32, size, size, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    exact = x.double().requires_grad_()
    out, expected = stride_pool(2)(x.requires_grad_()), F.avg_pool2d(exact, 2, 2, 0, True, False)
    grad = torch.randn_like(out)
    grads = [*torch.autograd.grad(out, x, grad), *torch.autograd.grad(expected, exact, grad.double())]
    close([out, grads[0]], [expected, grads[1]], torch.bfloat16)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (out, grads[0]))


class InFloat32(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", enabled=False):
            return self.layer(x.float())


@pytest.mark.parametrize(
    ("count", "distributed", "precision", "sizes"),
    [
        (1, False, "bf16", (64,)),
        (3, False, "bf16", (64,)),
        (1, True, "bf16", (64,)),
        (3, True, "bf16", (64,)),
        (2, False, "fp16", (64, 96)),
        (1, False, "fp32", (64,)),
    ],
)
def test_training_by_cuda_graphs_gives_the_same_bits(
    count: int, distributed: bool, precision: str, sizes: tuple[int, ...], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Accumulated gradients, BatchNorm's statistics, random layers, a part in fp32 and an evaluation in between
    included."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    world, lr = World(0, 1 + distributed, torch.device("cuda", 0)), 0.1  # the other rank is left out
    images = torch.randn(3, count, 8, 3, max(sizes), max(sizes), device="cuda")
    if distributed:
        torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)

    def train(cuda_graphs: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = create_model("rednet26", num_classes=10, drop_path_rate=0.2)
        model.fc = InFloat32(model.fc)
        model = model.cuda().to(memory_format=torch.channels_last)
        options = TrainOptions(
            precision=precision, compile=False, cuda_graphs=cuda_graphs, clip_grad_norm=1.0, ema_decay=0.9,
            max_bad_steps=4,
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)
        learner = Learner(model.train(), Classification(), optimizer, lambda _: lr, options, world)
        for step, part in enumerate(images):
            size = sizes[step % len(sizes)]
            parts = [x[..., :size, :size].contiguous(memory_format=torch.channels_last) for x in part]
            batches = [Batch(x, torch.arange(8, device="cuda"), 8) for x in parts]
            learner.step(step, batches, count, 8.0 * count)
            with torch.no_grad():
                learner.model.eval()(images[0, 0])
            learner.model.train()
        assert learner.guard.total < len(images), "no step was taken"
        return model.state_dict()

    try:
        plain, replayed = train(False), train(True)
    finally:
        if distributed:
            torch.distributed.destroy_process_group()
    assert [name for name in plain if not torch.equal(plain[name], replayed[name])] == []


WAITS = """
import torch
from involution.engine.graphs import Captured

class Waits(torch.nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * x.amax().item()

Captured(Waits(3, 4, 3).cuda())(torch.randn(2, 3, 8, 8, device="cuda"))
"""


def test_a_model_that_waits_for_the_gpu_cannot_be_captured() -> None:
    """In a process of its own: what is broken off leaves CUDA's random numbers unusable."""
    run = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True)
    assert "UserError: train.cuda_graphs=true: this model cannot be captured (" in run.stderr, run.stderr
    assert "captur" in run.stderr.split("cannot be captured (")[-1].split(")")[0], run.stderr


def test_a_training_step_does_not_wait_for_the_gpu() -> None:
    args = checks.parse(["synchronisations", "--batch", "8", "--size", "64"])
    assert checks.synchronisations(args)["places"] == []


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_batch_norm_and_relu(dtype: torch.dtype, residual: bool) -> None:
    """Of a size that is worth it; the same bits twice."""
    layer = torch.nn.BatchNorm2d(256).cuda()
    exact = copy.deepcopy(layer).double()
    images = [
        torch.randn(32, 256, 28, 28, device="cuda").to(dtype).to(memory_format=torch.channels_last).requires_grad_()
        for _ in range(3)
    ]
    grad, inputs = images[2].detach(), images[: 1 + residual]
    assert norm.supports(inputs[0], layer, *inputs[1:])
    assert not norm.supports(inputs[0][:1].contiguous(memory_format=torch.channels_last), layer)
    found = []
    for _ in range(2):
        out = norm.norm_relu(inputs[0], layer, *inputs[1:])
        found.append([out, *torch.autograd.grad(out, [*inputs, *layer.parameters()], grad)])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    doubles = [v.detach().double().requires_grad_() for v in inputs]
    for _ in range(2):
        expected = (exact(doubles[0]) + (doubles[1] if residual else 0)).relu()
    grads = torch.autograd.grad(expected, [*doubles, *exact.parameters()], grad.double())
    close([*found[0], layer.running_mean, layer.running_var],
          [expected, *grads, exact.running_mean, exact.running_var], dtype)  # fmt: skip
