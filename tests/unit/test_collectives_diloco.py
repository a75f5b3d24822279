"""DiLoCo on a group in one process: the outer step, both modes, newcomers, failures, checkpoints."""

import copy

import numpy as np
import pytest
import torch

from collectives.diloco import DiLoCo
from collectives.errors import Aborted, BadArgument
from collectives.outer_optimizer import Outer, OuterRounds, TrainedParameters, nesterov
from tests.fakes.groups import FakeCommunicator, Hall, same_bits
from tests.fakes.ports import on_threads
from tests.waiting import wait_until


class Worker:
    """One member: two parameters, each inner step subtracts a number of its own from them."""

    def __init__(self, hall: Hall, name: str, start: float = 0.0, **options) -> None:
        self.group = FakeCommunicator(hall, name)
        self.parameters = [torch.full((3,), start), torch.full((2, 2), start)]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1.0)
        self.diloco = DiLoCo(self.group, self.parameters, self.optimizer, **options)

    def inner(self, gradient: float):
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, gradient)
        self.optimizer.step()
        return self.diloco.step()

    @property
    def value(self) -> float:
        flat = TrainedParameters(self.parameters).flat_copy()
        assert (flat == flat[0]).all()
        return flat[0].item()


def crew(hall: Hall, **options) -> dict[str, Worker]:
    return {name: Worker(hall, name, **options) for name in sorted(hall.members)}


def run(work):
    results = on_threads(work)
    for result in results.values():
        if isinstance(result, Exception):
            raise result
    return results


def test_the_outer_step_is_that_of_the_paper_and_of_torch():
    rng = np.random.default_rng(0)
    outer, gradients = rng.normal(size=50), rng.normal(size=(5, 50))
    ours, momentum = torch.from_numpy(outer.copy()), torch.zeros(50, dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.from_numpy(outer.copy()))
    theirs = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    expected, velocity = outer.copy(), np.zeros(50)
    for gradient in gradients:
        nesterov(ours, momentum, torch.from_numpy(gradient), 0.7, 0.9)
        velocity = 0.9 * velocity + gradient
        expected -= 0.7 * (gradient + 0.9 * velocity)
        parameter.grad = torch.from_numpy(gradient)
        theirs.step()
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-13)
    np.testing.assert_allclose(ours.numpy(), parameter.detach().numpy(), rtol=1e-13)


def test_a_group_that_steps_without_momentum_neither_keeps_nor_sends_one():
    rounds = {momentum: OuterRounds(Hall(), torch.ones(4), Outer(1.0, momentum)) for momentum in (0.0, 0.9)}
    assert [sorted(each.state.tensors) for each in rounds.values()] == [["outer"], ["momentum", "outer"]]
    assert [each.state_dict()["momentum"].numel() for each in rounds.values()] == [0, 4]
    outer = torch.ones(4)
    nesterov(outer, rounds[0.0].momentum, torch.full((4,), 3.0), 0.5, 0.0)
    assert outer.tolist() == [-0.5] * 4


def test_one_inner_step_and_a_plain_outer_one_are_data_parallel_training():
    torch.manual_seed(0)
    data = {name: torch.randn(20, 4) for name in "abc"}
    targets = {name: torch.randn(20, 1) for name in "abc"}
    hall = Hall("a", "b", "c")

    together = torch.nn.Linear(4, 1)
    models = {name: copy.deepcopy(together) for name in "abc"}

    def train(name):
        net = models[name]
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        diloco = DiLoCo(FakeCommunicator(hall, name), net, optimizer, inner_steps=1, outer_lr=1.0, momentum=0.0)
        for at in range(20):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(data[name][at : at + 1]), targets[name][at : at + 1]).backward()
            optimizer.step()
            diloco.step()
        return TrainedParameters(net).flat_copy()

    trained = run({name: lambda name=name: train(name) for name in "abc"})
    optimizer = torch.optim.SGD(together.parameters(), lr=0.1)
    for at in range(20):
        optimizer.zero_grad()
        batch = torch.cat([data[name][at : at + 1] for name in "abc"])
        torch.nn.functional.mse_loss(
            together(batch), torch.cat([targets[name][at : at + 1] for name in "abc"])
        ).backward()
        optimizer.step()
    assert same_bits(trained["a"], trained["b"])
    assert same_bits(trained["a"], trained["c"])
    torch.testing.assert_close(trained["a"], TrainedParameters(together).flat_copy(), rtol=1e-5, atol=1e-6)


