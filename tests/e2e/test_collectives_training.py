"""State transfer and DiLoCo between real processes, with members that are killed and members that come late."""

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from collectives import Aborted, Communicator, DiLoCo, InDoubt, SharedState, operations
from collectives.outer_optimizer import Outer, OuterRounds, TrainedParameters
from collectives.shared_state.transfer import Answers
from tests.groups import group, together
from tests.waiting import wait_until

FORK = multiprocessing.get_context("fork")  # shares the seconds that importing torch takes
LIMIT = 40.0
SIZE = 24 << 20  # bytes of the state that is transferred


def start(target: Callable, *arguments) -> multiprocessing.Process:
    process = FORK.Process(target=_main, args=(target, *arguments), daemon=True)
    process.start()
    return process


def _main(target: Callable, *arguments) -> None:
    torch.set_num_threads(1)
    target(*arguments)


def connect(folder: Path, name: str) -> Communicator:
    """Found the group as "a", or join it where "a" says it is; the founder's address is in the folder."""
    address = folder / "address"
    if name == "a":
        comm = Communicator.connect(group="test", timeout=LIMIT)
        (folder / "new").write_text(comm.address)
        (folder / "new").rename(address)
        return comm
    wait_until(address.exists, LIMIT)
    return Communicator.connect(group="test", seeds=[address.read_text()], timeout=LIMIT)


def say(folder: Path, name: str, **words) -> None:
    with (folder / name).open("a") as file:
        file.write(json.dumps(words) + "\n")


def said(folder: Path, name: str) -> list[dict]:
    path = folder / name
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def end(processes: dict[str, multiprocessing.Process]) -> dict[str, int | None]:
    for process in processes.values():
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
    return {name: process.exitcode for name, process in processes.items()}


def shared(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def holder(folder: Path, name: str, dies_after: int) -> None:
    """A member that has the state; it kills itself while it gives its `dies_after`-th chunk."""
    state = SharedState({"w": shared(1)}, revision=3)
    if dies_after:
        answer, given = Answers.answer, []

        def deadly(self, asker, question):
            found = answer(self, asker, question)
            given.append(found is not None and len(found) > 100_000)
            if sum(given) == dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        Answers.answer = deadly
    receive(folder, name, state)


def newcomer(folder: Path, name: str) -> None:
    receive(folder, name, SharedState({"w": shared(2)}))


def receive(folder: Path, name: str, state: SharedState) -> None:
    with connect(folder, name) as comm:
        while comm.world_size < 3:
            comm.admit()
        while True:
            try:
                result = comm.sync_state(state)
            except (Aborted, InDoubt):  # called off, or what became of it died with its coordinator
                arrived = sum(chunk.nbytes for chunk in state.arrived.values())
                untouched = torch.equal(state.tensors["w"], shared(2 if name == "c" else 1))
                say(folder, name, arrived=arrived, untouched=untouched)
                continue
            correct = torch.equal(state.tensors["w"], shared(1))
            say(folder, name, received=result.bytes_received, revision=state.revision, correct=correct)
            wait_until(lambda: any("received" in row for row in said(folder, "c")), LIMIT)
            return


def test_a_source_is_killed_in_a_transfer_and_another_goes_on(tmp_path):
    processes = {
        "a": start(holder, tmp_path, "a", 0),
        "b": start(holder, tmp_path, "b", 3),
        "c": start(newcomer, tmp_path, "c"),
    }
    assert end(processes) == {"a": 0, "b": -signal.SIGKILL, "c": 0}
    # Either the attempt goes on from "a" alone, or, where "b" coordinated it, the next one does.
    *cut, done = said(tmp_path, "c")
    assert len(cut) <= 1
    assert all(attempt["untouched"] for attempt in cut)
    kept = cut[-1]["arrived"] if cut else 0
    assert done == {"received": SIZE - kept, "revision": 3, "correct": True}
    assert said(tmp_path, "a")[-1] == {"received": 0, "revision": 3, "correct": True}


def train(folder: Path, name: str, mode: str, last: int) -> None:
    """Train a small model towards the same targets, each member on noise of its own, until outer step `last`."""
    torch.manual_seed(ord(name))
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    with connect(folder, name) as comm:
        diloco = DiLoCo(comm, net, optimizer, inner_steps=5, mode=mode, timeout=10.0)
        if name == "a":
            while comm.world_size < 2:
                comm.admit()
        step = diloco.join()
        while step is None or step.revision < last:
            optimizer.zero_grad()
            x = torch.randn(16, 8)
            loss = (net(x) - x.sum(1, keepdim=True).tanh()).square().mean()
            loss.backward()
            optimizer.step()
            step = diloco.step()
            if step is not None:
                say(folder, name, revision=step.revision, members=len(step.contributors), loss=loss.item())
                if step.revision == 4:
                    wait_until(lambda: comm.pending() or comm.world_size == 3, LIMIT, "the late joiner")
                if name == "a" and step.revision == 9:
                    os.kill(os.getpid(), signal.SIGKILL)
        local, outer = (
            hashlib.sha256(one.numpy().tobytes()).hexdigest()
            for one in (TrainedParameters(net).flat_copy(), diloco.outer)
        )
        say(folder, name, local=local, outer=outer)


def run_training(folder: Path, mode: str) -> None:
    processes = {name: start(train, folder, name, mode, 14) for name in "ab"}
    wait_until(lambda: said(folder, "a") and said(folder, "a")[-1]["revision"] >= 4, LIMIT, "four outer steps")
    processes["c"] = start(train, folder, "c", mode, 14)
    codes = end(processes)
    assert codes == {"a": -signal.SIGKILL, "b": 0, "c": 0}
    assert said(folder, "b")[-1] == said(folder, "c")[-1]
    members = [row.get("members") for row in said(folder, "b")[:-1]]
    assert members[:3] == [2, 2, 2]
    assert members[-1] == 2
    assert 3 in members


def test_a_late_joiner_and_the_founders_death_leave_the_same_bits_in_sync_mode(tmp_path):
    run_training(tmp_path, "sync")


def test_a_late_joiner_and_the_founders_death_leave_the_same_bits_in_async_mode(tmp_path):
    run_training(tmp_path, "async")


def test_a_member_whose_fetch_ended_before_the_call_was_called_off_adds_no_stale_gradient_to_the_mean(monkeypatch):
    with group(4) as comms:
        settings = Outer(lr=1.0, momentum=0.0, timeout=LIMIT)
        behind, failing = comms[2:]
        rounds = {
            comm: OuterRounds(comm, torch.full((1 << 18,), -5.0 if comm in (behind, failing) else 1.0), settings)
            for comm in comms
        }
        for comm in comms[:2]:
            rounds[comm].state.revision = 3
        sync, failed = operations.sync, []

        def sync_and_fail(port, own, *arguments):
            outcome = sync(port, own, *arguments)
            if own == failing.node_id and not failed:
                wait_until(lambda: rounds[behind].state.arrived, LIMIT, "the other one's fetch")
                failed.append(own)
                raise Aborted("this member fails")
            return outcome

        monkeypatch.setattr(operations, "sync", sync_and_fail)
        gradients = {comms[0]: 2.0, comms[1]: 4.0, behind: 100.0, failing: 100.0}
        steps = together(
            *(lambda c=comm: rounds[c].run(torch.full((1 << 18,), gradients[c])) for comm in comms), timeout=LIMIT
        )
        assert [step.joined for step in steps] == [False, False, True, True]
        assert [step.attempts for step in steps] == [2] * 4
        assert all((rounds[comm].outer == -2).all() for comm in comms)  # 1 - (2 + 4) / 2
