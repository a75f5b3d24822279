"""Memory that a node takes with a model, in bytes, estimated from the model's shape: for `gossamer doctor --model`.

    weights           as `policy.dtype` says
    gradients, Adam   of the trained weights, in float32: 4 and 8 bytes each; 2 for Adam with `adamw_8bit`
    activations       what the backward pass needs again, of the micro-batch in work
    logits            of `CHUNK` numbers of its completions: themselves, their logarithms, their gradients, and copies;
                      and a gradient of the output matrix that is added to the others
    key-value cache   of all completions that a round generates at once
    libraries         torch and transformers themselves, in main memory

The margins were fitted to SmolLM2-135M on a processor: 5.2 GB for 8 rows of 160 tokens in float32 (estimated 5.2), 3.2
with adapters (3.5), 4.6 with products in bfloat16 (4.6), 6.0 for 16 rows (6.1). A real node of it that trained in every
round took 3.4 to 3.5 GB (3.95) with all weights and 2.7 (2.24) with adapters, for which the estimate is too low:
tests/e2e/test_node_footprint.py prints both.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from node.config import NodeConfig

CHUNK = 1 << 24  # logits at a time (`node.training.head`): 64 MiB in float32
LOGIT = 24  # bytes of each: six tensors in float32, as measured
MARGIN = 1.1  # what the allocator holds between two passes
NF4_BYTES = 0.516  # of a weight: 4 bits, and a scale of 8 bits for 64 of them, which have scales themselves
TRAINING_BYTES = 16  # a trained weight in fp32: itself 4, its gradient 4, Adam's two moments 8
ADAM_BYTES = {"adamw_torch_fused": 8.0, "adamw_8bit": 2.03}  # two moments of a trained weight
LIBRARIES = 500_000_000  # torch and transformers, as measured


class ModelSize(NamedTuple):
    """The size of a causal language model, by its configuration."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_width: int  # key-value heads times their width
    vocabulary: int
    positions: int | None


BUILTIN_SIZE = ModelSize(
    51_072, layers=2, hidden=48, intermediate=96, heads=4, kv_width=48, vocabulary=99, positions=128
)


class Machine(NamedTuple):
    """A node's own part of a machine: memory of the device that trains, in bytes, and what the device can do."""

    memory: int
    gpu: bool = False
    bf16: bool = False  # computes in bfloat16, rather than through float32
    vllm: bool = False  # installed beside the node
    share: float = 1.0  # of the device: `memory` is as large a part of its whole
    devices: int = 1  # that are alike, of which a node has one
    nf4: bool = False  # bitsandbytes is installed
    sharers: int = 1  # processes, each on a device like this, among which FSDP2 shares the weights out


class MemoryPart(NamedTuple):
    """One entry of the sum: its bytes, and how they come about."""

    name: str
    bytes: int
    why: str
    when: Literal["always", "generation", "update"] = "always"  # the last two take turns
    bound: bool = False  # what takes it takes no more; else torch's allocator does, by `MARGIN`


def cache_width(config: NodeConfig, *, bf16: bool) -> int:
    """Return the bytes of a number in the key-value cache, and in what a layer keeps for its backward pass."""
    return 2 if bf16 or config.policy.dtype != "float32" else 4


def cache_bytes(layers: int, kv_width: int, width: int) -> int:
    """Return what the keys and values of one token take, in numbers of `width` bytes."""
    return layers * 2 * kv_width * width