def test_sync_follows_the_reference_and_ends_in_the_same_bits():
    hall = Hall("a", "b")
    workers = crew(hall, inner_steps=3)
    pace = {"a": 0.25, "b": 0.75}

    def work(name):
        return lambda: [workers[name].inner(pace[name]) for _ in range(9)]

    steps = run({name: work(name) for name in workers})
    outer, velocity = 0.0, 0.0
    for _ in range(3):
        gradient = 3 * (0.25 + 0.75) / 2
        velocity = 0.9 * velocity + gradient
        outer -= 0.7 * (gradient + 0.9 * velocity)
    assert workers["a"].value == pytest.approx(outer, rel=1e-6)
    assert same_bits(workers["a"].diloco.outer, workers["b"].diloco.outer)
    assert [step.revision for step in steps["a"] if step] == [1, 2, 3]
    assert steps["a"][2].contributors == ("a", "b")


def test_async_follows_its_delayed_sequence():
    hall = Hall("a", "b")
    workers = crew(hall, inner_steps=2, mode="async", outer_lr=0.7, momentum=0.9)
    pace = {"a": [1, 2, 3, 4, 5], "b": [3, 4, 5, 6, 7]}  # phase by phase
    seen = {name: [] for name in workers}

    def work(name):
        def go():
            for gradient in pace[name]:
                workers[name].inner(gradient)
                workers[name].inner(gradient)
                seen[name].append(workers[name].value)
            return workers[name].diloco.finish()

        return go

    last = run({name: work(name) for name in workers})
    outer, velocity = 0.0, 0.0
    expected = {name: [-2.0 * pace[name][0]] for name in pace}  # the first phase has nothing to wait for
    final = []
    for phase in range(5):  # phase's mean gradient counts at the end of the next phase
        gradient = 2 * (pace["a"][phase] + pace["b"][phase]) / 2
        velocity = 0.9 * velocity + gradient
        outer -= 0.7 * (gradient + 0.9 * velocity)
        final.append(outer)
    for name in workers:
        assert seen[name] == pytest.approx(expected[name] + final[:4], rel=1e-6)
        assert workers[name].value == pytest.approx(final[4], rel=1e-6)
        assert last[name].revision == 5
    assert same_bits(workers["a"].diloco.outer, workers["b"].diloco.outer)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("part", [0.2, 0.5, 1.0])
def test_the_usual_outer_steps_converge_however_far_an_inner_phase_goes(mode, part):
    """Each inner phase goes `part` of the way to 0, from 1."""
    worker = Worker(Hall("a"), "a", start=1.0, inner_steps=1, mode=mode)
    for _ in range(60):
        worker.inner(part * worker.value)
    worker.diloco.finish()
    assert abs(worker.value) < 0.01


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_members_weight_is_its_part_of_the_mean(mode):
    worker = Worker(Hall("a"), "a", inner_steps=1, mode=mode, weight=3.0)
    worker.inner(1.0)
    worker.diloco.finish()
    assert worker.group.weights == [3.0]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_alone_it_trains_on(mode):
    worker = Worker(Hall("a"), "a", inner_steps=2, outer_lr=1.0, momentum=0.0, mode=mode)
    for _ in range(8):
        worker.inner(1.0)
    worker.diloco.finish()
    assert worker.diloco.revision == 4
    assert worker.value == (-8.0 if mode == "sync" else pytest.approx(-8.0))


@pytest.mark.parametrize("abort", [{3}, {4}, {5}, {6}, {3, 4, 8}])
def test_a_round_that_is_called_off_is_done_again_with_the_same_result(abort):
    """The meetings of the second round are 3 to 6: admit, sync, its commit, reduce."""
    values = []
    for aborted in (set(), abort):
        hall = Hall("a", "b", abort=aborted)
        workers = crew(hall, inner_steps=1)
        run({name: lambda worker=worker: [worker.inner(1.5) for _ in range(3)] for name, worker in workers.items()})
        assert same_bits(workers["a"].diloco.outer, workers["b"].diloco.outer)
        values.append(workers["a"].value)
    assert values[0] == values[1]


