"""The three bilinear maps: the neighbourhood product, gradients of any order, forward mode and torch.func.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from involution.ops import involution2d, neighbourhood_product, reference

BACKENDS = ("reference", "shifted", "cpu")


def _operands(stride: int, dtype: torch.dtype = torch.float64, last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """query (2, 4, Ho, Wo), key (2, 4, 5, 4) and kernel (2, 2, 3, 3, Ho, Wo)."""
    torch.manual_seed(0)
    size = -(-5 // stride), -(-4 // stride)
    images = [torch.randn(2, c, *hw, dtype=dtype) for c, hw in ((4, size), (4, (5, 4)), (18, size))]
    query, key, taps = (t.to(memory_format=torch.channels_last) if last else t for t in images)
    return query.requires_grad_(), key.requires_grad_(), taps.unflatten(1, (2, 3, 3)).detach().requires_grad_()


def _by_loops(query: Tensor, key: Tensor, size: int, stride: int, dilation: int, groups: int) -> Tensor:
    """The definition."""
    batch, _, height, width = query.shape
    out = query.new_zeros(batch, groups, size, size, height, width)
    heads = (query.unflatten(1, (groups, -1)), key.unflatten(1, (groups, -1)))
    for u, v, i, j in torch.cartesian_prod(*map(torch.arange, (size, size, height, width))).tolist():
        y, x = (stride * n + dilation * (t - size // 2) for n, t in ((i, u), (j, v)))
        if 0 <= y < key.shape[2] and 0 <= x < key.shape[3]:
            out[:, :, u, v, i, j] = (heads[0][..., i, j] * heads[1][..., y, x]).sum(2)
    return out


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_product_is_its_definition(backend: str, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVOLUTION_BACKEND", backend)
    for stride, dilation, groups in ((1, 1, 1), (2, 1, 2), (1, 2, 4), (3, 1, 2)):
        query, key, _ = _operands(stride, last=last)
        found = neighbourhood_product(query, key, 3, stride=stride, dilation=dilation, groups=groups)
        torch.testing.assert_close(found, _by_loops(query, key, 3, stride, dilation, groups))
        kernel = torch.zeros_like(found, requires_grad=True)
        out = involution2d(key, kernel, stride=stride, dilation=dilation)
        torch.testing.assert_close(found, torch.autograd.grad(out, kernel, query)[0])
        assert (found.stride(3) == 1) == last  # the taps of a pixel lie together


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake kernel (strides too), autograd registration and AOT dispatch."""
    monkeypatch.setenv("INVOLUTION_BACKEND", backend)
    for last in (True,) if backend == "reference" else (True, False):
        query, key, kernel = _operands(2, torch.float32, last)
        torch.library.opcheck(torch.ops.involution.neighbourhood_product, (query, key, 3, 2, 2, 1, 1))
        torch.library.opcheck(torch.ops.involution.involution2d_transpose, (query, kernel, 5, 4, 2, 1, 1))
        gradients = (query, key, kernel, 2, 1, 1, True, True)
        torch.library.opcheck(torch.ops.involution.involution2d_backward, gradients)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_order(backend: str, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """First and second, backward and forward and over each other, and third."""
    monkeypatch.setenv("INVOLUTION_BACKEND", backend)
    query, key, kernel = _operands(stride)
    involve = partial(involution2d, stride=stride)
    for function, operands in (
        (involve, (key, kernel)),
        (partial(neighbourhood_product, kernel_size=3, stride=stride, groups=2), (query, key)),
    ):
        assert gradcheck(function, operands, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, operands, fast_mode=True, check_fwd_over_rev=True)

    def gradients(x: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(involve(x, k).pow(3).sum(), (x, k), create_graph=True)

    assert gradgradcheck(gradients, (key, kernel), fast_mode=True)
    penalty = gradcheck(lambda k: gradients(key, k)[0].square().sum(), kernel, fast_mode=True)
    assert penalty  # on the input's gradient, it trains the kernel


def _cubed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *operands: function(*operands).pow(3).sum()


def test_transforms_of_torch_func() -> None:
    query, key, kernel = (t.detach() for t in _operands(2))
    for ours, theirs, operands in (
        (partial(involution2d, stride=2), lambda x, k: reference.involution2d(x, k, 2, 1, 1), (key, kernel)),
        (
            partial(neighbourhood_product, kernel_size=3, stride=2, groups=2),
            lambda q, x: reference.product(q, x, 3, 2, 2, 1, 1),
            (query, key),
        ),
    ):
        many = tuple(torch.stack([t, 2 * t], dim=1) for t in operands)
        tangents = tuple(torch.randn_like(t) for t in operands)
        found, expected = [], []
        for f, results in ((ours, found), (theirs, expected)):
            results.append(torch.func.jvp(f, operands, tangents))
            results.append(torch.func.vmap(f, in_dims=1)(*many))
            results.append(torch.func.vmap(f, in_dims=(1, None))(many[0], operands[1]))
            results.append(torch.func.vmap(torch.func.grad(_cubed(f)), in_dims=1)(*many))
            results.append(torch.func.hessian(_cubed(f))(*operands))
        torch.testing.assert_close(found, expected)
        with forward_ad.dual_level():
            out = ours(forward_ad.make_dual(operands[0], tangents[0]), operands[1])
            torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, ours(tangents[0], operands[1]))


def test_product_under_autocast_compiler_and_counter() -> None:
    query, key, _ = _operands(1, torch.float32, last=True)
    product = partial(neighbourhood_product, kernel_size=3, groups=2)
    with torch.autocast("cpu", torch.bfloat16):
        scores = product(query.bfloat16(), key)
    assert scores.dtype == torch.bfloat16
    torch.testing.assert_close(scores.float(), product(query, key), rtol=2e-2, atol=5e-2)
    compiled = torch.compile(lambda q, k: product(q, k).softmax(2), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(product(query, key).softmax(2).square().sum(), (query, key))
    torch.testing.assert_close(torch.autograd.grad(compiled(query, key).square().sum(), (query, key)), expected)
    with FlopCounterMode(display=False) as counter:
        product(query, key).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * key.numel() * 9


def _squared(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    return function(*operands).float().square().sum()


def test_transforms_under_autocast_work_in_its_type() -> None:
    query, key, kernel = (t.detach() for t in _operands(1, torch.float32, last=True))
    with torch.autocast("cpu", torch.bfloat16):
        for function, operands in (
            (involution2d, (key, kernel)),
            (partial(neighbourhood_product, kernel_size=3, groups=2), (query, key)),
        ):
            for n in (0, 1):
                found = torch.func.grad(partial(_squared, function), argnums=n)(*operands)
                leaves = [t.clone().requires_grad_() for t in operands]
                expected = torch.autograd.grad(_squared(function, *leaves), leaves)[n]
                assert found.dtype == torch.float32
                torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-1)
        with pytest.raises(ValueError, match=r"kernel is torch.float32; it should be torch.float64"):
            involution2d(key.double(), kernel)
    torch.testing.assert_close(  # past the checks: as torch promotes them, and no memory is read as another type
        torch.ops.involution.involution2d(key.double(), kernel, 1, 1, 1),
        involution2d(key.double(), kernel.double()),
    )


def test_only_query_and_key_are_kept() -> None:
    kept: list[Tensor] = []
    query, key, _ = _operands(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        neighbourhood_product(query, key, 3, groups=2)
    assert {t.data_ptr() for t in kept} == {query.data_ptr(), key.data_ptr()}


def test_empty_batch() -> None:
    query, key = (torch.randn(0, 4, *hw, requires_grad=True) for hw in ((3, 2), (5, 4)))
    scores = neighbourhood_product(query, key, 3, stride=2, groups=2)
    assert scores.shape == (0, 2, 3, 3, 3, 2)
    scores.sum().backward()
    assert (query.grad.shape, key.grad.shape) == (query.shape, key.shape)


X = torch.zeros(1, 8, 5, 7)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"key has shape \(8, 5, 7\); it should be \(B, C, H, W\)", lambda: neighbourhood_product(X, X[0], 3)),
        (r"groups is 3; it should divide the C = 8", lambda: neighbourhood_product(X, X, 3, groups=3)),
        (r"query has shape .* it should be \(1, 8, 3, 4\)", lambda: neighbourhood_product(X, X, 3, stride=2)),
        (r"the kernel size is 4; it should be odd", lambda: neighbourhood_product(X, X, 4)),
        (r"query is torch.float64; it should be .*32, as key is", lambda: neighbourhood_product(X.double(), X, 3)),
    ],
)
def test_wrong_input(message: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
