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
`num_generations` to a question. `MAPPED` says which setting a field of `GRPOConfig` becomes, `WITHOUT_EFFECT` which
fields change nothing that is learnt. Any other field that is not at its default is refused in one line.

Without a swarm nobody is met, and each round trains on all of its own completions, as TRL's does (`sampling.rule`
"sapo"). With one, rounds also draw what peers share, by the node's default rule.

Without `args` the node's presets decide, and not TRL's defaults.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.api import Node, Reward, Rows
from node.config import merge, put
from node.errors import UserError
from node.telemetry.metrics import Row

if TYPE_CHECKING:
    from accelerate import PartialState

MAPPED: Mapping[str, str] = {
    "learning_rate": "trainer.learning_rate",
    "weight_decay": "trainer.trl.weight_decay",
    "adam_beta2": "trainer.trl.adam_beta2",
    "max_grad_norm": "trainer.trl.max_grad_norm",
    "lr_scheduler_type": "trainer.trl.lr_scheduler_type",
    "warmup_steps": "trainer.trl.warmup_steps",
    "loss_type": "trainer.trl.loss_type",
    "importance_sampling_level": "trainer.trl.importance_sampling_level",
    "mask_truncated_completions": "trainer.trl.mask_truncated_completions",
    "epsilon": "trainer.trl.epsilon",
    "epsilon_high": "trainer.trl.epsilon_high",
    "scale_rewards": "trainer.trl.scale_rewards",
    "num_iterations": "trainer.num_iterations",
    "off_policy_mask_threshold": "trainer.trl.off_policy_mask_threshold",
    "vllm_importance_sampling_correction": "trainer.trl.vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode": "trainer.trl.vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max": "trainer.trl.vllm_importance_sampling_clip_max",
    "save_steps": "trainer.save_steps",
    "save_total_limit": "trainer.trl.save_total_limit",
    "report_to": "trainer.trl.report_to",
    "gradient_checkpointing": "trainer.gradient_checkpointing",
    "bf16": "trainer.bf16",
    "num_generations": "sampling.completions",
    "max_completion_length": "engine.max_completion_length",
    "temperature": "engine.temperature",
    "top_p": "engine.top_p",
    "use_vllm": "engine.kind",
    "chat_template_kwargs": "policy.template",
    "eval_steps": "eval.every",
    "seed": "seed",
}
# Read by this file, and not one setting each.
COUNTED = (
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "reward_weights",
    "eval_strategy",
    "model_init_kwargs",
)
WITHOUT_EFFECT = (
    # what is shown, and how often
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "log_level",
    "log_completions",
    "num_completions_to_print",
    "log_unique_prompts",
    "disable_tqdm",
    "run_name",
    "project",
    # what follows from others, or from the machine
    "generation_batch_size",
    "steps_per_generation",
    "activation_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
    "use_cpu",
    "tf32",
    "optim",  # checked below: each is AdamW
    "remove_unused_columns",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "per_device_eval_batch_size",
    "eval_accumulation_steps",
    "num_generations_eval",
    "do_train",
    "do_eval",
    "save_only_model",
    "save_strategy",
    # of vLLM, which the node places itself, and of a loss that is not chosen
    "vllm_gpu_memory_utilization",
    "vllm_tensor_parallel_size",
    "vllm_max_model_length",
    "vllm_enable_sleep_mode",
)
# What may be said of how a model is loaded: what a node does anyway.
INIT_KWARGS: Mapping[str, tuple[Any, ...]] = {
    "revision": (None, "main"),
    "trust_remote_code": (None, False),
    "attn_implementation": (None, "sdpa"),
    "dtype": (None, "auto", "float32"),
}
OPTIMISERS = ("adamw_torch", "adamw_torch_fused")


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
        environment_factory: a class in TRL's form; each row begins an episode of it (`node.tasks.trl_environments`).
        peft_config: LoRA of `peft`: its r, lora_alpha and target_modules.
        swarm: an invite to the swarm that it joins, or None.
        reward_range: the weighted sums that are rewards of 0 and 1, between which a swarm shares; without it, a sum is
            the reward, as in TRL.
        others: further arguments of TRL's, which are refused unless they are None.

    Raises:
        UserError: something that is given cannot be mapped; the line names it.
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
        environment_factory: Any = None,
        swarm: str | None = None,
        reward_range: tuple[float, float] | None = None,
        **others: Any,
    ) -> None:
        for name, value in others.items():
            if value is not None and value != (None, None):
                raise UserError(f"{name} of TRL's GRPOTrainer is not taken: leave it out")
        if not isinstance(model, str):
            raise UserError("model: give its folder or its id; a model that is loaded already is not taken")
        if train_dataset is None:
            raise UserError("train_dataset: give rows with a prompt")
        if args is not None:
            check_config(args)
        if environment_factory is not None and not callable(environment_factory):
            raise UserError("environment_factory: give one class, not several by name")
        functions = [] if environment_factory and reward_funcs is None else _functions(reward_funcs)
        rows = train_dataset if isinstance(train_dataset, str | Path) else list(train_dataset)
        self.callbacks = list(callbacks or ())
        settings = merge(settings_of(args, swarm, has_test=eval_dataset is not None), _lora(peft_config))
        options = {
            "weights": list(getattr(args, "reward_weights", None) or []) or None,
            "range": list(reward_range) if reward_range else None,
            "tokenizer": None if swarm or environment_factory else _tokenizer(model),  # peers may have another one
        }
        self.rounds = rounds_of(args, rows)
        self.node = Node(
            model,
            rewards=functions,
            data=rows,
            test=_test(eval_dataset),
            options={key: value for key, value in options.items() if value is not None},
            environment=environment_factory,
            folder=getattr(args, "output_dir", None) or f"{Path(model).name}-GRPO",
            swarm=swarm,
            rounds=self.rounds,  # the schedule ends there
            **settings,
        )

    def train(self, resume_from_checkpoint: Any = None) -> list[Row]:
        """Train to the last round, from the newest checkpoint if there is one; return the metrics of its rounds."""
        left = self.rounds - self.node.round
        return self.node.train(left, self.callbacks) if left > 0 else []

    def evaluate(self, count: int = 100) -> dict[str, Any]:
        """Score the policy on held-out rows, as `Node.evaluate`."""
        return self.node.evaluate(count)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the policy as an ordinary model folder: into `model` below it, if it is the node's own folder."""
        own = Path(self.node.folder)
        out = own if output_dir is None else Path(output_dir)
        self.node.export(out / "model" if out.resolve() == own.resolve() else out)

    @property
    def accelerator(self) -> "PartialState":
        """Prints once, however many processes there are, as TRL's scripts use it."""
        from accelerate import PartialState  # imports torch

        return PartialState()

    def end(self) -> None:
        """Do nothing: the node has left its trackers and its swarm when `train` returns."""


