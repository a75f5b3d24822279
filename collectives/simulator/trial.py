"""One schedule, from the founding of the group on: faults strike, then stop, and the group must recover.

The members' owners check what must hold throughout. At the end all live nodes must be in one view, every call must have
ended, and one more operation of all must commit with all in it. Members that make one call at a time, each as it
pleases or in a loop, must not wait for each other either.
"""

from functools import partial
from random import Random
from typing import Any

from collectives.agreement.agreement import Agreement
from collectives.agreement.events import (
    Action,
    CallVerdict,
    Dial,
    Event,
    Finished,
    GiveUp,
    Heard,
    Install,
    Leave,
    Linked,
    OutOfGroup,
    Perform,
    Performed,
    Send,
    Tick,
    Unlinked,
)
from collectives.agreement.message_codec import decode, encode
from collectives.agreement.views import ADMIT_TAG, OpId
from collectives.simulator.network import MAX_DELAY, SimulatedNetwork
from collectives.simulator.schedule import (
    END_TAG,
    FAULT_SECONDS,
    TAGS,
    Fault,
    Owner,
    Program,
    Schedule,
    Stepper,
    VerdictHistory,
    expect,
)
from collectives.types import LAN
from protocol.identity import NODE_ID_BYTES, id_of_bytes

TICK = LAN.heartbeat / 2
NEWCOMERS = 2  # nodes that a schedule may start while it runs
PATIENCE = 60.0  # within this after the last fault the group has recovered
LAST_TAG = 9
SINGLE_DEADLINE = 5.0  # of a call that may have to be called off, because others wait in another one
IDS = tuple(id_of_bytes(bytes([7 * number + 1]) * NODE_ID_BYTES) for number in range(34))
NUMBERS = {node: number for number, node in enumerate(IDS)}


class SimulatedMember:
    """One process."""

    def __init__(self, number: int, core: Agreement, owner: Owner, program: Program) -> None:
        self.number = number
        self.core = core
        self.owner = owner
        self.alive = True
        self.paused = False
        self.hung = False  # its owner, for good; the core lives
        self.slow = 0.2  # seconds that carrying an operation out takes at most
        self.reaches: set[int] | None = None  # whom it can be linked with, if not everybody
        self.paused_at = 0.0
        self.waiting: list[Event] = []  # while it is paused
        self.admits_next = False  # in a loop
        self.program = program
        self.stepper = Stepper(owner) if program is Program.STEPS else None


