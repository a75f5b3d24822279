"""Make the built-in policies: `python examples/make_builtin.py [--bases examples/bases]`.

With `--bases` the starts that experiments use are made too, out of the same learning. For another task or size:
`python examples/make_builtin.py --start middling --width 64 --out FOLDER`. A policy that is several times as wide
wants a smaller rate and fewer steps.

A model that answers well leaves reinforcement learning nothing to do, and one that
never answers right leaves it nothing to learn from. So the policy is made in two
supervised stages: it first learns the tasks, then for a few hundred steps is mostly
shown random digits for an answer. The skill stays in its weights but seldom speaks:
about one completion in eighty is right, the sparse regime of real post-training.
(Answers to other questions in place of digits would not do: they teach the model to
guess, and a guess at a truth table is right once in sixteen.)

It is shown no held-out question (`node.tasks.questions`, by the default split). So what a swarm learns of those was not
taught here.

Experiments want denser starts too: those are shown a share of right answers again, for a hundred steps more. And they
want other sizes and another task: the recipe is tuned for none but its own.

The same seed gives the same weights on the same machine and library versions.
"""

import argparse
import copy
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from node.policy.load import BUILTIN
from node.tasks import Item, Task, derive_seed
from node.tasks.builtin.families import BY_NAME, FAMILIES
from node.tasks.questions import DEFAULT_SPLIT
from node.tasks.task_set import TaskSet

PRINTABLE = "".join(map(chr, range(32, 127)))
PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
IGNORED = -100
LONGEST = 16  # tokens of an answer: a matrix has 13, and the end of text


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; the defaults made the policy that the node ships with."""

    seed: int = 0
    width: int = 48
    layers: int = 2
    heads: int = 4
    difficulty: int = 1
    batch: int = 256
    learn_steps: int = 4000
    learn_rate: float = 4e-3
    hide_steps: int = 250
    hide_rate: float = 3e-4
    right: float = 0.2
    show_steps: int = 100
    show_rate: float = 1e-3
    tasks: tuple[str, ...] = tuple(FAMILIES)


STARTS: Mapping[str, float] = {"sparse": 0.0, "middling": 0.4, "dense": 0.7}
"""How much of the skill speaks: the share of right answers that a policy is shown last."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token a printable ASCII character; a text starts with `<bos>`."""
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN, *PRINTABLE])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=128,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained model of the recipe's shape (about 51 k parameters at width 48, 88 k at 64)."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        initializer_range=recipe.width**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def tasks_of(recipe: Recipe) -> list[Task]:
    """Return the recipe's built-in families at its difficulty."""
    return [BY_NAME[name](difficulty=recipe.difficulty) for name in recipe.tasks]


def sample_answers(recipe: Recipe, right: float, step: int) -> list[tuple[str, str]]:
    """Return a batch of questions with answers, of which about a fraction `right` are right."""
    return [(item.question, answer) for _, item, answer in sample_items(recipe, right, step)]


def sample_items(recipe: Recipe, right: float, step: int) -> list[tuple[Task, Item, str]]:
    """Return what `sample_answers` does, each with the task and the item that it is of."""
    rng = random.Random(derive_seed("builtin policy", recipe.seed, right, step))
    tasks = tasks_of(recipe)
    scores = []
    for _ in range(recipe.batch):
        task = rng.choice(tasks)
        item = training_item(task, rng)
        answer = item.answer if rng.random() < right else wrong_answer(item.answer, rng)
        scores.append((task, item, answer))
    return scores


def training_item(task: Task, rng: random.Random) -> Item:
    """Return a question of `task` that is not held out."""
    while True:
        item = task.make(rng.getrandbits(63))
        if not DEFAULT_SPLIT.holds_out(task.key.name, item.question):
            return item


