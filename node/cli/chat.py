"""`gossamer chat`: ask a trained policy something."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.options import Debug, Settings, Target, say_loading
from node.errors import UserError
from node.operations.trained import find_trained

if TYPE_CHECKING:
    from node.engines import RolloutEngine, SamplingParams
    from node.policy.load import Policy
    from node.tasks import Item
    from node.tasks.task_set import TaskSet

Questions = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[QUESTION]...",
        help="What to ask. Without any: each line of standard input, or an episode.",
        show_default=False,
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="Use this task's instruction and examples.  [default: the node's first task]",
        show_default=False,
    ),
]
Bare = Annotated[bool, typer.Option("--bare", help="Ask without instruction and solved examples.")]
Answers = Annotated[int, typer.Option("-n", "--answers", min=1, max=128, help="Answers to each question.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0, max=10, help="Of sampling; 0: greedy.  [default: 0 for one answer, else the node's]", show_default=False
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens of an answer.  [default: the node's limit]", show_default=False)
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of sampling, and of the held-out question.")]


def chat(  # noqa: PLR0913  # one parameter for each option of the command
    model: Target,
    questions: Questions = None,
    task: Task = None,
    bare: Bare = False,
    answers: Answers = 1,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Ask a trained policy your own questions.

    It is asked as in training, with the instruction and the solved examples of the node's first task or of --task. A
    note on standard error marks an answer that is cut off.

    If the task has an environment and no question is given, the policy plays an episode on a held-out question.

    \b
    Example:
      gossamer chat runs/a/nodes/n0 "12+7=" -n 4
      gossamer chat runs/game/nodes/n0 --seed 3
      gossamer chat my-model --max-tokens 200
    """
    trained = find_trained(model, settings, [task] if task else None)
    say_loading(trained)

    from node.engines import SamplingParams, in_process
    from node.policy.load import load_policy
    from node.tasks import Item, load_tasks
    from node.tasks.environments.episodes import start_of
    from node.telemetry.logs import setup_logs

    setup_logs(debug=debug)
    config = trained.config
    tasks = None if bare else load_tasks(config.tasks, trained.split())
    around = tasks.tasks[0].make(seed) if tasks else Item("", "")
    policy = load_policy(config.policy, config.trainer.bf16, trained.adapters)
    engine = in_process(policy)
    sampling = SamplingParams.from_config(config.engine)
    if max_tokens is not None:
        sampling = replace(sampling, max_completion_length=max_tokens)
    if temperature is not None or answers == 1:
        sampling = replace(sampling, temperature=temperature or 0.0)
    if tasks is not None and not questions and start_of(tasks.tasks[0]) is not None:
        for episode in _played(tasks, policy, engine, sampling, answers, seed):
            print(episode, flush=True)
        return
    for number, question in enumerate(_asked(questions)):
        item = replace(around, question=question)
        prompt = _prompt(policy, item, sampling.max_completion_length)
        (made,) = engine.generate([prompt], answers, sampling, seed + number)
        for reply in made:
            print(_shown(reply.text), flush=True)
            if not reply.finished:
                print(f"(cut off after {len(reply.token_ids)} tokens: --max-tokens)", file=sys.stderr)


def _played(
    tasks: "TaskSet", policy: "Policy", engine: "RolloutEngine", sampling: "SamplingParams", count: int, seed: int
) -> Iterator[str]:
    """Play `count` episodes on a held-out question of the first task; yield what to show of each."""
    from node.engines.episodes import EpisodeQuestion, Episodes, play

    task = tasks.tasks[0]
    item = next(tasks.evaluation(task, seed, 1), None) or task.make(seed)
    asked = EpisodeQuestion(task, item, _prompt(policy, item, sampling.max_completion_length))
    room = (policy.positions or sys.maxsize) - sampling.max_completion_length
    (made,) = play(engine, Episodes([asked], count, sampling, seed, room, policy.observations()))
    for number, completion in enumerate(made):
        yield "" if number else _shown(item.question)
        for at, text in enumerate(completion.texts):
            yield f"{'←' if at % 2 else '→'} {_shown(text)}"
        yield "(no reward: the log says why)" if completion.reward is None else f"(reward {completion.reward:g})"


def _asked(questions: list[str] | None) -> Iterator[str]:
    if questions:
        yield from questions
        return
    for line in _lines():
        if line.strip():
            yield line.strip()


def _lines() -> Iterable[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def _prompt(policy: "Policy", item: "Item", answer: int) -> list[int]:
    """Return the tokens that ask `item`; `UserError` where they and an answer of `answer` tokens are too many."""
    prompt = policy.encode_prompt(item)
    if policy.positions is not None and len(prompt) + answer > policy.positions:
        raise UserError(
            f"this has {len(prompt)} tokens, and the model holds {policy.positions} with the answer's {answer}: ask "
            "less, or lower --max-tokens"
        )
    return prompt


def _shown(text: str) -> str:
    """Return what a model said for a terminal: nothing in it acts there, but it keeps its lines and letters."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in text)