class GroupTrial:
    """One schedule under way."""

    replaces_streams = True  # of an operation that timed out with nothing received, as `DataPlane.close_port` does

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.rng = Random(f"trial {schedule.seed}")
        self.network = SimulatedNetwork(self.rng, 0.0, self._deliver, self._linked, self._unlinked)
        self.history = VerdictHistory()
        self.nodes: dict[int, SimulatedMember] = {}
        self.faulty = False
        self.busy = True
        self.struck: list[str] = []
        self._restarting = 0
        self._leaving = Random(f"leaving of trial {schedule.seed}")
        self._dialling = Random(f"dialling of trial {schedule.seed}")
        self._seen: dict[type, int] = {}
        self._dead_paths: set[frozenset[int]] = set()  # between which members no tensor passes
        self._armed = {(fault.moment, fault.n): fault for fault in schedule.faults if fault.moment is not None}

    def run(self) -> None:
        """Run it; raises `Violated` where something does not hold."""
        schedule, network = self.schedule, self.network
        for number in range(schedule.members):
            self._boot(number)
        self._until(self._formed, "the group did not form")
        network.disorder = schedule.disorder
        self.faulty = True
        formed = network.now
        for fault in schedule.faults:
            if fault.moment is None:
                network.at(formed + fault.when, self._strike, fault, self.rng.randrange(schedule.members))
        network.run(formed + FAULT_SECONDS)
        self.faulty = False
        self._until(lambda: not self._restarting, "never")
        network.disorder = 0.0
        network.heal()
        for node in list(self.nodes.values()):
            self._resume(node)
            node.slow, node.reaches = 0.2, None
        self._until(self._recovered, "the group did not recover")
        for node in self._live():
            node.hung = False
        self._until(self._recovered, "the group did not let in the member that had hung")
        if schedule.programs:
            self._disagree()
        self.busy = False
        for node in self._live():
            node.owner.busy = False
        self._until(self._idle, "calls did not end")
        self._last_operation()

    # --- what must come to hold ---

    def _live(self) -> list[SimulatedMember]:
        return [node for node in self.nodes.values() if node.alive]

    def _formed(self) -> bool:
        views = [node.core.view for node in self.nodes.values()]
        return all(view is not None and len(view.members) == len(self.nodes) for view in views)

    def _able(self) -> bool:
        """Tell whether enough members are left to go on."""
        return any(node.core.view is not None for node in self._live())

    def _recovered(self) -> bool:
        """Tell whether all are in one view, but for one that hangs: it is in none, or alone in its own."""
        live = [node for node in self._live() if not node.hung]
        views = [node.core.view for node in self._live() if node.hung and node.core.view is not None]
        if views or not live:
            return not live or not self._able() or len(views[0].members) == 1
        marks = {node.core.view.mark if node.core.view is not None else b"" for node in live}
        is_one_group = len(marks) == 1 and b"" not in marks and not any(node.core.fenced for node in live)
        members = {IDS[node.number] for node in live}
        return not self._able() or (is_one_group and live[0].core.view is not None and live[0].core.view.ids == members)

    def _idle(self) -> bool:
        """Tell whether no call is outstanding; one to let others in may be, as it may have to wait for more members."""
        return not any(node.owner.outstanding.keys() - {ADMIT_TAG} for node in self._live())

    def _until(self, holds: Any, otherwise: str) -> None:
        limit = self.network.now + PATIENCE
        while not holds():
            expect(self.network.now < limit, otherwise)
            self.network.run(self.network.now + LAN.heartbeat)

    def _disagree(self) -> None:
        """Let members call what they please while two more come, and expect no call to wait for its deadline.

        Those in a loop must come to reduce, all of them together.
        """
        self.network.run(self.network.now + 2 * SINGLE_DEADLINE)  # calls from before may end late, and others with them
        if not self._able():
            return
        for number in range(len(self.nodes), len(self.nodes) + 2):
            self._boot(number)
        before = set(self.history.verdicts)
        live = self._live()
        for node in live:
            node.owner.prompt = True
        self.network.run(self.network.now + 3 * SINGLE_DEADLINE)
        if Program.STEPS in self.schedule.programs:  # several calls in a row must succeed for a step to count
            for node in live:
                node.owner.careful = True
            self.network.run(self.network.now + 2 * SINGLE_DEADLINE)
        for node in live:
            node.owner.prompt, node.owner.in_time = False, {}
        if Program.FREE not in self.schedule.programs:
            tag = END_TAG if Program.STEPS in self.schedule.programs else TAGS[0]
            new = {op: known for op, known in self.history.verdicts.items() if op.tag == tag and op not in before}
            whole = [
                known for known in new.values() if list(known.values()) == [CallVerdict.COMMIT] * len(self._live())
            ]
            expect(bool(whole), "members in a loop never reduce all together")
        self._compare_steps()

    def _compare_steps(self) -> None:
        """Those who were never out of the group took the same steps."""
        counted: dict[int, bytes] = {}
        for node in self._live():
            if node.stepper is not None and node.owner.stay == 1:
                for number, name in node.stepper.counted.items():
                    expect(counted.setdefault(number, name) == name, f"step {number} counted twice")

    def _last_operation(self) -> None:
        """Call one of all members; again if it was disturbed by what is left of the faults."""
        limit = self.network.now + PATIENCE
        tag = LAST_TAG
        while self._able():
            expect(self.network.now < limit, "no operation of all members commits")
            self._until(self._recovered, "the group did not recover")
            live = self._live()
            tag += 1
            for node in live:
                node.owner.careful = True
                self._feed(node, node.owner.begin(tag, 10.0, self.network.now))
            self._until(self._idle, "the last operation did not end")
            ended = [known for op, known in self.history.verdicts.items() if op.tag == tag]
            if [set(known.values()) for known in ended] == [{CallVerdict.COMMIT}] and len(ended[0]) == len(live):
                return

    # --- processes ---

    def _boot(self, number: int) -> None:
        rng = Random(f"node {self.schedule.seed} {number} {self.network.now}")
        seeds = [str(other) for other in self.nodes if other != number and self.nodes[other].alive]
        core = Agreement(
            IDS[number],
            str(number),
            b"the simulated group",
            rng,
            self.network.now,
            seeds=seeds,
        )
        owner = Owner(IDS[number], rng, self.history, busy=self.busy)
        program = Random(f"program {self.schedule.seed} {number}").choice(self.schedule.programs or (Program.FREE,))
        node = self.nodes[number] = SimulatedMember(number, core, owner, program)
        self._tick(node)

    def _tick(self, node: SimulatedMember) -> None:
        if not node.alive:
            return
        self._feed(node, Tick())
        if not node.paused:
            node.owner.check(self.network.now)
            if not node.hung:
                self._call(node)
        self.network.at(self.network.now + TICK, self._tick, node)

    def _call(self, node: SimulatedMember) -> None:
        owner, view = node.owner, node.core.view
        if self.schedule.programs and self._seen:
            self._call_one(node)
            return
        if ADMIT_TAG not in owner.outstanding and (node.core.pending if view is not None else owner.stay):
            self._feed(node, owner.begin(ADMIT_TAG, 5.0, self.network.now))
        formed = len(self.nodes) >= self.schedule.members and (self.faulty or self._seen)
        for tag in TAGS if owner.busy and view is not None and formed else ():
            if tag not in owner.outstanding and self.rng.random() < 0.5:
                self._feed(node, owner.begin(tag, self.rng.choice((1.0, 3.0, 3.0)), self.network.now))

    def _call_one(self, node: SimulatedMember) -> None:
        owner = node.owner
        if owner.outstanding or (node.core.view is None and not owner.stay) or self.rng.random() < 0.5:
            return
        if owner.busy and node.stepper is not None:
            self._feed(node, node.stepper.begin(SINGLE_DEADLINE, self.network.now, pending=node.core.pending))
            return
        if node.core.view is None:
            admits = True
        elif not owner.busy or node.program is Program.FREE:
            admits = node.core.pending or self.rng.random() < 0.1 * owner.busy
        else:
            admits = node.admits_next
        if admits:
            self._feed(node, owner.begin(ADMIT_TAG, SINGLE_DEADLINE, self.network.now))
        elif owner.busy:
            self._feed(node, owner.begin(TAGS[0], SINGLE_DEADLINE, self.network.now))

    def _feed(self, node: SimulatedMember, event: Event) -> None:
        if not node.alive:
            return
        if node.paused:
            if not isinstance(event, Tick):
                node.waiting.append(event)
            return
        for action in node.core.handle(event, self.network.now):
            self._act(node, action)

    def _act(self, node: SimulatedMember, action: Action) -> None:
        match action:
            case Send(member, message):
                self._send(node, NUMBERS[member], message)
            case Dial(_, address):
                if self.schedule.dialling:
                    due = self.network.now + self._dialling.uniform(0.0, self.schedule.dialling)
                    self.network.at(due, self._connect, node, int(address))
                else:
                    self._connect(node, int(address))
            case Perform():
                self._perform(node, action)
            case Finished():
                node.owner.finished(action)
                node.admits_next = node.program.admits_next(action)
                if node.stepper is not None and node.stepper.calling == action.op.tag:
                    node.stepper.finished(action, pending=node.core.pending)
            case Install():
                node.owner.install(action)
            case OutOfGroup():
                node.owner.outside(action)

    def _perform(self, node: SimulatedMember, start: Perform) -> None:
        done = node.owner.start(start)
        if node.stepper is not None:
            done = node.stepper.start(start, done)
        members = {NUMBERS[member] for member in start.view.members}
        dead = [path for path in self._dead_paths if node.number in path and members >= path]
        if dead and not node.hung:
            self.network.at(node.owner.ends[start.op.tag], self._time_out, node, done.op, dead)
        elif not node.hung:
            self.network.at(self.network.now + self.rng.uniform(0.0, node.slow), self._feed, node, done)

    def _time_out(self, node: SimulatedMember, op: OpId, dead: list[frozenset[int]]) -> None:
        """Give up an operation in which nothing came; its streams are then closed, and new ones made."""
        if self.replaces_streams:
            self._dead_paths.difference_update(dead)
        self._feed(node, Performed(op, ok=False, reason="too little came in time"))

    def _connect(self, node: SimulatedMember, number: int) -> None:
        other = self.nodes.get(number)
        if node.alive and other is not None and other.alive and not other.paused and self._in_reach(node, other):
            self.network.connect(node.number, other.number)

    def _in_reach(self, member: SimulatedMember, other: SimulatedMember) -> bool:
        return all(a.reaches is None or b.number in a.reaches for a, b in ((member, other), (other, member)))

    # --- the network's side ---

    def _send(self, node: SimulatedMember, to: int, message: Any) -> None:
        if self.schedule.encoded:
            message = decode(encode(message))
        self.network.send(node.number, to, message)
        if self.faulty:
            kind = type(message)
            seen = self._seen[kind] = self._seen.get(kind, 0) + 1
            fault = self._armed.get((kind, seen))
            if fault is not None:
                self.network.at(self.network.now, self._strike, fault, node.number if fault.at_sender else to)

    def _deliver(self, source: int, to: int, message: Any) -> None:
        self._feed(self.nodes[to], Heard(IDS[source], message))

    def _linked(self, end: int, far: int) -> None:
        self._feed(self.nodes[end], Linked(IDS[far], str(far)))

    def _unlinked(self, end: int, far: int) -> None:
        self._feed(self.nodes[end], Unlinked(IDS[far]))

    # --- faults ---

    def _strike(self, fault: Fault, number: int) -> None:
        node, network = self.nodes[number], self.network
        if not self.faulty or not node.alive:
            return
        self.struck.append(f"{network.now:.3f} {fault.kind} {number} for {fault.lasts}")
        others = [other.number for other in self._live() if other is not node]
        match fault.kind:
            case "crash" | "power" | "leave" | "restart":
                self._end(node, fault)
            case "pause":
                node.paused, node.paused_at = True, network.now
                network.at(network.now + fault.lasts, self._resume, node)
            case "dead path" if others:
                self._dead_paths.add(frozenset({number, self.rng.choice(others)}))
            case "cut" if others:
                network.cut(number, self.rng.choice(others))
            case "isolate" | "split" | "oneway":
                side = {number} if fault.kind != "split" else {n for n in self.nodes if self.rng.random() < 0.5}
                self._part(side, fault)
            case "hang" if others:
                node.hung = True
            case "slow":
                node.slow = fault.lasts
            case "interrupt":
                self._interrupt(node)
            case "join" | "half":
                self._join(within_reach=0.5 if fault.kind == "half" else 1.0)

    def _interrupt(self, node: SimulatedMember) -> None:
        """Press Ctrl-C at an owner: its calls end at once, but for what it has carried out already."""
        for tag in list(node.owner.outstanding):
            self._feed(node, GiveUp(tag))
            if tag in node.owner.outstanding and tag != ADMIT_TAG and not node.paused:  # the core carries those out
                expect(node.owner.started.get(tag) is not None, f"the call under tag {tag} was given up and goes on")

    def _join(self, within_reach: float) -> None:
        """Start one more node, which so many of the others can reach."""
        new = len(self.nodes)
        if new < self.schedule.members + NEWCOMERS:
            self._boot(new)
            if within_reach < 1.0:
                self.nodes[new].reaches = {n for n in range(new) if self.rng.random() < within_reach}

    def _end(self, node: SimulatedMember, fault: Fault) -> None:
        if len(self._live()) <= 1:
            return
        if fault.kind == "leave":  # what it says last is on its way, and mostly arrives
            self._feed(node, Leave())
            gone = self.network.now + self._leaving.uniform(0.0, 3 * MAX_DELAY)
            self.network.at(gone, partial(self.network.vanish, silently=False), node.number, range(len(IDS)))
        else:
            self.network.vanish(node.number, range(len(self.nodes)), silently=fault.kind == "power")
        node.alive = False
        if fault.kind == "restart":
            self._restarting += 1
            self.network.at(self.network.now + fault.lasts, self._restart, node.number)

    def _restart(self, number: int) -> None:
        self._restarting -= 1
        self._boot(number)

    def _resume(self, node: SimulatedMember) -> None:
        if node.alive and node.paused:
            node.paused = False
            node.owner.due = {tag: due + self.network.now - node.paused_at for tag, due in node.owner.due.items()}
            waiting, node.waiting = node.waiting, []
            for event in waiting:
                self._feed(node, event)

    def _part(self, side: set[int], fault: Fault) -> None:
        """Hold up what goes between two sides, or one way only; links close while it lasts, or survive it."""
        network = self.network
        for number in side:
            for other in self.nodes.keys() - side:
                network.block(number, other)
                if fault.kind != "oneway":
                    network.block(other, number)
                if self.rng.random() < 0.5:
                    network.at(network.now + self.rng.uniform(0.0, fault.lasts), network.cut, number, other)
        network.at(network.now + fault.lasts, network.heal)


def run(seed: int, members: int) -> GroupTrial:
    """Run the schedule of a seed and return the trial; raises `Violated`."""
    trial = GroupTrial(Schedule.draw(seed, members))
    trial.run()
    return trial
