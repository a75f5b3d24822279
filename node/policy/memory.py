"""Memory: what a node with a model holds at once, in bytes, as one table. Nothing else adds memory up.

A row is a part, and a column a phase of a round:

    generate     the engine answers a round's questions
    hand over    it is given the weights of the last update
    update       gradients, with what the backward pass needs of the forward one
    save         a checkpoint is written from a copy

`memory_held` is pure. Presets take the first row of settings that fits by it, doctor prints it, and a start refuses by
it what cannot fit. What it misses is caught later: the update, transformers and vLLM try again with less.

    weights           as `policy.dtype` says
    gradients, Adam   of the trained weights, in float32: 4 and 8 bytes each; 2 for Adam with `adamw_8bit`
    activations       what the backward pass needs again, of the micro-batch in work
    logits            of `CHUNK` numbers of its completions: themselves, their logarithms, their gradients, and copies;
                      and a gradient of the output matrix that is added to the others
    key-value cache   of all completions that are generated at once
    libraries         torch and transformers themselves, in main memory

The margins were fitted to SmolLM2-135M on a processor: 5.2 GB for 8 rows of 160 tokens in float32 (estimated 5.2), 3.2
with adapters (3.5), 4.6 with products in bfloat16 (4.6), 6.0 for 16 rows (6.1). A real node of it that trained in every
round took 3.4 to 3.5 GB (3.95) with all weights and 2.7 (2.24) with adapters, for which the estimate is too low:
tests/e2e/test_node_footprint.py prints both.
"""

from typing import Literal, NamedTuple

from node.config import EngineConfig, NodeConfig

Phase = Literal["generate", "hand over", "update", "save"]
Device = Literal["trainer", "engine", "main"]  # the device that trains, each of engine.placement, and main memory
PHASES: tuple[Phase, ...] = ("generate", "hand over", "update", "save")

CHUNK = 1 << 24  # logits at a time (`node.training.head`): 64 MiB in float32; a GPU may have more
CHUNK_PART = 0.04  # of a GPU, for a chunk: each is a launch of the head, which a large GPU does in no time
LOGIT = 24  # bytes of each: six tensors in float32, as measured
MARGIN = 1.1  # what the allocator holds between two passes
SPARE = 0.05  # of a GPU, for CUDA itself and what the sum misses
NF4_BYTES = 0.516  # of a weight: 4 bits, and a scale of 8 bits for 64 of them, which have scales themselves
ADAM_BYTES = {"adamw_torch_fused": 8.0, "adamw_8bit": 2.03}  # two moments of a trained weight
LIBRARIES = 500_000_000  # torch and transformers, as measured
CACHE_PART = 0.15  # of a GPU, for keys and values of transformers; more rows than fit take turns
VLLM_WEIGHT = 2.2  # bytes that vLLM needs for each weight: bfloat16, and a tenth for what it packs anew
VLLM_LEAST = 3_000_000_000  # bytes beside them: a small key-value cache, and scratch space
VLLM_FULL = 0.8  # of its part of a GPU, at most, where several could share the model: the cache has the rest
VLLM_CPU_CACHE = 1 << 30  # of keys and values, without a GPU
VLLM_ASLEEP = 2_000_000_000  # bytes of a GPU that vLLM keeps while it sleeps: CUDA's own, and CUDA graphs


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
    kv_heads: int = 1
    quantised: int = 0  # bytes of all weights, where the model was published in fewer than 16 bits


