"""What a founder may choose of a task: each option of each data set of reasoning-gym is of one known kind."""

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import pytest
from reasoning_gym.factory import DATASETS

from node.tasks import KINDS, founder_may_choose
from node.tasks.choices import MAX_NUMBER, is_choice, is_plain
from node.tasks.reasoning_gym.data_sets import SCORERS

# Options of which a founder may choose nothing but the default: texts, and what JSON cannot say.
FIXED = {
    "caesar_cipher": {"delimiter"},
    "figlet_font": {"static_font", "static_word"},
    "rearc": {"board_format_opts"},
    "spell_backward": {"data_file"},
    "time_intervals": {"min_time", "max_time", "min_date", "max_date"},
    "word_sorting": {"transformation"},
}
# Options that are a list of some of the default's texts.
SOME_OF = {
    "advanced_geometry": {"task_types"},
    "aiw": {"female_names", "male_names", "task_types"},
    "basic_arithmetic": {"operators"},
    "calendar_arithmetic": {"tasks"},
    "complex_arithmetic": {"operations"},
    "family_relationships": {"female_names", "male_names"},
    "fraction_simplification": {"styles"},
    "polynomial_equations": {"operators"},
    "polynomial_multiplication": {"operators", "variables"},
    "simple_equations": {"operators"},
    "simple_integration": {"operators", "symbols"},
    "time_intervals": {"task_types"},
}
ONE_OF = {"basic_arithmetic": {"format_style", "whitespace"}}
NUMBERS = {
    "aiw": {"task_type_weights"},
    "complex_arithmetic": {"operations_weights"},
    "rearc": {
        "pso_difficulty_ranges",
        "pso_difficulty_weights",
        "rng_difficulty_ranges",
        "rng_difficulty_weights",
    },
    "simple_equations": {"operators_weights"},
}
TEXTS = ["/etc/passwd", "../../x", "https://example.org/x", "os:system", "__import__('os')", "", "x" * 10**5]
HOSTILE: list[Any] = [
    *TEXTS,
    *([text] for text in TEXTS),
    *([[text]] for text in TEXTS),
    *({"path": text} for text in TEXTS),
    {},
    [{}],
    10**9 * 10**9,
    -(10**400),
    1e300,
    float("nan"),
    float("inf"),
    [10**400],
    [1] * 10**4,
    [[1.0] * 10**4],
    ["+"] * 10**4,
    json.loads("[" * 500 + "]" * 500),
]


class Option(NamedTuple):
    """An option of a data set, and its default."""

    data_set: str
    name: str
    default: Any

    def takes(self, value: object) -> bool:
        return founder_may_choose(f"reasoning-gym/{self.data_set}", self.name, value)


def options() -> Iterator[Option]:
    for data_set in SCORERS:
        config = DATASETS[data_set][1]
        for field in fields(config):
            if field.name not in ("seed", "size"):  # which no node's options have
                yield Option(data_set, field.name, getattr(config(), field.name))


@pytest.mark.parametrize("option", list(options()), ids=lambda option: f"{option.data_set}-{option.name}")
def test_every_option_is_a_number_a_boolean_or_a_choice_of_bounded_size_or_is_not_a_founders(option: Option) -> None:
    assert [value for value in HOSTILE if option.takes(value)] == []
    default = option.default
    if option.name in FIXED.get(option.data_set, ()):
        assert not isinstance(default, (bool, int, float, list, tuple))
        assert not any(option.takes(value) for value in (True, 1, 0.5, [1], ["a"], "a"))
    elif option.name in SOME_OF.get(option.data_set, ()):
        texts = list(map(str, default)) if option.name != "task_types" else json.loads(json.dumps(default))
        assert option.takes(texts) and option.takes(texts[:1]) and option.takes([])
        assert not option.takes([*texts, texts[0]]) and not option.takes(["a text of somebody's"])
    elif option.name in ONE_OF.get(option.data_set, ()):
        annotation = get_type_hints(DATASETS[option.data_set][1])[option.name]
        assert get_origin(annotation) is not None and all(map(option.takes, get_args(annotation)))
        assert not option.takes("another")
    elif option.name in NUMBERS.get(option.data_set, ()):
        assert option.takes(json.loads(json.dumps(default))) and not option.takes([*default, default[0]])
    elif isinstance(default, bool):
        assert option.takes(True) and option.takes(False) and not option.takes(1)
    else:
        assert type(default) in (int, float), "a new kind of option: say above what it is"
        most = max(1000, 100 * abs(default))
        assert all(map(option.takes, (default, 0, 1, most, -most)))
        assert not option.takes(most + 1) and not option.takes(-most - 1) and not option.takes(True)
        assert option.takes(1.5) == isinstance(default, float)


def test_only_these_options_have_texts_that_a_founder_may_choose() -> None:
    assert {kind: set(task.safe_texts) for kind, task in KINDS.items() if task.safe_texts} == {
        "builtin": {"operations"},
        "dataset": {"system"},
    }
    assert founder_may_choose("dataset/x", "system", "Be brief.")
    assert not founder_may_choose("dataset/x", "system", "x" * 1025)
    for option in ("path", "test", "hub", "subset", "split", "test_split", "question", "answer", "answer_after"):
        assert not any(founder_may_choose("dataset/x", option, text) for text in TEXTS)


@pytest.mark.parametrize("name", ["verifiers/x", "a-package", "builtin/sums", "file/x", "rewards/x", "environment/x"])
def test_of_any_other_task_a_founder_chooses_numbers_and_booleans_of_bounded_size(name: str) -> None:
    assert all(founder_may_choose(name, "option", value) for value in (3, -2.5, True, [1, 2], {"rows": 35}))
    refused = [value for value in HOSTILE if value not in ({}, [{}]) and not isinstance(value, list)]
    assert not any(founder_may_choose(name, "option", value) for value in refused)
    assert not any(founder_may_choose(name, "option", value) for value in (["x"], {"a": {"b": "x"}}, [[[[1]]]], None))


def test_the_largest_plain_number_is_a_founders_and_no_larger_one() -> None:
    assert is_plain(MAX_NUMBER) and is_plain(-MAX_NUMBER) and not is_plain(MAX_NUMBER + 1)
    assert is_choice(0.5, 0.25) and not is_choice("0.5", 0.25) and not is_choice(None, 1) and is_choice(None, None)
