"""Arguments of the command line, brought into the grammar of Hydra's overrides: text stays as it was typed.

Hydra reads `name=2024_01_02` as the number 20240102, and refuses `checkpoint=runs/sweep/seed=0` for its second `=`.
Where a key takes text, what is not yet text in that grammar therefore gets the quotes that it needs.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import pairwise, takewhile

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from involution.engine.config import DataConfig, EvalConfig, TrainConfig
from involution.engine.errors import UserError
from involution.engine.options import TrainOptions

# by the last part of the key: data.root, model.backbone.pretrained and hydra.launcher.partition are text as well
TEXT = {
    field.name
    for schema in (TrainConfig, EvalConfig, DataConfig, TrainOptions)
    for field in fields(schema)
    if field.type in (str, str | None)
} | {"images", "pretrained", "dir", "subdir", "partition", "account", "qos", "constraint"}
_PARSER = OverridesParser.create()


def keep_text(arguments: Sequence[str]) -> list[str]:
    """The arguments with the values of text keys as Hydra reads them as what was typed; others are left alone.

    A comma separates values, as in Hydra, but not where that would cut a path which exists; without -m, where several
    values are not possible, it is text too when the value is outside Hydra's grammar in any case.
    """
    if keyless := [argument for argument in arguments if re.match(r"\s*=.*\S", argument)]:
        raise UserError(f"{keyless[0]} has no key in front of the =; it should be KEY=VALUE")
    sweeping = bool({"-m", "--multirun"} & set(arguments))
    return [_keep(argument, sweeping) for argument in arguments]


def _keep(argument: str, sweeping: bool) -> str:
    found = re.fullmatch(r"(\+{0,2}[^=]*?)\s*=\s*(.*?)\s*", argument, re.DOTALL)
    if argument.startswith("-") or not found or found[1].rpartition(".")[2].lstrip("+") not in TEXT:
        return argument
    key, value = found.groups()
    if value.startswith("~/"):  # shells leave it as it is behind an `=`
        value = os.path.expanduser(value)
    parsed = parse(f"{key}={value}")
    if choice := re.fullmatch(r"choice\((.*)\)", value, re.DOTALL):
        return f"{key}=choice({_typed(choice[1], parsed)})"
    if parsed is None and (values := re.fullmatch(r"\[([^\[\]]*)\]", value, re.DOTALL)):
        return f"{key}=[{_typed(values[1], parsed)}]"
    if parsed is not None and isinstance(parsed._value, list):
        return f"{key}=[{_typed(value[1:-1], parsed)}]"
    if parsed is None and not sweeping:
        return f"{key}={quote(value)}"
    return f"{key}={_typed(value, parsed)}"


def _typed(values: str, parsed: Override | None) -> str:
    """Comma-separated values, those that Hydra would not take for text in quotes."""
    if parsed is not None:  # quotes and escapes that Hydra understands need no help, and may have commas inside
        elements = parsed._value.list if isinstance(parsed._value, ChoiceSweep) else parsed._value
        elements = elements if isinstance(elements, list) else [elements]
        if not any(isinstance(each, int | float) for each in elements) and not os.path.exists(values):
            return values
    return ",".join(piece if _is_text(parse(f"x={piece}")) else quote(piece) for piece in _pieces(values))


def _pieces(values: str) -> Iterator[str]:
    """Split at commas, but for those in the names of files that exist: the longest first."""
    parts = values.split(",")
    while parts:
        joined = (",".join(parts[:n]) for n in range(len(parts), 1, -1))
        piece = next(filter(os.path.exists, joined), parts[0])
        yield piece.strip()
        del parts[: piece.count(",") + 1]


def _is_text(parsed: Override | None) -> bool:
    return parsed is not None and isinstance(parsed._value, str | QuotedString | None)


def quote(text: str) -> str:
    """Text in the quotes of Hydra's grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def parse(argument: str) -> Override | None:
    """An argument as Hydra reads it, None where it is outside Hydra's grammar."""
    try:
        return _PARSER.parse_overrides([argument])[0]
    except HydraException:
        return None


def explain(argument: str, arguments: Sequence[str]) -> str:
    """Why Hydra's grammar does not take an argument, and what to type instead."""
    key, equal, value = argument.partition("=")
    if not equal:
        before = next((a for a, b in pairwise(arguments) if b == argument and "=" in a), None)
        if "=" in arguments[arguments.index(argument) + 1 : arguments.index(argument) + 2]:
            return f"{argument}: no blanks around the =, please: {argument}=VALUE"
        whole = f"; if it belongs to the one before, put both in quotes: '{before} {argument}'" if before else ""
        return f"{argument} should be KEY=VALUE{whole}"
    if key != key.strip() and parse(f"{key.strip()}=1") is not None:
        return f"{argument}: no blanks around the =, please: {key.strip()}={value.strip() or 'VALUE'}"
    if parse(f"{key}=1") is None:
        return f"{argument}: {key} cannot be a key; keys have letters from a to z, digits, _ and ."
    if value.rstrip().endswith(","):
        return f"{argument}: there is nothing after the last comma"
    for opening, closing in ("[]", "{}"):
        if value.startswith(opening) and not value.endswith(closing):
            behind = arguments[arguments.index(argument) + 1 :] if argument in arguments else ()
            rest = list(takewhile(lambda piece: "=" not in piece, behind))
            ends = [i for i, piece in enumerate(rest, 1) if piece.endswith(closing)]
            if ends:
                whole = " ".join([argument, *rest[: ends[0]]])
                return f"{argument}: put the whole argument in quotes for the shell: '{whole}'"
            return f"{argument}: the {opening} is not closed: '{key}={value}{closing}'"
    if value.startswith("(") and value.endswith(")") and parse(f"{key}=[{value[1:-1]}]"):
        return f"{argument}: lists are written in brackets: '{key}=[{value[1:-1]}]'"
    strange = "".join(dict.fromkeys(c for c in value if not c.isascii() or c in "=()[]{}'\"#&^<>;!~`"))
    strange = "=" if "=" in strange else strange.strip("[]") or strange
    outside = "" if strange.isascii() else ", for letters outside ASCII"
    listed = value.startswith("[") and value.endswith("]")
    cure = "[" + ",".join(f'"{each.strip()}"' for each in value[1:-1].split(",")) + "]" if listed else f'"{value}"'
    return f"{argument}: a value with {strange} needs quotes of its own, inside the shell's{outside}: '{key}={cure}'"
