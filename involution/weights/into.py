"""Tensors under our names into a model."""

import logging
from collections.abc import Mapping

from torch import Tensor, nn

log = logging.getLogger("involution")


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights under our names. A classifier for other classes, or none, leaves the model's own as it is (logged).

    Raises:
        ValueError: any other tensor is missing, unexpected or of another shape; they are named.
    """
    own, parts = model.state_dict(), classifier_of(model)
    head = [key for key in own if key.startswith(parts)]
    fits = all(key in state and state[key].shape == own[key].shape for key in head)
    if not fits:
        log.warning("the weights have no classifier for %d classes: it starts afresh", model.num_classes)
    state = {key: value for key, value in state.items() if not key.startswith(parts) or (fits and key in own)}
    # a classifier that starts afresh keeps its values; files from before PyTorch 0.4.1 do not count batches
    state |= {key: own[key] for key in own if key not in state and key.endswith((*head, "num_batches_tracked"))}
    if told := mismatch(model, state):
        raise ValueError(f"the weights are of another model; {told}")
    model.load_state_dict(state)


def classifier_of(model: nn.Module) -> tuple[str, ...]:
    """What the names of the tensors begin with whose values mean classes."""
    return tuple(f"{part}." for part in getattr(model, "classifiers", ("fc",)))


def mismatch(model: nn.Module, weights: Mapping[str, Tensor], limit: int = 8) -> str:
    """The keys that a model and a state dict do not share, or that have another shape, `limit` of each; empty when all
    fit."""
    own = model.state_dict()
    problems = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": [
            f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
            for key, value in own.items()
            if key in weights and weights[key].shape != value.shape
        ],
    }
    return "; ".join(f"{what}: {some(keys, limit)}" for what, keys in problems.items() if keys)


def some(keys: list[str], limit: int = 8) -> str:
    """The first few of many."""
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
