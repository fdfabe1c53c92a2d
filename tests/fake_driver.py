"""Builds fake_cuda.c, NVIDIA's driver without a GPU."""

import subprocess
from pathlib import Path


def build(folder: Path) -> Path:
    """The library, which Triton finds where `folder` is its `TRITON_LIBCUDA_PATH`."""
    library = folder / "libcuda.so.1"
    options = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run(["gcc", *options, str(Path(__file__).parent / "fake_cuda.c")], check=True)
    return library
