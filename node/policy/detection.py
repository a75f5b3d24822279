"""Looks at a model and at this machine; reads no weights.

A missing model is reported at once: what looks like a path is asked of no hub, and a hub that does not answer is asked
once.
"""

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from node.config import PolicyConfig
from node.errors import UserError, how_to_install
from node.policy.memory import Machine, ModelSize

HUB_TIMEOUT_S = 10.0
_WEIGHTS = (".safetensors", ".bin", ".gguf")  # as transformers reads them
GPUS = (  # NVIDIA's, AMD's, Windows', Jetson's
    "/proc/driver/nvidia/version",
    "/dev/nvidiactl",
    "/dev/kfd",
    "/dev/dxg",
    "/dev/nvmap",
)
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
NODES_ON_GPU = "GOSSAMER_NODES_ON_GPU"  # in the environment of a node that a swarm starts: how many share its GPU


def measure_model(model: str) -> ModelSize:
    """Return the size of a model, from its configuration alone.

    Raises:
        UserError: there is no such model, its weights are missing, or it is no causal language model to transformers.
    """
    find_model(model)  # first: what follows takes seconds to import
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=Path(model).is_dir())
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"cannot load policy.model {model!r}: {first_line(error)}") from error
    size = size_of(parameters, config)
    return size._replace(quantised=_bytes_of_weights(model)) if hasattr(config, "quantization_config") else size


def size_of(parameters: int, config: Any) -> ModelSize:
    """Return the size of a model with so many weights and this configuration of transformers."""
    text = config.get_text_config()
    positions, kv_heads = getattr(text, "max_position_embeddings", None), getattr(text, "num_key_value_heads", None)
    return ModelSize(parameters, *shape_of(text), text.vocab_size, positions, kv_heads or text.num_attention_heads)


def check_policy(policy: PolicyConfig) -> None:
    """Look for what would keep a policy from being loaded, without importing torch.

    Raises:
        UserError: there is no GPU, no such folder, or no weights in it.
    """
    if policy.device == "cuda" and not has_gpu():
        raise UserError("policy.device is 'cuda' but this machine has no GPU, or hides it: use 'auto' or 'cpu'")
    if policy.model != "builtin" and (Path(policy.model).is_dir() or looks_like_path(policy.model)):
        find_model(policy.model)  # asks nobody


def check_bits(dtype: str = "", optim: str = "") -> None:
    """Raise `UserError` where `policy.dtype` or `trainer.trl.optim` wants bitsandbytes, which is not installed."""
    asked = [f"policy.dtype={dtype!r}"] if dtype == "nf4" else []
    asked += [f"trainer.trl.optim={optim!r}"] if optim == "adamw_8bit" else []
    if asked and not has_bitsandbytes():
        raise UserError(f"bitsandbytes is not installed, for {' and '.join(asked)}: {how_to_install('bitsandbytes')}")


def check_trackers(named: Sequence[str]) -> None:
    """Raise `UserError` where `trainer.trl.report_to` names trackers that are not installed."""
    writers = {"tensorboard": ("tensorboard", "tensorboardX")}  # either will do
    lacks = [name for name in named if not any(map(find_spec, writers.get(name, (name,))))]
    if lacks:
        raise UserError(
            f"trainer.trl.report_to: {' and '.join(lacks)} not installed: {how_to_install(','.join(lacks))}"
        )


def has_bitsandbytes() -> bool:
    """Tell whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


def has_gpu() -> bool:
    """Tell whether torch may see a GPU of CUDA or ROCm: whether a driver shows one, and nobody hides it."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip()
    return shown not in ("", "-1") and any(Path(gpu).exists() for gpu in GPUS)


def can_be_asked_not_to_think(model: str) -> bool:
    """Tell whether the chat template of a model has a switch for its chain of thought, as Qwen3's has."""
    from transformers import AutoTokenizer

    try:
        template = AutoTokenizer.from_pretrained(model, local_files_only=Path(model).is_dir()).chat_template
    except Exception:  # noqa: BLE001  # a file that is garbled raises anything; `load_policy` says what is wrong with it
        return False
    return "enable_thinking" in str(template)


