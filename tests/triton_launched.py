# ruff: noqa: E402 (the driver is chosen before the imports that ask for one)
"""Launches of the Triton backend, through Triton's compiler and launcher, to a driver that runs nothing (fake_cuda.c;
test_triton.py runs this file in a process of its own).  What arrives at the driver is read back and compared with the
tensors: addresses, strides, sizes, types, the number of programs.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R reduced channels.
"""

import contextlib
import ctypes
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fake_driver
import pytest
import torch
import triton
from triton.backends.nvidia import driver as nvidia

FOLDER = tempfile.TemporaryDirectory()
triton.knobs.cache.dir = FOLDER.name  # what is built here is of no use to anyone else
fake = ctypes.CDLL(str(fake_driver.build(Path(FOLDER.name))))  # under the name that Triton's launcher looks for
triton.knobs.nvidia.libcuda_path = FOLDER.name


class Driver(nvidia.CudaDriver):  # torch answers for the stream and device otherwise, and sees no GPU
    def __init__(self) -> None:
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_device_capability = lambda device=0: (9, 0)
        self.get_current_stream = self.get_current_device = lambda device=0: 0
        self.set_current_device = lambda device: None


triton.runtime.driver.set_active(Driver())
os.environ["INVOLUTION_BACKEND"] = "triton"
torch.cuda.device = lambda device: contextlib.nullcontext()

from involution import Involution2d
from involution.ops import (
    involution2d,
    norm,
    span_involution2d,
    triton_backend,
    triton_gradients,
    triton_kernels,
    triton_norm,
)

triton_backend.unsupported = lambda input, kernel: None  # tensors on the CPU will do

B, C, G, K, H, W, R, STRIDE = 2, 16, 1, 3, 5, 9, 4, 2
HO, WO = 3, 5
GRAD = torch.randn(B, C, HO, 2 * WO)  # every second column of it: not contiguous
FUSED = ["forward_kernel", "grad_input_kernel", "grad_kernel_kernel"]
JITTED = [
    triton_kernels.forward_kernel,
    triton_kernels.grad_input_kernel,
    triton_gradients.grad_kernel_kernel,
]
NORM = ["statistics_kernel", "finish_statistics_kernel", "apply_kernel"]
NORM_BACKWARD = ["gradients_kernel", "finish_gradients_kernel", "apply_gradients_kernel"]
JITTED += [getattr(triton_norm, name) for name in NORM + NORM_BACKWARD]


class Launched(NamedTuple):
    """A launch as the driver sees it: pointers are addresses, tuples are strides. types: Triton's, of each argument."""

    name: str
    programs: int
    threads: int
    arguments: dict[str, Any]
    types: dict[str, Any]


def read(config: Any, function: int, parameters: Any) -> Launched:
    compiled = next(k for f in JITTED for k in f.device_caches[0][0].values() if k.function == function)
    source, remaining = compiled.src, iter(range(1000))

    def value(kind: Any, place: tuple[int, ...]) -> Any:
        if isinstance(kind, tuple):
            return tuple(value(inner, (*place, i)) for i, inner in enumerate(kind))
        if kind == "constexpr":
            return source.constants.get(place)
        sort = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}.get(kind, ctypes.c_uint64)
        return ctypes.cast(parameters[next(remaining)], ctypes.POINTER(sort)).contents.value

    arguments = {name: value(kind, (i,)) for i, (name, kind) in enumerate(source.signature.items())}
    assert config[1] == config[2] == 1
    return Launched(compiled.name, config[0], config[3], arguments, dict(source.signature))


@pytest.fixture
def launched() -> Iterator[list[Launched]]:
    """Every launch of the test, in order. A gradient of kernels in bfloat16, 9 of 16 values a pixel, becomes ones."""
    found: list[Launched] = []
    failures: list[BaseException] = []

    @ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p))
    def observe(config: Any, function: int, parameters: Any) -> None:
        try:
            found.append(read(config, function, parameters))
            name, _, _, a, types = found[-1]
            if name == "grad_kernel_kernel" and types["out"] == "*bf16":
                for pixel in range(B * HO * WO):
                    ctypes.memmove(a["out"] + 32 * pixel, (ctypes.c_uint16 * 9)(*[0x3F80] * 9), 18)
        except BaseException as error:  # an exception cannot pass through the C code
            failures.append(error)

    fake.fake_observe(observe)
    yield found
    assert not failures, failures