def test_a_member_dies_and_the_others_go_on():
    hall = Hall("a", "b", "c")
    workers = crew(hall, inner_steps=1)
    run({name: lambda worker=worker: worker.inner(1.0) for name, worker in workers.items()})

    def rest(name):
        return lambda: [workers[name].inner(1.0) for _ in range(2)]

    def die():
        wait_until(lambda: hall.waits("a") and hall.waits("b"), 10)
        hall.leave("c")

    steps = run({"a": rest("a"), "b": rest("b"), "c": die})
    assert steps["a"][0].contributors == ("a", "b")
    assert steps["a"][0].attempts == 2
    assert same_bits(workers["a"].diloco.outer, workers["b"].diloco.outer)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_late_joiner_ends_with_the_same_bits_and_contributes_nothing_at_first(mode):
    hall = Hall("a", "b")
    workers = crew(hall, inner_steps=1, mode=mode)
    options = {"inner_steps": 1, "mode": mode}

    def member(name):
        def go():
            for _ in range(3):
                workers[name].inner(1.0)
            wait_until(lambda: hall.waits("c") or "c" in hall.members, 10)
            for _ in range(3):
                workers[name].inner(1.0)
            workers[name].diloco.finish()

        return go

    def joiner():
        FakeCommunicator.connect(hall, "c")
        workers["c"] = Worker(hall, "c", start=9.0, **options)
        step = workers["c"].diloco.join()
        for _ in range(6 - step.revision):
            workers["c"].inner(1.0)
        workers["c"].diloco.finish()
        return step

    steps = run({"a": member("a"), "b": member("b"), "c": joiner})
    assert steps["c"].joined
    assert steps["c"].bytes_received > 0
    assert workers["c"].group.weights[0] == 0.0
    assert {worker.diloco.revision for worker in workers.values()} == {6}
    for name in "bc":
        assert same_bits(workers["a"].diloco.outer, workers[name].diloco.outer)
    assert workers["a"].value == workers["c"].value


def one_behind(hall, **options):
    """A member that has trained already, and one that begins elsewhere."""
    options = {"inner_steps": 1, "outer_lr": 1.0, "momentum": 0.0} | options
    workers = {"a": Worker(hall, "a", **options), "b": Worker(hall, "b", start=5.0, **options)}
    workers["a"].diloco._rounds.state.revision = 1
    return workers


def inner(workers, **gradients):
    return on_threads({name: lambda name=name: workers[name].inner(gradients[name]) for name in workers})


# A first attempt is sync, commit sync, reduce; all others begin with admit.
@pytest.mark.parametrize("abort", [(), (1,), (2,), (1, 4), (1, 5), (2, 4)])
def test_one_that_was_replaced_contributes_nothing_to_that_round_however_often_it_is_called_off(abort):
    hall = Hall("a", "b", abort=abort)
    workers = one_behind(hall)
    steps = inner(workers, a=2.0, b=100.0)
    assert (steps["a"].joined, steps["b"].joined) == (False, True)
    assert workers["a"].value == workers["b"].value == -2.0
    assert steps["a"].attempts == 1 + len(abort)
    inner(workers, a=2.0, b=4.0)
    assert workers["a"].value == workers["b"].value == -5.0  # from there on it counts


@pytest.mark.parametrize("abort", [1, 2])
def test_one_whose_round_ended_in_an_error_contributes_nothing_until_it_has_taken_over_the_groups_parameters(abort):
    hall = Hall("a", "b", abort={abort})
    workers = one_behind(hall, patience=1e-9)
    assert all(isinstance(error, Aborted) for error in inner(workers, a=2.0, b=100.0).values())
    steps = inner(workers, a=2.0, b=100.0)
    assert (steps["a"].joined, steps["b"].joined) == (False, True)
    assert workers["a"].value == workers["b"].value == -4.0


def test_in_async_mode_the_phase_that_began_before_the_replacement_does_not_count_either():
    workers = one_behind(Hall("a", "b"), mode="async")
    for _ in range(3):
        inner(workers, a=2.0, b=100.0)
    on_threads({name: worker.diloco.finish for name, worker in workers.items()})
    assert workers["b"].group.weights == [0.0, 0.0, 1.0]
    assert same_bits(workers["a"].diloco.outer, workers["b"].diloco.outer)


