"""Put a node together from its configuration and folder, and run it until it is stopped or its last round is done.

The network comes up first: peers may dial while the model still loads. A signal to
stop (Ctrl-C, SIGTERM, SIGHUP) ends the node after the round in progress, with a checkpoint. If that
round takes longer than `trainer.stop_grace`, it is abandoned wherever it is: in the engine, in a scorer, between
two micro-batches, in an evaluation. The checkpoint is then of the last whole round, and the node does the
abandoned one again at its next start, with the same numbers on a CPU.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import structlog
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from node.config import NodeConfig, TrainerConfig
from node.engines import RolloutEngine, SamplingParams, make_engine
from node.errors import DivergedError, NonFiniteError
from node.exchange.opening import open_buffer, open_swarm
from node.loop import Loop
from node.operations.presets import rate_warning, sleeps_in_update
from node.policy.load import Policy, load_policy
from node.processes.machine import return_freed_memory
from node.processes.signals import GivenUp, Stopping, graceful_stop
from node.rollouts.rule import Rule, Sample
from node.rollouts.screening import GroupBounds
from node.state_folder import Before, exclusive, first_start, full_disk_is_clear, keep_config, resolve_seed
from node.swarm.averaging import Weights, exchange_weights
from node.swarm.peering import Network
from node.swarm.sharing import GroupExchange
from node.swarm.swarm_folder import load_manifest, split_of
from node.tasks import Task, load_tasks
from node.tasks.task_set import TaskSet, outside, unshared
from node.telemetry.evaluations import EVALUATIONS_FILE
from node.telemetry.metrics_file import MetricsLog, read_metrics
from node.telemetry.rollout_log import ROLLOUTS_FILE, rows_of_round
from node.telemetry.round_log import RoundLog
from node.training.budget import COUNTED, Spent, is_done, progress, spent_in
from node.training.checkpoint import A_DAY, Checkpoint, Writes, is_better, whole_checkpoint, write_score
from node.training.evaluation import NOTHING_DECIDED, Decided, Evaluations, doubts
from node.training.processes import several
from node.training.ranks import Ranks
from node.training.trainer import SwarmTrainer, make_trainer

MAX_ROLLOUTS_BYTES = 8 << 20  # people look at the newest; the last ones before these are kept beside them

log = structlog.get_logger()


class Given(NamedTuple):
    """Objects that a Python program gives a node beside its configuration: tasks by name, callbacks of transformers,
    and what it decides of evaluations.
    """

    tasks: Mapping[str, Task] = MappingProxyType({})
    callbacks: Sequence[TrainerCallback] = ()
    evaluations: Decided = NOTHING_DECIDED


NOTHING_GIVEN = Given()


def run_node(  # each is a thing of its own
    config: NodeConfig,
    folder: Path,
    listening: Callable[[Network], None] = lambda network: None,
    processes: int | None = None,
    accelerate: Path | None = None,
    given: Given = NOTHING_GIVEN,
    *,
    before: Before | None = None,
) -> None:
    """Run one node until a signal or its last round, if it has one; start again from the newest checkpoint.

    `listening` is called once the network is up, before training. `processes` is how many train the node, and
    `accelerate` is accelerate's file of settings (`node.training.processes`). `given` comes from the Python program
    that runs this node (`node.api`). `before` is as for `first_start`.

    Raises:
        UserError: the configuration, the folder or the machine needs a person.
    """
    with ExitStack() as stack:
        stack.enter_context(full_disk_is_clear(folder))
        stack.enter_context(exclusive(folder))
        stack.enter_context(first_start(config, folder, before))
        stopping = stack.enter_context(graceful_stop(config.trainer.stop_grace))
        try:
            join = stack.enter_context(several(config, folder, processes, accelerate))
            train_node(_start(config, folder, listening, join, stack, given.tasks), stopping, given)
        except GivenUp:  # before the first round: nothing is lost
            stopping.finish()
            log.info("stopped while starting")


def _start(
    config: NodeConfig,
    folder: Path,
    listening: Callable[[Network], None],
    join: Callable[[], Ranks],
    stack: ExitStack,
    given: Mapping[str, Task],
) -> "Parts":
    """Make the parts of the node in `folder`; `stack` ends them. `join` waits for the others that train it."""
    seed = resolve_seed(config, folder)
    log.info("loading tasks", tasks=[task.name for task in config.tasks])
    split = split_of(load_manifest(folder))
    tasks = load_tasks(config.tasks, split, given=given)
    for line in tasks.small_tasks():
        log.info(line)
    for task in tasks.tasks:
        if unshared(task):
            log.warning("groups of this task are not shared", task=task.key.name, reason=unshared(task))
        elif config.network.enabled and (line := outside(task)):
            log.warning(line)
    for line in doubts(config.policy.model, split):
        log.warning(line)
    metrics = MetricsLog(folder / "metrics.jsonl")
    network, exchange, limits = stack.enter_context(
        open_swarm(config, folder, tasks, metrics, rounds=config.rounds, external=config.sampling.from_peers)
    )
    if network is not None:
        listening(network)
    if config.threads:
        torch.set_num_threads(config.threads)
    log.info("loading", model=config.policy.model)
    checkpoint = whole_checkpoint(folder / "checkpoints")
    ranks = join()
    all_generate = _all_generate(config, ranks)
    ranks.tell(
        {
            "config": config.model_dump_json(),
            "folder": str(folder.absolute()),
            "checkpoint": str(checkpoint.path.absolute()) if checkpoint else None,
            "all_generate": all_generate,
        }
    )
    policy = load_policy(config.policy, config.trainer.bf16, checkpoint=checkpoint.path if checkpoint else None)
    trained = sum(weight.numel() for weight in policy.model.parameters() if weight.requires_grad)
    if line := rate_warning(config.trainer, trained):
        log.warning(line)
    cards = ranks.count if policy.model.device.type == "cuda" else 1
    sleeps = sleeps_in_update(config, sharers=ranks.count if ranks.sharded else 1)
    others = ranks.others if all_generate else ()
    engine = make_engine(config.engine.beside(cards), policy, folder, sleeps=sleeps, others=others)
    stack.callback(engine.close)
    return Parts(
        config,
        folder,
        seed,
        policy,
        engine,
        tasks,
        exchange,
        metrics,
        network,
        limits,
        checkpoint,
        ranks,
    )


def _all_generate(config: NodeConfig, ranks: Ranks) -> bool:
    """Tell whether each process of the node is to generate a part of a round; say why, where number 0 does it alone."""
    if config.engine.kind != "hf" or ranks.count == 1:
        return False
    reason = "another has only a part of the weights" if ranks.sharded else ""
    if config.weights.mode != "off":
        reason = "weights from peers come to it first"
    elif not ranks.others:
        reason = "a launcher has started the others"
    if reason:
        log.info("one process generates alone", reason=reason)
    return not reason


class Parts(NamedTuple):
    """A node's parts, as `train_node` takes them: it opens what else is in the folder."""

    config: NodeConfig
    folder: Path
    seed: int
    policy: Policy
    engine: RolloutEngine
    tasks: TaskSet
    exchange: GroupExchange
    metrics: MetricsLog
    network: Network | None = None
    limits: GroupBounds = GroupBounds(0, 0)  # of a peer's group, as the exchange has them
    checkpoint: Checkpoint | None = None  # the one that training goes on from
    ranks: Ranks = Ranks()  # of which this process is number 0
    rule: Rule | None = None  # in place of the configuration's
    weights: AbstractContextManager[Weights] | None = None  # in place of an exchange with peers


