"""What a round costs: ours against TRL's own `GRPOTrainer`, and sharing on against off.

    python -m benchmarks.round

**Against TRL.** Both sides start from the same weights, ask the same questions, sample with the same seeds by
`transformers.generate` (TRL's, too, draws its tokens by the node's function), verify with the same task and take the
same update. A row says which part of all completions came out equal: all, until rounding sets the two apart, or a round
without signal, in which TRL takes a step and we do not. Each round is timed from the end of one update's log to the end
of the next.

- ours: the node's loop with J = 0, alone: questions, generation, verification, draw, update, metrics row;
- TRL: its ordinary path, `_generate_and_score_completions`, with a data set of the same
  prompts in the same order, a reward function that verifies, and the same logging.

What neither times: imports, loading, the first round of a block, checkpoints. Blocks
alternate, so that a busy machine is busy for both. With `reward="dense"` every completion
has a reward of its own and both train on all of them, like for like. With `"task"` the
tasks' own sparse reward counts, and we leave the completions without advantage out of the
forward pass, which TRL does not. Where products are in bfloat16 (a large model, on a machine that
has them) they are so on both sides, and rounding sets the completions apart sooner.

**Sharing.** See `benchmarks.sharing`: a node among seven peers against the same node alone, with nothing beside it and
beside as many peers of others. The peers want a core for themselves; where there is none, they slow the node's
clock, and `mean_cpu_s`, the time of all threads of the node's process, is what it pays: the mean, as what peers cost
comes in bursts, twice a second, and most short rounds have none.
"""

import json
import statistics
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
import typer
from datasets import Dataset
from transformers import LogitsProcessorList, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.block import SEED, Block, Engine, Stamp, block, forget_peak, stamp, time_gossamer
from benchmarks.options import lengths_of
from benchmarks.sharing import time_beside, time_sharing
from node.config import NodeConfig, parse_config
from node.engines import SamplingParams, seed_of_prompt, seeds_of_rows
from node.engines.hf import SeededTokens
from node.policy.load import Policy, load_policy
from node.policy.prompt import chat_turns, plain_text
from node.swarm.sharing import NoExchange
from node.tasks import Item, Task, TaskKey, derive_seed, load_tasks
from node.tasks.task_set import TaskSet

Reward = Literal["dense", "task"]
Comparison = Literal["trl", "sharing", "both"]
Row = dict[str, Any]
PEERS = 7


def run(  # noqa: PLR0913  # one argument each option
    *,
    model: str = "builtin",
    questions: int = 4,
    completions: int = 8,
    rounds: int = 20,
    warm_rounds: int = 100,
    blocks: int = 6,
    threads: int = 1,
    compare: Comparison = "both",
    examples: int = 0,
    engine: Engine = "generate",
    device: str = "cpu",
    lengths: tuple[int, int] | None = None,
) -> Iterator[Row]:
    """Yield a row for each side of each comparison, and last the ratios of their medians.

    Args:
        model: as in `policy.model`.
        questions: a round.
        completions: a question.
        rounds: timed in each block.
        warm_rounds: before those, where sharing is timed.
        blocks: of each side.
        threads: of torch; set for the whole process.
        compare: which of the two comparisons to make.
        examples: solved ones before each question, which is then arithmetic, in plain text.
        engine: of both sides: transformers' `generate`, its continuous batching ("paged"), or vLLM on the same GPU.
        device: as in `policy.device`.
        lengths: the longest prompt and the longest completion, in tokens; default: as the model's preset has them.
    """
    torch.set_num_threads(threads)
    common = {
        "model": model,
        "questions": questions,
        "completions": completions,
        "examples": examples,
        "threads": threads,
        "engine": engine,
        "device": device,
    }
    ratio: dict[str, dict[str, float]] = {}
    if compare != "sharing":
        config = _config(model, questions, completions, rounds + 1, examples, device, engine, lengths)
        ratio["trl"] = yield from _against_trl(config, common, blocks, engine)
    if compare != "trl":
        config = _config(model, questions, completions, rounds + warm_rounds, examples, device, "generate", lengths)
        ratio["sharing off"] = yield from _sharing(config, common, blocks, warm_rounds)
    yield {"bench": "round", "ratio": ratio}


def _against_trl(
    config: NodeConfig, common: Row, blocks: int, engine: Engine
) -> Generator[Row, None, dict[str, float]]:
    ratios = {}
    for reward in ("dense", "task"):
        tasks = _tasks(config, reward)
        ours, theirs = _in_turns(
            blocks,
            partial(time_gossamer, config, tasks, NoExchange(), engine_name=engine),
            partial(time_trl, config, tasks, engine),
        )
        parameters = common | {"reward": reward, "same_completions": _agreement(ours, theirs)}
        yield _row("gossamer", ours, parameters)
        yield _row("trl", theirs, parameters)
        ratios[f"reward={reward}"] = _median(ours) / _median(theirs)
        ratios[f"reward={reward} cpu"] = _median_cpu(ours) / _median_cpu(theirs)
        if theirs[0].peak_bytes:
            ratios[f"reward={reward} memory"] = _peak(ours) / _peak(theirs)
    return ratios


