"""A configuration as TOML, every key with its meaning: what `--dry-run` prints."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel


def to_toml(config: BaseModel) -> str:
    """Return `config` as a TOML document; reading it gives an equal configuration."""
    return "\n".join(_table(config, "")).lstrip("\n") + "\n"


def _table(section: BaseModel, name: str) -> Iterator[str]:
    """Yield the lines of a section: its values first, as TOML wants, then its tables."""
    tables: list[tuple[str, BaseModel, bool]] = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        comment = f"  # {field.description}" if field.description else ""
        if isinstance(value, BaseModel):
            tables.append((f"{name}{key}", value, False))
        elif _is_tables(value):
            tables += [(f"{name}{key}", item, True) for item in value]
        elif value is None:
            yield f"# {key} ={comment}"
        else:
            yield f"{key} = {_value(value)}{comment}"
    for path, child, repeated in tables:
        yield ""
        yield f"[[{path}]]" if repeated else f"[{path}]"
        yield from _table(child, f"{path}.")


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, BaseModel) for item in value)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_string(str(key))} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def _string(text: str) -> str:
    """Return a TOML basic string: as JSON's, but DEL is escaped and other characters stand for themselves."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