def wrong_answer(answer: str, rng: random.Random) -> str:
    """Return two to five random digits that are not `answer`."""
    while True:
        text = "".join(rng.choices(string.digits, k=rng.randint(2, 5)))
        if text != answer:
            return text


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, right: float, steps: int, rate: float
) -> None:
    """Train in place on `steps` batches of answers (and end-of-text), `right` of them right, the rate falling to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        inputs, labels = encode(tokenizer, sample_answers(recipe, right, step))
        loss = model(input_ids=inputs, attention_mask=inputs != tokenizer.pad_token_id, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 500 == 0 or step == steps - 1:
            print(f"  step {step:5d}  loss {loss.item():.3f}", flush=True)


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels, both [pairs, longest], padded right; only answer and end-of-text are labelled."""
    prompts = [tokenizer(question).input_ids for question, _ in pairs]
    answers = [[*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for _, answer in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    inputs = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), longest), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        inputs[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return inputs, labels


@torch.no_grad()
def pass_rates(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tasks: Sequence[Task], questions: int, completions: int
) -> dict[str, float]:
    """Return by task the part of completions sampled at temperature 1 that is right, on held-out questions."""
    model.eval()
    rates = {}
    asked = TaskSet([(task, 1.0) for task in tasks])
    for task in tasks:
        items = list(islice(asked.evaluation(task, 0, questions), questions))
        batch = tokenizer([item.question for item in items], return_tensors="pt", padding=True)
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            top_k=0,
            max_new_tokens=LONGEST,
            num_return_sequences=completions,
        )
        texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        rewards = [task.verify(items[index // completions], text) or 0.0 for index, text in enumerate(texts)]
        rates[task.key.name] = sum(rewards) / len(rewards)
    return rates


def make(recipe: Recipe, folders: Mapping[str, Path]) -> None:
    """Train the policy of `recipe`, save it in a folder for each of these starts, and print its pass rates."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer()
    learnt = build_model(recipe, tokenizer)
    print(f"{sum(parameter.numel() for parameter in learnt.parameters())} parameters; learning the tasks")
    train(learnt, tokenizer, recipe, 1.0, recipe.learn_steps, recipe.learn_rate)
    _report(pass_rates(learnt, tokenizer, tasks_of(recipe), 128, 4))
    print("hiding the skill")
    train(learnt, tokenizer, recipe, recipe.right, recipe.hide_steps, recipe.hide_rate)
    for start, folder in folders.items():
        model = copy.deepcopy(learnt)
        if shown := STARTS[start]:
            print(f"showing some of it: {start}")
            train(model, tokenizer, recipe, shown, recipe.show_steps, recipe.show_rate)
        _report(pass_rates(model, tokenizer, tasks_of(recipe), 256, 16))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _report(rates: dict[str, float]) -> None:
    for name, rate in rates.items():
        print(f"  {name:20} {rate:8.2%}")
    print(f"  {'mean':20} {sum(rates.values()) / len(rates):8.2%}", flush=True)


def main() -> None:
    """Parse the command line and make the policy."""
    parser = argparse.ArgumentParser(prog="python examples/make_builtin.py", description="Make the built-in policy.")
    parser.add_argument("--out", type=Path, default=BUILTIN, help="folder to write (default: the package's own)")
    parser.add_argument("--bases", type=Path, help="folder for a middling and a dense start, made with it")
    parser.add_argument("--start", choices=STARTS, default="sparse", help="how much of the skill speaks")
    parser.add_argument("--width", type=int, default=Recipe.width, help="of a hidden state: the model's size")
    parser.add_argument(
        "--task", choices=BY_NAME, action="append", help="that it learns; may be repeated (default: seven)"
    )
    parser.add_argument("--learn-rate", type=float, default=Recipe.learn_rate, help="while it learns the tasks")
    parser.add_argument("--learn-steps", type=int, default=Recipe.learn_steps, help="in which it learns the tasks")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    recipe = Recipe(
        seed=arguments.seed,
        width=arguments.width,
        learn_rate=arguments.learn_rate,
        learn_steps=arguments.learn_steps,
        tasks=tuple(arguments.task or Recipe.tasks),
    )
    if (arguments.start != "sparse" or recipe != Recipe(seed=arguments.seed)) and arguments.out == BUILTIN:
        parser.error(
            f"another start or recipe wants an --out: the package ships the sparse one of width {Recipe.width}"
        )
    if arguments.width < 1 or arguments.width % (2 * Recipe.heads):
        parser.error(f"--width wants a multiple of {2 * Recipe.heads}: {Recipe.heads} heads, of an even width each")
    if arguments.learn_steps < 1 or arguments.learn_rate <= 0:
        parser.error("--learn-steps wants 1 or more, and --learn-rate more than 0")
    folders = {arguments.start: arguments.out}
    if arguments.bases:
        folders |= {start: arguments.bases / start for start in STARTS if start != arguments.start}
    make(recipe, folders)


if __name__ == "__main__":
    main()
