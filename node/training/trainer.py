"""The update: TRL's `GRPOTrainer`, used at its public `compute_loss` with batches of our own.

TRL would generate and score inside its `_prepare_inputs`. Here the node's loop does that,
so four methods are overridden and the rest of TRL's and transformers' training (loss,
clipping, optimiser, schedule, precision, devices, logging, callbacks) is theirs, untouched:

    get_train_dataloader   hands out the micro-batches of each optimiser step
    training_step          adds their gradients up: as many as the round's tokens need
    _prepare_inputs        moves a micro-batch to its device, as transformers itself does
    _get_per_token_logps_and_entropies   computes a group's prompt once (`shared_prefix`), and the logits of
                           completions alone, some at a time (`head`)

Checkpoints are the matter of the class above it (`saving`).

The data loader is not prepared by accelerate, which would fetch one batch ahead: the loop
is resumed only when the update of its last round, its log and the copy for its checkpoint are done.
One round is `num_iterations` optimiser steps.

Several processes may train one node (`ranks`): each runs this trainer, and number 0 leads. Only
number 0 draws rounds, logs and saves.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig

from node.config import NodeConfig
from node.errors import DivergedError, UserError
from node.policy.detection import check_bits, check_trackers, first_line
from node.policy.load import LARGE, Policy
from node.processes.machine import free_memory, is_out_of_memory
from node.rollouts.rule import Sample
from node.rollouts.rules import configured_weight
from node.training.batch import Batch, make_batches, parts_within, sampled_mask, tokens_of
from node.training.checkpoint import (
    remove_leftovers,
)
from node.training.head import logps_and_entropies, positions_at_once
from node.training.ranks import Ranks, own_part
from node.training.saving import SavingTrainer, trained_weights
from node.training.shared_prefix import (
    Pass,
    alone,
    attention_window,
    disagreement,
    in_rows,
    lay_out,
    takes_our_mask,
    together,
)
from node.training.surprise import Surprise

LOSS_SCALE = 4096  # with float16, whose least normal number is 6e-5: 1 over the tokens of a round of 16 thousand
MOST_NONFINITE = 8  # steps in a row; a single one may be an overflow that the next batch does not have

log = structlog.get_logger()

Rounds = Callable[[int], Iterator[Sequence[Sample]]]
OnUpdate = Callable[[int, Mapping[str, float]], None]


class SwarmTrainer(SavingTrainer):
    """TRL's update on rounds of weighted completions; made by `make_trainer`.

    A round without a row that has an advantage has no micro-batches, so no gradients: weights,
    optimiser and learning rate stay exactly as they are, and it counts as a round. The same holds for
    a step whose loss or gradients are not finite; after `MOST_NONFINITE` in a row the run has diverged.
    """

    control: TrainerControl

    def __init__(
        self,
        policy: Policy,
        args: GRPOConfig,
        config: NodeConfig,
        rounds: Rounds,
        on_update: OnUpdate,
        also_save: Callable[[Path], None],
        also_log: Callable[[int], Mapping[str, float]],
        ranks: Ranks,
    ) -> None:
        keeps_a_copy = ranks.sharded and ranks.number == 0  # whole, beside its parts
        held = [(weight, weight.data) for weight in trained_weights(policy.model)]
        super().__init__(
            policy.model,
            config.trainer,
            also_save,
            ranks,
            model=copy.deepcopy(policy.model) if keeps_a_copy else policy.model,
            reward_funcs=_unused_reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [""]}),  # TRL wants one; nothing reads it
            processing_class=policy.tokenizer,
            callbacks=[_RoundCallback(self, on_update)],
        )
        for weight, values in held:  # TRL rounds adapters over 4 bits to bfloat16, in which small steps are lost
            if weight.dtype != values.dtype:
                weight.data = values
        self.remove_callback(PrinterCallback)
        self._changed_elsewhere = config.weights.mode != "off"  # by peers' weights, on number 0
        self._full_weight = configured_weight(config.sampling)
        self._eos_token_ids = policy.eos_token_ids
        self._budget = self._told = config.trainer.tokens_per_batch  # halved where that many do not fit the memory
        self._scale = LOSS_SCALE if policy.model.dtype == torch.float16 else 1
        self._surprise = Surprise()
        self._nonfinite = 0  # steps in a row
        self._latest_logps = torch.zeros(0)
        self._rounds = rounds
        self._also_log = also_log
        self._window = attention_window(policy.model.config)
        # TRL reports the time of each pass; before training begins trackio has nobody to report to, and fails.
        args.report_to, trackers = [], args.report_to
        found = ranks.tell({"pass": self._choose_pass()} if ranks.number == 0 else None)
        self._chunk, self._shares_prefixes = found["pass"]
        args.report_to = trackers

    def create_accelerator_and_postprocess(self) -> None:
        """Make accelerate's object, and let it shard weights among CPUs too, not among GPUs only."""
        super().create_accelerator_and_postprocess()
        if self._ranks.sharded and not self.is_fsdp_enabled:
            PartialState().distributed_type = DistributedType.FSDP  # from which accelerate's other objects take it
            state = self.accelerator.state
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
            if self.args.bf16:
                state.fsdp_plugin.set_mixed_precision("bf16")
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> Any:
        """Return an iterable over steps' micro-batches, without a length; it starts where the trainer's state is."""
        return _MicroBatches(self)

    def _prepare_inputs(self, generation_batch: Batch) -> Batch:
        return Trainer._prepare_inputs(self, generation_batch)

    def training_step(
        self, model: torch.nn.Module, inputs: Sequence[Batch], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add up the gradients of a step's micro-batches, if there are any, and return the sum of their losses.

        If memory does not suffice for one, all are done again, with half as many tokens at once.

        Raises:
            DivergedError: loss or gradients were not finite in too many steps in a row.
            UserError: the memory does not suffice for a single row, or for one of several processes' micro-batches.
        """
        metrics = self._metrics["train"]
        known = {name: len(values) for name, values in metrics.items()}
        while True:
            loss = torch.zeros((), device=self.args.device)
            batch = None
            try:
                batches = self._within_budget(inputs)
                for at, batch in enumerate(batches, 1):
                    # Gradients are exchanged once a step; where each rank has parts of them, they are whole nowhere.
                    alone = at < len(batches) and not self._ranks.sharded
                    with self.accelerator.no_sync(model) if alone else nullcontext():
                        loss += super().training_step(model, batch, num_items_in_batch)
                break
            except (RuntimeError, MemoryError) as error:
                self._take_fewer(batch, error)
            model.zero_grad(set_to_none=True)  # a part of them is of the pass that failed
            self._surprise.take()
            for name, values in metrics.items():
                del values[known.get(name, 0) :]
            free_memory()
        if self._budget < self._told:
            self._told = self._budget
            remedy = f"trainer.tokens_per_batch={self._budget}"
            log.warning("out of memory: fewer tokens go through the model at once", set=remedy)
        if self._scale != 1:
            loss /= self._scale
            for weight in model.parameters():
                if weight.grad is not None:
                    weight.grad /= self._scale
        return self._finite(model, loss) if inputs else loss

    def _within_budget(self, batches: Sequence[Batch]) -> list[Batch]:
        if self._budget == self._config.tokens_per_batch:
            return list(batches)
        split = partial(
            parts_within, budget=self._budget, loss_type=self.loss_type, shared_prefixes=self._shares_prefixes
        )
        return [part for batch in batches for part in split(batch)]

    def _take_fewer(self, batch: Batch | None, error: Exception) -> None:
        """Halve the budget where `error` says that there is no memory for a micro-batch; to be called in its `except`.

        Raises:
            UserError: it has a single row, or is one of several processes'.
        """
        if batch is None or not is_out_of_memory(error):
            raise error
        tokens = tokens_of(batch, self._shares_prefixes)
        if len(batch["advantages"]) == 1:
            raise UserError(
                f"out of memory in the update, with one completion and its prompt at once ({tokens} tokens): set "
                f"trainer.gradient_checkpointing=true, {self._fewer_weights()}, or bound texts by "
                "engine.max_prompt_length and engine.max_completion_length"
            ) from error
        if self._ranks.count > 1:  # all take equally many micro-batches: none can split its own
            raise UserError(
                f"out of memory in the update, with {tokens} tokens at once in one of several processes: set "
                f"trainer.tokens_per_batch={min(self._budget, tokens) // 2}"
            ) from error
        self._budget = min(self._budget, tokens) // 2

    def train(self, *args: Any, **named: Any) -> Any:
        """Train to the last round, and return when the last checkpoint is written.

        Raises:
            Dismissed: number 0 of several ranks has found that nothing is left to do.
            UserError: there is no memory for a single row, or for the optimiser's step, half of which cannot be undone.
        """
        self._ranks.wait()
        try:
            return super().train(*args, **named)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory outside of the update's passes ({first_line(error)}): the optimiser keeps 8 bytes for "
                f"each trained weight; {self._fewer_weights()} or a smaller model, and start again: the node goes on "
                "from its last checkpoint"
            ) from error
        finally:
            self.wait_for_checkpoint()

    def _fewer_weights(self) -> str:
        """Return the next setting by which weights take less memory."""
        if not hasattr(self._whole_model, "peft_config"):
            return "train adapters (policy.lora.r=16)"
        return "take frozen weights of fewer bits (policy.dtype=nf4)"

    def _finite(self, model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
        """Return a step's loss; if the step is not finite, drop its gradients, count it, and return 0.

        transformers adds losses up and subtracts the sum from itself at each log: one NaN would stay for good.
        """
        gradients = [own_part(weight.grad) for weight in model.parameters() if weight.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).sum() if gradients else loss
        if torch.isfinite(self.accelerator.reduce(loss + norm)):
            self._nonfinite = 0
            return loss
        model.zero_grad(set_to_none=True)
        self._nonfinite += 1
        self._metrics["train"]["nonfinite"].append(1.0)
        if self._nonfinite == MOST_NONFINITE:
            what = f"loss or gradients were not finite {MOST_NONFINITE} times in a row"
            raise DivergedError(self.rounds_done + 1, what, self._config.learning_rate)
        return torch.zeros_like(loss)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make transformers' schedule, which stands still at a step without gradients."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        scheduler.__class__ = _OnlyWithGradients
        return scheduler

    def compute_loss(self, model: torch.nn.Module, inputs: Batch, *others: Any, **named: Any) -> Any:
        """Return TRL's loss, times what gradients through float16 need.

        On the way, note how likely peers' tokens are before the round changes the weights.
        """
        loss = super().compute_loss(model, inputs, *others, **named)
        if self.state.global_step % self.args.num_iterations == 0:
            self._surprise.note(self._latest_logps, sampled_mask(inputs), inputs["external"])
        return loss * self._scale

    def _get_per_token_logps_and_entropies(
        self, *args: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        found = self._forward(*args, **named)
        self._latest_logps = found[0].detach()
        return found

    def _forward(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if others.get("compute_aux_loss"):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **others
            )
        shares = self._shares_prefixes and attention_mask.sum(1).max() <= self._window
        completions = input_ids[:, -logits_to_keep:]
        layout = (lay_out if shares else in_rows)(
            input_ids[:, :-logits_to_keep],
            attention_mask[:, :-logits_to_keep],
            completions,
            attention_mask[:, -logits_to_keep:],
        )
        bare = self.accelerator.unwrap_model(model)
        chosen = completions.flatten()[layout.targets]
        with self.accelerator.autocast():
            logps, entropies = logps_and_entropies(
                model, bare, layout.inputs(bare), layout.sources, chosen, self.temperature, self._chunk or len(chosen)
            )
        empty = logps.new_zeros(completions.numel())
        return (
            empty.index_put((layout.targets,), logps).view_as(completions),
            empty.index_put((layout.targets,), entropies).view_as(completions),
            None,
        )

    def _choose_pass(self) -> tuple[int | None, bool]:
        """Return how many positions go through the head at once, None for all, and whether prompts are shared.

        Prompts are shared in a large model, and where padding would be taken for positions. Each way is tried on a
        few short rows, and not used if it is wrong.
        """

        def way(chunk: int | None = None, shares: bool = False) -> Pass:
            def logps(batch: Batch) -> torch.Tensor:
                self._chunk, self._shares_prefixes = chunk, shares
                return self._logps(batch)

            return logps

        def differs(tried: Pass) -> str:
            return disagreement(self.model, alone(way()), tried, precision)

        precision = torch.bfloat16 if self.args.bf16 or self.model.dtype.itemsize < 4 else torch.float32
        large = self.model.num_parameters() > LARGE
        padding = "" if large else differs(together(way()))
        shares = large or bool(padding)
        if shares:
            kind = self.model.config._attn_implementation
            reason = (
                differs(together(way(shares=True)))
                if takes_our_mask(self.model)
                else f"its attention, {kind}, takes no mask of ours"
            )
            if reason:
                padding = padding or differs(together(way()))
                log.info("a prompt is computed once for each completion", reason=reason)
            if reason and padding:
                log.warning("padding before a prompt changes what the model computes", how=padding)
            shares = not reason
        chunk = positions_at_once(self.model)
        if chunk < self._config.tokens_per_batch and (reason := differs(alone(way(chunk=1)))):
            log.warning("all logits of a micro-batch are held at once", reason=reason)
            return None, shares
        return chunk, shares

    def _logps(self, batch: Batch) -> torch.Tensor:
        logps, _, _ = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
        )
        return logps

    def _drawn(self) -> Iterator[list[Batch]]:
        """Draw rounds from the loop, and yield the micro-batches of each for all ranks."""
        for rows in self._rounds(self.rounds_done):
            if self._written is not None and self._written.done():
                self.wait_for_checkpoint()  # a failure ends the run now
            if self._options.mask_truncated_completions:
                rows = [row if self._ended(row) else row.without_tokens() for row in rows]
            yield make_batches(
                rows,
                self._full_weight,
                self._budget,
                self.args.loss_type,
                self._tokenizer.pad_token_id,
                self._shares_prefixes,
                self._ranks.count,
            )

    def micro_batches(self) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each optimiser step from the next round on."""
        args = self.args
        self._weights_after = self.rounds_done
        for batches in self._ranks.hand_out(self._drawn()):
            if self._changed_elsewhere and self._ranks.count > 1:
                self._ranks.scatter(trained_weights(self.model), trained_weights(self._whole_model))
            batches = self._with_ratios(batches)
            for _ in range(args.num_iterations):
                yield batches

    def _with_ratios(self, batches: Sequence[Batch]) -> list[Batch]:
        """Add the log-probabilities before the round's first step, where iterations or samplers are compared."""
        waiting, done = deque(batches), []
        while waiting:
            batch = waiting.popleft()
            try:
                done.append(self._compared(batch))
                continue
            except (RuntimeError, MemoryError) as error:
                self._take_fewer(batch, error)
            free_memory()
            waiting = deque(self._within_budget([batch, *waiting]))
        return done

    def _compared(self, batch: Batch) -> Batch:
        batch = dict(batch)
        masks = self._options.off_policy_mask_threshold is not None  # then TRL's loss looks at them too
        samplers = batch.get("sampling_per_token_logps") if masks else batch.pop("sampling_per_token_logps", None)
        if not self._options.vllm_importance_sampling_correction:
            samplers = None
        if self.args.num_iterations > 1 or samplers is not None:
            batch = self._with_old_logps(batch)
        return batch if samplers is None else self._corrected(batch, samplers)

    def _with_old_logps(self, batch: Batch) -> Batch:
        """Fix the policy that later iterations are clipped against: the one before the round's first step."""
        batch = self._prepare_inputs(batch)
        with torch.no_grad():
            return batch | {"old_per_token_logps": self._logps(batch)}

    def _ended(self, row: Sample) -> bool:
        return bool(row.completion) and row.completion[-1] in self._eos_token_ids

    def _corrected(self, batch: Batch, samplers: torch.Tensor) -> Batch:
        """Weight each token by how much likelier it was to the trainer than to its sampler, up to a bound.

        Truncated importance sampling: tokens are of the sampler's distribution, which differs from
        the trainer's by rounding, or by a round's update (`engine.ahead`), and the gradient is to be of the
        trainer's. TRL has it only for a vLLM that it runs itself. A token without its sampler's
        log-probability (NaN) keeps weight 1.
        """
        old = batch["old_per_token_logps"]
        samplers = samplers.to(old.device)  # NaN, too, where nothing was drawn
        differences = torch.where(samplers.isnan(), 0.0, old - samplers)
        ratios = differences.exp()
        known = ratios[~samplers.isnan()]
        for name, value in {
            "sampling_logp_difference/mean": differences.abs().sum() / max(len(known), 1),
            "sampling_logp_difference/max": differences.abs().max(),
            "importance_sampling_ratio/min": known.min() if len(known) else ratios.new_ones(()),
            "importance_sampling_ratio/mean": known.mean() if len(known) else ratios.new_ones(()),
            "importance_sampling_ratio/max": known.max() if len(known) else ratios.new_ones(()),
        }.items():
            self._metrics["train"][f"sampling/{name}"].append(value.item())
        options = self._options
        weights = importance_weights(
            differences, options.vllm_importance_sampling_mode, options.vllm_importance_sampling_clip_max
        )
        if self.loss_type == "vespo":  # weighs whole sequences, and takes these into its weight
            return batch | {"importance_sampling_ratio": weights}
        return batch | {"advantages": batch["advantages"][:, None] * weights}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a round with the loop's figures, to the trackers that `report_to` names; other logs as they are."""
        if "loss" in logs:
            surprise = self._surprise.take(lambda values: self._ranks.total(values, self.args.device))
            logs = logs | dict(self._also_log(self.rounds_done)) | surprise
        super().log(logs, start_time)
        if "loss" in logs:  # number 0 may have evaluated meanwhile, and decides on stopping and saving
            self._ranks.agree_on(self.control)

    def tell_of_evaluation(self, found: Mapping[str, object]) -> None:
        """Tell transformers' callbacks the numbers of an evaluation, each by its name after `eval_`."""
        metrics = {f"eval_{name}": value for name, value in found.items() if isinstance(value, int | float)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

    def _maybe_log_save_evaluate(self, *args: Any, **named: Any) -> None:
        """Log and save as number 0 decides, and wait until it has done so."""
        if self._ranks.sharded and self.control.should_log:  # once a round, before anybody looks at the weights
            self._ranks.gather(trained_weights(self.model), trained_weights(self._whole_model))
        super()._maybe_log_save_evaluate(*args, **named)
        self._ranks.wait()


def importance_weights(differences: torch.Tensor, mode: str, most: float) -> torch.Tensor:
    """Return the weight of each token, (B, C) or (B, 1), by one of TRL's modes.

    Args:
        differences: the trainer's log-probability less the sampler's, in nats (B, C); 0 where either is unknown.
        mode: "token_..." weighs each token by itself, "sequence_..." by its whole completion; a weight above `most` is
            cut to that by "..._truncate" and made 0 by "..._mask".
        most: the largest weight.
    """
    ratios = (differences.sum(-1, keepdim=True) if mode.startswith("sequence") else differences).exp()
    return ratios.clamp(max=most) if mode.endswith("truncate") else ratios.masked_fill(ratios > most, 0.0)


def _unused_reward(**_: object) -> list[float]:
    raise NotImplementedError("rewards are the loop's: TRL wants a function, and does not call it here")


class _MicroBatches:
    """The iterable that transformers consumes, a step's micro-batches at a time.

    The start is looked up late: transformers resumes after asking for this object.
    """

    def __init__(self, trainer: SwarmTrainer) -> None:
        self._trainer = trainer

    def __iter__(self) -> Iterator[list[Batch]]:
        return self._trainer.micro_batches()


class _OnlyWithGradients(torch.optim.lr_scheduler.LambdaLR):
    """A learning rate that advances with the weights: not in a step without gradients."""

    def step(self, epoch: int | None = None) -> None:
        if any(weight.grad is not None for group in self.optimizer.param_groups for weight in group["params"]):
            super().step(epoch)


class _RoundCallback(TrainerCallback):
    """Reports each round when it is logged, which is before it is saved."""

    def __init__(self, trainer: SwarmTrainer, on_update: OnUpdate) -> None:
        self._trainer = trainer
        self._on_update = on_update

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        state.compute_steps(args, state.max_steps)  # save as often as is set now, not as the checkpoint says

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._trainer.begin_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: object,
    ) -> None:
        if "loss" not in logs:
            return  # the summary at the end of training
        state.log_history.clear()  # the node keeps its metrics itself; here they would grow every checkpoint
        self._on_update(self._trainer.rounds_done, logs)
        self._trainer.end_round()


def make_trainer(
    policy: Policy,
    config: NodeConfig,
    folder: Path,
    rounds: Rounds,
    on_update: OnUpdate,
    also_save: Callable[[Path], None] = lambda folder: None,
    also_log: Callable[[int], Mapping[str, float]] = lambda done: {},
    ranks: Ranks | None = None,
) -> SwarmTrainer:
    """Make the trainer of a node whose state is in `folder`; its `train()` drives the node's loop.

    Args:
        policy: trained in place.
        config: of the node.
        folder: checkpoints go to `checkpoints/` in it, TensorBoard's files to `runs/`.
        rounds: the loop: given the rounds already done, yields each further round's samples.
        on_update: called once a round, after its last optimiser step and before a checkpoint of
            it, with the rounds done so far and TRL's metrics.
        also_save: adds what else belongs to a checkpoint to its folder.
        also_log: called once a round, before `on_update`, with the rounds done so far; returns what
            to log of the round beside TRL's metrics.
        ranks: this process's place among those that train the node; without it, it is the only one.

    Raises:
        UserError: `report_to` names a package that is not installed, or `target_modules` the output matrix.
    """
    ranks = ranks or Ranks()
    check_bits(optim=config.trainer.options.optim)
    check_trackers(config.trainer.options.report_to)
    if ranks.sharded and (config.policy.dtype == "nf4" or config.trainer.options.optim == "adamw_8bit"):
        raise UserError(
            "FSDP2 shares out neither policy.dtype='nf4' nor trainer.trl.optim='adamw_8bit': leave them out"
        )
    if ranks.number == 0:
        remove_leftovers(folder / "checkpoints")
    args = _trl_config(config, policy, folder)
    try:
        return SwarmTrainer(policy, args, config, rounds, on_update, also_save, also_log, ranks)
    except ValueError as error:
        if "lm_head" in str(error):
            raise UserError(f"policy.lora.target_modules: {error}") from error
        raise


def _trl_config(config: NodeConfig, policy: Policy, folder: Path) -> GRPOConfig:
    trainer, options = config.trainer, config.trainer.options
    args = GRPOConfig(
        output_dir=str(folder),
        max_steps=config.last_round * trainer.num_iterations,
        seed=(config.seed or 0) % 2**32,
        use_cpu=policy.model.device.type == "cpu",
        # The update.
        learning_rate=trainer.learning_rate,
        **trainer.of_update,
        warmup_steps=options.warmup_steps * trainer.num_iterations,
        beta=0.0,  # no reference model is kept
        num_iterations=trainer.num_iterations,
        gradient_accumulation_steps=1,  # a step's micro-batches are added up in `training_step`
        steps_per_generation=1,
        gradient_checkpointing=trainer.gradient_checkpointing or None,  # False, too, makes newer transformers warn
        bf16=policy.bf16,
        disable_dropout=True,
        temperature=config.engine.temperature,
        max_completion_length=config.engine.max_completion_length,
        # TRL checks that these agree; batches of our own have the size they have.
        num_generations=config.sampling.completions,
        per_device_train_batch_size=config.sampling.completions,
        # What is written, and when.
        logging_steps=trainer.num_iterations,
        save_steps=trainer.save_steps * trainer.num_iterations,
        report_to=list(options.report_to) or "none",
        project="gossamer",  # for trackio; wandb goes by WANDB_PROJECT
        run_name=folder.resolve().name,
        disable_tqdm=True,
        # The loop finds its own place when it resumes.
        ignore_data_skip=True,
        # `training_step` looks for a loss that is not finite; looking twice would cost a synchronisation a step.
        logging_nan_inf_filter=False,
    )
    args._n_gpu = min(args.n_gpu, 1)  # a node trains on one GPU; where several are visible TRL refuses DataParallel
    return args
