"""Whether two configurations describe the same run: what may change when it goes on, and what may not."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from involution import create_model
from involution.checks import few
from involution.engine import augmentation
from involution.engine.errors import UserError
from involution.engine.tasks import DataSet
from involution.models import without_weights
from involution.weights import mismatch
from involution.weights.run_file import State

log = logging.getLogger("involution")
# keys that say where or how something runs, not what: another value makes it no other run, and names no folder
PLACE = ("name", "output_root", "device", "logging", "data.root", "data.workers", "data.loader", "train.resume")
# another value of one of these makes it another run
DEFINING = (
    "model.", "data.name", "seed", "train.global_batch_size", "train.exclude_from_decay", "train.freeze",
    "train.layer_decay", "optimizer._target_", "optimizer.name",
)  # fmt: skip
# other values of these leave the result of a run that has ended what it is; how many pictures a rank holds follows from
# the number of ranks
SAME_RESULT = (
    *PLACE, "deterministic", "data.decoder", "data.exclude", "data.max_pixels", "data.on_error", "train.batch_size",
    "train.checkpoint_every_minutes", "train.checkpoint_every_steps", "train.compile", "train.cuda_graphs",
    "train.evaluate_every_epochs", "train.evaluate_every_steps", "train.keep_checkpoints", "train.log_every_steps",
    "train.max_bad_steps", "train.timeout_minutes",
)  # fmt: skip
LENGTH = ("train.epochs", "train.max_steps", "train.steps")
# what keys mean that earlier configurations lack
LATER = {
    "model.in_chans": 3, "model.drop_path_rate": 0.0, "model.drop_rate": 0.0, "model.global_pool": "avg",
    "train.cuda_graphs": False, "train.loss": "cross_entropy", **augmentation.OFF,
}  # fmt: skip


def differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ between two configurations, as {key: (saved, now)}."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in saved.keys() | now.keys():
        a, b = (values.get(key, LATER.get(prefix + key)) for values in (saved, now))
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[f"{prefix}{key}"] = (a, b)
    return dict(sorted(found.items()))


def check_same_run(state: State, now: dict[str, Any], data_set: DataSet) -> dict[str, tuple[Any, Any]]:
    """Refuse to continue a run as another one; report, and return, what else has changed."""
    changed = differences(state["config"], now)
    if _same_file(*changed.get("checkpoint", (None, None))):  # written in another way
        del changed["checkpoint"]
    fatal = {key: values for key, values in changed.items() if key.startswith(DEFINING)}
    if now["checkpoint"] is not None and "checkpoint" in changed:  # other weights to start from: not this run's course
        fatal["checkpoint"] = changed["checkpoint"]
    others = state["data"] != data_set.fingerprint
    if others and now["data"]["name"].endswith("folder") and "data.root" in changed:  # somebody's next data set
        fatal["data.root"] = changed["data.root"]
    if (before := state["class_names"]) != (names := list(data_set.class_names)):
        first = next((i for i, (a, b) in enumerate(zip(before, names)) if a != b), min(len(before), len(names)))
        fatal["the list of classes"] = _listed(before, first), _listed(names, first)
    if fatal:
        listed = "; ".join(f"{key} was {a}, is {b}" for key, (a, b) in fatal.items())
        with torch.device("meta"):
            tensors = mismatch(create_model(**without_weights(now["model"])), state["model"], limit=2)
        raise UserError(
            "the checkpoint to resume belongs to another run. Give this one another name=, or start over in the same "
            "folder with train.resume=never"
            f"{'; to start from its weights: checkpoint=PATH' if now['train']['resume'] != 'auto' else ''}. "
            f"What differs: {listed}{f' ({tensors})' if tensors else ''}"
        )
    for key, (a, b) in changed.items():
        log.warning("continuing with %s=%s, which was %s", key, b, a)
    if others:
        log.warning("continuing on a data set that has changed: it was %s, is %s", state["data"], data_set.fingerprint)
    known = {key: values for key, values in changed.items() if _is_known(key, state["config"])}
    return known | ({"the data set": (state["data"], data_set.fingerprint)} if others else {})


def _is_known(key: str, config: Any) -> bool:
    """Whether a configuration has a key: an earlier version's lacks some."""
    for name in key.split("."):
        if not isinstance(config, dict) or name not in config:
            return key in LATER
        config = config[name]
    return True


def _same_file(a: str | None, b: str | None) -> bool:
    return a is not None and b is not None and os.path.realpath(a) == os.path.realpath(b)


def check_ended(changed: dict[str, tuple[Any, Any]], beyond: bool) -> None:
    """Refuse to take a run that has ended for one with other settings, with which it would have ended differently.

    Args:
        beyond: it has gone on past the end that it is to have now. One that is made to end where it stands may.

    Raises:
        UserError: naming them.
    """
    same = SAME_RESULT if beyond else (*SAME_RESULT, *LENGTH)
    if other := [f"{key} was {a}, is {b}" for key, (a, b) in changed.items() if key not in same]:
        how = "has gone on past its new end" if beyond else "has ended, with other settings"
        raise UserError(
            f"this run {how}: {'; '.join(other)}. Give the new one another name=, or start "
            "over in the same folder with train.resume=never"
        )


def _listed(names: Sequence[str], first: int) -> str:
    """A few names from the first on that differs, and how many there are."""
    return f"{'..., ' if first else ''}{few(names[first:])} ({len(names)})"
