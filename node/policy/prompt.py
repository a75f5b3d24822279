"""How a question becomes a prompt: the turns of a chat, or plain text.

Plain text, where nothing stands before the question, is the bare question. With examples or an instruction:

    instruction

    Question: What is 3 + 4?
    Answer: 7

    Question: What is 8 - 2?
    Answer:

Questions that end in `=` are completed in place, a line each: `12+7=19`, then `3-8=`. A prompt never ends in a
space: the first token of an answer brings its own, as in the texts that models learnt from.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from node.tasks import Item
from node.tasks.environments.tool_calls import plain_form


def chat_turns(item: Item, *, system_role: bool) -> list[Mapping[str, str]]:
    """Return `item` as a chat: its instruction, its examples as earlier turns, its question.

    Without a `system_role` the instruction opens the first user turn.
    """
    turns: list[Mapping[str, str]] = []
    before = ""
    if item.system and system_role:
        turns.append({"role": "system", "content": item.system})
    elif item.system:
        before = f"{item.system}\n\n"
    for question, answer in item.examples:
        turns += [{"role": "user", "content": before + question}, {"role": "assistant", "content": answer}]
        before = ""
    return [*turns, {"role": "user", "content": before + item.question}]


def plain_text(item: Item) -> str:
    """Return `item` as a text to be continued."""
    if not item.system and not item.examples:
        return item.question
    blocks = [item.system] if item.system else []
    if _in_place(item):
        gap = " " if item.question.endswith(" =") else ""
        solved = [f"{question}{gap}{answer}" for question, answer in item.examples]
        return "\n\n".join([*blocks, "\n".join([*solved, item.question])])
    blocks += [f"Question: {question}\nAnswer:{_gap(answer)}{answer}" for question, answer in item.examples]
    return "\n\n".join([*blocks, f"Question: {item.question}\nAnswer:"])


def stop_texts(item: Item) -> list[str]:
    """Return the texts at which a continuation of `plain_text(item)` has left its answer for a next question."""
    if not item.system and not item.examples:
        return []
    return ["\n"] if _in_place(item) else ["\n\nQuestion:"]


def with_tools_told(item: Item) -> Item:
    """Return `item` with its tools told in the instruction, in the plain form of calls."""
    if not item.tools:
        return item
    return replace(item, system="\n\n".join(filter(None, [item.system, plain_form(item.tools)])), tools="")


def tells_of_calls(prompt: str, item: Item) -> bool:
    """Tell whether a prompt that a chat template made tells all of the item's tools, and the form of call that is read.

    Templates of other forms exist: a policy that follows one would call nothing.
    """
    names = [tool["function"]["name"] for tool in json.loads(item.tools)]
    is_complete = all(name in prompt for name in names) and item.system.strip() in prompt
    return is_complete and re.search(r"<tool_call>\s*\{", prompt) is not None


def _in_place(item: Item) -> bool:
    questions: Sequence[str] = [item.question, *(question for question, _ in item.examples)]
    return all(question.endswith("=") for question in questions)


def _gap(answer: str) -> str:
    return "\n" if "\n" in answer else " "
