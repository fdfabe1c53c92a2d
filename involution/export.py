"""Models for elsewhere: torch.export, ONNX, a compiled AOTInductor package, safetensors with a model card.

Exported programs take images (B, C, H, W) of any batch and size (from ``MIN_SIZE`` on), or of any batch and one size.
``ops/standard.py`` has our operators in standard ones.
"""

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from involution.checks import check_positive, printable, writable
from involution.folding import fold, fold_layers, fold_parts
from involution.loading import IMAGENET, input_channels
from involution.model_card import model_card
from involution.models import DENSE, StagedNetwork, without_weights
from involution.models.axial import AxialResNet
from involution.models.san import SAN
from involution.models.standalone import StandAloneResNet
from involution.ops import banded, packaged
from involution.ops.build import BuildError
from involution.weights import describe, files

#: smallest height and width of an exported program's images: the last stage then has more than one pixel a side,
#: which the exporter assumes of every size that may vary
MIN_SIZE = 33
MAX_SIZE = 4096
MAX_BATCH = 1024
ONE_SIZE = "is exported for images of one size only; say which (--size 224; in Python size=224)"


def export_program(model: nn.Module, size: int | None = None) -> ExportedProgram:
    """``model`` in evaluation as a ``torch.export`` program of standard operators; the model's mode stays as it is.

    With ``size`` its images have that many pixels a side. Stand-Alone, SAN and Axial networks take no other program:
    they cut images into blocks or ask whether they are large enough. So do many of timm's.

    Raises:
        ValueError: such a network without a size, or a detector.
    """
    if hasattr(model, "preparation"):
        raise ValueError(
            f"{type(model).__name__} cannot be exported: how many boxes survive depends on the picture. In Python: "
            "involution.models.load_model(PATH)"
        )
    if size is None and isinstance(model, (SAN, StandAloneResNet, AxialResNet)):
        raise ValueError(f"{type(model).__name__} {ONE_SIZE}")
    if size is not None:
        check_positive(size=size)
    training = model.training
    first = next(model.parameters())
    # Sizes that stay odd at every halving: where rounding up makes no difference to the example, Inductor (2.15) drops
    # the pooling's border handling for good, and the package would read out of bounds at other sizes
    sides = (97, 129) if size is None else (size, size)
    example = torch.randn(2, input_channels(model), *sides, device=first.device, dtype=first.dtype)
    shapes = {0: Dim("batch", min=1, max=MAX_BATCH)}
    if size is None:
        shapes |= {i: Dim(name, min=MIN_SIZE, max=MAX_SIZE) for i, name in ((2, "height"), (3, "width"))}
    try:
        return torch.export.export(
            model.eval(),
            (example,),
            dynamic_shapes=(shapes,),
            prefer_deferred_runtime_asserts_over_guards=True,  # 2 * (n // 2) <= n and the like, which it cannot prove
        )
    except Exception as error:
        if size is None and not isinstance(model, StagedNetwork):
            raise ValueError(f"{type(model).__name__} {ONE_SIZE}") from error
        raise
    finally:
        model.train(training)


def _told(class_names: Sequence[str], preparation: Mapping[str, Any]) -> dict[str, str]:
    """Names of classes, a line each, and preparation, numbers with blanks between, as files' metadata have them."""
    told = {key: preparation[key] for key in IMAGENET if key in preparation}
    notes = {key: " ".join(map(str, [*v] if isinstance(v, Iterable) else [v])) for key, v in told.items()}
    names = (" ".join(name.split()).encode("utf-8", "backslashreplace").decode() for name in class_names)
    return notes | {"class_names": "\n".join(names)}


def export_torch(
    model: nn.Module,
    path: str | Path,
    size: int | None = None,
    class_names: Sequence[str] = (),
    preparation: Mapping[str, Any] = IMAGENET,
) -> None:
    """Write a program for ``torch.export.load``; nothing of this project is needed to run it.

    It takes images of the model's type. Names and preparation are in its ``extra_files``, under the keys of
    ``IMAGENET`` and "class_names".

    Raises:
        ValueError: as ``export_program``, or the path does not end with .pt2 or cannot be written.
    """
    path = writable(path, ".pt2")
    torch.export.save(export_program(model, size), path, extra_files=_told(class_names, preparation))


