"""A trainer's checkpoints: what TRL's `GRPOTrainer` would save and load, but so that kill -9 harms none.

`_save_checkpoint` writes the same files as transformers', but atomically and without a model card, and the methods that
load them report errors in one line. The order of a save:

    1. on the training thread: the folder aside (`checkpoint.begin_checkpoint`), with what is small (`_write_small`)
    2. there, too: a copy of weights and optimiser (`snapshot.copied`), if the memory has room for it
    3. on a thread, while training goes on: weights and optimiser (`_write_large`), then the folder gets its name, and
       older ones go (`checkpoint.end_checkpoint`)

`node.run` says when one is due, by `trainer.save_steps` and `save_minutes`. One checkpoint is written at a time.
Without room for a copy, training waits for the third step.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from trl import GRPOConfig, GRPOTrainer

from node.config import TrainerConfig
from node.errors import DivergedError, UserError
from node.training.checkpoint import (
    Keep,
    Writes,
    begin_checkpoint,
    end_checkpoint,
    has_optimiser,
    is_finite,
    latest_checkpoint,
    mark_weights_only,
)
from node.training.ranks import Ranks, is_broken, sharded_state, whole_state
from node.training.snapshot import copied, size_of

SAY_S = 60.0  # seconds between lines on a wait

log = structlog.get_logger()


class SavingTrainer(GRPOTrainer):
    """TRL's trainer, with checkpoints of whole rounds that it goes on from; `SwarmTrainer` adds the rounds."""

    is_fsdp_enabled: bool  # transformers': the weights are in parts

    def __init__(
        self,
        whole_model: Any,
        config: TrainerConfig,
        also_save: Callable[[Path], None],
        ranks: Ranks,
        *,
        args: GRPOConfig,
        **trl: Any,
    ) -> None:
        """Make TRL's trainer, and know what its checkpoints need.

        Args:
            whole_model: the policy's: where ranks have parts of the weights, the one that is put together from them.
            config: the settings of training.
            also_save: writes what else belongs to a checkpoint into its folder.
            ranks: the processes that train together.
            args: TRL's configuration.
            **trl: TRL's other arguments.
        """
        self._ranks = ranks
        super().__init__(args=args, **trl)
        self._checkpoints = Path(args.output_dir) / "checkpoints"
        self._config = config
        self._options = config.options
        self._whole_model = whole_model
        self._also_save = also_save
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self.writes = Writes()
        self._written: Future[None] | None = None
        self._weights_after: int | None = None  # this many rounds; None between a step and its round's end

    @property
    def rounds_done(self) -> int:
        """Rounds whose last optimiser step is done."""
        return self.state.global_step // self.args.num_iterations

    def begin_step(self) -> None:
        """Note that from now on the weights are between two rounds."""
        self._weights_after = None

    def end_round(self) -> None:
        """Note that the weights are those of `rounds_done` rounds, of which the last one was logged."""
        self._weights_after = self.rounds_done

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        if self.state.global_step % self.args.num_iterations:
            return  # between two iterations of a round; it is done again from its beginning
        full = self._ranks.sharded and self._config.save_full > 0
        moments = whole_state(self.optimizer) if full else None  # all ranks take part
        if self._ranks.number:
            return
        self.wait_for_checkpoint()
        number = self.rounds_done
        keep = Keep(self._options.save_total_limit, self._config.save_full)
        aside = begin_checkpoint(self._checkpoints, number, self._write_small)
        large = self._large_state(moments)
        self.writes.note(size_of(large))
        copy = copied(large)
        if copy is None:
            log.info("training waits for its checkpoint", reason="a copy would take over half of the free memory")
            end_checkpoint(aside, partial(self._write_large, number, large), keep)
        else:
            write = partial(self._write_large, number, copy)
            self._written = self._writer.submit(end_checkpoint, aside, write, keep)

    def wait_for_checkpoint(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            DivergedError: the weights to be written are not finite.
            UserError: the disk is full.
        """
        if self._written is None:
            return
        began = time.monotonic()
        while not wait([self._written], SAY_S).done:  # a disk may take any time; a second signal ends the node
            log.warning("waiting for a checkpoint to be written", seconds=round(time.monotonic() - began))
        self._written.result()
        self._written = None

    def save_whole_round(self) -> None:
        """Write a checkpoint of the last whole round, for a run whose round in progress was abandoned.

        Gradients are no part of a checkpoint, so a round that has made no optimiser step has changed nothing. After a
        step the weights are of no round: then the newest checkpoint stays, as it does if it is of this round already.
        It stays, too, where each rank has a part of the optimiser's state: the others may be amid an exchange.
        """
        self.wait_for_checkpoint()
        if self._ranks.sharded:
            return
        newest = latest_checkpoint(self._checkpoints)
        if self._weights_after and (newest is None or newest.round != self._weights_after):
            self._save_checkpoint(self.model, None)
            self.wait_for_checkpoint()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with _must_fit(resume_from_checkpoint):
            self._check_iterations(Path(resume_from_checkpoint))
            if not self._ranks.sharded:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            if self._ranks.number == 0:
                self.is_fsdp_enabled = False  # the file is of whole weights, and so is what it is loaded into
                super()._load_from_checkpoint(resume_from_checkpoint, self._whole_model)
                self.is_fsdp_enabled = True
            self._ranks.scatter(trained_weights(self.model), trained_weights(self._whole_model))

    def _check_iterations(self, checkpoint: Path) -> None:
        """Raise `UserError` where rounds had other numbers of steps: rounds done could not be told from steps done."""
        steps = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
        done = int(checkpoint.name.rpartition("-")[2])
        if steps != done * self.args.num_iterations:
            raise UserError(
                f"cannot go on from {checkpoint}: its {done} rounds had {steps / done:g} updates each, and "
                f"trainer.num_iterations={self.args.num_iterations}: set it as it was, or use another --state"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        with _must_fit(checkpoint):
            if self._ranks.sharded and has_optimiser(Path(checkpoint)):
                state = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
                self.optimizer.load_state_dict(sharded_state(state, self.optimizer))
            elif not self._ranks.sharded:
                super()._load_optimizer_and_scheduler(checkpoint)
                self._check_moments(checkpoint)
            if self._ranks.sharded or not has_optimiser(Path(checkpoint)):  # then transformers loads neither
                scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
        # torch keeps rate, decay and betas with the state, and would go on with those: the settings of now hold.
        scheduler.base_lrs = [setting["initial_lr"] for setting in settings]
        rates = [
            base * of_step(scheduler.last_epoch)
            for base, of_step in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, setting, rate in zip(self.optimizer.param_groups, settings, rates, strict=True):
            group.update(setting | {"lr": rate})
        scheduler._last_lr = rates

    def _check_moments(self, checkpoint: str) -> None:
        """Raise `UserError` where the optimiser's state is of another `trainer.trl.optim` than is set now."""
        of_8_bits = self._options.optim == "adamw_8bit"
        if any(("exp_avg" in moments) == of_8_bits for moments in self.optimizer.state.values()):
            raise UserError(
                f"{checkpoint} was not trained with trainer.trl.optim={self._options.optim!r}: set it as it was, or "
                "use another --state"
            )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A weight that is tied to another is not in the file, and not missing either."""
        for name in getattr(self.model, "all_tied_weights_keys", {}):
            if name in load_result.missing_keys:
                load_result.missing_keys.remove(name)
        super()._issue_warnings_after_load(load_result)

    def _write_small(self, folder: Path) -> None:
        """Write what is small and changes with the next round, and what another thread must not touch."""
        path = str(folder)
        self.processing_class.save_pretrained(path)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)
        torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        if not self._config.save_full:
            mark_weights_only(folder)
        self._save_scaler(path)
        self._save_rng_state(path)
        self._also_save(folder)
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _large_state(self, moments: dict[str, Any] | None) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """Return the weights, or only the adapters if there are some, and the optimiser's state.

        `moments` is that state where its parts were put together.
        """
        model = self._whole_model
        weights = model.state_dict()
        if hasattr(model, "peft_config"):
            trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
            weights = {name: weight for name, weight in weights.items() if name in trained}
        if moments is None and self._config.save_full:
            moments = self.optimizer.state_dict()
        return weights, moments

    def _write_large(
        self, number: int, state: tuple[dict[str, torch.Tensor], dict[str, Any] | None], folder: Path
    ) -> None:
        weights, optimiser = state
        if not all(map(is_finite, weights.values())):
            raise DivergedError(number, "a weight is not finite", self._config.learning_rate)
        self._whole_model.save_pretrained(str(folder), state_dict=weights)
        if optimiser is not None:
            torch.save(optimiser, folder / OPTIMIZER_NAME)


def trained_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the weights that an optimiser changes: all, or the adapters."""
    return [weight for weight in model.parameters() if weight.requires_grad]


@contextmanager
def _must_fit(checkpoint: str | None) -> Iterator[None]:
    """Say in one line that a checkpoint, though whole, cannot be loaded."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, EOFError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and is_broken(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot go on from {checkpoint} ({reason}): it is damaged or of another model; "
            "set policy.model as it was, delete this checkpoint, or use another --state"
        ) from error
