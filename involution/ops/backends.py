"""Which implementation runs: capability predicates, then the choice, with the reason in the debug log.

`INVOLUTION_BACKEND` (reference, shifted, cpu, triton) forces one and makes it an error if that one cannot run.
"""

import functools
import importlib
import logging
import os
from types import ModuleType

from torch import Tensor

logger = logging.getLogger("involution.ops")

_MODULES = {"reference": "reference", "shifted": "shifted", "cpu": "cpu", "triton": "triton_backend"}
_PREFERRED = {"cpu": "cpu", "cuda": "triton"}
_reported: set[tuple[str, str]] = set()


@functools.cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{_MODULES[name]}")


@functools.cache  # every call asks, and a broken Triton takes long to fail
def _import_error(name: str) -> str | None:
    """Why a backend cannot be imported, or None."""
    try:
        _load(name)
    except Exception as error:  # a Triton that is broken, or of another time than torch, raises anything
        return f"it cannot be imported ({error}); a new installation of torch brings the Triton that belongs to it"
    return None


def _report(name: str, reason: str, level: int = logging.DEBUG) -> None:
    if (name, reason) not in _reported:
        _reported.add((name, reason))
        logger.log(level, "backend %s: %s", name, reason)


def choose(input: Tensor, kernel: Tensor) -> ModuleType:
    """The backend module for these tensors; `kernel` is any second operand of the same type and device.

    Raises:
        ValueError: INVOLUTION_BACKEND names no backend, or one that cannot run on these tensors.
    """
    forced = os.environ.get("INVOLUTION_BACKEND")
    if forced and forced not in _MODULES:
        raise ValueError(f"INVOLUTION_BACKEND is {forced!r}; it should be one of {', '.join(_MODULES)}")
    name = forced or _PREFERRED.get(input.device.type, "shifted")
    reason = _import_error(name) or _load(name).unsupported(input, kernel)
    if reason is None:
        _report(name, "forced by INVOLUTION_BACKEND" if forced else "the fast one")
        return _load(name)
    if forced:
        raise ValueError(f"INVOLUTION_BACKEND={forced} cannot run here: {reason}; unset it to choose automatically")
    if input.device.type == "cuda":  # where it takes several times as long, and a user should know
        _report("shifted", f"several times slower, for {name} cannot run: {reason}", logging.WARNING)
    else:
        _report("shifted", f"{name} cannot run: {reason}")
    return _load("shifted")
