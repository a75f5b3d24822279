"""The weights of a model in training, written as a folder that another engine can load."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import PreTrainedModel

SHARD_BYTES = 256 << 20  # what is held in memory twice while a shard is written


def export_weights(model: PreTrainedModel, folder: Path, dtype: str) -> None:
    """Write `model` to the empty `folder`: config.json, safetensors shards of `dtype` and their index.

    LoRA adapters are merged into what is written; the model itself is not touched.
    Embedding and output matrix are written apart even where the model ties them: from a
    folder with one for both, vLLM keeps the old output matrix at a reload (seen in 0.31).

    Raises:
        OSError: the folder cannot be written, its disk is full, say.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = False
    config.dtype = dtype
    config.save_pretrained(folder)
    files: dict[str, str] = {}
    for number, shard in enumerate(_shards(merged_weights(model), getattr(torch, dtype))):
        file = f"model-{number:05}.safetensors"
        (folder / file).write_bytes(save(shard, {"format": "pt"}))
        files |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of every weight, by the names of the model without adapters.

    An adapted matrix is yielded as base plus update, in a tensor of its own: merging in
    place and back would move the base by a rounding error each time.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    for name, tensor in base.state_dict().items():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            layer = base.get_submodule(name.removesuffix(".base_layer.weight"))
            with torch.no_grad():
                for adapter in layer.active_adapters:
                    tensor = tensor + layer.get_delta_weight(adapter).to(tensor.dtype)
        yield name.replace(".base_layer.", "."), tensor


def _shards(weights: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        # A copy even where nothing changes: tied weights share memory, which safetensors refuses.
        shard[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard
