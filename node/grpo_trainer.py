"""TRL's `GRPOTrainer`, by its own arguments, as a node: a script of TRL's joins a swarm by one changed import.

    from gossamer import GRPOTrainer          # was: from trl import GRPOTrainer

    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=GRPOConfig(output_dir="out", max_steps=200),
        train_dataset=dataset,
        swarm="swarm:...",                    # an invite, or none
    )
    trainer.train()

A step of TRL's is a round: `per_device_train_batch_size * gradient_accumulation_steps` completions of this node's own,
`num_generations` to a question. `node.grpo_config` says what becomes of each field of `GRPOConfig`. All that cannot be
mapped is refused at once.

Without a swarm nobody is met, and each round trains on all of its own completions, as TRL's does (`sampling.rule`
"sapo"). With one, rounds also draw what peers share, by the node's default rule.

Without `args` the node's presets decide, and not TRL's defaults.
"""

import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.api import Node, Rows
from node.config import NodeConfig, merge
from node.errors import UserError
from node.grpo_config import (
    complaints_about,
    evaluates,
    groups_of,
    model_said,
    rounds_in,
    settings_of,
    without_effect,
)
from node.telemetry.evaluations import EVALUATIONS_FILE
from node.telemetry.metrics_file import Row, read_metrics

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import TrainerCallback, TrainerState
    from transformers.trainer_utils import TrainOutput

    from node.policy.load import Policy
    from node.training.evaluation import Answers

NOT_TAKEN: Mapping[str, str] = {
    "reward_processing_classes": "reward models are not taken",
    "optimizers": "the optimiser is what args.optim says",
    "tools": "an environment_factory has tools",
    "rollout_func": "a node makes its rollouts itself; an environment_factory has several turns",
}
"""Arguments of TRL's class that have to be left out, and why."""
EVALUATED = 100  # held-out rows that `evaluate` asks where there is no `eval_dataset` to count
STALE = ("model*.safetensors", "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors")
"""Weights of a model or adapters that were in a folder before: beside new ones they would be loaded, too."""


