"""What a node does with a model on a card: the preset's choices and the sum of memory, as a table for docs/gpu.md.

    python -m benchmarks.cards

Nothing is measured and nothing is loaded: it is `gossamer doctor --model ... --gpu ...` for many of both at once.
"""

from collections.abc import Iterator

from node.config import NodeConfig, fill
from node.operations.presets import preset
from node.policy.memory import Machine, ModelSize, memory_held

GB = 10**9
CARDS = (8, 12, 16, 24, 48, 80)
MODELS = {
    "Qwen2.5-0.5B": ModelSize(494_032_768, 24, 896, 4864, 14, 128, 151_936, 32_768),
    "Qwen3-0.6B": ModelSize(596_049_920, 28, 1024, 3072, 16, 1024, 151_936, 40_960),
    "Qwen2.5-1.5B": ModelSize(1_543_714_304, 28, 1536, 8960, 12, 256, 151_936, 32_768),
    "Qwen3-4B": ModelSize(4_022_468_096, 36, 2560, 9728, 32, 1024, 151_936, 40_960),
    "Qwen3-8B": ModelSize(8_190_735_360, 36, 4096, 12_288, 32, 1024, 151_936, 40_960),
}
"""Shapes as the models' configurations give them."""


def choice(size: ModelSize, gigabytes: int, *, vllm: bool) -> tuple[NodeConfig, int]:
    """Return the configuration that the preset makes for a card, and the bytes that it sums up to."""
    machine = Machine(gigabytes * GB, gpu=True, bf16=True, vllm=vllm, nf4=True)
    config = fill(NodeConfig(), {key: setting.value for key, setting in preset(NodeConfig(), size, machine).items()})
    return config, memory_held(size, config, machine).peak()


def cell(size: ModelSize, gigabytes: int, *, vllm: bool) -> str:
    """Return what is trained, by which engine it generates, and the sum in GB; a dash where nothing fits."""
    config, needed = choice(size, gigabytes, vllm=vllm)
    if needed > gigabytes * GB:
        return "-"
    trained = "4-bit LoRA" if config.policy.dtype == "nf4" else "LoRA" if config.policy.lora.r else "all"
    return f"{trained}, {config.engine.kind}, {needed / GB:.0f}"


def table(*, vllm: bool) -> Iterator[str]:
    """Yield the lines of the table, in Markdown."""
    yield "| | " + " | ".join(f"{card} GB" for card in CARDS) + " |"
    yield "|---|" + "---|" * len(CARDS)
    for name, size in MODELS.items():
        yield f"| {name} | " + " | ".join(cell(size, card, vllm=vllm) for card in CARDS) + " |"


if __name__ == "__main__":
    for installed in (True, False):
        print(f"\nvLLM {'installed' if installed else 'not installed'}\n")
        print("\n".join(table(vllm=installed)))
