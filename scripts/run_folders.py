"""Run folders and what distinguishes them, for report.py and the plots."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from involution.complexity import Complexity, count
from involution.engine.same_run import PLACE
from involution.models import DENSE, MODELS, create_model, model_defaults, without_weights


@dataclass
class Run:
    """One run folder."""

    path: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    @property
    def is_dense(self) -> bool:
        """Whether it is about boxes, masks or pixels, not a classifier."""
        return self.config["model"]["name"] in DENSE

    def score(self, name: str) -> float | None:
        """The last epoch's "top1", "ap", "miou", ... that there is."""
        scores = [line[f"val_{name}"] for line in self.lines if line.get(f"val_{name}") is not None]
        return scores[-1] if scores else None

    @property
    def options(self) -> dict[str, Any]:
        """What differs from the model's defaults."""
        model = self.config["model"]
        usual = model_defaults(model["name"]) if model["name"] in MODELS and "library" not in model else {}
        return {k: v for k, v in model.items() if k in usual and v != usual[k]}

    @property
    def setting(self) -> str:
        model = self.config["model"]
        if self.is_dense:
            parts = {k: model[k] for k in ("neck", "head", "plugin") if model.get(k) not in (None, "convolution")}
            return " ".join([model["name"], model["backbone"]["name"], *(f"{k}={v}" for k, v in parts.items())])
        options = (f"{k}={'C' if v is None else v}" for k, v in self.options.items())
        name = f"{model['library']} {model['name']}" if "library" in model else model["name"]
        return " ".join([name, *options])

    def complexity(self) -> Complexity:
        """Of the model at the run's own size of pictures, or if it is dense at the paper's."""
        model = without_weights(self.config["model"])
        if self.is_dense:
            from dense_table import paper_size  # and torchvision, which other runs do without

            size = paper_size(model["name"])
        else:
            side = self.config["data"]["val_size"]
            size = (model.get("in_chans", 3), side, side)
        with torch.device("meta"):
            return count(create_model(**model), size)


def find_runs(folders: list[Path]) -> list[Run]:
    """Every run in or below the folders.

    Raises:
        ValueError: a folder does not exist or holds no run, or a run's files are damaged.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        found = sorted(path.parent for path in folder.rglob("config.yaml") if path.parent.name != ".hydra")
        if not found:
            what = "holds no runs (no config.yaml below it)" if folder.exists() else "does not exist"
            raise ValueError(f"{folder} {what}; give folders that train.py wrote")
        runs |= {path.resolve(): _read_run(path) for path in found}
    return list(runs.values())


def _read_run(path: Path) -> Run:
    metrics = path / "metrics.jsonl"
    text = metrics.read_text() if metrics.is_file() else ""
    try:
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        config = yaml.safe_load((path / "config.yaml").read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: config.yaml or metrics.jsonl is damaged: {error}") from error
    if not isinstance(config, dict) or not {"model", "data", "train"} <= config.keys():
        raise ValueError(f"{path}/config.yaml is not one that train.py wrote; give folders that train.py wrote")
    return Run(path, config, lines)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.epochs": 5, ...}"""
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def settings(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by setting: the model with its options, and whatever else differs among the runs given.

    Of detectors and segmentors, options that one kind of model has and another has not do not count as a difference.
    """
    configs = [{k: v for k, v in flat(run.config).items() if not _in_setting(run, k)} for run in runs]
    keys = sorted({key for config in configs for key in config if any(_differ(config, c, key) for c in configs)})
    groups: dict[str, list[Run]] = {}
    for run, config in zip(runs, configs):
        also = (f"{key}={config.get(key)}" for key in keys if key in config or not key.startswith("model."))
        groups.setdefault(" ".join([run.setting, *also]), []).append(run)
    return groups


def _in_setting(run: Run, key: str) -> bool:
    """Whether a key is in the setting's name already, or has no part in it."""
    if key == "data.root" and run.config["data"]["name"].endswith("folder"):  # there it is the data set
        return False
    if not key.startswith("model."):
        return key == "seed" or key in PLACE
    return not run.is_dense or key in {f"model.{k}" for k in ("name", "backbone.name", "neck", "head", "plugin")}


def _differ(a: dict[str, Any], b: dict[str, Any], key: str) -> bool:
    if key.startswith("model.") and key not in b:
        return False
    return bool(a[key] != b.get(key))
