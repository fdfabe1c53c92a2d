"""AOTInductor packages: the operator's C++ kernels inside, from Python and from docs/classify.cpp."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_common import fitted
from PIL import Image
from torch import nn

from involution import Involution2d, export
from involution.loading import evaluation_transform
from involution.ops import build, packaged

ROOT = Path(__file__).resolve().parents[1]
SIZES = [(3, 3, 64, 64), (1, 3, 70, 65), (2, 3, 33, 90)]
PREPARATION = {"val_size": 48, "val_resize": 56, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A layer that is folded, one with plain kernels, and one with attention's: each of the three operators."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [Involution2d(32, 7), nn.BatchNorm2d(32), nn.ReLU(), Involution2d(32, 3, stride=2)]
    layers += [Involution2d(32, 3, kernel_generation="attention")]
    return fitted(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)))


@pytest.fixture(scope="module")
def package(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    export.export_aoti(model, path, class_names=["cat", "big dog", "newt"], preparation=PREPARATION)
    return path


@pytest.mark.slow
def test_it_computes_what_the_model_does_with_our_kernels(model, package):
    loaded = torch._inductor.aoti_load_package(str(package))
    for size in SIZES:
        images = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)
    assert loaded.get_metadata()["class_names"] == "cat\nbig dog\nnewt"
    content = package.read_bytes()
    assert all(content.count(f"aoti_torch_cpu_{name}(".encode()) for name in packaged._INTEGERS)
    assert "LIBRARY_PATH" not in os.environ


@pytest.mark.slow
def test_a_program_in_cpp_classifies_a_picture(model, package, tmp_path):
    torch_folder = Path(torch.__file__).parent
    libraries = [f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    source, program = str(ROOT / "docs" / "classify.cpp"), str(tmp_path / "classify")
    subprocess.run(["g++", "-std=c++20", source, "-o", program, f"-I{torch_folder}/include", *libraries], check=True)
    gradient = torch.linspace(0, 255, 90 * 70 * 3).view(70, 90, 3).byte()
    Image.fromarray(gradient.numpy()).save(tmp_path / "photo.ppm")
    done = subprocess.run([program, str(package), str(tmp_path / "photo.ppm")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        pixels = evaluation_transform(**PREPARATION)(Image.open(tmp_path / "photo.ppm"))
        share, best = model(pixels[None]).softmax(1)[0].max(0)
    name, _, told = done.stdout.strip().rpartition(" ")
    assert name == ["cat", "big dog", "newt"][best]
    assert float(told) == pytest.approx(share.item(), abs=0.01)  # Pillow resizes in levels of 8 bits
    refused = subprocess.run([program, str(package), source], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (2, "error: no P6 picture\n")


def lacking(folder: Path) -> str | None:
    """Instructions that the compiler knows and this processor lacks; compilers forget those that few ever had."""
    program = str(folder / "asks")
    for name in ("avx5124fmaps", "fma4", "xop", "avx512vp2intersect"):
        source = f'int main() {{ return __builtin_cpu_supports("{name}") != 0; }}'
        compiled = subprocess.run(["g++", "-x", "c++", "-", "-o", program], input=source.encode(), capture_output=True)
        if compiled.returncode == 0 and subprocess.run([program]).returncode == 0:
            return name
    return None


def test_a_package_says_which_instructions_a_processor_lacks(tmp_path):
    if os.uname().machine != "x86_64":
        pytest.skip("only on x86-64 are there levels of instructions")
    if (name := lacking(tmp_path)) is None:
        pytest.skip("this processor has all the instructions that were tried and that g++ knows")
    path = build.package_object(build.instruction_set(), [f"-m{name}"])
    subprocess.run(["g++", "-shared", path, "-o", tmp_path / "package.so"], check=True)
    code = f"import ctypes; ctypes.CDLL({str(tmp_path / 'package.so')!r}, 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: this package was compiled for a processor with {name}, which this one")


def test_without_a_compiler_it_says_what_else_there_is(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .* --format torch or onnx needs none"):
        export.export_aoti(nn.Conv2d(3, 3, 1), tmp_path / "model.pt2")
    with pytest.raises(ValueError, match=r"should be called \*.pt2"):
        export.export_aoti(nn.Conv2d(3, 3, 1), tmp_path / "model.so")


def test_where_the_kernels_cannot_be_built_standard_operators_stand_in(monkeypatch, tmp_path):
    def fail(*_: object) -> Path:
        raise build.BuildError("no space left")

    monkeypatch.setattr(build, "package_object", fail)
    compiled = []
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, **_: compiled.append(program))
    with pytest.warns(UserWarning, match="slower, of standard operators: no space left"):
        export.export_aoti(Involution2d(16, 3).eval(), tmp_path / "model.pt2")
    assert not any("involution" in str(node.target) for node in compiled[0].graph.nodes)
