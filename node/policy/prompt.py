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

from collections.abc import Mapping, Sequence

from node.tasks import Item


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


def _in_place(item: Item) -> bool:
    questions: Sequence[str] = [item.question, *(question for question, _ in item.examples)]
    return all(question.endswith("=") for question in questions)


def _gap(answer: str) -> str:
    return "\n" if "\n" in answer else " "
