"""AOTInductor packages: the operator's C++ kernels inside, from Python and from docs/classify.cpp."""

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from models_common import fitted
from PIL import Image
from torch import nn

from involution import Involution2d, export, packages
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


def plain(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), Involution2d(16, 3)]
    return fitted(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())).to(dtype)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory) -> Path:
    """A package without our kernels, which the compiler refuses."""
    folder = tmp_path_factory.mktemp("fallback")
    compiler = folder / "g++"
    refused = "*csrc/involution.cpp*|*csrc/package.cpp*) echo too old >&2; exit 1"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in {refused};; esac\nexec {shutil.which("g++")} "$@"\n')
    compiler.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(compiler))
        patch.setenv("INVOLUTION_CACHE", str(folder / "cache"))
        with pytest.warns(UserWarning, match=r"slower, of standard operators: .*too old"):
            export.export_aoti(plain(), folder / "model.pt2")
    return folder / "model.pt2"


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> str:
    """docs/classify.cpp, compiled."""
    folder = Path(torch.__file__).parent
    libraries = [f"-L{folder}/lib", f"-Wl,-rpath,{folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    source, made = str(ROOT / "docs" / "classify.cpp"), str(tmp_path_factory.mktemp("program") / "classify")
    subprocess.run(["g++", "-std=c++20", source, "-o", made, f"-I{folder}/include", *libraries], check=True)
    return made


def altered(package: Path, to: Path, **changes: str) -> Path:
    """The package with other metadata."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("_metadata.json"):
                content = json.dumps(json.loads(content) | changes).encode()
            new.writestr(name, content)
    return to


@pytest.mark.slow
def test_it_computes_what_the_model_does_with_our_kernels(model, package):
    loaded = packages.load(package)
    for size in SIZES:
        images = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)
    assert loaded.get_metadata()["class_names"] == "cat\nbig dog\nnewt"
    content = package.read_bytes()
    assert all(content.count(f"aoti_torch_cpu_{name}(".encode()) for name in packaged._INTEGERS)
    assert "LIBRARY_PATH" not in os.environ


@pytest.mark.slow
def test_a_program_in_cpp_classifies_a_picture(model, package, program, tmp_path):
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
    refused = subprocess.run([program, str(package), str(package)], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (2, "error: no P6 picture\n")


@pytest.mark.slow
@pytest.mark.parametrize("made", ["package", "fallback"])
def test_a_package_for_another_machine_is_refused_before_it_runs(made, request, program, tmp_path):
    package = request.getfixturevalue(made)
    needs = packages.load(package).get_metadata()["instructions"]
    assert ("avx2" in needs) == (torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"))
    other = altered(package, tmp_path / "other.pt2", instructions=f"{needs} avx512-new")
    advice = "which this one lacks; export it on a machine like this one"
    with pytest.raises(ValueError, match=f"compiled for a processor with avx512-new, {advice}"):
        packages.load(other)
    refused = subprocess.run([program, str(other), "photo.ppm"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: the package was compiled for a processor with avx512new, " + advice)
    with pytest.raises(ValueError, match=rf"compiled for a toaster; .* like this one, {platform.machine()}"):
        packages.load(altered(package, tmp_path / "other.pt2", AOTI_MACHINE="a toaster"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="compiled for a GPU, and torch sees none here"):
            packages.load(altered(package, tmp_path / "other.pt2", AOTI_DEVICE_KEY="cuda"))


@pytest.mark.slow
def test_a_package_without_our_kernels_computes_the_same(fallback):
    images = torch.randn(SIZES[1])
    with torch.no_grad():
        torch.testing.assert_close(packages.load(fallback)(images), plain()(images), rtol=1e-4, atol=1e-5)
    assert b"aoti_torch_cpu_involution2d" not in fallback.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-9)])
def test_packages_in_other_types(dtype, tolerance, tmp_path):
    model, images = plain(dtype), torch.randn(SIZES[1]).to(dtype)
    export.export_aoti(model, tmp_path / "model.pt2")
    with torch.no_grad():
        found, expected = packages.load(tmp_path / "model.pt2")(images), model(images)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_what_is_no_package_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*none.pt2"):
        packages.load(tmp_path / "none.pt2")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt2")
    with pytest.raises(ValueError, match=r"is no compiled package; scripts/export\.py --format aoti makes one"):
        packages.load(tmp_path / "weights.pt2")


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
    path = build.package_object(build.instruction_set(), [name])
    subprocess.run(["g++", "-shared", path, "-o", tmp_path / "package.so"], check=True)
    code = f"import ctypes; ctypes.CDLL({str(tmp_path / 'package.so')!r}, 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: this package was compiled for a processor with {name}, which this one")


def test_without_a_compiler_it_says_what_else_there_is(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .* --format torch or onnx needs none"):
        export.export_aoti(nn.Conv2d(3, 3, 1), tmp_path / "model.pt2")
