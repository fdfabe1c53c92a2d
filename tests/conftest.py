"""What all tests share: a fresh process, the order of the files, real images."""

import logging
import os
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from programs import kill_what_runs

from involution.ops import build

with suppress(ImportError):  # before anything imports distutils: torch's compiler driver fails otherwise
    import setuptools  # noqa: F401

# what the shell, or a launcher that the tests run under, has set: a test that needs one of these sets it itself
for _name in list(os.environ):
    if _name.startswith(("MALLOC_", "SLURM_", "WANDB_")) or _name in (
        "GLIBC_TUNABLES", "INVOLUTION_BACKEND", "LOCAL_RANK", "RANK", "TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE",
    ):  # fmt: skip
        del os.environ[_name]

#: the files that take longest; workers take files in order (--no-loadscope-reorder in pyproject.toml)
FIRST = ("test_launchers.py", "test_resume.py", "test_docs.py", "test_train.py", "test_recipes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_runtest_teardown() -> None:
    """Programs that a test left running end here; a hook, for fixtures are not reached where another one failed."""
    kill_what_runs()


@pytest.fixture(autouse=True)
def _fresh_process() -> None:
    """One thread, and torch's switches and the log as they are before a program sets them, whatever ran here before."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    log = logging.getLogger("involution")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
    log.propagate = True


LEVELS = ("plain", "AVX2", "AVX512")


@pytest.fixture(params=LEVELS[: LEVELS.index(build.instruction_set()) + 1])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The C++ code runs at this level."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(build, "instruction_set", lambda: request.param)
    return request.param


def _unpack(pattern: str, folder: Path) -> Path:
    packs = os.environ.get("INVOLUTION_DATASETS")
    if not packs:
        pytest.skip("INVOLUTION_DATASETS is not set (a folder with the packs of real images)")
    found = sorted(Path(packs).glob(pattern))
    if not found:
        pytest.skip(f"INVOLUTION_DATASETS has no {pattern}")
    for pack in found:
        with tarfile.open(pack) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # type: ignore[assignment]  # new in 3.11.4
            archive.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def imagenette(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5000 + 1000 photos of ten ImageNet classes: train/<wnid>/*.JPEG, val/<wnid>/*.JPEG."""
    return _unpack("imagenette224-*.tar", tmp_path_factory.mktemp("imagenette"))


@pytest.fixture(scope="session")
def edge_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight odd real files: a GIF among JPEGs, progressive, Adobe, Exif, blanks and parentheses in names."""
    return _unpack("edge-case-images.tar", tmp_path_factory.mktemp("edge-cases"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """51 full-size COCO photos in COCO's layout."""
    return _unpack("coco2017-mini-free.tar", tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 street frames in Cityscapes' layout."""
    return _unpack("camvid-cityscapes-layout.tar", tmp_path_factory.mktemp("camvid"))
