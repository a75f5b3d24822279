"""Tool calls: found in what a policy said, in one of two forms, and checked against the tools that there are.

    <tool_call>{"name": "add", "arguments": {"step": 5}}</tool_call>    as chat templates such as Qwen's have it
    add(step=5)                                                         a line of its own, for any model

Arguments go by name, and their values are JSON. A turn with a tag is read in the first form alone. Text before the last
`</think>` is not read. A tagged call is answered in tags.

Anybody may have written the text. It becomes names that are looked up in a table, and JSON values within the bounds
below. Nothing of it is evaluated, and no name becomes an attribute. Reading takes time linear in the text.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from node.tasks import is_text

MAX_CALLS = 8  # of a turn
MAX_CALL = 4096  # characters of a call
MAX_DEPTH = 16  # of lists and tables within an argument
MAX_INTEGER = 2**63
OPENED, CLOSED = "<tool_call>", "</tool_call>"
RESULT, RESULT_END = "<tool_response>\n", "\n</tool_response>"  # as chat templates with such calls show results
_RESULT_TAG = re.compile(r"<(/?tool_response)>")
FORM = 'name(number=1, text="two")'

_LINE = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,63})\((.*)\)")
_NAMED = re.compile(r"[ \t]*([A-Za-z_][A-Za-z0-9_]{0,63})[ \t]*=[ \t]*")
_NEXT = re.compile(r"[ \t]*(,|$)")
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "integer": int,
    "number": (int, float),
    "string": str,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}

Schema = Mapping[str, Any]
"""A JSON schema of a tool's parameters, as `transformers.utils.get_json_schema` makes it of a function."""


class SaidCall(NamedTuple):
    """A tool's name, as it was said, and its arguments."""

    name: str
    arguments: dict[str, Any]


class CallError(ValueError):
    """A call cannot be read or carried out; the text is for the policy."""


class SaidCalls(NamedTuple):
    """The calls of a turn in order, an error in the place of each that cannot be read; whether they had tags."""

    calls: Sequence[SaidCall | CallError]
    tagged: bool


def read_calls(text: str) -> SaidCalls:
    """Return the calls in what a policy said: at most `MAX_CALLS`, and an error in place of all further ones."""
    spoken = text.rpartition("</think>")[2]
    tagged = OPENED in spoken
    texts = (
        [part.partition(CLOSED)[0] for part in spoken.split(OPENED, MAX_CALLS + 1)[1:]] if tagged else _lines(spoken)
    )
    calls: list[SaidCall | CallError] = []
    for call_text in texts[:MAX_CALLS]:
        try:
            calls.append(_tagged(call_text) if tagged else _plain(call_text))
        except CallError as error:
            calls.append(error)
    if len(texts) > MAX_CALLS:
        calls.append(CallError(f"a turn has at most {MAX_CALLS} calls"))
    return SaidCalls(calls, tagged)


def told(turn: SaidCalls, results: Sequence[str]) -> str:
    """Return what a policy is told of the results of its calls, in the form in which it called.

    A result may quote anybody, so a result tag inside it is written as `[tool_response]`: else it would begin a result
    that no tool returned.
    """
    if not turn.tagged:
        return "\n".join(results)
    untagged = (_RESULT_TAG.sub(r"[\1]", result) for result in results)
    return "\n".join(f"{RESULT}{result}{RESULT_END}" for result in untagged)


def results_in(text: str) -> list[str]:
    """Return the results of which `told` made a text, if calls had tags; none if it is another text."""
    if not (text.startswith(RESULT) and text.endswith(RESULT_END) and len(text) >= len(RESULT) + len(RESULT_END)):
        return []
    return text[len(RESULT) : -len(RESULT_END)].split(f"{RESULT_END}\n{RESULT}")


def _lines(text: str) -> list[str]:
    """Return the lines that look like calls, one more than are read at most."""
    lines: list[str] = []
    for line in text.split("\n"):
        if len(lines) <= MAX_CALLS and _LINE.fullmatch(line.strip()):
            lines.append(line.strip())
    return lines


def _tagged(text: str) -> SaidCall:
    if len(text) > MAX_CALL:
        raise CallError(f"a call has at most {MAX_CALL} characters")
    try:
        value: Any = _DECODER.decode(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise CallError('a call is JSON with a name and arguments: {"name": ..., "arguments": {...}}')
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict) or not _is_bounded(arguments):
        raise CallError("arguments are a table of plain values")
    return SaidCall(value["name"], arguments)


