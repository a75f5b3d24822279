"""Schemas of tools: what a function's signature and docstring tell a policy, as chat templates take it.

The form is that of `transformers.utils.get_json_schema`, which nothing here imports: tasks know no transformers. The
docstring is Google's: a description, then `Args:` with a line or more for each argument.
"""

import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union

from node.tasks.tool_calls import FORM, kind_of

_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", types.NoneType: "null", dict: "object"}
_SECTION = re.compile(r"^(Args|Arguments|Returns|Yields|Raises|Examples?|Notes?):[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"(\w+)[ \t]*(?:\([^)]*\))?:[ \t]*(.*)")


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the schema of a function as a tool.

    Raises:
        ValueError: it has no docstring, or an argument without a type that JSON has.
    """
    about, described = _described(inspect.getdoc(function) or "")
    if not about:
        raise ValueError("write a docstring that says what it does")
    hints = typing.get_type_hints(function)
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"its argument {name} has no name in a call")
        if name not in hints:
            raise ValueError(f"its argument {name} has no type hint")
        properties[name] = {**_schema(name, hints[name]), "description": described.get(name, "")}
        if parameter.default is parameter.empty:
            required.append(name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    return {
        "type": "function",
        "function": {"name": function.__name__, "description": about, "parameters": parameters},
    }


def _schema(name: str, hint: Any) -> dict[str, Any]:
    """Return the schema of values of a type; `ValueError` if JSON has none of it."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any:
        return {}
    if origin in (Union, types.UnionType):
        kinds = [_schema(name, one) for one in inner if one is not types.NoneType]
        either = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        return {**either, "nullable": True} if types.NoneType in inner else either
    if origin is Literal and {type(one) for one in inner} <= {str, int}:
        return {"enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": _schema(name, inner[0])} if inner else {"type": "array"}
    if origin in _PLAIN:
        return {"type": _PLAIN[origin]}
    raise ValueError(f"its argument {name} is of a type that JSON has not: take texts, numbers, lists and tables")


def _described(docstring: str) -> tuple[str, dict[str, str]]:
    """Return what a docstring says of a function, and of its arguments."""
    about, *sections = _SECTION.split(docstring)
    told: dict[str, str] = {}
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title in ("Args", "Arguments"):
            name = ""
            lines = inspect.cleandoc(body).splitlines()
            for line in lines:
                found = None if line.startswith((" ", "\t")) else _ARGUMENT.fullmatch(line)
                if found is not None:
                    name, told[found[1]] = found.groups()
                elif name:
                    told[name] = f"{told[name]} {line.strip()}".strip()
    return about.strip(), told


def plain_form(tools: str) -> str:
    """Return the text that tells the tools, schemas as in `Item.tools`, to a model whose template tells none."""
    lines = [
        f"To use a tool, say its call in a line of its own, as in {FORM}. Then you are told what it returns. Tools:"
    ]
    for tool in json.loads(tools):
        function = tool["function"]
        given = function["parameters"].get("properties", {})
        signature = ", ".join(f"{name}: {kind_of(one)}" for name, one in given.items())
        about = [function["description"], *(f"{name}: {one['description']}" for name, one in given.items())]
        lines.append(f"{function['name']}({signature}): {' '.join(' '.join(about).split())}")
    return "\n".join(lines)
