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
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
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


def instruction_flags(level: str) -> list[str]:
    """The compiler's flags for a level."""
    return _INSTRUCTION_FLAGS[level].split()


@functools.cache
def multiplies_half(level: str) -> bool:
    """Whether matrices of bfloat16 are multiplied as they are there."""
    return level == "AVX512" and torch.cpu._is_avx512_bf16_supported()


@functools.cache
def library(level: str, half: bool = False) -> ctypes.CDLL:
    """The operator for an instruction set, loaded, after building it if it is not in the cache.

    Args:
        level: what ``instruction_set`` says.
        half: the one for bfloat16; else the one for float32 and float64.

    Raises:
        BuildError: there is no compiler, or the build or the loading failed.
    """
    compiler, flags, name = _compilation(level, half)
    path = cache_dir() / f"{name}.so"
    if path.exists():
        try:
            return _load(path)
        except OSError as error:
            logger.warning("building the CPU operator again: %s cannot be loaded (%s)", path, error)
    path = writable_cache_dir() / path.name
    _build(path, lambda to: _run([compiler, "-shared", str(_kernels(compiler, flags, name)), "-o", to]))
    try:
        return _load(path)
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error


def package_object(level: str, needs: Sequence[str] = ()) -> Path:
    """An object file for AOTInductor packages: the operator and csrc/package.cpp, which asks at loading for the
    instructions `needs` (avx2 ...).

    Raises:
        BuildError: as above.
    """
    compiler, flags, name = _compilation(level)
    needed = " ".join(f'NEED("{name}")' for name in needs)
    include = Path(torch.__file__).parent / "include"
    own = ["-std=gnu++20", "-O2", "-fPIC", "-fopenmp", f"-I{include}", f"-DNEEDS={needed}"]
    told = hashlib.sha256(f"{torch.__version__} {own}".encode()).hexdigest()[:8]
    path = writable_cache_dir() / f"{name}-package-{told}.o"

    def write(to: str) -> None:
        _run([compiler, *own, "-c", str(_SOURCES / "package.cpp"), "-o", f"{to}.entries"])
        _run([compiler, "-r", "-nostdlib", f"{to}.entries", str(_kernels(compiler, flags, name)), "-o", to])

    if not path.exists():
        _build(path, write)
    return path


def _compilation(level: str, half: bool = False) -> tuple[str, list[str], str]:
    """The compiler, its flags, and a name that tells both and the sources."""
    named, *options = shlex.split(os.environ.get("CXX") or "g++")  # "ccache g++", "g++ -m64"
    compiler = shutil.which(named)
    if compiler is None:
        raise BuildError("there is no C++ compiler (g++, or the one CXX names)")
    flags = [*options, *_FLAGS.split(), *instruction_flags(level)]
    if half:
        flags += ["-DINVOLUTION_HALF", *["-mavx512bf16"] * multiplies_half(level)]
    return compiler, flags, f"involution-{level.lower()}{'-bf16' * half}-{_hash(compiler, flags)}"


def _kernels(compiler: str, flags: list[str], name: str) -> Path:
    """The compiled kernels, which take longest. What links them leaves OpenMP open: it resolves to the one torch has
    loaded, so that both share one pool of threads; a second OpenMP beside it would spin against torch's threads."""
    path = writable_cache_dir() / f"{name}.o"
    if not path.exists():
        started = time.perf_counter()
        _build(path, lambda to: _run([compiler, *flags, "-fopenmp", "-c", str(_SOURCES / "involution.cpp"), "-o", to]))
        logger.info("built the CPU operator in %.0f s: %s", time.perf_counter() - started, path)
    return path


def _hash(compiler: str, flags: list[str]) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    for part in (version, platform.machine().encode(), " ".join(flags).encode()):
        digest.update(part + b"\0")
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _build(path: Path, write: Callable[[str], None]) -> None:
    """Has `write` write to a temporary file, which becomes `path`."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        write(str(Path(folder) / path.name))
        os.replace(Path(folder) / path.name, path)


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
