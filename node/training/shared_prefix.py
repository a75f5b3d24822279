"""The forward pass that computes each group's prompt once (shared prefix, tree attention).

Rows of a micro-batch that begin with the same prompt are laid out as one block,

    prompt | completion 1 | completion 2 | ...

whose mask lets a completion see its prompt and itself, and whose positions go on from the prompt's
end in every completion. So each token has the very context that it has in a row of its own, and
gradients reach the prompt from all completions at once. Nothing pads a completion. Blocks are then
put side by side in rows of one width, blind to each other.

Why not a key-value cache that is filled by the prompts and repeated for the completions: it costs
two passes with smaller matrices (on one core 3.2 s against 2.5 s for SmolLM2-135M, 4 x 8 rows of
60 + 12 tokens in bfloat16), and gradient checkpointing forbids it.

Where it does not apply, each row has its prompt, as in TRL: `disagreement` decides it once for a
model, and `attention_window` for a micro-batch whose sequences are longer than what a layer looks
back. Such rows count the padding before a prompt as positions: a model with learned positions
(GPT-2) needs this layout, whatever its size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MAX_WIDTH = 1024  # tokens of a block: attention grows with its square, and a prompt costs its length once a block
_WINDOWS = ("sliding_window", "attention_window", "window_size", "attention_chunk_size", "local_attention")
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats a token; a mask that is not heeded is off by 1


@dataclass(frozen=True, slots=True)
class Block:
    """One prompt and some of the rows that begin with it."""

    prompt: tuple[int, ...]
    rows: tuple[int, ...]
    length: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A micro-batch, laid out: R rows of S tokens that hold N completion tokens.

    `ids` (R, S); `visible`, which tokens there are, (R, S), or with `positions` (R, S) which of the keys
    (fourth) a query (third) may see, (R, 1, S, S); `sources` (N,), the flat places in (R, S) that predict
    the completions' tokens, and `targets` (N,), the flat places of these in (B, C).
    """

    ids: torch.Tensor
    visible: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor | None = None

    def inputs(self, model: Any) -> dict[str, torch.Tensor]:
        """Return what `model`'s forward pass takes of it."""
        if self.positions is None:
            return {"input_ids": self.ids, "attention_mask": self.visible}
        mask = self.visible
        if model.config._attn_implementation == "eager":  # adds the mask to the scores, and so wants numbers
            lowest = torch.finfo(model.dtype).min
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, lowest)
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": mask}


def blocks_of(prompts: Sequence[tuple[int, ...]], lengths: Sequence[int], width: int = MAX_WIDTH) -> list[Block]:
    """Return the blocks for rows with these prompts and completions of these `lengths`, in order of first use.

    A block ends before `width`, if it holds one completion at least.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    blocks = []
    for prompt, rows in rows_of.items():
        taken: list[int] = []
        length = len(prompt)
        for row in rows:
            if taken and length + lengths[row] > width:
                blocks.append(Block(prompt, tuple(taken), length))
                taken, length = [], len(prompt)
            taken.append(row)
            length += lengths[row]
        blocks.append(Block(prompt, tuple(taken), length))
    return blocks


def side_by_side(blocks: Sequence[Block]) -> list[list[Block]]:
    """Put blocks into rows as wide as the longest: each where it first fits, longest first."""
    width = max(block.length for block in blocks)
    rows: list[list[Block]] = []
    room: list[int] = []
    for block in sorted(blocks, key=lambda block: -block.length):
        at = next((at for at, left in enumerate(room) if left >= block.length), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(width)
        rows[at].append(block)
        room[at] -= block.length
    return rows


def lay_out(
    prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, completion_ids: torch.Tensor, completion_mask: torch.Tensor
) -> Layout:
    """Lay out a micro-batch of B rows: prompts (B, P) padded on the left, completions (B, C) on the right."""
    kept = zip(prompt_ids.tolist(), prompt_mask.sum(1).tolist(), strict=True)
    prompts = [tuple(ids[len(ids) - length :]) for ids, length in kept]
    completions, lengths = completion_ids.tolist(), completion_mask.sum(1).tolist()
    rows = side_by_side(blocks_of(prompts, lengths))
    width = max(sum(block.length for block in row) for row in rows)
    ids, positions, families, segments = [], [], [], []
    sources: list[int] = []
    targets: list[int] = []
    segment = 0
    for number, row in enumerate(rows):
        row_ids: list[int] = []
        row_positions: list[int] = []
        row_families: list[int] = []  # which block a token is of; padding is of none
        row_segments: list[int] = []  # which completion; 0: a prompt
        for family, block in enumerate(row, start=1):
            last_of_prompt = number * width + len(row_ids) + len(block.prompt) - 1
            row_ids += block.prompt
            row_positions += range(len(block.prompt))
            row_segments += [0] * len(block.prompt)
            for member in block.rows:
                begin, length = number * width + len(row_ids), lengths[member]
                segment += 1
                row_ids += completions[member][:length]
                row_positions += range(len(block.prompt), len(block.prompt) + length)
                row_segments += [segment] * length
                sources += [last_of_prompt, *range(begin, begin + length - 1)][:length]
                targets += range(member * len(completions[member]), member * len(completions[member]) + length)
            row_families += [family] * block.length
        gap = width - len(row_ids)
        ids.append(row_ids + [0] * gap)
        positions.append(row_positions + [0] * gap)
        families.append(row_families + [0] * gap)
        segments.append(row_segments + [0] * gap)
    device = prompt_ids.device
    family_of, segment_of = torch.tensor(families, device=device), torch.tensor(segments, device=device)
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    of_block = family_of[:, :, None] == family_of[:, None, :]
    of_prompt_or_self = (segment_of[:, None, :] == 0) | (segment_of[:, :, None] == segment_of[:, None, :])
    visible = causal & of_block & of_prompt_or_self
    return Layout(
        ids=torch.tensor(ids, device=device),
        visible=visible[:, None],
        sources=torch.tensor(sources, dtype=torch.int64, device=device),  # a micro-batch may have no token to train
        targets=torch.tensor(targets, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, device=device),
    )


def in_rows(
    prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, completion_ids: torch.Tensor, completion_mask: torch.Tensor
) -> Layout:
    """Lay out a micro-batch of B rows as `lay_out` does, but each with its own prompt and padding."""
    ids = torch.cat([prompt_ids, completion_ids], dim=1)
    rows, places = completion_mask.nonzero(as_tuple=True)
    return Layout(
        ids=ids,
        visible=torch.cat([prompt_mask, completion_mask], dim=1),
        sources=rows * ids.size(1) + prompt_ids.size(1) - 1 + places,
        targets=rows * completion_ids.size(1) + places,
    )


def attention_window(config: Any) -> float:
    """Return how many tokens back every layer looks at least; infinite for full attention."""
    text = config.get_text_config()
    windows = [getattr(text, name, None) for name in _WINDOWS]
    return min((window for window in windows if isinstance(window, int) and window > 0), default=float("inf"))


Pass = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""A way to compute a micro-batch's log-probabilities, (B, C) or those of its tokens."""


