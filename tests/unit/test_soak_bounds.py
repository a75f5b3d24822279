"""The soak's own judgement: what grows is named, and what only breathes is not."""

import pytest

from protocol.limits.limits import Limits
from tests.soak.bounds import FILES, LEAST, MAX_AGE_S, MIB, NODE, Sample, judge


def life(memory: list[int], descriptors: int = 40, files: dict[str, int] | None = None) -> list[Sample]:
    return [Sample(2.0 * at, value * MIB, descriptors, 20, files or {}) for at, value in enumerate(memory)]


@pytest.mark.parametrize(
    ("memory", "broken"),
    [
        ([300] * 40, []),
        ([100] * 10 + [500, 520] * 15, []),  # it loads in the first quarter
        ([300 + at for at in range(40)], []),  # 20 MiB from the middle of the second quarter to that of the last
        ([300 + 2 * at for at in range(40)], ["memory grew"]),
        ([300 + at // 10 for at in range(3600)], ["memory grew"]),  # the same pace over hours
        ([300] * 39 + [901], ["memory"]),
        ([300, 899] * (LEAST // 2 - 1), []),  # too short a life to be judged by its quarters
    ],
)
def test_growth_is_told_from_loading_and_breathing(memory: list[int], broken: list[str]) -> None:
    found = list(judge("n0", life(memory), NODE))
    assert len(found) == len(broken)
    assert all(what in line for what, line in zip(broken, found, strict=True))


def test_of_those_that_are_killed_only_the_bounds_are_judged() -> None:
    loading = [200] * 10 + [600] * 20
    assert list(judge("n7", life(loading[5:]), NODE, steady=False)) == []
    assert list(judge("n7", life([200] * 4 + [300, 400, 500, 600, 700] * 3), NODE))
    assert "over" in next(judge("n7", life([200, 901]), NODE, steady=False))


def test_a_file_over_its_bound_and_too_many_descriptors_are_named() -> None:
    assert list(judge("n0", life([300] * 3, files=dict(FILES)), NODE)) == []
    (line,) = judge("n0", life([300] * 3, files={"log.jsonl": FILES["log.jsonl"] + 1}), NODE)
    assert "n0: log.jsonl" in line
    (line,) = judge("n0", life([300] * 3, descriptors=257), NODE)
    assert "descriptors 257, over 256" in line


def test_what_groups_fill_is_full_before_the_middle_of_an_hours_second_quarter() -> None:
    assert 9 / 8 * (MAX_AGE_S + Limits().max_clock_ahead_s) < 60 * 60 * 3 / 8
