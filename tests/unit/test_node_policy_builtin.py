"""The built-in policy and its maker: what is in the folder, and the regime its weights are in."""

import random
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.make_builtin import (
    IGNORED,
    PRINTABLE,
    STARTS,
    Recipe,
    build_model,
    build_tokenizer,
    encode,
    main,
    pass_rates,
    sample_answers,
    sample_items,
    tasks_of,
    train,
    wrong_answer,
)
from node.policy.load import BUILTIN
from node.tasks.questions import DEFAULT_SPLIT

BASES = Path(__file__).parents[2] / "examples" / "bases"  # what `--start` and `--width` made for the examples


def test_the_folder_is_small_and_loads_by_the_standard_classes() -> None:
    assert sum(path.stat().st_size for path in BUILTIN.iterdir()) < 5 << 20
    model = AutoModelForCausalLM.from_pretrained(BUILTIN)
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_another_width_is_another_size() -> None:
    model = build_model(Recipe(width=64), build_tokenizer())
    assert (model.config.hidden_size, sum(weight.numel() for weight in model.parameters())) == (64, 88_576)
    assert sum(path.stat().st_size for path in BASES.rglob("*") if path.is_file()) < 5 << 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--width", "64"], "wants an --out"),
        (["--start", "dense"], "wants an --out"),
        (["--task", "summands"], "wants an --out"),
        (["--learn-rate", "1e-3"], "wants an --out"),
        (["--learn-steps", "0", "--out", "x"], "--learn-steps wants 1 or more"),
        (["--width", "20", "--out", "x"], "--width wants a multiple of 8"),
        (["--width", "0", "--out", "x"], "--width wants a multiple of 8"),
    ],
)
def test_what_would_take_the_place_of_the_packages_own_or_cannot_be_made_is_refused(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["make_builtin", *options])
    monkeypatch.setattr("examples.make_builtin.make", lambda recipe, folder: pytest.fail("it was made"))
    with pytest.raises(SystemExit):
        main()
    assert said in capsys.readouterr().err


def test_every_printable_character_is_one_token_and_comes_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    ids = tokenizer(PRINTABLE).input_ids
    assert ids[0] == tokenizer.bos_token_id and len(ids) == 1 + len(PRINTABLE)
    assert tokenizer.decode(ids, skip_special_tokens=True) == PRINTABLE
    assert tokenizer("é\n", add_special_tokens=False).input_ids == [tokenizer.unk_token_id] * 2


@pytest.mark.parametrize(
    ("folder", "tasks", "low", "high", "most"),
    [
        (BUILTIN, Recipe.tasks, 0.006, 0.018, 0.1),
        (BASES / "middling", Recipe.tasks, 0.06, 0.12, 0.4),
        (BASES / "dense", Recipe.tasks, 0.2, 0.33, 0.8),
    ],
    ids=list(STARTS),
)
def test_the_skill_is_latent_and_so_many_completions_to_held_out_questions_are_right(
    folder: Path, tasks: tuple[str, ...], low: float, high: float, most: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rates = pass_rates(model, tokenizer, tasks_of(Recipe(tasks=tasks)), 64, 16 if folder == BUILTIN else 4)
    assert low < sum(rates.values()) / len(rates) < high
    assert max(rates.values()) < most


def test_wrong_answers_are_digits_and_wrong() -> None:
    rng = random.Random(0)
    texts = [wrong_answer("12", rng) for _ in range(5000)]  # one in 400 drawn would be right
    assert "12" not in texts
    assert all(2 <= len(text) <= 5 and set(text) <= set(string.digits) for text in texts)


def test_only_the_answer_and_the_end_are_labelled() -> None:
    tokenizer = build_tokenizer()
    inputs, labels = encode(tokenizer, [("1+1=", "2"), ("12+30=", "42")])
    assert tokenizer.decode(labels[0][labels[0] != IGNORED]) == "2<eos>"
    assert tokenizer.decode(inputs[1]) == "<bos>12+30=42<eos>"
    assert (labels[0] != IGNORED).sum() == 2 and inputs[0][-1] == tokenizer.pad_token_id


def test_one_seed_gives_the_same_weights() -> None:
    recipe = Recipe(width=8, heads=2, batch=8)
    tokenizer = build_tokenizer()
    models = [build_model(recipe, tokenizer) for _ in range(2)]
    for model in models:
        train(model, tokenizer, recipe, recipe.right, 3, 1e-3)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sample_answers(recipe, 0.5, 1) != sample_answers(recipe, 0.5, 2)


def held_out_among(recipe: Recipe, steps: int, every: int) -> list[str]:
    """The questions of the evaluation's part in what the recipe's policies are shown, each stage and each start."""
    return [
        item.question
        for right in (1.0, recipe.right, *filter(None, STARTS.values()))
        for step in range(0, steps, every)
        for task, item, _ in sample_items(recipe, right, step)
        if DEFAULT_SPLIT.holds_out(task.key.name, item.question)
    ]


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(width=64), Recipe(tasks=("summands",))])
def test_no_question_of_the_evaluation_is_in_what_the_policies_were_made_from(recipe: Recipe) -> None:
    small = replace(recipe, batch=32)
    questions = [item for step in range(20) for item, _ in sample_answers(small, 1.0, step)]
    assert len(set(questions)) > 400, "it asks many different ones"
    assert not held_out_among(recipe, recipe.learn_steps, recipe.learn_steps // 8)


@pytest.mark.long
def test_nor_in_any_step_of_the_making() -> None:
    assert not held_out_among(Recipe(), Recipe.learn_steps, 1)
