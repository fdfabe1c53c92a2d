"""Files of weights: torch's, safetensors and Paddle's .pdparams, told apart by their contents. None is executed.

A pickle may name any function of Python. Here a file may name tensors, arrays, numbers, and inert records of other
programs (INERT: their options, counters and paths); anything else is refused by name.
"""

import io
import json
import pickle
import re
import typing
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from involution.checks import first_line
from involution.outage import is_outage, patiently

StateDict = dict[str, Tensor]

#: where training programs keep their weights, the averaged ones first
NESTS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema",
    "state_dict", "model_state_dict", "model", "module", "net", "network",
)  # fmt: skip
_AVERAGED = NESTS[:4]
_LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before 1.6, pickled
_OTHERS = {  # beginnings of files that are often mistaken for weights
    b"version https://git-lfs": "it is a pointer of git-lfs; `git lfs pull` fetches the file itself",
    b"<": "it is a web page or another text, perhaps of a login or an error, saved under the name of weights",
    b"\x89HDF": "it is a file of HDF5 (Keras, TensorFlow)",
}
_EXPORTED = {
    ".pt2": "torch.export.load opens an exported program, and involution.packages.load a compiled one",
    ".onnx": "onnxruntime opens it",
}


class _Record:
    """In place of an object whose contents nothing here needs."""

    def __new__(cls, *args: Any, **options: Any) -> "_Record":
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Mapping:
    """In place of a class derived from dict; torch's unpickler fills plain ones only."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        return OrderedDict()


#: records that programs keep beside their weights
INERT = {
    _Record: """
        argparse.Namespace types.SimpleNamespace typing.Any uuid.UUID decimal.Decimal fractions.Fraction
        datetime.datetime datetime.date datetime.time datetime.timedelta datetime.timezone
        pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePath pathlib.PurePosixPath
        pathlib.PureWindowsPath pathlib._local.Path pathlib._local.PosixPath pathlib._local.WindowsPath
        pathlib._local.PurePath pathlib._local.PurePosixPath pathlib._local.PureWindowsPath
        torch.torch_version.TorchVersion builtins.range builtins.slice builtins.complex
        omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig omegaconf.base.Metadata
        omegaconf.base.ContainerMetadata omegaconf.base.SCMode omegaconf.nodes.AnyNode omegaconf.nodes.BooleanNode
        omegaconf.nodes.BytesNode omegaconf.nodes.EnumNode omegaconf.nodes.FloatNode omegaconf.nodes.IntegerNode
        omegaconf.nodes.InterpolationResultNode omegaconf.nodes.PathNode omegaconf.nodes.StringNode
        omegaconf.nodes.ValueNode omegaconf.base.UnionNode
        mmengine.logging.history_buffer.HistoryBuffer ml_collections.config_dict.config_dict.ConfigDict
        pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint
        pytorch_lightning.callbacks.early_stopping.EarlyStopping
        lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint
        lightning.pytorch.callbacks.early_stopping.EarlyStopping""",
    _Mapping: """
        collections.defaultdict argparse._AttributeHolder easydict.EasyDict addict.addict.Dict yacs.config.CfgNode
        fvcore.common.config.CfgNode detectron2.config.config.CfgNode mmcv.utils.config.ConfigDict
        mmengine.config.config.ConfigDict pytorch_lightning.utilities.parsing.AttributeDict
        lightning.pytorch.utilities.parsing.AttributeDict lightning.fabric.utilities.data.AttributeDict
        lightning_fabric.utilities.data.AttributeDict""",
}


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """``_codecs.encode`` as pickles of protocol 2 use it for bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


