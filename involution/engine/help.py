"""What `python train.py --help` shows: every group and key of the configuration with its comment in conf/."""

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

#: groups in the order in which they are chosen; others, if any, behind them
_ORDER = ("recipe", "model", "data", "optimizer", "schedule", "augmentation", "ablation")
_EXAMPLES = {
    "train.py": ("python train.py recipe=demo", "python train.py model=rednet50 data.root=/path/to/imagenet"),
    "eval.py": ("python eval.py checkpoint=runs/demo-rednet26", "python eval.py checkpoint=rednet50 images=photo.jpg"),
}
_KEY = re.compile(r"(?P<indent> *)(?P<key>[\w]+):(?P<value>.*?)(?:\s#\s(?P<comment>.*))?$")


def text(program: str, config_dir: str, config_name: str, arguments: Sequence[str]) -> str:
    """The help text, with the keys of the groups that the arguments choose, as in ``model=timm --help``."""
    folder = Path(config_dir)
    groups = {each.name: _options(each) for each in sorted(folder.iterdir()) if each.is_dir() and each.name != "hydra"}
    if program == "train.py":
        groups["data"].pop("as_trained", None)  # eval.py's
    chosen = [each for each in arguments if each.partition("=")[0] in groups and "=" in each]
    with initialize_config_dir(config_dir, version_base="1.3"):
        config = compose(config_name, chosen, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        choices = {group: name for group, name in config.hydra.runtime.choices.items() if group in groups}
    values: Any = OmegaConf.to_container(config)
    values.pop("hydra")
    notes: dict[str, str] = {}
    for group, name in choices.items():
        if name is not None:
            for key, note in _comments(folder / group / f"{name}.yaml").items():
                notes.setdefault(key, note)
    notes |= _comments(folder / f"{config_name}.yaml")
    lines = [f"{program} [GROUP=NAME ...] [KEY=VALUE ...]", *(f"  {each}" for each in _EXAMPLES.get(program, ()))]
    lines += ["", "Groups:"]
    for group in (each for each in sorted(groups, key=_place) if each in choices):
        lines.append(f"  {group}={choices[group] or 'null'}")
        lines += [f"    {name:<22}{note}".rstrip() for name, note in _shortened(groups[group])]
    lines += ["", "Keys, with their values:"]
    for key, value in leaves(values):
        if re.search(r"\$\{(own|short_side):", str(value)):
            value = OmegaConf.select(config, key)
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        note = notes.get(key, "")
        lines.append(f"  {key}={shown}" + (f"{' ' * max(2, 44 - len(key) - len(shown))}# {note}" if note else ""))
    sweeps = "Sweeps: -m with commas between values, or with ablation=NAME. " if program == "train.py" else ""
    return "\n".join([*lines, "", f"{sweeps}Hydra's own options: --hydra-help. The configuration alone: --cfg job"])


def _place(group: str) -> tuple[int, str]:
    """Where a group stands in the list."""
    return _ORDER.index(group) if group in _ORDER else len(_ORDER), group


def _options(group: Path) -> dict[str, str]:
    """Names of a group with the first sentences of their files."""
    found = {}
    for file in sorted(group.glob("[!_]*.yaml")):
        lines = (line for line in file.read_text().splitlines() if not line.startswith("# @package"))
        comment = " ".join(line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("# "), lines))
        found[file.stem] = " ".join(comment.split(". ")[0].split())
    return found


def _shortened(options: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Those with a comment one by one, the others in lines of several."""
    plain = [name for name, note in options.items() if not note]
    for start in range(0, len(plain), 6):
        yield ", ".join(plain[start : start + 6]), ""
    yield from ((name, note) for name, note in options.items() if note)


def _comments(file: Path) -> dict[str, str]:
    """{key: comment} of a file and those it is made of: comments behind a value, or in lines above it."""
    found: dict[str, str] = {}
    lines = file.read_text().splitlines()
    if file.parent.name != "conf":  # what a group's file begins with is about the file
        lines = lines[next(i for i, line in enumerate(lines) if not line.startswith("#")) :]
    path = [] if "# @package _global_" in file.read_text() or file.parent.name == "conf" else [file.parent.name]
    for base in re.findall(r"^defaults: \[(\w+)\]|^  - (_\w+)$", file.read_text(), re.MULTILINE):
        name = base[0] or base[1]
        if name != "_self_":
            found |= _comments(file.with_name(f"{name}.yaml"))
    stack: list[tuple[int, str]] = []
    above: list[str] = []  # lines of comment above a key
    for line in lines:
        if line.strip().startswith("# "):
            above.append(line.strip().removeprefix("# "))
            continue
        if match := _KEY.match(line):
            indent = len(match["indent"])
            stack = [each for each in stack if each[0] < indent] + [(indent, match["key"])]
            behind = [match["comment"]] if match["comment"] else []
            if behind or above:
                found[".".join([*path, *(key for _, key in stack)])] = " ".join([*above, *behind])
        above = []
    return found


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
