"""The package as installed: what is in the wheel, what an import costs, and what it works without."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from models_common import fitted
from programs import ROOT
from reliability import write_images

import involution

HEAVY = (
    "hydra", "omegaconf", "data", "timm", "torchvision", "safetensors", "PIL", "nvidia.dali", "tensorboard",
    "matplotlib",
)  # fmt: skip
#: runs a program where modules cannot be imported: python -c WITHOUT module,module program argument ...
WITHOUT = """
import runpy, sys
gone = tuple(sys.argv[1].split(","))
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = any(name == module or name.startswith(module + ".") for module in gone)
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
sys.argv = sys.argv[2:]
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Run Python; returns what it printed."""
    command = [sys.executable, *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_takes_little_more_than_torch_and_no_connection():
    code = (
        "import socket, sys, torch\n"
        "def refuse(*_): raise SystemExit('a connection')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "before = set(sys.modules)\n"
        "import involution\n"
        f"print([name for name in {HEAVY} if name in set(sys.modules) - before])\n"
        "import timm\n"
        "timm.create_model('rednet26')"
    )
    assert python("-c", code, cwd=ROOT).strip() == "[]"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that the wheel was installed into."""
    for package in ("pip", "setuptools"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"building the wheel without the network needs {package}")
    work = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "involution", work / "source/involution", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work / "source")
    quiet = ("-m", "pip", "--disable-pip-version-check", "--no-input")
    python(*quiet, "wheel", "./source", "--no-deps", "--no-build-isolation", "-w", "wheels", cwd=work)
    [wheel] = (work / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    sources = {
        p.relative_to(work / "source").as_posix() for p in (work / "source/involution").rglob("*") if p.is_file()
    }
    sources = {name for name in sources if not name.startswith("involution/engine/")}  # wants data/ and conf/
    assert packed == sources, "every source, C++ included, and nothing else"
    assert {f"involution/ops/csrc/{p.name}" for p in (ROOT / "involution/ops/csrc").iterdir()} <= packed
    python(*quiet, "install", "--no-deps", "--no-index", "--target", "site", str(wheel), cwd=work)
    return work / "site"


def test_the_wheel_works_outside_of_the_repository(installed, tmp_path):
    """Detectors too, without any compiled extension of others (complaint 3)."""
    torch.manual_seed(0)
    model = fitted(involution.create_model("rednet26", num_classes=4, kernel_size=3))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    images = torch.randn(2, 3, 40, 32)
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "expected.pt")
    code = (
        "import involution, torch; from PIL import Image\n"
        "print(involution.__file__)\n"
        "model, transform, names = involution.load('weights.pth')\n"
        "images, expected = torch.load('expected.pt')\n"
        "with torch.no_grad(): torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)\n"
        "assert transform(Image.new('RGB', (300, 260))).shape == (3, 224, 224) and names == ('0', '1', '2', '3')\n"
        "with torch.device('meta'): involution.create_model('mask_rcnn', neck='involution', head='involution')"
    )
    where = python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(where.strip()).is_relative_to(installed)


def test_training_goes_without_dali_tensorboard_timm_and_a_compiler(tmp_path):
    images = write_images(tmp_path / "images", val=3)
    gone = "nvidia,timm,tensorboard,wandb,matplotlib,safetensors,onnx,sklearn,submitit,pyarrow"
    words = (
        "train.py recipe=demo data=folder data.loader=torch data.workers=0 device=cpu train.max_steps=1 name=bare "
        "data.train_size=32 data.val_size=32 data.val_resize=32 model.kernel_size=3"
    )
    printed = python(
        "-c", WITHOUT, gone, *words.split(), f"data.root={images}", f"output_root={tmp_path}",
        cwd=ROOT, CXX="no-such-compiler", INVOLUTION_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert '"steps": 1' in printed