def footprint(
    size: ModelSize,
    config: NodeConfig,
    engine_parts: Sequence[MemoryPart],
    *,
    bf16: bool,
    gpu_memory: int = 0,
    sharers: int = 1,
) -> list[MemoryPart]:
    """Return what a node with this configuration takes of the memory of the device that trains.

    With FSDP2 it is the device of the node's own process, which keeps a whole copy of the weights beside its part.

    Args:
        size: of the policy's model.
        config: of the node.
        engine_parts: what its engine takes of the device, as the engine says (`node.engines.EngineKind.memory`).
        bf16: whether products are computed in bfloat16.
        gpu_memory: of the GPU that trains, whose libraries are in another memory; 0 for a processor.
        sharers: processes among which FSDP2 shares out the weights; 1 without it.
    """
    sampling, engine, lora = config.sampling, config.engine, config.policy.lora
    prompt, completion = engine.max_prompt_length, engine.max_completion_length
    answers = sampling.completions * completion
    group = prompt + answers  # tokens of a group, whose prompt is computed once
    tokens = min(config.trainer.tokens_per_batch, (sampling.local + sampling.external) * group)
    dtype = config.policy.dtype
    weights = weight_bytes(size, dtype)
    trained = adapter_parameters(size, lora.r) if lora.r else size.parameters
    checkpointing = config.trainer.gradient_checkpointing
    of_all = f", 1/{sharers} of them" if sharers > 1 else ""
    moments = int(ADAM_BYTES[config.trainer.options.optim] * trained)
    each = f"{size.parameters / 1e6:.3g} M of {weights / size.parameters:.3g} bytes"
    parts = [
        MemoryPart("weights", weights // sharers, each + of_all),
        MemoryPart(
            "gradients", 4 * trained // sharers, f"{trained / 1e6:.3g} M trained weights{of_all}", when="update"
        ),
        MemoryPart("Adam", moments // sharers, f"two moments of each trained weight{of_all}"),
        MemoryPart(
            "activations",
            tokens * activation_bytes(size, cache_width(config, bf16=bf16), checkpointing=checkpointing),
            f"{tokens} tokens at once: trainer.tokens_per_batch",
            when="update",
        ),
        MemoryPart(
            "logits",
            logits_bytes(size, tokens * answers // group, adapters=lora.r > 0),
            f"{tokens * answers // group} tokens of completions, {size.vocabulary} words; {CHUNK / 1e6:.0f} M at once",
            when="update",
        ),
    ]
    if bf16 and dtype == "float32":
        parts.append(MemoryPart("bf16 weights", 2 * size.parameters, "cast once a pass", when="update"))
    if sharers > 1:
        parts.append(MemoryPart("whole weights", weights, "to generate, evaluate and save; in the node's own process"))
        gathered = 2 * (size.parameters // size.layers + size.vocabulary * size.hidden)
        width = weights / size.parameters
        parts.append(
            MemoryPart("layers in work", int(gathered * width), "two layers, embeddings and head, whole", when="update")
        )
    parts += engine_parts
    if not gpu_memory:
        parts.append(MemoryPart("libraries", LIBRARIES, "torch and transformers"))
        if sampling.external:
            parts.append(MemoryPart("replay buffer", config.buffer.max_bytes, "buffer.max_bytes"))
    return parts


def peak(parts: list[MemoryPart]) -> int:
    """Return what `footprint`'s parts take at once: generation, and the update with its gradients, take turns."""
    of = {
        when: sum(part.bytes if part.bound else MARGIN * part.bytes for part in parts if part.when == when)
        for when in ("always", "generation", "update")
    }
    return int(of["always"] + max(of["generation"], of["update"]))


def trained_bytes(sharers: int = 1) -> float:
    """Return what a trained weight takes of a device; with FSDP2 a part of it, and a whole copy beside."""
    return TRAINING_BYTES if sharers == 1 else TRAINING_BYTES / sharers + 4


def frozen_bytes(dtype: str, sharers: int = 1) -> float:
    """Return what a weight beneath adapters takes of a device, by `policy.dtype`; with FSDP2 likewise."""
    width = {"float32": 4, "nf4": NF4_BYTES}.get(dtype, 2)
    return width if sharers == 1 else width / sharers + width


def weight_bytes(size: ModelSize, dtype: str) -> int:
    """Return what a model's weights take by `policy.dtype`; with "nf4" the matrices of its layers alone have 4 bits."""
    if dtype == "nf4":
        attention = 2 * size.hidden * (size.hidden + size.kv_width)
        matrices = min(size.parameters, size.layers * (attention + 3 * size.hidden * size.intermediate))
        return int(NF4_BYTES * matrices) + 2 * (size.parameters - matrices)
    return int(size.parameters * frozen_bytes(dtype))


def adapter_parameters(size: ModelSize, rank: int) -> int:
    """Return how many weights adapters of `rank` on every linear layer have (`target_modules = "all-linear"`)."""
    width = size.hidden
    attention = (width + width) * 2 + (width + size.kv_width) * 2
    return size.layers * rank * (attention + 3 * (width + size.intermediate))


def activation_bytes(size: ModelSize, product: int, *, checkpointing: bool = False) -> int:
    """Return what a token's backward pass needs of the forward one.

    A gated layer (Llama, Qwen, Gemma, ...) keeps the inputs of its matrices and of what is between them, in `product`
    bytes each, and the norms and the residual stream in float32. With checkpointing, one layer at a time and the
    stream.
    """
    stream = 4 * 4 * size.hidden
    inner = product * (6 * size.hidden + 4 * size.kv_width + 4 * size.intermediate)
    if checkpointing:
        return size.layers * 4 * size.hidden + stream + inner
    return size.layers * (stream + inner)


def logits_bytes(size: ModelSize, tokens: int, *, adapters: bool) -> int:
    """Return what the logits of so many tokens of completions take in the update, a chunk at a time."""
    matrix = 0 if adapters else 4 * size.vocabulary * size.hidden
    return LOGIT * min(tokens * size.vocabulary, CHUNK) + matrix
