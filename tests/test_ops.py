"""The registered operators: values and gradients against the reference, and what torch does with them."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from involution.ops import involution2d, reference, span_involution2d
from involution.ops.composed import span_kernel

BACKENDS = ("reference", "shifted", "cpu")


def _operands(groups: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """input (1, 8, 5, 7) and kernel (1, G, 3, 3, 5, 7), both channels_last, as a network has them."""
    torch.manual_seed(0)
    input = torch.randn(1, 8, 5, 7, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = torch.randn(1, 5, 7, groups, 3, 3, dtype=dtype).permute(0, 3, 4, 5, 1, 2)
    return input.requires_grad_(), kernel.requires_grad_()


def _span_operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    input, _ = _operands(dtype=dtype)
    shapes = (1, 4, 5, 7), (18, 4, 1, 1), (18,)
    return input, *(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, contiguous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake kernel (strides too), autograd registration and AOT dispatch agree with the real operator."""
    monkeypatch.setenv("INVOLUTION_BACKEND", backend)
    input, kernel = (t.detach().contiguous().requires_grad_() if contiguous else t for t in _operands())
    grad = torch.randn(1, 8, 5, 7)
    torch.library.opcheck(torch.ops.involution.involution2d, (input, kernel, 1, 1, 1))
    for needs in ((True, True), (True, False), (False, True)):
        args = (grad, input.detach(), kernel.detach(), 1, 1, 1, *needs)
        torch.library.opcheck(torch.ops.involution.involution2d_backward, args)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_fused(backend: str, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVOLUTION_BACKEND", backend)
    operands = [*_span_operands()[:3], _span_operands()[3] if with_bias else None]
    torch.library.opcheck(torch.ops.involution.span_involution2d, (*operands, 3, 1, 1, 1))
    detached = [None if t is None else t.detach() for t in operands]
    args = (torch.randn(1, 8, 5, 7), *detached, 3, 1, 1, 1)
    torch.library.opcheck(torch.ops.involution.span_involution2d_backward, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradcheck(backend: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVOLUTION_BACKEND", backend)
    torch.manual_seed(0)
    input = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(2, groups, 3, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(involution2d, stride=2), (input, kernel), fast_mode=True)
    operands = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5, 4), (9 * groups, 3, 1, 1))
    ]
    assert torch.autograd.gradcheck(
        lambda x, r, w: span_involution2d(x, r, w, None, 3, dilation=2), (input, *operands), fast_mode=True
    )


def test_compile_without_graph_break() -> None:
    compiled = torch.compile(lambda x, k: involution2d(x, k).relu(), fullgraph=True, backend="aot_eager")
    fused = torch.compile(lambda *t: span_involution2d(*t, 3).relu(), fullgraph=True, backend="aot_eager")
    for function, eager, operands in (
        (compiled, lambda x, k: involution2d(x, k).relu(), _operands()),
        (fused, lambda *t: span_involution2d(*t, 3).relu(), _span_operands()),
    ):
        expected = torch.autograd.grad(eager(*operands).square().sum(), operands)
        found = torch.autograd.grad(function(*operands).square().sum(), operands)
        torch.testing.assert_close(found, expected)


class _Both(nn.Module):
    def forward(self, x: Tensor, k: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return involution2d(x, k) + span_involution2d(x, r, w, b, 3)


def test_export_with_dynamic_batch() -> None:
    def inputs(batch: int) -> tuple[Tensor, ...]:
        shapes = (batch, 8, 5, 7), (batch, 2, 3, 3, 5, 7), (batch, 4, 5, 7), (18, 4, 1, 1), (18,)
        return tuple(torch.randn(shape) for shape in shapes)

    batch = torch.export.Dim("batch")
    dynamic = {"x": {0: batch}, "k": {0: batch}, "r": {0: batch}, "w": None, "b": None}
    program = torch.export.export(_Both(), inputs(2), dynamic_shapes=dynamic)
    example = inputs(3)
    torch.testing.assert_close(program.module()(*example), _Both()(*example))


def test_autocast_takes_mixed_types() -> None:
    input, kernel = _operands()
    span = _span_operands()
    with torch.autocast("cpu", torch.bfloat16):
        out = involution2d(input, kernel.bfloat16())
        fused = span_involution2d(span[0].bfloat16(), *span[1:], 3)
    assert out.dtype == fused.dtype == torch.bfloat16
    expected = involution2d(input, kernel)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=5e-2)
    out.float().sum().backward()
    fused.float().sum().backward()
    assert {t.grad.dtype for t in (input, kernel, *span) if t.grad is not None} == {torch.float32}