def train_node(node: Parts, stopping: Stopping | None = None, given: Given = NOTHING_GIVEN) -> None:
    """Train from the node's checkpoint to the last round, or until `stopping` is true.

    Raises:
        DivergedError: logits, losses or weights are not finite.
        GivenUp: a signal came before the first round.
        UserError: the configuration or the folder needs a person.
    """
    stopping = Stopping() if stopping is None else stopping  # one that nobody has asked to stop is false
    config, folder, policy, engine, metrics = node.config, node.folder, node.policy, node.engine, node.metrics
    with ExitStack() as stack:
        buffer = stack.enter_context(open_buffer(config, folder, node.limits.life))
        rollouts = MetricsLog(folder / ROLLOUTS_FILE, MAX_ROLLOUTS_BYTES)
        loop = Loop(
            config,
            node.seed,
            policy,
            engine,
            node.tasks,
            buffer,
            node.exchange,
            metrics,
            record=lambda *of_round: rollouts.append(*rows_of_round(*of_round)),
            rule=node.rule,
        )
        loop.texts.check_rows()
        resumed = node.checkpoint.path if node.checkpoint else None
        loop.resume(resumed)
        weights = stack.enter_context(
            node.weights or exchange_weights(config, folder, policy, resumed, node.network and node.network.host)
        )
        scores = MetricsLog(folder / EVALUATIONS_FILE)
        evaluations = Evaluations(
            config.eval,
            SamplingParams.from_config(config.engine),
            policy,
            engine,
            _evaluated(config, node.tasks, given.tasks),
            config.engine.longest_prompt(policy.positions),
            scores,
            given.evaluations,
        )

        def rounds(done: int) -> Iterator[Sequence[Sample]]:
            keep_config(config, node.seed, folder)  # everything has started, and the trainer has loaded its checkpoint
            weights.begin()
            evaluations.after_round(progress(config, done, loop.spent, metrics.last))
            yield from loop.rounds(done)

        def after_update(number: int) -> dict[str, float]:
            loop.row |= weights.after_round(number)
            if not stopping:  # a node that is to end skips its evaluation, and makes it up at its next start
                with suppress(GivenUp):  # likewise: the round is whole without its evaluation
                    loop.row |= evaluations.after_round(progress(config, number, loop.spent, loop.row))
            return loop.figures()

        def finish(number: int, logs: Mapping[str, float]) -> None:
            loop.finish(number, logs)
            if (line := round_log.after_round(loop.row, time.monotonic())) is not None:
                log.info("round", **line)
                return_freed_memory()  # as rarely as that: what is given back is zeroed when it is taken again

        def also_save(path: Path) -> None:
            metrics.sync()  # a checkpoint is never ahead of the rows that say what was spent until it
            weights.write(path)
            loop.save(path)
            if scores.last.get("round") == trainer.rounds_done:
                write_score(path, scores.last)

        def improved() -> bool:
            return "eval/accuracy" in loop.row and is_better(scores.last, folder / "checkpoints")

        trainer = make_trainer(policy, config, folder, rounds, finish, also_save, after_update, node.ranks)
        _connect(
            trainer,
            evaluations,
            *given.callbacks,
            _EndsAndSaves(stopping, loop, improved, trainer.writes, 60 * (config.trainer.save_minutes or math.inf)),
        )
        done = node.checkpoint.round if node.checkpoint else 0
        for kept in (buffer, metrics, scores, rollouts):
            kept.rewind(done)
        loop.spent = spent_in(read_metrics(folder / "metrics.jsonl", COUNTED))
        if _has_ended(config, done, loop.spent):
            node.ranks.dismiss()
            return
        round_log = RoundLog(time.monotonic())
        log.info("training", round=done, rounds=config.rounds, policy=policy.name, buffer=len(buffer))
        with _ending_in_order(stopping, trainer, config.trainer, loop):
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        log.info("finished", round=metrics.last.get("round", done))


