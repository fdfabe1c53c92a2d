"""Any checkpoint, opened: its tensors, and what it tells besides."""

from pathlib import Path
from typing import Any, NamedTuple

from involution.weights import dense, files, run_file
from involution.weights.names import describe, to_ours
from involution.weights.source import fetch


class Weights(NamedTuple):
    """What a checkpoint holds that outlives training."""

    tensors: files.StateDict  # under the file's own names
    model: dict[str, Any] | None  # arguments of ``create_model``, where the file tells them
    class_names: list[str] | None  # None where the file does not tell
    data: dict[str, Any]  # the run's `data` configuration, or its values in loading.IMAGENET's keys alone, or {}

    def to_ours(self) -> files.StateDict:
        """The tensors under our names; of a detector or segmentor the backbone's."""
        return to_ours(self.tensors)

    def describe(self) -> dict[str, Any]:
        """Arguments of ``create_model`` for the model that these weights are of.

        Raises:
            ValueError: they are those of none of our models.
        """
        if self.model is not None:
            return self.model
        if dense.kind(self.tensors):
            return dense.describe(self.tensors)
        name, options = describe(self.to_ours())
        return {"name": name} | options


def open_weights(location: str | Path, sha256: str | None = None) -> Weights:
    """The weights at a path (a run's folder: its ``best.pt``) or address, or published ones by their model's name.

    Raises:
        ValueError: the file cannot be had, holds no weights, is damaged, or has another hash than ``sha256``.
    """
    path = fetch(location, sha256)
    contents, metadata = files.load(path)
    if run_file.is_ours(contents):
        state = run_file.verified(contents, path)
        config = state["config"]
        return Weights(run_file.best_weights(state), config["model"], state["class_names"], config["data"])
    notes = files.notes(metadata, path)
    return Weights(
        files.tensors(contents, path), notes.get("arguments"), notes.get("class_names"), notes.get("preparation", {})
    )
