"""Builds the C++ operator with the user's compiler on first use and keeps it in a cache.

The file name carries a hash of the sources, the flags and the compiler, so a stale library is never loaded. It is
written under a temporary name and renamed: processes that build at the same time do not disturb each other.

`INVOLUTION_CACHE` sets the folder (see `involution.cache`), `CXX` the compiler.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from involution.cache import cache_dir, writable_cache_dir

logger = logging.getLogger("involution.ops")

_SOURCES = Path(__file__).parent / "csrc"
# No -ffast-math: with -shared it makes the whole process flush denormals to zero. -O3 takes five times as long as -O2
# for the same speed: what must be unrolled is unrolled in the sources.
_FLAGS = "-std=gnu++17 -O2 -ftree-vectorize -ffp-contract=fast -fno-math-errno -fno-trapping-math -fPIC -Wno-psabi"
_INSTRUCTION_FLAGS = {
    "AVX512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma",
    "AVX2": "-mavx2 -mfma",
    "plain": "",
}


class BuildError(RuntimeError):
    """The C++ operator cannot be built or loaded; the message says why."""


def instruction_set() -> str:
    """The best level this machine runs, as torch sees it (so `ATEN_CPU_CAPABILITY` lowers it here too)."""
    level = torch.backends.cpu.get_cpu_capability()
    return level if level in _INSTRUCTION_FLAGS else "plain"


@functools.cache
def library(level: str) -> ctypes.CDLL:
    """The operator for an instruction set, loaded, after building it if it is not in the cache.

    Raises:
        BuildError: there is no compiler, or the build or the loading failed.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("there is no C++ compiler (g++, or the one CXX names)")
    flags = [*_FLAGS.split(), *_INSTRUCTION_FLAGS[level].split()]
    name = f"involution-{level.lower()}-{_hash(compiler, flags)}.so"
    path = cache_dir() / name
    if path.exists():
        try:
            return _load(path)
        except OSError as error:
            logger.warning("building the CPU operator again: %s cannot be loaded (%s)", path, error)
    path = writable_cache_dir() / name
    _build(compiler, flags, path)
    try:
        return _load(path)
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error


def _hash(compiler: str, flags: list[str]) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    for part in (version, platform.machine().encode(), " ".join(flags).encode()):
        digest.update(part + b"\0")
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _build(compiler: str, flags: list[str], path: Path) -> None:
    """Compiles and links. The link leaves OpenMP open: it resolves to the one torch has loaded, so that both share one
    pool of threads; a second OpenMP beside it would spin against torch's threads."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as name:
        built, linked = str(Path(name) / "involution.o"), Path(name) / path.name
        _run([compiler, *flags, "-fopenmp", "-c", str(_SOURCES / "involution.cpp"), "-o", built])
        _run([compiler, "-shared", built, "-o", str(linked)])
        os.replace(linked, path)
    logger.info("built the CPU operator in %.0f s: %s", time.perf_counter() - started, path)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise BuildError(f"{command[0]} failed: {detail.strip()[:800]}") from error


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)  # a torch that does not use OpenMP
        return ctypes.CDLL(str(path))
