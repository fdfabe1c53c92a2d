"""Compiled packages (``export.export_aoti``) in Python, where torch and this processor are those they need."""

import json
import platform
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def load(path: str | Path) -> Any:
    """The program of a package: images (B, C, H, W) of the exported model's type and device -> logits (B, N).

    Its ``get_metadata()`` has the names of the classes and the preparation of pictures, in words.

    Raises:
        ValueError: the file is no package, or one for another machine: the message says what this one lacks.
    """
    about = _metadata(Path(path))
    machine = platform.machine()
    if (other := about.get("AOTI_MACHINE", machine)) != machine:
        raise ValueError(f"{path} was compiled for {other}; export it on a machine like this one, {machine}")
    if lacking := _lacking(about.get("instructions", "").split()):
        raise ValueError(
            f"{path} was compiled for a processor with {', '.join(lacking)}, which this one lacks; export it on a "
            "machine like this one, or with ATEN_CPU_CAPABILITY=avx2 in the environment for any processor with AVX2"
        )
    if about.get("AOTI_DEVICE_KEY") == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{path} was compiled for a GPU, and torch sees none here; export it with --device cpu")
    return torch._inductor.aoti_load_package(str(path))


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("_metadata.json"))
            return json.loads(archive.read(name))
    except (zipfile.BadZipFile, StopIteration, ValueError) as error:
        raise ValueError(f"{path} is no compiled package; scripts/export.py --format aoti makes one") from error


def _lacking(instructions: Iterable[str]) -> list[str]:
    """Those that Linux does not say this processor has; none under systems that say nothing."""
    try:
        told = Path("/proc/cpuinfo").read_text().replace("_", "").split()
    except OSError:
        return []
    return [name for name in instructions if name.replace("-", "") not in told]
