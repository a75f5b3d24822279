"""The language model's head, over completions alone and some positions at a time (chunked cross entropy).

A position has as many logits as the vocabulary has words, so those of a micro-batch are its largest tensor by far, and
in float32 they are there several times: themselves, their logarithms, their gradient. Here the layers run once, over
all positions. The head and what the model does after it (soft caps, scales) then run over some logits at a time. The
backward pass computes the logits of a chunk again (`torch.utils.checkpoint`), but not those of the first: where one
chunk holds all, everything is computed once.

A chunk is the model's own forward pass, in which the layers are left out and give a chunk of hidden states. So soft
caps, scales, biases, tied weights and adapters on the output matrix are the model's, and no list of them is kept here.

Not taken: TRL's fused head. Without Triton its tiles are of 4,096 positions by 32,768 words, 512 MiB each, and prompts
are in them too; and it keeps a list of what models do after the head.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from node.policy.memory import logits_at_once


def positions_at_once(model: Any) -> int:
    """Return how many positions' logits are in one chunk, by the memory of the model's device."""
    cuda = model.device.type == "cuda"
    memory = torch.cuda.get_device_properties(model.device).total_memory if cuda else 0
    return max(1, logits_at_once(memory) // model.config.get_text_config().vocab_size)


def logps_and_entropies(
    model: Any,
    bare: Any,
    inputs: Mapping[str, Any],
    places: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability and entropy of each of these tokens, in nats, (N,) float32. The entropy has no gradient.

    Args:
        model: a causal language model, called once.
        bare: the same without what is wrapped around it; adapters are part of it.
        inputs: of its forward pass, R rows of S places.
        places: (N,), the flat places in (R, S) that predict the tokens.
        tokens: (N,), at least one.
        temperature: that logits are divided by.
        chunk: positions whose logits are held at once.
    """
    first, *others = torch.split(tokens, chunk)
    given: list[Any] = []  # by the layers, for each chunk

    def split(output: Any) -> Any:
        given.extend(_with_hidden(output, hidden) for hidden in torch.split(_picked(output, places), chunk))
        return given[0]

    def of_chunk(output: Any, some: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with _layers_left_out(bare, output), _without_hooks(_causal(bare)):
            return _of_logits(_causal(bare)(**inputs, use_cache=False).logits, some, temperature)

    with _layers_give(bare, split):
        parts = [_of_logits(model(**inputs, use_cache=False).logits, first, temperature)]
    for output, some in zip(given[1:], others, strict=True):
        parts.append(checkpoint(of_chunk, output, some, use_reentrant=False))
    logps, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
    return logps, entropies


@contextmanager
def only_at(model: Any, places: torch.Tensor) -> Iterator[None]:
    """Within, the model's logits are those of these flat places (N,) alone, (1, N, V)."""
    with _layers_give(model, lambda output: _with_hidden(output, _picked(output, places))):
        yield


def _of_logits(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what logits (1, n, V) say of tokens (n,): log-probabilities and entropies, (n,) float32."""
    logits = logits.squeeze(0).float()
    if temperature != 1:
        logits = logits / temperature
    sums = logits.logsumexp(-1)
    logps = logits.gather(-1, tokens[:, None]).squeeze(-1) - sums
    with torch.no_grad():
        entropies = sums - ((logits - sums[:, None]).exp() * logits).sum(-1)
    return logps, entropies


def _causal(model: Any) -> Any:
    """Return the model beneath adapters."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _picked(output: Any, places: torch.Tensor) -> torch.Tensor:
    """Return the hidden states (N, H) of these flat places."""
    hidden: torch.Tensor = output.last_hidden_state.flatten(0, 1)[places]
    return hidden


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """Return what the layers gave with these hidden states (N, H) in place of theirs, as one row."""
    return type(output)(**{**output, "last_hidden_state": hidden.unsqueeze(0)})


@contextmanager
def _layers_give(model: Any, change: Callable[[Any], Any]) -> Iterator[None]:
    """Change, within, what the head gets from the layers."""
    handle = _causal(model).base_model.register_forward_hook(lambda _, __, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _layers_left_out(model: Any, output: Any) -> Iterator[None]:
    """Give the head, within, this output of the layers, which do not run."""
    layers = _causal(model).base_model
    own = layers.__dict__.get("forward")  # what somebody has put over the class's
    layers.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if own is None:
            del layers.forward
        else:
            layers.forward = own


@contextmanager
def _without_hooks(model: Any) -> Iterator[None]:
    """Run, within, neither the hooks of the model nor those of its output matrix.

    FSDP2's would exchange weights once a chunk, and ranks have unlike numbers of chunks. The weights that the first
    chunk of a micro-batch has fetched stay until the backward pass.
    """
    held = [
        (module, module._forward_pre_hooks, module._forward_hooks) for module in (model, model.get_output_embeddings())
    ]
    for one, _, _ in held:
        one._forward_pre_hooks, one._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for one, before, after in held:
            one._forward_pre_hooks, one._forward_hooks = before, after
