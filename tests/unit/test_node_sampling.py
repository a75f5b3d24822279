"""Sampling rules: which completions a round trains on, and with what advantage."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.config import SamplingConfig
from node.lab.candidates import CANDIDATES
from node.lab.controls import CONTROLS
from node.rollouts.group import EncodedGroup, Group, Question, Tokens, one_turn
from node.rollouts.rule import (
    SCALES,
    Candidate,
    DrawRequest,
    Pick,
    Sample,
    effective_size,
    external_samples,
    external_share,
    local_samples,
    mean_advantages,
    scaled_advantages,
)
from node.rollouts.rules import RULES, configured_weight
from node.rollouts.rules.positive import MASTERED
from node.tasks import TaskKey

rewards = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=8).map(tuple)


any_rewards = st.lists(st.sampled_from([-3.0, 0.0, 0.5, 1.0, 2.0, 40.0]), min_size=2, max_size=8).map(tuple)


def candidate(number: int, rewards: tuple[float, ...], received: float = 0.0, task: str = "t") -> Candidate:
    key = number.to_bytes(4, "big")
    return Candidate(key, "peer", task, key, key, received, 1, rewards)


def group(seed: int, rewards: tuple[float, ...]) -> EncodedGroup:
    """Its prompt is its seed, and the tokens of each completion say which one it is."""
    made = tuple(one_turn(f"{index}", True, reward) for index, reward in enumerate(rewards))
    return EncodedGroup(
        Group(TaskKey("t", 1, "c"), seed, "q", made, "p", 0),
        Question(None, seed, None, [seed]),
        {index: Tokens([index]) for index in range(len(rewards))},
    )


def request(count: int, seed: int = 0, completions: int = 8) -> DrawRequest:
    return DrawRequest(count, completions, mean_advantages, random.Random(seed))


pools = st.lists(rewards, max_size=12).map(lambda rows: [candidate(n, row, received=n) for n, row in enumerate(rows)])


@given(rewards)
def test_advantages_sum_to_zero_and_keep_the_order(rewards: tuple[float, ...]) -> None:
    for scale in (mean_advantages, scaled_advantages):
        advantages = scale(rewards)
        assert math.isclose(sum(advantages), 0, abs_tol=1e-9)
        assert sorted(range(len(rewards)), key=lambda i: (rewards[i], i)) == sorted(
            range(len(rewards)), key=lambda i: (round(advantages[i], 9), i)
        )


def test_advantages_by_hand() -> None:
    assert mean_advantages((1.0, 0.0, 0.0, 0.0)) == [0.75, -0.25, -0.25, -0.25]
    assert scaled_advantages((1.0, 0.0)) == pytest.approx([0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4)])
    assert mean_advantages((1.0, 1.0)) == scaled_advantages((0.0, 0.0)) == [0.0, 0.0]


@given(pools, st.integers(0, 12), st.sampled_from(sorted(RULES)), st.integers())
def test_every_rule_draws_known_groups_once_and_no_more_than_asked(
    pool: list[Candidate], count: int, rule: str, seed: int
) -> None:
    picks = RULES[rule].peers(pool, request(count, seed))
    ids = {pick.id for pick in picks}
    assert len(ids) <= count
    assert ids <= {item.id for item in pool}
    assert len(set(picks)) == len(picks) == len({(pick.id, pick.index) for pick in picks})
    assert picks == RULES[rule].peers(pool, request(count, seed))


@given(pools, st.integers(0, 12), st.integers())
def test_the_papers_rule_takes_whole_informative_groups_with_the_groups_own_advantages(
    pool: list[Candidate], count: int, seed: int
) -> None:
    picks = RULES["sapo"].peers(pool, request(count, seed))
    informative = {candidate.id: candidate for candidate in pool if len(set(candidate.rewards)) > 1}
    drawn = {pick.id for pick in picks}
    assert drawn <= informative.keys()
    assert len(drawn) == min(count, len(informative))
    for group_id in drawn:
        mine = sorted((pick.index, pick.advantage) for pick in picks if pick.id == group_id)
        assert mine == list(enumerate(mean_advantages(informative[group_id].rewards)))


def test_the_papers_draw_is_uniform() -> None:
    pool = [candidate(n, (0.0, 1.0)) for n in range(4)] + [candidate(9, (0.0, 0.0))]
    rng = random.Random(5)
    drawn = Counter(
        pick.id for _ in range(4000) for pick in RULES["sapo"].peers(pool, DrawRequest(1, 8, mean_advantages, rng))
    )
    assert len(drawn) == 4
    assert all(abs(count - 2000) < 200 for count in drawn.values())  # two picks a group, 1,000 expected draws each


def test_the_papers_rule_rests_on_all_rewards_of_a_group_and_positive_on_the_one_it_takes() -> None:
    pool = [candidate(1, (0.0, 1.0, 0.0))]
    assert {tuple(pick.rests_on) for pick in RULES["sapo"].peers(pool, request(1, completions=2))} == {(0, 1, 2)}
    (pick,) = RULES["positive"].peers(pool, request(1))
    assert (pick.index, tuple(pick.rests_on)) == (1, (1,))


def test_a_group_without_advantage_is_never_drawn() -> None:
    flat = [candidate(1, (0.0, 0.0)), candidate(2, (0.5, 0.5)), candidate(3, (0.5, 0.5 + 1e-12)), candidate(4, (0.0,))]
    assert all(rule.peers(flat, request(3)) == [] for rule in RULES.values())


@pytest.mark.parametrize("rule", ["positive", "rft"])
def test_groups_that_are_all_right_are_drawn_where_no_other_is_left_and_the_task_is_not_mastered(rule: str) -> None:
    easy = [candidate(number, (1.0,) * (1 + number % 2)) for number in range(6)]
    mixed = [candidate(10 + number, (0.0, 1.0)) for number in range(2)]

    def drawn(pool: list[Candidate], own: float) -> set[bytes]:
        picks = RULES[rule].peers(pool, replace(request(4), own_reward=lambda task: own))
        assert all(pick.weight == 1 / 8 and tuple(pick.rests_on) == (pick.index,) for pick in picks)
        return {pick.id for pick in picks}

    for own in (0.0, MASTERED - 0.01):
        assert drawn(easy + mixed, own) == {item.id for item in mixed}  # first what is not easy for its maker
        assert len(drawn(easy, own)) == 4
    for own in (MASTERED, 1.0):
        assert drawn(easy, own) == set()


def test_the_papers_rule_draws_no_group_that_is_all_right() -> None:
    assert RULES["sapo"].peers([candidate(1, (1.0, 1.0))], request(3)) == []


def test_positive_takes_one_right_answer_a_group() -> None:
    pool = [candidate(1, (0.0, 1.0, 1.0)), candidate(2, (1.0, 1.0)), candidate(3, (0.0, 0.0))]
    taken = Counter(pick for seed in range(40) for pick in RULES["positive"].peers(pool, request(5, seed)))
    assert {(pick.id, pick.index, pick.advantage, pick.weight) for pick in taken} == {
        (pool[0].id, index, 1.0, 1 / 8) for index in (1, 2)
    }
    assert sum(taken.values()) == 40


@given(pools, st.integers(0, 12), st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.integers())
def test_no_peers_answer_has_more_than_one_completions_weight_or_is_pushed_down(
    pool: list[Candidate], count: int, own: float, seed: int
) -> None:
    asked = replace(request(count, seed), own_reward=lambda task: own)
    picks = RULES["positive"].peers(pool, asked)
    rewards_of = {candidate.id: candidate.rewards for candidate in pool}
    assert len({pick.id for pick in picks}) == len(picks) <= count
    assert all(0 < pick.advantage <= 1 and pick.weight == 1 / 8 for pick in picks)
    for pick in picks:
        best = max(rewards_of[pick.id])
        assert rewards_of[pick.id][pick.index] == best and (best == 1 or best > own)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=8).map(tuple), max_size=12),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(),
)
def test_where_rewards_are_0_or_1_positive_is_one_right_answer_at_advantage_1_whatever_this_node_gets(
    rows: list[tuple[float, ...]], count: int, own: float, seed: int
) -> None:
    pool = [candidate(number, row) for number, row in enumerate(rows)]
    found = RULES["positive"].peers(pool, replace(request(count, seed), own_reward=lambda task: own))
    rng = random.Random(seed)
    taken = [candidate for candidate in pool if len(set(candidate.rewards)) == 2] if count else []
    if not taken and own < MASTERED:
        taken = [candidate for candidate in pool if min(candidate.rewards) == 1]
    expected = []
    for one in rng.sample(taken, min(count, len(taken))):
        index = rng.choice([at for at, reward in enumerate(one.rewards) if reward == 1])
        expected.append(Pick(one.id, index, 1.0, 1 / 8, (index,)))
    assert found == expected


@pytest.mark.parametrize(
    ("best", "own", "advantage"),
    [
        (0.7, 0.0, 0.7),
        (0.7, 0.4, 0.5),
        (0.7, 0.7, None),
        (0.3, 0.4, None),
        (0.3, 0.0, 0.3),
        (1.0, 0.9, 1.0),
        (1.0, 1.0, 1.0),
    ],
)
def test_a_graded_answer_counts_by_how_far_it_is_above_this_nodes_own(
    best: float, own: float, advantage: float | None
) -> None:
    asked = replace(request(1), own_reward={"t": own, "u": 0.99}.__getitem__)
    picks = RULES["positive"].peers([candidate(1, (0.0, best, 0.1))], asked)
    assert [pick.advantage for pick in picks] == ([] if advantage is None else [pytest.approx(advantage)])
    below = RULES["positive"].peers([candidate(1, (0.0, 0.7), task="u")], asked)
    assert below == []  # what it gets on one task says nothing of another


def test_external_samples_carry_their_group() -> None:
    rows = [(b"a", 1, 0.5, 0.25), (b"b", 0, 1.0, 1.0), (b"b", 1, 1.0, 1.0), (b"c", 0, 1.0, 1.0)]
    picks = [Pick(*row, rests_on=(0, 1)) for row in rows]
    first, third = group(1, (0.0, 1.0)), replace(group(3, (0.0, 1.0)), completions={1: Tokens([1])})
    samples = external_samples(picks, {b"a": first, b"c": third, b"b": third}, first=4)
    assert samples == [
        Sample([1], [1], 0.5, 0.25, 4, external=True, index=1),
        Sample([3], [1], 1.0, 1.0, 5, external=True, index=1),
    ]


hostile_pools = st.lists(
    st.integers(0, 3).flatmap(
        lambda right: st.integers(2, 128).map(lambda size: (1.0,) * min(right, size) + (0.0,) * (size - right))
    ),
    max_size=12,
).map(lambda rows: [candidate(n, row, received=n) for n, row in enumerate(rows)])


@given(hostile_pools, st.integers(0, 12), st.integers(2, 8), st.sampled_from(sorted(RULES)), st.integers())
def test_a_group_counts_as_a_group_however_many_completions_it_has(
    pool: list[Candidate], count: int, completions: int, rule: str, seed: int
) -> None:
    picks = RULES[rule].peers(pool, request(count, seed, completions))
    sizes = {candidate.id: len(candidate.rewards) for candidate in pool}
    weights: Counter[bytes] = Counter()
    for pick in picks:
        assert 0 <= pick.index < sizes[pick.id]
        weights[pick.id] += pick.weight
    assert len(picks) <= count * completions
    assert all(weight == pytest.approx(RULES[rule].group_weight(completions)) for weight in weights.values())


def test_a_rounds_loss_is_divided_by_the_weight_that_it_is_configured_for() -> None:
    sapo = SamplingConfig(rule="sapo", local=4, external=3)
    positive = SamplingConfig(rule="positive", local=2, external=16)
    assert configured_weight(sapo) == 4 + 3
    assert configured_weight(positive) == 2 + 16 / 8
    assert configured_weight(positive.model_copy(update={"external": 0})) == 2
    assert configured_weight(positive.model_copy(update={"local": 0})) == 16 / 8
    for questions, local in ((1, 1), (2, 2), (9, 2)):  # no more own groups than a round asks questions
        assert configured_weight(positive.model_copy(update={"questions": questions})) == local + 16 / 8


def test_the_drawn_of_a_large_group_keep_its_advantages_and_its_mean_in_expectation() -> None:
    rewards = (1.0,) * 5 + (0.0,) * 35
    whole = mean_advantages(rewards)
    rng = random.Random(0)
    pushed = [0.0] * len(rewards)  # what each completion counts, over many draws
    for _ in range(20_000):
        for pick in RULES["sapo"].peers([candidate(1, rewards)], DrawRequest(1, 8, mean_advantages, rng)):
            assert pick.advantage == whole[pick.index]
            pushed[pick.index] += pick.weight * pick.advantage / 20_000
    expected = [advantage / len(rewards) for advantage in whole]
    assert pushed == pytest.approx(expected, rel=0.1)


@given(st.lists(rewards, min_size=1, max_size=8), st.integers(0, 8), st.integers())
def test_local_groups_are_whole_and_informative_first(rows: list[tuple[float, ...]], count: int, seed: int) -> None:
    own = [group(n, row) for n, row in enumerate(rows)]
    samples = local_samples(own, count, RULES["sapo"], request(8, seed))
    taken = {sample.prompt[0] for sample in samples}
    assert len(taken) == min(count, len(own))
    assert len(samples) == sum(len(own[n].completions) for n in taken)
    assert not any(sample.external for sample in samples)
    for number in {sample.group for sample in samples}:
        mine = [sample for sample in samples if sample.group == number]
        assert len({sample.prompt[0] for sample in mine}) == 1
        assert sum(sample.weight for sample in mine) == pytest.approx(1)
    assert len({sample.group for sample in samples}) == len(taken)
    informative = {n for n, row in enumerate(rows) if len(set(row)) > 1}
    assert len(taken & informative) == min(count, len(informative))


@given(rewards, st.sampled_from(["sapo", "positive"]), st.integers())
def test_what_these_rules_take_of_an_own_group_pushes_as_much_up_as_down(
    rewards: tuple[float, ...], rule: str, seed: int
) -> None:
    advantages = RULES[rule].own(rewards, request(1, seed))
    assert math.isclose(sum(advantage for _, advantage in advantages), 0, abs_tol=1e-9)


@given(any_rewards, st.sampled_from(sorted(RULES)), st.integers())
def test_every_rule_takes_places_of_an_own_group_in_order_and_the_same_again(
    rewards: tuple[float, ...], rule: str, seed: int
) -> None:
    advantages = RULES[rule].own(rewards, request(1, seed))
    assert [index for index, _ in advantages] == sorted({index for index, _ in advantages} & set(range(len(rewards))))
    assert advantages == RULES[rule].own(rewards, request(1, seed))


@given(any_rewards, st.integers())
def test_rft_takes_one_of_the_best_of_an_own_group_and_pushes_nothing_down(
    rewards: tuple[float, ...], seed: int
) -> None:
    taken = RULES["rft"].own(rewards, request(1, seed))
    if len(set(rewards)) == 1:
        assert taken == []
        return
    ((index, advantage),) = taken
    assert rewards[index] == max(rewards) and 0 < advantage <= 1
    assert advantage == 1 or max(rewards) < 1


def test_rft_by_hand() -> None:
    drawn = Counter(RULES["rft"].own((0.0, 1.0, 1.0, 0.0), request(1, seed))[0] for seed in range(40))
    assert drawn.keys() == {(1, 1.0), (2, 1.0)}
    assert RULES["rft"].own((0.2, 0.6, 0.4), request(1)) == [(1, pytest.approx(0.2 / 0.6))]  # above the mean of 0.4


def test_an_own_answer_counts_under_rft_as_a_peers_does() -> None:
    own = local_samples([group(1, (0.0,) * 7 + (1.0,))], 1, RULES["rft"], request(1))
    (pick,) = RULES["rft"].peers([candidate(1, (0.0,) * 7 + (1.0,))], request(1))
    assert [(sample.advantage, sample.weight) for sample in own] == [(pick.advantage, pick.weight)] == [(1.0, 1 / 8)]


@given(pools, st.integers(0, 12), st.integers())
def test_rft_takes_of_peers_what_positive_takes(pool: list[Candidate], count: int, seed: int) -> None:
    assert RULES["rft"].peers(pool, request(count, seed)) == RULES["positive"].peers(pool, request(count, seed))


@given(pools, st.integers(0, 12), st.integers())
def test_the_control_takes_a_wrong_answer_of_each_group_as_if_it_were_right(
    pool: list[Candidate], count: int, seed: int
) -> None:
    assert not CONTROLS.keys() & RULES.keys()  # nobody trains with one by a setting
    wrong = CONTROLS["wrong"](lambda: 0.0)
    picks = wrong.peers(pool, request(count, seed))
    by_id = {candidate.id: candidate.rewards for candidate in pool}
    assert len({pick.id for pick in picks}) == len(picks)
    assert len(picks) == min(count, sum(candidate.informative for candidate in pool))
    for pick in picks:
        assert by_id[pick.id][pick.index] < max(by_id[pick.id])
        assert (pick.advantage, pick.weight, tuple(pick.rests_on)) == (1.0, 1 / 8, (pick.index,))
    assert wrong.own is RULES["positive"].own


@pytest.mark.parametrize("name", CANDIDATES)
@given(any_rewards, st.integers())
def test_a_candidate_pulls_at_answers_above_the_mean_and_pushes_at_those_below_it(
    name: str, rewards: tuple[float, ...], seed: int
) -> None:
    mean = sum(rewards) / len(rewards)
    advantages = CANDIDATES[name](lambda: 0.0).own(rewards, request(1, seed))
    assert bool(advantages) == (max(rewards) > min(rewards))
    assert all(math.copysign(1, advantage) == math.copysign(1, rewards[at] - mean) for at, advantage in advantages)
    assert len({at for at, _ in advantages}) == len(advantages)


def test_candidates_by_hand() -> None:
    rewards = (0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)

    def weights(name: str, part: float = 0.0) -> list[float]:
        return sorted(round(advantage, 3) for _, advantage in CANDIDATES[name](lambda: part).own(rewards, request(1)))

    assert weights("sampled") == [-1.5, 1.5]  # two with 1 - 1/4, six with -1/4
    assert weights("pair") == [-1.0, 1.0]
    assert weights("contrast 0.3") == [-0.3, 1.0]
    assert weights("early") == [-0.75, -0.75, 0.75, 0.75]
    assert weights("light") == [-0.225, -0.225, 0.225, 0.225]
    assert weights("early", 0.7) == [1.0]


def test_the_gradient_of_sampled_rows_is_the_groups_in_expectation() -> None:
    rewards = (0.0, 1.0, 0.0, 1.0)
    rule = CANDIDATES["sampled"](lambda: 0.0)
    total = Counter[int]()
    for seed in range(4000):
        total.update(dict(rule.own(rewards, request(1, seed))))
    assert [total[at] / 4000 for at in range(4)] == pytest.approx([-0.5, 0.5, -0.5, 0.5], abs=0.05)


def test_positive_by_hand() -> None:
    rewards = (0.0, 1.0, 0.0, 0.0)
    ((first, push), (second, pull)) = sorted(
        RULES["positive"].own(rewards, request(1)), key=lambda candidate: candidate[1]
    )
    assert (push, second, pull) == (-0.75, 1, 0.75) and first in (0, 2, 3)  # one of three wrong ones, for all three
    assert RULES["positive"].own((1.0, 1.0, 0.0, 0.0), request(1)) == [(0, 0.5), (1, 0.5), (2, -0.5), (3, -0.5)]
    one_of_eight = (1.0,) + (0.0,) * 7
    assert sorted(advantage for _, advantage in RULES["positive"].own(one_of_eight, request(1))) == [-0.875, 0.875]
    assert RULES["positive"].own((1.0, 1.0), request(1)) == RULES["positive"].own((0.5, 0.5), request(1)) == []
    rng = random.Random(3)
    drawn = Counter(
        index
        for _ in range(3000)
        for index, advantage in RULES["positive"].own(rewards, DrawRequest(1, 8, mean_advantages, rng))
        if advantage < 0
    )
    assert all(abs(drawn[index] - 1000) < 120 for index in (0, 2, 3))


def test_positive_learns_from_graded_rewards_where_no_answer_is_wholly_right() -> None:
    assert dict(RULES["positive"].own((0.6, 0.2), request(1))) == pytest.approx({0: 0.2, 1: -0.2})
    taken = dict(RULES["positive"].own((0.9, 0.1, 0.3, 0.1, 0.1), request(1)))
    assert taken.pop(0) == pytest.approx(0.6)
    assert len(taken) == 1 and sum(taken.values()) == pytest.approx(-0.6)


@pytest.mark.parametrize(
    ("own", "best", "advantage"),
    [
        (-18.0, 1.0, 1.0),
        (-18.0, 0.5, 18.5 / 19),
        (-1e15, 0.5, 1.0),
        (1.0, 1.0, 1.0),
        (1.5, 1.0, None),
        (7.0, 0.5, None),
    ],
)
def test_positive_takes_at_most_1_however_large_this_nodes_own_rewards_are(
    own: float, best: float, advantage: float | None
) -> None:
    asked = replace(request(1), own_reward=lambda task: own)
    picks = RULES["positive"].peers([candidate(1, (best, 0.0))], asked)
    assert [pick.advantage for pick in picks] == ([] if advantage is None else [pytest.approx(advantage)])


def test_rft_counts_an_own_reward_beyond_1_as_right_and_a_negative_one_by_how_far_it_is_above_the_mean() -> None:
    assert RULES["rft"].own((2.0, 3.0, 1.5), request(1)) == [(1, 1.0)]
    assert RULES["rft"].own((-18.0, -12.0), request(1)) == [(1, pytest.approx(3 / 16))]


@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"rft"}))
def test_own_rewards_of_any_size_keep_their_differences(rule: str) -> None:
    rewards = (-18.0, -12.0)
    assert RULES[rule].own(rewards, request(1)) == [(0, -3.0), (1, 3.0)]
    large = dict(RULES[rule].own((1e15, -1e15), request(1)))
    assert large == {0: 1e15, 1: -1e15}


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=8))
def test_positive_follows_the_trainers_scale(rewards: list[float]) -> None:
    plain, scaled = (RULES["positive"].own(rewards, replace(request(1), scale=scale)) for scale in SCALES.values())
    assert [index for index, _ in plain] == [index for index, _ in scaled]
    factors = {round(two / candidate, 6) for (_, candidate), (_, two) in zip(plain, scaled, strict=True)}
    assert len(factors) <= 1


def test_the_effective_size_is_the_number_of_equal_pulls_and_falls_towards_one() -> None:
    def of(*pulls: float) -> float:
        return effective_size(
            [Sample([1], [1], 2.0 * sign, abs(pull)) for pull in pulls for sign in [1 if pull > 0 else -1]]
        )

    assert of() == of(0.0) == 0.0
    assert of(0.25, -0.25, 0.25, -0.25) == pytest.approx(4)
    assert of(0.25, 0.25, 0.0) == pytest.approx(2)
    assert of(1000.0, 1.0) == pytest.approx(1, abs=0.01)


def test_the_external_share_is_peers_part_of_the_pull() -> None:
    own, peers = Sample([1], [1], -0.5, weight=0.5), Sample([1], [1], 0.25, weight=3.0, external=True)
    assert external_share([own, peers]) == pytest.approx(0.75)
    assert external_share([own]) == external_share([]) == external_share([replace(peers, advantage=0.0)]) == 0


@given(st.lists(st.sampled_from("abcd"), max_size=20), st.integers(1, 5), st.integers(0, 20), st.integers(0, 99))
def test_no_signer_has_more_of_a_draw_than_it_may_and_none_goes_without(
    signers: list[str], most: int, count: int, seed: int
) -> None:
    pool = [replace(candidate(number, (1.0, 0.0)), peer=peer) for number, peer in enumerate(signers)]
    taken = {"a": 1, "b": 7}
    chosen = replace(request(count, seed), per_signer=most, taken=taken).choose(pool)
    by_peer = Counter(candidate.peer for candidate in chosen)
    left = {peer: max(0, most - taken.get(peer, 0)) for peer in "abcd"}
    assert all(number <= left[peer] for peer, number in by_peer.items())
    allowed = sum(min(number, left[peer]) for peer, number in Counter(signers).items())
    assert len({item.id for item in chosen}) == len(chosen) == min(count, allowed)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_signers_share_is_filled_with_what_the_rule_takes(rule: str) -> None:
    rows = [(0.0, 0.0)] * 50 + [(0.0, 1.0)] * 2
    pool = [candidate(number, row) for number, row in enumerate(rows)]
    assert len({pick.id for pick in RULES[rule].peers(pool, replace(request(4), per_signer=2))}) == 2
