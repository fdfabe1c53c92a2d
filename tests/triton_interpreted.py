# ruff: noqa: E402 (the environment is set before the imports that read it)
"""The Triton kernels against the reference, through Triton's interpreter (test_triton.py runs this file in a process of
its own: the interpreter is chosen by TRITON_INTERPRET=1 before Triton is imported).

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, R reduced channels.
"""

import copy
import os

assert os.environ.get("TRITON_INTERPRET") == "1"
os.environ["INVOLUTION_BACKEND"] = "triton"

import pytest
import torch
import torch.nn.functional as F

from involution.ops import involution2d, norm, reference, span_involution2d, triton_backend
from involution.ops.ghost import GhostBatchNorm2d

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3}

# B C G K H W R stride dilation padding dtype channels_last bias
CASES = [
    (2, 8, 2, 3, 5, 7, 4, 1, 1, 1, torch.float32, False, True),
    (2, 6, 6, 3, 5, 5, 3, 2, 1, 1, torch.float32, True, False),  # a kernel for every channel, stride
    (1, 6, 2, 3, 6, 9, 17, 1, 2, 2, torch.float64, True, True),  # groups of 3, dilation, R no power of two
    (1, 66, 1, 3, 2, 8, 2, 1, 1, 1, torch.float32, True, True),  # one kernel for all channels, more than fit at once
    (1, 4, 2, 3, 11, 13, 3, 3, 2, 0, torch.float16, False, True),  # stride 3, no padding
    (1, 4, 2, 3, 3, 4, 3, 1, 1, 3, torch.float16, True, False),  # output larger than input
    (1, 16, 1, 7, 4, 8, 5, 1, 1, 3, torch.float32, True, True),  # kernel larger than the image
    (2, 6, 2, 3, 4, 5, 64, 2, 1, 1, torch.float32, True, True),  # so many hidden channels that kernels are made at once
]


