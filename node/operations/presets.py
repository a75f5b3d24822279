"""Presets: settings that fit a model's size and the machine, below all that a person sets.

The defaults of `node.config` are the preset of the built-in policy (51 k parameters). `preset` states what a larger
model wants otherwise, each difference with its reason; `gossamer node --model ID --dry-run` prints both.

    up to 10 M      one thread; a lower rate from 1 M on
    up to 50 M      a rate for its size; the optimiser's state in the newest checkpoint alone
    above           longer questions and answers; on a GPU longer ones still, and vLLM where it fits
    reasoning       room to finish where the memory has it; else the model is asked not to think
    LoRA            where all weights, their gradients and Adam's two moments would fill half of the memory
    frozen weights  beneath adapters, whoever asked for them: 16 bits each, or 4 where those would not fit
    micro-batches   of fewer tokens where the activations would not fit

`preset` is pure; `preset_for` has `node.policy.detection` look at the model and the machine first.
"""

import math
from typing import Any, NamedTuple

from node.config import EngineConfig, NodeConfig, PolicyConfig, SamplingConfig, TrainerConfig, fill, is_set
from node.engines import BY_PREFERENCE, DeviceShare, EngineKind, kind_of
from node.engines.missing import missing
from node.policy.detection import can_be_asked_not_to_think, detect_machine, main_memory, measure_model
from node.policy.memory import (
    BUILTIN_SIZE,
    MARGIN,
    Machine,
    ModelSize,
    activation_bytes,
    adapter_parameters,
    logits_bytes,
    trained_bytes,
    weight_bytes,
)

SMALL = 10_000_000  # parameters: up to here one core multiplies a layer's matrices faster than several hand it around
SPEAKING = 50_000_000  # parameters: from here on models answer in sentences
HUGE = 2_000_000_000  # parameters: activations of a round are worth computing twice
MOST_GENERATING = 0.95  # of a GPU that trainer and engine may fill together while it generates
GPU_QUESTIONS = 8  # a round: a GPU answers eight in hardly more time than two
THOUGHTS = 2048  # tokens that a reasoning model's answer may have: a short chain of thought is some hundreds
FEWEST_TOKENS = 256  # a micro-batch holds a row at least, however long
RATE_LIMIT = 1e-4  # a rate above it, on more than SMALL trained weights, unlearns the language within some rounds

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


class HeldMemory(NamedTuple):
    """The bytes of a model that the trainer holds: weights, and where they are trained, their gradients and Adam's
    moments.
    """

    training: int  # bytes
    generating: int  # bytes, without gradients
    adapters: bool  # alone are trained


