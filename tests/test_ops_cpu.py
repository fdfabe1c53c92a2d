"""The CPU backends against the reference, at every instruction set this machine runs; the build and its failures."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from involution.ops import build, composed, cpu, reference, shifted
from involution.ops.shapes import output_size

# B C H W G K stride dilation padding: stage shapes cut down, then odd sizes, strips of every length, G = 1 and G = C,
# groups that fill no register, K from 1 to 9, windows wholly outside the image, more padding than half a window.
CASES = [
    (1, 32, 9, 30, 2, 7, 1, 1, 3),
    (2, 64, 7, 7, 4, 7, 1, 1, 3),
    (1, 48, 9, 15, 3, 7, 2, 1, 3),
    (3, 16, 5, 13, 1, 5, 1, 1, 2),
    (1, 32, 6, 11, 2, 3, 1, 1, 1),
    (1, 32, 8, 11, 1, 3, 2, 2, 2),
    (1, 30, 5, 9, 10, 5, 1, 3, 6),
    (2, 9, 4, 7, 9, 3, 1, 1, 1),
    (1, 21, 3, 5, 1, 9, 1, 1, 4),
    (1, 16, 4, 6, 1, 1, 1, 1, 0),
    (1, 8, 1, 1, 2, 7, 1, 1, 3),
    (1, 16, 9, 9, 2, 3, 3, 1, 0),
    (1, 16, 3, 4, 1, 3, 1, 1, 4),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@pytest.fixture
def cpp(instruction_set: str) -> ModuleType:
    """The C++ backend at one instruction set."""
    return cpu


def _close(found: Tensor | None, expected: Tensor, dtype: torch.dtype) -> None:
    assert found is not None
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], f"{error:.2e}"


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def _pixels_last(tensor: Tensor) -> Tensor:
    """The same values, in memory pixel by pixel."""
    return tensor.movedim((-2, -1), (1, 2)).contiguous().movedim((1, 2), (-2, -1))


def _parity(backend: ModuleType, case: tuple[int, ...], dtype: torch.dtype, pixels_last: bool) -> None:
    batch, channels, height, width, groups, size, stride, dilation, padding = case
    out = [output_size(n, size, stride, padding, dilation) for n in (height, width)]
    arranged = _pixels_last if pixels_last else (lambda t: t)
    x = arranged(_random(batch, channels, height, width, dtype=dtype))
    kernel = arranged(_random(batch, groups, size, size, *out, dtype=dtype))
    grad = _random(batch, channels, *out, dtype=dtype)
    options = (stride, padding, dilation)
    _close(backend.forward(x, kernel, *options), reference.forward(x.double(), kernel.double(), *options), dtype)
    found = backend.backward(grad, x, kernel, *options, True, True)
    expected = reference.backward(grad.double(), x.double(), kernel.double(), *options, True, True)
    alone = backend.transpose(grad, kernel, height, width, *options), backend.product(grad, x, size, groups, *options)
    for ours, theirs in zip((*found, *alone), (*expected, *expected), strict=True):
        _close(ours, theirs, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(cpp: ModuleType, case: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for pixels_last in (True, False):
            _parity(cpp, case, dtype, pixels_last)
    _parity(cpp, case, torch.float16, True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity_of_shifted_slices(case: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for dtype in TOLERANCE:
        _parity(shifted, case, dtype, dtype != torch.float64)


def _fused_parity(case: tuple[int, ...], hidden: int, dtype: torch.dtype) -> None:
    batch, channels, height, width, groups, size, stride, dilation, padding = case
    out = [output_size(n, size, stride, padding, dilation) for n in (height, width)]
    x, reduced = (
        _pixels_last(_random(batch, c, *hw, dtype=dtype)) for c, hw in ((channels, (height, width)), (hidden, out))
    )
    weight, bias = (
        _random(groups * size * size, hidden, 1, 1, dtype=dtype),
        _random(groups * size * size, dtype=dtype),
    )
    grad = _random(batch, channels, *out, dtype=dtype)
    for operands in ((x, reduced, weight, bias), (x, reduced, weight, None)):
        options = (size, stride, padding, dilation)
        wide = [None if t is None else t.double() for t in operands]
        expected = composed.span_forward(reference, *wide, *options)
        _close(cpu.span_forward(*operands, *options), expected, dtype)
        found = cpu.span_backward(grad, *operands, *options)
        gradients = composed.span_backward(reference, grad.double(), *wide, *options)
        for ours, theirs, like in zip(found, gradients, operands, strict=True):
            assert (ours is None) == (like is None)
            if like is not None:
                _close(ours, theirs, dtype)


@pytest.mark.parametrize("hidden", [1, 16, 20])
@pytest.mark.parametrize("case", CASES[:9], ids=str)
def test_fused_parity(cpp: ModuleType, case: tuple[int, ...], hidden: int) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        _fused_parity(case, hidden, dtype)


@pytest.mark.slow
def test_bfloat16_where_the_processor_does_not_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX512 without BF16, as most servers have it."""
    if build.instruction_set() != "AVX512":
        pytest.skip("this processor has no AVX512")
    monkeypatch.setitem(build._INSTRUCTION_FLAGS, "AVX512-alone", build._INSTRUCTION_FLAGS["AVX512"])
    monkeypatch.setattr(build, "instruction_set", lambda: "AVX512-alone")
    assert not build.multiplies_half(build.instruction_set())
    torch.manual_seed(0)
    for case in CASES:
        _parity(cpu, case, torch.bfloat16, True)
    for case in CASES[:9]:
        _fused_parity(case, 16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int, dtype: torch.dtype) -> None:
    """The forward is bit-equal for any number of threads; the backward repeats itself bit for bit."""
    torch.manual_seed(0)
    x, reduced, grad = (_random(3, c, 9, 8, dtype=dtype) for c in (48, 12, 48))
    weight, bias = _random(3 * 49, 12, 1, 1, dtype=dtype), _random(3 * 49, dtype=dtype)
    options = (7, 1, 3, 1)
    alone = cpu.span_forward(x, reduced, weight, bias, *options)
    torch.set_num_threads(threads)
    assert torch.equal(cpu.span_forward(x, reduced, weight, bias, *options), alone)
    first = cpu.span_backward(grad, x, reduced, weight, bias, *options)
    again = cpu.span_backward(grad, x, reduced, weight, bias, *options)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


