"""`gossamer answer`: a machine that cannot train answers a swarm's questions with a model behind a URL."""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from node.cli.options import AllowedTasks, Debug, Folder, Listen, OptionalInvite, Settings
from node.config import apply_override
from node.errors import UserError, for_shell
from node.operations.given import read_invite
from node.state_folder import check_free

Url = Annotated[
    str,
    typer.Option(
        "--url", help="The endpoint, e.g. http://127.0.0.1:11434/v1 for Ollama. OPENAI_API_KEY is sent if it is set."
    ),
]
Name = Annotated[str, typer.Option("--model", metavar="NAME", help="Which of its models; peers are told the name.")]
Plain = Annotated[
    bool, typer.Option("--plain", help="Questions are texts to be continued: for a model that was not taught to chat.")
]
Completions = Annotated[int, typer.Option(min=2, max=128, help="Answers to each question.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer, with its thoughts.")]
Temperature = Annotated[float, typer.Option(help="Of sampling; -1 leaves it to the server, as some models want.")]
AtOnce = Annotated[int, typer.Option("--at-once", min=1, max=256, help="Questions that are asked at a time.")]
Timeout = Annotated[float, typer.Option(min=1.0, help="Seconds that a request may take.")]
PerMinute = Annotated[
    float | None,
    typer.Option("--requests-a-minute", min=0.01, help="At most.  [default: any]", show_default=False),
]
Questions = Annotated[
    int | None, typer.Option(min=1, help="Stop after so many, over all starts.  [default: no end]", show_default=False)
]
Tokens = Annotated[
    int | None,
    typer.Option(min=1, help="Ask no more after so many, over all starts.  [default: no end]", show_default=False),
]
Cost = Annotated[
    float | None,
    typer.Option(min=0.0, help="Ask no more once --price comes to so much.  [default: no end]", show_default=False),
]
Price = Annotated[
    str | None,
    typer.Option(metavar="IN,OUT", help="Of a million tokens of prompts, and of answers.", show_default=False),
]
NotKept = Annotated[
    bool, typer.Option("--not-kept", help="Mark the groups, so that no archive may keep them. Give it at each start.")
]


def answer(  # noqa: PLR0913  # one parameter for each option of the command
    invite: OptionalInvite = None,
    *,
    url: Url,
    model: Name,
    folder: Folder = Path("answer-state"),
    plain: Plain = False,
    completions: Completions = 8,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 1.0,
    at_once: AtOnce = 4,
    timeout: Timeout = 300.0,
    requests_a_minute: PerMinute = None,
    questions: Questions = None,
    tokens: Tokens = None,
    cost: Cost = None,
    price: Price = None,
    not_kept: NotKept = False,
    listen: Listen = None,
    settings: Settings = None,
    allow_task: AllowedTasks = None,
    debug: Debug = False,
) -> None:
    """Answer a swarm's questions with a model behind a URL.

    The URL is OpenAI-compatible. The member trains nothing, and needs neither torch nor a GPU. Answers are scored here,
    and groups that may teach are published, as a node's own are. Nothing is asked while no node that learns is
    known. Without INVITE, it resumes from its folder.

    \b
    Example:
      gossamer answer @invite.txt --url http://127.0.0.1:11434/v1 --model qwen3:0.6b --state a0
    """
    if (cost is None) != (price is None):
        raise UserError("--cost and --price go together: what may be spent, and what a million tokens cost")
    parsed = None if invite is None else read_invite(invite)
    prices = _prices(price)
    check_free(folder)
    given: dict[str, Any] = {"sampling": {"external": 0}}  # it draws nothing
    for setting in [*([f"network.listen={listen}"] if listen else []), *(settings or [])]:
        apply_override(given, setting)

    from node.exchange.answering import AnsweringBudget, is_affordable
    from node.exchange.answering import answer as answer_questions
    from node.exchange.endpoint import ModelEndpoint
    from node.exchange.member import Exchange
    from node.processes.signals import interrupting_signals, stop_signals
    from node.swarm.swarm_folder import load_manifest
    from node.telemetry.logs import setup_logs

    budget = AnsweringBudget(questions, tokens, cost, prices)
    heat = None if temperature < 0 else temperature
    endpoint = ModelEndpoint(url, model, max_tokens, heat, not plain, timeout, requests_a_minute)
    if parsed is None and load_manifest(folder) is None and not given.get("network", {}).get("seeds"):
        raise UserError(f"{folder} belongs to no swarm: `gossamer answer INVITE --state {for_shell(folder)}` joins one")
    try:
        with interrupting_signals():
            endpoint.check()
            known = None if parsed is None else str(parsed)
            swarm = Exchange(
                folder, invite=known, allow_tasks=allow_task or [], fits=is_affordable, policy=model, **given
            )
    except KeyboardInterrupt:
        print("stopped while starting", file=sys.stderr)
        return
    with swarm, stop_signals() as stopping:
        setup_logs(folder, debug=debug)
        if completions > swarm.max_answers:
            raise UserError(f"a group of this swarm has at most {swarm.max_answers} answers: lower --completions")
        endpoint.is_stopping = lambda: stopping
        answered = answer_questions(swarm, endpoint, completions, at_once, budget, kept=not not_kept)
    print(answered)


def _prices(text: str | None) -> tuple[float, float]:
    if text is None:
        return 0.0, 0.0
    try:
        prompt, completion = (float(word) for word in text.split(","))
    except ValueError:
        prompt = completion = math.nan
    if not (0 <= prompt < math.inf and 0 <= completion < math.inf):
        raise UserError(f"--price has to be two numbers with a comma, 0.15,0.6 say, and not {text!r}")
    return prompt, completion
