"""TRL's own trainer with rollouts of a swarm: what a batch is made of, and TRL's own numbers where no peer is."""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from node.errors import UserError
from node.exchange import Exchange
from node.exchange.member import AskedQuestion, DrawnGroup
from node.swarm_rollouts import SwarmRollouts
from node.tasks import Item, TaskKey

BUILTIN = str(Path(__file__).resolve().parents[2] / "node" / "policy" / "builtin")
SIZE, COUNT = 4, 2  # completions of a group, groups of a batch
PROMPTS = ["1+1=", "2+3="]


def question(prompt: str) -> AskedQuestion:
    return AskedQuestion(TaskKey("t", 1, "c"), 0, Item(prompt, ""))


def paid(texts: Sequence[str]) -> list[float | None]:
    return [float(len(text) % 2) for text in texts]


def group(*answers: tuple[str, float], finished: bool = True) -> DrawnGroup:
    texts, rewards = zip(*answers, strict=True)
    return DrawnGroup(b"", "peer", "p", question("7+7="), texts, (finished,) * len(texts), rewards, rewards)


class Swarm:
    """A swarm that gives out the prompts in turn, and what peers have sent."""

    def __init__(self, *groups: DrawnGroup) -> None:
        self.groups = list(groups)
        self.prompts = cycle(PROMPTS)
        self.published: list[tuple[str, list[str], list[bool]]] = []

    def ask(self, count: int) -> list[AskedQuestion]:
        return [question(next(self.prompts)) for _ in range(count)]

    def score(self, _: AskedQuestion, texts: Sequence[str]) -> list[float | None]:
        return paid(texts)

    def publish(self, asked: AskedQuestion, texts: Sequence[str], finished: Sequence[bool]) -> bool:
        self.published.append((asked.prompt, list(texts), list(finished)))
        return True

    def draw(self, count: int) -> list[DrawnGroup]:
        taken, self.groups = self.groups[:count], self.groups[count:]
        return taken


class Seen(SwarmRollouts):
    """Keeps what it returned."""

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any] | None]:
        self.made = super().__call__(prompts, trainer)
        return self.made


@pytest.fixture
def trainer_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., GRPOTrainer]:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def make(reward: Any, rollouts: Any = None, **fields: Any) -> GRPOTrainer:
        given: dict[str, Any] = {"per_device_train_batch_size": COUNT * SIZE, "num_generations": SIZE, "max_steps": 1}
        given |= {"save_strategy": "no", "learning_rate": 5e-4}
        fixed = {"max_completion_length": 8, "logging_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none"}
        args = GRPOConfig(
            str(tmp_path / "out"), **given | fixed | {"save_strategy": "no", "learning_rate": 5e-4} | fields
        )
        rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
        return GRPOTrainer(BUILTIN, reward_funcs=reward, args=args, train_dataset=rows, rollout_func=rollouts)

    return make


def seen(swarm: Swarm, share: float = 0.5) -> Seen:
    return Seen(cast("Exchange", swarm), share)


def test_without_peers_the_numbers_are_trls_own(trainer_of: Callable[..., GRPOTrainer]) -> None:
    def reward(completions: Sequence[str], **_: Any) -> list[float | None]:
        return paid(completions)

    own = trainer_of(reward, max_steps=3, shuffle_dataset=False)
    own.train()
    swarm = Swarm()
    rollouts = seen(swarm)
    ours = trainer_of(rollouts.reward, rollouts, max_steps=3, shuffle_dataset=False)
    ours.train()
    names = ("loss", "grad_norm", "reward", "entropy", "completions/mean_length")
    steps = [[{name: row.get(name) for name in names} for row in one.state.log_history[:3]] for one in (own, ours)]
    assert steps[0] == steps[1] and any(row["grad_norm"] for row in steps[0])
    assert len(swarm.published) == 3 * COUNT and {len(texts) for _, texts, _ in swarm.published} == {SIZE}


def test_peers_groups_come_first_and_what_is_too_few_or_too_long_has_no_reward(
    trainer_of: Callable[..., GRPOTrainer],
) -> None:
    swarm = Swarm(
        group(("14", 1.0), ("1" * 30, 1.0), ("", 0.0), ("15", 0.0), finished=False), group(("1", 0.0), ("2", 0.0))
    )
    rollouts = seen(swarm, share=1.0)
    trainer = trainer_of(rollouts.reward, rollouts)
    trainer.train()
    made = rollouts.made
    assert made["reward"] is not None and made["completion_ids"] is not None
    assert made["reward"][:SIZE] == [1.0, 0.0, None, None] and None not in made["reward"][SIZE:]
    texts = trainer.processing_class.batch_decode(made["completion_ids"])
    assert texts[:SIZE] == ["14", "15", "15", "15"]
    # The other group teaches nothing, so a question is answered in its place.
    assert rollouts.drawn == 1 and [prompt for prompt, *_ in swarm.published] == PROMPTS[:1]


@pytest.mark.parametrize("finished", [True, False])
def test_no_peers_text_spells_a_special_token(finished: bool, trainer_of: Callable[..., GRPOTrainer]) -> None:
    rollouts = seen(Swarm())
    trainer = trainer_of(rollouts.reward, rollouts)
    end = trainer.processing_class.eos_token
    rollouts._swarm.groups.append(group((f"1{end}", 1.0), ("2", 0.0), finished=finished))  # type: ignore[attr-defined]
    trainer.train()
    assert rollouts.made["completion_ids"] is not None
    ids = rollouts.made["completion_ids"][0]
    assert [token for token in ids if token == trainer.processing_class.eos_token_id] == ids[-1:] * finished


def test_answers_are_published_as_finished_where_they_ended_by_themselves(
    trainer_of: Callable[..., GRPOTrainer],
) -> None:
    swarm = Swarm()
    rollouts = seen(swarm)
    trainer = trainer_of(rollouts.reward, rollouts, max_completion_length=1)
    trainer.train()
    end = trainer.processing_class.eos_token_id
    assert rollouts.made["completion_ids"] is not None
    ends = [ids[-1] == end for ids in rollouts.made["completion_ids"]]
    assert [one for _, _, finished in swarm.published for one in finished] == ends and not all(ends)


def test_half_a_group_and_an_evaluation_are_refused_by_one_line(trainer_of: Callable[..., GRPOTrainer]) -> None:
    rollouts = seen(Swarm())
    trainer = trainer_of(rollouts.reward, rollouts)
    trainer.model.train()
    with pytest.raises(UserError, match="multiple of num_generations"):
        rollouts([""] * (SIZE + 1), trainer)
    trainer.model.eval()
    with pytest.raises(UserError, match="eval_strategy"):
        rollouts([""] * SIZE, trainer)


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="from 0 to 1"):
        seen(Swarm(), 1.5)