def test_a_checkpoint_keeps_that_a_gradient_does_not_count():
    workers = one_behind(Hall("a", "b", abort={2}), patience=1e-9)
    inner(workers, a=2.0, b=100.0)
    saved = {name: worker.diloco.state_dict() for name, worker in workers.items()}
    anew = crew(Hall("a", "b"), inner_steps=1, outer_lr=1.0, momentum=0.0)
    for name, worker in anew.items():
        worker.diloco.load_state_dict(saved[name])
    assert inner(anew, a=2.0, b=100.0)["b"].joined
    assert anew["a"].value == anew["b"].value == -4.0


def test_all_have_just_joined():
    hall = Hall("a", "b")
    workers = crew(hall, start=3.0)
    steps = run({name: worker.diloco.join for name, worker in workers.items()})
    assert {step.revision for step in steps.values()} == {0}
    assert workers["a"].value == 3.0


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_run_goes_on_from_its_checkpoint_with_the_same_numbers(mode):
    options = {"inner_steps": 2, "mode": mode}
    whole = Worker(Hall("a"), "a", **options)
    part = Worker(Hall("a"), "a", **options)
    for at in range(11):
        whole.inner(at)
        if at < 7:
            part.inner(at)
    saved = part.diloco.state_dict()
    again = Worker(Hall("a"), "a", start=77.0, **options)
    again.diloco.load_state_dict(saved)
    for at in range(7, 11):
        again.inner(at)
    whole.diloco.finish()
    again.diloco.finish()
    assert again.diloco.revision == whole.diloco.revision
    assert same_bits(again.diloco.outer, whole.diloco.outer)
    assert again.value == whole.value


def test_however_many_come_back_from_older_checkpoints_the_newest_goes_on():
    alone = Worker(Hall("a"), "a", inner_steps=1)
    saved = []
    for _ in range(4):
        alone.inner(1.0)
        saved.append(alone.diloco.state_dict())
    back = crew(Hall("a", "b", "c"), inner_steps=1)
    for worker, state in zip(back.values(), (saved[3], saved[0], saved[0]), strict=True):
        worker.diloco.load_state_dict(state)
    steps = inner(back, a=1.0, b=1.0, c=1.0)
    assert [steps[name].joined for name in back] == [False, True, True]
    assert {worker.diloco.revision for worker in back.values()} == {5}


def test_an_error_reaches_the_caller_when_patience_ends():
    hall = Hall("a", abort=range(1000))
    worker = Worker(hall, "a", inner_steps=1, patience=0.01)
    with pytest.raises(Aborted):
        for _ in range(3):
            worker.inner(1.0)
    hall.abort.clear()
    assert worker.inner(1.0).revision == 1


def test_parameters_of_any_kind_survive_the_round_trip():
    parameters = [
        torch.randn(3, 4).t(),
        torch.randn(5, dtype=torch.float64),
        torch.randn(2, 2).bfloat16(),
        torch.tensor(1.5),
    ]
    before = [parameter.clone() for parameter in parameters]
    flat = TrainedParameters(parameters).flat_copy()
    assert flat.dtype is torch.float64
    TrainedParameters(parameters).write_back(torch.zeros_like(flat))
    TrainedParameters(parameters).write_back(flat)
    assert all(torch.equal(parameter, other) for parameter, other in zip(parameters, before, strict=True))


def test_only_what_is_trained_is_averaged():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    net[0].weight.requires_grad_(False)
    diloco = DiLoCo(FakeCommunicator(Hall("a"), "a"), net)
    assert diloco.outer.numel() == 2 + 2 + 2


@pytest.mark.parametrize("options", [{"inner_steps": 0}, {"mode": "later"}, {"outer_lr": 0.0}, {"momentum": 1.0}])
def test_bad_arguments(options):
    with pytest.raises(BadArgument):
        DiLoCo(FakeCommunicator(Hall("a"), "a"), [torch.zeros(1)], **options)


def test_nothing_to_train():
    with pytest.raises(BadArgument, match="at least one parameter"):
        DiLoCo(FakeCommunicator(Hall("a"), "a"), [])


def test_a_checkpoint_of_another_model_is_refused():
    rounds = OuterRounds(FakeCommunicator(Hall("a"), "a"), torch.zeros(3), Outer())
    saved = OuterRounds(FakeCommunicator(Hall("a"), "a"), torch.zeros(4), Outer()).state_dict()
    with pytest.raises(BadArgument, match="4 parameters, this model 3"):
        rounds.load_state_dict(saved)