def export_aoti(
    model: nn.Module,
    path: str | Path,
    size: int | None = None,
    class_names: Sequence[str] = (),
    preparation: Mapping[str, Any] = IMAGENET,
) -> None:
    """Compile the folded model for its device into a ``.pt2`` package for ``packages.load`` or C++.

    On a CPU, in float32, our operators are C++ kernels in the package; where they cannot be compiled they are standard
    operators, with a warning, as they are in other types and on a GPU. Any processor with the instructions runs it that
    its metadata name: this one's, or with ATEN_CPU_CAPABILITY=avx2 in the environment those of AVX2. Names of classes
    and preparation are metadata too, for programs like ``docs/classify.cpp``. It takes images of the model's type.

    Raises:
        ValueError: as ``export_program``, or the path does not end with .pt2 or cannot be written, or there is no C++
            compiler, which inductor needs.
    """
    path = writable(path, ".pt2")
    first = next(model.parameters())
    on_cpu = first.device.type == "cpu"
    if on_cpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError(
            "a package needs a C++ compiler (g++, or the one CXX names); --format torch or onnx needs none"
        )
    notes = _told(class_names, preparation) | {"instructions": " ".join(packaged.instructions())}
    configs: dict[str, Any] = {
        "freezing": on_cpu and first.dtype != torch.float64,  # for which oneDNN, that packs weights, has no kernels
        "cpp.dynamic_threads": True,
        "cpp.march": "",  # any processor with those instructions, not only this one
        "aot_inductor.metadata": notes,
    }
    with torch.no_grad(), contextlib.ExitStack() as stack:
        folding = fold_layers
        if on_cpu:
            try:
                configs |= stack.enter_context(packaged.kept())
                folding = fold if first.dtype == torch.float32 else fold_layers
            except BuildError as error:
                warnings.warn(f"the package will be slower, of standard operators: {error}", stacklevel=2)
        program = export_program(_folded(model, folding), size)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def _folded(model: nn.Module, by: Callable[[nn.Module], nn.Module] = fold_layers) -> nn.Module:
    """In channels_last; images may come in any memory format."""
    return fold_parts(model, by).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    size: int | None = None,
    class_names: Sequence[str] = (),
    preparation: Mapping[str, Any] = IMAGENET,
) -> None:
    """Write an ONNX file: input "images" (batch, C, height, width), output "logits" (batch, classes).

    Images and logits are of the model's type. Names and preparation are in its metadata, under the keys of ``IMAGENET``
    and "class_names".

    Raises:
        ValueError: as ``export_program``, or the path does not end with .onnx or cannot be written, the model is of a
            type that runtimes lack, or the packages of the ``export`` extra are not installed.
    """
    path = writable(path, ".onnx")
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"onnxruntime has no convolutions in the model's {dtype}; export model.float()")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"ONNX needs {error.name}: pip install onnx onnxscript onnxruntime") from error
    options: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    with torch.no_grad(), banded.wanted():
        program = export_program(_folded(model), size)
    written = torch.onnx.export(program, (), verbose=False, **options)
    assert written is not None
    written.model.metadata_props.update(_told(class_names, preparation))
    written.save(path, external_data=False)


def save_safetensors(
    model: nn.Module,
    folder: str | Path,
    class_names: Sequence[str] = (),
    note: str = "",
    preparation: Mapping[str, Any] = IMAGENET,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model.safetensors`` and a model card ``README.md`` into ``folder``, as the Hugging Face Hub expects them.

    Names and preparation are in the file too, for ``involution.load``.

    Args:
        model: made by ``create_model``.
        folder: made if need be.
        class_names: in the order of the classifier's outputs.
        note: a paragraph for the card: training data, recipe, accuracy.
        preparation: of pictures: val_size, val_resize, mean, std.
        arguments: of ``create_model`` for it; None: read off the tensors' shapes, which tell nothing of timm's models.

    Raises:
        ValueError: safetensors is not installed, the names are not as many as the classes, it is no classifier, or
            nothing can be written there.
    """
    if arguments is not None and arguments["name"] in DENSE:
        raise ValueError(
            f"the card is a classifier's; of {arguments['name']} scripts/convert_checkpoint.py writes safetensors"
        )
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ValueError("this needs safetensors: pip install safetensors") from error
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    name, options = describe(state) if arguments is None else _named(arguments)
    if class_names and len(class_names) != options["num_classes"]:
        raise ValueError(f"class_names has {len(class_names)} names; the model has {options['num_classes']} classes")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be a folder ({error.strerror}); weights and card go into one") from error
    path = writable(folder / "model.safetensors", ".safetensors")
    preparation = {key: preparation[key] for key in IMAGENET}
    made_by = None if arguments is None else {"name": name} | options
    notes = files.metadata(made_by, list(class_names), preparation)
    save_file(state, path, metadata=notes | {"model": name})
    card = model_card(model, name, options, [printable(name) for name in class_names], note, preparation)
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


def _named(arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    options = without_weights(arguments)
    return options.pop("name"), options