def _tokenizer(model: str) -> str | None:
    """Return the file by which functions count the policy's own tokens; of the built-in one they are characters."""
    file = Path(model) / "tokenizer.json"
    return str(file.absolute()) if file.is_file() else None


def _functions(reward_funcs: Any) -> list[Reward]:
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    for one in functions:
        if isinstance(one, str) and ":" not in one:
            raise UserError(f"reward_funcs: {one!r} would be a reward model, which is not taken: give a function")
        if not isinstance(one, str) and (not callable(one) or hasattr(one, "state_dict")):
            raise UserError("reward_funcs: give functions of prompts and completions; a reward model is not taken")
    return functions


def _test(rows: Any) -> Rows | None:
    if rows is None or isinstance(rows, str | Path):
        return rows
    if isinstance(rows, Mapping):
        raise UserError("eval_dataset: give one set of rows, not several by name")
    return list(rows)


def check_config(args: Any) -> None:
    """Raise `UserError` for the first field of a `GRPOConfig` that no setting stands for, and is not at its default."""
    known = {*MAPPED, *COUNTED, *WITHOUT_EFFECT}
    # A default may follow from other fields: two that both have them differ only where somebody set something.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of `args` were shown when it was made
        plain = type(args)(output_dir=args.output_dir, bf16=args.bf16, use_cpu=args.use_cpu)
    for field in dataclasses.fields(args):
        value, default = getattr(args, field.name), getattr(plain, field.name)
        if field.name not in known and repr(value) != repr(default):
            raise UserError(f"GRPOConfig: {field.name}={value!r} has no counterpart in a node: leave it at {default!r}")
    for name, value in (args.model_init_kwargs or {}).items():
        if value not in INIT_KWARGS.get(name, ()):
            raise UserError(f"GRPOConfig: model_init_kwargs {name}={value!r} is not taken: leave it out")
    if _word(args.optim) not in OPTIMISERS:
        raise UserError(f"GRPOConfig: optim={_word(args.optim)!r}: a node has AdamW (adamw_torch) only")
    if _word(args.scale_rewards) == "batch":
        raise UserError("GRPOConfig: scale_rewards='batch': a round has peers' groups, too: set 'group' or 'none'")
    if args.per_device_train_batch_size * args.gradient_accumulation_steps % args.num_generations:
        raise UserError(
            "GRPOConfig: num_generations does not divide per_device_train_batch_size times gradient_accumulation_steps"
        )
    if args.steps_per_generation != args.gradient_accumulation_steps:
        raise UserError(f"GRPOConfig: steps_per_generation={args.steps_per_generation}: a node generates for each step")


