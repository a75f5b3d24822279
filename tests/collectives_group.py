"""Groups of processes that reduce and synchronise together: founded, let in, and compared with what must come out."""

from contextlib import contextmanager

from tests.collectives_member import Member, digest, vector
from tests.waiting import wait_until

COUNTS = (100, 300_000)  # by the agreement, and by streams between all pairs
PATIENCE_S = 30.0


@contextmanager
def members_in(spaces, **options):
    """One member in each namespace, or on loopback for None. The first founds, and brings the state to revision 1."""
    members = []
    try:
        for space in spaces:
            newcomer = Member()
            seeds = [members[0].address] if members else []
            listen = {}
            if space is not None:
                newcomer.ask("enter", space.name)
                listen |= {"listen": f"tcp://{space.ipv4}:0", "secret": "of several machines"}
            newcomer.tell("connect", seeds, listen | options)
            for member in members:
                member.tell("wait_for", len(members) + 1, PATIENCE_S)
            newcomer.address, newcomer.node_id = newcomer.answer()
            assert [member.answer() for member in members] == [None] * len(members)
            members.append(newcomer)
            if len(members) == 1:
                commit(members, "alone")
        wait_until(lambda: {len(member.ask("members")) for member in members} == {len(members)}, PATIENCE_S)
        yield members
    finally:
        for member in members:
            member.end()


def let_in(*members):
    """Come together, those of one view and those who wait outside, in as many admissions as it takes."""
    for member in members:
        member.tell("wait_for", len(members), PATIENCE_S)
    assert [member.answer() for member in members] == [None] * len(members)


def mix(members, step, history="state", timeout=PATIENCE_S):
    """Reduce and synchronise once; return how each call of each member ended, by member."""
    for member in members:
        member.tell("mix", step, COUNTS, timeout, history)
    answers = [member.answer() for member in members]
    for tag, count in enumerate(COUNTS):
        for verdict, facts, found in (of_one[1 + tag] for of_one in answers):
            if verdict == "commit":
                assert found == digest(sum(vector(member, f"{step}/{tag}", count) for member in facts))
    return answers


def commit(members, step, history="state"):
    """Reduce and synchronise until it counts; return the revision that was synchronised, and the state's hash."""
    for again in range(20):
        answers = mix(members, f"{step}.{again}", history)
        if all(answer[0] == "commit" for of_one in answers for answer in of_one):
            ids = tuple(sorted(member.node_id for member in members))
            assert all(answer[1] == ids for of_one in answers for answer in of_one[1:])
            (state,) = {of_one[0][1:] for of_one in answers}
            return state
        # Whoever is in doubt of one call calls it again; a commit that others saw has not changed its state.
    raise AssertionError(f"20 times called off: {answers}")