BUILTIN_SIZE = ModelSize(
    51_072, layers=2, hidden=48, intermediate=96, heads=4, kv_width=48, vocabulary=99, positions=128, kv_heads=4
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
    sharers: int = 1  # processes, each on a GPU like this, among which FSDP2 shares the weights out


class MemoryPart(NamedTuple):
    """A row of the table: its bytes in each of its phases, and how they come about."""

    name: str
    bytes: int
    why: str
    phases: tuple[Phase, ...] = PHASES
    device: Device = "trainer"
    fixed: bool = False  # no smaller micro-batch, cache or part of a GPU makes it less
    bound: bool = False  # what takes it takes no more; else torch's allocator does, by `MARGIN`


class MemoryTable(NamedTuple):
    """The rows that `memory_held` returns."""

    parts: list[MemoryPart]

    def total(self, phase: Phase, device: Device = "trainer", *, fixed: bool = False) -> int:
        """Return what a phase takes of a device, with what its allocator keeps; or of it the `fixed` parts, bare."""
        parts = [part for part in self.parts if phase in part.phases and part.device == device]
        if fixed:
            return sum(part.bytes for part in parts if part.fixed)
        return int(sum(part.bytes if part.bound else MARGIN * part.bytes for part in parts))

    def peak(self, device: Device = "trainer") -> int:
        """Return what the largest phase takes of a device."""
        return max(self.total(phase, device) for phase in PHASES)

    @property
    def least(self) -> int:
        """The device that trains needs so many bytes, however small the micro-batch is."""
        return max(self.total(phase, fixed=True) for phase in PHASES)


def memory_held(size: ModelSize, config: NodeConfig, machine: Machine) -> MemoryTable:
    """Return what a node with this configuration holds.

    With FSDP2 it is what the node's own process holds, which keeps a whole copy of the weights beside its part. Further
    processes hold no more on their GPUs, on each of which vLLM has an engine too.

    Args:
        size: of the policy's model.
        config: of the node.
        machine: the node's part of it. GPUs of `engine.placement` count as like the one that trains.
    """
    parts = [*_training(size, config, machine), *_generating(size, config, machine)]
    main: Device = "main" if machine.gpu else "trainer"
    parts.append(MemoryPart("libraries", LIBRARIES, "torch and transformers", device=main))
    if config.sampling.external:
        parts.append(MemoryPart("group buffer", config.buffer.max_bytes, "buffer.max_bytes", device=main))
    trained, moments = _trained(size, config)
    copy = MemoryPart("checkpoint", 4 * trained + moments, "a copy to write from", ("save",), main, bound=True)
    left = machine.memory - MemoryTable(parts).total("save")
    if machine.gpu or 2 * copy.bytes <= left:  # otherwise training waits for the disk (`node.training.snapshot`)
        parts.append(copy)
    return MemoryTable(parts)


def _training(size: ModelSize, config: NodeConfig, machine: Machine) -> list[MemoryPart]:
    """Return what the trainer holds."""
    sampling, trainer, dtype = config.sampling, config.trainer, config.policy.dtype
    answers = sampling.completions * config.engine.max_completion_length
    group = config.engine.max_prompt_length + answers  # tokens of a group, whose prompt is computed once
    at_once = max(trainer.tokens_per_batch, config.engine.longest)  # no row is divided
    tokens = min(at_once, (sampling.local + sampling.external) * group)
    weights, (trained, moments) = weight_bytes(size, dtype), _trained(size, config)
    sharers = machine.sharers if machine.gpu else 1  # processors have one memory
    of_all = f", 1/{sharers} of them" if sharers > 1 else ""
    each = f"{size.parameters / 1e6:.3g} M of {weights / size.parameters:.3g} bytes"
    activations = activation_bytes(size, product_bytes(config, machine), checkpointing=trainer.gradient_checkpointing)
    words, chunk = tokens * answers // group, logits_at_once(whole_memory(machine) if machine.gpu else 0)
    millions = f"{trained / 1e6:.3g} M trained weights{of_all}"
    parts = [
        MemoryPart("weights", weights // sharers, each + of_all, fixed=True),
        MemoryPart("gradients", 4 * trained // sharers, millions, ("update",), fixed=True),
        MemoryPart("Adam", moments // sharers, f"two moments of each trained weight{of_all}", fixed=True),
        MemoryPart(
            "activations",
            tokens * activations,
            f"{tokens} tokens at once: trainer.tokens_per_batch, or a row",
            ("update",),
        ),
        MemoryPart(
            "logits",
            logits_bytes(size, words, chunk, adapters=config.policy.lora.r > 0),
            f"{words} tokens of completions, {size.vocabulary} words; {chunk / 1e6:.0f} M at once",
            ("update",),
        ),
    ]
    if _is_cast(config, machine):
        parts.append(MemoryPart("bf16 weights", 2 * size.parameters, "cast once a pass", ("update",)))
    if sharers > 1:
        why = "to generate, evaluate and save; in the node's own process"
        parts.append(MemoryPart("whole weights", weights, why, fixed=True))
        gathered = 2 * (size.parameters // size.layers + size.vocabulary * size.hidden) * weights // size.parameters
        parts.append(MemoryPart("layers in work", gathered, "two layers, embeddings and head, whole", ("update",)))
    return parts


def _generating(size: ModelSize, config: NodeConfig, machine: Machine) -> list[MemoryPart]:
    """Return what the engine holds, wherever; a server's memory is its own."""
    engine = config.engine
    main: Device = "main" if machine.gpu else "trainer"
    while_it_generates: tuple[Phase, ...] = PHASES if engine.ahead else ("generate",)
    if engine.kind == "hf":
        rows, row = config.sampling.questions_per_round * config.sampling.completions, row_bytes(size, config, machine)
        rows = min(rows, rows_at_once(row, whole_memory(machine))) if machine.gpu else rows
        why = f"{rows} completions of up to {engine.longest} tokens at once"
        parts = [MemoryPart("key-value cache", rows * row, why, while_it_generates)]
        if engine.ahead:
            # With products in bfloat16 only linear layers have 2 bytes: embeddings stay float32, apart from the head.
            copy = weight_bytes(size, config.policy.dtype)
            if _is_cast(config, machine):
                copy = 2 * size.parameters + 4 * size.vocabulary * size.hidden
            parts.append(MemoryPart("generating copy", copy, "a copy, as the policy is trained meanwhile"))
        elif _is_cast(config, machine):  # continuous batching, on a GPU, keeps them
            phases: tuple[Phase, ...] = PHASES if machine.gpu else ("generate",)
            parts.append(MemoryPart("generating copy", 2 * size.parameters, "in bfloat16", phases))
        return parts
    if engine.kind != "vllm":
        return []
    engines, sleeps = len(cards_of(size, engine, machine)), vllm_sleeps(size, config, machine)
    part = engine.vllm.gpu_memory_utilization
    held = int(part * whole_memory(machine))
    parts = []
    if not machine.gpu:
        why = f"{engines} x its copy of the weights, and 1 GiB of cache"
        parts.append(MemoryPart("vllm", engines * (VLLM_CPU_CACHE + 2 * size.parameters), why))
    elif shares_card(engine):
        when = "while it generates: it sleeps in the update" if sleeps else "always: it stays awake in the update"
        why = f"engine.vllm.gpu_memory_utilization={part:g} of the GPU, {when}"
        awake: tuple[Phase, ...] = ("generate", "hand over") if sleeps else PHASES
        parts.append(MemoryPart("vllm", held, why, awake, bound=True))
        if sleeps:
            why = "CUDA itself and its graphs, while the policy is trained"
            kept, asleep = min(VLLM_ASLEEP, held), tuple(phase for phase in PHASES if phase not in awake)
            parts.append(MemoryPart("vllm asleep", kept, why, asleep, fixed=True, bound=True))
    if machine.gpu and set(engine.devices) - {0}:
        each = len(engine.devices) // engines
        why = f"engine.vllm.gpu_memory_utilization={part:g} of each GPU of engine.placement; {each} for an engine"
        parts.append(MemoryPart("vllm", held, why, device="engine", bound=True))
    if config.policy.lora.r == 0:
        parts.append(MemoryPart("copy for vllm", 2 * size.parameters, "the weights, as vLLM reads them", device=main))
    elif machine.gpu and sleeps:
        why = f"which {engines} of vLLM keep while they sleep"
        parts.append(MemoryPart("weights asleep", 2 * engines * size.parameters, why, ("update", "save"), main))
    return parts


def shares_card(engine: EngineConfig) -> bool:
    """Tell whether vLLM generates on the GPU on which the node's own process trains, which is number 0."""
    return not engine.devices or 0 in engine.devices


def vllm_sleeps(size: ModelSize, config: NodeConfig, machine: Machine) -> bool:
    """Tell whether vLLM gives its GPUs to the update: where it shares them, and both do not fit at once.

    One that generates ahead never does. If it sleeps on one of several GPUs it sleeps on all, since it takes no longer.
    """
    engine = config.engine
    if not machine.gpu or engine.kind != "vllm" or engine.ahead or not shares_card(engine):
        return False
    awake = int(engine.vllm.gpu_memory_utilization * whole_memory(machine))
    return MemoryTable(_training(size, config, machine)).peak() + awake > (1 - SPARE) * machine.memory


def cards_of(size: ModelSize, engine: EngineConfig, machine: Machine) -> list[list[int]]:
    """Return the GPUs of `engine.placement` of each of vLLM's engines; [[]] for the trainer's own alone.

    An engine has the fewest that hold the model and a cache, so that there are many engines. All have equally many,
    among which the attention heads can be shared out. Where no number of GPUs will do, one engine has all of them.
    """
    devices, share = engine.devices, engine.vllm.gpu_memory_utilization
    will_do = (
        count
        for count in range(1, len(devices) + 1)
        if len(devices) % count == 0
        and divides_heads(size, count)
        and (not machine.gpu or vllm_needs(size, count) <= VLLM_FULL * share * whole_memory(machine))
    )
    each = next(will_do, len(devices))
    return [devices[at : at + each] for at in range(0, len(devices), each)] if devices else [[]]


def divides_heads(size: ModelSize, cards: int) -> bool:
    """Tell whether a model's attention heads can be shared out evenly among so many GPUs."""
    return size.heads % cards == 0 and (size.kv_heads % cards == 0 or cards % size.kv_heads == 0)


def vllm_needs(size: ModelSize, cards: int = 1) -> float:
    """Return the bytes that vLLM needs at least of each of so many GPUs that share a model out."""
    return VLLM_WEIGHT * size.parameters / cards + VLLM_LEAST


def whole_memory(machine: Machine) -> int:
    """Return the bytes of the whole device, of which a node may have a part."""
    return int(machine.memory / machine.share)


def product_bytes(config: NodeConfig, machine: Machine) -> int:
    """Return the bytes of a number in the key-value cache, and in what a layer keeps for its backward pass."""
    return 2 if _in_bf16(config, machine) or config.policy.dtype != "float32" else 4


def _in_bf16(config: NodeConfig, machine: Machine) -> bool:
    return machine.bf16 if config.trainer.bf16 == "auto" else config.trainer.bf16


def _is_cast(config: NodeConfig, machine: Machine) -> bool:
    """Tell whether weights in float32 are rounded for products in bfloat16."""
    return _in_bf16(config, machine) and config.policy.dtype == "float32"


def row_bytes(size: ModelSize, config: NodeConfig, machine: Machine) -> int:
    """Return what the keys and values of the longest prompt and its completion take."""
    return config.engine.longest * cache_bytes(size.layers, size.kv_width, product_bytes(config, machine))


def cache_bytes(layers: int, kv_width: int, width: int) -> int:
    """Return what the keys and values of one token take, in numbers of `width` bytes."""
    return layers * 2 * kv_width * width


def rows_at_once(row: int, gpu_memory: int) -> int:
    """Return for how many rows the keys and values, `row` bytes each, fit transformers' part of a GPU."""
    return max(1, int(CACHE_PART * gpu_memory) // row)


def answered_at_once(size: ModelSize, config: NodeConfig, machine: Machine) -> int:
    """Return how many of the longest completions all GPUs that generate hold at once; 0 for a server, not known."""
    engine, row = config.engine, row_bytes(size, config, machine)
    if engine.kind == "hf":
        return rows_at_once(row, whole_memory(machine))
    if engine.kind != "vllm":
        return 0
    engines = cards_of(size, engine, machine)
    each = max(1, len(engines[0]))
    room = engine.vllm.gpu_memory_utilization * whole_memory(machine) - vllm_needs(size, each)
    return len(engines) * max(0, int(each * room) // row)


def _trained(size: ModelSize, config: NodeConfig) -> tuple[int, int]:
    """Return how many weights are trained, and the bytes of Adam's moments of them."""
    rank = config.policy.lora.r
    trained = adapter_parameters(size, rank) if rank else size.parameters
    return trained, int(ADAM_BYTES[config.trainer.options.optim] * trained)


def weight_bytes(size: ModelSize, dtype: str) -> int:
    """Return what a model's weights take by `policy.dtype`; with "nf4" the matrices of its layers alone have 4 bits.

    Those of a quantised model stay as they were published.
    """
    if size.quantised:
        return size.quantised
    if dtype == "nf4":
        attention = 2 * size.hidden * (size.hidden + size.kv_width)
        matrices = min(size.parameters, size.layers * (attention + 3 * size.hidden * size.intermediate))
        return int(NF4_BYTES * matrices) + 2 * (size.parameters - matrices)
    return size.parameters * (4 if dtype == "float32" else 2)


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


def logits_bytes(size: ModelSize, tokens: int, chunk: int, *, adapters: bool) -> int:
    """Return what the logits of so many tokens of completions take in the update, a chunk at a time."""
    matrix = 0 if adapters else 4 * size.vocabulary * size.hidden
    return LOGIT * min(tokens * size.vocabulary, chunk) + matrix


def logits_at_once(gpu_memory: int) -> int:
    """Return how many logits are in a chunk, a power of two, on a GPU with so much memory; 0 for a processor."""
    fitting = int(CHUNK_PART * gpu_memory) // LOGIT
    return max(CHUNK, 1 << fitting.bit_length() >> 1)