def preset_for(policy: PolicyConfig, engine: EngineConfig, nodes: int = 1, sharers: int = 1) -> Overrides:
    """Return the preset of the policy's model on this machine, of which each of `nodes` nodes has an equal part.

    With several GPUs, as many nodes as come on one share it. FSDP2 shares the weights out among `sharers` processes.

    Raises:
        UserError: there is no such model.
    """
    lora = policy.lora.r if "r" in policy.lora.model_fields_set else None
    if policy.model == "builtin":
        return preset(BUILTIN_SIZE, Machine(main_memory()), lora)  # without importing torch
    dtype = policy.dtype if "dtype" in policy.model_fields_set else None
    size = measure_model(policy.model)
    machine = detect_machine(policy.device, vllm=not missing("vllm", engine))
    beside = math.ceil(nodes / machine.devices)  # on one device
    machine = machine._replace(memory=machine.memory // beside, share=1 / beside, sharers=sharers)
    thinks = can_be_asked_not_to_think(policy.model) and not policy.template
    return preset(size, machine, lora, thinks=thinks, engine=engine, dtype=dtype)


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
    choices = preset_for(config.policy, config.engine, nodes, sharers)
    reasons = {key: choice.reason for key, choice in choices.items() if not is_set(config, key)}
    return (
        {key: choice.value for key, choice in choices.items()},
        {key: f"for a model of this size: {reason}" for key, reason in reasons.items()},
    )


def preset(
    size: ModelSize,
    machine: Machine,
    lora: int | None = None,
    *,
    thinks: bool = False,
    engine: EngineConfig | None = None,
    dtype: str | None = None,
) -> Overrides:
    """Return the settings in which a model should differ from the defaults of `node.config`.

    Args:
        size: of the model, without adapters.
        machine: one node's part of it.
        lora: rank of the adapters that a person asked for, 0 for none; None leaves it to the preset.
        thinks: its chat template can be asked to leave out a chain of thought.
        engine: what a person set of it, above all its placement.
        dtype: of the weights, as a person set it; None leaves it to the preset.
    """
    parameters, whole, engine = size.parameters, machine, engine or EngineConfig()
    chooses = parameters > SPEAKING and dtype != "nf4"  # which transformers alone generates with
    name, share = _choose_engine(size, machine, lora, engine, dtype) if chooses else ("hf", DeviceShare(0, 0))
    machine = machine._replace(memory=machine.memory - share.resting)  # what it keeps is not there for training
    adapters = _wants_adapters(parameters, machine, lora)
    overrides = _rate(parameters, adapters=adapters)
    if parameters <= SMALL:
        return overrides | {"threads": PresetValue(1, "small matrices: more threads only wait for each other")}
    overrides["trainer.save_full"] = PresetValue(
        1, "an optimiser's state is twice the weights: only the newest needs it"
    )
    held = _held(size, machine, adapters=adapters, dtype=dtype)
    if adapters and lora is None:
        overrides |= _adapters(parameters, machine)
    if adapters and dtype is None:
        packs = machine.nf4 and machine.sharers == 1 and engine.kind == "hf" and not _trains(size, machine, held)
        held = _held(size, machine, adapters=True, dtype="nf4") if packs else held
        overrides |= _frozen(size, machine, packs=packs)
    if parameters > SPEAKING:
        overrides |= _speaking(size, machine)
        beside = _updating(size, machine, held) if engine.ahead else held.generating
        overrides |= _engine(whole, name, beside, engine) if chooses else {}
    if thinks:
        overrides |= _thinking(size, machine, held, kind_of(name))
    return overrides | _tokens(size, machine, held)


def _wants_adapters(parameters: int, machine: Machine, lora: int | None) -> bool:
    return trained_bytes(machine.sharers) * parameters > machine.memory // 2 if lora is None else lora > 0


def _choose_engine(
    size: ModelSize, machine: Machine, lora: int | None, config: EngineConfig, dtype: str | None
) -> tuple[str, DeviceShare]:
    """Return the best engine that fits beside the trainer, and what it takes there."""
    *others, last = BY_PREFERENCE
    for name in others:
        share = kind_of(name).device_share(size, machine, config)
        if share is None:
            continue
        left = machine._replace(memory=machine.memory - share.resting)
        held = _held(size, left, adapters=_wants_adapters(size.parameters, left, lora), dtype=dtype)
        beside = MARGIN * _updating(size, left, held) if config.ahead else held.generating
        generates = beside + share.generating <= MOST_GENERATING * machine.memory
        if generates and _trains(size, left, held):
            return name, share
    return last, kind_of(last).device_share(size, machine, config) or DeviceShare(0, 0)


def _held(size: ModelSize, machine: Machine, *, adapters: bool, dtype: str | None) -> HeldMemory:
    if adapters:
        frozen = weight_bytes(size, dtype or _half(size, machine))
        frozen += frozen // machine.sharers if machine.sharers > 1 else 0
        return HeldMemory(frozen, frozen, adapters=True)
    training = int(trained_bytes(machine.sharers) * size.parameters)
    return HeldMemory(training, training - 4 * size.parameters // machine.sharers, adapters=False)


def _half(size: ModelSize, machine: Machine) -> str:
    """Return the `policy.dtype` of 16 bits that suits the machine.

    A processor without bfloat16 computes with it through float32, so it has float32 itself where there is plenty.
    """
    if machine.gpu and not machine.bf16:
        return "float16"
    scarce = 4 * weight_bytes(size, "float32") > machine.memory
    return "bfloat16" if machine.bf16 or scarce else "float32"


def _trains(size: ModelSize, machine: Machine, held: HeldMemory) -> bool:
    """Tell whether the smallest micro-batch fits beside what is held."""
    tokens = FEWEST_TOKENS * activation_bytes(size, 2, checkpointing=size.parameters > HUGE)
    tokens += logits_bytes(size, FEWEST_TOKENS, adapters=held.adapters)
    return held.training + tokens <= machine.memory


def _updating(size: ModelSize, machine: Machine, held: HeldMemory) -> int:
    """Return what the trainer holds at most, in the update."""
    tokens = min(_fitting_tokens(size, machine, held), TrainerConfig().tokens_per_batch)
    cast = 2 * size.parameters if machine.bf16 and not held.adapters else 0
    return held.training + cast + tokens * _token_bytes(size, machine) + _logits(size, held)


def _engine(machine: Machine, name: str, resident: int, config: EngineConfig) -> Overrides:
    """Return which engine generates, and its own settings."""
    if not (machine.gpu and machine.vllm):
        return {}
    if name == "hf":
        lacks = "another engine's copy of the weights has no room beside training"
        return {"engine.kind": PresetValue("hf", lacks if machine.bf16 else "vLLM wants a GPU that has bfloat16")}
    chosen = {"engine.kind": PresetValue(name, "installed here, and several times as fast as transformers")}
    own = kind_of(name).settings(machine, config, resident)
    return chosen | {key: PresetValue(value, reason) for key, (value, reason) in own.items()}


def _thinking(size: ModelSize, machine: Machine, held: HeldMemory, engine: EngineKind) -> Overrides:
    """Return how long a reasoning model may think; without room in the update or the engine it is asked not to."""
    positions = size.positions or 2048
    prompt = min(1024, positions // 2)
    answer = min(THOUGHTS, positions - prompt)
    trains = _fitting_tokens(size, machine, held) >= prompt + answer
    left, rows = machine.memory - held.training, GPU_QUESTIONS * SamplingConfig().completions
    if not (machine.gpu and trains and engine.holds(size, machine, left, rows, prompt + answer)):
        return {"policy.template": PresetValue({"enable_thinking": False}, "its thoughts would be cut off")}
    return {
        "engine.max_completion_length": PresetValue(answer, "it thinks before it answers"),
    }


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


def _adapters(parameters: int, machine: Machine) -> Overrides:
    need = trained_bytes(machine.sharers) * parameters / 1e9
    reason = f"training all weights takes {need:.1f} GB before any activation, of {machine.memory / 1e9:.1f} GB"
    rank = 32 if parameters <= HUGE else 16
    return {
        "policy.lora.r": PresetValue(rank, reason),
        "policy.lora.alpha": PresetValue(2 * rank, "twice the rank, as is usual"),
    }


def _frozen(size: ModelSize, machine: Machine, *, packs: bool) -> Overrides:
    """Return the precision of the weights beneath adapters."""
    if packs:
        reason = f"frozen weights of 16 bits would not fit {machine.memory / 1e9:.1f} GB"
        return {"policy.dtype": PresetValue("nf4", reason)}
    dtype = _half(size, machine)
    if dtype == PolicyConfig().dtype:
        return {}
    reason = "frozen weights need no more; the adapters stay fp32"
    return {"policy.dtype": PresetValue(dtype, reason if dtype == "bfloat16" else f"{reason}; no bfloat16 here")}


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


def _fitting_tokens(size: ModelSize, machine: Machine, held: HeldMemory) -> int:
    """Return the tokens of a micro-batch whose activations take half of what weights and logits leave."""
    budget = max(0, machine.memory - held.training - _logits(size, held)) // 2
    fitting = budget // _token_bytes(size, machine)
    return max(FEWEST_TOKENS, 1 << max(0, fitting.bit_length() - 1))


def _token_bytes(size: ModelSize, machine: Machine) -> int:
    """Return the activations of a token in the update."""
    return activation_bytes(size, 2 if machine.bf16 else 4, checkpointing=size.parameters > HUGE and machine.gpu)


def _logits(size: ModelSize, held: HeldMemory) -> int:
    return logits_bytes(size, TrainerConfig().tokens_per_batch, adapters=held.adapters)


def _tokens(size: ModelSize, machine: Machine, held: HeldMemory) -> Overrides:
    """Return the micro-batch that fits, if the default one does not."""
    tokens = _fitting_tokens(size, machine, held)
    if tokens >= TrainerConfig().tokens_per_batch:
        return {}
    return {
        "trainer.tokens_per_batch": PresetValue(
            tokens, f"activations of more would not fit {machine.memory / 1e9:.1f} GB"
        )
    }


def notes_on_model(config: NodeConfig) -> list[str]:
    """Return what a start says of settings that do not suit the model; for a dry run, which loads none.

    Raises:
        UserError: a start refuses one of them.
    """
    if config.role == "relay":  # runs no model
        return []
    builtin, rank = config.policy.model == "builtin", config.policy.lora.r
    size = BUILTIN_SIZE if builtin else measure_model(config.policy.model)
    config.engine.longest_prompt(size.positions)
    line = rate_warning(config.trainer, adapter_parameters(size, rank) if rank else size.parameters)
    return [line] if line else []


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
