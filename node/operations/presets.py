"""Presets: settings that fit a model's size and the machine, below all that a person sets.

The defaults of `node.config` are the preset of the built-in policy (51 k parameters). `preset` states what a larger
model wants otherwise, each difference with its reason; `gossamer node --model ID --dry-run` prints both.

    up to 10 M      one thread; a lower rate from 1 M on
    up to 50 M      a rate for its size; the optimiser's state in the newest checkpoint alone
    above           longer questions and answers; on a GPU longer ones still, vLLM where it fits, and as many questions
                    a round as it answers at once, 64 to 256 completions
    reasoning       room to finish where the memory has it; else the model is asked not to think

Of the settings that decide on memory, the first row that fits (`node.policy.memory`) beside what a person set:

    engine          vLLM, then transformers
    weights         in this order: all of them, if half of the memory stays free; on a processor without bfloat16,
                    adapters over 32 bits, likewise; adapters over 16 bits; adapters over 4 bits
    micro-batch     8,192 tokens on a GPU where no engine generates during the update, else 2,048; then half as many,
                    to 256
    vLLM's part     what the update leaves, if that holds as many answers of a round at once as the whole of what the
                    trainer leaves between updates; else that, and vLLM sleeps during the update

`preset` is pure; `preset_for` has `node.policy.detection` look at the model and the machine first.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import combinations
from operator import getitem
from typing import Any, NamedTuple

from node.config import NodeConfig, TrainerConfig, fill, is_set, parse_config
from node.engines.missing import check_split, missing
from node.errors import UserError, how_to_install
from node.operations.config_text import toml_value
from node.policy.detection import can_be_asked_not_to_think, detect_machine, main_memory, measure_model
from node.policy.memory import (
    BUILTIN_SIZE,
    PHASES,
    SPARE,
    Machine,
    MemoryTable,
    ModelSize,
    Phase,
    adapter_parameters,
    answered_at_once,
    memory_held,
    row_bytes,
    rows_at_once,
    shares_card,
    vllm_needs,
    vllm_sleeps,
    whole_memory,
)

SMALL = 10_000_000  # parameters: up to here one core multiplies a layer's matrices faster than several hand it around
SPEAKING = 50_000_000  # parameters: from here on models answer in sentences, and vLLM begins before they are done
HUGE = 2_000_000_000  # parameters: activations of a round are worth computing twice
GPU_QUESTIONS = 8  # a round at least: a GPU answers eight in hardly more time than two
ROUND = 256  # completions at most: the largest round that was tried (examples/round-size.toml)
THOUGHTS = 2048  # tokens that a reasoning model's answer may have: a short chain of thought is some hundreds
MOST_TURNS = 4  # of transformers, for a round of thoughts: with 2,048 tokens each they take minutes
LARGER_BATCHES = (8192, 4096)  # tokens: a GPU waits for the next launch with fewer
SMALLER_BATCHES = (1024, 512, 256)  # tokens, where those of the default do not fit
MOST = 0.9  # of a GPU, for vLLM
OTHERS = 0.2  # of main memory, for other programs: who takes too much there is ended, and cannot try again with less
RATE_LIMIT = 1e-4  # a rate above it, on more than SMALL trained weights, unlearns the language within some rounds
VLLM_SHARE = "engine.vllm.gpu_memory_utilization"

# Learning rates by the most parameters they suit: of all weights, and of adapters. With Adam they fall about as the
# root of the number of weights; those of adapters are best at ten times as much (Schulman et al., LoRA Without Regret).
RATES = (
    (1_000_000, 5e-4, 5e-4, "the built-in policy learns at 5e-4"),
    (SMALL, 1e-4, 5e-4, "between 5e-4 at 51 k parameters and 1e-5 at 135 M, both tried"),
    (SPEAKING, 3e-5, 2e-4, "between 5e-4 at 51 k parameters and 1e-5 at 135 M, both tried"),
    (500_000_000, 1e-5, 1e-4, "SmolLM2-135M learns at 1e-5, in fp32 masters"),
    (HUGE, 3e-6, 3e-5, "between 1e-5 at 135 M parameters and 1e-6 at 7 B"),
    (float("inf"), 1e-6, 1e-5, "what GRPO was published with, at 7 B (arXiv 2402.03300)"),
)


class PresetValue(NamedTuple):
    """The value of one setting, and why."""

    value: Any
    reason: str


Overrides = dict[str, PresetValue]
"""By dotted key of the configuration."""


def preset_for(asked: NodeConfig, nodes: int = 1, sharers: int = 1) -> Overrides:
    """Return the preset of the policy's model on this machine, of which each of `nodes` nodes has an equal part.

    With several GPUs, as many nodes as come on one share it. FSDP2 shares the weights out among `sharers` processes.

    Raises:
        UserError: there is no such model.
    """
    policy = asked.policy
    if policy.model == "builtin":
        return preset(asked, BUILTIN_SIZE, Machine(main_memory()))  # without importing torch
    size = measure_model(policy.model)
    machine = detect_machine(policy.device, vllm=not missing("vllm", asked.engine))
    beside = math.ceil(nodes / machine.devices)  # on one device
    machine = machine._replace(memory=machine.memory // beside, share=1 / beside, sharers=sharers)
    thinks = can_be_asked_not_to_think(policy.model) and not policy.template
    return preset(asked, size, machine, thinks=thinks)


def with_preset(config: NodeConfig, nodes: int = 1) -> tuple[NodeConfig, dict[str, str]]:
    """Return `config` filled up with its model's preset, for one of `nodes` nodes here, and the reason for each key.

    Raises:
        UserError: there is no such model.
    """
    values, reasons = preset_of(config, nodes)
    return fill(config, values), reasons


def preset_of(config: NodeConfig, nodes: int = 1, sharers: int = 1) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the preset of the policy's model by dotted key, and the reasons for the keys that `config` leaves open."""
    if config.role == "relay":  # runs no model
        return {}, {}
    choices = preset_for(config, nodes, sharers)
    reasons = {key: choice.reason for key, choice in choices.items() if not is_set(config, key)}
    return (
        {key: choice.value for key, choice in choices.items()},
        {key: f"for a model of this size: {reason}" for key, reason in reasons.items()},
    )


