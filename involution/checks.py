"""Checks of what users pass in, with messages that say what is wrong and what would be right."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn


def check_positive(**values: object) -> None:
    """Raise ValueError unless every value is an integer of at least 1, of Python or of NumPy."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it should be an integer of at least 1")


def check_odd(**values: int) -> None:
    """Raise ValueError unless every value is odd and positive."""
    check_positive(**values)
    for name, value in values.items():
        if value % 2 == 0:
            raise ValueError(f"{name} is {value}; it should be odd, for the window to have a centre")


def check_share(**values: float) -> None:
    """Raise ValueError unless every value is a number from 0 to below 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
            raise ValueError(f"{name} is {value!r}; it should be a number from 0 to below 1")


def writable(path: str | Path, suffix: str) -> Path:
    """``path``, where a file that ends so can be written; ValueError says why it cannot."""
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"path is {path}; it should end with {suffix}")
    there = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); name another file") from error
    if not there:
        path.unlink()
    return path


def unknown_name(what: str, given: str, valid: Iterable[str]) -> str:
    """The message for a name that is none of ``valid``, with the nearest of them where one is near."""
    valid = list(valid)
    nearest = "".join(f"; did you mean {name!r}?" for name in difflib.get_close_matches(given, valid, n=1, cutoff=0.5))
    return f"unknown {what} {given!r}{nearest or '.'} Valid: {', '.join(valid)}"


def few(names: Sequence[str]) -> str:
    """The first five of names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def first_line(error: BaseException) -> str:
    """What an error says, in a line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printable(name: object) -> str:
    """A name in one line of text that every stream takes: line ends, controls and bytes that are no UTF-8 escaped."""
    odd = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(odd, lambda found: repr(found[0])[1:-1], str(name))


class SizeError(ValueError):
    """Images of a size that a model cannot take."""


class NotTraced:
    """A layer that ``torch.fx`` is to take as one call (``fold``, timm): what it does depends on the images' size."""


class NotScripted:
    """A module that ``torch.jit.script`` refuses with a reason, also as part of another."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__} cannot be scripted; torch.export, torch.onnx.export and torch.jit.trace take it"
        )


def strict_json(value: Any, indent: int | None = None) -> str:
    """Text that every JSON parser reads: numbers that are not finite, for which JSON has no word, become null."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(item) for key, item in part.items()}
        if isinstance(part, list | tuple):
            return [finite(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)
