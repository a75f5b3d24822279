"""What a node reports of itself: it comes back as it was said, hostile reports are refused, one in so many seconds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.metrics import METRICS, Display
from node.swarm.reports import (
    MAX_BYTES,
    MAX_GROUPS,
    MAX_TASKS,
    MAX_TEACHERS,
    MAX_TEXT_BYTES,
    NodeReport,
    Reporter,
    ReportError,
    ReportIntake,
    decode,
    encode,
)
from protocol.identity import id_of_bytes
from protocol.wire.encoding import pack, unpack

ME, *OTHERS = (id_of_bytes(bytes([n]) * 20) for n in range(100))
GOOD = NodeReport(1_700_000_000, "gossamer/0.1.0", "builtin", 7, 0.5, 0.25, {"builtin/sums": 0.5}, {OTHERS[0]: 3})

texts = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=MAX_TEXT_BYTES // 4)
values = st.integers(-1_000_000_000, 1_000_000_000).map(lambda number: number / 1_000_000)
reports = st.builds(
    NodeReport,
    since=st.integers(0, 2**40),
    agent=texts,
    model=texts,
    rounds=st.integers(0, 2**40),
    reward=values | st.none(),
    accuracy=values | st.none(),
    rewards=st.dictionaries(texts, values, max_size=MAX_TASKS),
    taught_by=st.dictionaries(st.sampled_from(OTHERS), st.integers(1, MAX_GROUPS), max_size=MAX_TEACHERS),
)


def fields(**changes: object) -> bytes:
    """Return a report's bytes with other fields, by place."""
    made = unpack(encode(GOOD), 9, error=ReportError, max_bytes=20, max_text=128, max_array=64)
    for place, value in changes.items():
        made[int(place.removeprefix("at"))] = value
    return pack(made)


def reason(body: bytes) -> str:
    with pytest.raises(ReportError) as caught:
        decode(body, ME)
    return caught.value.reason


@given(reports)
def test_a_report_comes_back_as_it_was_said(report: NodeReport) -> None:
    body = encode(report)
    assert len(body) <= MAX_BYTES
    assert decode(body, ME) == report


@given(st.binary(max_size=200))
def test_noise_is_no_report(noise: bytes) -> None:
    assert reason(noise) == "malformed"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        bytes(MAX_BYTES + 1),
        fields(at0=2),
        fields(at1=-1),
        fields(at2="a\nb"),
        fields(at3="m" * (MAX_TEXT_BYTES + 1)),
        fields(at3=7),
        fields(at1=2**63),
        fields(at4=2**63),
        fields(at4=True),
        fields(at5=0.5),
        fields(at6=10**10),
        fields(at7=[["t", 1], ["t", 2]]),
        fields(at7=[["t", None]]),
        fields(at7=[[f"t{n}", 1] for n in range(MAX_TASKS + 1)]),
        fields(at8=[[bytes(19), 1]]),
        fields(at8=[[bytes(20), 0]]),
        fields(at8=[[bytes([9]) * 20, 1]] * 2),
        fields(at8=[bytes(20)]),
    ],
)
def test_what_is_out_of_bounds_is_refused(body: bytes) -> None:
    assert reason(body) == "malformed"


def test_who_praises_itself_is_refused() -> None:
    assert reason(encode(GOOD._replace(taught_by={OTHERS[0]: 3, ME: 1}))) == "self_praise"


def test_a_newer_release_may_append() -> None:
    made = unpack(encode(GOOD), 9, error=ReportError, max_bytes=20, max_text=128, max_array=64)
    assert decode(pack([*made, "more"]), ME) == GOOD


def test_the_longest_report_fits_and_says_who_taught_most() -> None:
    names = [f"{n:02}" + "ü" * 100 for n in range(MAX_TASKS + 5)]
    taught = {node: 2**40 + n for n, node in enumerate(OTHERS)}
    long = GOOD._replace(model="\n" + "m" * 500, agent="ä" * 200, rewards=dict.fromkeys(names, 1e9), taught_by=taught)
    body = encode(long)
    assert 3000 < len(body) <= MAX_BYTES
    back = decode(body, ME)
    assert set(back.taught_by) == set(OTHERS[-MAX_TEACHERS:])
    assert back.model.startswith("?mm")
    assert set(back.rewards.values()) == {1000.0}


def test_a_node_reports_after_its_first_round_and_then_seldom() -> None:
    reporter = Reporter(300, "gossamer/1")
    rows = [
        {"round": n + 1, "reward": n / 100, "rewards/sums/mean": n / 10, "swarm/taught_by": {OTHERS[n % 2]: 1}}
        for n in range(13)
    ]
    rows[4]["eval/accuracy"] = 0.75
    made = {n: body for n, row in enumerate(rows) if (body := reporter.after_round(row, "builtin", 1000.0 + 50 * n))}
    assert list(made) == [0, 6, 12]
    first, second, third = (decode(body, ME) for body in made.values())
    assert first == NodeReport(1000, "gossamer/1", "builtin", 1, 0.0, None, {"sums": 0.0}, {OTHERS[0]: 1})
    assert second.taught_by == {OTHERS[0]: 3, OTHERS[1]: 3}
    assert (second.since, second.rounds, second.accuracy) == (1000, 7, 0.75)
    assert (second.reward, second.rewards) == (0.035, {"sums": 0.35})  # of rounds 2 to 7
    assert (third.reward, third.rewards) == (0.095, {"sums": 0.95})
    assert third.since == 1300


def test_a_reward_is_the_mean_of_the_rounds_that_had_one_and_a_task_keeps_its_last_mean() -> None:
    reporter = Reporter(100, "gossamer/1")

    def said(n: int, **row: float) -> NodeReport | None:
        body = reporter.after_round({"round": n, **row}, "builtin", 1000.0 + 50 * n)
        return None if body is None else decode(body, ME)

    assert said(0, **{"rewards/sums/mean": 0.25, "reward": 0.25})
    said(1, **{"rewards/days/mean": 1.0, "reward": 1.0})
    second = said(2)
    assert second is not None and (second.reward, second.rewards) == (1.0, {"days": 1.0, "sums": 0.25})
    said(3)
    third = said(4)
    assert third is not None and (third.reward, third.rewards) == (None, {"days": 1.0, "sums": 0.25})


def test_one_report_of_each_signer_is_taken_in_half_of_the_time() -> None:
    intake = ReportIntake(300)
    body = encode(GOOD)
    intake.take(body, ME, 1000.0)
    for early in (1000.0, 1149.0, 900.0):
        with pytest.raises(ReportError, match="early_report"):
            intake.take(body, ME, early)
    assert intake.take(body, OTHERS[5], 1001.0) == GOOD
    assert intake.take(body, ME, 1150.0) == GOOD


def test_a_report_tells_the_metrics_that_are_declared_for_the_board_and_no_others() -> None:
    def said(row: dict[str, object]) -> bytes | None:
        return Reporter(60.0, "gossamer/0.1.0").after_round({"round": 1, **row}, "builtin", 1000.0)

    told = {
        metric
        for metric in METRICS.values()
        if metric.name != "round"
        and said({metric.name: {OTHERS[0]: 3} if metric.label and "*" not in metric.name else 0.5}) != said({})
    }
    assert told == {metric for metric in METRICS.values() if Display.BOARD in metric.places}