def settings_of(args: Any, swarm: str | None, *, has_test: bool = False) -> dict[str, Any]:
    """Return the tables of a node's configuration for a `GRPOConfig`, and for a node that is alone without a swarm."""
    tree: dict[str, dict[str, Any]] = {"sampling": {}, "network": {}}
    if args is not None:
        for name, key in MAPPED.items():
            value = _mapped(name, getattr(args, name), args)
            if value is not None:
                put(tree, key, value)
        tree["sampling"]["local"] = groups_of(args)
        if not has_test or _word(args.eval_strategy) == "no":
            tree.pop("eval", None)
    if swarm is None:
        tree["sampling"] |= {"external": 0, "rule": "sapo"}
        tree["network"]["enabled"] = False
    return {name: table for name, table in tree.items() if table != {}}


def _mapped(name: str, value: Any, args: Any) -> Any:
    """Return the value of a setting for a field's; None where it says nothing."""
    match name:
        case "scale_rewards":
            return {"True": "group", "False": "none"}.get(str(value), _word(value))
        case "report_to":
            return [one for one in ([value] if isinstance(value, str) else value or []) if one not in ("none", "all")]
        case "use_vllm":
            return "vllm" if value else None
        case "bf16":  # TRL's default is true, on a CPU too
            return "auto" if value else False
        case "epsilon_high":
            return args.epsilon if value is None else value
        case "lr_scheduler_type":
            return _word(value)
        case "save_steps" | "eval_steps":
            return None if value is None else max(1, round(value))
    return value


def groups_of(args: Any) -> int:
    """Return how many questions a step of TRL's asks on one process."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps // args.num_generations


def rounds_of(args: Any, rows: Any) -> int:
    """Return how many rounds a node trains for: `max_steps`, or `num_train_epochs` times the rows by those of a round.

    Without `args`, three epochs of two questions a round, as TRL's default has three epochs.
    """
    if args is not None and args.max_steps > 0:
        return int(args.max_steps)
    if isinstance(rows, str | Path):
        raise UserError("train_dataset is a file: set max_steps, for its rows are not counted")
    epochs, groups = (3.0, 2) if args is None else (args.num_train_epochs, groups_of(args))
    return max(1, math.ceil(epochs * len(rows) / groups))


def _lora(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    plain = type(config)(r=config.r)
    taken = ("r", "lora_alpha", "target_modules", "task_type", "base_model_name_or_path", "inference_mode")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in taken and repr(value) != repr(getattr(plain, field.name)):
            raise UserError(f"peft_config: {field.name}={value!r} has no counterpart in a node: leave it out")
    targets = config.target_modules or "all-linear"
    if not isinstance(targets, str):
        raise UserError("peft_config: target_modules: give one text, such as 'all-linear', or a pattern")
    return {"policy": {"lora": {"r": config.r, "alpha": config.lora_alpha, "target_modules": targets}}}


def _word(value: Any) -> str:
    """Return what an enum of transformers stands for."""
    return str(getattr(value, "value", value))
