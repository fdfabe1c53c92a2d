"""The jobs of a sweep: what each of them sets, where it writes, whether it has finished."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import QuotedString
from omegaconf import DictConfig, open_dict

from involution.engine.arguments import parse, quote
from involution.engine.build import check_model
from involution.engine.config import TrainConfig, given, validate
from involution.engine.errors import UserError
from involution.engine.options import fit_batch_size
from involution.engine.same_run import PLACE, differences

LONGEST = 200  # bytes of a folder's name; file systems take 255


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Args:
        overrides: as on a command line.
        folder: where it writes.
        config: resolved.
        immaterial: keys whose values may differ from the ones that a finished job ran with.
    """

    overrides: list[str]
    folder: Path
    config: dict[str, Any]
    immaterial: frozenset[str]

    def summary(self) -> dict[str, Any] | None:
        """The job's result, if it has finished with this configuration."""
        try:
            summary = json.loads((self.folder / "summary.json").read_text())
            saved = yaml.safe_load((self.folder / "config.yaml").read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return None
        now = yaml.safe_load(yaml.safe_dump(self.config))
        if now["model"]["num_classes"] is None:  # the run filled it in
            saved["model"].pop("num_classes", None)
            now["model"].pop("num_classes")
        return None if differences(saved, now).keys() - self.immaterial else summary

    @property
    def starts_over(self) -> bool:
        return self.config["train"]["resume"] == "never"


def plan(
    batch: Sequence[Sequence[str]],
    load: Callable[[list[str]], DictConfig],
    sweep_dir: Path,
    varied: Collection[str],
    ranks: int,
) -> tuple[Path, list[Job]]:
    """Compose and check all jobs before the first begins.

    Args:
        batch: every job's overrides.
        load: composes a job's configuration, with its hydra node.
        sweep_dir: parent of the jobs' folders, where the jobs' own names do not tell them apart.
        varied: the keys that vary: they name the jobs' folders, and the parent otherwise.
        ranks: of each job.

    Returns:
        The parent of the jobs' folders, and the jobs, each with hydra's settings of its folder among its overrides.

    Raises:
        UserError, HydraException: naming the key that is wrong.
    """
    for key in sorted(varied):
        if key in ("output_root", "ablation") or key.startswith("hydra"):
            raise UserError(f"{key} cannot vary within a sweep: start a sweep for each of its values")
    composed: dict[str, tuple[list[str], DictConfig]] = {}
    for overrides in batch:
        kept = [override for override in overrides if not override.startswith("ablation=")]
        config = load(kept)
        unnamed = {*PLACE, "ablation"} - set(varied)
        composed[folder_name(_label(kept, unnamed))] = (kept, config)
    if len({str(config.name) for _, config in composed.values()}) > 1:
        sweep_dir = sweep_dir.parent / f"sweep-{'-'.join(sorted(varied))}"
    return sweep_dir, [_job(kept, config, sweep_dir / name, varied, ranks) for name, (kept, config) in composed.items()]


def _label(overrides: list[str], unnamed: Collection[str]) -> str:
    """A job's overrides in a line, text without quotes, but for those of keys that name no folder."""
    parsed = [each for each in map(parse, overrides) if each is not None and not each.is_hydra_override()]
    named = [each for each in parsed if each.key_or_group not in unnamed]
    return ",".join(
        sorted(
            f"{each.get_key_element()}={each._value.text}"
            if isinstance(each._value, QuotedString)
            else str(each.input_line)
            for each in named
        )
    )


def _job(overrides: list[str], config: DictConfig, folder: Path, varied: Collection[str], ranks: int) -> Job:
    immaterial = set(PLACE) - set(varied)
    with open_dict(config):
        del config["hydra"]
    fixed = "train.batch_size" in given(overrides)
    try:
        checked: TrainConfig = validate(config, TrainConfig)
        o = checked.train
        o.batch_size = fit_batch_size(o.global_batch_size, o.batch_size, ranks, fixed)  # as the job itself will do
        check_model(checked.model)
    except ValueError as error:
        raise UserError(f"{folder.name}: {error}") from error
    immaterial |= set() if fixed else {"train.batch_size"}
    immaterial -= {"data.root"} if checked.data.name.endswith("folder") else set()  # there it is the data set
    places = {"hydra.sweep.dir": folder.parent, "hydra.sweep.subdir": folder.name, "hydra.run.dir": folder}
    settings = [f"{key}={quote(str(place))}" for key, place in places.items()]
    return Job([*overrides, *settings], folder, asdict(checked), frozenset(immaterial))


def folder_name(overrides: str) -> str:
    """A file name for a job's overrides: these themselves, where they can be one."""
    name = re.sub(r"[^\w.,=+:~@%{}\[\]-]", "_", overrides) or "default"
    if name == overrides and len(name.encode()) <= LONGEST:
        return name
    if not overrides:
        return name
    return (
        f"{name.encode()[: LONGEST - 9].decode(errors='ignore')}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
    )