class GRPOTrainer:
    """A node that takes TRL's arguments.

    Args:
        model: "builtin", a folder, or a model id.
        reward_funcs: one function or several, in TRL's form, as objects or by name.
        args: TRL's `GRPOConfig`.
        train_dataset: rows with a `prompt`: a `Dataset`, dicts, or a file.
        eval_dataset: rows of the same kind that training never asks.
        processing_class: taken if it is the model's own tokenizer, of which the node has one.
        callbacks: of transformers, or functions of a round's metrics.
        peft_config: LoRA of `peft`, or a dict of its arguments.
        quantization_config: 4 bits of bitsandbytes, beneath adapters.
        environment_factory: a class in TRL's form; each row begins an episode of it (`node.tasks.environments.trl`).
        swarm: an invite to the swarm that it joins, or None.
        reward_range: the weighted sums that are rewards of 0 and 1, between which a swarm shares; without it, a sum is
            the reward, as in TRL.
        reward_options: of the task `rewards`: `{"judge": {...}}` for functions that ask a server, `seconds`, `isolate`.
        others: tables of a node's configuration, which go before what TRL's arguments say: `engine={"ahead": 1}`.

    Raises:
        UserError: something that is given cannot be mapped; each such thing has a line.
    """

    def __init__(  # noqa: PLR0913  # TRL's, in its order
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        environment_factory: Any = None,
        swarm: str | None = None,
        reward_range: tuple[float, float] | None = None,
        reward_options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        of_model = model_said(args, peft_config, quantization_config)
        tables = {name: value for name, value in others.items() if name in NodeConfig.model_fields}
        complaints = [
            *_complaints(model, reward_funcs, train_dataset, eval_dataset, environment_factory),
            *_complaints_about_callbacks(callbacks or ()),
            *_complaints_about_names(others.keys() - tables.keys(), others),
            *(complaints_about(args) if args is not None else ()),
            *of_model.complaints,
        ]
        rows = train_dataset if isinstance(train_dataset, str | Path | Mapping) else list(train_dataset or ())
        if args is not None and args.max_steps <= 0 and isinstance(rows, str | Path):
            complaints.append("train_dataset is a file: set max_steps, for its rows are not counted")
        _refuse(complaints)
        self.args = _default_args(model) if args is None else args
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.callbacks = list(callbacks or ())
        self.rounds = rounds_of(args, rows)
        is_source = eval_dataset is None or isinstance(eval_dataset, str | Path)
        self._tests: Rows | None = eval_dataset if is_source else list(eval_dataset)
        self._evaluates = evaluates(args, self.rounds) if args is not None else None
        self._trained: list[Row] = []
        functions = [] if environment_factory and reward_funcs is None else _functions(reward_funcs)
        options = {
            "weights": list(getattr(args, "reward_weights", None) or []) or None,
            "range": list(reward_range) if reward_range else None,
            "tokenizer": None if swarm or environment_factory else _tokenizer(model),  # peers may have another one
        }
        settings = _alone() if swarm is None else {}
        if args is not None:
            tests = len(self._tests) if isinstance(self._tests, list) else 0
            settings = merge(settings_of(args, self.rounds, None if eval_dataset is None else tests), settings)
        settings = merge(merge(settings, {"policy": of_model.policy} if of_model.policy else {}), tables)
        self.node = Node(
            model,
            rewards=functions,
            data=rows,
            test=self._tests,
            options={key: value for key, value in options.items() if value is not None} | dict(reward_options or {}),
            environment=environment_factory,
            folder=self.args.output_dir,
            swarm=swarm,
            rounds=self.rounds,  # the schedule ends there
            **settings,
        )
        unused = without_effect(args) if args is not None else []
        notes = [f"GRPOConfig: without effect here: {', '.join(unused)}"] if unused else []
        for line in (*of_model.notes, *notes):
            _say(line)

    def train(self, resume_from_checkpoint: Any = None) -> "TrainOutput":
        """Train to the last round, from the newest checkpoint if there is one, and return as transformers does.

        Args:
            resume_from_checkpoint: True, None, or the newest checkpoint: a node goes on from no other one.

        Raises:
            UserError: another checkpoint is named, or what `Node.train` raises.
        """
        from transformers.trainer_utils import TrainOutput, speed_metrics

        from node.training.evaluation import Decided  # imports torch

        checkpoint, done = self.node.checkpoint
        if isinstance(resume_from_checkpoint, str | Path):
            named = Path(resume_from_checkpoint).resolve()
            if checkpoint is None or named not in (checkpoint.resolve(), Path(self.node.folder).resolve()):
                raise UserError(
                    f"resume_from_checkpoint={str(resume_from_checkpoint)!r}: a node goes on from its newest "
                    f"checkpoint, {checkpoint or 'of which there is none yet'}: leave it out"
                )
        began = time.time()
        if done >= self.rounds:
            _say(
                f"all {self.rounds} rounds are done in {self.node.folder}: set more max_steps to go on, or another "
                "output_dir to begin anew"
            )
            rows = []
        else:
            if done:
                _say(f"{self.node.folder} goes on after round {done} of {self.rounds}")
            rows = self.node.train_to(self.rounds, self.callbacks, Decided(self._evaluates, self._described))
        generated = sum(int(row.get("generated", 0)) for row in rows)
        metrics = speed_metrics("train", began, num_samples=generated or None, num_steps=len(rows) or None)
        losses = [row["loss"] for row in rows if isinstance(row.get("loss"), int | float)]
        metrics["train_loss"] = statistics.fmean(losses) if losses else 0.0
        metrics["epoch"] = self.state.epoch
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def _described(self, policy: "Policy", answers: "Answers") -> Row:
        from node.grpo_metrics import evaluation_metrics  # imports torch

        return evaluation_metrics(policy, answers, self.args)

    @property
    def state(self) -> "TrainerState":
        """What has been trained so far, in transformers' form: a step is an update.

        `log_history` has the rounds, and after a round the evaluation that followed it.
        """
        from transformers import TrainerState

        iterations = self.args.num_iterations
        logged = [(row["round"], row) for row in self.node.metrics]
        for row in read_metrics(Path(self.node.folder) / EVALUATIONS_FILE):
            scores = {f"eval_{name}": value for name, value in row.get("described", {}).items()}
            logged += [(row["round"], scores)] if scores else []
        history = [
            {**{key: value for key, value in row.items() if isinstance(value, int | float)}, **self._place(done)}
            for done, row in sorted(logged, key=lambda entry: entry[0])
        ]
        _, done = self.node.checkpoint
        return TrainerState(
            epoch=self._place(done)["epoch"],
            global_step=done * iterations,
            max_steps=self.rounds * iterations,
            num_train_epochs=math.ceil(self._place(self.rounds)["epoch"]),
            log_history=history,
        )

    def _place(self, rounds: int) -> dict[str, Any]:
        count = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else 0
        epoch = rounds * groups_of(self.args) / count if count and not isinstance(self.train_dataset, str) else 0.0
        return {"step": rounds * self.args.num_iterations, "epoch": epoch}

    @property
    def model(self) -> Any:
        """The policy of the newest checkpoint, of transformers or, with adapters, of peft."""
        return self.node.policy.model

    @property
    def processing_class(self) -> Any:
        """The policy's tokenizer."""
        return self.node.policy.tokenizer

    def add_callback(self, callback: "type[TrainerCallback] | TrainerCallback | Callable[[Row], object]") -> None:
        """Have a callback told of the training from now on: transformers', as an object or a class, or a function."""
        self.callbacks.append(callback)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample completions to the rows of `eval_dataset`, or to held-out rows; return TRL's metrics of them.

        `node.grpo_metrics` says which these are, and how `eval_loss` is computed. The same completions are drawn each
        time from the same weights. No callback is told.

        Args:
            eval_dataset: the one that the trainer was given, or None.
            ignore_keys: without effect.
            metric_key_prefix: begins each name.

        Raises:
            UserError: other rows are given.
        """
        from transformers.trainer_utils import speed_metrics

        from node.grpo_metrics import evaluation_metrics  # imports torch

        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            raise UserError("evaluate: give eval_dataset to GRPOTrainer, so that training does not ask its rows")
        began = time.time()
        count = len(self._tests) if isinstance(self._tests, list) else EVALUATED
        completions = getattr(self.args, "num_generations_eval", None) or self.args.num_generations
        answers = self.node.answered(count, completions)
        metrics = evaluation_metrics(self.node.policy, answers, self.args)
        if not metrics:
            raise UserError("evaluate: no held-out row could be asked and scored")
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        asked = sum(map(len, answers.values()))
        steps = math.ceil(asked * completions / self.args.per_device_eval_batch_size)
        speed = speed_metrics(metric_key_prefix, began, asked, steps)
        return named | speed | {"epoch": self.state.epoch or 0.0}

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Write the policy as an ordinary model folder, or its adapters as a folder of peft.

        What an earlier call wrote there is replaced. The node's own folder has it in `model`.
        """
        own = Path(self.node.folder)
        out = own if output_dir is None else Path(output_dir)
        out = out / "model" if out.resolve() == own.resolve() else out
        policy = self.node.policy
        if hasattr(policy.model, "peft_config"):
            _write_over(out, lambda folder: _write_adapters(policy, folder), ())
        else:
            _write_over(out, self.node.export, STALE)

    def save_state(self) -> None:
        """Write `state` to trainer_state.json in `output_dir`."""
        from transformers.trainer_pt_utils import save_state

        save_state(self)

    def log_metrics(self, split: str, metrics: Mapping[str, float]) -> None:
        """Print metrics as transformers does."""
        from transformers.trainer_pt_utils import log_metrics

        log_metrics(self, split, metrics)

    def save_metrics(self, split: str, metrics: Mapping[str, float], combined: bool = True) -> None:
        """Write metrics to SPLIT_results.json in `output_dir`, and with `combined` to all_results.json."""
        from transformers.trainer_pt_utils import save_metrics

        save_metrics(self, split, metrics, combined)

    def is_world_process_zero(self) -> bool:
        """Return that this process prints and writes: there is no other one."""
        return True

    is_local_process_zero = is_world_process_zero

    @property
    def accelerator(self) -> "PartialState":
        """Prints once, however many processes there are, as TRL's scripts use it."""
        from accelerate import PartialState  # imports torch

        return PartialState()

    def end(self) -> None:
        """Do nothing: the node has left its trackers and its swarm when `train` returns."""


def _say(line: str) -> None:
    sys.stderr.write(f"gossamer: {line}\n")


def _refuse(complaints: Sequence[str]) -> None:
    """Raise `UserError` with a line for each complaint, if there are any."""
    if len(complaints) == 1:
        raise UserError(complaints[0])
    if complaints:
        lines = "".join(f"\n- {complaint}" for complaint in complaints)
        raise UserError(f"{len(complaints)} things that GRPOTrainer was given are not taken:{lines}")


def _complaints(model: Any, reward_funcs: Any, rows: Any, tests: Any, environment: Any) -> Iterator[str]:
    """Yield a line on each argument that will not do."""
    if not isinstance(model, str):
        yield "model: give its folder or its id; a model that is loaded already is not taken"
    if rows is None:
        yield "train_dataset: give rows with a prompt"
    elif isinstance(rows, Mapping):
        names = ", ".join(map(str, rows))
        yield f"train_dataset: give one set of rows, such as dataset['train'], not several by name ({names})"
    if isinstance(tests, Mapping):
        yield "eval_dataset: give one set of rows, not several by name"
    if environment is not None and not callable(environment):
        yield "environment_factory: give one class, not several by name"
    has_functions = environment is None or reward_funcs is not None
    for function in _functions(reward_funcs) if has_functions else ():
        if isinstance(function, str) and ":" not in function:
            yield f"reward_funcs: {function!r} would be a reward model, which is not taken: give a function"
        elif not isinstance(function, str) and (not callable(function) or hasattr(function, "state_dict")):
            yield "reward_funcs: give functions of prompts and completions; a reward model is not taken"


def _complaints_about_callbacks(callbacks: Sequence[Any]) -> Iterator[str]:
    from transformers import EarlyStoppingCallback, TrainerCallback

    for callback in callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            yield (
                "callbacks: an EarlyStoppingCallback goes by metric_for_best_model, which is not taken: set "
                "control.should_training_stop in on_evaluate of a callback of yours"
            )
        elif not (callable(callback) or isinstance(callback, TrainerCallback)):
            yield f"callbacks: {callback!r} cannot be called"


def _complaints_about_names(names: "set[str]", given: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(names):
        if name not in NOT_TAKEN:
            yield f"GRPOTrainer has no argument {name!r}"
        elif given[name] is not None and given[name] != (None, None):
            yield f"{name} of TRL's GRPOTrainer is not taken: {NOT_TAKEN[name]}: leave it out"


def _default_args(model: str) -> Any:
    """Return what stands for `args` where there are none: of its fields, only the folder decides anything."""
    from trl import GRPOConfig  # imports torch

    return GRPOConfig(output_dir=f"{Path(model).name}-GRPO", bf16=False)


def _alone() -> dict[str, Any]:
    """Return the settings of a node that meets nobody, and trains on all that it makes."""
    return {"sampling": {"external": 0, "rule": "sapo"}, "network": {"enabled": False}}


def _write_adapters(policy: Any, folder: Path) -> None:
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def _write_over(out: Path, write: Callable[[Path], object], stale: Sequence[str]) -> None:
    """Have `write` make a folder, and put its files into `out`, from which files go whose names fit `stale`."""
    aside = out.with_name(f".{out.name}-new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(aside)
        if not out.exists():
            aside.rename(out)
            return
        for file in {file for pattern in stale for file in out.glob(pattern)}:
            file.unlink()
        for file in aside.iterdir():
            file.replace(out / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _tokenizer(model: str) -> str | None:
    """Return the file by which functions count the policy's own tokens; of the built-in one they are characters."""
    if model == "builtin":
        return None
    file = Path(model) / "tokenizer.json"
    if Path(model).is_dir():
        return str(file.absolute()) if file.is_file() else None
    from transformers.utils import cached_file

    try:
        return cached_file(model, file.name)  # the model hub's
    except OSError:
        return None


def _functions(reward_funcs: Any) -> list[Any]:
    return list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]


def rounds_of(args: Any, rows: Any) -> int:
    """Return how many rounds a node trains for: `max_steps`, or `num_train_epochs` times the rows by those of a round.

    Without `args`, three epochs of two questions a round, as TRL's default has three epochs. A file needs `max_steps`.
    """
    if args is not None and args.max_steps > 0:
        return rounds_in(args.max_steps, args)
    if isinstance(rows, str | Path):
        raise UserError("train_dataset is a file: set max_steps, for its rows are not counted")
    epochs, groups = (3.0, 2) if args is None else (args.num_train_epochs, groups_of(args))
    return max(1, math.ceil(epochs * len(rows) / groups))