def _allowed() -> dict[str, Any]:
    """Everything that a pickle may name, by its full name."""
    allowed: dict[str, Any] = {name: stand_in for stand_in, names in INERT.items() for name in names.split()}
    allowed |= {f"builtins.{kind.__name__}": kind for kind in (bool, int, float, str, bytes, list, tuple, dict, set)}
    allowed |= {"builtins.bytearray": bytearray, "builtins.frozenset": frozenset, "_codecs.encode": _latin1}
    allowed |= {"collections.OrderedDict": OrderedDict, "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # the name before numpy 2, and since
        allowed |= {f"{module}._reconstruct": _reconstruct, f"{module}.scalar": np.float64(0).__reduce__()[0]}
    return allowed | {f"numpy.dtypes.{type(d).__name__}": type(d) for d in map(np.dtype, "?bhilqBHILQefdFDSU")}


_reconstruct: typing.Any = np.empty(0).__reduce__()[0]
_ALLOWED = _allowed()


class _Unpickler(pickle.Unpickler):
    """For pickles that are not torch's."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in _ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {full}")
        return _ALLOWED[full]


def load(path: Path, what: str = "weights") -> tuple[Any, dict[str, str]]:
    """What lies in a file, on the CPU, and the notes of a safetensors file (else {}).

    Raises:
        ValueError: there is no such file, or it is none of the known kinds, damaged, or names code.
        OSError: it may not be read, or its disk or network failed, which says nothing about it.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return patiently(lambda: _load(path))
    except ImportError as error:
        raise ValueError(f"reading {path} needs safetensors: pip install safetensors") from error
    except Exception as error:  # torch.load, pickle and safetensors raise a dozen types for damaged files
        if isinstance(error, OSError) and (is_outage(error) or isinstance(error, PermissionError)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        reason = _EXPORTED.get(path.suffix) or why_unreadable(error)
        raise ValueError(f"{path} cannot be read as {what}: {reason}") from error


def _load(path: Path) -> tuple[Any, dict[str, str]]:
    with open(path, "rb") as file:
        beginning = file.read(64)
    for other, told in _OTHERS.items():
        if beginning.startswith(other):
            raise ValueError(told)
    if path.suffix == ".safetensors" or (beginning[8:9] == b"{" and not beginning.startswith(b"\x80")):
        return _load_safetensors(path)
    if beginning.startswith(b"\x80") and _LEGACY_TORCH not in beginning:
        return _Unpickler(io.BytesIO(path.read_bytes())).load(), {}
    with torch.serialization.safe_globals([(kind, name) for name, kind in _ALLOWED.items()]):
        return torch.load(path, map_location="cpu", weights_only=True), {}


def _load_safetensors(path: Path) -> tuple[Any, dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping


def read(path: str | Path) -> StateDict:
    """The tensors of a file, as they are or nested as training programs nest them, under the file's own names.

    Of a checkpoint that holds averaged weights too (``ema``), these are taken. Nothing in the file is executed.

    Raises:
        ValueError: there is no such file, or it holds no weights.
    """
    return tensors(load(Path(path))[0], path)


def tensors(contents: Any, path: str | Path) -> StateDict:
    """The state dict in what ``load`` found in a file; errors as in ``read``."""
    state = contents
    while nest := next((n for n in NESTS if isinstance(state, dict) and _is_nest(state.get(n), n)), None):
        state = state[nest]
    if isinstance(state, dict):
        ignored = ("n_averaged", "StructuredToParameterName@@")  # of torch's AveragedModel; of Paddle
        state = {
            key: torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            for key, value in state.items()
            if key not in ignored and not str(key).endswith("_extra_state")
        }
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        found = f" (it has {', '.join(map(str, list(state)[:8]))})" if isinstance(state, dict) and state else ""
        raise ValueError(
            f"{path} holds no weights: it should be a state dict, or have one under 'state_dict' or 'model'{found}"
        )
    return state


def _is_nest(value: Any, name: str) -> bool:
    return isinstance(value, dict) and (
        name not in _AVERAGED or any(isinstance(v, Tensor | dict) for v in value.values())
    )


def why_unreadable(error: Exception) -> str:
    """Why torch.load, pickle or safetensors failed, in a line, without torch's advice to let the file run code."""
    told = str(error).strip()
    if found := re.search(r"GLOBAL (\S+)", told):
        return (
            f"besides weights it holds {found[1]}, and nothing that may run code is read. If you trust its origin, "
            "save its weights alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pth')"
        )
    if (operand := re.search(r"Unsupported operand (\d+)", told)) and int(operand[1]) > 127:  # protocols from 3 on
        return (
            "it is no file of weights (.pt, .pth, .safetensors, .pdparams), or was saved with another pickle_protocol "
            "than torch's own; save it with torch.save(weights, FILE)"
        )
    if isinstance(error, pickle.UnpicklingError | EOFError):
        return "torch.save did not write it, or not all of it is there"
    return first_line(error)


def metadata(
    arguments: Mapping[str, Any] | None, class_names: Sequence[str] | None, preparation: Mapping[str, Any]
) -> dict[str, str]:
    """The notes of a safetensors file, of what is known; ``notes`` reads them."""
    known = {"arguments": arguments, "class_names": class_names, "preparation": preparation}
    return {"format": "pt"} | {key: json.dumps(value) for key, value in known.items() if value}


def notes(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """What ``metadata`` noted beside the weights: class_names, preparation, arguments.

    Raises:
        ValueError: they are no JSON.
    """
    try:
        return {
            key: json.loads(metadata[key]) for key in ("class_names", "preparation", "arguments") if key in metadata
        }
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its metadata should be JSON, as export.save_safetensors writes it") from error
