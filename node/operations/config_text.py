"""A configuration as TOML, every key with its meaning: what `--dry-run` prints."""

import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from node.config import COMMON_KEYS, PASSED, TrlOptions, is_key


def to_toml(
    config: BaseModel,
    notes: Mapping[str, str] = MappingProxyType({}),
    *,
    only_what_is_set: bool = False,
    every_key: bool = True,
) -> str:
    """Return `config` as a TOML document; reading it gives an equal configuration.

    Args:
        config: of a node.
        notes: say, by dotted key, where a value comes from, in place of what the key means.
        only_what_is_set: the other keys are comments that show what holds.
        every_key: otherwise, keys that few people set are there only where they have another value than the default.
    """
    lines = list(_table(config, "", notes, only_what_is_set, every_key))
    if not every_key:
        lines += ["", "# All other settings have their defaults. `gossamer node --dry-run --all` shows them."]
    return "\n".join(lines).lstrip("\n") + "\n"


def _table(
    section: BaseModel, name: str, notes: Mapping[str, str], only_what_is_set: bool, every_key: bool
) -> Iterator[str]:
    """Yield the lines of a section: its values first, as TOML wants, then its tables."""
    tables: list[tuple[str, BaseModel, bool]] = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        dotted = f"{name}{key}"
        meaning = notes.get(dotted, field.description)
        comment = f"  # {meaning}" if meaning else ""
        unset = "# " if only_what_is_set and key not in section.model_fields_set else ""
        if isinstance(value, BaseModel):
            tables.append((dotted, value, False))
        elif isinstance(value, list) and value and all(isinstance(item, BaseModel) for item in value):
            tables += [(dotted, item, True) for item in value]
        elif not every_key and is_key(dotted) and dotted not in COMMON_KEYS and value == field.default:
            continue
        elif every_key and dotted == "trainer.trl":
            yield from _trl_options(value, notes)
        elif value is None:
            yield f"# {key} ={comment}"
        else:
            yield f"{unset}{key} = {toml_value(value)}{comment}"
    for path, child, repeated in tables:
        lines = list(_table(child, f"{path}.", notes, only_what_is_set, every_key))
        if repeated or (lines and lines[0]):  # else it has no values of its own
            yield from ("", f"[[{path}]]" if repeated else f"[{path}]")
        yield from lines


def _trl_options(given: Mapping[str, Any], notes: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each option of `trainer.trl`; those that are not `given` are comments that show what holds."""
    for name, field in TrlOptions.model_fields.items():
        value = given.get(name, field.default)
        meaning = notes.get("trainer.trl", field.description) if name in given else field.description
        comment = f"  # {meaning}" if meaning else ""
        if value is None:
            yield f"# trl.{name} ={comment}"
        else:
            yield f"{'' if name in given else '# '}trl.{name} = {toml_value(value)}{comment}"
    yield from (f"trl.{name} = {toml_value(given[name])}" for name in PASSED if name in given)
    yield f"# of TRL as they are: {', '.join(f'trl.{name}' for name in PASSED if name not in given)}"


def toml_value(value: Any) -> str:
    """Return a value of the configuration as TOML; in a table, without the keys that have none."""
    if isinstance(value, Mapping):
        held = {key: item for key, item in value.items() if item is not None}
        return "{" + ", ".join(f"{_key(str(key))} = {toml_value(item)}" for key, item in held.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def _key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else _string(name)


def _string(text: str) -> str:
    """Return a TOML basic string: as JSON's, but DEL is escaped and other characters stand for themselves."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