def _connect(trainer: SwarmTrainer, evaluations: Evaluations, *callbacks: TrainerCallback) -> None:
    evaluations.tell = trainer.tell_of_evaluation
    for callback in callbacks:
        trainer.add_callback(callback)


def _evaluated(config: NodeConfig, tasks: TaskSet, given: Mapping[str, Task]) -> TaskSet:
    """Return the tasks that evaluations ask: those of `eval.tasks`, or else those that are trained on."""
    return load_tasks(config.eval.tasks, tasks.split, tasks, given) if config.eval.tasks else tasks


@contextmanager
def _ending_in_order(stopping: Stopping, trainer: SwarmTrainer, config: TrainerConfig, loop: Loop) -> Iterator[None]:
    """Abandon a round that outlasts the grace period; name the round whose numbers are not finite."""
    if stopping:  # before the first round, which the caller reports
        raise GivenUp
    try:
        with stopping.patient():
            yield
    except NonFiniteError:  # in a round, or in an evaluation after it
        raise DivergedError(
            loop.row.get("round", trainer.rounds_done), "the policy's logits are not finite", config.learning_rate
        ) from None
    except GivenUp:
        stopping.finish()
        loop.give_up()
        trainer.save_whole_round()
        log.warning("a round was abandoned", seconds=config.stop_grace, more="the next start does it again")
    stopping.finish()


def _has_ended(config: NodeConfig, done: int, spent: Spent) -> bool:
    """Tell whether nothing is left to do after `done` rounds, and say why in the log."""
    if done >= config.last_round:
        log.info("all rounds are done", round=done, rounds=config.rounds, more="start it with a larger --rounds")
    elif is_done(config, done, spent):
        log.info("the budget is spent", round=done, **spent._asdict(), more="start it with a larger one")
    return is_done(config, done, spent)


class _EndsAndSaves(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Ends training, with a checkpoint, when a round was logged and a signal came or the budget was reached.

    It ends there, too, where another callback says `should_training_stop`, at whichever of a round's updates. So it
    comes after the others.

    Saves, too, when a signal asked for it, when the policy scored more than before, or when the newest checkpoint is
    `seconds` old. Of the checkpoints that `save_steps` asks for, it leaves out those that `writes` does not allow.
    """

    def __init__(
        self, stopping: Stopping, loop: Loop, improved: Callable[[], bool], writes: Writes, seconds: float
    ) -> None:
        self._stopping = stopping
        self._loop = loop
        self._improved = improved
        self._writes = writes
        self._left_out = False
        self._seconds = seconds
        self._saved = time.monotonic()
        self._is_asked = False  # by another callback, between two updates of a round

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if control.should_training_stop and not control.should_log:
            self._is_asked, control.should_training_stop = True, False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: object
    ) -> TrainerControl:
        if "loss" not in logs:  # once a round: `finish` has its row
            return control
        if control.should_save and not self._writes.allow():
            control.should_save = False
            if not self._left_out:
                self._left_out = True
                log.info("some checkpoints are left out", bytes_a_day=A_DAY, set="trainer.save_steps")
        if self._stopping or self._loop.is_last() or self._is_asked or control.should_training_stop:
            self._loop.settle()  # for the grace period at most; the checkpoint itself is written to its end
            self._stopping.finish()
            control.should_training_stop = True
            control.should_save = True
        if self._stopping.takes_save() or self._improved() or time.monotonic() - self._saved >= self._seconds:
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._saved = time.monotonic()