def tensors(case: tuple) -> tuple[list[torch.Tensor], torch.Tensor]:
    """input, kernel, reduced, weight, bias, and a gradient of the output whose memory is not contiguous."""
    B, C, G, K, H, W, R, stride, dilation, padding, dtype, channels_last, bias = case
    height, width = ((n + 2 * padding - dilation * (K - 1) - 1) // stride + 1 for n in (H, W))
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def normal(*shape: int) -> torch.Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return value.to(memory_format=layout) if value.dim() == 4 else value

    kernel = normal(B, G * K * K, height, width).view(B, G, K, K, height, width)
    values = [normal(B, C, H, W), kernel, normal(B, R, height, width), normal(G * K * K, R, 1, 1)]
    values += [normal(G * K * K)] if bias else []
    return values, normal(B, C, height, 2 * width)[..., ::2]


def distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    assert value.shape == expected.shape
    return ((value.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: tuple) -> None:
    _, _, G, K, _, _, _, stride, dilation, padding, dtype, channels_last, _ = case
    values, grad = tensors(case)
    leaves = [v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for v in values]
    exact = [v.detach().double().requires_grad_() for v in values]

    out = involution2d(leaves[0], leaves[1], stride=stride, padding=padding, dilation=dilation)
    expected = reference.involution2d(exact[0], exact[1], stride, padding, dilation)
    results = [out, *torch.autograd.grad(out, leaves[:2], grad)]
    references = [expected, *torch.autograd.grad(expected, exact[:2], grad.double())]
    if case == CASES[5]:  # the gradients again, one by one
        options = (stride, padding, dilation)
        results += [
            torch.ops.involution.involution2d_transpose(grad, values[1], *values[0].shape[2:], *options),
            torch.ops.involution.neighbourhood_product(grad, values[0], K, G, *options),
        ]
        references += references[1:]

    out = span_involution2d(leaves[0], *leaves[2:4], leaves[4] if len(leaves) > 4 else None, K, stride=stride,
                            padding=padding, dilation=dilation)  # fmt: skip
    kernel = F.conv2d(*exact[2:]).view(out.shape[0], G, K, K, *out.shape[2:])
    expected = reference.involution2d(exact[0], kernel, stride, padding, dilation)
    results += [out, *torch.autograd.grad(out, [leaves[0], *leaves[2:]], grad)]
    references += [expected, *torch.autograd.grad(expected, [exact[0], *exact[2:]], grad.double())]

    errors = [distance(r, e) for r, e in zip(results, references, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


# B C H W dtype residual training mean
NORMS = [
    (2, 6, 5, 7, torch.float32, False, True, 0),
    (3, 70, 9, 9, torch.float16, True, True, 0),  # two programs of channels, several of rows
    (2, 8, 4, 4, torch.float32, True, False, 0),  # with the running statistics
    (2, 8, 33, 33, torch.float32, False, True, 1000),  # 500 deviations from zero: squares would cancel
]


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_batch_norm_and_relu(case: tuple) -> None:
    B, C, H, W, dtype, residual, training, mean = case
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def image() -> torch.Tensor:
        return (2 * normal(B, C, H, W)).to(dtype).to(memory_format=torch.channels_last)

    layer = torch.nn.BatchNorm2d(C).train(training)
    values = {
        "weight": normal(C) + 1,
        "bias": normal(C),
        "running_mean": normal(C) + mean,
        "running_var": normal(C) ** 2,
    }
    layer.load_state_dict(values, strict=False)
    exact = copy.deepcopy(layer).double()
    inputs, grad = [(image() + mean).requires_grad_()], image()
    inputs += [image().requires_grad_()] if residual else []
    assert norm.supports(inputs[0], layer, *inputs[1:])
    out = norm.norm_relu(inputs[0], layer, *inputs[1:])
    results = [out, *torch.autograd.grad(out, [*inputs, *layer.parameters()], grad), *list(layer.buffers())[:2]]

    doubles = [v.detach().double().requires_grad_() for v in inputs]
    expected = (exact(doubles[0]) + (doubles[1] if residual else 0)).relu()
    grads = torch.autograd.grad(expected, [*doubles, *exact.parameters()], grad.double())
    errors = [distance(r, e) for r, e in zip(results, [expected, *grads, *list(exact.buffers())[:2]], strict=True)]
    assert layer.num_batches_tracked == training
    assert max(errors) < (1e-4 if mean else TOLERANCE[dtype]), errors  # the input itself has 24 bits


def test_batch_norm_of_parts_of_the_batch() -> None:
    """As its modules run, one part after the other, running statistics included."""
    torch.manual_seed(0)
    layer, inputs = (
        GhostBatchNorm2d(70),
        [torch.randn(6, 70, 9, 9).to(memory_format=torch.channels_last) for _ in range(2)],
    )
    layer.size = 2
    modules, grad = copy.deepcopy(layer), torch.randn(6, 70, 9, 9)
    for skip in (False, True):
        found = []
        for one in (layer, modules):
            x, y = (t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs)
            if one is layer:
                assert norm.supports(x, one, y if skip else None)
                out = norm.norm_relu(x, one, y if skip else None)
            else:
                out = (one(x) + (y if skip else 0)).relu()
            wanted = [x, y, *one.parameters()] if skip else [x, *one.parameters()]
            found.append([out, *torch.autograd.grad(out, wanted, grad), *one.buffers()])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert layer.num_batches_tracked == 6
    assert not norm.supports(inputs[0][:5], layer), "parts that are not equal are the modules' own"


def test_second_derivatives_of_batch_norm_and_relu() -> None:
    layer = torch.nn.BatchNorm2d(2)
    x = torch.randn(2, 2, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    found = []
    for out in (norm.norm_relu(x, layer), layer(x).relu()):
        (first,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
        found += torch.autograd.grad((first**2).sum(), x)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_the_gradient_where_a_value_is_not_a_number() -> None:
    """Passes the ReLU as it does torch's: to the residual and the bias, which have no other way to know."""
    layer = torch.nn.BatchNorm2d(2).eval()
    x, skip = (torch.randn(2, 2, 3, 3).to(memory_format=torch.channels_last) for _ in range(2))
    x[0, 1, 1, 1] = torch.nan
    skip.requires_grad_()
    found = [torch.autograd.grad(out.sum(), [skip, layer.bias]) for out in
             (norm.norm_relu(x, layer, skip), (layer(x) + skip).relu())]  # fmt: skip
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_of_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels' gradient of a whole batch would take too much memory."""
    values, grad = tensors((5, *CASES[0][1:]))
    values.pop(1)
    leaves = [v.requires_grad_() for v in values]
    out = span_involution2d(*leaves, 3)
    found = []
    for kernels in (triton_backend.KERNELS_AT_ONCE, 2 * 18 * 5 * 7):  # of two images: parts of 2, 2 and 1
        monkeypatch.setattr(triton_backend, "KERNELS_AT_ONCE", kernels)
        found.append(torch.autograd.grad(out, leaves, grad, retain_graph=True))
    for whole, parts in zip(*found, strict=True):
        assert distance(parts, whole.double()) < 1e-6
    assert torch.equal(found[0][0], found[1][0])


def test_only_the_gradient_that_is_asked_for() -> None:
    (input, kernel, *_), grad = tensors(CASES[3])
    kernel.requires_grad_()
    involution2d(input, kernel).backward(grad)
    assert input.grad is None
    assert kernel.grad is not None


def test_an_infinite_value_stays_in_its_neighbourhood() -> None:
    (input, kernel, *_), _ = tensors(CASES[0])
    input[0, 0, 2, 3] = torch.inf
    finite = involution2d(input, kernel).isfinite()
    reached = torch.zeros_like(finite)
    reached[0, 0, 1:4, 2:5] = True
    assert (finite == ~reached).all()


def test_operator_registration() -> None:
    (input, kernel, reduced, weight, bias), _ = tensors((1, 2, 1, 1, 2, 3, 2, 1, 1, 0, torch.float32, True, True))
    for tensor in (input, kernel, reduced, weight, bias):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.involution.involution2d.default, (input, kernel, 1, 0, 1))
    arguments = (input, reduced, weight, bias, 1, 1, 0, 1)
    torch.library.opcheck(torch.ops.involution.span_involution2d.default, arguments)
