"""A view change among many whole members, each of which takes the processor time that it really costs: time-outs hold.

256 members are `python -m collectives.simulator.large_view`, in minutes; its figures are in docs/collectives.md.
"""

import pytest

from collectives.simulator.large_view import LargeView
from collectives.types import LAN

MANY = (32, pytest.param(64, marks=pytest.mark.slow))


@pytest.mark.parametrize("size", MANY)
def test_when_one_of_many_dies_the_others_are_in_one_view_in_time(size: int) -> None:
    group = LargeView(size)
    change = group.change(0, silently=True)  # the coordinator
    (view,) = change.views
    assert view is not None
    assert view.members == group.ids[1:]
    assert change.took < LAN.timeout + 2 * LAN.heartbeat + LAN.patience  # at the first ballot
    assert change.proposer_took < LAN.patience / 2
    assert change.proposer_spent > 0


def test_it_would_show_if_they_were_too_slow() -> None:
    change = LargeView(24, slowness=1000.0).change(0, silently=True)
    assert len(change.views) > 1 or change.took > LAN.timeout + 2 * LAN.heartbeat + LAN.patience
