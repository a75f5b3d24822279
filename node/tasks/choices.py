"""What a swarm's founder may choose for the nodes that join: a closed list.

A manifest names tasks and their options, and a joiner builds them. So an option must not reach beyond the task: a text
may be a path, an address or a name of code, and a large number may take all memory. A founder may choose

- a number or a boolean, of bounded size;
- a choice among the values that the task's own configuration has;
- a text of one of `TaskKind.safe_texts`, and the instruction before a question.

All else needs the word of who joins: `gossamer join --allow-task`, or the same option under [[tasks]] of its CONFIG.
"""

from collections.abc import Sequence

from node.tasks import is_text

MAX_NUMBER = 2**31 - 1  # where no configuration says what is usual: more than any data set has rows
MAX_DEPTH = 3  # of tables and lists in each other
MAX_SAFE_TEXT = 1024  # characters, as of an instruction
SMALL, FACTOR = 1000, 100  # an option may be so large, or so many times its default: harder than any model can use


def is_plain(value: object, depth: int = 0) -> bool:
    """Tell whether a value of JSON has numbers and booleans alone, of bounded size."""
    match value:
        case bool():
            return True
        case int() | float():
            return abs(value) <= MAX_NUMBER  # false for what is not a number
        case list():
            return depth < MAX_DEPTH and all(is_plain(element, depth + 1) for element in value)
        case dict():
            return depth < MAX_DEPTH and all(is_plain(entry, depth + 1) for entry in value.values())
        case _:
            return False


def is_safe_text(value: object) -> bool:
    """Tell whether a value is a text that is short enough for an option whose text is safe."""
    return is_text(value) and len(str(value)) <= MAX_SAFE_TEXT


def is_choice(value: object, default: object, choices: Sequence[object] = ()) -> bool:
    """Tell whether a value of JSON is one that an option of this default may have.

    A number may be larger than the default by a bounded factor. A list has no more elements than the default, each of
    which could stand for one of the default's. Anything else, such as a text, has to be the default or among `choices`.
    """
    match default:
        case bool():
            return isinstance(value, bool)
        case int():
            return type(value) is int and abs(value) <= max(SMALL, FACTOR * abs(default))
        case float():
            return type(value) in (int, float) and abs(value) <= max(SMALL, FACTOR * abs(default))  # type: ignore[arg-type]
        case list() | tuple():
            return (
                isinstance(value, list)
                and len(value) <= len(default)
                and all(any(is_choice(element, usual) for usual in default) for element in value)
            )
        case _:
            return value == default or value in choices