def _sharing(config: NodeConfig, common: Row, blocks: int, warm: int) -> Generator[Row, None, dict[str, float]]:
    tasks = load_tasks(config.tasks)
    groups = []

    def shared() -> Block:
        timed, received = time_sharing(config, tasks, PEERS, warm)
        groups.append(received / (config.last_round - warm))
        return timed

    on, beside, off = _in_turns(
        blocks,
        shared,
        partial(time_beside, config, tasks, PEERS, warm),
        partial(time_gossamer, config, tasks, NoExchange(), warm),
    )
    taken = round(statistics.fmean(groups), 1)
    same = {"same_completions": _agreement(on, off)}
    yield _row("sharing on", on, common | same | {"peers": PEERS, "peers_groups_a_round": taken})
    yield _row("sharing off, beside others", beside, common | {"peers": 0, "peers_groups_a_round": 0})
    yield _row("sharing off", off, common | {"peers": 0, "peers_groups_a_round": 0})
    return {
        f"peers={PEERS}": _median(on) / _median(off),
        f"peers={PEERS} cpu": _mean_cpu(on) / _mean_cpu(off),
        f"peers={PEERS} cpu, beside others": _mean_cpu(on) / _mean_cpu(beside),
    }


def _in_turns(blocks: int, *sides: Callable[[], Block]) -> list[list[Block]]:
    """Return the blocks of each side, of which one after another had its turn."""
    turns = [[side() for side in sides] for _ in range(blocks)]
    return [list(found) for found in zip(*turns, strict=True)]


def _median(blocks: Sequence[Block]) -> float:
    return statistics.median(seconds for block in blocks for seconds in block.seconds)


def _median_cpu(blocks: Sequence[Block]) -> float:
    return statistics.median(seconds for block in blocks for seconds in block.cpu_seconds)


def _mean_cpu(blocks: Sequence[Block]) -> float:
    return statistics.fmean(seconds for block in blocks for seconds in block.cpu_seconds)


def _peak(blocks: Sequence[Block]) -> int:
    return max(block.peak_bytes for block in blocks)


def _row(impl: str, blocks: Sequence[Block], parameters: Row) -> Row:
    return {
        "bench": "round",
        "impl": impl,
        **parameters,
        "median_s": _median(blocks),
        "median_cpu_s": _median_cpu(blocks),
        "mean_cpu_s": _mean_cpu(blocks),
        "runs": sum(len(block.seconds) for block in blocks),
        "tokens_s": sum(sum(block.tokens) for block in blocks) / sum(sum(block.seconds) for block in blocks),
        "peak_bytes": _peak(blocks),
    }


def _agreement(ours: Sequence[Block], theirs: Sequence[Block]) -> float:
    pairs = [pair for our, other in zip(ours, theirs, strict=True) for pair in zip(our.texts, other.texts, strict=True)]
    return round(statistics.fmean(our == other for our, other in pairs), 4)