def preset(asked: NodeConfig, size: ModelSize, machine: Machine, *, thinks: bool = False) -> Overrides:
    """Return the settings in which a model should differ from the defaults of `node.config`.

    Args:
        asked: what a person set.
        size: of the model, without adapters.
        machine: one node's part of it.
        thinks: its chat template can be asked to leave out a chain of thought.
    """
    if size.parameters <= SMALL:
        rate = _rate(size.parameters, adapters=asked.policy.lora.r > 0)
        return rate | {"threads": PresetValue(1, "small matrices: more threads only wait for each other")}
    lengths = _speaking(size, machine) if size.parameters > SPEAKING else {}
    rows = [lengths | row for row in _rows(asked, size, machine)]
    fitting = (found for row in rows if (found := _fitting(asked, row, size, machine)))
    chosen = next(fitting, rows[-1])  # the last takes the least
    if thinks:
        chosen |= _thinking(asked, chosen, size, machine)
    chosen |= _questions(asked, chosen, size, machine)
    adapters = _filled(asked, chosen).policy.lora.r > 0
    newest = PresetValue(1, "an optimiser's state is twice the weights: only the newest needs it")
    return {"trainer.save_full": newest} | _rate(size.parameters, adapters=adapters) | chosen


def _filled(asked: NodeConfig, choices: Overrides) -> NodeConfig:
    return fill(asked, {key: choice.value for key, choice in choices.items()})


def _rows(asked: NodeConfig, size: ModelSize, machine: Machine) -> Iterator[Overrides]:
    """Yield settings, the best first: each engine with all weights or adapters, and with ever smaller micro-batches."""
    gigabytes = f"{machine.memory / 1e9:.1f} GB"
    for engine in _engines(asked, size, machine):
        kind = _filled(asked, engine).engine.kind
        for weights in _weights(
            asked, size, machine, packs=machine.nf4 and machine.sharers == 1 and kind == "hf" and not size.quantised
        ):
            waits = machine.gpu and not asked.engine.ahead  # one that does not wait wants that memory for itself
            for tokens in LARGER_BATCHES if waits and size.parameters > SPEAKING else ():
                more = PresetValue(tokens, f"{gigabytes} have room for their activations: fewer launches")
                yield engine | weights | {"trainer.tokens_per_batch": more}
            yield engine | weights
            for tokens in SMALLER_BATCHES:
                fewer = PresetValue(tokens, f"activations of more would not fit {gigabytes}")
                yield engine | weights | {"trainer.tokens_per_batch": fewer}


