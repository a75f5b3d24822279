"""What `trainer.trl.report_to` names gets each round's rewards beside TRL's own metrics."""

from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto import event_pb2

from node.training.trainer import make_trainer
from tests.policies import tiny_policy
from tests.training import fixed_rounds, mixed_samples, node_config


def test_tensorboard_gets_the_rewards_of_each_round(tmp_path: Path) -> None:
    policy = tiny_policy(tmp_path / "policy")
    config = node_config(rounds=3, report_to=["tensorboard"])
    rewards = {1: 0.25, 2: 0.5, 3: 0.75}
    trainer = make_trainer(
        policy,
        config,
        tmp_path / "node",
        fixed_rounds(*[mixed_samples(policy)] * 3),
        lambda number, logs: None,
        also_log=lambda done: {"reward": rewards[done]},
    )
    trainer.train()
    (file,) = (tmp_path / "node").rglob("events.out.tfevents.*")
    scalars = [(event.step, value) for event in events_in(file) for value in event.summary.value]
    assert {step: value.simple_value for step, value in scalars if value.tag == "train/reward"} == rewards
    assert {step for step, value in scalars if value.tag == "train/loss"} == {1, 2, 3}


def events_in(file: Path) -> Iterator[event_pb2.Event]:
    """Read TFRecords: the length in 8 bytes and its checksum in 4, the event, its checksum in 4."""
    data = file.read_bytes()
    while data:
        end = 12 + int.from_bytes(data[:8], "little")
        yield event_pb2.Event.FromString(data[12:end])
        data = data[end + 4 :]
