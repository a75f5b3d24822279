"""A GRPO loop in plain PyTorch that learns in a swarm: the model is transformers', the loop is this page.

    gossamer found club --task builtin/sums --state n0          # prints an invite
    python examples/bare_loop.py 'gossamer://club/...' --rounds 100

`Exchange` brings questions, rewards and peers' groups. A round answers a few questions, publishes the answers, draws as
many groups of peers as there are, and takes one step on all of them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "node" / "public"))

from gossamer import Exchange

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS, ANSWERS, DRAWN, LONGEST = 4, 8, 4, 16  # a round's questions, answers to each, peers' groups; tokens
Row = tuple[list[int], list[int], float]  # tokens of a prompt and of an answer, and its advantage


def main() -> None:
    """Join the swarm and train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("invite")
    parser.add_argument("--state", default="bare")
    parser.add_argument("--model", default=str(ROOT / "node" / "policy" / "builtin"))
    parser.add_argument("--rounds", type=int, default=100)
    given = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

    with Exchange.join(given.invite, state=given.state, policy="bare") as swarm:
        for number in range(1, given.rounds + 1):
            rows: list[Row] = []
            paid: list[float] = []
            for question in swarm.ask(QUESTIONS):
                prompt = encode(tokenizer, question.prompt)
                answers = generate(model, prompt, tokenizer.eos_token_id)
                texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
                rewards = [reward or 0.0 for reward in swarm.score(question, texts)]
                swarm.publish(question, texts, [ids[-1] == tokenizer.eos_token_id for ids in answers])
                mean = sum(rewards) / len(rewards)
                rows += [(prompt, ids, reward - mean) for ids, reward in zip(answers, rewards, strict=True)]
                paid += rewards
            groups = swarm.draw(DRAWN)
            for group in groups:
                made = [encode(tokenizer, *answer) for answer in zip(group.texts, group.finished, strict=True)]
                prompt = encode(tokenizer, group.question.prompt)
                rows += [(prompt, ids, advantage) for ids, advantage in zip(made, group.advantages, strict=True)]
            if rows := [row for row in rows if row[2] and row[1]]:
                optimizer.zero_grad()
                loss_of(model, rows).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            print(number, f"reward {sum(paid) / len(paid):.3f}", "drawn", len(groups), flush=True)


def encode(tokenizer: Any, text: str, finished: bool = False) -> list[int]:
    """Return the tokens of a text; anybody may have written it, so that it cannot spell a special token."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return [*ids, *([tokenizer.eos_token_id] if finished else [])]


@torch.no_grad()
def generate(model: Any, prompt: Sequence[int], end: int) -> list[list[int]]:
    """Return the tokens of `ANSWERS` answers to a prompt; one that ended by itself has `end` last."""
    tokens = torch.tensor([prompt] * ANSWERS, device=model.device)
    sampling = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": LONGEST, "pad_token_id": end}
    made = model.generate(tokens, do_sample=True, **sampling)[:, len(prompt) :].tolist()
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in made]


def loss_of(model: torch.nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """Return the policy gradient's loss: each answer token's log-probability, by its advantage, over all tokens."""
    longest = max(len(prompt) + len(answer) for prompt, answer, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    weights = torch.zeros(len(rows), longest)
    for place, (prompt, answer, advantage) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[place, :end] = torch.tensor([*prompt, *answer])
        weights[place, len(prompt) : end] = advantage
    logits = model(input_ids=tokens).logits[:, :-1]  # what is padded stands on the right, and no token looks there
    logps = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return -(logps * weights[:, 1:]).sum() / sum(len(answer) for _, answer, _ in rows)


if __name__ == "__main__":
    main()