def shape_of(text: Any) -> tuple[int, int, int, int, int]:
    """Return layers, hidden width, intermediate width, heads, and key-value heads times their width."""
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return text.num_hidden_layers, text.hidden_size, intermediate, heads, kv_heads * head


def find_model(model: str) -> None:
    """Raise `UserError` at once where `model` is no folder here, not in the hub's cache and not to be had from it.

    A folder has to hold weights: all parts that its index names, where it has one.
    """
    if Path(model).is_dir():
        if missing := _missing_weights(Path(model)):
            raise UserError(f"cannot load policy.model {model!r}: it has {missing}: copy the weights into it too")
        return
    if looks_like_path(model):
        raise UserError(f"cannot load policy.model {model!r}: no such folder here: check the path")
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # transformers, too, takes it from there

    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return
        model_info(model, timeout=HUB_TIMEOUT_S)
        return
    except (HFValidationError, httpx.HTTPError, OSError) as error:
        reason = first_line(error)
    raise UserError(
        f"cannot load policy.model {model!r}: no such folder here, and not to be had from the model hub ({reason})"
    )


def _missing_weights(folder: Path) -> str:
    """Return what a model's folder lacks of its weights; empty where nothing is missing, or it is no model's."""
    if not (folder / "config.json").is_file():
        return ""  # transformers says what it wants
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        try:
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError):
            return f"a damaged {index.name}"
        absent = [part for part in parts if not (folder / str(part)).is_file()]
        if absent:
            return f"{len(parts) - len(absent)} of {len(parts)} files of weights, without {absent[0]}"
    there = any(path.suffix in _WEIGHTS for path in folder.iterdir())
    return "" if there else "a config.json and no weights"


def _bytes_of_weights(model: str) -> int:
    """Return the size of a model's files of weights, in a folder or in the hub's cache; 0 where there are none yet."""
    from huggingface_hub import try_to_load_from_cache

    path = str(Path(model) / "config.json") if Path(model).is_dir() else try_to_load_from_cache(model, "config.json")
    files = Path(path).parent.glob("*.safetensors") if isinstance(path, str) else ()
    return sum(file.stat().st_size for file in files)


def looks_like_path(model: str) -> bool:
    """Tell a path from the id of a model on a hub, which is NAME or OWNER/NAME."""
    return model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1


def first_line(error: Exception) -> str:
    """Return the first line of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def detect_machine(device: str = "auto", *, vllm: bool = False) -> Machine:
    """Return what this machine has for one node that trains on `device`, as `policy.device` names it.

    A node that a swarm has started has a part of its GPU, if others are on it (`NODES_ON_GPU`).
    """
    import torch

    if device in ("auto", "cuda") and torch.cuda.is_available():
        beside = int(os.environ.get(NODES_ON_GPU, "1"))
        memory = torch.cuda.get_device_properties(0).total_memory // beside
        count = torch.cuda.device_count()
        bf16 = computes_in_bf16("cuda")
        return Machine(memory, True, bf16, vllm, 1 / beside, devices=count, nf4=has_bitsandbytes())
    return Machine(main_memory(), bf16=computes_in_bf16("cpu"), vllm=vllm)


def computes_in_bf16(device: str) -> bool:
    """Tell whether this machine's "cpu" or "cuda" has instructions for products in bfloat16; of others: no."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def visible_gpus(policy: PolicyConfig) -> list[str]:
    """Return the GPUs that nodes of this policy may train on, as CUDA_VISIBLE_DEVICES names them.

    The built-in policy has use for one, and asking takes torch.
    """
    if policy.model == "builtin" or policy.device not in ("auto", "cuda"):
        return []
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else list(map(str, range(count)))


def main_memory() -> int:
    """Return how many bytes this process may use: the machine's, or its container's."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