PROGRAM = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from involution.ops import involution2d, reference
x, k = torch.randn(1, 16, 7, 7), torch.randn(1, 1, 3, 3, 7, 7)
for _ in range(2):
    torch.testing.assert_close(involution2d(x, k), reference.involution2d(x, k, 1, 1, 1))
print("right")
"""


def _program(**environment: str) -> subprocess.Popen[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("CXX", "INVOLUTION_BACKEND")}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**inherited, **environment},
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_several_processes_build_into_an_empty_cache(tmp_path: Path) -> None:
    if build.shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    # The plain level builds fastest.
    running = [_program(INVOLUTION_CACHE=str(tmp_path), ATEN_CPU_CAPABILITY="default") for _ in range(2)]
    for process in running:
        out, err = process.communicate()
        assert (process.returncode, out) == (0, "right\n"), err
        assert "Warning" not in err
        assert err.count("built the CPU operator") == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".o", ".so"]


def test_damaged_library_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if build.shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setenv("INVOLUTION_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    path = tmp_path / f"{build._compilation('plain')[2]}.so"
    path.write_bytes(b"half a library")
    assert build.library.__wrapped__("plain").involution_chunks
    assert "cannot be loaded" in caplog.text
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("compiler", ["absent", "broken"])
def test_without_a_working_compiler_one_warning_and_right_numbers(tmp_path: Path, compiler: str) -> None:
    if compiler == "broken":
        (tmp_path / "g++").write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
        (tmp_path / "g++").chmod(0o755)
    process = _program(PATH=str(tmp_path), INVOLUTION_CACHE=str(tmp_path / "cache"))
    out, err = process.communicate()
    assert (process.returncode, out) == (0, "right\n"), err
    assert err.count("the CPU operator runs as slower torch operations") == 1
    assert ("no space left" if compiler == "broken" else "there is no C++ compiler") in err
