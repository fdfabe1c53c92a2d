"""Any model of the installed timm behind our interface: ``create_model("convnext_tiny", library="timm")``.

timm itself is imported when such a model is asked for, not before.
"""

import difflib
import inspect
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from involution import conversion
from involution.checks import SizeError, first_line, unknown_name
from involution.complexity import run_on_meta

OPTIONS = ("in_chans", "options", "convert")  # of ``create_model`` for these models


def create(
    name: str, num_classes: int | None = None, in_chans: int = 3, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """timm's model, freshly initialised.

    Args:
        name: as timm lists it, also with the tag of a configuration: "convnext_tiny.in12k_ft_in1k".
        num_classes: outputs of the classifier; None for timm's number.
        options: of timm's constructor, e.g. ``{"drop_path_rate": 0.1}``.

    Raises:
        ValueError: an unknown name, tag or option, with the nearest valid one, or an impossible value.
    """
    if not isinstance(options or {}, Mapping):
        raise ValueError(f"options of {name} is {options!r}; it should be a mapping, as in {{img_size: 32}}")
    if own := {"in_chans", "num_classes"} & set(options or {}):
        raise ValueError(f"options of {name} has {', '.join(sorted(own))}, which is a key of its own beside options")
    timm, wanted = _timm(name), {"in_chans": in_chans} | dict(options or {})
    if num_classes is not None:
        wanted["num_classes"] = num_classes
    try:
        model = timm.create_model(name, **wanted)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise ValueError(f"timm cannot make {name} with {wanted}: {error}{_nearest_option(error)}") from error
    model.in_chans = in_chans
    head = model.pretrained_cfg.get("classifier") or ()
    model.classifiers = (head,) if isinstance(head, str) else tuple(head)
    return model


def has_stochastic_depth(name: str) -> bool:
    """Whether a model's constructor takes a ``drop_path_rate``. True for names that timm does not know."""
    with torch.device("meta"):
        try:
            create(name, options={"drop_path_rate": 0.0})
        except ValueError as error:
            return "drop_path_rate" not in str(error.__cause__)
    return True


def convert(model: nn.Module, options: bool | Mapping[str, Any]) -> None:
    """Turn a model's convolutions into involutions, in place: True, or arguments of ``involution.convert``.

    Raises:
        ValueError: there is nothing to convert, an unknown option, or an impossible value.
    """
    given = dict(options) if isinstance(options, Mapping) else {}
    valid = [name for name in inspect.signature(conversion.convert).parameters if name not in ("module", "dry_run")]
    for option in given:
        if option not in valid:
            raise ValueError(unknown_name("option of convert", option, valid))
    done = conversion.convert(model, **given)
    if not done.converted:
        reasons = sorted({each.reason for each in done.changes})
        raise ValueError(
            f"convert: {type(model).__name__} has no convolution to convert (left: {', '.join(reasons) or 'none'}); "
            "convert={grouped: true} takes depthwise ones too"
        )


def _timm(name: str) -> Any:
    """timm, which has the model ``name``."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{name} is timm's: pip install timm") from error
    if ":" in name or not timm.is_model(name.partition(".")[0]):
        names = timm.list_models()
        near = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}; did you mean {near!r}? "
            f"timm.list_models() lists all {len(names)}"
        )
    tags = [each.partition(".")[2] for each in timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)]
    if "." in name and name.partition(".")[2] not in tags:
        raise ValueError(
            unknown_name(f"configuration of {name.partition('.')[0]}", name.partition(".")[2], tags or [""])
        )
    return timm


def _nearest_option(error: Exception) -> str:
    """Of the class whose constructor does not know an argument."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    frames, makers = error.__traceback__, []
    while found and frames is not None:
        makers.append(frames.tb_frame.f_globals.get(found[1]) or frames.tb_frame.f_locals.get("model_cls"))
        frames = frames.tb_next
    for maker in filter(None, makers):
        near = difflib.get_close_matches(found[2] if found else "", inspect.signature(maker).parameters, n=1)
        return f"; did you mean {near[0]!r}?" if near else ""
    return ""


def preparation(
    name: str, in_chans: int = 3, options: Mapping[str, Any] | None = None, val_size: int | None = None, **other: Any
) -> dict[str, Any]:
    """How the model's own configuration prepares pictures: train_size, val_size, val_resize, mean, std.

    Args:
        val_size: in place of its own; ``val_resize`` follows.
        other: further arguments of ``create_model``, which do not matter here.

    Raises:
        ValueError: an unknown name.
    """
    _timm(name)
    from timm.models import get_pretrained_cfg

    cfg: Any = get_pretrained_cfg(name)
    side = (options or {}).get("img_size")
    side = side[0] if isinstance(side, (list, tuple)) else side
    val_size = val_size or side or (cfg.test_input_size or cfg.input_size)[1]
    found: dict[str, Any] = {
        "train_size": side or cfg.input_size[1],
        "val_size": val_size,
        "val_resize": math.floor(val_size / (cfg.test_crop_pct or cfg.crop_pct)),
        "mean": list(cfg.mean),
        "std": list(cfg.std),
    }
    if in_chans == 1:
        found |= {key: [round(sum(found[key]) / len(found[key]), 4)] for key in ("mean", "std")}
    return found


def translated(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of a model of timm's: its own, or its authors' where timm can tell; of other numbers of
    channels and, of transformers, other sizes, they are adapted.

    Raises:
        ValueError: they are of another model.
    """
    from timm.models import adapt_input_conv, clean_state_dict

    state = clean_state_dict(dict(tensors))
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rename is not None:
        try:
            state = rename(state, model)
        except (KeyError, RuntimeError, IndexError) as error:
            raise ValueError(f"the weights are of another model: timm misses {error}") from error
    first = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    own = model.state_dict()
    for key in (f"{name}.weight" for name in ((first,) if isinstance(first, str) else first)):
        if key in own and key in state and state[key].shape != own[key].shape and state[key].ndim == 4:
            state[key] = adapt_input_conv(own[key].shape[1], state[key])
    return state


def freeze(model: nn.Module, names: int | Sequence[str]) -> None:
    """Leave modules as they are while the rest trains: no gradients, BatchNorm in evaluation mode throughout.

    Raises:
        ValueError: for a number, or a name of none of its modules.
    """
    modules = dict(model.named_modules())
    parts = [each for each, _ in model.named_children()]
    for name in [names] if isinstance(names, int) else names:
        if name not in modules or not name:
            raise ValueError(
                f"this model has no module {name}; name them, for example train.freeze=[{parts[0]}]. "
                f"It has {', '.join(parts)}, and their parts"
            )
        modules[name].requires_grad_(False)
    model.frozen = tuple(names)  # type: ignore[arg-type, assignment]
    model.register_forward_pre_hook(_keep_evaluating)


def _keep_evaluating(model: nn.Module, args: object) -> None:
    for name in model.frozen:  # type: ignore[union-attr]
        model.get_submodule(name).eval()  # type: ignore[arg-type]


def check_sizes(model: nn.Module, arguments: Mapping[str, Any], sizes: Iterable[int]) -> None:
    """Refuse pictures of ``sizes`` pixels a side where the model only takes others.

    Args:
        arguments: of ``create_model`` for this model.

    Raises:
        SizeError: with what would fit. Not where it cannot be run without numbers at its own size either.
    """
    channels: Any = model.in_chans
    own = preparation(**arguments)["val_size"]
    for size in sizes:
        try:
            run_on_meta(model, (channels, size, size))
        except Exception as error:  # models assert, reshape and index
            try:
                run_on_meta(model, (channels, own, own))
            except Exception:
                return
            raise SizeError(
                f"{arguments['name']} does not take pictures of {size} pixels a side ({first_line(error)}); "
                f"its own size is {own}: data.train_size={own} data.val_size={own}, or where the model has the option, "
                f"model.options={{img_size: {size}}}"
            ) from error