def _engines(asked: NodeConfig, size: ModelSize, machine: Machine) -> list[Overrides]:
    """Return which engines may generate, the best first."""
    can = machine.gpu and machine.vllm and size.parameters > SPEAKING
    if not can or is_set(asked, "engine.kind") or asked.policy.dtype == "nf4":
        return [{}]
    reason = "" if machine.bf16 else "vLLM wants a GPU that has bfloat16"
    if asked.engine.top_p < 1 and asked.trainer.options.vllm_importance_sampling_correction:
        reason = "engine.top_p cuts the distribution that vLLM's probabilities are of"
    hf = PresetValue("hf", reason or "another engine's copy of the weights has no room beside training")
    vllm = PresetValue("vllm", "installed here, and several times as fast as transformers")
    return [{"engine.kind": hf}] if reason else [{"engine.kind": vllm}, {"engine.kind": hf}]


def _weights(asked: NodeConfig, size: ModelSize, machine: Machine, *, packs: bool) -> list[Overrides]:
    """Return what may be trained, and in which precision the weights beneath adapters may be.

    Args:
        asked: what a person set.
        size: of the model.
        machine: one node's part of it.
        packs: weights of 4 bits are possible.
    """
    lora = asked.policy.lora.r
    if is_set(asked, "policy.lora.r") and not lora:
        return [{}]
    gigabytes = f"{machine.memory / 1e9:.1f} GB"
    frozen: list[Overrides] = [{}]  # a processor without bfloat16 computes with it through float32
    if not is_set(asked, "policy.dtype"):
        why = "frozen weights need no more; the adapters stay fp32"
        why += "; no bfloat16 here" if _half(machine) == "float16" else ""
        half = [{"policy.dtype": PresetValue(_half(machine), why)}]
        four = [{"policy.dtype": PresetValue("nf4", f"frozen weights of 16 bits would not fit {gigabytes}")}]
        frozen = [*([] if machine.gpu or machine.bf16 else frozen), *half, *(four if packs else [])]
    if lora:
        return frozen
    need = memory_held(size, asked, machine).least / 1e9
    rank = 32 if size.parameters <= HUGE else 16
    adapters = {
        "policy.lora.r": PresetValue(
            rank, f"training all weights takes {need:.1f} GB before any activation, of {gigabytes}"
        ),
        "policy.lora.alpha": PresetValue(2 * rank, "twice the rank, as is usual"),
    }
    return [*([] if size.quantised else [{}]), *(adapters | weights for weights in frozen)]


def _half(machine: Machine) -> str:
    """Return the `policy.dtype` of 16 bits that suits the machine."""
    return "float16" if machine.gpu and not machine.bf16 else "bfloat16"


def _fitting(asked: NodeConfig, row: Overrides, size: ModelSize, machine: Machine) -> Overrides | None:
    """Return a row, with vLLM's part of the GPU if that generates; None where it does not fit."""
    if machine.gpu and _filled(asked, row).engine.kind == "vllm" and not is_set(asked, VLLM_SHARE):
        part = _vllm_share(asked, row, size, machine)
        if part is None:
            return None
        row = row | {VLLM_SHARE: part}
    return row if _fits(_filled(asked, row), size, machine) else None


def _vllm_share(asked: NodeConfig, row: Overrides, size: ModelSize, machine: Machine) -> PresetValue | None:
    """Return the part of a GPU that vLLM may have; None where its weights and a small cache do not fit it.

    Where it shares the GPU it stays awake during the update, unless it would hold fewer of a round's answers at once.
    """
    engine = _filled(asked, row).engine
    if not shares_card(engine):
        return PresetValue(MOST, "it has the GPUs for itself")
    parts = memory_held(size, _filled(asked, row), machine).parts
    others = MemoryTable([part for part in parts if not part.name.startswith("vllm")])

    def left(phases: Sequence[Phase], when: str) -> PresetValue | None:
        share = min(MOST, 1 - SPARE - max(others.total(phase) for phase in phases) / machine.memory)
        if share * machine.memory < vllm_needs(size, max(1, len(engine.devices))):
            return None
        rounded = float(f"{0.995 * share * machine.share:.3g}")  # down
        return PresetValue(rounded, f"what the trainer leaves of {machine.memory / 1e9:.1f} GB {when}")

    def answers(part: PresetValue) -> int:
        choices = row | {VLLM_SHARE: part}
        config = _filled(asked, choices | _questions(asked, choices, size, machine))
        asked_for = config.sampling.questions_per_round * config.sampling.completions
        return min(asked_for, answered_at_once(size, config, machine))

    awake = left(PHASES, "in its update")
    asleep = None if engine.ahead else left(("generate", "hand over"), "while vLLM generates")
    return asleep if asleep and not (awake and answers(awake) == answers(asleep)) else awake