def time_trl(config: NodeConfig, tasks: TaskSet, engine: Engine = "generate") -> Block:
    """Run TRL's trainer on the same rounds; every round but the first is timed."""
    forget_peak()
    policy = load_policy(config.policy, config.trainer.bf16)
    asked = [
        (task, item) for task, _, item in tasks.questions(SEED, config.last_round * config.sampling.questions_per_round)
    ]
    texts: list[str] = []
    tokens: list[int] = []
    clock = _Clock()

    def reward(completions: list[Any], question: list[int], completion_ids: list[Any], **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        plain = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        texts.extend(plain)
        return [asked[at][0].verify(asked[at][1], text) or 0.0 for at, text in zip(question, plain, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=policy.model,
            reward_funcs=reward,
            args=_trl_config(config, folder, policy.bf16, engine),
            train_dataset=Dataset.from_dict(
                {"prompt": [_prompt(policy, item) for _, item in asked], "question": list(range(len(asked)))}
            ),
            processing_class=policy.tokenizer,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        _draw_as_the_node(policy, config, clock)
        trainer.train()
    return block(clock.stamps, texts, tokens[1:])


def _draw_as_the_node(policy: Policy, config: NodeConfig, clock: "_Clock") -> None:
    """Let TRL's calls of `transformers.generate` draw their tokens by the function of the node's engine."""
    engine, n, generate = config.engine, config.sampling.completions, policy.model.generate
    sampling = SamplingParams(engine.temperature, engine.top_p, engine.max_completion_length)

    def generate_seeded(input_ids: torch.Tensor, **options: Any) -> Any:
        seeds = seeds_of_rows([seed_of_prompt(clock.seed, at) for at in range(len(input_ids) // n)], n)
        draw = SeededTokens(seeds, sampling, input_ids.device, lambda: False, logprobs=False)
        return generate(input_ids, logits_processor=LogitsProcessorList([draw]), **options)

    policy.model.generate = generate_seeded


class _Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Has each round's seed, as the node derives it, and notes when the round's log is written."""

    def __init__(self) -> None:
        self.seed = 0
        self.stamps: list[Stamp] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seed = derive_seed(SEED, "generate", state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.stamps.append(stamp())


class _Dense:
    """A task that pays every text another reward, and verifies it first, for the time that takes."""

    def __init__(self, task: Task) -> None:
        self._task = task

    @property
    def key(self) -> TaskKey:
        return self._task.key

    def make(self, seed: int) -> Item:
        return self._task.make(seed)

    def verify(self, item: Item, text: str) -> float:
        self._task.verify(item, text)
        return zlib.crc32(text.encode()) / 2**32


def _tasks(config: NodeConfig, reward: Reward) -> TaskSet:
    tasks = load_tasks(config.tasks)
    return TaskSet([(_Dense(task), 1.0) for task in tasks.tasks]) if reward == "dense" else tasks


def _config(  # each is an option
    model: str,
    questions: int,
    completions: int,
    rounds: int,
    examples: int,
    device: str,
    engine: Engine,
    lengths: tuple[int, int] | None,
) -> NodeConfig:
    longest = {"max_prompt_length": lengths[0], "max_completion_length": lengths[1]} if lengths else {}
    kind = {"kind": "vllm"} if engine == "vllm" else {}
    shown: Row = {
        "policy": {"model": model, "device": device, "prompt": "plain"},
        "engine": {"max_completion_length": 12} | longest | kind,
        "tasks": [{"name": "builtin/arithmetic", "examples": examples, "answer": "first_line"}],
    }
    return parse_config(
        {
            "seed": SEED,
            "rounds": rounds,
            **(shown if examples else {"policy": {"model": model, "device": device}, "engine": longest | kind}),
            "sampling": {"rule": "sapo", "local": questions, "external": 0, "completions": completions},
            "trainer": {"save_steps": rounds},
            "eval": {"every": 0},
        }
    )


def _trl_config(config: NodeConfig, folder: str, bf16: bool, engine: Engine) -> GRPOConfig:
    trainer, options, sampling = config.trainer, config.trainer.options, config.sampling
    return GRPOConfig(
        output_dir=folder,
        max_steps=config.last_round,
        per_device_train_batch_size=sampling.questions_per_round * sampling.completions,
        num_generations=sampling.completions,
        shuffle_dataset=False,
        seed=SEED,
        use_cpu=config.policy.device == "cpu",
        use_transformers_continuous_batching=engine == "paged",
        use_vllm=engine == "vllm",
        vllm_mode="colocate",
        bf16=bf16,
        gradient_checkpointing=None,
        learning_rate=trainer.learning_rate,
        **trainer.of_update,
        beta=0.0,
        scale_rewards=options.scale_rewards,
        temperature=config.engine.temperature,
        top_p=config.engine.top_p,
        max_completion_length=config.engine.max_completion_length,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )


def _prompt(policy: Policy, item: Item) -> Any:
    if policy.prompt == "plain" or policy.tokenizer.chat_template is None:
        return plain_text(item)
    return chat_turns(item, system_role=True)


def command(  # noqa: PLR0913  # one option each
    model: Annotated[str, typer.Option(help="As policy.model.")] = "builtin",
    questions: Annotated[int, typer.Option(min=1, help="Questions a round.")] = 4,
    completions: Annotated[int, typer.Option(min=2, help="Completions a question.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds timed in each block.")] = 20,
    warm_rounds: Annotated[int, typer.Option(min=1, help="Rounds before those, if sharing is timed.")] = 100,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of each side, in turns.")] = 6,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for tensors.")] = 1,
    compare: Annotated[Literal["trl", "sharing", "both"], typer.Option(help="Which comparison to make.")] = "both",
    examples: Annotated[int, typer.Option(min=0, help="Solved examples before each question, for real models.")] = 0,
    engine: Annotated[
        Literal["generate", "paged", "vllm"],
        typer.Option(help="Both sides generate by transformers, its continuous batching, or vLLM on the same GPU."),
    ] = "generate",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="As policy.device.")] = "cpu",
    lengths: Annotated[str, typer.Option(help="Longest prompt and completion in tokens, such as 256,128.")] = "",
) -> None:
    """Time a round against TRL's, or with sharing.

    `trl` times the same work in TRL's own trainer. `sharing` times a node with peers against the same node alone, on an
    idle machine and beside an unrelated swarm.

    \b
    Example:
      python -m benchmarks.round --blocks 6 > round.jsonl
      python -m benchmarks.round --compare trl --model runs/models/smollm2-135m-instruct --examples 3 --rounds 3
      python -m benchmarks.round --compare trl --model Qwen/Qwen3-0.6B --device cuda --engine vllm --lengths 256,128
      python -m benchmarks.round --compare sharing --model runs/models/smollm2-135m-instruct --rounds 3 --warm-rounds 4
    """
    for row in run(
        model=model,
        questions=questions,
        completions=completions,
        rounds=rounds,
        warm_rounds=warm_rounds,
        blocks=blocks,
        threads=threads,
        compare=compare,
        examples=examples,
        engine=engine,
        device=device,
        lengths=lengths_of(lengths),
    ):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    typer.run(command)
