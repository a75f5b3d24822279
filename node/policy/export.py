"""A model in training, written as a folder that others can load.

`export_weights` is for the engine beside the trainer: weights alone, each time anew. `export_model`
is for people: an ordinary folder of `transformers`, with tokenizer, chat template and model card.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from node.policy.load import Policy
from protocol.storage import sync_folder, sync_tree

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
    weights = published(base, merged_weights(model))
    for number, shard in enumerate(_shards(weights, getattr(torch, dtype))):
        file = f"model-{number:05}.safetensors"
        (folder / file).write_bytes(save(shard, {"format": "pt"}))
        files |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def export_model(policy: Policy, folder: Path, dtype: str, card: str) -> None:
    """Make `folder`, whole or not at all, of the policy's merged weights in `dtype`, its tokenizer and `card`.

    Embedding and output matrix are one in the file where they still are one, which an adapter on one of them undoes.

    Raises:
        OSError: `folder` cannot be made, since it exists and holds something, say.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        _merged_model(policy.model, getattr(torch, dtype)).save_pretrained(aside)
        _write_tokenizer(policy.tokenizer, aside)
        (aside / "README.md").write_text(card)
        aside.chmod(0o755)  # mkdtemp, and what writes tensors, make them for their owner alone
        for file in aside.iterdir():
            file.chmod(0o644)
        sync_tree(aside)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def _merged_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in merged_weights(model)}
    config = copy.deepcopy(base.config)
    config.dtype = dtype
    vars(config).pop("quantization_config", None)
    config.use_cache = True  # a trainer turns it off
    embedding, output = _embedding_names(base)
    if config.tie_word_embeddings and output in weights and not torch.equal(weights[embedding], weights[output]):
        config.tie_word_embeddings = False
    with torch.device("meta"):  # no memory and no time for weights that are replaced at once
        bare = type(base)(config)
    bare.load_state_dict(weights, assign=True)
    bare.tie_weights()
    bare.generation_config = copy.deepcopy(base.generation_config)
    return bare


def _embedding_names(model: PreTrainedModel) -> tuple[str, str]:
    """Return the names of the weights of the token embedding and of the output matrix, without adapters."""
    names = {id(module): name for name, module in model.named_modules()}
    pair = (model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(f"{names[id(module)]}.weight" for module in pair)  # type: ignore[return-value]  # two of them


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer without what the node set for its own batches, and without where it was loaded from."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for key in ("padding_side", "is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of every weight, by the names of the model without adapters.

    An adapted matrix is yielded as base plus update, in a tensor of its own: merging in
    place and back would move the base by a rounding error each time.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    packed = {name: weight for name, weight in base.named_parameters() if hasattr(weight, "quant_state")}
    for name, tensor in base.state_dict().items():
        of_packed = any(name.startswith(f"{tensor}.") for tensor in packed)  # its scales
        if ".lora_" in name or of_packed:
            continue
        if name in packed:
            tensor = _unpacked(packed[name])
        if name.endswith(".base_layer.weight"):
            layer = base.get_submodule(name.removesuffix(".base_layer.weight"))
            with torch.no_grad():
                for adapter in layer.active_adapters:
                    tensor = tensor + layer.get_delta_weight(adapter).to(tensor.dtype)
        yield name.replace(".base_layer.", "."), tensor


def published(
    model: PreTrainedModel, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a model's weights by the names and in the shapes of its published files, by which other programs load them.

    In memory transformers has the experts of a layer (Qwen3-MoE) in one tensor; in a file each has its own.
    """
    for name, tensor in weights:
        yield from revert_weight_conversion(model, {name: tensor}).items()


def _unpacked(weight: Any) -> torch.Tensor:
    """Return a matrix of 4 bits a weight (bitsandbytes) as one of float32."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float()


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