def _fits(config: NodeConfig, size: ModelSize, machine: Machine) -> bool:
    table, lora, dtype = memory_held(size, config, machine), is_set(config, "policy.lora.r"), config.policy.dtype
    given = is_set(config, "policy.dtype") if config.policy.lora.r else lora
    if dtype == "float32" and not given and 2 * table.least > machine.memory:  # others leave room for more at once
        return False
    return table.peak() <= (1 - (SPARE if machine.gpu else OTHERS)) * machine.memory


def _thinking(asked: NodeConfig, choices: Overrides, size: ModelSize, machine: Machine) -> Overrides:
    """Return how long a reasoning model may think; without room in the update or the engine it is asked not to."""
    positions, config = size.positions or 2048, _filled(asked, choices)
    answer = min(THOUGHTS, positions - min(config.engine.max_prompt_length, positions // 2))
    length = PresetValue(answer, "it thinks before it answers")
    tokens = max(config.trainer.tokens_per_batch, config.engine.max_prompt_length + answer)  # a row at least
    thinking = {"engine.max_completion_length": length, "trainer.tokens_per_batch": PresetValue(tokens, "")}
    fitting = _fitting(asked, choices | thinking, size, machine)
    longer = _filled(asked, choices | thinking)
    rows = longer.sampling.questions_per_round * longer.sampling.completions
    at_once = rows_at_once(row_bytes(size, longer, machine), whole_memory(machine))
    in_time = longer.engine.kind != "hf" or MOST_TURNS * at_once >= rows
    if machine.gpu and in_time and fitting:
        return {key: fitting[key] for key in ("engine.max_completion_length", VLLM_SHARE) if key in fitting}
    return {"policy.template": PresetValue({"enable_thinking": False}, "its thoughts would be cut off")}


def _questions(asked: NodeConfig, choices: Overrides, size: ModelSize, machine: Machine) -> Overrides:
    """Return how many questions a round has: as many as GPUs answer at once, with at most `ROUND` answers.

    More cost vLLM no memory: its part bounds them. Of transformers they may take what training needs.
    """
    config = _filled(asked, choices)
    if not machine.gpu or config.sampling.questions or "sampling.local" not in choices:
        return {}
    rows = answered_at_once(size, config, machine)
    reason = f"{rows} completions of up to {config.engine.longest} tokens fit the cache at once"
    count = 1 << (min(rows, ROUND) // config.sampling.completions).bit_length() >> 1
    while count > GPU_QUESTIONS:
        more = {"sampling.local": PresetValue(count, reason)}
        if _fits(_filled(asked, choices | more), size, machine):
            return more
        count //= 2
    return {}


def _rate(parameters: int, *, adapters: bool) -> Overrides:
    _, full, small, reason = next(row for row in RATES if parameters <= row[0])
    rate = small if adapters else full
    if rate == TrainerConfig().learning_rate:
        return {}
    return {
        "trainer.learning_rate": PresetValue(
            rate, f"adapters, ten times what all weights take: {reason}" if adapters else reason
        )
    }


def _speaking(size: ModelSize, machine: Machine) -> Overrides:
    positions = size.positions or 2048
    overrides = {
        "engine.max_prompt_length": PresetValue(
            min(512, positions // 2), "room for an instruction and solved examples"
        ),
        "engine.max_completion_length": PresetValue(
            min(32, positions // 4), "an answer with a few words; on a processor each token is felt"
        ),
    }
    if machine.gpu:
        overrides |= {
            "sampling.local": PresetValue(GPU_QUESTIONS, "a GPU answers eight questions in hardly more time than two"),
            "engine.max_prompt_length": PresetValue(
                min(1024, positions // 2), "room for an instruction and solved examples"
            ),
            "engine.max_completion_length": PresetValue(
                min(256, positions // 4), "some lines of reasoning; raise it as answers grow"
            ),
        }
    if machine.gpu and size.parameters > HUGE:
        overrides["trainer.gradient_checkpointing"] = PresetValue(
            True, "a third more time for a fraction of the memory"
        )
    return overrides


def notes_on_model(config: NodeConfig, sharers: int = 1) -> list[str]:
    """Return what a start says of settings that do not suit the model; for a dry run, which loads none.

    Raises:
        UserError: a start refuses one of them, or the model does not fit the memory.
    """
    if config.role == "relay":  # runs no model
        return []
    size = check_model(config, sharers)
    rank = config.policy.lora.r
    config.engine.longest_prompt(size.positions)
    line = rate_warning(config.trainer, adapter_parameters(size, rank) if rank else size.parameters)
    return [line] if line else []


def check_model(config: NodeConfig, sharers: int = 1) -> ModelSize:
    """Return the model's size, once it is known that it may be trained and shared out among the engine's cards.

    With FSDP2, `sharers` processes share the weights out among GPUs.

    Raises:
        UserError: it does not fit, by what it takes however small the micro-batch is, or its heads do not divide.
    """
    if config.policy.model == "builtin":  # which fits, and is not to have torch imported
        return BUILTIN_SIZE
    size = measure_model(config.policy.model)
    machine = detect_machine(config.policy.device)._replace(sharers=sharers)
    check_split(size, config.engine, machine)
    need = memory_held(size, config, machine).least
    if need <= machine.memory:
        return size
    remedy = smaller(config, size, machine, lambda table: table.least <= machine.memory)
    raise UserError(
        f"policy.model has {size.parameters / 1e9:.3g} G weights, which take {need / 1e9:.0f} GB before any "
        f"activation; {'the GPU' if machine.gpu else 'this machine'} has {machine.memory / 1e9:.0f} GB: "
        f"{remedy}choose a smaller model"
    )


def sleeps_in_update(config: NodeConfig, sharers: int = 1) -> bool:
    """Tell whether the engine of a node on this machine gives its GPUs to the update; see `vllm_sleeps`."""
    if config.engine.kind != "vllm":
        return False
    size = BUILTIN_SIZE if config.policy.model == "builtin" else measure_model(config.policy.model)
    return vllm_sleeps(size, config, detect_machine(config.policy.device)._replace(sharers=sharers))


def smaller(config: NodeConfig, size: ModelSize, machine: Machine, fits: Callable[[MemoryTable], bool]) -> str:
    """Return the fewest settings by which a model fits after all, as "set ..., or "; "" if nothing will do."""
    rank = config.policy.lora.r or 16
    steps: list[dict[str, Any]] = [
        {"policy.lora.r": rank, "policy.dtype": _half(machine)},
        {"trainer.gradient_checkpointing": True},
        {"trainer.tokens_per_batch": SMALLER_BATCHES[-1]},
    ]
    if machine.gpu and machine.sharers == 1 and config.engine.kind == "hf":
        steps.append({"policy.lora.r": rank, "policy.dtype": "nf4"})
    sets = [some for count in range(1, 1 + len(steps)) for some in combinations(steps, count)]
    for settings in [{key: value for step in some for key, value in step.items()} for some in sets]:
        tree = config.model_dump()
        changed = []
        for key, value in settings.items():
            *tables, last = key.split(".")
            table = reduce(getitem, tables, tree)
            if table[last] != value:
                changed.append(f"{key}={toml_value(value)}")
            table[last] = value
        if fits(memory_held(size, parse_config(tree), machine)):
            install = f"{how_to_install('bitsandbytes')} and " if "nf4" in settings.values() and not machine.nf4 else ""
            return f"{install}set {' and '.join(changed)}, or "
    return ""


def rate_warning(trainer: TrainerConfig, trained: int) -> str:
    """Return what to say of a rate that unlearns the language of `trained` weights; "" for others.

    No preset has such a rate: a person set it, and it is taken.
    """
    if trainer.learning_rate <= RATE_LIMIT or trained <= SMALL:
        return ""
    return (
        f"trainer.learning_rate={trainer.learning_rate:g} over {trained / 1e6:.0f} M trained weights mostly destroys "
        f"the model: set at most {RATE_LIMIT:g}, or train adapters (policy.lora.r=16)"
    )
