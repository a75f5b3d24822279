"""What a person is told of the network: each thing once."""

from node.swarm.notices import AGAIN_S, ALONE_S, DOWN, FEW_AGAIN_S, SOON_S, Notices
from protocol.config import Instant
from protocol.credentials.grants import make_pass
from protocol.credentials.records import Address, Endpoint
from protocol.identity import Identity
from protocol.refusals import SAME_S, Failure, PeerClocks, Refusals

UNIX = 1_700_000_000.0
SEED = Address(Endpoint("192.0.2.7", 4001), bytes(32))
OWNER = Identity(bytes(32))


def at(seconds: float) -> Instant:
    return Instant(seconds, UNIX + seconds)


def grant(lifetime_s: float) -> bytes:
    return make_pass(OWNER, b"a swarm of tests", OWNER.node_id, int((UNIX + lifetime_s) * 1000)).encode()


def events(
    notices: Notices, seconds: float, *, peers: int = 1, dialable: int = 2, refusals: Refusals | None = None
) -> list[str]:
    due = notices.due(refusals or Refusals(at(seconds)), PeerClocks(), peers, dialable, (), at(seconds))
    return [notice.event for notice in due]


def test_an_endpoint_that_leads_nowhere_is_told_once_an_hour_and_from_where_it_was_tried() -> None:
    notices = Notices((), b"", at(0))

    def due(seconds: float, *failures: Failure) -> list[dict[str, str]]:
        return [notice.fields for notice in notices.due(Refusals(at(0)), PeerClocks(), 1, 2, failures, at(seconds))]

    four, six = (Failure(Endpoint(host, 4001), "93.184.0.1") for host in ("198.41.0.4", "2003::5"))
    (told,) = due(0, four)
    assert (told["endpoint"], told["tried_from"]) == ("tcp://198.41.0.4:4001", "93.184.0.1")
    assert [notice["endpoint"] for notice in due(1, four._replace(tried_from="93.184.1.1"), six)] == [
        "tcp://[2003::5]:4001"
    ]
    assert due(2) == due(SAME_S - 1, four) == [] and len(due(SAME_S, four)) == 1


def test_a_notice_of_a_refusal_says_what_to_do_to_whom_it_concerns() -> None:
    refusals, notices = Refusals(at(0)), Notices((), b"", at(0))
    refusals.by("tcp://192.0.2.7:4001", "invite_expired", at(0))
    refusals.of("a node", "not_admitted", at(0))
    ours, theirs = notices.due(refusals, PeerClocks(), 0, 2, (), at(0))
    assert ours.is_warning and "newer invite" in ours.fields["remedy"] and ours.fields["by"] == "tcp://192.0.2.7:4001"
    assert not theirs.is_warning and theirs.fields == {"node": "a node", "reason": "not_admitted"}
    refusals.offender("another", "forged", at(0))
    refusals.by("tcp://192.0.2.7:4001", "graylisted", at(0))
    theirs, ours = notices.due(refusals, PeerClocks(), 0, 2, (), at(0))
    assert theirs.is_warning and theirs.fields == {"who": "another", "most_of_all": "forged"}
    assert ours.fields["reason"] == "graylisted" and "clock" in ours.fields["remedy"]


def test_a_grant_that_ends_is_warned_of_a_day_before_and_when_it_does() -> None:
    notices = Notices((), grant(5 * SOON_S), at(0))
    assert events(notices, 0) == events(notices, 4 * SOON_S - 1) == []
    assert events(notices, 4 * SOON_S + 1) == ["this node's grant expires soon"]
    assert events(notices, 4 * SOON_S + 2) == []
    assert events(notices, 5 * SOON_S) == ["this node's grant has expired"]
    assert events(notices, 6 * SOON_S) == []
    short = Notices((), grant(SOON_S), at(0))
    assert events(short, 0) == events(short, 0.7 * SOON_S) == []
    assert events(short, 0.8 * SOON_S) == ["this node's grant expires soon"]
    assert events(Notices((), grant(-1.0), at(0)), 0) == ["this node's grant has expired"]


def test_a_node_whose_seeds_do_not_answer_says_that_it_is_alone_and_why_if_it_knows() -> None:
    notices, refusals = Notices((SEED,), b"", at(0)), Refusals(at(0))
    assert events(notices, ALONE_S - 1, peers=0) == []
    (notice,) = notices.due(refusals, PeerClocks(), 0, 2, (), at(ALONE_S))
    assert notice.fields == {
        "seconds": ALONE_S,
        "seeds": ["tcp://192.0.2.7:4001"],
        "why": DOWN,
    }
    assert events(notices, 2 * ALONE_S, peers=0) == []  # said
    assert events(notices, 1000, peers=1) == events(notices, 1000 + ALONE_S - 1, peers=0) == []
    refusals.full = "tcp://192.0.2.7:4001"
    (notice,) = notices.due(refusals, PeerClocks(), 0, 2, (), at(1000 + ALONE_S))
    assert notice.fields["why"].startswith("tcp://192.0.2.7:4001 is full: ")
    refusals.by("tcp://192.0.2.7:4001", "not_admitted", at(1000))
    refusals.take()
    (notice,) = notices.due(refusals, PeerClocks(), 0, 2, (), at(4000 + ALONE_S))
    assert notice.fields["why"] == "they do not admit this node"


def test_the_first_node_of_a_swarm_is_not_told_that_it_is_alone() -> None:
    assert events(Notices((), b"", at(0)), 10 * ALONE_S, peers=0) == []


def test_a_clock_that_differs_from_most_is_told_now_and_then_with_by_how_much_and_from_how_many() -> None:
    notices, refusals, clocks = Notices((), b"", at(0)), Refusals(at(0)), PeerClocks()
    clocks.said("198.51.100.0/24", at(0).unix + 1200, at(0))
    assert notices.due(refusals, clocks, 1, 2, (), at(1)) == []  # one may be wrong, or lie
    clocks.said("203.0.113.0/24", at(1).unix + 1190, at(1))
    clocks.said("203.0.113.0/24", at(1).unix + 1210, at(1))
    (notice,) = notices.due(refusals, clocks, 2, 2, (), at(1))
    assert notice.event == "this machine's clock differs from its peers'"
    assert (notice.fields["this_machine_is"], notice.fields["peers"]) == ("1205 s behind", 2)
    assert notices.due(refusals, clocks, 2, 2, (), at(2)) == []
    assert len(notices.due(refusals, clocks, 2, 2, (), at(1 + AGAIN_S))) == 1
    mended = Instant(2 * AGAIN_S + 2, at(2 * AGAIN_S + 2).unix + 1205)
    assert notices.due(refusals, clocks, 2, 2, (), mended) == []  # a person set it


def test_that_one_member_alone_can_be_dialled_is_said_once_a_day_while_it_is_so() -> None:
    notices = Notices((), b"", at(0))
    assert events(notices, ALONE_S - 1, dialable=1) == []  # others may yet be heard of
    assert events(notices, ALONE_S, dialable=1) == ["only one member of this swarm can be dialled"]
    assert events(notices, FEW_AGAIN_S, dialable=1) == []
    assert events(notices, ALONE_S + FEW_AGAIN_S, dialable=2) == []
    assert events(notices, 2 * FEW_AGAIN_S, dialable=1, peers=0) == []  # that it is alone says enough
    assert events(notices, 3 * FEW_AGAIN_S, dialable=1) == ["only one member of this swarm can be dialled"]