def takes_our_mask(model: Any) -> bool:
    """Tell whether the model's attention is of a kind that takes a mask of ours."""
    return model.config._attn_implementation in ("sdpa", "eager")


def alone(way: Pass) -> Pass:
    """Let each row go that way as a micro-batch of its own, without its padding; returns the tokens' (N,)."""
    return lambda batch: torch.cat([way(row)[0] for row in _rows_of(batch)])


def together(way: Pass) -> Pass:
    """Let a micro-batch go that way; returns the tokens' (N,)."""
    return lambda batch: way(batch)[batch["completion_mask"] == 1]


def disagreement(model: Any, right: Pass, tried: Pass, precision: torch.dtype) -> str:
    """Return how `tried` differs from `right` on a small batch; empty if it does not.

    Log-probabilities (N,) are compared, and gradients.

    Args:
        model: any causal language model of `transformers`.
        right: the way that is known to be correct.
        tried: the way to check.
        precision: in which both compute.
    """
    batch = _small_batch(model.config.get_text_config().vocab_size, model.device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    first_and_last = [weights[0], weights[-1]]  # an error between shows in these, too; all would take much memory
    expected = _with_gradients(right(batch), first_and_last)
    try:
        found = _with_gradients(tried(batch), first_and_last)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    tolerance = _TOLERANCE[precision]
    off = float((found[0] - expected[0]).abs().mean())
    if not off < tolerance:
        return f"log-probabilities are off by {off:.2g} nats"
    for gradient, other in zip(expected[1:], found[1:], strict=True):
        off = float((other - gradient).float().norm() / gradient.float().norm().clamp(min=1e-12))
        if not off < 5 * tolerance:
            return f"gradients are off by {off:.2g}"
    return ""


def _with_gradients(logps: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    loss = (logps * torch.arange(1, len(logps) + 1, device=logps.device)).sum()
    return [logps.detach(), *torch.autograd.grad(loss, weights)]


def _rows_of(batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield each row as a batch of its own, without its padding."""
    for row in range(len(batch["prompt_ids"])):
        prompt, completion = batch["prompt_mask"][row] == 1, batch["completion_mask"][row] == 1
        yield {name: batch[name][row : row + 1, prompt] for name in ("prompt_ids", "prompt_mask")} | {
            name: batch[name][row : row + 1, completion] for name in ("completion_ids", "completion_mask")
        }


def _small_batch(vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Two prompts of unlike lengths with three completions each, of unlike lengths too."""
    prompts, lengths, width = ([3, 5, 8, 13, 21], [34, 55, 89]), (4, 1, 3), 4
    rows = [(prompt, length, at) for at, prompt in enumerate(prompts) for length in lengths]
    batch = {
        "prompt_ids": [[0] * (5 - len(prompt)) + [token % vocabulary for token in prompt] for prompt, *_ in rows],
        "prompt_mask": [[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt, *_ in rows],
        "completion_ids": [
            [(17 * at + 7 * place + length) % vocabulary for place in range(width)] for _, length, at in rows
        ],
        "completion_mask": [[1] * length + [0] * (width - length) for _, length, _ in rows],
    }
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}