def _plain(line: str) -> SaidCall:
    if len(line) > MAX_CALL:
        raise CallError(f"a call has at most {MAX_CALL} characters")
    match = _LINE.fullmatch(line)
    assert match is not None  # `_lines` has looked
    name, inside = match.groups()
    arguments: dict[str, Any] = {}
    at = 0 if inside.strip() else len(inside)
    while at < len(inside):
        named = _NAMED.match(inside, at)
        if named is None or named[1] in arguments:
            raise CallError(f"a call is read as {FORM}")
        try:
            arguments[named[1]], at = _DECODER.raw_decode(inside, named.end())
        except (ValueError, RecursionError):
            raise CallError(f"a value is a JSON value, as in {FORM}") from None
        after = _NEXT.match(inside, at)
        if after is None:
            raise CallError(f"a call is read as {FORM}")
        at = after.end()
        if after[1] and at == len(inside):
            raise CallError(f"a call is read as {FORM}")
    if not _is_bounded(arguments):
        raise CallError(f"a value is a JSON value, as in {FORM}")
    return SaidCall(name, arguments)


def _table(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands twice")
    return table


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_table, parse_constant=_refuse)


def _is_bounded(value: Any, depth: int = 0) -> bool:
    """Tell whether a JSON value is neither deep nor huge, and its texts are such that UTF-8 can hold."""
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, str):
        return is_text(value)
    if isinstance(value, int):
        return -MAX_INTEGER <= value < MAX_INTEGER
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(is_text(name) and _is_bounded(part, depth + 1) for name, part in value.items())
    return value is None or all(_is_bounded(part, depth + 1) for part in value)


def check_call(call: SaidCall, tools: Mapping[str, Schema]) -> None:
    """Raise `CallError` unless `call` is of one of `tools`, with the arguments that its schema wants."""
    if call.name not in tools:
        raise CallError(f"there is no such tool: there are {', '.join(tools)}")
    schema = tools[call.name]
    known: Mapping[str, Schema] = schema.get("properties", {})
    missing = [name for name in schema.get("required", ()) if name not in call.arguments]
    if missing or not call.arguments.keys() <= known.keys():
        raise CallError(f"{call.name} takes {', '.join(known) or 'no arguments'}")
    for name, value in call.arguments.items():
        if not fits(value, known[name]):
            raise CallError(f"{name} of {call.name} is of another type: {kind_of(known[name])}")


def fits(value: Any, schema: Schema) -> bool:
    """Tell whether a JSON value is of the type that a schema names, as far as it names one."""
    if value is None and schema.get("nullable"):
        return True
    if "anyOf" in schema:
        return any(fits(value, choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return any(value == choice and type(value) is type(choice) for choice in schema["enum"])
    if "type" in schema and not _is(value, schema["type"]):
        return False
    return not isinstance(value, list) or all(fits(element, schema.get("items", {})) for element in value)


def _is(value: Any, kind: Any) -> bool:
    """Tell whether a JSON value is of a schema's `type`: a name or a list of names; an unknown name fits all."""
    if isinstance(kind, list):
        return any(_is(value, name) for name in kind)
    if not isinstance(kind, str) or kind not in _KINDS:
        return True
    return isinstance(value, _KINDS[kind]) and (not isinstance(value, bool) or kind not in ("integer", "number"))


def kind_of(schema: Schema) -> str:
    """Return a schema's type in words."""
    if "anyOf" in schema:
        return " or ".join(map(kind_of, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(map(json.dumps, schema["enum"]))
    kind = schema.get("type", "any")
    return " or ".join(map(str, kind)) if isinstance(kind, list) else str(kind)


def plain_form(tools: str) -> str:
    """Return the text that tells the tools, schemas as in `Item.tools`, to a model whose template tells none."""
    lines = [
        f"To use a tool, say its call in a line of its own, as in {FORM}. Then you are told what it returns. Tools:"
    ]
    for tool in json.loads(tools):
        function = tool["function"]
        given = function["parameters"].get("properties", {})
        signature = ", ".join(f"{name}: {kind_of(parameter)}" for name, parameter in given.items())
        about = [function["description"], *(f"{name}: {parameter['description']}" for name, parameter in given.items())]
        lines.append(f"{function['name']}({signature}): {' '.join(' '.join(about).split())}")
    return "\n".join(lines)
