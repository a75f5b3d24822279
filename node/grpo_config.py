"""TRL's `GRPOConfig`, `LoraConfig` and `model_init_kwargs` as a node's settings.

Each field of the installed `GRPOConfig` stands in one of five tables:

    MAPPED           becomes a setting
    PASSED           goes to TRL's own trainer as it is (`node.config.PASSED`)
    READ             is read by this file or by `node.grpo_trainer`, several for a setting
    WITHOUT_EFFECT   changes nothing that is learnt; where a script sets one, a line says so
    REFUSED          has to have its default, for the reason that stands there

A field in none of them is one of a TRL that this release does not know. It is refused unless it has its default.

A step of TRL's is an update. A round here has `num_iterations` of them, so numbers of steps are divided by it.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from node.config import LEFT_OUT, PASSED, put
from node.errors import one_line

MAPPED: Mapping[str, str] = {
    "learning_rate": "trainer.learning_rate",
    "adam_beta2": "trainer.trl.adam_beta2",
    "optim": "trainer.trl.optim",
    "lr_scheduler_type": "trainer.trl.lr_scheduler_type",
    "warmup_steps": "trainer.trl.warmup_steps",
    "loss_type": "trainer.trl.loss_type",
    "importance_sampling_level": "trainer.trl.importance_sampling_level",
    "mask_truncated_completions": "trainer.trl.mask_truncated_completions",
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
    "vllm_max_model_length": "engine.max_prompt_length",
    "chat_template_kwargs": "policy.template",
    "seed": "seed",
}
READ = (
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("steps_per_generation", "reward_weights", "model_init_kwargs"),
    *("do_eval", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "num_generations_eval"),
)
WITHOUT_EFFECT = (
    # what is shown, and how often: each round's metrics are in metrics.jsonl, and a line says how training goes
    *("logging_strategy", "logging_steps", "logging_first_step", "log_level", "log_level_replica", "log_on_each_node"),
    *("logging_nan_inf_filter", "log_completions", "num_completions_to_print", "log_unique_prompts", "log_multimodal"),
    *("disable_tqdm", "run_name", "project", "include_num_input_tokens_seen", "skip_memory_metrics", "debug"),
    # what follows from others
    *("generation_batch_size", "vllm_importance_sampling_cap", "resume_from_checkpoint", "do_train"),
    *("do_predict", "local_rank", "use_bias_correction_kl", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
    # how fast it is, or how much memory it takes: the node splits a round to fit
    *(
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing_kwargs",
        "tf32",
        "use_cpu",
    ),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config"),
    *("use_cache", "torch_empty_cache_steps", "auto_find_batch_size", "pad_to_multiple_of", "cache_implementation"),
    *("use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged"),
    *("bf16_full_eval", "fp16_full_eval"),
    # of a data loader, which a node has none of, and of labels
    *("remove_unused_columns", "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("dataloader_in_order", "accelerator_config", "label_names", "length_column_name", "label_smoothing_factor"),
    "ignore_data_skip",
    # of several processes, which `gossamer node --processes` starts
    *("average_tokens_across_devices", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "ddp_backend", "ddp_timeout", "ds3_gather_for_generation"),
    # of evaluations' batches
    *("per_device_eval_batch_size", "eval_accumulation_steps", "prediction_loss_only", "eval_do_concat_batches"),
    *("eval_use_gather_object", "include_for_metrics", "batch_eval_metrics"),
    # of checkpoints, which a node writes by save_steps, at its end and at a signal
    *("save_only_model", "save_strategy", "save_on_each_node", "enable_jit_checkpoint"),
    # of push_to_hub
    *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
    # of vLLM, which the node places itself, and of its servers
    *("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode", "vllm_server_base_url"),
    *("vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_model_impl"),
    "disable_dropout",  # it is off: what generates has none either
)
_CUTS = "it changes the distribution that completions are drawn from, and their probabilities are not corrected for it"
_SEVERAL = "several processes are started by `gossamer node --processes` or `--accelerate`"
_BEST = "checkpoints/best in output_dir is the best by evaluation"
_ORDER = "a node asks rows by epochs, each in an order that its seed draws"
_TRACKIO = "a node tells trackio a project alone"
REFUSED: Mapping[str, str] = {
    **{name: why for name, why in LEFT_OUT.items() if name != "gradient_accumulation_steps"},
    "sync_ref_model": LEFT_OUT["beta"],
    "optim_args": "the node's AdamW has adam_beta1, adam_beta2, adam_epsilon and weight_decay alone",
    "optim_target_modules": "the node's AdamW is over all weights that train",
    "fp16": "a node computes in float32 or bfloat16: set bf16",
    "neftune_noise_alpha": "no noise is added to embeddings",
    "trackio_space_id": _TRACKIO,
    "trackio_bucket_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
    "push_to_hub": "nothing is uploaded: upload the folder that save_model writes",
    "log_completions_hub_repo": "nothing is uploaded: rollouts.jsonl in output_dir has completions",
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "restore_callback_states_from_checkpoint": "callbacks begin anew",
    "full_determinism": "a node repeats a run on a CPU alone, where it does so anyway",
    "data_seed": "one seed decides all that is drawn: set seed",
    "train_sampling_strategy": _ORDER,
    "shuffle_dataset": _ORDER,
    "parallelism_config": _SEVERAL,
    "fsdp": _SEVERAL,
    "fsdp_config": _SEVERAL,
    "deepspeed": _SEVERAL,
    "trust_remote_code": "code in a model's repository is not run",
    "router_aux_loss_coef": "the loss has no part for routers",
    "cast_lm_head_to_fp32": "weights are float32, and bf16 says in what products are computed",
    "top_k": _CUTS,
    "min_p": _CUTS,
    "repetition_penalty": _CUTS,
    "generation_kwargs": _CUTS,
    "vllm_structured_outputs_regex": _CUTS,
    "vllm_mode": "a node's vLLM servers are set by engine={'kind': 'server', 'placement': 'http://HOST:PORT'}",
    "vllm_importance_sampling_clip_min": "weights of tokens are bounded above only",
    "multi_objective_aggregation": "a reward is one weighted sum of the functions'",
    "max_tool_calling_iterations": "an environment has at most 32 turns",
}
OPTIMISERS: Mapping[str, str] = {
    "adamw_torch": "adamw_torch_fused",
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
}


def complaints_about(args: Any) -> Iterator[str]:
    """Yield a line for each thing that a `GRPOConfig` says and a node cannot do."""
    known = {*MAPPED, *PASSED, *READ, *WITHOUT_EFFECT}
    for name, value, default in _not_at_default(args):
        if name in REFUSED:
            yield f"GRPOConfig: {name}={value!r}: {REFUSED[name]}; leave it at {default!r}"
        elif name not in known:
            yield f"GRPOConfig: {name}={value!r}: this release does not know the field; leave it at {default!r}"
    if word(args.optim) not in OPTIMISERS:
        yield f"GRPOConfig: optim={word(args.optim)!r}: a node has AdamW: {', '.join(OPTIMISERS)}"
    if word(args.scale_rewards) == "batch":
        yield "GRPOConfig: scale_rewards='batch': a round has peers' groups, too; set 'group' or 'none'"
    if args.per_device_train_batch_size * args.gradient_accumulation_steps % args.num_generations:
        yield (
            f"GRPOConfig: num_generations={args.num_generations} does not divide per_device_train_batch_size times "
            "gradient_accumulation_steps, the completions of a round"
        )
    if args.steps_per_generation != args.gradient_accumulation_steps:
        yield f"GRPOConfig: steps_per_generation={args.steps_per_generation}: a node generates for each step"


def without_effect(args: Any) -> list[str]:
    """Return the fields that a script has set and that change nothing here."""
    return [name for name, *_ in _not_at_default(args) if name in WITHOUT_EFFECT]


def _not_at_default(args: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value and default of each field that is not at its default."""
    # A default may follow from other fields: two that both have them differ only where somebody set something.
    follow = ("output_dir", "bf16", "use_cpu", "per_device_train_batch_size", "gradient_accumulation_steps")
    same = {name: getattr(args, name) for name in (*follow, "num_generations")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of `args` were shown when it was made
        try:
            plain = type(args)(**same)
        except ValueError:  # they do not go together: `complaints_about` says so
            plain = type(args)(output_dir=args.output_dir, bf16=args.bf16, use_cpu=args.use_cpu)
    for field in dataclasses.fields(args):
        value, default = getattr(args, field.name), getattr(plain, field.name)
        if field.name not in same and repr(value) != repr(default):
            yield field.name, value, default


def settings_of(args: Any, rounds: int, tests: int | None = None) -> dict[str, Any]:
    """Return the tables of a node's configuration for a `GRPOConfig`.

    Args:
        args: the `GRPOConfig`.
        rounds: that the node trains for.
        tests: rows of `eval_dataset`; None where there is none, 0 where they are not counted.
    """
    tree: dict[str, Any] = {"sampling": {"local": groups_of(args)}}
    for name, key in MAPPED.items():
        value = _mapped(name, getattr(args, name), args, rounds)
        if value is not None:
            put(tree, key, value)
    for name in PASSED:
        if (value := getattr(args, name)) is not None:
            put(tree, f"trainer.trl.{name}", value)
    tree["eval"] = {"every": 0 if tests is None else eval_every(args, rounds)}
    if tree["eval"]["every"]:
        tree["eval"] |= {"completions": args.num_generations_eval or args.num_generations}
        tree["eval"] |= {"count": tests} if tests else {}
    return tree


def _mapped(name: str, value: Any, args: Any, rounds: int) -> Any:
    """Return the value of a setting for a field's; None where it says nothing."""
    match name:
        case "scale_rewards":
            return {"True": "group", "False": "none"}.get(str(value), word(value))
        case "report_to":
            return [
                name for name in ([value] if isinstance(value, str) else value or []) if name not in ("none", "all")
            ]
        case "use_vllm":
            return "vllm" if value else None
        case "vllm_max_model_length":
            return None if value is None else max(1, value - args.max_completion_length)
        case "bf16":  # TRL's default is true, on a CPU too
            return "auto" if value else False
        case "epsilon_high":
            return args.epsilon if value is None else value
        case "lr_scheduler_type":
            return word(value)
        case "optim":
            return OPTIMISERS.get(word(value))
        case "warmup_steps":  # below 1 it is a part of the run
            return math.ceil(rounds * value) if value < 1 else rounds_in(value, args)
        case "save_steps":
            return _every(value, args, rounds)
    return value


def _every(steps: float, args: Any, rounds: int) -> int:
    """Return an interval in rounds; one below 1 is a part of the run."""
    return max(1, math.ceil(rounds * steps) if steps < 1 else rounds_in(steps, args))


def rounds_in(steps: float, args: Any) -> int:
    """Return how many rounds have so many updates."""
    return math.ceil(steps / args.num_iterations)


def eval_every(args: Any, rounds: int) -> int:
    """Return how many rounds are between two evaluations; 0 if there are none."""
    match word(args.eval_strategy):
        case "steps":
            return _every(args.eval_steps or args.logging_steps, args, rounds)
        case "epoch":
            return max(1, round(rounds / args.num_train_epochs))
    return 0


def evaluates(args: Any, rounds: int) -> Callable[[int], bool]:
    """Return what tells after how many rounds transformers would evaluate: not before the first, unless it is asked."""
    every = eval_every(args, rounds)
    is_by_epoch = word(args.eval_strategy) == "epoch"
    delay = args.eval_delay * every if is_by_epoch else rounds_in(args.eval_delay, args)

    def is_due(done: int) -> bool:
        if done == 0:
            return bool(args.eval_on_start)
        return done >= delay and (done % every == 0 or done == rounds)

    return is_due


def groups_of(args: Any) -> int:
    """Return how many questions a step of TRL's asks on one process."""
    return max(1, args.per_device_train_batch_size * args.gradient_accumulation_steps // args.num_generations)


def word(value: Any) -> str:
    """Return what an enum of transformers stands for."""
    return str(getattr(value, "value", value))


class ModelSaid(NamedTuple):
    """What arguments say of how a model is loaded: the settings, what a node cannot do, and what it does otherwise."""

    policy: dict[str, Any]
    complaints: list[str]
    notes: list[str]


def model_said(args: Any, peft_config: Any, quantization_config: Any) -> ModelSaid:
    """Read `model_init_kwargs` of a `GRPOConfig`, LoRA of `peft` (an object or a dict), and bitsandbytes' settings."""
    asked = ModelSaid({}, [], [])
    _read_lora(peft_config, asked)
    for name, value in (getattr(args, "model_init_kwargs", None) or {}).items():
        if name == "quantization_config":
            quantization_config = quantization_config or value
        elif name in ("dtype", "torch_dtype"):
            _read_dtype(str(value).removeprefix("torch."), asked)
        elif name == "attn_implementation":
            if value not in (None, "sdpa"):
                asked.notes.append(
                    f"model_init_kwargs: attention is sdpa here, and not {value!r}, which computes the same"
                )
        elif name in ("device_map", "low_cpu_mem_usage", "use_cache", "use_safetensors"):
            if value is not None:
                asked.notes.append(f"model_init_kwargs: {name}={value!r} has no effect here")
        elif value not in {"revision": (None, "main"), "trust_remote_code": (None, False)}.get(name, (None,)):
            asked.complaints.append(f"model_init_kwargs: {name}={value!r} is not taken: leave it out")
    if quantization_config is not None:
        _read_quantization(quantization_config, asked)
    return asked


def _read_lora(config: Any, said: ModelSaid) -> None:
    if config is None:
        return
    from peft import LoraConfig  # imports torch

    if isinstance(config, Mapping):
        try:
            config = LoraConfig(**config)
        except (TypeError, ValueError) as error:
            said.complaints.append(f"peft_config: {one_line(error)}")
            return
    if not isinstance(config, LoraConfig):
        said.complaints.append(f"peft_config: a {type(config).__name__} is not taken: give a LoraConfig")
        return
    plain = LoraConfig(r=config.r, target_modules=config.target_modules)
    taken = ("lora_alpha", "lora_dropout", "task_type", "base_model_name_or_path", "inference_mode")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in taken and repr(value) != repr(getattr(plain, field.name)):
            said.complaints.append(f"peft_config: {field.name}={value!r} has no counterpart in a node: leave it out")
    targets = config.target_modules
    names = targets if isinstance(targets, str) else sorted(targets or ())  # of none, peft chooses by the architecture
    said.policy["lora"] = {"r": config.r, "alpha": config.lora_alpha, "target_modules": names}
    if config.lora_dropout:
        said.notes.append(
            f"peft_config: lora_dropout={config.lora_dropout:g} is not applied: weights train as they generate"
        )


def _read_dtype(dtype: str, said: ModelSaid) -> None:
    if dtype in ("bfloat16", "float16") and "lora" in said.policy:
        said.policy["dtype"] = dtype
    elif dtype == "bfloat16":
        said.notes.append(
            "model_init_kwargs: weights that train are float32 here, and not bfloat16, which rounds small steps away; "
            "bf16 says in what products are computed"
        )
    elif dtype not in ("None", "auto", "float32"):
        said.complaints.append(
            f"model_init_kwargs: dtype={dtype}: a node has float32, and bfloat16 or float16 beneath adapters"
        )


def _read_quantization(config: Any, said: ModelSaid) -> None:
    given = config if isinstance(config, Mapping) else vars(config)
    if not (given.get("load_in_4bit") or given.get("_load_in_4bit")) or given.get("bnb_4bit_quant_type") != "nf4":
        said.complaints.append("quantization_config: a node has 4 bits of bnb_4bit_quant_type='nf4' alone")
    elif "lora" not in said.policy:
        said.complaints.append("quantization_config: weights of 4 bits are for adapters: give a peft_config")
    else:
        said.policy["dtype"] = "nf4"