def check(launch: Launched, programs: int, sizes: dict[str, int], **tensors: torch.Tensor | None) -> None:
    """Sizes and tensors are what arrived, the latter with their strides and types; so is the number of programs."""
    a = launch.arguments
    assert {name: a[name] for name in sizes} == sizes
    assert launch.programs == programs
    assert launch.threads == 128
    for name, tensor in tensors.items():
        if tensor is None:
            assert a[name] is None
            continue
        assert a[name] == tensor.data_ptr(), name
        assert launch.types[name] == {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[tensor.dtype], name
        if f"{name}_strides" in a:
            assert a[f"{name}_strides"] == tensor.stride(), name


def tiles(launch: Launched, total: int) -> int:
    a = launch.arguments
    assert a["total"] == total
    return math.ceil(total / a["J"]) * math.ceil(a["G"] / a["GB"])


def random(*shape: int, dtype: torch.dtype, channels_last: bool = True) -> torch.Tensor:
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    return torch.randn(shape).to(dtype).to(memory_format=layout).requires_grad_()


SIZES = {"G": G, "GC": C // G, "K": K, "H": H, "W": W, "HO": HO, "WO": WO, "S": STRIDE, "P": 1, "D": 1}


def test_fused(launched: list[Launched]) -> None:
    x, reduced = (random(B, *shape, dtype=torch.bfloat16) for shape in ((C, H, W), (R, HO, WO)))
    weight, bias = random(G * K * K, R, 1, 1, dtype=torch.bfloat16), random(G * K * K, dtype=torch.bfloat16)
    out = span_involution2d(x, reduced, weight, bias, K, stride=STRIDE)
    grad = GRAD.to(torch.bfloat16)[..., ::2]
    grads = torch.autograd.grad(out, [x, reduced, weight, bias], grad)

    assert [launch.name for launch in launched] == FUSED
    forward, grad_input, grad_kernel = launched
    runs, sizes, span = B * HO, SIZES | {"R": R}, {"weight": weight, "bias": bias}
    check(forward, tiles(forward, runs), sizes, x=x, reduced=reduced, kernel=None, out=out, **span)
    strips = tiles(grad_input, B * 3 * 3)  # rows of a parity x runs of 4 of the input's 9 columns
    check(grad_input, 2 * strips, sizes, grad=grad, reduced=reduced, kernel=None, out=grads[0], **span)
    check(grad_kernel, tiles(grad_kernel, runs), SIZES, x=x, grad=grad)
    assert grad_kernel.arguments["out_strides"][1:] == (9, 3, 1, 16 * WO, 16)  # a pixel's nine taps lie in 16
    for_reduced = weight.sum((0, 2, 3)).expand(B, HO, WO, R).permute(0, 3, 1, 2)  # of ones
    for_weight = reduced.sum((0, 2, 3)).expand(G * K * K, R)[..., None, None]
    close = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(grads[1], for_reduced, **close)
    torch.testing.assert_close(grads[2], for_weight, **close)
    assert (grads[3] == B * HO * WO).all()


def test_fused_of_many_hidden_channels(launched: list[Launched]) -> None:
    """The input's gradient has its kernels from memory."""
    x, reduced = (random(B, *shape, dtype=torch.bfloat16) for shape in ((C, H, W), (128, HO, WO)))
    weight = random(G * K * K, 128, 1, 1, dtype=torch.bfloat16)
    out = span_involution2d(x, reduced, weight, None, K, stride=STRIDE)
    grads = torch.autograd.grad(out, [x, reduced, weight], GRAD.to(torch.bfloat16)[..., ::2])
    assert [launch.name for launch in launched] == FUSED
    _, grad_input, grad_kernel = launched
    check(grad_input, 2 * tiles(grad_input, B * 3 * 3), SIZES, reduced=None, weight=None, bias=None, out=grads[0])
    check(grad_kernel, tiles(grad_kernel, B * HO), SIZES, x=x)


def test_plain_and_its_gradients_one_by_one(launched: list[Launched]) -> None:
    x = random(B, C, H, W, dtype=torch.float32, channels_last=False)
    kernel = torch.randn(B, G, K, K, HO, WO, requires_grad=True)
    out = involution2d(x, kernel, stride=STRIDE)
    grad = GRAD[..., ::2]
    for_input, for_kernel = torch.autograd.grad(out, [x, kernel], grad)
    transposed = torch.ops.involution.involution2d_transpose(grad, kernel.detach(), H, W, STRIDE, 1, 1)
    product = torch.ops.involution.neighbourhood_product(grad, x.detach(), K, G, STRIDE, 1, 1)

    forward, grad_input, grad_kernel, again, scores = launched
    check(forward, tiles(forward, B * HO), SIZES, x=x, kernel=kernel, reduced=None, weight=None, bias=None, out=out)
    for launch, result in ((grad_input, for_input), (again, transposed)):
        check(launch, 2 * tiles(launch, B * 3 * 3), SIZES, grad=grad, kernel=kernel, reduced=None, out=result)
    for launch, result in ((grad_kernel, for_kernel), (scores, product)):
        check(launch, tiles(launch, B * HO), SIZES, grad=grad, x=x, out=result)
    assert transposed.shape == x.shape
    assert product.shape == kernel.shape


def test_a_layer_under_autocast(launched: list[Launched]) -> None:
    """Float32 weights and images become bfloat16 at the operator, and their gradients float32 again."""
    layer = Involution2d(C, K, stride=STRIDE).to(memory_format=torch.channels_last)
    x = random(B, C, H, W, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.backward(GRAD.to(torch.bfloat16)[..., ::2])
    assert [launch.name for launch in launched] == FUSED
    for launch in launched:
        pointers = {name: kind for name, kind in launch.types.items() if str(kind).startswith("*")}
        assert set(pointers.values()) == {"*bf16"}
    assert out.dtype == torch.bfloat16
    assert x.grad is not None
    assert {x.grad.dtype} | {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in layer.parameters())


def test_batch_norm_residual_and_relu(launched: list[Launched]) -> None:
    """80 channels in two chunks, 4000 rows in as many programs as there are 32 rows."""
    x, skip = (random(4, 80, 25, 40, dtype=torch.bfloat16) for _ in range(2))
    layer = torch.nn.BatchNorm2d(80)
    out = norm.norm_relu(x, layer, skip)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, [x, skip, layer.weight, layer.bias], grad)

    sums, finish, apply, grad_sums, grad_finish, grad_apply = launched
    assert [launch.name for launch in launched] == NORM + NORM_BACKWARD
    images, sizes = {"x": x, "skip": skip, "out": out}, {"rows": 4000, "C": 80}
    check(sums, 2 * 125, sizes | {"per": 32, "chunks": 2}, x=x)
    weights = {"weight": layer.weight, "bias": layer.bias}
    statistics = {"running_mean": layer.running_mean, "running_var": layer.running_var}
    check(finish, 3, sizes | {"P": 125, "PP": 128, "per": 32}, **weights, **statistics)  # 32 channels each
    check(apply, 2 * 125, sizes, **images)
    check(grad_sums, 2 * 250, sizes | {"per": 16}, x=x, out=out, grad=grad, masked=grads[1])
    check(grad_finish, 5, sizes | {"P": 250}, grad_weight=grads[2], grad_bias=grads[3])
    check(grad_apply, 2 * 125, sizes | {"MASK": False}, x=x, grad=grads[1], out=grads[0])
    coefficients = {launch.arguments["coefficients"] for launch in launched[1:]}
    assert len(coefficients) == 1
    assert {sums.arguments["parts"], grad_sums.arguments["parts"]} >= {finish.arguments["parts"]}


def test_only_the_gradient_that_is_asked_for(launched: list[Launched]) -> None:
    x, kernel = torch.randn(B, C, H, W), torch.randn(B, G, K, K, HO, WO, requires_grad=True)
    involution2d(x, kernel, stride=STRIDE).backward(GRAD[..., ::2])
    assert [launch.name for launch in launched] == ["forward_kernel", "grad_kernel_kernel"]


def test_nothing_is_launched_for_an_empty_batch(launched: list[Launched]) -> None:
    x, kernel = torch.randn(0, C, H, W, requires_grad=True), torch.randn(0, G, K, K, HO, WO)
    involution2d(x, kernel, stride=STRIDE).sum().backward()
    assert launched == []
