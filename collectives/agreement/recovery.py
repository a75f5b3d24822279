"""Decides an operation whose view broke up, from the survivors' reports.

The view V has the coordinator C. C sends Commit only once every member of V, C too, sent OperationDone; it
sends Abort only before that, and decides once. Any other member publishes when it gets Commit, and
acknowledges; C itself publishes when all the others have acknowledged. A survivor that reports has
left V for good: it acts on none of V's messages any more and sends none. Let S be the members of V
that reported. Then the operation is

    committed      if somebody in S knows that it is
    aborted        if somebody in S knows that it is, or
                   (a) somebody in S has not sent OperationDone: it never will, so C never sends Commit; or
                   (b) C is in S and has not sent Commit: it never will; or
                   (c) all of V but C are in S and none has Commit: nobody but C could publish by
                       itself, and C does not without their acknowledgements, which never come
    carried over   if nobody in S has seen it start: a special case of (a), in which the callers
                   need not hear of it, for it may as well be called in the next view
    in doubt       otherwise: those who wait for it end the call, unpublished, without a verdict

Two sides never decide differently. Suppose that one commits. Then C sent Commit, so everybody had
sent OperationDone and (a) holds nowhere; C had sent Commit before it left V, so neither does (b); and either
some p other than C had Commit when it left V, or C published with all acknowledgements, which
takes such a p again (or V is C alone). If p is in another side's S, that side knows; if it is not,
(c) fails there. Nothing here depends on how many sides there are, nor on who took part in
which of them: a member tells every side the same or, later, more.

A member keeps what it knows of its last `MAX_LEDGERS` views. About older ones it does not report
at all, which leaves it out of S: then there is more doubt, but never a wrong verdict.
"""

from collections.abc import Iterable, Mapping, Sequence

from collectives.agreement.messages import Ledger, Ruling, Stage
from collectives.agreement.views import OpId
from protocol.identity import NodeId


def outcome(members: Sequence[NodeId], known: Mapping[NodeId, Stage]) -> Stage:
    """Return what became of an operation of `members` (the coordinator first), given what each survivor reported.

    The result is COMMITTED, ABORTED, CALLED (it carries over) or DONE (in doubt).
    """
    coordinator = members[0]
    stages = known.values()
    if Stage.COMMITTED in stages:
        return Stage.COMMITTED
    if Stage.ABORTED in stages:
        return Stage.ABORTED
    if all(stage is Stage.CALLED for stage in stages):
        return Stage.CALLED
    certain = (
        any(stage < Stage.DONE for stage in stages)
        or known.get(coordinator, Stage.HOLDS) < Stage.HOLDS
        or all(member in known for member in members[1:])
    )
    return Stage.ABORTED if certain else Stage.DONE


def rule(reports: Mapping[NodeId, Iterable[Ledger]]) -> tuple[Ruling, ...]:
    """Return what became of every operation that some survivor has not seen end, from the ledgers of each."""
    views: dict[bytes, dict[NodeId, Ledger]] = {}
    for member, ledgers in reports.items():
        for ledger in ledgers:
            views.setdefault(ledger.mark, {})[member] = ledger
    rulings: list[Ruling] = []
    for reporters in views.values():
        members = next(iter(reporters.values())).members
        listed = {member: reporters[member] for member in members if member in reporters}
        distinct = {id(ledger): ledger for ledger in listed.values()}  # those read from equal bytes are one
        tables = {key: dict(ledger.entries) for key, ledger in distinct.items()}
        for op in sorted(_open(distinct.values(), tables.values())):
            known = {
                member: tables[id(ledger)].get(op, Stage.CALLED)
                for member, ledger in listed.items()
                if op in tables[id(ledger)] or ledger.whole
            }
            rulings.append(Ruling(op, outcome(members, known)))
    return tuple(rulings)


def _open(ledgers: Iterable[Ledger], tables: Iterable[Mapping[OpId, Stage]]) -> set[OpId]:
    """Return the operations that have not ended in some ledger."""
    every = {op for table in tables for op in table}
    unseen: set[OpId] = set()
    for ledger, table in zip(ledgers, tables, strict=True):
        unseen |= {op for op, stage in table.items() if stage < Stage.COMMITTED}
        unseen |= every - table.keys() if ledger.whole else set()
    return unseen


def alone(members: Sequence[NodeId], own: NodeId, stage: Stage) -> Stage:
    """Return what a member that nobody else reports to may conclude about an operation."""
    return outcome(members, {own: stage})


def stage_of(rulings: Mapping[OpId, Stage], op: OpId, stage: Stage) -> Stage:
    """Return the ruling on an operation that is open at `stage`; where there is none, the careful one."""
    careful = {Stage.CALLED: Stage.CALLED, Stage.STARTED: Stage.ABORTED}
    return rulings.get(op, careful.get(stage, Stage.DONE))