def test_half_types_are_added_up_in_float32() -> None:
    """1 + 2048 * 2^-12 is lost, term by term, in a bfloat16 or float16 sum."""
    for dtype in (torch.bfloat16, torch.float16):
        input = torch.full((1, 1, 45, 45), 2.0**-12, dtype=dtype)
        input[0, 0, 0, 0] = 1
        kernel = torch.ones(1, 1, 45, 45, 1, 1, dtype=dtype)
        for contiguous in (True, False):
            shaped = kernel if contiguous else kernel.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
            total = involution2d(input, shaped, padding=0).float().item()
            assert abs(total - 1.494) < 0.01, (dtype, total)


def test_memory_formats_are_kept() -> None:
    input, kernel = _operands()
    out = involution2d(input, kernel)
    assert out.is_contiguous(memory_format=torch.channels_last)
    gradients = torch.autograd.grad(out.sum(), (input, kernel))
    assert [g.stride() for g in gradients] == [input.stride(), kernel.stride()]
    assert involution2d(input.contiguous(), kernel).is_contiguous()


def test_strange_strides_and_expanded_gradients() -> None:
    """Slices, transposes and the zero-stride gradient of a sum give what dense tensors give."""
    wide, (_, kernel) = torch.randn(1, 7, 5, 24), _operands()
    input = wide.transpose(1, 3)[:, 4:12].detach().requires_grad_()
    big = torch.randn(1, 2, 3, 3, 10, 7)[..., ::2, :].requires_grad_()
    for k in (kernel, big):
        out = involution2d(input, k)
        expected = reference.involution2d(input, k, 1, 1, 1)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), (input, k)), torch.autograd.grad(expected.sum(), (input, k))
        )


def test_activation_checkpointing() -> None:
    operands = _span_operands()
    function = partial(span_involution2d, kernel_size=3)
    expected = torch.autograd.grad(function(*operands).square().sum(), operands)
    found = torch.autograd.grad(checkpoint(function, *operands, use_reentrant=False).square().sum(), operands)
    torch.testing.assert_close(found, expected)


def test_only_inputs_are_saved() -> None:
    """Training memory: neither the generated kernels nor an unfolded input stay for the backward."""
    saved: list[Tensor] = []
    operands = _span_operands()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        span_involution2d(*operands, 3)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in operands}


def test_flop_counter() -> None:
    input, kernel = _operands()
    with FlopCounterMode(display=False) as counter:
        involution2d(input, kernel).sum().backward()
    window = 2 * 8 * 9 * 35
    assert counter.get_total_flops() == 3 * window
    with FlopCounterMode(display=False) as counter:
        span_involution2d(*_span_operands(), 3).sum().backward()
    assert counter.get_total_flops() == 3 * window + 4 * 2 * 4 * 18 * 35  # the backward makes the kernels again


X, KERNEL = torch.zeros(1, 8, 5, 7), torch.zeros(1, 2, 3, 3, 5, 7)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"input has shape \(8, 5, 7\); it should be \(B, C, H, W\)", lambda: involution2d(X[0], KERNEL)),
        (r"kernel has shape .* it should be \(B, G, K, K, Ho, Wo\)", lambda: involution2d(X, KERNEL[0])),
        (r"should be \(1, 2, 3, 3, 3, 4\)", lambda: involution2d(X, KERNEL, stride=2)),
        (r"G = 3 groups; G should divide the C = 8", lambda: involution2d(X, torch.zeros(1, 3, 3, 3, 5, 7))),
        (r"kernel size is 4; it should be odd", lambda: involution2d(X, torch.zeros(1, 2, 4, 4, 5, 7))),
        (r"stride is 0; it should be at least 1", lambda: involution2d(X, KERNEL, stride=0)),
        (r"padding is -1; it should be 0 or more", lambda: involution2d(X, KERNEL, padding=-1)),
        (r"smaller than one window", lambda: involution2d(X[:, :, :2], KERNEL, padding=0)),
        (r"kernel is on meta; it should be on cpu", lambda: involution2d(X, KERNEL.to("meta"))),
        (r"kernel is torch.float64; it should be torch.float32", lambda: involution2d(X, KERNEL.double())),
        (r"input is torch.int64; it should be a floating-point", lambda: involution2d(X.long(), KERNEL)),
        (r"reduced has shape", lambda: span_involution2d(X, X[..., :3], torch.zeros(18, 8, 1, 1), None, 3)),
        (r"weight has shape .*it should be \(G\*9, 8, 1, 1\)", lambda: span_involution2d(X, X, X, None, 3)),
        (r"bias has shape", lambda: span_involution2d(X, X, torch.zeros(18, 8, 1, 1), torch.zeros(9), 3)),
    ],
)
def test_wrong_input(message: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_forced_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVOLUTION_BACKEND", "cuda")
    with pytest.raises(ValueError, match="INVOLUTION_BACKEND is 'cuda'; it should be one of reference, shifted"):
        involution2d(X, KERNEL)


def test_fused_equals_unfused() -> None:
    input, reduced, weight, bias = _span_operands()
    fused = span_involution2d(input, reduced, weight, bias, 3)
    torch.testing.assert_close(fused, involution2d(input, span_kernel(reduced, weight, bias, 3)))
